"""Importing this module gives torchdistill's own keys of Factor Transfer to ftfast's classes.

For a YAML file: ``dependencies: [ftfast.compat.torchdistill.replace]``.
"""

from ftfast.compat.torchdistill.registration import replace_keys

replace_keys()
