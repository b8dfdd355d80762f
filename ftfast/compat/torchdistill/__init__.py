"""torchdistill: its ``FTLoss`` and the two networks of its Factor Transfer wrappers, and their registration with it.

Importing this module, which a torchdistill YAML file can do with ``dependencies: [ftfast.compat.torchdistill]``, makes
the keys ``ftfast.FTLoss`` (a criterion), ``ftfast.Teacher4FactorTransfer`` and ``ftfast.Student4FactorTransfer``
(auxiliary model wrappers), ``ftfast.Paraphraser4FactorTransfer`` and ``ftfast.Translator4FactorTransfer`` (adaptation
modules) known to it. ``dependencies: [ftfast.compat.torchdistill.replace]`` gives these classes to its own keys too, so
that nothing else in the file changes. Without torchdistill the classes import, and :func:`register` says what to
install.
"""

from ftfast.compat.torchdistill.loss import FTLoss
from ftfast.compat.torchdistill.networks import Paraphraser4FactorTransfer, Translator4FactorTransfer
from ftfast.compat.torchdistill.registration import register, replace_keys, restore_keys, try_to_register

__all__ = [
    "FTLoss",
    "Paraphraser4FactorTransfer",
    "Translator4FactorTransfer",
    "register",
    "replace_keys",
    "restore_keys",
]

try_to_register()
