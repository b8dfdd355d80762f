"""One step of a student: losses, gradients, the optimiser, and all of it recorded as a CUDA graph."""
