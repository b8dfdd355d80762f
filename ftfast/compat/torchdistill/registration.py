"""Makes ftfast's classes known to torchdistill: under keys of ftfast's, and in place of its own."""

import warnings
from functools import cache
from importlib import import_module, util
from types import ModuleType
from typing import Any, NamedTuple

from ftfast.compat.torchdistill.loss import FTLoss
from ftfast.compat.torchdistill.networks import Paraphraser4FactorTransfer, Translator4FactorTransfer

PREFIX = "ftfast."
TESTED_VERSIONS = ("1.1.5",)
NETWORKS = (Paraphraser4FactorTransfer, Translator4FactorTransfer)


class _Torchdistill(NamedTuple):
    """What is registered with."""

    losses: ModuleType
    models: ModuleType
    wrapper: ModuleType
    our_wrappers: tuple[type, ...]


# What stood under torchdistill's own names before replace_keys, by the place and the name.
_replaced: dict[str, Any] = {}


def register() -> None:
    """Registers under ``ftfast.FTLoss``, ``ftfast.Teacher4FactorTransfer``, ``ftfast.Student4FactorTransfer``,
    ``ftfast.Paraphraser4FactorTransfer`` and ``ftfast.Translator4FactorTransfer``.

    Raises:
        ImportError: torchdistill is missing, does not import, or has no such registries.
    """
    parts = _torchdistill()
    parts.losses.register_mid_level_loss(key=PREFIX + FTLoss.__name__)(FTLoss)
    for network in NETWORKS:
        parts.models.register_adaptation_module(key=PREFIX + network.__name__)(network)
    for wrapper in parts.our_wrappers:
        parts.models.register_auxiliary_model_wrapper(key=PREFIX + wrapper.__name__)(wrapper)


def try_to_register() -> None:
    """:func:`register` where torchdistill is installed; one that does not import is warned about."""
    if util.find_spec("torchdistill") is None:
        return
    try:
        register()
    except ImportError as error:
        warnings.warn(f"ftfast's classes are not registered: {error}", stacklevel=3)


def replace_keys() -> None:
    """:func:`register`, and gives ``FTLoss`` and the wrappers ``Teacher4FactorTransfer`` and ``Student4FactorTransfer``
    to ftfast's classes too, and their paraphraser and translator to wrappers of others that build these by name.

    Raises:
        ImportError: as :func:`register`.
    """
    register()
    if _replaced:
        return
    parts = _torchdistill()
    for registry, cls in _places(parts):
        name = cls.__name__
        _replaced[name] = registry[name]
        registry[name] = cls


def restore_keys() -> None:
    """Undoes :func:`replace_keys`."""
    if not _replaced:
        return
    for registry, cls in _places(_torchdistill()):
        registry[cls.__name__] = _replaced.pop(cls.__name__)


def _places(parts: _Torchdistill) -> list[tuple[dict[str, Any], type]]:
    """Where torchdistill finds a class by its name; its wrappers find their networks among their module's globals."""
    return [
        (parts.losses.MIDDLE_LEVEL_LOSS_DICT, FTLoss),
        *((parts.models.AUXILIARY_MODEL_WRAPPER_DICT, wrapper) for wrapper in parts.our_wrappers),
        *((vars(parts.wrapper), network) for network in NETWORKS),
    ]


@cache
def _torchdistill() -> _Torchdistill:
    if util.find_spec("torchdistill") is None:
        raise ImportError(
            "torchdistill is not installed, and these classes register with it; pip install 'ftfast[peers]'.",
            name="torchdistill",
        )
    version = _version()
    tested = ", ".join(TESTED_VERSIONS)
    try:
        losses, models = import_module("torchdistill.losses.registry"), import_module("torchdistill.models.registry")
        import_module("torchdistill.losses.mid_level")  # else it would register its own FTLoss after ours
        wrapper = import_module("torchdistill.models.wrapper")
        ours = import_module("ftfast.compat.torchdistill.wrappers")
        parts = _Torchdistill(losses, models, wrapper, (ours.Teacher4FactorTransfer, ours.Student4FactorTransfer))
        assert all(cls.__name__ in registry for registry, cls in _places(parts))
    except (ImportError, AttributeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or "it has no Factor Transfer under the names that are known"
        raise ImportError(
            f"torchdistill {version} cannot be registered with ({reason}); ftfast is tested with {tested}."
        ) from error
    if version not in TESTED_VERSIONS:
        warnings.warn(f"ftfast is tested with torchdistill {tested}, and this is {version}.", stacklevel=4)
    return parts


def _version() -> str:
    """That of the code that is imported: what is installed may be another copy."""
    try:
        return str(import_module("torchdistill").__version__)
    except (ImportError, AttributeError):
        return "of an unknown version"
