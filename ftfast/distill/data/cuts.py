"""Labelled rows cut into parts with every class in proportion, alike at every call."""

import numpy as np

from ftfast.errors import SettingsError

_SEED = 0


def cut_rows(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` rows of labels ``[N]`` with every class in proportion, and the rest, each in order.

    The only row of a class is in the larger part.

    Raises:
        SettingsError: fewer rows than classes in either part.
    """
    from sklearn.model_selection import train_test_split

    found, counts = np.unique(labels, return_counts=True)
    classes = len(found)
    if not classes <= count <= len(labels) - classes:
        raise SettingsError(
            f"{count} of {len(labels)} images cannot hold every class on both sides of the cut; "
            f"take {classes} to {len(labels) - classes}."
        )
    is_single = np.isin(labels, found[counts == 1])
    rows, single = np.flatnonzero(~is_single), np.flatnonzero(is_single)
    is_larger = 2 * count > len(labels)
    size = count - len(single) * is_larger
    chosen, rest = train_test_split(rows, train_size=size, stratify=labels[rows], random_state=_SEED)
    chosen, rest = (np.append(chosen, single), rest) if is_larger else (chosen, np.append(rest, single))
    return np.sort(chosen), np.sort(rest)


def fold_rows(labels: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """``count`` ways to cut labels ``[N]``, classes in proportion: rows to fit on and rows to validate on, in order."""
    from sklearn.model_selection import StratifiedKFold

    cuts = StratifiedKFold(count, shuffle=True, random_state=_SEED).split(labels, labels)
    return [(np.sort(fitted), np.sort(validated)) for fitted, validated in cuts]
