"""The CPU's weight gradients of 3x3 convolutions, each candidate's against float64."""

import os

import pytest
import torch

from ftfast.diagnosis.check_loss import relative_error
from ftfast.extension import load_extension
from ftfast.ops.conv3x3 import native as conv3x3_native
from tests.processes.launching import python

pytestmark = pytest.mark.skipif(load_extension()[0] is None, reason="the extension is not built")
# Tiles have a file of their own.
KERNELS = [kernel for kernel in conv3x3_native.CANDIDATES if kernel != "tiles"]
needs_own = pytest.mark.skipif("native" not in conv3x3_native.CANDIDATES, reason="no AVX512-BF16 here")

# samples, channels in and out, height, width: odd batches, ragged channel blocks, maps without an inside
SHAPES = [
    (4, 64, 32, 8, 8),
    (3, 16, 8, 7, 7),
    (1, 20, 12, 5, 3),
    (2, 3, 1, 4, 6),
    (5, 33, 17, 2, 2),
    (3, 16, 9, 1, 5),
    (2, 24, 8, 6, 1),
    (7, 40, 10, 1, 1),
]
# What rounding to the compute dtype costs a sum; the kernel of our own keeps float32.
BOUNDS = {"library": 5e-3, "unfolded": 5e-3, "native": 1e-6}


def make(shape, dtype=torch.bfloat16, transposed=False):
    samples, channels, outputs, height, width = shape
    x, dz = (
        torch.randn(samples, count, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
        for count in (channels, outputs)
    )
    return x, dz, torch.randn((channels, outputs, 3, 3) if transposed else (outputs, channels, 3, 3))


def exact(x, dz, parameter, transposed=False):
    if transposed:
        x, dz = dz, x
    return torch.nn.grad.conv2d_weight(x.double(), parameter.shape, dz.double(), padding=1)


def weight_gradient(x, dz, parameter, kernel, **options):
    return conv3x3_native.gradients(x, dz, parameter, need_input=False, kernel=kernel, **options)[1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_agrees_with_float64(shape, transposed, kernel):
    x, dz, parameter = make(shape, transposed=transposed)
    found = weight_gradient(x, dz, parameter, kernel, transposed=transposed)
    assert relative_error(found, exact(x, dz, parameter, transposed)) < BOUNDS[kernel]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("poisoned")
def test_takes_the_parameters_dtype_and_strides(memory_format, dtype, kernel):
    x, dz, parameter = make((3, 20, 10, 4, 4))
    parameter = parameter.to(dtype).contiguous(memory_format=memory_format)
    found = weight_gradient(x, dz, parameter, kernel)
    assert found.dtype == dtype
    assert found.stride() == parameter.stride()
    assert relative_error(found, exact(x, dz, parameter)) < 5e-3


@needs_own
@pytest.mark.usefixtures("poisoned")
def test_fills_a_parameter_of_any_strides():
    x, dz, parameter = make((3, 32, 16, 4, 4))
    parameter = parameter.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    found = weight_gradient(x, dz, parameter, "native")
    assert found.stride() == parameter.stride()
    assert relative_error(found, exact(x, dz, parameter)) < BOUNDS["native"]


@needs_own
def test_the_number_of_threads_does_not_change_a_bit():
    x, dz, parameter = make((12, 48, 40, 8, 8))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found += [weight_gradient(x, dz, parameter, "native") for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_own
def test_a_sum_over_many_pixels_stays_in_float32():
    x, dz, parameter = make((64, 16, 8, 8, 8))
    x, dz = x.abs(), dz.abs()
    found = weight_gradient(x, dz, parameter, "native")
    assert relative_error(found, exact(x, dz, parameter)) < 1e-5


@needs_own
def test_a_nan_reaches_the_channels_it_belongs_to_and_no_others():
    x, dz, parameter = make((3, 20, 10, 4, 4))
    dz[2, 7, 1, 2] = float("nan")
    found = weight_gradient(x, dz, parameter, "native")
    assert found[7].isnan().all()
    assert found.isnan().sum() == found[7].numel()


@needs_own
def test_both_gradients_at_once():
    x, dz, parameter = make((3, 16, 8, 5, 5))
    for_input, for_weight = conv3x3_native.gradients(x, dz, parameter, kernel="native")
    wanted = torch.nn.grad.conv2d_input(x.shape, parameter.double(), dz.double(), padding=1)
    assert relative_error(for_input, wanted) < 2e-2
    assert torch.equal(for_weight, weight_gradient(x, dz, parameter, "native"))


@needs_own
def test_float32_is_refused():
    x, dz, parameter = make((2, 16, 8, 4, 4), torch.float32)
    with pytest.raises(ValueError, match="bfloat16"):
        weight_gradient(x, dz, parameter, "native")


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel is 'fastest'; it takes one of library, unfolded"):
        weight_gradient(*make((2, 16, 8, 4, 4)), "fastest")


@pytest.mark.process
@pytest.mark.parametrize("instructions", ["avx2", "baseline"])
def test_it_is_no_candidate_where_its_instructions_are_ruled_out(instructions):
    script = "from ftfast.ops.conv3x3.native import CANDIDATES; print(*CANDIDATES)"
    environment = {**os.environ, "FTFAST_INSTRUCTION_SET": instructions}
    done = python("-c", script, env=environment)
    assert done.stdout.split() == ["library", "unfolded"], done.stderr
