"""Typed, checked dataclass fields with their help text."""

import math
import types
import typing
from dataclasses import Field, field, fields
from typing import Any

from ftfast.errors import SettingsError

_LARGEST = 2**32  # of whole numbers: more than any recipe has, and every library below takes it


def setting(
    default: Any,
    explanation: str,
    *,
    choices: tuple[str, ...] = (),
    least: float = -math.inf,
    most: float = math.inf,
    positive: bool = False,
    free: bool = False,
) -> Any:
    """A dataclass field that knows what it takes: one of ``choices``, or a number from ``least`` to ``most``.

    ``free`` ones change nothing that is computed but its rounding, so a resumed run may have them otherwise.
    """
    metadata = {
        "help": explanation,
        "choices": choices,
        "least": least,
        "most": most,
        "positive": positive,
        "free": free,
    }
    return field(default=default, metadata=metadata)


def check_fields(record: Any) -> None:
    """Raises SettingsError where a value of a dataclass is not of its field's type, choices and range."""
    hints = typing.get_type_hints(type(record))
    for item in fields(record):
        _check(item, hints[item.name], getattr(record, item.name))


def _check(item: "Field[Any]", hint: Any, value: Any) -> None:
    optional = typing.get_origin(hint) is types.UnionType
    is_tuple = typing.get_origin(hint) is tuple
    if optional and value is None:
        return
    kind = plain_type(hint)
    accepted = (int, float) if kind is float else kind
    for entry in value if is_tuple and isinstance(value, tuple) else (value,):
        if isinstance(entry, bool) != (kind is bool) or not isinstance(entry, accepted):
            raise SettingsError(f"{item.name} is {value!r}; it takes {'a list of ' * is_tuple}{kind.__name__} values.")
        choices = item.metadata["choices"]
        if choices and entry not in choices:
            raise SettingsError(f"{item.name} is {entry!r}; it takes {', '.join(choices)}.")
        if isinstance(entry, int | float) and kind is not bool:
            _check_range(item, entry)


def _check_range(item: "Field[Any]", value: float) -> None:
    least, most, positive = (item.metadata[key] for key in ("least", "most", "positive"))
    if isinstance(value, int):
        most = min(most, _LARGEST)
    # Compared first: math.isfinite takes no integer that is too large for a float.
    if least <= value <= most and math.isfinite(value) and (value > 0 or not positive):
        return
    lower = "more than 0" if positive else f"at least {least:g}"
    upper = f" and at most {most:.12g}" if math.isfinite(most) else ""
    raise SettingsError(f"{item.name} is {value}; it takes a number of {lower}{upper}.")


def plain_type(hint: Any) -> type:
    """``int`` of ``int``, ``int | None`` and ``tuple[int, ...]``."""
    if typing.get_origin(hint) is types.UnionType or typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return typing.cast(type, hint)
