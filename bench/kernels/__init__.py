"""Benches of kernels: loss, head, convolutions, drop-ins."""
