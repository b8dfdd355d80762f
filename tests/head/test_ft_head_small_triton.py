"""The single-pass head's kernels, through their launchers, against torch in float64.

On a GPU they run there; elsewhere in Triton's interpreter, which cannot see a race, a missing barrier or a stale cache
line.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("Triton's kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton", reason="the package triton is not installed")
forward_kernels = pytest.importorskip("ftfast.kernels.ft_head.ft_head_small")
backward_kernels = pytest.importorskip("ftfast.kernels.ft_head.ft_head_small_backward")
weight_kernels = pytest.importorskip("ftfast.kernels.ft_head.ft_head_small_weights")
shape_rules = pytest.importorskip("ftfast.kernels.ft_head.ft_head_small_shape")
devices = pytest.importorskip("ftfast.kernels.device")
packing = pytest.importorskip("ftfast.kernels.ft_head.pack_weights")
plans = pytest.importorskip("ftfast.kernels.ft_head.ft_head_small_plan")
layouts = pytest.importorskip("ftfast.kernels.layout")

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
EPS = 1e-12
STUDENT_SLOPE, TEACHER_SLOPE = 0.2, 0.1
# Relative L2 errors in float32. On a GPU the products are TF32, which for p = 1 turns signs of a - b.
FLOAT32_ERROR = {1: 1e-5, 2: 1e-5} if INTERPRETED else {1: 1e-1, 2: 5e-2}
# In 16 bits a result may be off by so many times what torch's layers are with maps rounded alike, and one rounding.
# The interpreter cuts bfloat16 off where a GPU rounds to nearest.
ALLOWANCE = {torch.float16: 2.5, torch.bfloat16: 3.0 if INTERPRETED else 1.5}
NAMES = ("loss", "dx", "dW0", "dW1", "dW2", "db0", "db1", "db2")

on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def pieces_lie_apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is between the pieces of an allocation stays as it was, or the test fails."""
    add, empty = layouts.Layout.add, layouts.Layout.empty
    pieces: dict[Any, list[Any]] = {}
    made: list[tuple[Any, Tensor]] = []

    def add_apart(layout: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        piece = add(layout, shape, dtype)
        layout.bytes += layouts.ALIGNMENT
        pieces.setdefault(layout, []).append(piece)
        return piece

    def remember(layout: Any, device: torch.device) -> Tensor:
        memory: Tensor = empty(layout, device)
        made.append((layout, memory))
        return memory

    monkeypatch.setattr(layouts.Layout, "add", add_apart)
    monkeypatch.setattr(layouts.Layout, "empty", remember)
    yield
    for layout, memory in made[-8:]:
        between = torch.ones(len(memory), dtype=torch.bool, device=memory.device)
        for offset, shape, dtype in pieces.get(layout, ()):
            between[offset : offset + math.prod(shape) * dtype.itemsize] = False
        assert bool((memory[between] == 255).all()), "a kernel wrote beyond its piece of an allocation"


@pytest.fixture(autouse=True)
def _interpreted_quickly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no shape varies: without a look for overflows, and with fewer shares of a weight's gradient."""
    if INTERPRETED and "shape" not in request.fixturenames:
        request.getfixturevalue("overflow_unchecked")
        monkeypatch.setattr(weight_kernels, "SHARES", 2)


class Shape(NamedTuple):
    samples: int
    student: int
    teacher: int
    factor: int
    height: int
    width: int


RESNET = Shape(3, 64, 64, 32, 8, 8)
SMALL = Shape(3, 12, 20, 10, 4, 4)
SHAPES = [
    RESNET,
    RESNET._replace(samples=1),
    Shape(2, 12, 24, 12, 7, 7),
    Shape(7, 24, 12, 20, 3, 5),
    SMALL,
    Shape(2, 16, 40, 33, 1, 2),
    Shape(2, 5, 3, 3, 1, 1),
    Shape(1, 72, 128, 66, 2, 2),
]


def crossed(many: Sequence[Any], few: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Every pair; in the interpreter, which takes seconds for one, each of ``many`` with the next of ``few``."""
    return list(zip(many, itertools.cycle(few), strict=False)) if INTERPRETED else list(itertools.product(many, few))


Layers = list[tuple[Tensor, Tensor]]


class Head(NamedTuple):
    """A head's operands: features ``[N, H, W, C]`` and ``(weight, bias)`` of three layers a side, in float32."""

    student: Tensor
    teacher: Tensor
    student_layers: Layers
    teacher_layers: Layers

    @property
    def dtype(self) -> torch.dtype:
        return self.student.dtype


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, torch.float32)


def make_layers(inputs: int, factor: int, dtype: torch.dtype, seed: int) -> Layers:
    """Weights are exact in the dtype that they are packed in."""
    layers = []
    for place, (count, outputs) in enumerate(((inputs, inputs), (inputs, factor), (factor, factor))):
        weight = normal(outputs, count, 3, 3, seed=seed + place) / (4 * count) ** 0.5
        layers.append((weight.to(dtype).float(), normal(outputs, seed=seed + place) / 5))
    return layers


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> Head:
    samples, student, teacher, factor, height, width = shape
    return Head(
        normal(samples, height, width, student, seed=1).to(dtype),
        normal(samples, height, width, teacher, seed=2).to(dtype),
        make_layers(student, factor, dtype, seed=3),
        make_layers(teacher, factor, dtype, seed=7),
    )


class Computed(NamedTuple):
    """What backward takes of a forward pass."""

    plan: Any
    memory: Tensor


def forward(
    head: Head,
    *,
    p: int = 1,
    reduction: str = "mean",
    weight: float | Tensor = 1.0,
    eps: float = EPS,
    teacher_factor: Tensor | None = None,
) -> tuple[Tensor, Computed]:
    known = teacher_factor is not None
    weights, biases = ([part for part, _ in head.student_layers], [part for _, part in head.student_layers])
    frozen = plans.Frozen(*([part[place] for part in head.teacher_layers] for place in (0, 1)))
    samples, height, width, student = head.student.shape
    factor = len(biases[2])
    teacher = None if known else head.teacher.shape[3]
    plan = plans.SmallHeadPlan(
        shape_rules.HeadShape(DEVICE, head.dtype, samples, height, width, student, teacher, factor),
        weights,
        () if known else frozen.weights,
        p=p,
        reduction=reduction,
        eps=eps,
        slopes=(STUDENT_SLOPE, TEACHER_SLOPE),
        weighted=isinstance(weight, Tensor) and weight.device.type == DEVICE.type,
        keeps=True,
    )
    other = head.teacher if teacher_factor is None else teacher_factor
    loss, memory = plan.forward(head.student, other, weights, biases, None if known else frozen, weight)
    return loss, Computed(plan, memory)


def backward(
    head: Head,
    kept: Computed,
    upstream: Tensor,
    *,
    weight: float | Tensor = 1.0,
    need_student_gradient: bool = True,
) -> list[Tensor | None]:
    """dx, three dW and three db."""
    weights_of_student = [weight for weight, _ in head.student_layers]
    dx, weights, biases = kept.plan.backward(
        head.student, kept.memory, upstream, weights_of_student, weight, needs_input=need_student_gradient
    )
    return [dx, *weights, *biases]


class _Rounded(torch.autograd.Function):
    """A map that torch keeps in 16 bits, and its gradient with it."""

    @staticmethod
    def forward(_: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def stack(x: Tensor, layers: Layers, slope: float, rounding: torch.dtype) -> Tensor:
    for weight, bias in layers:
        z = F.conv2d(x, weight, bias, padding=1)
        x = F.leaky_relu(z, slope)
        if rounding.itemsize == 2:
            x = _Rounded.apply(x, rounding)
    return x


def expected(
    head: Head,
    upstream: Tensor,
    *,
    p: int = 1,
    reduction: str = "mean",
    weight: float | Tensor = 1.0,
    eps: float = EPS,
    teacher_factor: Tensor | None = None,
    rounding: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Loss, dx, dW and db in float64; with 16 bits of rounding, as torch's layers are with maps kept in these."""
    student = head.student.double().permute(0, 3, 1, 2).requires_grad_()
    layers = [(each.double().requires_grad_(), bias.double().requires_grad_()) for each, bias in head.student_layers]
    if teacher_factor is None:
        fixed = [(each.double(), bias.double()) for each, bias in head.teacher_layers]
        t = stack(head.teacher.double().permute(0, 3, 1, 2), fixed, TEACHER_SLOPE, rounding)
    else:
        t = teacher_factor.float().double().permute(0, 3, 1, 2)
    s = stack(student, layers, STUDENT_SLOPE, rounding)
    loss = reference.ft_loss(s, t, p=p, reduction=reduction, eps=eps, weight=weight)
    inputs = [student, *(each for each, _ in layers), *(bias for _, bias in layers)]
    dx, *others = torch.autograd.grad(loss, inputs, upstream.double())
    return [loss.detach(), dx.permute(0, 2, 3, 1), *others]


def relative_error(result: Tensor, truth: Tensor) -> float:
    assert result.shape == truth.shape
    return float((result.double() - truth).norm() / truth.norm())


def upstream_of(head: Head, reduction: str, seed: int = 9) -> Tensor:
    """Of the size of the loss weights and AMP scales that training multiplies a mean with, and never 1."""
    samples = head.student.shape[0]
    upstream = normal(samples if reduction == "none" else 1, seed=seed)
    upstream = head.student.numel() * (upstream + 2 * upstream.sign())
    return upstream if reduction == "none" else upstream[0]


def assert_agrees(head: Head, *, upstream: Tensor | None = None, **options: Any) -> None:
    p, reduction = options.get("p", 1), options.get("reduction", "mean")
    if upstream is None:
        upstream = upstream_of(head, reduction)
    loss, kept = forward(head, **options)
    assert loss.dtype == torch.float32
    found = [loss, *backward(head, kept, upstream, weight=options.get("weight", 1.0))]
    truth = expected(head, upstream, **options)
    bounds = [FLOAT32_ERROR[p]] * len(truth)
    if head.dtype.itemsize == 2:
        eager = expected(head, upstream, rounding=head.dtype, **options)
        step = torch.finfo(head.dtype).eps
        bounds = [
            ALLOWANCE[head.dtype] * relative_error(one, other) + step for one, other in zip(eager, truth, strict=True)
        ]
    for name, got, wanted, bound in zip(NAMES, found, truth, bounds, strict=True):
        assert got is not None
        assert got.dtype == (head.dtype if name == "dx" else torch.float32)
        error = relative_error(got, wanted)
        assert error <= bound, f"{name} is off by {error:.1e}, more than {bound:.1e}"


@pytest.mark.parametrize(("shape", "p"), crossed(SHAPES, [1, 2]), ids=str)
def test_float32_agrees_with_float64(shape: Shape, p: int) -> None:
    assert_agrees(make(shape), p=p)


@pytest.mark.parametrize(("dtype", "p"), [(torch.float16, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize("shape", [RESNET, Shape(6, 24, 12, 20, 3, 5)], ids=["8x8", "3x5"])
def test_16_bits_are_no_worse_than_torchs_layers(shape: Shape, dtype: torch.dtype, p: int) -> None:
    assert_agrees(make(shape, dtype), p=p)


@pytest.mark.parametrize(("reduction", "p"), crossed(["mean", "batchmean", "sum", "none", "none"], [1, 2]))
def test_reductions(reduction: str, p: int) -> None:
    assert_agrees(make(SMALL), p=p, reduction=reduction)


@pytest.mark.parametrize(
    ("dtype", "reduction"), crossed([torch.float32, torch.float64, torch.bfloat16], ["mean", "none"])
)
def test_a_weight_that_is_a_tensor(dtype: torch.dtype, reduction: str) -> None:
    weight = torch.tensor(500.0, dtype=dtype, device=DEVICE)
    assert_agrees(make(SMALL), reduction=reduction, weight=weight)


def test_a_weight_that_is_a_number() -> None:
    assert_agrees(make(SMALL), weight=-0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_upstream_gradients_of_samples_with_any_stride_and_size(dtype: torch.dtype) -> None:
    # Far apart in size, but for 16 bits not so far that a sample's share of a sum does not matter.
    apart = torch.tensor([1e-3, 5.0, -2.0, 5.0, 7.0, 5.0], device=DEVICE)[::2]
    assert_agrees(make(SMALL, dtype), reduction="none", upstream=apart, p=2)
    assert_agrees(make(SMALL, dtype), reduction="none", upstream=torch.tensor(-3.0, device=DEVICE).expand(3), p=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nothing_underflows_under_a_mean_and_an_upstream_gradient_of_1(dtype: torch.dtype) -> None:
    head = make(RESNET, dtype)
    upstream = torch.ones((), device=DEVICE)
    weight = 1e-6
    loss, kept = forward(head, weight=weight)
    found = [loss, *backward(head, kept, upstream, weight=weight)]
    truth = expected(head, upstream, weight=weight)
    eager = expected(head, upstream, weight=weight, rounding=dtype)
    for name, got, wanted, rounded in zip(NAMES, found, truth, eager, strict=True):
        # The features' gradient is below float16's smallest number, all others are float32.
        if name != "dx" or dtype == torch.bfloat16:
            bound = ALLOWANCE[dtype] * relative_error(rounded, wanted) + torch.finfo(dtype).eps
            assert relative_error(got, wanted) <= bound, name


@pytest.mark.parametrize("p", [1, 2])
def test_tiny_float16_features_give_right_gradients(p: int) -> None:
    head = make(RESNET, torch.float16)
    layers = [[(weight, torch.zeros_like(bias)) for weight, bias in side] for side in head[2:]]
    head = Head(head.student * 1e-6, head.teacher * 1e-6, *layers)
    # The maps are subnormal and keep four bits: torch's layers are no nearer.
    assert_agrees(head, p=p, upstream=torch.ones((), device=DEVICE))


@pytest.mark.parametrize(("dtype", "p"), crossed([torch.float32, torch.float16], [1, 2]))
def test_norms_far_apart(dtype: torch.dtype, p: int) -> None:
    head = make(SMALL, dtype)
    layers = [(weight, torch.zeros_like(bias)) for weight, bias in head.student_layers]
    scales = torch.tensor([1.0, 30.0, 0.1], device=DEVICE, dtype=dtype)
    assert_agrees(head._replace(student=head.student * scales[:, None, None, None], student_layers=layers), p=p)


@pytest.mark.parametrize(("dtype", "p"), crossed([torch.float32, torch.float16], [1, 2]))
def test_a_student_factor_of_zeros_gives_what_torch_gives(dtype: torch.dtype, p: int) -> None:
    head = make(SMALL, dtype)
    layers = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in head.student_layers]
    head = head._replace(student_layers=layers)
    upstream = torch.tensor(0.5, device=DEVICE)
    loss, kept = forward(head, p=p)
    truth = expected(head, upstream, p=p)
    found = [loss, *backward(head, kept, upstream)]
    for name, got, wanted in zip(NAMES, found, truth, strict=True):
        assert got is not None
        assert bool(got.isfinite().all()), name
        if bool(wanted.any()):
            assert relative_error(got, wanted) <= (1e-2 if dtype == torch.float16 else FLOAT32_ERROR[p]), name
        else:
            assert not got.any(), name


@pytest.mark.parametrize("p", [1, 2])
def test_clamped_norms(p: int) -> None:
    head = make(SMALL)
    _, kept = forward(head)
    norms = kept.plan.inverse_norm.of(kept.memory).reciprocal()
    for eps in (float(norms.mean()), 100.0 * float(norms.max())):
        assert_agrees(head, p=p, eps=eps)


@pytest.mark.parametrize(("side", "value"), crossed(["student", "teacher"], [math.nan, math.inf]))
def test_a_nan_comes_through(side: str, value: float) -> None:
    head = make(SMALL)
    getattr(head, side)[1, 2, 1, 3] = value
    loss, kept = forward(head, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    dx, *parameters = backward(head, kept, torch.ones_like(loss))
    assert dx is not None
    assert bool(dx[1].isnan().any())
    assert bool(dx[::2].isfinite().all())
    assert all(gradient is not None and bool(gradient.isnan().any()) for gradient in parameters)
    assert bool(forward(head)[0].isnan())


def test_a_nan_upstream_gradient_comes_through() -> None:
    head = make(SMALL)
    _, kept = forward(head)
    for gradient in backward(head, kept, torch.tensor(math.nan, device=DEVICE)):
        assert gradient is not None
        assert bool(gradient.isnan().all())


@pytest.mark.parametrize(
    ("stored", "p"), crossed([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], [2, 1])
)
def test_a_known_teacher_factor(stored: torch.dtype, p: int) -> None:
    if not INTERPRETED and stored == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no float8_e4m3fn")
    head = make(SMALL)
    factor = 40 * normal(*head.student.shape[:3], SMALL.factor, seed=5)
    factor = (factor.round().clamp(-127, 127) if stored == torch.int8 else factor).to(stored)
    assert_agrees(head, p=p, teacher_factor=factor)


def test_two_runs_are_bit_equal_and_what_is_kept_stays_as_it_is() -> None:
    head = make(SMALL if INTERPRETED else SMALL._replace(samples=7), torch.float16)
    upstream = upstream_of(head, "mean")
    loss, kept = forward(head)
    copy = kept.memory.clone()
    first = backward(head, kept, upstream)
    assert torch.equal(kept.memory, copy)
    again, kept_again = forward(head)
    assert torch.equal(loss, again)
    assert torch.equal(kept_again.memory, copy)
    for _ in range(2):
        second = backward(head, kept, upstream)
        assert all(one is not None and torch.equal(one, two) for one, two in zip(first, second, strict=True))


@on_gpu
def test_a_thousand_runs_are_bit_equal() -> None:
    head = make(RESNET._replace(samples=128), torch.bfloat16)
    upstream = upstream_of(head, "mean")
    loss, kept = forward(head)
    first = backward(head, kept, upstream)
    for _ in range(1000):
        again, kept_again = forward(head)
        assert torch.equal(loss, again)
        assert torch.equal(kept.memory, kept_again.memory)
        second = backward(head, kept, upstream)
        assert all(one is not None and torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU programs end in whatever order they do")
def test_whatever_side_and_image_ends_last_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs first to last, so the teacher's was always the one that ended last."""
    from triton.runtime.interpreter import interpreter_builder

    head = make(SMALL, torch.float16)
    upstream = upstream_of(head, "mean")

    def results() -> list[Tensor]:
        loss, kept = forward(head)
        return [loss, kept.memory, *(gradient for gradient in backward(head, kept, upstream) if gradient is not None)]

    expected_bits = results()
    in_order = interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        interpreter_builder, "set_grid_idx", lambda x, y, z: in_order(interpreter_builder.grid_dim[0] - 1 - x, y, z)
    )
    assert all(torch.equal(one, other) for one, other in zip(results(), expected_bits, strict=True))


def test_without_the_features_gradient_the_others_are_the_same() -> None:
    head = make(SMALL)
    upstream = upstream_of(head, "mean")
    _, kept = forward(head)
    dx, *parameters = backward(head, kept, upstream)
    none, *alone = backward(head, kept, upstream, need_student_gradient=False)
    assert dx is not None
    assert none is None
    assert all(one is not None and torch.equal(one, two) for one, two in zip(parameters, alone, strict=True))


def test_gradients_are_laid_out_as_the_weights_are() -> None:
    head = make(Shape(1, 5, 3, 3, 1, 2))
    upstream = upstream_of(head, "mean")
    layers = [(weight.to(memory_format=torch.channels_last), bias) for weight, bias in head.student_layers]
    bits = []
    for each in (head, head._replace(student_layers=layers)):
        _, kept = forward(each)
        bits.append(backward(each, kept, upstream))
        assert kept.plan.like_parameters
        for gradient, (weight, _) in zip(bits[-1][1:4], each.student_layers, strict=True):
            assert gradient is not None
            assert gradient.stride() == weight.stride()
    assert all(one is not None and torch.equal(one, other) for one, other in zip(*bits, strict=True))
    mixed = head._replace(student_layers=layers[:1] + head.student_layers[1:])
    assert not forward(mixed)[1].plan.like_parameters  # the caller copies


def test_counters_are_left_at_zero() -> None:
    head = make(SMALL)
    _, kept = forward(head)
    backward(head, kept, upstream_of(head, "mean"))
    assert devices._counters
    assert not any(bool(counters.any()) for counters in devices._counters.values())


class _Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, launches: list[str], name: str) -> None:
        self._kernel, self._launches, self._name = kernel, launches, name

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        self._launches.append(self._name)
        started: Callable[..., Any] = self._kernel[grid]
        return started


def _count(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[str]:
    launches: list[str] = []
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _Counted(kernel, launches, name))
    return launches


def test_a_step_takes_five_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make(SMALL)
    launches = _count(monkeypatch, packing, forward_kernels, backward_kernels, weight_kernels)
    loss, kept = forward(head)
    backward(head, kept, torch.ones_like(loss))
    assert launches == [
        "_pack_weights_kernel",
        "_pack_weights_kernel",
        "_small_head_forward_kernel",
        "_small_head_input_gradients_kernel",
        "_small_head_weight_gradients_kernel",
    ]


def fits(shape: Shape, dtype: torch.dtype = torch.bfloat16, teacher: bool = True) -> str:
    reason: str = shape_rules.small_head_fits(
        torch.device("cpu"),
        dtype,
        shape.height,
        shape.width,
        shape.teacher if teacher else None,
        shape.student,
        shape.factor,
    )
    return reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_what_is_tested_fits(shape: Shape, dtype: torch.dtype) -> None:
    assert not fits(shape, dtype)


def test_cifar_heads_fit_and_others_are_refused_in_words() -> None:
    assert not fits(RESNET)
    assert not fits(RESNET._replace(factor=64))
    assert not fits(Shape(128, 128, 128, 64, 8, 8))
    assert not fits(Shape(128, 64, 256, 64, 8, 8))
    assert "14x14" in fits(RESNET._replace(height=14, width=14))
    assert "factor" in fits(RESNET._replace(factor=512))
    assert "teacher" in fits(RESNET._replace(teacher=2048))
    assert "student" in fits(RESNET._replace(student=2048))
    assert not fits(RESNET._replace(teacher=2048), teacher=False)
