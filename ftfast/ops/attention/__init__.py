"""Attention maps and their difference."""
