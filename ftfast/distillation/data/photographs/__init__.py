"""Photographs in folders or tar shards: listed, read, decoded, cut, and handed over in batches."""
