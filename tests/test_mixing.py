"""Mixup, cutmix and label smoothing: what they make of a batch, and that both networks see the same of it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.distill.mixing import Mixing
from ftfast.distill.schedule import Schedule

CLASSES = 5


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 12, 10, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(count) % CLASSES


def test_without_any_nothing_changes() -> None:
    images, labels = batch()
    mixing = Mixing(CLASSES)
    assert not mixing
    found = mixing(images, labels, 0)
    assert found[0] is images
    assert found[1] is labels


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_smoothed_labels_give_the_cross_entropy_of_torchs_own(share: float) -> None:
    images, labels = batch()
    logits = torch.randn(len(labels), CLASSES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _, soft = Mixing(CLASSES, label_smoothing=share)(images, labels, 0)
    found = F.cross_entropy(logits, soft.double())
    expected = F.cross_entropy(logits, labels, label_smoothing=share)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_are_as_much_of_two_as_their_labels_say(kind: str) -> None:
    _, labels = batch(CLASSES)
    # Each image has its class's value everywhere, so its mean says what it was made of.
    images = labels[:, None, None, None].expand(-1, 3, 12, 10).float().contiguous(memory_format=torch.channels_last)
    mixed, soft = Mixing(CLASSES, **{kind: 1.0})(images, labels, 3)
    assert not torch.equal(mixed, images)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    means = (soft.double() * torch.arange(CLASSES)).sum(1)
    torch.testing.assert_close(mixed.double().mean((1, 2, 3)), means, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(soft.sum(1), torch.ones(CLASSES), rtol=1e-6, atol=1e-9)


def test_the_seed_alone_decides_and_the_random_state_stays() -> None:
    images, labels = batch()
    mixing = Mixing(CLASSES, 0.1, 0.8, 1.0)
    before = torch.random.get_rng_state()
    first = mixing(images, labels, 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(9)
    again, other = mixing(images, labels, 7), mixing(images, labels, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_both_kinds_are_drawn() -> None:
    images, labels = torch.zeros(4, 1, 8, 8), torch.arange(4)
    images[1:] = 1.0
    mixing = Mixing(4, 0, 1, 1)
    mixed = [mixing(images, labels, seed)[0] for seed in range(20)]
    kinds = {bool(((each != 0) & (each != 1)).any()) for each in mixed}
    assert kinds == {True, False}  # blends, and cuts of whole pixels


@pytest.mark.parametrize("kind", ["cosine", "steps"])
def test_the_rate_rises_to_the_first_one_and_falls_from_there(kind: str) -> None:
    schedule = Schedule(5, 8, 0.4, 0.9, 0.0, kind=kind, milestones=(3,), warm_up=1.5)
    rates = [schedule.rate(step, 10) for step in range(50)]
    assert rates[:15] == pytest.approx([0.4 * (step + 1) / 16 for step in range(15)])
    assert rates[15] == pytest.approx(0.4)
    assert all(a >= b for a, b in pairwise(rates[15:]))
    assert rates[-1] < 0.05
    assert Schedule(5, 8, 0.4, 0.9, 0.0, warm_up=9).rate(49, 10) < 0.4  # never more than there are epochs
