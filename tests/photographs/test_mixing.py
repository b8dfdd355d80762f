"""Mixup, cutmix and label smoothing: what they make of a batch, and that both networks see the same of it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast import FeatureTap, Paraphraser
from ftfast.distillation.data.augment import Mixing
from ftfast.distillation.data.in_memory import Split
from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.phases.trainable import TeacherSide, student_training
from ftfast.distillation.runtime.seeds import seed_of, seeded
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.step.step import Precision
from ftfast.distillation.training.terms import Weights

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


BETA, RATE, SEED = 30.0, 0.1, 4


class Teacher(nn.Module):
    """A convolution, which keeps what it was shown."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        with seeded(1):
            self.convolution = nn.Conv2d(1, settings.teacher_features().channels, 3, padding=1, stride=4)
        self.seen: list[Tensor] = []

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        self.seen.append(images.clone())
        return Outputs(torch.zeros(len(images), 10), self.convolution(images))


def mixed_training(kind: str) -> tuple[Training, Teacher, Paraphraser, tuple[Tensor, Tensor], list[Tensor]]:
    """One step of a student on mixed images, its teacher, the batch as it is drawn, and what the student is shown."""
    settings = settings_of(
        "digits", **{kind: 1.0}, methods=("ft",), student_epochs=1, student_images=40, batch_size=40, engine="plain",
        learning_rate=RATE, nesterov=False, weight_decay=0.0, label_smoothing=0.1, device="cpu", dtype="float32",
    ).resolved()  # fmt: skip
    teacher = Teacher(settings)
    with seeded(2):
        paraphraser = Paraphraser(settings.teacher_features().channels, settings.rate).eval()
    generator = torch.Generator().manual_seed(3)
    split = Split(torch.randn(40, 1, 8, 8, generator=generator), torch.arange(40) % 10).to(torch.device("cpu"))
    training = student_training(
        settings, Precision(torch.device("cpu"), torch.float32), TeacherSide(teacher, paraphraser), split,
        method="ft", weights=Weights(beta=BETA), seed=SEED,
    )  # fmt: skip
    shown: list[Tensor] = []
    model = training.trainable.get_submodule("model")
    model.register_forward_pre_hook(lambda _, given: shown.append(given[0].clone()))
    images, labels = next(split.draw(40, seed=SEED, epoch=0))
    return training, teacher, paraphraser, (images, labels), shown


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_step_of_factor_transfer_is_that_of_the_mixed_image(kind: str) -> None:
    training, teacher, _, (images, labels), shown = mixed_training(kind)
    by_hand, guide, paraphraser, _, _ = mixed_training(kind)
    training.run()
    assert len(teacher.seen) == len(shown) == 1
    assert torch.equal(teacher.seen[0], shown[0])

    # Which share each pixel has of its own image, the rest being that of the one before it in the batch.
    other = images.roll(1, 0)
    own = ((shown[0] - other) / (images - other)).double()
    if kind == "mixup":
        share = float(own.median())
        torch.testing.assert_close(own, torch.full_like(own, share), rtol=0, atol=1e-3)
    else:
        assert set(own.round(decimals=4).unique().tolist()) == {0.0, 1.0}
        share = float(own.mean())
    assert 0.01 < share < 0.99
    one_hot = F.one_hot(labels, 10).double()
    soft = 0.9 * (share * one_hot + (1 - share) * one_hot.roll(1, 0)) + 0.1 / 10

    student, translator = (by_hand.trainable.get_submodule(name) for name in ("model", "translator"))
    student.train()
    torch.manual_seed(seed_of(SEED, 0, 0))
    logits, features = FeatureTap(student, "stage3")(shown[0])
    ours, theirs = (
        F.normalize(factor.flatten(1), dim=1)
        for factor in (translator(features), paraphraser.encode(guide(shown[0]).features).detach())
    )
    loss = -(soft * logits.double().log_softmax(1)).sum(1).mean() + BETA * (ours - theirs).abs().mean()
    loss.backward()
    before = {name: value.detach().clone() for name, value in by_hand.trainable.named_parameters()}
    for name, after in training.trainable.named_parameters():
        gradient = by_hand.trainable.get_parameter(name).grad
        assert gradient is not None, name
        step = before[name] - after.detach()
        error = float((step - RATE * gradient).norm())
        assert error <= 1e-4 * float(RATE * gradient.norm()) + 1e-6, name


@pytest.mark.parametrize("kind", ["cosine", "steps"])
def test_the_rate_rises_to_the_first_one_and_falls_from_there(kind: str) -> None:
    schedule = Schedule(5, 8, 0.4, 0.9, 0.0, kind=kind, milestones=(3,), warm_up=1.5)
    rates = [schedule.rate(step, 10) for step in range(50)]
    assert rates[:15] == pytest.approx([0.4 * (step + 1) / 16 for step in range(15)])
    assert rates[15] == pytest.approx(0.4)
    assert all(a >= b for a, b in pairwise(rates[15:]))
    assert rates[-1] < 0.05
    assert Schedule(5, 8, 0.4, 0.9, 0.0, warm_up=9).rate(49, 10) < 0.4  # never more than there are epochs
