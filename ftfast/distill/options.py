"""The command line's options for settings, one a field, made from the fields themselves."""

import argparse
import dataclasses
import typing
from typing import Any

from ftfast.distill.errors import SettingsError
from ftfast.distill.fields import plain_type
from ftfast.distill.settings import HINTS, Settings


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """One option for every setting; the values stay text until :func:`from_arguments` reads them."""
    for item in dataclasses.fields(Settings):
        choices, default = item.metadata["choices"], item.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        note = f" ({'some' if isinstance(default, tuple) else 'one'} of {', '.join(choices)})" if choices else ""
        known = "" if shown in (None, "", "auto", 0) else f" [{shown}]"
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            metavar=_metavar(HINTS[item.name]),
            help=item.metadata["help"] + note + known,
        )


def from_arguments(arguments: argparse.Namespace) -> Settings:
    """The settings that the command line gives, the recipe's where it gives none.

    Raises:
        SettingsError: a value that its field does not take.
    """
    given = {name: getattr(arguments, name) for name in HINTS if getattr(arguments, name) is not None}
    return Settings(**{name: _parse(name, HINTS[name], text) for name, text in given.items()})


def _metavar(hint: Any) -> str:
    name = {int: "N", float: "X", str: "NAME"}[plain_type(hint)]
    return f"{name},..." if typing.get_origin(hint) is tuple else name


def _parse(name: str, hint: Any, text: str) -> Any:
    is_tuple = typing.get_origin(hint) is tuple
    words = [word.strip() for word in text.split(",")] if is_tuple else [text]
    kind = plain_type(hint)
    try:
        values = tuple(kind(word) for word in words)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise SettingsError(
            f"{name} is {text!r}; it takes {wanted + ', or several separated by commas' if is_tuple else wanted}."
        ) from None
    return values if is_tuple else values[0]
