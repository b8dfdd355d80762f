"""3x3 convolutions with LeakyReLU on the CPU: C++ of our own for bfloat16, else oneDNN's through torch.

Maps are channels_last ``[N, C, H, W]`` in the compute dtype, float32 or bfloat16. Nothing is checked here.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.extension import extension, load_extension
from ftfast.ops.conv3x3 import direct
from ftfast.ops.conv3x3.direct import PackedWeight
from ftfast.ops.kernel_table import Work, choose_kernel
from ftfast.ops.maps import as_map
from ftfast.ops.memory import plain

_CODES = {torch.float32: 1, torch.bfloat16: 2}
# The extension's own kernels, for bfloat16: dot products where the processor has AVX512-BF16, and matrix tiles.
_OWN = {"native": "conv3x3_weight_gradient", direct.TILES: "conv3x3_tiles_weight_gradient"}
CANDIDATES = ("library", "unfolded", *(kernel for kernel, name in _OWN.items() if hasattr(load_extension()[0], name)))


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``[K, C, 3, 3]`` in the compute dtype and channels_last, in one pass."""
    weight = plain(weight)
    if weight.dtype == torch.float32 and weight.is_contiguous():
        outputs, channels = weight.shape[:2]
        packed = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=torch.channels_last)
        extension().weight_taps_first(
            weight.data_ptr(), packed.data_ptr(), _CODES[dtype], outputs, channels, torch.get_num_threads()
        )
        return packed
    return as_map(weight, dtype)


def prepare_weight(weight: Tensor, dtype: torch.dtype, *, transposed: bool = False) -> Tensor | PackedWeight:
    """The weight as :func:`forward` takes it, for one step."""
    outputs, channels = weight.shape[:2]
    if direct.takes(dtype, channels, outputs):
        return direct.pack(weight, for_gradient=transposed)
    return cast_weight(weight, dtype)


def freeze_weight(weight: Tensor, dtype: torch.dtype, samples: int, height: int, width: int) -> Tensor | PackedWeight:
    """The weight as :func:`forward` takes it, reordered once, for the first ``[samples, C, height, width]`` of maps."""
    if direct.takes(dtype, weight.shape[1], weight.shape[0]):
        return direct.pack(weight)
    cast = as_map(weight, dtype)
    try:
        return torch.ops.mkldnn._reorder_convolution_weight(
            cast, [1, 1], [1, 1], [1, 1], 1, [samples, weight.shape[1], height, width]
        )
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return cast


@cache
def _fuses_activations() -> bool:
    """Whether this torch has oneDNN's convolution with an activation, which the compiler uses, and may use oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def forward(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor, negative_slope: float, *, transposed: bool = False
) -> Tensor:
    """``leaky_relu(conv(x))``; weight from :func:`prepare_weight`, or not transposed from :func:`freeze_weight`."""
    if isinstance(weight, PackedWeight):
        return direct.convolve(x, weight, bias.float(), negative_slope=negative_slope)
    bias = bias.to(x.dtype)
    if weight.is_mkldnn or (not transposed and _fuses_activations()):
        y = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, [1, 1], [1, 1], [1, 1], 1, "leaky_relu", [negative_slope], ""
        )
        return y.contiguous(memory_format=torch.channels_last)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    y = convolve(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)
    return F.leaky_relu_(y, negative_slope)


def layer(x: Tensor, parameter: Tensor, bias: Tensor, negative_slope: float, *, transposed: bool) -> Tensor:
    """:func:`forward` with the weight as it stands in its module."""
    weight = prepare_weight(parameter, x.dtype, transposed=transposed)
    return forward(x, weight, bias, negative_slope, transposed=transposed)


def leaky_relu_backward_(gradient: Tensor, output: Tensor | None, negative_slope: float) -> Tensor:
    """Multiplies by LeakyReLU's derivative, read from its output, in place; returns each channel's sum, float32."""
    samples, channels, height, width = gradient.shape
    sums = torch.empty(channels, dtype=torch.float32, device=gradient.device)
    extension().leaky_relu_backward(
        gradient.data_ptr(),
        0 if output is None else output.data_ptr(),
        _CODES[gradient.dtype],
        samples * height * width,
        channels,
        negative_slope,
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums


def candidates(channels: int, outputs: int) -> tuple[str, ...]:
    """Those of CANDIDATES that compute a weight gradient of these channels."""
    return tuple(kernel for kernel in CANDIDATES if kernel != direct.TILES or direct.fits(channels, outputs))


def weight_gradient_kernel(x: Tensor, outputs: int) -> str:
    """Which kernel computes the weight gradient of maps ``x`` towards ``outputs`` channels."""
    samples, channels, height, width = x.shape
    dtype = str(x.dtype).removeprefix("torch.")
    work = Work("weight_gradient", dtype, samples, height, width, channels, outputs)
    # Where there is one, our own was faster than either at every size measured, unless there are few channels.
    own = direct.kernel_for(direct.WEIGHT_GRADIENT, x.dtype, channels, outputs)
    default = {direct.TILES: direct.TILES, direct.DIRECT: "native", None: "library"}[own]
    return choose_kernel(work, x.device, candidates(channels, outputs), default).kernel


def gradients(
    x: Tensor,
    dz: Tensor,
    parameter: Tensor,
    *,
    need_input: bool = True,
    need_weight: bool = True,
    transposed: bool = False,
    kernel: str | None = None,
    added: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one convolution, given that of its result before the activation.

    Args:
        x: the convolution's input.
        dz: the gradient of its result before the activation, channels_last.
        parameter: the weight, uncast; its gradient takes its dtype and strides.
        need_input, need_weight: which gradients are wanted.
        transposed: the convolution was; its weight's gradient is that of a convolution from ``dz`` to ``x``, and its
            input's gradient that convolution's result.
        kernel: one of CANDIDATES for the weight's gradient; by default the one measured fastest. "native" and "tiles"
            take bfloat16 alone, "tiles" channels that are multiples of 16.
        added: what is added to the input's gradient, channels_last in its dtype.

    Returns:
        The input's gradient, channels_last, and the weight's; None for what is not wanted.

    Raises:
        ValueError: a kernel that is no candidate here, or not one for this dtype or these channels.
    """
    for_input = None
    if need_input and direct.takes(dz.dtype, *parameter.shape[:2]):
        for_input = direct.convolve(dz, direct.pack(parameter, for_gradient=not transposed), residual=added)
        need_input, added = False, None
    elif need_input and transposed:
        for_input = F.conv2d(dz, cast_weight(parameter, dz.dtype), padding=1)
    if transposed:
        x, dz = dz, x
    if need_weight:
        kernel = kernel or weight_gradient_kernel(x, dz.shape[1])
        if kernel not in CANDIDATES:
            raise ValueError(f"kernel is {kernel!r}; it takes one of {', '.join(CANDIDATES)} here.")
    mask = [need_input and not transposed, need_weight and kernel == "library", False]
    for_weight = None
    if any(mask):
        found, for_weight, _ = torch.ops.aten.convolution_backward(
            dz, x, cast_weight(parameter, dz.dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
        )
        for_input = found if mask[0] else for_input
    if for_input is not None and added is not None:
        for_input = for_input.add_(added)
    if need_weight and kernel == "unfolded":
        for_weight = _unfolded_weight_gradient(x, dz)
    if need_weight and kernel in _OWN:
        for_weight = _own_weight_gradient(x, dz, parameter, kernel)
    return (
        for_input.contiguous(memory_format=torch.channels_last) if for_input is not None else None,
        None if for_weight is None else _as_parameter(for_weight, parameter),
    )


def _unfolded_weight_gradient(x: Tensor, dz: Tensor) -> Tensor:
    """One matrix product over all pixels with the neighbourhoods written out; ``[K, C, 3, 3]`` channels_last."""
    samples, channels, height, width = x.shape
    outputs = dz.shape[1]
    neighbourhoods = torch.empty(samples * height * width, 9 * channels, dtype=x.dtype, device=x.device)
    extension().unfold_3x3(
        x.data_ptr(),
        neighbourhoods.data_ptr(),
        x.element_size(),
        samples,
        height,
        width,
        channels,
        torch.get_num_threads(),
    )
    product = dz.permute(0, 2, 3, 1).reshape(-1, outputs).t() @ neighbourhoods
    return product.view(outputs, 3, 3, channels).permute(0, 3, 1, 2)


def _own_weight_gradient(x: Tensor, dz: Tensor, parameter: Tensor, kernel: str) -> Tensor:
    """Float32 with the parameter's strides, by products of two samples' pixels."""
    if x.dtype != torch.bfloat16:
        raise ValueError(f"kernel is {kernel!r}, which takes bfloat16 maps, not {x.dtype}.")
    samples, channels, height, width = x.shape
    if kernel == direct.TILES and not direct.fits(channels, dz.shape[1]):
        raise ValueError(f"kernel is 'tiles', which takes multiples of 16 channels, not {channels} and {dz.shape[1]}.")
    gradient = torch.empty_like(parameter, dtype=torch.float32)
    getattr(extension(), _OWN[kernel])(
        x.data_ptr(),
        dz.data_ptr(),
        samples,
        height,
        width,
        channels,
        dz.shape[1],
        gradient.data_ptr(),
        gradient.stride(),
        torch.get_num_threads(),
    )
    return gradient


def _as_parameter(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient with the parameter's dtype and layout, so that autograd keeps it without a copy."""
    if gradient.dtype == like.dtype and gradient.stride() == like.stride():
        return gradient
    taps_first = gradient.is_contiguous(memory_format=torch.channels_last)
    if taps_first and like.is_contiguous() and like.dtype == torch.float32:
        outputs, channels = like.shape[:2]
        placed = torch.empty_like(like)
        extension().weight_taps_last(
            gradient.data_ptr(),
            placed.data_ptr(),
            _CODES[gradient.dtype],
            outputs,
            channels,
            1.0,
            torch.get_num_threads(),
        )
        return placed
    return torch.empty_like(like).copy_(gradient)
