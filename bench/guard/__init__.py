"""``python -m bench guard``: a few cases measured again, and whether they are worse than a record's."""
