"""The loss: its autograd.Function, and the launchers of each backend."""
