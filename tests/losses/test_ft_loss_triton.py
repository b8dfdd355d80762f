"""The Triton kernels of the loss, through their launchers, against the reference in float64.

On a GPU they run there; elsewhere in Triton's interpreter, which cannot see a race, a missing barrier or a stale cache
line: those are what the tests marked "cuda" are for.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ftfast import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("Triton's kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton", reason="the package triton is not installed")
kernels = pytest.importorskip("ftfast.kernels.ft_loss")
devices = pytest.importorskip("ftfast.kernels.device")

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
REDUCTIONS = ("mean", "batchmean", "sum", "none")
# Relative L2 errors: a few roundings of float32 sums; for gradients the rounding to the factor's dtype on top.
LOSS_ERROR = {torch.float64: 1e-13, torch.float32: 1e-6}
GRADIENT_ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}

on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype == torch.int8:
        return (40 * values).round().clamp(-127, 127).to(DEVICE, dtype)
    return values.to(DEVICE, dtype)


def _wide(factor: Tensor) -> Tensor:
    """The same values as a float64 leaf."""
    wide = factor if factor.dtype != torch.float8_e4m3fn else factor.to(torch.float32)
    return wide.detach().to(torch.float64).clone().requires_grad_()


def _relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def _assert_same_as_reference(
    student: Tensor,
    teacher: Tensor,
    *,
    p: int = 1,
    reduction: str = "mean",
    eps: float = 1e-12,
    weight: float | Tensor = 1.0,
    upstream: Tensor | None = None,
) -> None:
    teacher_gradient = teacher.is_floating_point() and teacher.dtype in GRADIENT_ERROR
    loss, statistics = kernels.ft_loss_forward(student, teacher, p=p, reduction=reduction, eps=eps, weight=weight)
    wide_student, wide_teacher = _wide(student), _wide(teacher)
    expected = reference.ft_loss(wide_student, wide_teacher, p=p, reduction=reduction, eps=eps, weight=weight)
    assert loss.shape == expected.shape
    assert loss.dtype == reference.compute_dtype(student, teacher)
    assert _relative_error(loss, expected.detach()) <= LOSS_ERROR[loss.dtype]
    if upstream is None:
        samples = student.shape[0]
        upstream = _normal(*expected.shape, dtype=loss.dtype, seed=5) * student.numel()
        upstream += 2 * upstream.sign() * student.numel() / samples
    student_grad, teacher_grad = kernels.ft_loss_backward(
        student,
        teacher,
        statistics,
        upstream,
        p=p,
        reduction=reduction,
        weight=weight,
        student_gradient=True,
        teacher_gradient=teacher_gradient,
    )
    gradients = torch.autograd.grad(expected, (wide_student, wide_teacher), upstream.double())
    for factor, computed, gradient in zip((student, teacher), (student_grad, teacher_grad), gradients, strict=True):
        if computed is None:
            continue
        assert computed.dtype == factor.dtype
        assert computed.stride() == torch.empty_like(factor).stride()
        assert _relative_error(computed, gradient) <= max(GRADIENT_ERROR[factor.dtype], LOSS_ERROR[loss.dtype])


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", list(GRADIENT_ERROR))
def test_dtypes_and_reductions(dtype: torch.dtype, reduction: str, p: int) -> None:
    student, teacher = _normal(4, 16, 6, 5, dtype=dtype), _normal(4, 16, 6, 5, dtype=dtype, seed=1)
    _assert_same_as_reference(student, teacher, p=p, reduction=reduction)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("teacher_dtype", [torch.float64, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("student_dtype", list(GRADIENT_ERROR))
def test_mixed_dtypes(student_dtype: torch.dtype, teacher_dtype: torch.dtype, p: int) -> None:
    if not INTERPRETED and teacher_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no float8_e4m3fn")
    student, teacher = _normal(3, 16, 4, 4, dtype=student_dtype), _normal(3, 16, 4, 4, dtype=teacher_dtype, seed=1)
    _assert_same_as_reference(student, teacher, p=p)


@pytest.mark.parametrize(
    "shape",
    [(1, 7), (1, 16, 2, 2), (3, 2), (2, 3, 5, 7), (2, 129), (2, 24, 3, 3), (515, 4), (2, 4097), (1, 3, 2, 5, 3, 2)],
    ids=str,
)
def test_shapes(shape: tuple[int, ...]) -> None:
    _assert_same_as_reference(_normal(*shape), _normal(*shape, seed=1), reduction="mean")


@pytest.mark.parametrize("p", [1, 2])
def test_one_number_a_sample(p: int) -> None:
    # The direction of one number is its sign: nothing is tangential, so the gradient is 0 up to rounding.
    student, teacher = _normal(5, 1), _normal(5, 1, seed=1)
    loss, statistics = kernels.ft_loss_forward(student, teacher, p=p, reduction="none", eps=1e-12, weight=1.0)
    expected = (student.sign() - teacher.sign()).abs().flatten()
    assert bool(((loss - expected).abs() <= 1e-6).all())
    student_grad, _ = kernels.ft_loss_backward(
        student,
        teacher,
        statistics,
        torch.ones_like(loss),
        p=p,
        reduction="none",
        weight=1.0,
        student_gradient=True,
        teacher_gradient=False,
    )
    assert student_grad is not None
    assert bool((student_grad.abs() <= 1e-6 / student.abs()).all())


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_two_passes(dtype: torch.dtype, p: int) -> None:
    shape = (2, 16, 1025)
    assert math.prod(shape[1:]) > kernels.REGISTER_SIZE
    _assert_same_as_reference(_normal(*shape, dtype=dtype), _normal(*shape, dtype=dtype, seed=1), p=p)


def test_two_passes_unlike_strides() -> None:
    student, teacher = _normal(1, 41, 20, 21), _normal(1, 41, 20, 21, seed=1).to(memory_format=torch.channels_last)
    _assert_same_as_reference(student, teacher)


def _channels_last(factor: Tensor) -> Tensor:
    return factor.to(memory_format=torch.channels_last)


def _batch_innermost(factor: Tensor) -> Tensor:
    return factor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def _width_first(factor: Tensor) -> Tensor:
    return factor.transpose(1, 3).contiguous().transpose(1, 3)


def _channel_slice(factor: Tensor) -> Tensor:
    return torch.cat([factor, factor + 1, factor], 1)[:, : factor.shape[1]]


def _channel_slice_of_channels_last(factor: Tensor) -> Tensor:
    return _channels_last(torch.cat([factor, factor + 1, factor], 1))[:, : factor.shape[1]]


def _crop(factor: Tensor) -> Tensor:
    return torch.nn.functional.pad(factor, (1, 2, 1, 1), value=9.0)[:, :, 1:-1, 1:-2]


def _odd_address(factor: Tensor) -> Tensor:
    storage = torch.zeros(factor.numel() + 1, dtype=factor.dtype, device=factor.device)
    storage[1:] = factor.flatten()
    return storage[1:].view(factor.shape)


def _every_other_sample(factor: Tensor) -> Tensor:
    return factor.repeat_interleave(2, 0)[::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": _channels_last,
    "width_first": _width_first,
    "batch_innermost": _batch_innermost,
    "channel_slice": _channel_slice,
    "channel_slice_of_channels_last": _channel_slice_of_channels_last,
    "crop": _crop,
    "odd_address": _odd_address,
    "every_other_sample": _every_other_sample,
}


@pytest.mark.parametrize("teacher_layout", LAYOUTS)
@pytest.mark.parametrize("student_layout", LAYOUTS)
def test_layouts(student_layout: str, teacher_layout: str) -> None:
    student, teacher = _normal(3, 16, 4, 5), _normal(3, 16, 4, 5, seed=1)
    _assert_same_as_reference(LAYOUTS[student_layout](student), LAYOUTS[teacher_layout](teacher))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("teacher_layout", LAYOUTS)
def test_identical_values_give_exactly_zero(teacher_layout: str, p: int) -> None:
    student = _normal(3, 16, 4, 5)
    teacher = LAYOUTS[teacher_layout](student)
    loss, statistics = kernels.ft_loss_forward(student, teacher, p=p, reduction="sum", eps=1e-12, weight=1.0)
    gradients = kernels.ft_loss_backward(
        student,
        teacher,
        statistics,
        torch.ones_like(loss),
        p=p,
        reduction="sum",
        weight=1.0,
        student_gradient=True,
        teacher_gradient=True,
    )
    assert float(loss) == 0.0
    for gradient in gradients:
        assert gradient is not None
        assert not gradient.any()


def test_expanded_factors() -> None:
    sample = _normal(1, 16, 4, 4, seed=1).expand(3, -1, -1, -1)
    _assert_same_as_reference(_normal(3, 16, 4, 4), sample)
    pooled = _normal(3, 16, 1, 1, seed=1).expand(-1, -1, 4, 4)
    _assert_same_as_reference(pooled, _normal(3, 16, 4, 4))


def test_four_and_more_inner_dimensions_with_gaps() -> None:
    for rank in (4, 5):
        cut = (slice(None), *[slice(0, 3)] * rank)
        student = _normal(2, *[4] * rank)[cut]
        _assert_same_as_reference(student, _normal(2, *[5] * rank, seed=1)[cut])


def _clamped_cases() -> dict[str, tuple[Tensor, Tensor, float]]:
    # No norm is eps itself: there torch 2.11 keeps the radial term of the gradient, and 2.15 drops it.
    student, teacher = _normal(4, 24), _normal(4, 24, seed=1)
    zero_rows = student.clone(), teacher.clone()
    zero_rows[0][1] = 0
    zero_rows[1][2] = 0
    shrunk = student.clone(), teacher.clone()
    shrunk[0][0] *= 1e-3
    shrunk[1][3] *= 1e-3
    return {
        "zero rows": (*zero_rows, 1e-12),
        "eps above some norms": (*shrunk, 0.5),
        "eps above every norm": (student, teacher, 100.0),
        "norms a little above eps": (student, teacher, 0.9 * float(student[0].norm())),
        "subnormal eps": (*zero_rows, 1e-40),
        "eps 0": (student, teacher, 0.0),
    }


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [case for case in _clamped_cases() if case != "subnormal eps"])
def test_clamped_norms(case: str, dtype: torch.dtype, p: int) -> None:
    student, teacher, eps = _clamped_cases()[case]
    _assert_same_as_reference(student.to(dtype), teacher.to(dtype), p=p, reduction="none", eps=eps)


def test_zero_rows_stay_finite_with_a_subnormal_eps() -> None:
    student, teacher, eps = _clamped_cases()["subnormal eps"]
    loss, _ = kernels.ft_loss_forward(student, teacher, p=1, reduction="none", eps=eps, weight=1.0)
    expected = reference.ft_loss(student.double(), teacher.double(), reduction="none", eps=eps)
    assert _relative_error(loss, expected) <= LOSS_ERROR[torch.float32]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_values_that_are_not_finite_or_overflow(side: str, value: float, p: int) -> None:
    factors = {"student": _normal(3, 20), "teacher": _normal(3, 20, seed=1)}
    factors[side][1, 4] = value
    student, teacher = (factor.clone().requires_grad_() for factor in factors.values())
    expected = reference.ft_loss(student, teacher, p=p, reduction="none")
    upstream = torch.ones_like(expected)
    gradients = torch.autograd.grad(expected, (student, teacher), upstream)
    loss, statistics = kernels.ft_loss_forward(
        student.detach(), teacher.detach(), p=p, reduction="none", eps=1e-12, weight=1.0
    )
    computed = kernels.ft_loss_backward(
        student.detach(),
        teacher.detach(),
        statistics,
        upstream,
        p=p,
        reduction="none",
        weight=1.0,
        student_gradient=True,
        teacher_gradient=True,
    )
    assert torch.allclose(loss, expected, rtol=1e-5, atol=0, equal_nan=True)
    for result, gradient in zip(computed, gradients, strict=True):
        assert result is not None
        scale = float(gradient.nan_to_num(0, 0, 0).abs().max())
        assert torch.allclose(result, gradient, rtol=1e-4, atol=1e-6 * scale, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weight", [0.25, -3, 500.0])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_weights(weight: float, weight_dtype: torch.dtype | None, reduction: str) -> None:
    given = weight if weight_dtype is None else torch.tensor(weight, dtype=weight_dtype, device=DEVICE)
    _assert_same_as_reference(_normal(3, 40), _normal(3, 40, seed=1), reduction=reduction, weight=given)


def test_numbers_arrive_in_float64() -> None:
    student, teacher = _normal(3, 40, dtype=torch.float64), _normal(3, 40, dtype=torch.float64, seed=1)
    _assert_same_as_reference(student, teacher, weight=0.1, eps=1.1 * float(student[0].norm()))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_weight_multiplies_before_the_rounding_to_float16(as_tensor: bool) -> None:
    # Without the weight this gradient is about 1e-6, where float16 has 4 bits left.
    student, teacher = _normal(8, 16, 8, 8, dtype=torch.float16), _normal(8, 16, 8, 8, dtype=torch.float16, seed=1)
    weight = float(student.numel())
    given = torch.tensor(weight, device=DEVICE) if as_tensor else weight
    _assert_same_as_reference(student, teacher, weight=given, upstream=torch.ones((), device=DEVICE))


def test_upstream_strides() -> None:
    student, teacher = _normal(6, 40), _normal(6, 40, seed=1)
    values = _normal(12, seed=2)
    for upstream in (values[::2], torch.tensor(2.5, device=DEVICE).expand(6), values[3:9]):
        _assert_same_as_reference(student, teacher, reduction="none", upstream=upstream)


@pytest.mark.parametrize("layout", ["contiguous", "channel_slice_of_channels_last"])
@pytest.mark.parametrize("p", [1, 2])
def test_gradients_alone_are_those_of_the_launch_of_both(p: int, layout: str) -> None:
    student, teacher = _normal(3, 16, 4, 5), LAYOUTS[layout](_normal(3, 16, 4, 5, seed=1))
    _, statistics = kernels.ft_loss_forward(student, teacher, p=p, reduction="mean", eps=1e-12, weight=1.0)

    def backward(student_gradient: bool, teacher_gradient: bool) -> tuple[Tensor | None, Tensor | None]:
        return kernels.ft_loss_backward(
            student,
            teacher,
            statistics,
            torch.tensor(3.0, device=DEVICE),
            p=p,
            reduction="mean",
            weight=1.0,
            student_gradient=student_gradient,
            teacher_gradient=teacher_gradient,
        )

    both = backward(True, True)
    student_only, teacher_only = backward(True, False), backward(False, True)
    assert student_only[1] is None
    assert teacher_only[0] is None
    for alone, together in ((student_only[0], both[0]), (teacher_only[1], both[1])):
        assert alone is not None
        assert together is not None
        assert torch.equal(alone, together)


def test_counters_return_to_zero() -> None:
    student, teacher = _normal(5, 40), _normal(5, 40, seed=1)
    for _ in range(2):
        kernels.ft_loss_forward(student, teacher, p=1, reduction="mean", eps=1e-12, weight=1.0)
        assert int(devices.arrival_counters(DEVICE)) == 0


def _loss_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    loss, statistics = kernels.ft_loss_forward(student, teacher, p=1, reduction="mean", eps=1e-12, weight=500.0)
    gradient, _ = kernels.ft_loss_backward(
        student,
        teacher,
        statistics,
        torch.ones_like(loss),
        p=1,
        reduction="mean",
        weight=500.0,
        student_gradient=True,
        teacher_gradient=False,
    )
    assert gradient is not None
    return loss, gradient


@on_gpu
@pytest.mark.cuda
def test_a_thousand_runs_are_bit_equal() -> None:
    student, teacher = _normal(256, 256, 7, 7, dtype=torch.bfloat16), _normal(256, 256, 7, 7, seed=1)
    loss, gradient = _loss_and_gradient(student, teacher)
    unequal = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        again, gradient_again = _loss_and_gradient(student, teacher)
        unequal += (again != loss).long() + (gradient_again != gradient).any().long()
    assert int(unequal) == 0


@on_gpu
@pytest.mark.cuda
def test_graph_capture_and_replay() -> None:
    student, teacher = _normal(64, 64, 8, 8), _normal(64, 64, 8, 8, seed=1)
    _loss_and_gradient(student, teacher)  # compiles: a capture cannot
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    captured = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured.append(_loss_and_gradient(student, teacher))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for seed in (2, 3):
        student.copy_(_normal(64, 64, 8, 8, seed=seed))
        expected = _loss_and_gradient(student, teacher)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(20):
                    graph.replay()
        torch.cuda.synchronize()
        for loss, gradient in captured:
            assert torch.equal(loss, expected[0])
            assert torch.equal(gradient, expected[1])


@on_gpu
@pytest.mark.cuda
def test_streams_do_not_share_a_counter() -> None:
    student, teacher = _normal(512, 64, 8, 8), _normal(512, 64, 8, 8, seed=1)
    expected = _loss_and_gradient(student, teacher)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(_loss_and_gradient(student, teacher))
    torch.cuda.synchronize()
    for loss, gradient in results:
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])


@on_gpu
@pytest.mark.cuda
def test_new_shapes_compile_one_kernel_for_each_power_of_two() -> None:
    sizes = [(4, 7, 7), (5, 7, 7), (1, 8, 6), (3, 5, 9), (4, 14, 14), (7, 13, 15), (2, 11, 17)]
    before = kernels.compiled_kernels()
    for samples, height, width in sizes:
        _loss_and_gradient(_normal(samples, 48, height, width), _normal(samples, 48, height, width, seed=1))
    buckets = {(48 * height * width - 1).bit_length() for _, height, width in sizes}
    # Backward's block stops growing at BACKWARD_BLOCK, which every size here reaches.
    assert kernels.compiled_kernels() - before <= len(buckets) + 1
    after = kernels.compiled_kernels()
    _loss_and_gradient(_normal(9, 48, 6, 8), _normal(9, 48, 6, 8, seed=1))
    assert kernels.compiled_kernels() == after
