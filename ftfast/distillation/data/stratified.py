"""Labelled rows divided with every class in proportion, alike at every call.

The divisions are those that scikit-learn's train_test_split and StratifiedKFold make of the seed 0, draw by draw.
"""

import numpy as np

from ftfast.errors import SettingsError

_SEED = 0


def stratified_rows(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` rows of labels ``[N]`` with every class in proportion, and the rest, each in order.

    The only row of a class is in the larger part.

    Raises:
        SettingsError: fewer rows than classes in either part.
    """
    by_class = _rows_by_class(labels)
    classes = len(by_class)
    if not classes <= count <= len(labels) - classes:
        raise SettingsError(
            f"{count} of {len(labels)} images cannot hold every class on both sides of the cut; "
            f"take {classes} to {len(labels) - classes}."
        )
    is_chosen = np.zeros(len(labels), dtype=bool)
    for rows in by_class:
        is_chosen[rows] = len(rows) == 1 and 2 * count > len(labels)
    if by_class := [rows for rows in by_class if len(rows) > 1]:
        counts = np.array([len(rows) for rows in by_class])
        generator = np.random.RandomState(_SEED)
        taken = _in_proportion(counts, count - int(is_chosen.sum()), generator)
        _in_proportion(counts - taken, int((counts - taken).sum()), generator)  # the rest's, whose draws count too
        for rows, own in zip(by_class, taken, strict=True):
            is_chosen[rows[generator.permutation(len(rows))[:own]]] = True
    return np.flatnonzero(is_chosen), np.flatnonzero(~is_chosen)


def _rows_by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The rows of each class in order, by label."""
    counts = np.unique(labels, return_counts=True)[1]
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])


def _in_proportion(counts: np.ndarray, total: int, generator: np.random.RandomState) -> np.ndarray:
    """How many of each class make up ``total``: its share rounded down, and one more by size of the remainder."""
    shares = counts / counts.sum() * total
    taken = np.floor(shares)
    left, remainders = int(total - taken.sum()), shares - taken
    for remainder in np.unique(remainders)[::-1]:
        if left <= 0:
            break
        alike = np.flatnonzero(remainders == remainder)
        more = generator.choice(alike, size=min(len(alike), left), replace=False)
        taken[more] += 1
        left -= len(more)
    return taken.astype(int)


def stratified_folds(labels: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """``count`` ways to divide labels ``[N]`` in proportion: rows to fit on and rows to validate on, each in order."""
    generator = np.random.RandomState(_SEED)
    by_class = sorted(_rows_by_class(labels), key=lambda rows: rows[0])
    classes = np.repeat(np.arange(len(by_class)), [len(rows) for rows in by_class])
    sizes = np.array([np.bincount(classes[fold::count], minlength=len(by_class)) for fold in range(count)])
    fold_of = np.empty(len(labels), dtype=int)
    for place, rows in enumerate(by_class):
        folds = np.repeat(np.arange(count), sizes[:, place])
        generator.shuffle(folds)
        fold_of[rows] = folds
    return [(np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)) for fold in range(count)]
