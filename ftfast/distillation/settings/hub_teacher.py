"""A teacher from the Hub that says itself which model it is."""

from typing import Any

from ftfast.distillation.runtime import checkpoint, hub
from ftfast.errors import SettingsError

_NAMED = {"teacher": ("name", str), "teacher_channels": ("channels", int), "shortcut": ("shortcut", str)}


def with_hub_teacher(given: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are given; where ``teacher`` is an address on the Hub, with the model that its file names.

    Raises:
        HubError: it cannot be had.
        SettingsError: a file that does not say what it is of, or another checkpoint beside it.
    """
    asked = given.get("teacher")
    if asked is None or not hub.is_address(asked):
        return given
    if given.get("teacher_checkpoint") is not None:
        raise SettingsError(
            f"teacher is {asked!r} and teacher_checkpoint is given too; give a model's name as teacher."
        )
    source = hub.pinned(asked)
    described = checkpoint.describe_weights(hub.local(source))
    model = described.get("model") if isinstance(described, dict) else None
    found = model if isinstance(model, dict) else {}
    if not all(isinstance(found.get(key), kind) for key, kind in _NAMED.values()):
        raise SettingsError(
            f"teacher is {asked!r}, whose file is none of ftfast export and does not say which model it is; give "
            f"--teacher NAME --teacher-checkpoint {asked}."
        )
    named = {name: found[key] for name, (key, _) in _NAMED.items()}
    return {**named, **given, "teacher": named["teacher"], "teacher_checkpoint": source}
