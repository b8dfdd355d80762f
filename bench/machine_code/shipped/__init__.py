"""The launches that the features are shipped with; tests and ``python -m bench resources`` compile these.

A feature is a module of this package, named by its stem, that defines ``shipped_launches()``; nothing else registers
it. It runs the launchers on CPU tensors under :func:`bench.machine_code.compiling.recorded`.
"""

import pkgutil
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import NamedTuple

from bench.machine_code.compiling import ARCHITECTURES, Launch


class ShippedLaunch(NamedTuple):
    """A launch that training reaches with the shapes a feature is shipped for.

    Attributes:
        name: as the table shows it, such as ``"forward 2x256x7x7 bfloat16"``; unique within the
            feature and an architecture.
        launch: as a launcher asked for it.
        architectures: those that it is shipped for.
        tensor_cores: whether it has to use them.
    """

    name: str
    launch: Launch
    architectures: Sequence[int] = ARCHITECTURES
    tensor_cores: bool = False


def discover() -> dict[str, Callable[[], Iterable[ShippedLaunch]]]:
    """``shipped_launches`` of every feature, by its stem."""
    return {
        found.name: import_module(f"{__name__}.{found.name}").shipped_launches
        for found in pkgutil.iter_modules(__path__)
    }
