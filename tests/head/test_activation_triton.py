"""The kernels round a library's convolution and the packing of weights, against torch in float64.

On a GPU they run there; elsewhere in Triton's interpreter, which cannot see a race, a missing barrier or a stale cache
line.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("Triton's kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton", reason="the package triton is not installed")
activation = pytest.importorskip("ftfast.kernels.activation")
packing = pytest.importorskip("ftfast.kernels.ft_head.pack_weights")

from ftfast.kernels.device import current_stream  # noqa: E402
from ftfast.kernels.layout import Layout  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
# Relative L2 errors; of 16 bits one rounding. The interpreter cuts bfloat16 off where a GPU rounds to nearest.
ROUNDED_ERROR = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 5e-3 if INTERPRETED else 3e-3}
SLOPE = 0.2


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def relative_error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return float((result.double() - expected).norm() / expected.norm())


def test_padded_channels() -> None:
    given = (1, 3, 16, 17, 32, 33, 64, 65, 128, 129, 512)
    assert [packing.padded_channels(count) for count in given] == [16, 16, 16, 32, 32, 64, 64, 128, 128, 192, 512]


def unpacked(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``[3, 3, rows, columns]`` of a packed weight, after a look at its padding."""
    cube = matrix.view(3, 3, packing.padded_channels(rows), packing.padded_channels(columns))
    assert not cube[:, :, rows:].any()
    assert not cube[..., columns:].any()
    return cube[:, :, :rows, :columns]


def pack(weights: list[Tensor], dtype: torch.dtype, *, backward: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Packed forward, and backward."""
    places = Layout(), Layout()
    packed = packing.Packing(weights, dtype, places[0], places[1] if backward else None)
    memory = [place.empty(DEVICE) for place in places]
    packed(weights, *memory, current_stream(DEVICE))
    return [piece.of(memory[0]) for piece in packed.forward], [piece.of(memory[1]) for piece in packed.backward]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_packing_takes_any_strides(count: int, dtype: torch.dtype) -> None:
    weights = [
        normal(40, 3, 3, 3, dtype=dtype).float().contiguous(memory_format=torch.channels_last),
        normal(12, 70, 3, 3, dtype=dtype).float().transpose(0, 1),
        normal(3, 3, 17, 16, dtype=dtype).float().permute(3, 2, 1, 0),
        normal(66, 8, 5, 6, dtype=dtype).float()[::2, :, 1:4, ::2],
    ][:count]
    for weight, *packed in zip(weights, *pack(weights, dtype), strict=True):
        outputs, inputs = weight.shape[:2]
        assert packed[0].dtype == dtype
        assert torch.equal(unpacked(packed[0], inputs, outputs).float(), weight.permute(2, 3, 1, 0))
        assert torch.equal(unpacked(packed[1], outputs, inputs).float(), weight.flip(2, 3).permute(2, 3, 0, 1))


def test_packing_for_forward_alone() -> None:
    weight = normal(8, 4, 3, 3, dtype=torch.float16)
    (alone, none), (both, _) = (pack([weight], torch.float16, backward=backward) for backward in (False, True))
    assert not none
    assert torch.equal(alone[0], both[0])


@pytest.mark.parametrize("dtype", list(ROUNDED_ERROR))
@pytest.mark.parametrize("channels", [3, 12, 64, 300])
def test_activation_in_place(channels: int, dtype: torch.dtype) -> None:
    z, gradient = normal(3, 5, 7, channels, dtype=dtype), normal(3, 5, 7, channels, dtype=dtype, seed=1)
    bias = normal(channels, seed=2)
    expected = F.leaky_relu(z.double() + bias.double(), SLOPE)
    assert activation.bias_leaky_relu_(z, bias, SLOPE) is z
    assert relative_error(z, expected) <= ROUNDED_ERROR[dtype]
    expected = gradient.double() * torch.where(z > 0, 1.0, SLOPE).double()
    partials = activation.leaky_relu_backward_(gradient, z, SLOPE)
    assert relative_error(gradient, expected) <= ROUNDED_ERROR[dtype]
    sums = activation.sum_partials([partials], torch.tensor(-2.0, device=DEVICE))[0]
    assert relative_error(sums, -2 * expected.sum((0, 1, 2))) <= 1e-6


@pytest.mark.parametrize("rows", [1, 127, 300])
def test_sum_of_partials(rows: int) -> None:
    partials = normal(rows, 50)
    assert relative_error(activation.sum_partials([partials])[0], partials.double().sum(0)) <= 1e-6


def test_activation_splits_many_pixels_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "MOST_PIECES", 3)
    gradient, output = normal(2, 13, 11, 20), normal(2, 13, 11, 20, seed=1)
    expected = gradient.double() * torch.where(output > 0, 1.0, SLOPE).double()
    partials = activation.leaky_relu_backward_(gradient, output, SLOPE)
    assert partials.shape == (3, 20)
    assert relative_error(gradient, expected) <= 1e-6
    assert relative_error(activation.sum_partials([partials])[0], expected.sum((0, 1, 2))) <= 1e-6
