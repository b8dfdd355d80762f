"""Cuts that hold every class in proportion: those of scikit-learn, with which recorded runs were made."""

import numpy as np
import pytest

from ftfast.distillation.data.stratified import stratified_folds, stratified_rows
from ftfast.errors import SettingsError

# Ties between classes, many classes, a class of one, labels that are not 0, 1, 2, ..., and sums that round.
CASES = [(40, 2), (300, 10), (797, 7), (1797, 10), (2000, 100), (5000, 997)]


def labels_of(rows, classes, *, with_single=False):
    labels = 3 * np.random.default_rng(rows).integers(0, classes, rows)
    labels[: 2 * classes] = 3 * np.repeat(np.arange(classes), 2)
    return np.append(labels, 5) if with_single else labels


@pytest.mark.parametrize(("rows", "classes"), CASES)
def test_parts_are_those_of_scikit_learn(rows, classes):
    selection = pytest.importorskip("sklearn.model_selection")
    labels = labels_of(rows, classes)
    for count in (classes, rows // 3, rows // 2 + 1, rows - classes):
        if not classes <= count <= rows - classes:
            continue
        wanted = selection.train_test_split(np.arange(rows), train_size=count, stratify=labels, random_state=0)
        for part, other in zip(stratified_rows(labels, count), wanted, strict=True):
            assert np.array_equal(part, np.sort(other))
    for count in (2, 3):
        wanted = selection.StratifiedKFold(count, shuffle=True, random_state=0).split(labels, labels)
        for (fitted, validated), (theirs, held_out) in zip(stratified_folds(labels, count), wanted, strict=True):
            assert np.array_equal(fitted, theirs)
            assert np.array_equal(validated, held_out)


@pytest.mark.parametrize(("rows", "classes"), CASES)
def test_parts_hold_every_row_once_and_every_class_in_proportion(rows, classes):
    labels = labels_of(rows, classes, with_single=True)
    for count in (classes + 1, rows - 2 * classes):
        if not classes + 1 <= count <= len(labels) - classes - 1:
            continue
        chosen, rest = stratified_rows(labels, count)
        assert len(chosen) == count
        assert np.array_equal(np.sort(np.append(chosen, rest)), np.arange(len(labels)))
        assert (len(labels) - 1 in chosen) == (2 * count > len(labels))  # the only row of its class
        found, counts = np.unique(labels[:-1], return_counts=True)
        own = (labels[chosen][:, None] == found).sum(0)
        assert (np.abs(own - counts * count / len(labels)) <= 2).all()
    validated = np.concatenate([part for _, part in stratified_folds(labels, 2)])
    assert np.array_equal(np.sort(validated), np.arange(len(labels)))


def test_a_part_that_cannot_hold_every_class_is_refused():
    with pytest.raises(SettingsError, match="3 of 40 images cannot hold every class"):
        stratified_rows(labels_of(40, 4), 3)
