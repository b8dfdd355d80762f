"""What was found out once about calls of one kind, and is looked up from then on."""

from typing import TypeVar

from torch import Tensor, nn

ORDINARY = (Tensor, nn.Parameter)
"""The types of tensors whose kind is told by what is quick to read."""
MOST = 4096

Key = TypeVar("Key")
Value = TypeVar("Value")


class Remembered(dict[Key | None, Value]):
    """A dictionary that begins anew where it has grown large, for any number of threads; nothing is kept under None."""

    def keep(self, key: Key | None, value: Value) -> Value:
        """The value, remembered under the key."""
        if key is not None:
            if len(self) >= MOST:
                self.clear()
            self[key] = value
        return value


def kind_of_weight(weight: object) -> object:
    """What the check of a loss's weight depends on."""
    return (weight.dim(), weight.dtype, weight.device) if isinstance(weight, Tensor) else type(weight)
