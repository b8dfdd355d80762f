"""The head computed layer by layer, our Triton kernels round torch's convolutions, against the reference in float64.

On a GPU they run there; elsewhere in Triton's interpreter, which cannot see a race, a missing barrier or a stale cache
line.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast import reference
from ftfast.backends import Options
from ftfast.ops.ft_head import function as ft_head
from ftfast.ops.ft_head import stack as convolution_stack
from ftfast.ops.ft_head.operands import Plan

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("Triton's kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton", reason="the package triton is not installed")
loss_kernels = pytest.importorskip("ftfast.kernels.ft_loss")

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
STUDENT_SLOPE, TEACHER_SLOPE = 0.1, 0.2
# Relative L2 errors. For p = 1 every sign of a difference that rounding turns counts fully, so what 16 bits leave is
# loose; the interpreter rounds to bfloat16 towards zero.
ERROR = {torch.float32: 1e-5 if INTERPRETED else 5e-5, torch.float16: 0.02, torch.bfloat16: 0.2}


@pytest.fixture(autouse=True)
def _ieee_float32_bit_for_bit() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


class Sizes(NamedTuple):
    samples: int
    student: int
    teacher: int
    factor: int
    height: int
    width: int


class Stack(NamedTuple):
    weights: list[Tensor]
    biases: list[Tensor]


class Problem(NamedTuple):
    """A head and its features; maps are ``[N, H, W, C]``."""

    student: Tensor
    teacher: Tensor | None
    teacher_factor: Tensor | None
    translator: Stack
    paraphraser: Stack


class Gradients(NamedTuple):
    student: Tensor | None
    weights: list[Tensor]
    biases: list[Tensor]


UNLIKE = Sizes(3, 12, 24, 12, 7, 7)
SMALL = Sizes(3, 12, 24, 12, 3, 5)


def make_stack(channels: int, factor: int) -> Stack:
    layers = [(channels, channels), (channels, factor), (factor, factor)]
    weights = [torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5) for inputs, outputs in layers]
    return Stack(
        [weight.to(DEVICE) for weight in weights], [0.1 * torch.randn(each[1], device=DEVICE) for each in layers]
    )


def make_problem(
    sizes: Sizes, dtype: torch.dtype = torch.float32, known: torch.dtype | None = None, size: float = 1.0
) -> Problem:
    place = (sizes.samples, sizes.height, sizes.width)
    student, teacher = (torch.randn(*place, channels) * size for channels in (sizes.student, sizes.teacher))
    factor = None
    if known is not None:
        factor = (40 * torch.randn(*place, sizes.factor)).clamp(-127, 127).to(DEVICE, known)
    return Problem(
        student.to(DEVICE, dtype),
        teacher.to(DEVICE, dtype) if known is None else None,
        factor,
        make_stack(sizes.student, sizes.factor),
        make_stack(sizes.teacher, sizes.factor),
    )


def run(
    problem: Problem,
    *,
    p: int = 1,
    reduction: str = "mean",
    weight: float | Tensor = 3.0,
    upstream: Tensor | None = None,
    need_student_gradient: bool = True,
) -> tuple[Tensor, Gradients]:
    """The loss and the gradients; what is kept between the two must serve a second backward."""
    of_student, of_teacher = (
        convolution_stack.Stack(tuple(stack.weights), tuple(stack.biases), slope)
        for stack, slope in ((problem.translator, STUDENT_SLOPE), (problem.paraphraser, TEACHER_SLOPE))
    )
    student = nchw(problem.student).detach().requires_grad_(need_student_gradient)
    leaves = [*of_student.weights, *of_student.biases, *([student] if need_student_gradient else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = ft_head.run(
        student,
        None if problem.teacher is None else nchw(problem.teacher),
        None if problem.teacher_factor is None else nchw(problem.teacher_factor),
        Plan("layers", "triton", student.dtype, "a test"),
        of_student,
        of_teacher,
        Options(p, reduction, 1e-12, weight),
    )
    upstream = torch.ones_like(loss) if upstream is None else upstream
    found, again = (torch.autograd.grad(loss, leaves, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) or pair[0].isnan().any() for pair in zip(found, again, strict=True))
    for leaf in leaves:
        leaf.requires_grad_(False)
    of_features = found[6].permute(0, 2, 3, 1) if need_student_gradient else None
    return loss.detach(), Gradients(of_features, list(found[:3]), list(found[3:6]))


def nchw(features: Tensor) -> Tensor:
    return features.permute(0, 3, 1, 2)


def convolve(x: Tensor, stack: Stack, slope: float) -> Tensor:
    for weight, bias in zip(*stack, strict=True):
        x = F.leaky_relu(F.conv2d(x, weight, bias, padding=1), slope)
    return x


def exact(
    problem: Problem,
    *,
    p: int = 1,
    reduction: str = "mean",
    weight: float | Tensor = 3.0,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """The same in float64, with the weights as they are rounded for the kernels."""
    dtype = problem.student.dtype

    def wide(stack: Stack) -> Stack:
        return Stack([each.to(dtype).double() for each in stack.weights], [each.double() for each in stack.biases])

    translator, paraphraser = wide(problem.translator), wide(problem.paraphraser)
    student = problem.student.double().permute(0, 3, 1, 2)
    leaves = [student, *translator.weights, *translator.biases]
    for leaf in leaves:
        leaf.requires_grad_()
    if problem.teacher_factor is None:
        assert problem.teacher is not None
        target = convolve(problem.teacher.double().permute(0, 3, 1, 2), paraphraser, TEACHER_SLOPE)
    else:
        target = problem.teacher_factor.float().double().permute(0, 3, 1, 2)
    factor = convolve(student, translator, STUDENT_SLOPE)
    loss = reference.ft_loss(factor, target, p=p, reduction=reduction, weight=weight)
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    found = torch.autograd.grad(loss, leaves, upstream)
    return loss.detach(), Gradients(found[0].permute(0, 2, 3, 1), list(found[1:4]), list(found[4:7]))


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def assert_exact(problem: Problem, **options: Any) -> None:
    loss, gradients = run(problem, **options)
    expected_loss, expected = exact(problem, **options)
    error = ERROR[problem.student.dtype]
    assert loss.dtype == torch.float32
    assert loss.shape == expected_loss.shape
    assert relative_error(loss, expected_loss) <= error
    assert gradients.student is not None
    assert gradients.student.dtype == problem.student.dtype
    assert relative_error(gradients.student, expected.student) <= error
    for computed, truths in ((gradients.weights, expected.weights), (gradients.biases, expected.biases)):
        for result, truth in zip(computed, truths, strict=True):
            assert result.dtype == torch.float32
            assert relative_error(result, truth) <= error


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 16, 16, 8, 4, 4),
        UNLIKE,
        Sizes(1, 24, 12, 32, 3, 5),
        Sizes(3, 32, 64, 16, 7, 7),
        Sizes(2, 64, 24, 32, 4, 4),
        Sizes(1, 16, 8, 8, 14, 14),
        Sizes(2, 3, 5, 2, 1, 1),
    ],
    ids=str,
)
def test_sizes(sizes: Sizes) -> None:
    assert_exact(make_problem(sizes))


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("p", [1, 2])
def test_dtypes(dtype: torch.dtype, p: int) -> None:
    assert_exact(make_problem(SMALL, dtype), p=p)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_reductions_and_upstream_gradients(reduction: str, p: int) -> None:
    problem = make_problem(SMALL)
    upstream = torch.tensor([1.5, -0.25, 3.0], device=DEVICE) if reduction == "none" else torch.tensor(1.5).to(DEVICE)
    assert_exact(problem, p=p, reduction=reduction, upstream=upstream)


@pytest.mark.parametrize("upstream", [[0.0, 1.0, 0.0, 2.0, 0.0, 3.0], [4.0, 4.0, 4.0, 4.0, 4.0, 4.0]])
def test_upstream_strides(upstream: list[float]) -> None:
    values = torch.tensor(upstream, device=DEVICE)[1::2]
    assert_exact(make_problem(Sizes(3, 8, 8, 8, 3, 3)), reduction="none", upstream=values)


@pytest.mark.parametrize("known", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_known_factors(known: torch.dtype) -> None:
    assert_exact(make_problem(SMALL, torch.float16, known))


def test_a_weight_tensor() -> None:
    assert_exact(make_problem(SMALL), weight=torch.tensor(500.0, device=DEVICE))


@pytest.mark.parametrize("p", [1, 2])
def test_factors_that_the_loss_reads_twice(p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_kernels, "REGISTER_SIZE", 64)
    monkeypatch.setattr(loss_kernels, "TWO_PASS_BLOCK", 128)
    assert_exact(make_problem(SMALL), p=p)


def test_a_known_factor_made_under_inference_mode() -> None:
    """Backward reads it, and autograd does not save such a tensor."""
    problem = make_problem(SMALL, known=torch.float32)
    assert problem.teacher_factor is not None
    with torch.inference_mode():
        made = problem.teacher_factor.clone()
    assert_exact(problem._replace(teacher_factor=made))


def test_without_the_students_gradient_the_others_are_the_same() -> None:
    problem = make_problem(SMALL)
    _, both = run(problem)
    _, alone = run(problem, need_student_gradient=False)
    assert alone.student is None
    for some, others in ((alone.weights, both.weights), (alone.biases, both.biases)):
        for result, other in zip(some, others, strict=True):
            assert relative_error(result, other.double()) <= 1e-6


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs programs one after the other")
def test_runs_are_bit_equal() -> None:
    problem = make_problem(Sizes(3, 16, 24, 16, 7, 7), torch.float16)
    loss, gradients = run(problem)
    again, gradients_again = run(problem)
    assert torch.equal(loss, again)
    pairs = zip(
        [gradients.student, *gradients.weights, *gradients.biases],
        [gradients_again.student, *gradients_again.weights, *gradients_again.biases],
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("p", [1, 2])
def test_a_student_factor_of_zeros_has_finite_gradients(p: int) -> None:
    problem = make_problem(SMALL)
    for parameter in (*problem.translator.weights, *problem.translator.biases):
        parameter.zero_()
    loss, gradients = run(problem, p=p)
    expected_loss, expected = exact(problem, p=p)
    assert relative_error(loss, expected_loss) <= ERROR[torch.float32]
    assert relative_error(gradients.biases[2], expected.biases[2]) <= ERROR[torch.float32]
    for result in (gradients.student, *gradients.weights, *gradients.biases[:2]):
        assert not result.any()


def test_tiny_features_in_float16() -> None:
    # The gradient is as large as 1 / |s|, about 1e3; what is kept of it for backward must not be.
    problem = make_problem(Sizes(2, 16, 16, 16, 4, 4), torch.float16, size=1e-3)
    for bias in (*problem.translator.biases, *problem.paraphraser.biases):
        bias.zero_()
    assert_exact(problem, p=2, weight=1e-3)


def test_a_nan_stays_one() -> None:
    problem = make_problem(Sizes(3, 16, 16, 16, 4, 4))
    problem.student[1, 2, 1, 3] = float("nan")
    loss, gradients = run(problem, reduction="none", upstream=torch.ones(3, device=DEVICE))
    assert loss.isnan().tolist() == [False, True, False]
    assert gradients.student is not None
    assert gradients.student.isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert all(bool(result.isnan().any()) for result in (*gradients.weights, *gradients.biases))
