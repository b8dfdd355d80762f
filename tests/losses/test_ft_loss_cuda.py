"""The CUDA C++ kernels of the loss, through their launchers, against the reference in float64.

Three ways: on a GPU; on the host, where the code that the kernels' threads run is compiled by the C++ compiler and the
threads of each block run one after another (which sees wrong indices, tails and sums, but no race and no missing
barrier); and the machine code in the built extension, read.
"""

import ctypes
import itertools
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ftfast
from ftfast import dispatch, reference
from ftfast.backends import native, triton
from ftfast.extension import extension, load_extension
from ftfast.ops.ft_loss import cuda as kernels

ROOT = Path(__file__).resolve().parents[2]
REDUCTIONS = ("mean", "batchmean", "sum", "none")
TEACHER_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
# Relative L2 errors: a few roundings of float32 sums; for gradients the rounding to the factor's dtype on top.
LOSS_ERROR = {torch.float64: 1e-13, torch.float32: 1e-6}
GRADIENT_ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}

# The kernels again, with loops in place of blocks and threads. Blocks run last first: their order must not matter.
HOST_PROGRAM = r"""
#include "cuda/ft_loss_plan.h"

#include <vector>

using namespace ftfast;
using namespace ftfast::cuda;

template <class Sum>
Sum over_block(std::vector<Sum> threads) {
  const auto over_warp = [](Sum* lanes, int k) {
    for (int step = warp_size / 2; step > 0; step /= 2) {
      const std::vector<Sum> before(lanes, lanes + warp_size);
      for (int lane = 0; lane < warp_size; ++lane) lanes[lane].values[k] += before[lane ^ step].values[k];
    }
  };
  std::vector<Sum> warps(warp_size);
  for (int k = 0; k < Sum::count; ++k) {
    for (size_t warp = 0; warp < threads.size() / warp_size; ++warp) {
      over_warp(&threads[warp * warp_size], k);
      warps[warp].values[k] = threads[warp * warp_size].values[k];
    }
    over_warp(warps.data(), k);
  }
  return warps[0];
}

template <class Function>
auto each_thread(int threads, Function function) {
  std::vector<decltype(function(Thread{0, threads}))> results;
  for (int index = 0; index < threads; ++index) results.push_back(function(Thread{index, threads}));
  return results;
}

// The sum over the blocks of a sample, of what function(thread, block) gives the threads of each.
template <class Function>
auto over_sample(const ForwardPlan& plan, Function function) {
  decltype(function(Thread{}, 0)) sums;
  for (int block = 0; block < plan.blocks; ++block) {
    const auto own = over_block(each_thread(plan.threads, [&](Thread thread) { return function(thread, block); }));
    for (int k = 0; k < own.count; ++k) sums.values[k] += own.values[k];
  }
  return sums;
}

// student(block) and teacher(block) give the addresses of a block's run
template <class Number, class Index, class Student, class Teacher>
void forward_sample(const Forward& job, const ForwardPlan& plan, int64_t n, Student student, Teacher teacher) {
  const auto size = [&](int block) { return Index(run_at(block * plan.run, plan.run, job.size)); };
  const auto norms = norms_of(over_sample(plan, [&](Thread thread, int block) {
    return squares(thread, size(block), plan.aligned, student(block), teacher(block));
  }), Number(job.eps));
  finish_sample(job, n, norms, over_sample(plan, [&](Thread thread, int block) {
    return distances(thread, size(block), plan.aligned, student(block), teacher(block), norms, job.p);
  }));
}

template <class Number, class Student, class Teacher>
void staged_sample(const Forward& job, const ForwardPlan& plan, int64_t n, const Student* student,
                   const Teacher* teacher) {
  using Memory = std::vector<Vector<char, 16>>;
  std::vector<Memory> shared(plan.blocks, Memory((plan.shared_bytes + 15) / 16));
  const auto staged_student = [&](int block) { return reinterpret_cast<Student*>(shared[block].data()); };
  const auto staged_teacher = [&](int block) {
    return reinterpret_cast<Teacher*>(reinterpret_cast<char*>(shared[block].data()) + plan.teacher_offset);
  };
  for (int block = 0; block < plan.blocks; ++block)
    each_thread(plan.threads, [&](Thread thread) {
      const int64_t start = block * plan.run;
      stage(thread, int(run_at(start, plan.run, job.size)), plan.aligned, student + start, teacher + start,
            staged_student(block), staged_teacher(block));
      return 0;
    });
  forward_sample<Number, int>(job, plan, n, staged_student, staged_teacher);
}

extern "C" void forward(Rows student_rows, Rows teacher_rows, int64_t samples, int64_t size, int p, bool per_sample,
                        double eps, double scale, void* weight, void* loss, void* statistics, int32_t* counter,
                        int64_t shared, int64_t shared_of_several, bool clusters, int* blocks) {
  const Forward job{student_rows, teacher_rows, samples, size,       p,      eps, scale, weight,
                    per_sample,   loss,         statistics, counter};
  with_types(job.student.dtype, job.teacher.dtype, [&](auto s, auto t) {
    using Student = decltype(s);
    using Teacher = decltype(t);
    using Number = NumberFor<Student>;
    const auto plan = plan_forward<Student, Teacher>(job, Limits{shared, shared_of_several, clusters});
    *blocks = plan.shared_bytes ? plan.blocks : 0;
    for (int64_t n = samples - 1; n >= 0; --n) {
      const auto* student = sample_of<const Student>(job.student, n);
      const auto* teacher = sample_of<const Teacher>(job.teacher, n);
      if (plan.shared_bytes) staged_sample<Number>(job, plan, n, student, teacher);
      else
        forward_sample<Number, int64_t>(
            job, plan, n, [&](int) { return student; }, [&](int) { return teacher; });
      if (per_sample || ++*counter < samples) continue;
      const auto sum = over_block(each_thread(plan.threads, [&](Thread thread) { return total<Number>(thread, job); }));
      *static_cast<Number*>(loss) = sum.values[0] * factor_of<Number>(job);
      *counter = 0;
    }
  });
}

extern "C" void backward(Rows student_rows, Rows teacher_rows, Rows student_gradient_rows, Rows teacher_gradient_rows,
                         int64_t samples, int64_t size, int p, double scale, void* weight, void* statistics,
                         void* upstream, int64_t upstream_stride) {
  const Backward job{student_rows, teacher_rows, student_gradient_rows, teacher_gradient_rows, samples, size, p, scale,
                     weight, statistics, upstream, upstream_stride};
  with_types(job.student.dtype, job.teacher.dtype, [&](auto s, auto t) {
    using Student = decltype(s);
    using Teacher = decltype(t);
    const auto plan = plan_backward<Student, Teacher>(job);
    for (int64_t block = samples * plan.blocks - 1; block >= 0; --block)
      each_thread(plan.threads, [&](Thread thread) {
        backward_block_part<Student, Teacher>(thread, job, plan, block);
        return 0;
      });
  });
}
"""


class _Rows(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("stride", ctypes.c_int64))


def _rows(described: tuple[int, int, int] | None) -> _Rows:
    return _Rows(*(described or (0, 1, 0)))


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST_PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    command += [str(folder / "host.cpp"), "-o", str(folder / "host.so")]
    # A vector at an address that is no multiple of its size is an error on a GPU, and a message here.
    checked = subprocess.run([*command, "-fsanitize=alignment"], capture_output=True, text=True)
    if checked.returncode:
        subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "host.so"))


class _Limits(NamedTuple):
    """What a device has: bytes of shared memory for one block, and for each of several; whether there are clusters."""

    shared: int
    shared_of_several: int
    clusters: bool


def _on_host(library: ctypes.CDLL, limits: _Limits) -> SimpleNamespace:
    """What the launchers call of the extension, run on the host; .blocks of a sample, 0 where it was not staged."""
    i64, i32, real, address = ctypes.c_int64, ctypes.c_int, ctypes.c_double, ctypes.c_void_p

    def forward(student: Any, teacher: Any, *rest: Any) -> None:
        kinds = (i64, i64, i32, ctypes.c_bool, real, real, address, address, address, address)
        numbers = [kind(value) for kind, value in zip(kinds, rest[:-2], strict=True)]
        blocks = ctypes.c_int()
        given = i64(limits.shared), i64(limits.shared_of_several), ctypes.c_bool(limits.clusters)
        library.forward(_rows(student), _rows(teacher), *numbers, *given, ctypes.byref(blocks))
        host.blocks = blocks.value

    def backward(student: Any, teacher: Any, for_student: Any, for_teacher: Any, *rest: Any) -> None:
        kinds = (i64, i64, i32, real, address, address, address, i64)
        numbers = [kind(value) for kind, value in zip(kinds, rest[:-2], strict=True)]
        library.backward(_rows(student), _rows(teacher), _rows(for_student), _rows(for_teacher), *numbers)

    host = SimpleNamespace(ft_loss_cuda_forward=forward, ft_loss_cuda_backward=backward)
    return host


def _skip_without_kernels(device: torch.device) -> None:
    support = dispatch.supports("native", device, torch.float32, torch.float32)
    if not support.ok:
        pytest.skip(support.reason)


HOSTS = {
    "host": _Limits(227 * 1024, 227 * 1024, True),
    "host, two passes": _Limits(0, 0, False),
    "host, clusters": _Limits(1024, 512, True),
}


@pytest.fixture(params=[*HOSTS, pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Where the launchers find their kernels; yields the factors' device."""
    if request.param == "cuda":
        device = torch.device("cuda", 0)
        _skip_without_kernels(device)
        yield device
        return
    host = _on_host(request.getfixturevalue("host_library"), HOSTS[request.param])
    monkeypatch.setattr(kernels, "extension", lambda: host)
    yield torch.device("cpu")
    assert "runtime error" not in capfd.readouterr().err


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN, so that an element that no kernel writes is seen."""
    for name in ("empty", "empty_like", "empty_strided"):
        allocate = getattr(torch, name)

        def poisoned(*args: object, _allocate: Callable[..., Tensor] = allocate, **kwargs: object) -> Tensor:
            tensor = _allocate(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else 77)

        monkeypatch.setattr(torch, name, poisoned)


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (40 * values).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else values.to(dtype)


def _relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def _wide(factor: Tensor) -> Tensor:
    """The same values as a float64 leaf."""
    return factor.detach().float().double().requires_grad_() if factor.dtype != torch.float64 else _leaf(factor)


def _forward(
    student: Tensor, teacher: Tensor, *, p: int, reduction: str, eps: float, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    return kernels.LossPlan(student, teacher, p, reduction, eps).forward(student, teacher, weight)


def _leaf(factor: Tensor) -> Tensor:
    return factor.detach().clone().requires_grad_()


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
    loss, statistics = _forward(student, teacher, p=p, reduction=reduction, eps=eps, weight=weight)
    wide_student, wide_teacher = _wide(student), _wide(teacher)
    expected = reference.ft_loss(wide_student, wide_teacher, p=p, reduction=reduction, eps=eps, weight=weight)
    assert loss.shape == expected.shape
    assert loss.dtype == reference.compute_dtype(student, teacher)
    assert _relative_error(loss, expected.detach()) <= LOSS_ERROR[loss.dtype]
    if upstream is None:
        upstream = _normal(*expected.shape, dtype=loss.dtype, seed=5).to(student.device) * student.numel()
        upstream += 2 * upstream.sign() * student.numel() / student.shape[0]
    options = {"p": p, "reduction": reduction, "weight": weight}
    trains = teacher.dtype in GRADIENT_ERROR
    computed = _backward(student, teacher, statistics, upstream, **options, teacher_gradient=trains)
    exact = torch.autograd.grad(expected, (wide_student, wide_teacher), upstream.double())
    for factor, gradient, right in zip((student, teacher), computed, exact, strict=True):
        if gradient is None:
            assert factor.dtype not in GRADIENT_ERROR
            continue
        assert gradient.dtype == factor.dtype
        assert gradient.stride() == torch.empty_like(factor).stride()
        assert _relative_error(gradient, right) <= max(GRADIENT_ERROR[factor.dtype], LOSS_ERROR[loss.dtype])


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", list(GRADIENT_ERROR), ids=str)
def test_dtypes_and_reductions(place: torch.device, dtype: torch.dtype, reduction: str, p: int) -> None:
    student, teacher = _normal(4, 16, 6, 5, dtype=dtype), _normal(4, 16, 6, 5, dtype=dtype, seed=1)
    _assert_same_as_reference(student.to(place), teacher.to(place), p=p, reduction=reduction)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("teacher_dtype", TEACHER_DTYPES, ids=str)
@pytest.mark.parametrize("student_dtype", list(GRADIENT_ERROR), ids=str)
@pytest.mark.parametrize("size", [256, 259])
def test_mixed_dtypes(
    place: torch.device, size: int, student_dtype: torch.dtype, teacher_dtype: torch.dtype, p: int
) -> None:
    student, teacher = _normal(3, size, dtype=student_dtype), _normal(3, size, dtype=teacher_dtype, seed=1)
    _assert_same_as_reference(student.to(place), teacher.to(place), p=p)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 7),
        (1, 16, 2, 2),
        (3, 2),
        (2, 3, 5, 7),
        (2, 129),
        (2, 24, 3, 3),
        (515, 4),
        (2, 4097),
        (2, 4104),
        (1, 3, 2, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(place: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _assert_same_as_reference(_normal(*shape, dtype=dtype).to(place), _normal(*shape, dtype=dtype, seed=1).to(place))


@pytest.mark.parametrize("size", [12544, 65600, 65601])
@pytest.mark.parametrize("p", [1, 2])
def test_long_samples(place: torch.device, size: int, p: int) -> None:
    # The longer ones are past one block's shared memory in float32.
    _assert_same_as_reference(_normal(2, size).to(place), _normal(2, size, seed=1).to(place), p=p)


def _blocks_of(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, limits: _Limits, student: Tensor, teacher: Tensor
) -> int:
    """Blocks of each sample of a right forward on a device with these limits; 0 where it is read in two passes."""
    host = _on_host(library, limits)
    monkeypatch.setattr(kernels, "extension", lambda: host)
    _assert_same_as_reference(student, teacher)
    blocks: int = host.blocks
    return blocks


@pytest.mark.parametrize(
    ("size", "limit", "clusters", "blocks"),
    [
        (256, 2048, True, 1),
        (257, 2048, True, 2),
        (1000, 2048, True, 4),
        (2048, 2048, True, 8),
        (2052, 2048, True, 0),
        (257, 2048, False, 0),
        (33, 64, True, 8),  # of which three have nothing to do
        (5, 32, True, 2),
        (3, 32, True, 1),
        (3, 16, True, 0),
    ],
)
def test_a_sample_gets_as_few_blocks_as_hold_it(
    host_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, size: int, limit: int, clusters: bool, blocks: int
) -> None:
    for shift in (0, 1):
        student, teacher = (_normal(3 * size + 1, seed=seed)[shift:][: 3 * size].view(3, size) for seed in (0, 1))
        limits = _Limits(limit, limit, clusters)
        assert _blocks_of(host_library, monkeypatch, limits, student, teacher) == blocks


# As ft_loss.cu finds them: less what the system reserves of a block and the kernel's own sums.
H100 = _Limits(225 * 1024, 228 * 1024 // 3 - 3 * 1024, True)
A100 = _Limits(161 * 1024, 164 * 1024 // 3 - 3 * 1024, False)


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "blocks"),
    [
        ((256, 7, 7), torch.bfloat16, H100, 1),
        ((256, 7, 7), torch.bfloat16, A100, 1),
        ((256, 7, 7), torch.float32, H100, 2),
        ((256, 7, 7), torch.float32, A100, 1),
        ((512, 14, 14), torch.bfloat16, H100, 8),
        ((512, 14, 14), torch.bfloat16, A100, 0),
        ((1024, 14, 14), torch.float32, H100, 8),
        ((2048, 14, 14), torch.float32, H100, 0),
    ],
    ids=str,
)
def test_three_blocks_share_a_multiprocessor_where_clusters_allow(
    host_library: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: _Limits,
    blocks: int,
) -> None:
    """One block of all its shared memory left a multiprocessor idle between reading and computing."""
    pytest.importorskip("triton", reason="the launches' counters need the package triton")
    student, teacher = _normal(1, *shape, dtype=dtype), _normal(1, *shape, dtype=dtype, seed=1)
    assert _blocks_of(host_library, monkeypatch, device, student, teacher) == blocks


@pytest.mark.parametrize("p", [1, 2])
def test_one_number_a_sample(place: torch.device, p: int) -> None:
    # The direction of one number is its sign: nothing is tangential, so the gradient is 0 up to rounding.
    student, teacher = _normal(5, 1).to(place), _normal(5, 1, seed=1).to(place)
    loss, statistics = _forward(student, teacher, p=p, reduction="none", eps=1e-12, weight=1.0)
    expected = (student.sign() - teacher.sign()).abs().flatten()
    assert bool(((loss - expected).abs() <= 1e-6).all())
    (gradient, _) = _backward(student, teacher, statistics, torch.ones_like(loss), p=p, teacher_gradient=False)
    assert gradient is not None
    assert bool((gradient.abs() <= 1e-6 / student.abs()).all())


def _backward(
    student: Tensor, teacher: Tensor, statistics: Tensor, upstream: Tensor, **options: Any
) -> tuple[Tensor | None, Tensor | None]:
    given = {"p": 1, "reduction": "none", "weight": 1.0, "student_gradient": True, "teacher_gradient": True} | options
    plan = kernels.LossPlan(student, teacher, given["p"], given["reduction"], 0.0)
    needed = (given["student_gradient"], given["teacher_gradient"])
    return plan.backward(student, teacher, statistics, upstream, given["weight"], needed)


def _channels_last(factor: Tensor) -> Tensor:
    return factor.to(memory_format=torch.channels_last)


def _batch_innermost(factor: Tensor) -> Tensor:
    return factor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def _width_first(factor: Tensor) -> Tensor:
    return factor.transpose(1, 3).contiguous().transpose(1, 3)


def _among_nan(factor: Tensor, first: int) -> Tensor:
    """Channels of a wider map whose other channels are NaN: what lies beside a sample must not be read."""
    return torch.nn.functional.pad(factor, (0, 0, 0, 0, first, 5), value=math.nan)[:, first : first + factor.shape[1]]


def _crop(factor: Tensor) -> Tensor:
    return torch.nn.functional.pad(factor, (1, 2, 1, 1), value=math.nan)[:, :, 1:-1, 1:-2]


def _odd_address(factor: Tensor) -> Tensor:
    storage = torch.full((factor.numel() + 2,), math.nan, dtype=factor.dtype, device=factor.device)
    storage[1:-1] = factor.flatten()
    return storage[1:-1].view(factor.shape)


def _every_other_sample(factor: Tensor) -> Tensor:
    return torch.stack([factor, torch.full_like(factor, math.nan)], 1).flatten(0, 1)[::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": _channels_last,
    "width_first": _width_first,
    "batch_innermost": _batch_innermost,
    "channel_slice": lambda factor: _among_nan(factor, 0),
    "channel_slice_at_3": lambda factor: _among_nan(factor, 3),
    "channel_slice_of_channels_last": lambda factor: _among_nan(_channels_last(factor), 1),
    "crop": _crop,
    "odd_address": _odd_address,
    "every_other_sample": _every_other_sample,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place: torch.device, layout: str, dtype: torch.dtype) -> None:
    student, teacher = _normal(3, 16, 4, 5, dtype=dtype).to(place), _normal(3, 16, 4, 5, dtype=dtype, seed=1).to(place)
    for other in LAYOUTS.values():
        _assert_same_as_reference(LAYOUTS[layout](student), other(teacher))


@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "width_first", "channel_slice", "every_other_sample"]
)
def test_like_strides_cost_no_copy(place: torch.device, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = (LAYOUTS[layout](_normal(3, 16, 4, 5, seed=seed).to(place)) for seed in (0, 1))
    copies: list[object] = []
    monkeypatch.setattr(kernels.Side, "empty", lambda *args: copies.append(args) or pytest.fail("a copy was made"))
    _assert_same_as_reference(student, teacher)
    assert not copies


def test_a_student_with_gaps_is_the_one_that_is_copied(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = _crop(_normal(3, 16, 4, 5).to(place)), _channels_last(_normal(3, 16, 4, 5, seed=1).to(place))
    copied: list[kernels.Side] = []
    right = kernels.Side.empty
    monkeypatch.setattr(kernels.Side, "empty", lambda side, device: copied.append(side) or right(side, device))
    plan = kernels.LossPlan(student, teacher, 1, "mean", 1e-12)
    plan.forward(student, teacher, 1.0)
    assert copied == [plan.student]


def test_expanded_factors(place: torch.device) -> None:
    sample = _normal(1, 16, 4, 4, seed=1).to(place).expand(3, -1, -1, -1)
    _assert_same_as_reference(_normal(3, 16, 4, 4).to(place), sample)
    pooled = _normal(3, 16, 1, 1, seed=1).to(place).expand(-1, -1, 4, 4)
    _assert_same_as_reference(pooled, _normal(3, 16, 4, 4).to(place))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_identical_values_give_exactly_zero(place: torch.device, layout: str, p: int) -> None:
    student = _normal(3, 16, 4, 5).to(place)
    teacher = LAYOUTS[layout](student)
    loss, statistics = _forward(student, teacher, p=p, reduction="sum", eps=1e-12, weight=1.0)
    assert float(loss) == 0.0
    for gradient in _backward(student, teacher, statistics, torch.ones_like(loss), p=p, reduction="sum"):
        assert gradient is not None
        assert not gradient.any()


def _clamped_cases() -> dict[str, tuple[Tensor, Tensor, float]]:
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
        "eps 0": (student, teacher, 0.0),
    }


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", _clamped_cases())
def test_clamped_norms(place: torch.device, case: str, dtype: torch.dtype, p: int) -> None:
    student, teacher, eps = _clamped_cases()[case]
    _assert_same_as_reference(student.to(place, dtype), teacher.to(place, dtype), p=p, reduction="none", eps=eps)


def test_zero_rows_stay_finite_with_a_subnormal_eps(place: torch.device) -> None:
    student, teacher, _ = (
        case.to(place) if isinstance(case, Tensor) else case for case in _clamped_cases()["zero rows"]
    )
    loss, _ = _forward(student, teacher, p=1, reduction="none", eps=1e-40, weight=1.0)
    expected = reference.ft_loss(student.double(), teacher.double(), reduction="none", eps=1e-40)
    assert _relative_error(loss, expected) <= LOSS_ERROR[torch.float32]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_values_that_are_not_finite_or_overflow(place: torch.device, side: int, value: float, p: int) -> None:
    factors = [_normal(3, 20), _normal(3, 20, seed=1)]
    factors[side][1, 4] = value
    student, teacher = (_leaf(factor.to(place)) for factor in factors)
    expected = reference.ft_loss(student, teacher, p=p, reduction="none")
    upstream = torch.ones_like(expected)
    gradients = torch.autograd.grad(expected, (student, teacher), upstream)
    student, teacher = student.detach(), teacher.detach()
    loss, statistics = _forward(student, teacher, p=p, reduction="none", eps=1e-12, weight=1.0)
    assert torch.allclose(loss, expected, rtol=1e-5, atol=0, equal_nan=True)
    computed = _backward(student, teacher, statistics, upstream, p=p)
    for result, gradient in zip(computed, gradients, strict=True):
        assert result is not None
        assert torch.equal(result.isfinite(), gradient.isfinite())
        finite = gradient.nan_to_num(0, 0, 0).double()
        assert _relative_error(result.nan_to_num(0, 0, 0), finite) <= 1e-5


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_every_value_of_a_narrow_dtype_is_read(place: torch.device, stored: torch.dtype) -> None:
    # One finite value a sample beside a 1: its direction tells the value, at full float32 accuracy.
    codes = torch.arange(256, dtype=torch.uint8) if stored == torch.float8_e4m3fn else torch.arange(2**16).short()
    values = codes.view(stored).float()
    values = values[values.isfinite() & (values.abs() < 1e4)]
    teacher = torch.stack([values, torch.ones_like(values)], 1).to(stored).to(place)
    student = torch.tensor([[0.0, 1.0]]).expand(len(values), 2).to(place)
    loss, _ = _forward(student, teacher, p=1, reduction="none", eps=1e-12, weight=1.0)
    expected = reference.ft_loss(student.double(), teacher.float().double(), reduction="none")
    # l is about |value| where that is small: what is left of 1 - b there carries the rounding of a number near 1.
    assert bool(((loss.double() - expected).abs() <= 1e-6 * expected + 1.2e-7).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_as_torch_rounds(place: torch.device, dtype: torch.dtype) -> None:
    """From values below the dtype's smallest to infinity, the same bits as a float32 gradient cast by torch."""
    student, teacher = _normal(64, 96, dtype=dtype).to(place), _normal(64, 96, seed=1).to(place)
    scales = 10.0 ** torch.linspace(-10, 8, 64).to(place)
    _, statistics = _forward(student, teacher, p=1, reduction="none", eps=1e-12, weight=1.0)
    rounded, _ = _backward(student, teacher, statistics, scales)
    exact, _ = _backward(student.float(), teacher, statistics, scales)
    assert rounded is not None
    assert exact is not None
    assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weight", [0.25, -3, 500.0])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights(place: torch.device, weight: float, weight_dtype: torch.dtype | None, reduction: str) -> None:
    given = weight if weight_dtype is None else torch.tensor(weight, dtype=weight_dtype, device=place)
    student, teacher = _normal(3, 40).to(place), _normal(3, 40, seed=1).to(place)
    _assert_same_as_reference(student, teacher, reduction=reduction, weight=given)


def test_numbers_arrive_in_float64(place: torch.device) -> None:
    student, teacher = (_normal(3, 40, dtype=torch.float64, seed=seed).to(place) for seed in (0, 1))
    _assert_same_as_reference(student, teacher, weight=0.1, eps=1.1 * float(student[0].norm()))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_weight_multiplies_before_the_rounding_to_float16(place: torch.device, as_tensor: bool) -> None:
    # Without the weight this gradient is about 1e-6, where float16 has 4 bits left.
    student, teacher = (_normal(8, 16, 8, 8, dtype=torch.float16, seed=seed).to(place) for seed in (0, 1))
    weight = float(student.numel())
    given = torch.tensor(weight, device=place) if as_tensor else weight
    _assert_same_as_reference(student, teacher, weight=given, upstream=torch.ones((), device=place))


def test_upstream_strides(place: torch.device) -> None:
    student, teacher = _normal(6, 40).to(place), _normal(6, 40, seed=1).to(place)
    values = _normal(12, seed=2).to(place)
    for upstream in (values[::2], torch.tensor(2.5, device=place).expand(6), values[3:9]):
        _assert_same_as_reference(student, teacher, reduction="none", upstream=upstream)


@pytest.mark.parametrize("layout", ["contiguous", "channel_slice_of_channels_last"])
@pytest.mark.parametrize("p", [1, 2])
def test_gradients_alone_are_those_of_the_launch_of_both(place: torch.device, p: int, layout: str) -> None:
    student, teacher = _normal(3, 16, 4, 5).to(place), LAYOUTS[layout](_normal(3, 16, 4, 5, seed=1).to(place))
    _, statistics = _forward(student, teacher, p=p, reduction="mean", eps=1e-12, weight=1.0)
    upstream = torch.tensor(3.0, device=place)
    both = _backward(student, teacher, statistics, upstream, p=p, reduction="mean")
    for alone in (0, 1):
        asked = {"student_gradient": alone == 0, "teacher_gradient": alone == 1}
        results = _backward(student, teacher, statistics, upstream, p=p, reduction="mean", **asked)
        assert results[1 - alone] is None
        assert results[alone] is not None
        assert torch.equal(results[alone], both[alone])  # type: ignore[arg-type]


def test_counters_return_to_zero(place: torch.device) -> None:
    from ftfast.kernels.device import arrival_counters

    student, teacher = _normal(5, 40).to(place), _normal(5, 40, seed=1).to(place)
    for _ in range(2):
        _forward(student, teacher, p=1, reduction="mean", eps=1e-12, weight=1.0)
        assert int(arrival_counters(place)) == 0


# The built extension, where it has kernels for GPUs

needs_cuda_part = pytest.mark.skipif(
    not hasattr(load_extension()[0], "ft_loss_cuda_forward"), reason="the extension was built without nvcc"
)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@cache
def _cuobjdump() -> str:
    triton = pytest.importorskip("triton", reason="no cuobjdump without the package triton")
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


@cache
def _dump(option: str, architecture: str) -> str:
    found, _ = load_extension()
    assert found is not None
    command = [_cuobjdump(), option, "-arch", architecture, str(found.__file__)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _functions(text: str, start: str) -> dict[str, str]:
    """What stands after each mangled name of a kernel of the loss."""
    parts = re.split(rf"{start}\s*(\w+)", text)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: body for name, body in found.items() if "ftfast" in name and "ward_kernel" in name}


@needs_cuda_part
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture: str) -> None:
    usage = _functions(_dump("--dump-resource-usage", architecture), "Function")
    assert len(usage) == 32  # forward and backward for 15 pairs of dtypes and float64
    for name, body in usage.items():
        registers, stack, local, shared = (
            int(re.search(rf"{word}:(\d+)", body)[1])  # type: ignore[index]
            for word in ("REG", "STACK", "LOCAL", "SHARED")
        )
        assert (stack, local) == (0, 0), name
        assert shared <= 2048, name  # what ft_loss.cu leaves beside the staged samples
        # of a multiprocessor's 65536: three blocks of 512 threads forward, four of 256 backward; two where doubles add
        assert registers <= (64 if "Idd" in name or "backward" in name else 40), name
    sass = _functions(_dump("-sass", architecture), "Function :")
    assert set(sass) == set(usage)
    assert not [name for name, body in sass.items() if re.search(r"\b(LDL|STL)\b", body)]


@needs_cuda_part
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factors_move_in_16_bytes(architecture: str) -> None:
    for name, body in _functions(_dump("-sass", architecture), "Function :").items():
        like = re.search(r"kernelI(N6ftfast8BFloat16E|N6ftfast7Float16E|f|d)(\1|S2_|S3_|S4_)E", name)
        copies, loads, stores = (
            len(re.findall(pattern, body)) for pattern in (r"LDGSTS\.E\.BYPASS\.128", r"LDG\.E\.128", r"STG\.E\.128")
        )
        sides = 2 if like else 1  # the narrower of unlike dtypes moves in fewer bytes
        if "forward" in name:
            assert copies >= sides, name
            assert loads >= 2 * sides, name  # two passes
        else:
            assert loads >= sides, name
            assert stores >= 1, name


@needs_cuda_part
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_directions_are_not_contracted(architecture: str) -> None:
    # x * r - y * r in one rounding is not 0 for equal factors: both products must stand alone.
    for name, body in _functions(_dump("-sass", architecture), "Function :").items():
        kind = "DMUL" if "Idd" in name else r"FMUL2?"
        assert len(re.findall(rf"\b{kind}\b", body)) >= 4, name


@needs_cuda_part
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_final_sum_is_ordered_after_every_sample(architecture: str) -> None:
    for name, body in _functions(_dump("-sass", architecture), "Function :").items():
        if "forward" not in name:
            continue
        # store, fence, count; then loads that bypass L1
        count = re.search(r"ATOMG\.\S+", body)
        assert count is not None, name
        before, after = body[: count.start()], body[count.end() :]
        assert before.rindex("MEMBAR") > before.rindex("STG.E"), name
        assert re.search(r"LDG\.E\S*\.STRONG\.GPU", after), name
        assert not re.search(r"LDG\.E\S*\.STRONG\.GPU", before), name
        assert len(re.findall(r"\b(?:ATOMG|RED)\.", body)) == 1, name


@needs_cuda_part
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_launch_that_fails_says_why() -> None:
    found = extension()
    assert found.ft_loss_cuda_problem(0)
    factor = (0, 1, 8)
    with pytest.raises(RuntimeError, match=r"^CUDA could not use the device of the factors: .*\.$"):
        found.ft_loss_cuda_forward(factor, factor, 1, 8, 1, False, 0.0, 1.0, 0, 0, 0, 0, 0, 0)


# Which backend runs


class _Device(SimpleNamespace):
    type = "cuda"
    index = 0


@pytest.fixture
def imagined_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device of capability 9.0 as far as dispatch can tell, and an extension that says it runs there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    made = SimpleNamespace(ft_loss_cuda_forward=None, instruction_set=lambda: "avx2")
    monkeypatch.setattr(native, "load_extension", lambda: (made, ""))
    monkeypatch.setattr(native, "_cuda_problem", lambda index: "")


def _supports(**device: Any) -> dispatch.Support:
    return dispatch.supports("native", _Device(**device), torch.float32, torch.float32)  # type: ignore[arg-type]


def test_native_comes_first_on_a_gpu_and_needs_no_triton(imagined_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert _supports() == (True, "CUDA C++ kernels")
    for asked in ("auto", "native"):
        assert dispatch._choose(asked, _Device(), torch.float32, torch.float32) == "native"  # type: ignore[arg-type]


def test_triton_comes_next_on_a_gpu(imagined_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(native, "load_extension", lambda: (None, "no C++ compiler was found"))
    assert dispatch._choose("auto", _Device(), torch.float32, torch.float32) == "triton"  # type: ignore[arg-type]


def test_a_head_computed_in_layers_takes_its_loss_where_it_runs(
    imagined_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own Triton kernel read long samples three times."""
    layers = pytest.importorskip("ftfast.ops.ft_head.layers", reason="the package triton is not installed")
    factor: Any = (_Device(), torch.bfloat16, torch.bfloat16)
    assert layers.loss_backend(*factor).name == "native"
    monkeypatch.setattr(native, "load_extension", lambda: (None, "no C++ compiler was found"))
    assert layers.loss_backend(*factor).name == "triton"


def test_every_obstacle_on_a_gpu_has_a_reason(imagined_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_cuda_problem", lambda index: "CUDA driver version is insufficient")
        assert _supports() == (False, "its CUDA kernels do not run on this device: CUDA driver version is insufficient")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "need compute capability 8.0, and this device has (7, 5)" in _supports().reason
    with monkeypatch.context() as patch:
        patch.setattr(native, "load_extension", lambda: (SimpleNamespace(), ""))
        patch.setattr(native, "build_report", lambda: {"without_cuda": "no nvcc was found"})
        assert _supports().reason == "the extension has no kernels for GPUs: no nvcc was found"
    with monkeypatch.context() as patch:
        patch.setattr(native, "load_extension", lambda: (None, "no C++ compiler was found"))
        assert _supports() == (False, "no C++ compiler was found")
    assert "xpu" in dispatch.supports("native", torch.device("xpu"), torch.float32, torch.float32).reason


# On a GPU


def _loss_and_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    loss, statistics = _forward(student, teacher, p=1, reduction="mean", eps=1e-12, weight=500.0)
    options = {"reduction": "mean", "weight": 500.0, "teacher_gradient": False}
    gradient, _ = _backward(student, teacher, statistics, torch.ones_like(loss), **options)
    assert gradient is not None
    return loss, gradient


@pytest.fixture
def gpu() -> torch.device:
    device = torch.device("cuda", 0)
    _skip_without_kernels(device)
    return device


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(256, 256, 7, 7), (8, 512, 14, 14)], ids=str)
def test_a_thousand_runs_are_bit_equal(gpu: torch.device, shape: tuple[int, ...]) -> None:
    student, teacher = _normal(*shape, dtype=torch.bfloat16).to(gpu), _normal(*shape, seed=1).to(gpu)
    loss, gradient = _loss_and_gradient(student, teacher)
    unequal = torch.zeros((), dtype=torch.int64, device=gpu)
    for _ in range(1000):
        again, gradient_again = _loss_and_gradient(student, teacher)
        unequal += (again != loss).long() + (gradient_again != gradient).any().long()
    assert int(unequal) == 0


@pytest.mark.cuda
def test_graph_capture_and_replay(gpu: torch.device) -> None:
    student, teacher = _normal(64, 64, 8, 8).to(gpu), _normal(64, 64, 8, 8, seed=1).to(gpu)
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    captured = []
    _loss_and_gradient(student, teacher)
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


@pytest.mark.cuda
def test_streams_do_not_share_a_counter(gpu: torch.device) -> None:
    student, teacher = _normal(512, 64, 8, 8).to(gpu), _normal(512, 64, 8, 8, seed=1).to(gpu)
    expected = _loss_and_gradient(student, teacher)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _, stream in itertools.product(range(50), streams):
        with torch.cuda.stream(stream):
            results.append(_loss_and_gradient(student, teacher))
    torch.cuda.synchronize()
    for loss, gradient in results:
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])


@pytest.mark.cuda
def test_the_same_numbers_as_the_triton_kernels(gpu: torch.device) -> None:
    pytest.importorskip("triton")
    for dtype, p in itertools.product((torch.float32, torch.bfloat16), (1, 2)):
        student = _normal(16, 64, 7, 7, dtype=dtype).to(gpu).requires_grad_()
        teacher = _normal(16, 64, 7, 7, dtype=dtype, seed=1).to(gpu)
        results = []
        for backend in ("native", "triton"):
            loss = ftfast.ft_loss(student, teacher, p=p, weight=500.0, backend=backend)
            results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
        for got, expected in zip(*results, strict=True):
            assert _relative_error(got, expected.double()) <= (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device here")
def test_the_second_device_and_back() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    _skip_without_kernels(second)
    student, teacher = _normal(6, 40), _normal(6, 40, seed=1)
    with torch.cuda.device(first):
        _assert_same_as_reference(student.to(second), teacher.to(second))
        assert torch.cuda.current_device() == 0
        _assert_same_as_reference(student.to(first), teacher.to(first))
