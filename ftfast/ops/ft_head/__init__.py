"""The whole head: which kernels compute it, and the autograd.Function over them."""
