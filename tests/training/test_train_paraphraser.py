"""ftfast.train_paraphraser: of features or of a model and a loader, judged on what it has not seen."""

import sys
import warnings
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import ftfast
from ftfast import FrozenTeacher, Paraphraser, diagnose_paraphraser, train_paraphraser
from ftfast.distillation.models.frozen_teacher import TeacherError
from ftfast.distillation.monitor import progress
from ftfast.errors import ParaphraserError

QUIET = {"progress": False}


def maps(count: int, seed: int = 0) -> Tensor:
    """Maps ``[count, 8, 2, 2]`` of three directions, which three numbers say."""
    directions = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(9))
    numbers = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("nk,kchw->nchw", numbers, directions)


class Teacher(nn.Module):
    """Images ``[N, 8, 2, 2]`` to logits; the layer ``body`` doubles them in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(8, 8, 1, bias=False)
        self.body.weight.data.copy_(2 * torch.eye(8)[:, :, None, None])
        self.dropout = nn.Dropout(0.9)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.dropout(images)).mean((2, 3)))


class Loader:
    """Batches ``(images, labels)``; counts how often it is gone through."""

    def __init__(self, images: Tensor, size: int = 32) -> None:
        self.batches = [(part, torch.zeros(len(part))) for part in images.split(size)]
        self.passes = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def equal(first: Paraphraser, second: Paraphraser) -> bool:
    return all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_it_learns_from_features_and_is_frozen():
    paraphraser = train_paraphraser(maps(256), steps=200, **QUIET)
    assert diagnose_paraphraser(paraphraser, maps(64, seed=1)).explained_variance > 0.6
    assert paraphraser.factor_channels == 4
    assert not paraphraser.training
    assert not any(parameter.requires_grad for parameter in paraphraser.parameters())


def test_it_learns_from_a_layer_in_eval_and_from_a_loader_gone_through_again():
    teacher, loader = Teacher().train(), Loader(maps(256))
    paraphraser = train_paraphraser(teacher, loader, "body", epochs=25, held_out=Loader(maps(64, seed=1)), **QUIET)
    assert loader.passes == 25
    assert diagnose_paraphraser(paraphraser, 2 * maps(64, seed=2)).explained_variance > 0.6
    assert not any(module._forward_hooks for module in teacher.modules())


def test_a_model_its_frozen_teacher_and_its_features_give_the_same_paraphraser():
    teacher, loader = Teacher(), Loader(maps(96))
    options = {"epochs": 2, "strict": False, **QUIET}
    with warnings.catch_warnings(action="ignore"):
        first = train_paraphraser(teacher, loader, "body", **options)
        frozen = train_paraphraser(FrozenTeacher(teacher, "body"), loader, **options)
        layer = train_paraphraser(teacher.body, [images for images, _ in loader], **options)
    assert equal(first, frozen)
    assert equal(first, layer)


def test_the_same_seed_gives_the_same_bits_and_leaves_torchs_own_alone():
    before = torch.random.get_rng_state()
    with warnings.catch_warnings(action="ignore"):
        first, again, other = (train_paraphraser(maps(64), steps=3, seed=seed, **QUIET) for seed in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_one_that_is_given_is_trained_in_place():
    given = Paraphraser(8, 0.25, norm="batch").double()
    before = given.encoder[0].weight.clone()
    with warnings.catch_warnings(action="ignore"):
        assert train_paraphraser(maps(64), paraphraser=given, steps=2, strict=False, **QUIET) is given
    assert not torch.equal(given.encoder[0].weight, before)
    assert given.encoder[0].weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_its_own_or_that_round_it_trains_float32_weights(dtype):
    features = maps(64)  # not under autocast
    with warnings.catch_warnings(action="ignore"):
        first = train_paraphraser(features, steps=30, dtype=dtype, **QUIET)
        exact = train_paraphraser(features, steps=30, **QUIET)
        with torch.autocast("cpu", dtype):
            second = train_paraphraser(features, steps=30, **QUIET)
            third = train_paraphraser(features, steps=30, dtype=torch.float32, **QUIET)
    assert equal(first, second)
    assert not equal(first, exact)
    assert equal(third, exact)
    assert first.encoder[0].weight.dtype == torch.float32


def test_what_is_held_out_of_features_is_never_trained_on():
    """Maps that nothing else is like: were they drawn, the paraphraser would come out otherwise."""
    features = maps(200)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    changed = features.clone()
    changed[order[:20]] *= 7
    with warnings.catch_warnings(action="ignore"):
        assert equal(*(train_paraphraser(each, steps=40, **QUIET) for each in (features, changed)))


def test_a_poor_one_is_warned_of_and_a_useless_one_refused():
    with pytest.warns(UserWarning, match=r"explains .* less than 0\.5: give it more steps"):
        train_paraphraser(maps(64), steps=1, **QUIET)
    alike = maps(1).expand(64, -1, -1, -1)
    with pytest.raises(ParaphraserError, match=r"nearly the same factor.*learning_rate"):
        train_paraphraser(alike, steps=1, **QUIET)
    with pytest.raises(ParaphraserError, match="not finite"):
        train_paraphraser(maps(64), steps=3, held_out=maps(8) * float("inf"), **QUIET)
    with pytest.warns(UserWarning, match="nearly the same factor"):
        train_paraphraser(alike, steps=1, strict=False, **QUIET)
    with pytest.warns(UserWarning, match="not judged"):
        train_paraphraser(nn.Identity(), maps(3).split(1), steps=1, **QUIET)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((maps(64),), {"steps": 0}, ValueError, "steps is 0"),
        ((maps(64),), {"steps": 1, "epochs": 1}, ValueError, "one of them"),
        ((maps(64),), {"learning_rate": float("nan")}, ValueError, "learning_rate is nan"),
        ((maps(64),), {"loss": "huber"}, ValueError, "loss is 'huber'; it takes l1 or mse"),
        ((maps(64).flatten(1),), {}, ValueError, r"teacher is \[64, 32\]"),
        ((maps(2),), {}, ValueError, "at least 3"),
        ((Teacher(),), {}, TypeError, "loader is missing"),
        ((Teacher(), [maps(8)]), {}, ValueError, r"\[8, 3\].*name a layer"),
        ((Teacher(), [maps(8)], "boddy"), {}, TeacherError, "layer is 'boddy'"),
        ((Teacher(), [{"image": maps(8)}], "body"), {}, TypeError, "loader gives a dict"),
        ((Teacher(), [], "body"), {}, ValueError, "no batch"),
        ((Teacher(), iter([maps(8)]), "body"), {"epochs": 2}, ValueError, "no length; give steps"),
        ((Teacher(), iter([maps(8)]), "body"), {"steps": 2}, ValueError, "gone through again"),
        ((Teacher(), [maps(8)], "body"), {"held_out": []}, ValueError, "held_out gives no batch"),
        (
            (Teacher(), [maps(8)], "body"),
            {"held_out": [maps(8), maps(8)[:, :, :1]]},
            ValueError,
            "held_out gives maps of 8x1x2, 8x2x2; it takes images of one size",
        ),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, options, error, message):
    with pytest.raises(error, match=message):
        train_paraphraser(*arguments, **options, **QUIET)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_is_on_terminals_alone(terminal, monkeypatch):
    written = StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=written, force_terminal=terminal))
    with warnings.catch_warnings(action="ignore"):
        train_paraphraser(maps(64), steps=2)
    assert ("paraphraser" in written.getvalue()) == terminal


def test_without_rich_there_is_no_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "ftfast.distillation.monitor.progress")
    with warnings.catch_warnings(action="ignore"):
        assert train_paraphraser(maps(64), steps=1).factor_channels == 4


def test_a_frozen_teacher_without_an_example_is_frozen_at_its_first_images():
    teacher, images = Teacher(), maps(6)
    frozen = FrozenTeacher(teacher, "body", classifier=True)
    assert "first images" in frozen.explain()
    assert list(frozen.parameters()) == []
    logits, features = frozen(images)
    torch.testing.assert_close(features, 2 * images)
    torch.testing.assert_close(logits, teacher.eval()(images))
    assert frozen.error <= frozen.limit
    assert not teacher.training
    with pytest.raises(TeacherError, match="layer is 'boddy'"):
        ftfast.FrozenTeacher(teacher, "boddy")
