"""The upstream gradient that a loss will get in backward, as far as its calls before tell.

A training step multiplies the loss by the same number as the step before: beta, perhaps the scale of a GradScaler. With
that number forward can write the final gradient while the factors are in cache. Only time hangs on it: where another
number comes, backward computes the gradient from the factors, with the same bits.
"""

from ftfast.ops.remembered import Remembered

# Several layers' losses differ in channels at most; batches and map sizes change from step to step.
Kind = tuple[str | int, ...]
"""Which loss, its p and the channels that it is of."""

# The last upstream gradient that was not expected, and whether it came twice running.
_seen: Remembered[Kind, tuple[float, bool]] = Remembered()


def expected_upstream(kind: Kind) -> float | None:
    """The number to write the gradient for: 1 before anything is known, None where each step has another."""
    upstream, is_steady = _seen.get(kind, (1.0, True))
    return upstream if is_steady else None


def note_upstream(kind: Kind, upstream: float) -> None:
    """To be told of every upstream gradient that was not expected."""
    _seen.keep(kind, (upstream, upstream == _seen.get(kind, (1.0, True))[0]))
