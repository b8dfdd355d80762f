"""Benches of steps, loaders, stores and whole runs."""
