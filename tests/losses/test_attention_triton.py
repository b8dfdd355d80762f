"""The Triton kernels of attention maps, through their launchers, against the reference in float64."""

import os

import pytest
import torch
from torch import Tensor

from ftfast import reference
from ftfast.ops.attention.difference import attention_difference

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("Triton's kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton", reason="the package triton is not installed")
kernels = pytest.importorskip("ftfast.kernels.attention")

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
# A rounding of the result's dtype; the interpreter rounds bfloat16 towards zero.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-10}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.mark.parametrize("exponent", range(1, kernels.LARGEST_EXPONENT + 1))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", list(ERROR), ids=str)
@pytest.mark.parametrize("shape", [(2, 130, 3, 3), (3, 70, 12, 11), (1, 1, 1, 1), (2, 16, 1, 17)], ids=str)
def test_maps_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, memory_format: object, exponent: int) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    features = torch.randn(shape, generator=generator).to(DEVICE, dtype).contiguous(memory_format=memory_format)
    wide = features.double().requires_grad_()
    expected = reference.attention_map(wide, exponent)
    upstream = torch.linspace(-1, 2, expected.numel(), device=DEVICE).view_as(expected)
    expected.backward(upstream.double())
    found = kernels.attention_map(features, exponent)
    assert relative(found, expected) < 2e-6
    gradient = kernels.attention_gradient(features, upstream, exponent)
    assert gradient.dtype == dtype
    assert gradient.stride() == features.stride()
    assert relative(gradient, wide.grad) < ERROR[dtype]


def test_the_loss_runs_on_them() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 20, 6, 6, generator=generator).to(DEVICE) for _ in range(2))
    student.requires_grad_()
    wide = student.detach().double().requires_grad_()
    for p in (1, 2):
        student.grad = wide.grad = None
        found = attention_difference(student, teacher, p=p, backend="triton")
        expected = reference.attention_difference(wide, teacher.double(), p=p)
        found.backward()
        expected.backward()
        assert relative(found, expected) < 1e-5
        assert relative(student.grad, wide.grad) < 1e-4
