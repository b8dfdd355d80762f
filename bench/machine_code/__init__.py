"""What the compiled kernels need: registers, shared memory, instructions."""
