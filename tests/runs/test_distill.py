"""ftfast.distill: models and loaders of one's own, taught by the loop of the command."""

import json
import signal
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ftfast
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.methods import METHODS
from ftfast.errors import DistillError, ParaphraserError, RunFolderError

LAYERS = {"teacher_layer": "features", "student_layer": "features"}
QUICK = {**LAYERS, "dtype": torch.float32, "device": "cpu", "progress": False}
CLASSES = 4


def data(count: int, seed: int = 0) -> TensorDataset:
    """Images ``[count, 3, 8, 8]`` of four tints in noise."""
    generator = torch.Generator().manual_seed(seed)
    tints = torch.randn(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(count) % CLASSES
    return TensorDataset(tints[labels] + 0.5 * torch.randn(count, 3, 8, 8, generator=generator), labels)


def network(width: int, seed: int = 1, *, stride: int = 2) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = nn.Sequential(nn.Conv2d(3, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(width, CLASSES))
        return nn.Sequential(OrderedDict(features=features, classifier=classifier))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    model = network(16)
    images, labels = data(128).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def paraphraser(teacher: nn.Module) -> ftfast.Paraphraser:
    with warnings.catch_warnings(action="ignore"):
        return ftfast.train_paraphraser(teacher, loader(shuffle=False), "features", steps=30, progress=False)


def loader(count: int = 70, size: int = 32, *, shuffle: bool = True, seed: int = 0) -> DataLoader:
    return DataLoader(data(count, seed), batch_size=size, shuffle=shuffle)


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.control is None])
def test_every_method_teaches_the_very_module(method, teacher, paraphraser):
    student = network(8)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state = torch.random.get_rng_state()
    found = ftfast.distill(
        *(teacher, student, loader(), loader(40, seed=1)),
        **{**QUICK, "method": method, "epochs": 6, "paraphraser": paraphraser},
    )
    assert found.student is student
    assert not student.training
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))
    assert [epoch.images for epoch in found.history] == [70] * 6
    assert sum(found.history[-1].losses.values()) < sum(found.history[0].losses.values())
    images, labels = data(40, seed=1).tensors
    assert found.accuracy == pytest.approx(100 * (student(images).argmax(1) == labels).double().mean().item())
    assert found.accuracy > 25
    assert (found.paraphraser is paraphraser) == ("factors" in METHODS[method].needs)
    assert found.output is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_is_the_loop_that_one_would_write(teacher, paraphraser):
    """The same losses and weights as a loop of plain PyTorch, with uneven batches as the loader has them."""
    batches = [tuple(part[start:stop] for part in data(60).tensors) for start, stop in ((0, 32), (32, 37), (37, 60))]
    student, twin = network(8), network(8)
    for model in (student, twin):
        model.classifier[2].p = 0.0
    options = {"momentum": 0.0, "learning_rate": 0.1, "weight_decay": 0.01, "schedule": "steps", "milestones": [9]}
    found = ftfast.distill(
        *(teacher, student, batches), **QUICK, paraphraser=paraphraser, epochs=2, beta=20.0, seed=3, **options
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        translator = ftfast.Translator(8, paraphraser.factor_channels)
    head = ftfast.FactorTransfer(paraphraser, translator, weight=20.0, backend="reference")
    taps = [ftfast.FeatureTap(model, "features") for model in (twin.train(), teacher.eval())]
    optimizer = torch.optim.SGD([*twin.parameters(), *translator.parameters()], lr=0.1, weight_decay=0.01)
    for epoch in found.history:
        sums = torch.zeros(2)
        for images, labels in batches:
            (logits, features), (_, taught) = taps[0](images), taps[1](images)
            losses = torch.stack([F.cross_entropy(logits, labels), head(features, taught.detach())])
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            sums += losses.detach() * len(images)
        assert list(epoch.losses.values()) == pytest.approx((sums / 60).tolist(), rel=1e-3)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_paraphraser_is_trained_where_none_is_given_and_beta_follows_the_factor(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("ftfast.distillation.training.paraphrasing.paraphraser.STEPS", 20)
    with warnings.catch_warnings(action="ignore"):
        found = ftfast.distill(
            *(teacher, network(8), loader()), **QUICK, epochs=1, rate=0.25, ema=0.9, output=tmp_path / "run"
        )
    assert found.paraphraser.factor_channels == 4
    assert not any(parameter.requires_grad for parameter in found.paraphraser.parameters())
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["weights"]["beta"] == pytest.approx(500 * (4 * 16 / 2048) ** 0.5, rel=1e-4)
    assert (tmp_path / "run" / "paraphraser" / "model.safetensors").exists()
    assert (tmp_path / "run" / "tensorboard").is_dir()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stopped_within_an_epoch_it_goes_on_to_the_same_bits(optimizer, teacher, paraphraser, tmp_path, monkeypatch):
    options = {**QUICK, "epochs": 2, "paraphraser": paraphraser, "optimizer": optimizer, "checkpoint_seconds": 0}
    whole = ftfast.distill(teacher, network(8), loader(), loader(20), **options)
    run, steps = Training._run_epoch, []

    def stopping(training: Training, epoch: int, stop: Any, after_step: Any, *rest: Any) -> Any:
        def counted(training: Training) -> None:
            steps.append(training.total_steps_done())
            if len(steps) == 4:
                signal.raise_signal(signal.SIGINT)
            after_step(training)

        return run(training, epoch, stop, counted, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_run_epoch", stopping)
        with pytest.raises(KeyboardInterrupt, match="resume=True"):
            ftfast.distill(teacher, network(8), loader(), loader(20), **options, output=tmp_path / "run")
    assert steps == [1, 2, 3, 4]
    options |= {"output": tmp_path / "run", "resume": True}
    second = ftfast.distill(teacher, network(8, seed=2), loader(), loader(20), **options)
    assert equal(second.student, whole.student)
    measured = {"seconds": 0, "others_share": None}  # of the machine, which has other work at times
    first, again = ([replace(epoch, **measured) for epoch in each.history] for each in (whole, second))
    assert first == again
    read = ftfast.distill(teacher, network(8, seed=3), loader(), loader(20), **options)
    assert equal(read.student, whole.student)
    assert read.accuracy == whole.accuracy
    with pytest.raises(RunFolderError, match=r"learning_rate is 0\.3, and the training to be resumed .* has 0\.0"):
        ftfast.distill(teacher, network(8), loader(), **{**options, "learning_rate": 0.3})
    with pytest.raises(RunFolderError, match="holds a training; give resume=True"):
        ftfast.distill(teacher, network(8), loader(), **{**options, "resume": False})


def test_adamw_spares_vectors_and_takes_its_own_defaults(teacher):
    found = []
    for extra in ({}, {"learning_rate": 1e-3, "weight_decay": 0.05, "momentum": 0.9}):
        student = network(8)
        ftfast.distill(teacher, student, loader(), **QUICK, method="none", epochs=1, optimizer="adamw", **extra)
        found.append(student)
    assert equal(*found)
    norm = network(8)
    ftfast.distill(
        *(teacher, norm, [tuple(it[:8] * 0 for it in data(8).tensors)]),
        **{**QUICK, "method": "none", "epochs": 1, "optimizer": "adamw", "weight_decay": 1.0, "learning_rate": 0.5},
    )
    assert norm.features[1].weight.abs().min() >= 0.5  # a decayed one would be 0.5 lower at once


class Tokens(nn.Module):
    """A vision transformer's kind of model: its layer gives a class token and those of 4x4 patches."""

    num_prefix_tokens = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, stride=2)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.features = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.classifier = nn.Linear(width, CLASSES)
        self.classifier.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = self.features(torch.cat([self.first.expand(len(images), -1, -1), tokens], dim=1))
        return self.classifier(tokens.mean(1))


def test_tokens_of_a_transformer_are_compared_as_maps(teacher, paraphraser):
    found = ftfast.distill(teacher, Tokens(8), loader(), **QUICK, paraphraser=paraphraser, epochs=5, optimizer="adamw")
    assert found.history[-1].losses["factors"] < found.history[0].losses["factors"]


def test_maps_of_unlike_sizes_are_pooled_where_asked(teacher, paraphraser):
    wide = network(8, stride=1)
    with pytest.raises(DistillError, match=r"maps of 4x4 and student_layer of 8x8; give resize_features=True"):
        ftfast.distill(teacher, wide, loader(), **QUICK, paraphraser=paraphraser)
    found = ftfast.distill(teacher, wide, loader(), **QUICK, paraphraser=paraphraser, resize_features=True, epochs=1)
    assert "factors" in found.history[0].losses


def test_tied_weights_are_kept(teacher, tmp_path):
    student = network(8)
    student.features.twin = nn.BatchNorm2d(8)
    student.features.twin.weight = student.features[1].weight
    ftfast.distill(teacher, student, loader(), **QUICK, method="none", epochs=1, output=tmp_path / "run")
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_is_told_of_in_words_of_python(teacher):
    with pytest.raises(DistillError, match=r"the loss is nan at step \d+.*; lower learning_rate") as caught:
        ftfast.distill(teacher, network(8), loader(), **QUICK, method="none", learning_rate=1e30, epochs=3)
    assert "--" not in str(caught.value)


def half(model: nn.Module) -> nn.Module:
    return model.to(torch.float16)


PAIRS = data(16).tensors


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"teacher_layer": "featres"}, ValueError, "teacher_layer is 'featres'.*features"),
        ({"student_layer": "nothing"}, ValueError, "student_layer is 'nothing', .*top-level layers are"),
        ({"student_layer": "classifier"}, DistillError, "student_layer is 'classifier', whose features are"),
        ({"method": "ftt"}, DistillError, "method is 'ftt'; it takes none, kd"),
        ({"epochs": 0}, DistillError, "epochs is 0; it takes a number of at least 1"),
        ({"optimizer": "lion"}, DistillError, "optimizer is 'lion'; it takes sgd or adamw"),
        ({"learning_rate": -1.0}, DistillError, r"learning_rate is -1\.0"),
        ({"beta": float("nan")}, DistillError, "beta is nan; it takes a positive number"),
        ({"weights": {"gamma": 1.0}}, DistillError, "weights has 'gamma'; it takes beta, attention"),
        ({"weights": {"alpha": 2.0}}, DistillError, r"alpha is 2\.0; it takes a positive number up to 1"),
        ({"schedule": "steps"}, DistillError, "milestones is empty"),
        ({"resume": True}, DistillError, "output is None"),
        ({"dtype": torch.float16}, DistillError, "dtype is torch.float16"),
        ({"device": "xpu"}, DistillError, "device is 'xpu'"),
        (
            {"paraphraser": ftfast.Paraphraser(7)},
            DistillError,
            "takes 7 channels and teacher_layer gives 16",
        ),
        ({"student": half(network(8))}, DistillError, r"student has '.*weight' in torch.float16"),
        ({"student": network(8).requires_grad_(False)}, DistillError, "no parameter that requires a gradient"),
        ({"student": "resnet8"}, TypeError, "student is a str"),
        ({"train": iter([PAIRS])}, TypeError, "train is a list_iterator without a length"),
        ({"train": []}, DistillError, "train has no batches"),
        ({"train": [PAIRS[0]]}, DistillError, r"train gives a Tensor; it takes batches \(images, labels\)"),
        ({"train": [(PAIRS[0].byte(), PAIRS[1])]}, DistillError, "images .* of torch.uint8; it takes floating"),
        ({"train": [(PAIRS[0], PAIRS[1] + 3)]}, DistillError, "train has label 6 and student gives logits of 4"),
        (
            {"train": [PAIRS, (PAIRS[0], PAIRS[1] - 9)]},
            DistillError,
            "train has label -9 and student gives logits of 4",
        ),
        ({"train": [(PAIRS[0][:0], PAIRS[1][:0])]}, DistillError, "train gives a batch without images"),
        ({"val": [PAIRS, (PAIRS[0], PAIRS[1] + 3)]}, DistillError, "val has label 6 and student gives logits of 4"),
        ({"val": [(PAIRS[0][:0], PAIRS[1][:0])]}, DistillError, "val gives a batch without images"),
        ({"weights": "alpha"}, DistillError, "weights is 'alpha'; it takes a dictionary"),
        ({"milestones": 5}, DistillError, "milestones is 5; it takes a list"),
        ({"optimizer": ["sgd"]}, DistillError, "it takes sgd or adamw"),
        ({"device": "gpu"}, DistillError, "device is 'gpu'; it takes 'cpu' or"),
        ({"dtype": ["float32"]}, DistillError, r"it takes torch\.float32, torch\.bfloat16"),
        ({"resize_features": "no"}, DistillError, "resize_features is 'no'; it takes True or False"),
        ({"output": 5}, TypeError, "output is a int; it takes a path or None"),
        ({"output": ""}, DistillError, "output is ''; it takes a folder's path"),
        ({"output": "a\0b"}, DistillError, "and has no NUL in it"),
        ({"output": "/proc/training", "track": ["wandb"]}, TypeError, "track is a list; it takes a string or None"),
        ({"val": [(PAIRS[0], PAIRS[0])]}, DistillError, r"val gives labels \[16, 3, 8, 8\]"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(changed, error, message, teacher):
    given = {"student": network(8), "train": [PAIRS], **QUICK, "epochs": 1, **changed}
    if "val" in changed:
        given["method"] = "none"
    with pytest.raises(error, match=message) as caught:
        ftfast.distill(teacher, **given)
    assert str(caught.value).endswith(".")


def test_a_paraphraser_that_learns_nothing_is_told_of_in_arguments_of_distill(teacher, monkeypatch):
    """It advised of steps, strict and a learning_rate, which distill has not or has for the student."""
    monkeypatch.setattr("ftfast.distillation.training.paraphrasing.paraphraser.STEPS", 20)
    images = torch.ones(16, 3, 8, 8)
    with pytest.raises(ParaphraserError, match=r"; see that teacher is trained, .* a paraphraser of"):
        ftfast.distill(teacher, network(8), [(images, PAIRS[1])], **QUICK)


def test_a_student_that_shares_with_its_teacher_is_refused(teacher):
    student = network(16)
    student.classifier = teacher.classifier
    with pytest.raises(DistillError, match=r"student shares .* with teacher"):
        ftfast.distill(teacher, student, [PAIRS], **QUICK)


def test_a_folder_of_others_is_left_alone(teacher, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RunFolderError, match="holds other files; give another"):
            ftfast.distill(teacher, network(8), [PAIRS], **QUICK, output=tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(RunFolderError, match="is a file; give another"):
        ftfast.distill(teacher, network(8), [PAIRS], **QUICK, output=tmp_path / "mine.txt" / "run")


def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(teacher):
    """It raised the system's own error."""
    with pytest.raises(RunFolderError, match=r"output /proc/training cannot be written .*; give another"):
        ftfast.distill(teacher, network(8), [PAIRS], **QUICK, output="/proc/training")


def test_it_says_how_far_it_is(teacher, capsys):
    ftfast.distill(teacher, network(8), loader(), loader(20), **{**QUICK, "progress": True}, method="none", epochs=1)
    written = capsys.readouterr().err
    assert written.startswith("none: ")
    assert "% of val, loss" in written
