"""Checkpoints of paraphrasers and translators under other projects' names."""
