"""What bench/on_gpu.sh runs: builds, tests and measures ftfast on a machine with a GPU, one step after the other.

The runner needs nothing but Python; a step that lacks a package says so and the others go on.
"""
