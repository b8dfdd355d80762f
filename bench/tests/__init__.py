"""``pytest bench``: the quick cases of the benches, and what the figures of the heads rest on."""
