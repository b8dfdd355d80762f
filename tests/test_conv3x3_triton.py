"""The Triton kernels of the 3x3 convolution, its gradients and what goes with them, against torch in float64.

On a GPU they run there; elsewhere in Triton's interpreter, which cannot see a race, a missing barrier or a stale cache
line.
"""

import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.grad import conv2d_weight

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("Triton's kernels run on a GPU, or with TRITON_INTERPRET=1", allow_module_level=True)

pytest.importorskip("triton", reason="the package triton is not installed")
activation = pytest.importorskip("ftfast.kernels.activation")
conv3x3 = pytest.importorskip("ftfast.kernels.conv3x3")
conv3x3_tiles = pytest.importorskip("ftfast.kernels.conv3x3_tiles")
conv3x3_weight_gradient = pytest.importorskip("ftfast.kernels.conv3x3_weight_gradient")
packing = pytest.importorskip("ftfast.kernels.pack_weights")

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
# On a GPU float32 products are tested in three TF32 pieces; in the interpreter they are exact.
PRECISION = "tf32x3"
# Relative L2 errors: float32 sums of a few hundred products, and for 16 bits one rounding. The interpreter cuts
# bfloat16 off where a GPU rounds to nearest.
SUM_ERROR = 1e-6 if INTERPRETED else 1e-5
ROUNDED_ERROR = {torch.float32: SUM_ERROR, torch.float16: 4e-4, torch.bfloat16: 5e-3 if INTERPRETED else 3e-3}
SLOPE = 0.2
TABLES = {
    "descriptors": conv3x3_tiles.capability(DEVICE),
    "pointers": conv3x3_tiles.AMPERE,
    "odd": conv3x3_tiles.ODD,
}

on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


@pytest.fixture(params=list(TABLES))
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the kernels read the maps, with the tiles that go with it."""
    monkeypatch.setattr(conv3x3_tiles, "table", lambda *maps: TABLES[request.param])
    return str(request.param)


class Packed(NamedTuple):
    """What the module under test returns, by its own names."""

    forward: Tensor
    backward: Tensor


class Layer(NamedTuple):
    """A convolution's operands: maps ``[N, H, W, channels]``, the weight exact in their dtype."""

    x: Tensor
    dz: Tensor
    weight: Tensor
    bias: Tensor
    packed: Packed

    @property
    def wide(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, dz, weight and bias as torch takes them, in float64."""
        return nchw(self.x).double(), nchw(self.dz).double(), self.weight.double(), self.bias.double()


def nchw(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def make(samples: int, height: int, width: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> Layer:
    weight = normal(outputs, inputs, 3, 3, dtype=dtype, seed=2).float()
    return Layer(
        normal(samples, height, width, inputs, dtype=dtype),
        normal(samples, height, width, outputs, dtype=dtype, seed=1),
        weight,
        normal(outputs, seed=3),
        Packed(*packing.pack_weights([weight], dtype, backward=True)[0]),
    )


def relative_error(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return float((result.double() - expected).norm() / expected.norm())


def slope_of(output: Tensor, slope: float) -> Tensor:
    return torch.where(nchw(output) > 0, 1.0, slope).double()


def assert_forward(layer: Layer) -> None:
    x, _, weight, bias = layer.wide
    y = conv3x3.conv3x3_forward(
        layer.x,
        layer.packed.forward,
        layer.bias,
        channels_out=len(bias),
        negative_slope=SLOPE,
        input_precision=PRECISION,
    )
    assert y.dtype == layer.x.dtype
    assert y.is_contiguous()
    expected = F.leaky_relu(F.conv2d(x, weight, bias, padding=1), SLOPE)
    assert relative_error(nchw(y), expected) <= ROUNDED_ERROR[y.dtype]


def assert_input_gradient(layer: Layer, scale: float | None = None) -> None:
    x, dz, weight, _ = layer.wide
    scale_tensor = None if scale is None else torch.tensor(scale, device=DEVICE)
    common = {
        "channels_out": x.shape[1],
        "negative_slope": SLOPE,
        "scale": scale_tensor,
        "input_precision": PRECISION,
    }
    expected = F.conv_transpose2d(dz, weight, padding=1) * (1.0 if scale is None else scale)
    plain, no_partials = conv3x3.conv3x3_input_gradient(layer.dz, layer.packed.backward, None, **common)
    assert no_partials is None
    assert plain.dtype == layer.x.dtype
    assert relative_error(nchw(plain), expected) <= ROUNDED_ERROR[plain.dtype]
    expected = expected * slope_of(layer.x, SLOPE)
    dx, partials = conv3x3.conv3x3_input_gradient(layer.dz, layer.packed.backward, layer.x, **common)
    assert relative_error(nchw(dx), expected) <= ROUNDED_ERROR[dx.dtype]
    # The bias gradient is summed before rounding. Its terms cancel: the error is that of the sum of their sizes.
    error = (activation.sum_partials(partials).double() - expected.sum((0, 2, 3))).norm()
    assert float(error / expected.abs().sum((0, 2, 3)).norm()) <= SUM_ERROR


def assert_weight_gradient(layer: Layer, scale: float | None = None) -> None:
    x, dz, weight, _ = layer.wide
    scale_tensor = None if scale is None else torch.tensor(scale, device=DEVICE)
    dw, db = conv3x3_weight_gradient.conv3x3_weight_gradient(
        layer.x, layer.dz, bias=True, scale=scale_tensor, input_precision=PRECISION
    )
    factor = 1.0 if scale is None else scale
    assert dw.dtype == db.dtype == torch.float32
    assert dw.is_contiguous()
    expected = conv2d_weight(x, weight.shape, dz, padding=1) * factor
    assert relative_error(dw, expected) <= SUM_ERROR
    assert relative_error(db, dz.sum((0, 2, 3)) * factor) <= 10 * SUM_ERROR


def test_padded_channels() -> None:
    given = (1, 3, 16, 17, 32, 33, 64, 65, 128, 129, 512)
    assert [packing.padded_channels(count) for count in given] == [16, 16, 16, 32, 32, 64, 64, 128, 128, 192, 512]


def unpacked(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``[3, 3, rows, columns]`` of a packed weight, after a look at its padding."""
    cube = matrix.view(3, 3, packing.padded_channels(rows), packing.padded_channels(columns))
    assert not cube[:, :, rows:].any()
    assert not cube[..., columns:].any()
    return cube[:, :, :rows, :columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_packing_takes_any_strides(count: int, dtype: torch.dtype) -> None:
    weights = [
        normal(40, 3, 3, 3, dtype=dtype).float().contiguous(memory_format=torch.channels_last),
        normal(12, 70, 3, 3, dtype=dtype).float().transpose(0, 1),
        normal(3, 3, 17, 16, dtype=dtype).float().permute(3, 2, 1, 0),
        normal(66, 8, 5, 6, dtype=dtype).float()[::2, :, 1:4, ::2],
    ][:count]
    for weight, packed in zip(weights, packing.pack_weights(weights, dtype, backward=True), strict=True):
        outputs, inputs = weight.shape[:2]
        assert packed.forward.dtype == dtype
        assert torch.equal(unpacked(packed.forward, inputs, outputs).float(), weight.permute(2, 3, 1, 0))
        assert packed.backward is not None
        assert torch.equal(unpacked(packed.backward, outputs, inputs).float(), weight.flip(2, 3).permute(2, 3, 0, 1))


def test_packing_for_forward_alone() -> None:
    weight = normal(8, 4, 3, 3, dtype=torch.float16)
    alone, both = (packing.pack_weights([weight], torch.float16, backward=backward)[0] for backward in (False, True))
    assert alone.backward is None
    assert torch.equal(alone.forward, both.forward)


@pytest.mark.parametrize("dtype", list(ROUNDED_ERROR))
def test_dtypes_and_forms(dtype: torch.dtype, form: str) -> None:
    layer = make(3, 5, 7, 24, 32, dtype)
    assert_forward(layer)
    assert_input_gradient(layer)
    assert_weight_gradient(layer)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 24, 64),
        (5, 1, 1, 3, 12),
        (1, 3, 5, 32, 32),
        (3, 3, 5, 12, 3),
        (1, 8, 8, 64, 32),
        (3, 7, 7, 12, 24),
        (1, 5, 70, 16, 16),
        (3, 9, 1, 24, 16),
        (1, 2, 3, 72, 16),
    ],
    ids=str,
)
def test_shapes_and_channels(shape: tuple[int, int, int, int, int]) -> None:
    layer = make(*shape)
    assert_forward(layer)
    assert_input_gradient(layer)
    assert_weight_gradient(layer)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(list(ROUNDED_ERROR)),
)
def test_random_shapes(shape: tuple[int, int, int], channels: tuple[int, int], dtype: torch.dtype) -> None:
    layer = make(*shape, *channels, dtype)
    assert_forward(layer)
    assert_input_gradient(layer, scale=0.5)
    assert_weight_gradient(layer, scale=-3.0)


def test_columns_past_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles of 256 columns over 448.
    monkeypatch.setattr(conv3x3_tiles, "multiprocessors", lambda device: 1)
    table = conv3x3_tiles.table(normal(1, 1, 1, 16))
    tile = conv3x3_tiles.convolution_tile("forward", table, torch.float16, 16, 448, 15, 1)
    assert 448 % tile.columns
    wide = make(1, 3, 5, 16, 448, torch.float16)
    assert_forward(wide)
    assert_weight_gradient(wide)
    assert_input_gradient(make(1, 3, 5, 448, 16, torch.float16))


def test_start_address_that_is_no_multiple_of_16_bytes() -> None:
    layer = make(2, 3, 5, 16, 16, torch.float16)
    storage = torch.zeros(layer.x.numel() + 1, dtype=torch.float16, device=DEVICE)
    shifted = storage[1:].view_as(layer.x).copy_(layer.x)
    layer = layer._replace(x=shifted)
    assert conv3x3_tiles.table(shifted) == conv3x3_tiles.ODD
    assert_forward(layer)
    assert_input_gradient(layer)
    assert_weight_gradient(layer)


def test_plain_convolution(form: str) -> None:
    layer = make(2, 4, 5, 16, 24)
    x, _, weight, bias = layer.wide
    for added in (None, layer.bias):
        y = conv3x3.conv3x3_forward(
            layer.x, layer.packed.forward, added, channels_out=24, negative_slope=1.0, input_precision=PRECISION
        )
        expected = F.conv2d(x, weight, None if added is None else bias, padding=1)
        assert relative_error(nchw(y), expected) <= ROUNDED_ERROR[torch.float32]


def test_transposed_convolution() -> None:
    layer = make(2, 4, 5, 12, 24)  # the module's own weight is [in=24, out=12, 3, 3]
    dy, x, weight, _ = layer.wide
    y = conv3x3.conv3x3_forward(
        layer.dz, layer.packed.backward, None, channels_out=12, negative_slope=1.0, input_precision=PRECISION
    )
    assert relative_error(nchw(y), F.conv_transpose2d(x, weight, padding=1)) <= ROUNDED_ERROR[torch.float32]
    dx, _ = conv3x3.conv3x3_input_gradient(
        layer.x, layer.packed.forward, None, channels_out=24, negative_slope=1.0, input_precision=PRECISION
    )
    assert relative_error(nchw(dx), F.conv2d(dy, weight, padding=1)) <= ROUNDED_ERROR[torch.float32]
    dw, _ = conv3x3_weight_gradient.conv3x3_weight_gradient(
        layer.x, layer.dz, bias=False, input_precision=PRECISION
    )  # x and dz exchanged
    wide = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.conv_transpose2d(x, wide, padding=1), wide, dy)
    assert relative_error(dw, expected) <= SUM_ERROR


def test_a_number_that_is_not_finite_stays_under_its_taps(form: str) -> None:
    # Rows of the neighbouring image are loaded too: they have to be dropped, not multiplied by zero.
    layer = make(3, 3, 5, 16, 16)
    clean = conv3x3.conv3x3_forward(layer.x, layer.packed.forward, None, channels_out=16, negative_slope=1.0)
    layer.x[1, 0, 0, 3] = float("nan")
    layer.x[1, 2, 4, 3] = float("inf")
    y = conv3x3.conv3x3_forward(layer.x, layer.packed.forward, None, channels_out=16, negative_slope=1.0)
    reached = torch.zeros(3, 3, 5, dtype=torch.bool, device=DEVICE)
    reached[1, :2, :2] = True
    reached[1, 1:, 3:] = True
    assert torch.equal(y[~reached], clean[~reached])
    assert not y[reached].isfinite().any()


@pytest.mark.parametrize("programs", [1, 40, 1000])
def test_weight_gradient_in_pieces(programs: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv3x3_tiles, "multiprocessors", lambda device: programs)
    layer = make(5, 2, 5, 16, 16)
    assert_weight_gradient(layer, scale=-3.0)
    first, again = (conv3x3_weight_gradient.conv3x3_weight_gradient(layer.x, layer.dz, bias=True) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_scale_multiplies_before_the_rounding() -> None:
    # Without the scale the gradient is about 1e-7, where float16 has next to no bits left.
    layer = make(2, 4, 4, 16, 16)
    weight = layer.weight * 2.0**-24
    packed = packing.pack_weights([weight], torch.float32, backward=True)[0]
    assert packed.backward is not None
    scale = torch.tensor(2.0**24, device=DEVICE)
    arguments = {"channels_out": 16, "negative_slope": SLOPE}
    scaled, _ = conv3x3.conv3x3_input_gradient(layer.dz, packed.backward, layer.x, scale=scale, **arguments)
    plain, _ = conv3x3.conv3x3_input_gradient(layer.dz, layer.packed.backward, layer.x, **arguments)
    assert torch.equal(scaled, plain)
    half = make(2, 4, 4, 16, 16, torch.float16)
    tiny = half._replace(dz=(half.dz.float() * 2.0**-24).half())
    dw, _ = conv3x3_weight_gradient.conv3x3_weight_gradient(tiny.x, tiny.dz, bias=False, scale=scale)
    x, dz, _, _ = tiny.wide
    expected = conv2d_weight(x, half.weight.shape, dz, padding=1) * 2.0**24
    assert relative_error(dw, expected) <= SUM_ERROR


@pytest.mark.parametrize("dtype", list(ROUNDED_ERROR))
@pytest.mark.parametrize("channels", [3, 12, 64, 300])
def test_activation_in_place(channels: int, dtype: torch.dtype) -> None:
    z, gradient = normal(3, 5, 7, channels, dtype=dtype), normal(3, 5, 7, channels, dtype=dtype, seed=1)
    bias = normal(channels, seed=2)
    expected = F.leaky_relu(z.double() + bias.double(), SLOPE)
    assert activation.bias_leaky_relu_(z, bias, SLOPE) is z
    assert relative_error(z, expected) <= ROUNDED_ERROR[dtype]
    scale = torch.tensor(2.5, device=DEVICE)
    expected = 2.5 * gradient.double() * torch.where(z > 0, 1.0, SLOPE).double()
    partials = activation.leaky_relu_backward_(gradient, z, SLOPE, scale)
    assert relative_error(gradient, expected) <= ROUNDED_ERROR[dtype]
    sums = activation.sum_partials(partials, torch.tensor(-2.0, device=DEVICE))
    assert relative_error(sums, -2 * expected.sum((0, 1, 2))) <= 1e-6


@pytest.mark.parametrize("rows", [1, 127, 300])
def test_sum_of_partials(rows: int) -> None:
    partials = normal(rows, 50)
    assert relative_error(activation.sum_partials(partials), partials.double().sum(0)) <= 1e-6


def test_activation_splits_many_pixels_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "MOST_PIECES", 3)
    gradient, output = normal(2, 13, 11, 20), normal(2, 13, 11, 20, seed=1)
    expected = gradient.double() * torch.where(output > 0, 1.0, SLOPE).double()
    partials = activation.leaky_relu_backward_(gradient, output, SLOPE)
    assert partials.shape == (3, 20)
    assert relative_error(gradient, expected) <= 1e-6
    assert relative_error(activation.sum_partials(partials), expected.sum((0, 1, 2))) <= 1e-6


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_paper_s_layers(dtype: torch.dtype) -> None:
    for shape in ((64, 8, 8, 64, 32), (32, 7, 7, 512, 256)):
        layer = make(*shape, dtype)
        assert_forward(layer)
        assert_input_gradient(layer)
        assert_weight_gradient(layer)


@on_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("channels_out", [64, 256, 512])
def test_products_that_ran_on_while_their_operands_were_replaced(channels_out: int) -> None:
    """A tenth of the result was off at 512 channels, where the widest tiles are enough to fill a GPU."""
    layer = make(256, 7, 7, 512, channels_out, torch.bfloat16)
    assert_forward(layer)
    assert_input_gradient(layer)
    assert_weight_gradient(layer)


@on_gpu
@pytest.mark.cuda
def test_a_thousand_runs_are_bit_equal() -> None:
    layer = make(64, 7, 7, 256, 128, torch.bfloat16)

    def results() -> list[Tensor]:
        y = conv3x3.conv3x3_forward(layer.x, layer.packed.forward, layer.bias, channels_out=128, negative_slope=SLOPE)
        dx = conv3x3.conv3x3_input_gradient(
            layer.dz, layer.packed.backward, layer.x, channels_out=256, negative_slope=SLOPE
        )
        return [y, *dx, *conv3x3_weight_gradient.conv3x3_weight_gradient(layer.x, layer.dz, bias=True)]

    first = results()
    unequal = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        for again, expected in zip(results(), first, strict=True):
            unequal += (again != expected).any().long()
    assert int(unequal) == 0
