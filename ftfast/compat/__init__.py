"""Other libraries' Factor Transfer classes, under their names, signatures and checkpoint keys, on ftfast's kernels.

A module for each: :mod:`.official` (Jangho-Kim/Factor-Transfer-pytorch), :mod:`.torchdistill`, :mod:`.mmrazor`,
:mod:`.repdistiller` and :mod:`.zoo` (AberHu/Knowledge-Distillation-Zoo). Networks load the library's checkpoints with
``strict=True``, draw the same initial weights from the same seed where they keep torch's initialisation, and give the
same numbers. Losses give the same numbers where the library's are right, take factors of any strides and dtype, and
are returned in float32, or float64 where a factor is float64.
"""
