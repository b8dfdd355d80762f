"""Files of torch.save with objects beside their tensors: what the objects hold is left unread, and nothing is run.

torch's own unpickler for ``weights_only`` does the reading, which takes tensors and plain containers and names the
first class that it does not know. That name is then given to a class that ignores whatever it is made of.
"""

import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

# A whole pickled network has some dozens of classes, and a file with more is read anew too often.
_MOST_NAMES = 100


class StandIn:
    """In the place of an object of an unknown class, or of what an unknown function would return; it holds nothing."""

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def load_torch(source: Path | BinaryIO) -> tuple[Any, list[str]]:
    """What a file of torch.save holds, on the CPU, and the names of the classes and functions that are stood in for.

    Raises:
        pickle.UnpicklingError: damaged, or instructions that torch does not take, such as a function of ``os``.
        Exception: what torch.load raises for damaged files, which has no common class.
    """
    names: list[str] = []
    while True:
        try:
            with torch.serialization.safe_globals([(StandIn, name) for name in names]):
                return _load(source), names
        except pickle.UnpicklingError as error:
            unknown = re.search(r"Unsupported global: GLOBAL (\S+) was not", str(error))
            if unknown is None or len(names) == _MOST_NAMES:
                raise
            name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"  # which torch leaves out
            if name in names:
                raise
            names.append(name)


def _load(source: Path | BinaryIO) -> Any:
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    source.seek(0)
    return torch.load(source, map_location="cpu", weights_only=True)
