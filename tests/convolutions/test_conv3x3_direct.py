"""The direct 3x3 convolution of bfloat16 maps is float64's, rounded once, whatever the sizes and what follows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.extension import load_extension
from ftfast.ops.conv3x3 import direct

pytestmark = pytest.mark.skipif(
    not hasattr(load_extension()[0], "conv3x3_direct"), reason="the processor or the compiler has no AVX512-BF16"
)

ROUNDED_ONCE = 2**-8  # bfloat16's, and float32's sums below it
SIZES = [  # samples, channels, outputs, height, width: every length of a run, single rows and columns, bands of rows
    *[pytest.param((2, 16, 16, 3, width), id=f"16-wide-{width}") for width in (1, 2, 5, 15, 16, 17, 31, 33)],
    *[pytest.param((2, 32, 32, 3, width), id=f"32-wide-{width}") for width in (1, 3, 7, 8, 9, 14, 23)],
    pytest.param((1, 16, 48, 9, 6), id="48-outputs"),
    pytest.param((3, 80, 16, 1, 5), id="one-row"),
    pytest.param((1, 48, 32, 2, 1), id="one-column"),
    pytest.param((40, 16, 16, 4, 4), id="many-samples"),
]


def maps(samples: int, channels: int, height: int, width: int, seed: int) -> Tensor:
    values = torch.randn(samples, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().contiguous(memory_format=torch.channels_last)


def weight_of(outputs: int, channels: int) -> Tensor:
    """Numbers that bfloat16 holds, in float32."""
    return torch.randn(outputs, channels, 3, 3, generator=torch.Generator().manual_seed(9)).bfloat16().float()


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with tiles too."""
    monkeypatch.setattr(direct, "FASTEST", direct.DIRECT)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("slope", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("size", SIZES)
def test_convolution_bias_residual_and_activation_are_float64s(size: tuple[int, ...], slope: float) -> None:
    samples, channels, outputs, height, width = size
    x, residual = maps(samples, channels, height, width, 1), maps(samples, outputs, height, width, 2)
    weight, bias = weight_of(outputs, channels), torch.linspace(-3, 3, outputs)
    plain = F.conv2d(x.double(), weight.double(), padding=1)
    assert relative(direct.convolve(x, direct.pack(weight)), plain) < ROUNDED_ONCE
    found = direct.convolve(x, direct.pack(weight), bias, residual=residual, negative_slope=slope)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = F.leaky_relu(plain + bias.double().view(-1, 1, 1) + residual.double(), slope)
    assert relative(found, expected) < ROUNDED_ONCE


@pytest.mark.parametrize("size", SIZES)
def test_packed_for_the_gradient_it_is_the_inputs_gradient(size: tuple[int, ...]) -> None:
    samples, channels, outputs, height, width = size
    dy, weight = maps(samples, outputs, height, width, 3), weight_of(outputs, channels)
    x = torch.zeros(samples, channels, height, width, dtype=torch.double, requires_grad=True)
    F.conv2d(x, weight.double(), padding=1).backward(dy.double())
    assert relative(direct.convolve(dy, direct.pack(weight, for_gradient=True)), x.grad) < ROUNDED_ONCE


def test_a_weights_strides_and_dtype_do_not_matter() -> None:
    weight = weight_of(32, 16)
    for other in (weight.contiguous(memory_format=torch.channels_last), weight.bfloat16(), weight.double()):
        for for_gradient in (False, True):
            expected = direct.pack(weight, for_gradient=for_gradient)
            assert torch.equal(direct.pack(other, for_gradient=for_gradient).words, expected.words)


def test_the_number_of_threads_changes_no_bit() -> None:
    x, packed = maps(3, 32, 7, 11, 4), direct.pack(weight_of(32, 32))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(direct.convolve(x, packed))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_nan_reaches_its_neighbours_and_nobody_else() -> None:
    x = maps(2, 16, 6, 9, 5)
    x[1, 3, 2, 4] = float("nan")
    found = direct.convolve(x, direct.pack(weight_of(16, 16)), negative_slope=0.0).isnan()
    expected = torch.zeros_like(found)
    expected[1, :, 1:4, 3:6] = True
    assert torch.equal(found, expected)


def test_what_it_cannot_compute_is_left_to_the_library() -> None:
    assert direct.takes(torch.bfloat16, 48, 16)
    for dtype, channels, outputs in ((torch.float32, 16, 16), (torch.bfloat16, 24, 16), (torch.bfloat16, 16, 8)):
        assert not direct.takes(dtype, channels, outputs)
