"""torchdistill's auxiliary wrappers of Factor Transfer, built around ftfast's paraphraser and translator.

Imports torchdistill; what needs no more than torch stands in the modules beside this one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchdistill.models import wrapper as theirs

from ftfast.compat.torchdistill.networks import Paraphraser4FactorTransfer, Translator4FactorTransfer

NETWORKS = {cls.__name__: cls for cls in (Paraphraser4FactorTransfer, Translator4FactorTransfer)}


@contextmanager
def _our_networks() -> Iterator[None]:
    """While it lasts, torchdistill's wrappers, which name their networks as globals, build ftfast's."""
    kept = {name: getattr(theirs, name) for name in NETWORKS}
    try:
        for name, network in NETWORKS.items():
            setattr(theirs, name, network)
        yield
    finally:
        for name, network in kept.items():
            setattr(theirs, name, network)


class Teacher4FactorTransfer(theirs.Teacher4FactorTransfer):
    """The teacher and ftfast's paraphraser; arguments, files and behaviour are torchdistill's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _our_networks():
            super().__init__(*args, **kwargs)

    def secondary_forward(self, io_dict: Mapping[str, Mapping[str, Any]]) -> None:
        """Runs the paraphraser on the output of ``input_module_path``.

        Raises:
            LookupError: no hook has kept that output.
        """
        _check_kept("teacher", self.input_module_path, io_dict)
        super().secondary_forward(io_dict)


class Student4FactorTransfer(theirs.Student4FactorTransfer):
    """The student and ftfast's translator; arguments and behaviour are torchdistill's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _our_networks():
            super().__init__(*args, **kwargs)

    def secondary_forward(self, io_dict: Mapping[str, Mapping[str, Any]]) -> None:
        """Runs the translator on the output of ``input_module_path``.

        Raises:
            LookupError: no hook has kept that output.
        """
        _check_kept("student", self.input_module_path, io_dict)
        super().secondary_forward(io_dict)


def _check_kept(side: str, path: str, io_dict: Mapping[str, Mapping[str, Any]]) -> None:
    if "output" not in io_dict.get(path, {}):
        kept = ", ".join(repr(each) for each, sides in io_dict.items() if "output" in sides) or "nothing"
        raise LookupError(
            f"input_module_path is {path!r}, and the {side}'s hooks have kept no output of it, but of {kept}; name one "
            f"of these, or add {path!r} to the {side}'s forward_hook."
        )
