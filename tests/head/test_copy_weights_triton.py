"""Weights cast and their gradients brought home: bit for bit what torch's own copies give, three in a launch."""

import pytest
import torch

from ftfast.backends.triton import interpreting

if not (interpreting() or torch.cuda.is_available()):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
kernels = pytest.importorskip("ftfast.kernels.ft_head.copy_weights")

DEVICE = "cpu" if interpreting() else "cuda"
SHAPES = [(8, 6, 3, 3), (40, 33, 3, 3), (1, 1, 3, 3), (3, 70, 3, 3)]


def weights(order: torch.memory_format) -> list[torch.Tensor]:
    return [torch.randn(shape, device=DEVICE).to(memory_format=order) for shape in SHAPES]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cast_weights(dtype: torch.dtype, order: torch.memory_format) -> None:
    given = weights(order)
    for weight, cast in zip(given, kernels.cast_weights(given, dtype), strict=True):
        assert torch.equal(cast, weight.to(dtype))
        assert cast.is_contiguous(memory_format=torch.channels_last)
        assert (cast is weight) == (dtype == torch.float32 and weight.is_contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_like(dtype: torch.dtype) -> None:
    parameters = weights(torch.contiguous_format)
    gradients = [weight.to(dtype) for weight in weights(torch.channels_last)]
    found = kernels.scaled_like(gradients, parameters, torch.tensor(-3.0, device=DEVICE))
    for gradient, parameter, scaled in zip(gradients, parameters, found, strict=True):
        assert torch.equal(scaled, gradient.float() * -3)
        assert (scaled.dtype, scaled.stride()) == (parameter.dtype, parameter.stride())
