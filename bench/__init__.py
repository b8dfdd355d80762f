"""Benchmarks of ftfast: ``python -m bench``, from the checkout.

A bench is a module of this package that defines ``BENCH``; nothing else registers it.
"""
