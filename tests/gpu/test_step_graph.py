"""A step that a GPU replays is the step: recorded once a shape, fed by copies, and never older than what it reads.

What is given to the device is counted on a stand-in GPU, which computes nothing; that a replay computes what the step
does is a GPU's to show.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ftfast
from ftfast.distillation.data import in_memory
from ftfast.distillation.data.augment import Augmentation
from ftfast.distillation.data.in_memory import Normalisation, Split
from ftfast.distillation.models import frozen_teacher, registry
from ftfast.distillation.models.frozen_teacher import FrozenTeacher, TeacherError
from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.monitor import step_clock
from ftfast.distillation.monitor.step_clock import StepClock
from ftfast.distillation.runtime.processes import Part, Processes
from ftfast.distillation.runtime.seeds import seed_generators, seeded
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training.loop import Stopped, Training
from ftfast.distillation.training.losses import LossRecord
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.step import graph
from ftfast.distillation.training.step.average import Average
from ftfast.distillation.training.step.step import LearningStep, Precision
from ftfast.errors import SettingsError
from ftfast.ops.ft_head import stack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = Schedule(epochs=2, batch_size=8, learning_rate=0.1, momentum=0.9, weight_decay=1e-3)
SEVERAL = replace(PLAIN, clip_gradient=1.0, accumulate=2, ema=0.9)
ADAM = replace(PLAIN, optimiser="adam", decay_vectors=False)
TWO = Processes(Part(0, 2))
COLOURS = Normalisation.of(255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
on_stand_in = pytest.mark.skip("there is no stand-in GPU in this checkout")
if importlib.util.find_spec("tests.stand_in_gpu") is not None:
    on_stand_in = pytest.mark.stand_in_gpu


def network(dropout: float = 0.0) -> nn.Module:
    with seeded(0):
        return nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Flatten(), nn.Linear(4 * 6 * 6, 4)),
        )


@dataclass
class Made:
    """A step with what it is made of, and what it said."""

    model: nn.Module
    step: LearningStep
    said: list[str]
    ran: list[int]  # the images of each time that Python went through it

    batches: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, images: int = 8) -> None:
        if images not in self.batches:
            device = next(self.model.parameters()).device
            labels = torch.zeros(images, dtype=torch.int64, device=device)
            self.batches[images] = torch.zeros(images, 3, 6, 6, device=device), labels
        self.step(self.batches[images], 0.1)


def made(
    schedule: Schedule = PLAIN,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CUDA,
    *,
    dropout: float = 0.0,
    frozen: tuple[nn.Module, ...] = (),
    processes: Processes | None = None,
    within: Callable[[Tensor], Any] = lambda _: None,
) -> Made:
    model = registry.place(network(dropout), device)
    ran, said = [], []

    def terms(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        ran.append(len(images))
        logits = model(images).float()
        within(logits)
        return {"labels": F.cross_entropy(logits, labels), "other": images.mean()}

    average = None if schedule.ema is None else Average(model, schedule.ema)
    options: dict[str, Any] = {} if processes is None else {"processes": processes}
    step = LearningStep(
        nn.ModuleDict({"model": model}),
        terms,
        schedule,
        Precision(device, dtype),
        average=average,
        replayed=True,
        frozen=frozen,
        say=said.append,
        **options,
    )
    model.train()
    return Made(model, step, said, ran)


@contextmanager
def counted() -> Iterator[Any]:
    from tests.stand_in_gpu.running import counted

    with counted() as counts:
        yield counts


@on_stand_in
@pytest.mark.parametrize(
    ("schedule", "dtype", "dropout", "launches"),
    [(PLAIN, "bfloat16", 0.0, 1), (SEVERAL, "float16", 0.0, 1), (ADAM, "float32", 0.0, 1), (PLAIN, "float32", 0.5, 3)],
    ids=["sgd", "float16", "adam", "dropout"],
)
def test_a_replayed_step_is_one_launch_beside_its_rate_its_seed_and_its_batch(
    schedule: Schedule, dtype: str, dropout: float, launches: int
) -> None:
    it = made(schedule, getattr(torch, dtype), dropout=dropout)
    with it.step.on_stream():
        for _ in range(graph.WARM_UPS):
            it()
        with counted() as recording:
            it()
        with counted() as found:
            it()
    assert not it.said
    assert recording.captured > 20
    assert (found.launches, found.copies, found.replays) == (launches, 2, 1), found
    assert (found.synchronisations, found.legacy, found.pageable, found.allocations, found.captured) == (0,) * 5, found
    assert not recording.legacy
    assert not recording.uncaptured
    if it.step._average is not None:
        assert int(it.step._average.n_averaged) == graph.WARM_UPS + 2


@on_stand_in
@pytest.mark.parametrize("schedule", [PLAIN, SEVERAL], ids=["plain", "several"])
def test_what_is_recorded_has_the_kernels_of_the_step_as_it_is(schedule: Schedule) -> None:
    """Their numbers are a GPU's to compare, which the test of a replayed training's bits does."""
    it = made(schedule)
    with it.step.on_stream():
        for _ in range(graph.WARM_UPS):
            it()
        with counted() as eager:
            it.step._whole(*it.batches[8], 8)
        with counted() as recording:
            it()
    assert eager.launches > 20
    assert recording.captured_kernels == eager.kernels
    assert recording.captured_kernels != recording.kernels
    assert recording.captured == eager.launches + eager.copies


@on_stand_in
def test_each_size_of_batch_is_recorded_for_itself_and_every_call_is_one_step() -> None:
    it = made()
    sizes = [8, 8, 7, 8, 8, 7, 7, 7, 8, 7]
    with it.step.on_stream(), counted() as found:
        for size in sizes:
            it(size)
    recorded = 2
    assert it.ran == [8, 8, 7, 8, 8, 7, 7, 7]
    assert found.replays == len(sizes) - (len(it.ran) - recorded)


def training(device: torch.device, *, replayed: bool = True, dropout: float = 0.0, **changes: Any) -> Training:
    model = registry.place(network(dropout), device)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (91, 3, 6, 6), generator=generator, dtype=torch.uint8)
    split = Split(pixels, torch.arange(91) % 4, COLOURS, Augmentation(1, flip=True, cutout=2)).to(device)
    return Training(
        nn.ModuleDict({"model": model}),
        lambda images, labels: {"labels": F.cross_entropy(model(images).float(), labels)},
        split,
        replace(PLAIN, **changes),
        Precision(device, torch.float32),
        seed=3,
        replayed=replayed,
    )


@on_stand_in
def test_a_step_with_its_draw_its_seed_and_its_record_is_few_launches() -> None:
    it = training(CUDA)
    found: list[Any] = []
    open_counts: list[Any] = []

    def after_step(_: Training) -> None:
        while open_counts:
            open_counts.pop().__exit__(None, None, None)
        open_counts.append(counted())
        found.append(open_counts[0].__enter__())

    it.run(after_step=after_step)
    open_counts.pop().__exit__(None, None, None)
    replayed = [counts for counts in found if counts.replays and not counts.captured]
    assert len(replayed) > 10, found
    within_epochs = [counts for counts in replayed if counts.launches <= 5]
    assert len(within_epochs) >= len(replayed) - 1, replayed  # the first of an epoch draws for many
    for counts in within_epochs:
        assert counts.launches + counts.copies == 4, counts  # the rate, the record, and the batch
        assert (counts.synchronisations, counts.legacy) == (0, 0)


@on_stand_in
def test_what_a_frozen_module_was_is_never_replayed_after_a_write() -> None:
    teacher = nn.Linear(2, 2).to(CUDA)
    it = made(frozen=(teacher,))
    with it.step.on_stream():
        for _ in range(graph.WARM_UPS + 2):
            it()
        for change in (
            lambda: teacher.weight.data_ptr() and teacher.weight.detach().mul_(2),
            lambda: teacher.load_state_dict(teacher.state_dict()),
            lambda: setattr(teacher, "weight", nn.Parameter(torch.zeros(2, 2, device=CUDA))),
            lambda: it.step.load_state(it.step.state()),
            lambda: it.step.optimiser.param_groups[0].update(weight_decay=0.5),
            lambda: it.model[0].bias.requires_grad_(False),
        ):
            it.ran.clear()
            change()
            with counted() as found:
                for _ in range(graph.WARM_UPS + 2):
                    it()
            assert (len(it.ran), found.replays) == (graph.WARM_UPS + 1, 2)
    assert not it.said


@on_stand_in
def test_a_write_in_place_to_what_learns_needs_no_new_recording() -> None:
    it = made()
    with it.step.on_stream(), counted() as found:
        for _ in range(graph.WARM_UPS + 1):
            it()
        it.model.load_state_dict(it.model.state_dict())
        it()
    assert found.replays == 2


@on_stand_in
def test_a_decay_and_a_weight_that_change_are_written_to_the_device_and_nothing_is_recorded_anew() -> None:
    it = made(SEVERAL)
    with it.step.on_stream():
        for _ in range(graph.WARM_UPS + 1):
            it()
        it.ran.clear()
        assert it.step._average is not None
        it.step._average.decay = 0.5
        with counted() as found:
            it()
    assert (len(it.ran), found.replays, found.launches) == (0, 1, 1)

    weights: list[Any] = []

    def learn(images: Tensor, weight: Tensor) -> Tensor:
        weights.append(weight)
        return images.mean() * weight

    step, images = ftfast.capture_step(learn), torch.zeros(4, 3, device=CUDA)
    for number in range(graph.WARM_UPS + 1):
        step(images, float(number))
    with counted() as found:
        for number in range(3):
            step(images, 0.5 * number)
    assert (len(weights), found.replays, found.launches, found.copies) == (graph.WARM_UPS + 1, 3, 3, 3)
    assert {(type(weight), weight.dim(), weight.dtype, weight.device.type) for weight in weights} == {
        (Tensor, 0, torch.float32, "cuda")
    }


@on_stand_in
def test_a_teacher_that_changed_is_refused_though_its_graph_is_recorded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)).to(CUDA)
    # A stand-in's numbers are worthless, and a teacher is compared with its model.
    nothing = Outputs(torch.zeros(1), torch.zeros(1))
    reference = patch.object(frozen_teacher, "_reference", return_value=nothing)
    with reference, patch.object(FrozenTeacher, "_distance", return_value=0.0):
        teacher = FrozenTeacher(model, "0", example=torch.zeros(8, 3, 6, 6, device=CUDA))
    student = registry.place(network(), CUDA)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, fused=True)

    def learn(images: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = student(images).mean() + teacher(images).features.mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step, images = (
        ftfast.capture_step(learn, optimizers=optimizer, frozen=[teacher]),
        torch.zeros(8, 3, 6, 6, device=CUDA),
    )
    with warnings.catch_warnings(action="error"):
        for _ in range(graph.WARM_UPS):
            step(images)
        with counted() as found:
            step(images)
            optimizer.param_groups[0]["lr"] = 0.05
            step(images)
    assert (found.replays, found.legacy, found.refused) == (2, 0, 0)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert step.explain() == "as a CUDA graph, recorded for 1 of its kinds of batch"
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(TeacherError, match="changed after it had been frozen"):
        step(images)


@on_stand_in
def test_a_step_that_cannot_be_recorded_goes_on_as_it_is_and_says_why_once() -> None:
    waiting = made(within=lambda logits: logits.sum().item())
    drawing = made(within=lambda _: torch.rand(1))
    for it in (waiting, drawing):
        with it.step.on_stream(), counted() as found:
            for _ in range(graph.WARM_UPS + 3):
                it()
        assert found.replays == 0
        assert len(it.said) == 1
    assert "draws at random on the CPU" in drawing.said[0]
    with pytest.raises(ValueError, match=r"SGD that waits for its learning rate; build it with fused=True"):
        ftfast.capture_step(print, optimizers=torch.optim.SGD([torch.zeros(1, device=CUDA)], lr=0.1))
    with pytest.raises(ValueError, match=r"Adam whose steps cannot be recorded; build it with capturable=True"):
        ftfast.capture_step(print, optimizers=torch.optim.Adam([torch.zeros(1, device=CUDA)], lr=0.1))


@on_stand_in
def test_a_sampled_step_runs_as_it_is_between_those_that_are_replayed() -> None:
    it, clock = made(), StepClock(CUDA, every=1)
    with it.step.on_stream():
        for _ in range(graph.WARM_UPS + 2):
            it()
        it.ran.clear()
        clock.begin_step()
        try:
            with counted() as found:
                it()
        finally:
            clock.end_step()
        assert (len(it.ran), found.replays) == (1, 0)
        assert set(clock.means()) == {"backward", "optimiser"}
        with counted() as found:
            it()
    assert found.replays == 1
    assert not step_clock.is_timed()


@on_stand_in
def test_of_many_processes_two_graphs_have_one_sum_between_them() -> None:
    summed: list[Tensor] = []
    before, dist.all_reduce = dist.all_reduce, lambda flat: summed.append(flat)  # type: ignore[assignment]
    broadcast, dist.broadcast = dist.broadcast, lambda *_, **__: None  # type: ignore[assignment]
    try:
        it = made(replace(PLAIN, clip_gradient=1.0), processes=TWO)
        with it.step.on_stream():
            for _ in range(graph.WARM_UPS + 1):
                it()
            with counted() as found:
                it()
    finally:
        dist.all_reduce, dist.broadcast = before, broadcast
    assert (found.replays, found.launches, found.copies, found.synchronisations) == (2, 1, 2, 0), found
    assert len(summed) == graph.WARM_UPS + 2
    assert summed[0] is summed[-1]
    assert summed[0].numel() == sum(parameter.numel() for parameter in it.model.parameters())


@on_stand_in
def test_what_a_capture_prepares_is_not_kept_for_others() -> None:
    """Nothing has computed it yet."""
    tensors = tuple(torch.zeros(2, 2, 3, 3, device=CUDA) for _ in range(3))
    frozen = stack.Stack(tensors, tuple(torch.zeros(2, device=CUDA) for _ in range(3)), 0.1)
    calls: list[int] = []

    def prepare() -> Tensor:
        calls.append(1)
        return tensors[0] + 1

    aside, recorded = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(aside), torch.cuda.graph(recorded, stream=aside):
        stack.prepare_once(frozen, 0, ("test",), prepare)
    for _ in range(2):
        stack.prepare_once(frozen, 0, ("test",), prepare)
    assert len(calls) == 2


@pytest.mark.parametrize("device", [CPU, pytest.param(CUDA, marks=pytest.mark.cuda)], ids=str)
@pytest.mark.parametrize("stop_after", [2, 9, 17])
def test_a_replayed_training_ends_in_the_bits_of_one_that_is_not_and_so_does_a_resumed_one(
    device: torch.device, stop_after: int
) -> None:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        changes: dict[str, Any] = {"dropout": 0.5, "ema": 0.9, "clip_gradient": 1.0}
        plain = training(device, replayed=False, **changes)
        history = plain.run()
        steps = iter(range(1, 100))
        first, second = training(device, **changes), training(device, **changes)
        with pytest.raises(Stopped):
            first.run(stop=lambda: next(steps) == stop_after)
        second.load_state(first.state())
        assert [epoch.losses for epoch in second.run()] == [epoch.losses for epoch in history]
    for name, tensor in plain.trainable.state_dict().items():
        assert torch.equal(second.trainable.state_dict()[name], tensor), name


def test_on_a_cpu_a_captured_step_is_the_step() -> None:
    found = []
    for capture in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def learn(images: Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = model(images).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = ftfast.capture_step(learn, optimizers=optimizer, frozen=nn.Linear(2, 2)) if capture else learn
        losses = [step(torch.ones(4, 3, 6, 6)) for _ in range(5)]
        found.append((losses, [parameter.detach().clone() for parameter in model.parameters()]))
    assert step.explain() == "as it is: it runs on the cpu, and graphs are CUDA's"
    assert optimizer.param_groups[0]["lr"] == 0.1
    for one, other in zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True):
        assert torch.equal(one, other)


def test_arguments_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="step is a int"):
        ftfast.capture_step(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="frozen has a int; it takes a Module"):
        ftfast.capture_step(print, frozen=[3])  # type: ignore[list-item]


@pytest.mark.parametrize("part", [Part(0, 1), Part(1, 3)])
@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(2, flip=True, cutout=3)], ids=["", "augmented"])
def test_batches_made_many_at_once_are_those_made_one_by_one(
    part: Part, augmentation: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.arange(43 * 3 * 6 * 6).remainder(251).to(torch.uint8).reshape(43, 3, 6, 6)
    split = Split(pixels, torch.arange(43), Normalisation.of(255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), augmentation).to(
        CPU
    )
    one_by_one = list(split.draw(8, seed=1, epoch=2, part=part))
    monkeypatch.setattr(in_memory, "_steps_at_once", lambda *_: 4)
    for first in (0, 3, 6):
        at_once = list(split.draw(8, seed=1, epoch=2, first_step=first, part=part))
        assert len(at_once) == len(one_by_one) - first
        for found, expected in zip(at_once, one_by_one[first:], strict=True):
            for tensor, other in zip(found, expected, strict=True):
                assert torch.equal(tensor, other)
                assert tensor.stride() == other.stride()


def test_sums_of_losses_are_the_same_whenever_they_are_looked_at() -> None:
    values = torch.rand(130, 2).tolist()
    totals = []
    for looks in ((), (3, 49, 77)):
        record, taken = LossRecord(), torch.zeros((), dtype=torch.float64)
        for step, (labels, factors) in enumerate(values):
            record.add({"labels": torch.tensor(labels), "factors": torch.tensor(factors)}, 7, step)
            if step in looks:
                taken += record.take()["labels"]
        totals.append(record.totals())
        assert float(taken + record.take()["labels"]) == pytest.approx(float(totals[-1]["labels"]), rel=1e-6)
    assert totals[0] == totals[1]


def test_gradients_in_one_tensor_take_the_step_of_the_whole_batch(tmp_path: Any) -> None:
    """As of two processes, the other of which adds nothing."""
    generator = torch.Generator().manual_seed(7)
    batch = torch.randn(8, 3, 6, 6, generator=generator), torch.arange(8) % 4
    schedule = replace(PLAIN, clip_gradient=1.0, accumulate=2)
    plain = made(schedule, torch.float32, CPU)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shared = made(schedule, torch.float32, CPU, processes=TWO)
        for _ in range(3):
            plain.step(batch, 0.1)
            shared.step(batch, 0.1)
    finally:
        dist.destroy_process_group()
    for found, expected in zip(shared.model.parameters(), plain.model.parameters(), strict=True):
        assert float((found - expected).detach().norm()) <= 1e-6 * float(expected.detach().norm())
        assert found.grad is not None
        assert found.grad.untyped_storage().nbytes() == 4 * sum(it.numel() for it in plain.model.parameters())


def test_the_average_is_torchs() -> None:
    model = network().train()
    own = Average(model, 0.9)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
        own.update_parameters(model)
        own.n_averaged += 1
        torchs.update_parameters(model)
    assert own.state_dict().keys() == torchs.state_dict().keys()
    for name, tensor in torchs.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], tensor, rtol=1e-6, atol=0, msg=name)


def test_a_steps_seed_is_that_of_torch() -> None:
    for seed in (0, 2**64 - 1):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        seed_generators(seed, CPU)
        assert torch.equal(torch.rand(3), expected)


@on_stand_in
def test_what_is_seeded_on_the_cpu_leaves_the_gpus_generator() -> None:
    """Mixup draws so in each step."""
    torch.cuda.manual_seed(7)
    with seeded(3):
        assert torch.initial_seed() == 3
    assert torch.cuda.initial_seed() == 7


def test_a_state_has_numbers_for_rates_and_the_schedules_options_stay() -> None:
    it = made(device=CPU)
    it()
    state = it.step.state()
    assert [group["lr"] for group in state["optimiser"]["param_groups"]] == [0.1]
    state["optimiser"]["param_groups"][0].update(lr=0.3, weight_decay=0.7)
    it.step.load_state(state)
    assert it.step.optimiser.param_groups[0]["weight_decay"] == PLAIN.weight_decay
    assert it.step.figures() == {"learning_rate": 0.3}


def test_the_setting_is_off_on_a_cpu_and_where_processes_talk_within_the_step() -> None:
    assert Settings(device="cpu").resolved().graph == "off"
    with pytest.raises(SettingsError, match=r"graph is 'on', and graphs are CUDA's"):
        Settings(device="cpu", graph="on").resolved()
    assert Settings(device="cpu").why_no_graph("cuda") == ""
    assert "--sync-batch-norm" in Settings(device="cpu", sync_batch_norm=True).why_no_graph("cuda")
