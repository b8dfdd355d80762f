"""A training of models and loaders of one's own, called from Python."""
