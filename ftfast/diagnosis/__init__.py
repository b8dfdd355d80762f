"""Whether kernels compute what they should (``ftfast check``), and what slows a training (``ftfast.doctor``)."""
