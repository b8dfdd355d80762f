"""A GPU's host side without a GPU: CUDA's libraries stood in for, so that torch, Triton and ftfast run as beside one.

Kernels compute nothing, so that numbers are worthless there; launches, copies, waits, streams, devices and captures
are kept account of. ``python -m tests.stand_in_gpu WORD ...`` runs a Python command that way; a test with the mark
``stand_in_gpu`` runs that way in one process that all of them share.
"""
