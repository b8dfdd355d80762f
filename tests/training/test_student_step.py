"""A step of training takes the gradient of the whole batch; a training goes on from anywhere as if nothing had been."""

import contextlib
import copy
import io
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.distillation.data import datasets, in_memory
from ftfast.distillation.models import registry
from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.models.training_graph import training_forward
from ftfast.distillation.runtime import signals
from ftfast.distillation.runtime.seeds import seeded
from ftfast.distillation.runtime.signals import Interrupted, Stopped, StopRequest, signals_interrupt
from ftfast.distillation.training import resumable
from ftfast.distillation.training.evaluate import Accuracies
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.losses import DivergedError, LossRecord
from ftfast.distillation.training.methods import Terms
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.step.average import Average
from ftfast.distillation.training.step.step import BesideStudent, LearningStep, Precision

CPU = torch.device("cpu")
FLOAT32 = Precision(CPU, torch.float32)
PLAIN = Schedule(epochs=3, batch_size=8, learning_rate=0.1, momentum=0.0, weight_decay=0.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def classifier() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4))


def batch(count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, 2, 2, generator=generator), torch.arange(count) % 4


def cross_entropy(model: nn.Module) -> Callable[[Tensor, Tensor], Terms]:
    return lambda images, labels: {"labels": F.cross_entropy(model(images).float(), labels), "other": images.mean()}


def stepped(schedule: Schedule, precision: Precision = FLOAT32, rate: float = 0.1) -> tuple[nn.Module, Terms]:
    model = classifier()
    step = LearningStep(model, cross_entropy(model), schedule, precision)
    return model, step(batch(), rate)


def expected_step(weight_decay: Callable[[Tensor], float] = lambda _: 0.0, largest: float = 1e9) -> list[Tensor]:
    """Parameters after one step of SGD at 0.1, in float64."""
    model = classifier().double()
    images, labels = batch()
    F.cross_entropy(model(images.double()), labels).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    scale = min(1.0, largest / float(norm))
    return [
        parameter.detach() - 0.1 * (scale * gradient + weight_decay(parameter) * parameter.detach())
        for parameter, gradient in zip(model.parameters(), gradients, strict=True)
    ]


def assert_near(model: nn.Module, expected: list[Tensor], limit: float = 1e-5) -> None:
    moved = [
        before.detach() - after for before, after in zip(classifier().double().parameters(), expected, strict=True)
    ]
    for parameter, after, step in zip(model.parameters(), expected, moved, strict=True):
        rounding = 2 * torch.finfo(torch.float32).eps * after.norm()
        assert float((parameter.detach().double() - after).norm()) <= float(limit * step.norm() + rounding)


@pytest.mark.parametrize("parts", [1, 3, 10, 64])
def test_a_batch_in_parts_takes_the_step_of_the_whole(parts: int) -> None:
    model, terms = stepped(replace(PLAIN, accumulate=parts))
    assert_near(model, expected_step())
    _, whole = stepped(PLAIN)
    for name, value in whole.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-5)


def test_gradients_are_clipped_together() -> None:
    assert_near(stepped(replace(PLAIN, clip_gradient=0.01))[0], expected_step(largest=0.01))
    assert_near(stepped(replace(PLAIN, clip_gradient=0.01, accumulate=4))[0], expected_step(largest=0.01))


def test_biases_and_norms_are_spared_where_asked() -> None:
    schedule = replace(PLAIN, weight_decay=0.5)
    assert_near(stepped(schedule)[0], expected_step(lambda _: 0.5))
    assert_near(stepped(replace(schedule, decay_vectors=False))[0], expected_step(lambda p: 0.5 * (p.dim() > 1)))


@pytest.mark.parametrize("decay_vectors", [False, True])
def test_adamw_steps_as_torchs_in_float64(decay_vectors: bool) -> None:
    schedule = replace(PLAIN, optimiser="adamw", momentum=0.8, weight_decay=0.3, decay_vectors=decay_vectors)
    model, expected = classifier(), classifier().double()
    step = LearningStep(model, cross_entropy(model), schedule, FLOAT32)
    groups = [
        {"params": [it for it in expected.parameters() if it.dim() > 1], "weight_decay": 0.3},
        {"params": [it for it in expected.parameters() if it.dim() <= 1], "weight_decay": 0.3 * decay_vectors},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.999))
    images, labels = batch()
    for rate in (0.01, 0.02, 0.005):
        step((images, labels), rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(expected(images.double()), labels).backward()
        optimizer.step()
    assert_near(model, [it.detach() for it in expected.parameters()], limit=1e-3)


def test_float16_gradients_are_scaled_and_come_back_unscaled() -> None:
    model, _ = stepped(replace(PLAIN, clip_gradient=0.01), Precision(CPU, torch.float16))
    assert_near(model, expected_step(largest=0.01), limit=2e-2)


def test_a_float16_step_that_overflows_is_left_out() -> None:
    model = classifier()
    step = LearningStep(
        model, lambda images, labels: {"labels": 1e38 * model(images).sum()}, PLAIN, Precision(CPU, torch.float16)
    )
    step(batch(), 0.1)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), classifier().parameters(), strict=True))


def test_the_rate_falls_as_torchs_schedulers_do() -> None:
    schedules = {
        "cosine": (PLAIN, lambda optimiser: torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 12)),
        "steps": (
            replace(PLAIN, kind="steps", milestones=(1, 2), gamma=0.2),
            lambda optimiser: torch.optim.lr_scheduler.MultiStepLR(optimiser, [4, 8], 0.2),
        ),
    }
    for schedule, build in schedules.values():
        optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=schedule.learning_rate)
        scheduler = build(optimiser)
        for step in range(12):
            assert schedule.rate(step, 4) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9)
            optimiser.step()
            scheduler.step()


def test_milestones_past_the_last_epoch_are_warned_of() -> None:
    steps = Schedule(epochs=10, batch_size=8, learning_rate=0.1, momentum=0, weight_decay=0, kind="steps")
    assert "82, 123" in str(replace(steps, milestones=(82, 123)).warning)
    for quiet in (replace(steps, milestones=(9, 123)), replace(steps, kind="cosine", milestones=(82,)), steps):
        assert quiet.warning is None


@pytest.mark.parametrize("bad_step", [0, 49, 50, 61])
def test_the_first_loss_that_is_not_finite_is_named(bad_step: int) -> None:
    record = LossRecord()

    def train() -> None:
        for step in range(70):
            value = float("nan") if step >= bad_step else 1.0
            record.add({"labels": torch.tensor(value)}, 8, step)
        record.check_finite(69)

    with pytest.raises(DivergedError, match=rf"the loss is nan at step {bad_step + 1};.*--learning-rate"):
        train()


def test_what_sums_have_grown_by_is_told_once_and_from_a_resumed_epoch_on() -> None:
    record = LossRecord({"labels": torch.tensor(100.0)})
    record.add({"labels": torch.tensor(2.0)}, 8, 0)
    assert record.take() == {"labels": torch.tensor(16.0)}
    assert record.take() == {"labels": torch.tensor(0.0)}
    record.add({"labels": torch.tensor(1.0), "factors": torch.tensor(0.5)}, 8, 1)
    assert record.take() == {"labels": torch.tensor(8.0), "factors": torch.tensor(4.0)}
    assert record.totals()["labels"] == 124


def test_figures_of_a_step_are_its_rate_and_in_float16_the_scale() -> None:
    assert training(learning_rate=0.25).figures() == {"learning_rate": 0.25}
    half = training(Precision(CPU, torch.float16), learning_rate=0.25)
    assert half.figures() == {"learning_rate": 0.25, "loss_scale": 2.0**16}


def split_of(count: int = 43) -> in_memory.Split:
    train, _ = datasets.load("digits", CPU)
    return train.stratified(count)[0]


def training(precision: Precision = FLOAT32, bad_at: int | None = None, **changes: Any) -> Training:
    model = registry.place(registry.build_model("resnet8", 2, in_channels=1, classes=10, seed=0), CPU)
    calls = 0

    def terms(images: Tensor, labels: Tensor) -> Terms:
        nonlocal calls
        calls += 1
        loss = F.cross_entropy(model(images).float(), labels)
        return {"labels": loss * (float("inf") if calls == bad_at else 1.0)}

    schedule = replace(PLAIN, momentum=0.9, weight_decay=1e-3, **changes)
    return Training(nn.ModuleDict({"model": model}), terms, split_of(), schedule, precision, seed=0)


def weights(trained: Training) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trained.trainable.state_dict().items()}


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("stop_after", [1, 5, 6, 7, 17])
@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        (FLOAT32, {}),
        (Precision(CPU, torch.bfloat16), {"ema": 0.9, "clip_gradient": 1.0}),
    ],
)
def test_stopped_after_any_step_it_goes_on_bit_equal(
    precision: Precision, changes: dict[str, Any], stop_after: int
) -> None:
    whole = training(precision, **changes)
    history = whole.run()
    steps = iter(range(1, 100))
    first = training(precision, **changes)
    with pytest.raises(Stopped):
        first.run(stop=lambda: next(steps) == stop_after)
    second = training(precision, **changes)
    second.load_state(saved(first.state()))
    again = second.run()
    assert [record.losses for record in again] == [record.losses for record in history]
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(second)[name], tensor), name


def test_a_student_with_dropout_goes_on_bit_equal() -> None:
    """What a step draws follows from its number, so no generator's state has to be kept."""

    def with_dropout() -> Training:
        made = training()
        made.trainable.get_submodule("model").register_forward_hook(lambda _, __, out: F.dropout(out, 0.5))
        return made

    whole, undropped = with_dropout(), training()
    whole.run()
    undropped.run()
    steps = iter(range(1, 100))
    first, second = with_dropout(), with_dropout()
    with pytest.raises(Stopped):
        first.run(stop=lambda: next(steps) == 8)
    second.load_state(saved(first.state()))
    torch.manual_seed(99)
    second.run()
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(second)[name], tensor), name
    assert any(not torch.equal(weights(undropped)[name], tensor) for name, tensor in weights(whole).items())


def test_buffers_of_every_dtype_are_averaged() -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("index", torch.tensor([2**24 + 1, 7], dtype=torch.int64))
    model.register_buffer("phase", torch.tensor([1j, 2.0]))
    average = Average(model, 0.75)
    for _ in range(3):
        average.update_parameters(model)
        average.n_averaged += 1
    for own, new in zip(average.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(own, new)
    model.phase.zero_()
    average.update_parameters(model)
    torch.testing.assert_close(average.module.phase, torch.tensor([0.75j, 1.5]))


def test_the_average_is_what_is_kept_and_watched() -> None:
    seen: list[dict[str, Tensor]] = []
    averaged = training(ema=0.5)
    averaged._evaluation = lambda _: seen.append(weights(averaged)) or Accuracies(1.0, 0.0, None)  # type: ignore[func-returns-value]
    averaged.run()
    plain = training()
    expected: dict[str, Tensor] = {}

    def follow() -> bool:
        for name, tensor in weights(plain).items():
            if tensor.is_floating_point():
                before = expected.get(name)
                expected[name] = tensor.double() if before is None else 0.5 * before + 0.5 * tensor.double()
        return False

    plain.run(stop=follow)
    for name, tensor in expected.items():
        assert float((weights(averaged)[name] - tensor).norm()) <= 1e-5 * float(tensor.norm() + 1e-3), name
        assert torch.equal(seen[-1][name], weights(averaged)[name])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_training_and_it_goes_on_bit_equal(tmp_path: Path, number: signal.Signals) -> None:
    description = {"kind": "student"}
    undisturbed = training()
    resumable.train_to_end(undisturbed, tmp_path / "whole", description, checkpoint_seconds=1e9)
    before = signal.getsignal(number)
    disturbed = training()
    terms, calls = disturbed._step._terms, iter(range(100))

    def interrupted(images: Tensor, labels: Tensor) -> Terms:
        if next(calls) == 8:
            signal.raise_signal(number)
        return terms(images, labels)

    disturbed._step._terms = interrupted
    with pytest.raises(KeyboardInterrupt):
        resumable.train_to_end(disturbed, tmp_path / "kept", description, checkpoint_seconds=1e9)
    assert signal.getsignal(number) is before
    assert [path.name for path in resumable.unfinished_folder(tmp_path / "kept").iterdir()] == [
        "epoch00001-step0000003"
    ]
    resumed = training()
    resumable.train_to_end(resumed, tmp_path / "kept", description, checkpoint_seconds=1e9)
    assert not resumable.unfinished_folder(tmp_path / "kept").exists()
    for name, tensor in weights(undisturbed).items():
        assert torch.equal(weights(resumed)[name], tensor), name


def test_a_second_signal_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
    with StopRequest() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        asked.number = None  # met; the request would otherwise interrupt at the end


def test_an_interruption_that_a_library_swallows_is_met_by_the_next_training() -> None:
    with signals_interrupt():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Interrupted) as caught, StopRequest():
            pass
    assert caught.value.status == 128 + signal.SIGUSR1
    with StopRequest() as asked:
        assert not asked()


def test_a_diverged_training_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="at step 9"):
        resumable.train_to_end(training(bad_at=9), tmp_path / "kept", {"kind": "student"}, checkpoint_seconds=0)
    newest = max(path.name for path in resumable.unfinished_folder(tmp_path / "kept").iterdir())
    assert newest == "epoch00001-step0000002"  # the eighth of all


def test_the_teacher_runs_before_the_student_on_a_cpu_and_on_its_own_stream_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            order.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            order.append(f"on {self.name}")

        def __exit__(self, *_: object) -> None:
            order.append(f"off {self.name}")

    class Images(Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

        def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
            order.append(f"recorded on {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("aside"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)

    def network(name: str) -> Callable[[Tensor], Outputs]:
        return lambda images: order.append(name) or Outputs(images, images)  # type: ignore[func-returns-value]

    both = BesideStudent(network("teacher"), network("student"))
    both(torch.zeros(1))
    assert order == ["teacher", "student"]
    order.clear()
    both(torch.zeros(1).as_subclass(Images))
    assert order[:6] == ["aside waits for main", "on aside", "teacher", "off aside", "student", "main waits for aside"]
    assert sorted(order[6:]) == ["recorded on aside", "recorded on main", "recorded on main"]


@pytest.mark.slow
def test_a_compiled_student_learns_the_same() -> None:
    student = registry.build_model("resnet8", 4, in_channels=3, classes=5, seed=0)
    images = torch.randn(4, 3, 8, 8)
    gradients = []
    for compiled in (False, True):
        own = copy.deepcopy(student).train()
        outputs = training_forward(own, "stage3", compiled=compiled)(images)
        (outputs.logits.square().sum() + outputs.features.square().sum()).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in own.parameters()]))
        assert own.norm.num_batches_tracked == 1
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-5


FLOAT16 = Precision(CPU, torch.float16)


def normed_training(images: Tensor, precision: Precision, ema: float | None = None) -> Training:
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4))
    trainable = nn.ModuleDict({"model": model})
    schedule = replace(PLAIN, epochs=2, ema=ema)
    split = in_memory.Split(images, torch.arange(len(images)) % 4)
    return Training(trainable, cross_entropy(model), split, schedule, precision, seed=0)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_float16_leaves_a_step_out_whose_loss_is_not_finite(ema: float | None) -> None:
    images = batch(40)[0]
    images[3] = math.inf
    training = normed_training(images, FLOAT16, ema)
    before = copy.deepcopy(training.trainable.state_dict())
    history = training.run()
    assert all(math.isfinite(epoch.losses["labels"]) for epoch in history)
    assert all(bool(tensor.isfinite().all()) for tensor in training.trainable.state_dict().values())
    assert not torch.equal(training.trainable.state_dict()["model.0.weight"], before["model.0.weight"])


def test_the_mean_loss_is_that_of_the_steps_that_count() -> None:
    record = LossRecord(leaves_out=True)
    record.add({"labels": torch.tensor(2.0)}, 3, 0)
    record.add({"labels": torch.tensor(math.nan)}, 3, 1)
    record.add({"labels": torch.tensor(4.0)}, 3, 2)
    record.check_finite(2)
    assert record.means(9) == {"labels": 3.0}


def test_a_step_that_is_not_finite_ends_a_training_in_float32_and_one_in_float16_where_all_are() -> None:
    images = batch(40)[0]
    images[3] = math.inf
    with pytest.raises(DivergedError, match="the loss is nan at step"):
        normed_training(images, FLOAT32).run()
    with pytest.raises(DivergedError, match="the loss is nan"):
        normed_training(torch.full_like(images, math.inf), FLOAT16).run()
