"""The settings of a run: fields, presets, checks, options of the command line."""
