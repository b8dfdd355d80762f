"""The command line's options for settings, one a field, made from the fields themselves."""

import argparse
import dataclasses
import typing
from typing import Any

from ftfast.distillation.settings.fields import plain_type
from ftfast.distillation.settings.presets import PRESETS
from ftfast.distillation.settings.run_settings import HINTS, Settings
from ftfast.errors import SettingsError

_TRUTHS = {"yes": True, "true": True, "no": False, "false": False}


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """``--preset``, and one option for every setting; the values stay text until :func:`given_settings` reads them."""
    parser.add_argument(
        "--preset", metavar="NAME", help=f"where the other values come from (one of {', '.join(PRESETS)}) [the data's]"
    )
    for item in dataclasses.fields(Settings):
        if plain_type(HINTS[item.name]) is bool:
            option = item.name.replace("_", "-")
            parser.add_argument(
                f"--{option}",
                f"--no-{option}",
                action=_YesOrNo,
                nargs="?",
                metavar="yes|no",
                help=f"{item.metadata['help']} [{'yes' if item.default else 'no'}]",
            )
            continue
        choices, default = item.metadata["choices"], item.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        note = f" ({'some' if isinstance(default, tuple) else 'one'} of {', '.join(choices)})" if choices else ""
        known = "" if shown in (None, "", "auto", 0) else f" [{shown}]"
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            metavar=_metavar(HINTS[item.name]),
            help=item.metadata["help"] + note + known,
        )


class _YesOrNo(argparse.Action):
    """``--name``, ``--no-name`` and, as settings.json has it, ``--name true`` or ``false``."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        meant = str(option_string).startswith("--no-")
        setattr(namespace, self.dest, ("no" if meant else "yes") if values is None else f"{'not ' * meant}{values}")


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gives, by name; those that it leaves out are not among them.

    Raises:
        SettingsError: a text that is no value of its setting.
    """
    given = {name: getattr(arguments, name) for name in HINTS if getattr(arguments, name) is not None}
    return {name: _parse(name, HINTS[name], text) for name, text in given.items()}


def _metavar(hint: Any) -> str:
    name = {int: "N", float: "X", str: "NAME"}[plain_type(hint)]
    return f"{name},..." if typing.get_origin(hint) is tuple else name


def _parse(name: str, hint: Any, text: str) -> Any:
    is_tuple = typing.get_origin(hint) is tuple
    if is_tuple and not text.strip():
        return ()
    words = [word.strip() for word in text.split(",")] if is_tuple else [text]
    kind = plain_type(hint)
    if kind is bool:
        if text.lower() not in _TRUTHS:
            raise SettingsError(f"{name} is {text!r}; it takes yes or no.")
        return _TRUTHS[text.lower()]
    try:
        values = tuple(kind(word) for word in words)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise SettingsError(
            f"{name} is {text!r}; it takes {wanted + ', or several separated by commas' if is_tuple else wanted}."
        ) from None
    return values if is_tuple else values[0]
