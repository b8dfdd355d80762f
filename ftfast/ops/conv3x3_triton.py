"""3x3 convolutions with LeakyReLU on a GPU: for each one the library's kernel with our epilogue, or one of ours.

Maps are channels_last ``[N, C, H, W]``; the kernels get them as ``[N, H, W, C]``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.dispatch import interpreting
from ftfast.kernel_table import Work, choose_kernel
from ftfast.kernels import activation, conv3x3, conv3x3_weight_gradient
from ftfast.kernels.pack_weights import pack_weights
from ftfast.ops.maps import rounds_to_tf32
from ftfast.ops.memory import plain

CANDIDATES = ("library", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = ("forward", "input_gradient", "weight_gradient")


def is_ours(
    operation: str, dtype: torch.dtype, shape: torch.Size, inputs: int, outputs: int, device: torch.device
) -> bool:
    """Whether our kernel computes ``operation`` of a convolution of a map of ``shape`` from and to these channels."""
    if dtype == torch.float32 and not rounds_to_tf32() and not interpreting():
        return False  # IEEE float32 is the library's
    work = Work(operation, str(dtype).removeprefix("torch."), shape[0], shape[2], shape[3], inputs, outputs)
    default = "triton" if interpreting() else "library"
    return choose_kernel(work, device, CANDIDATES, default).kernel == "triton"


def _take_ours(kernel: str | None, operation: str, x: Tensor, inputs: int, outputs: int) -> bool:
    if kernel is not None:
        return kernel == "triton"
    return is_ours(operation, x.dtype, x.shape, inputs, outputs, x.device)


def takes(dtype: torch.dtype, shape: torch.Size, inputs: int, outputs: int, device: torch.device) -> bool:
    """Whether any part of this layer runs on a kernel of ours; torch's own modules do the rest as well."""
    return dtype in DTYPES and any(
        is_ours(operation, dtype, shape, inputs, outputs, device) for operation in OPERATIONS
    )


def nhwc(tensor: Tensor) -> Tensor:
    """The kernels' view of a map."""
    return tensor.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def nchw(tensor: Tensor) -> Tensor:
    """torch's view of a map, channels_last."""
    return tensor.permute(0, 3, 1, 2)


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the parameter's dtype and layout, so that autograd keeps it without a copy."""
    if gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def cast_weight(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight for the library's kernels."""
    return parameter.to(dtype).contiguous(memory_format=torch.channels_last)


def layer(
    x: Tensor,
    parameter: Tensor,
    bias: Tensor,
    negative_slope: float,
    *,
    transposed: bool = False,
    kernel: str | None = None,
) -> Tensor:
    """``leaky_relu(conv(x))``; the weight and the bias as they stand in their module, kernel one of CANDIDATES."""
    outputs = parameter.shape[1 if transposed else 0]
    if _take_ours(kernel, "forward", x, x.shape[1], outputs):
        packed = pack_weights([parameter], x.dtype, backward=transposed)[0]
        weight = packed.backward if transposed else packed.forward
        assert weight is not None
        return nchw(
            conv3x3.conv3x3_forward(nhwc(x), weight, bias.float(), channels_out=outputs, negative_slope=negative_slope)
        )
    convolve = F.conv_transpose2d if transposed else F.conv2d
    y = convolve(x, cast_weight(parameter, x.dtype), padding=1).contiguous(memory_format=torch.channels_last)
    activation.bias_leaky_relu_(nhwc(y), bias.float(), negative_slope)
    return y


def leaky_relu_backward_(gradient: Tensor, output: Tensor, negative_slope: float) -> Tensor:
    """Multiplies by LeakyReLU's derivative, read from its output, in place; returns each channel's sum, float32."""
    return activation.sum_partials(activation.leaky_relu_backward_(nhwc(gradient), nhwc(output), negative_slope))


def gradients(
    x: Tensor,
    dz: Tensor,
    parameter: Tensor,
    *,
    need_input: bool = True,
    need_weight: bool = True,
    transposed: bool = False,
    scale: Tensor | None = None,
    kernel: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one convolution, given that of its result before the activation.

    Args:
        x: the convolution's input.
        dz: the gradient of its result before the activation.
        parameter: the weight, uncast; its gradient takes its dtype.
        need_input, need_weight: which gradients are wanted.
        transposed: the convolution was.
        scale: 0-d float32, multiplies both.
        kernel: one of CANDIDATES for both; by default each one's measured fastest.

    Returns:
        The input's gradient, channels_last, and the weight's; None for what is not wanted.
    """
    inputs, outputs = x.shape[1], dz.shape[1]
    own_input, own_weight = (
        _take_ours(kernel, operation, x, inputs, outputs) for operation in ("input_gradient", "weight_gradient")
    )
    for_input = for_weight = None
    if need_input and own_input:
        packed = pack_weights([plain(parameter)], dz.dtype, backward=not transposed)[0]
        weight = packed.forward if transposed else packed.backward
        assert weight is not None
        found, _ = conv3x3.conv3x3_input_gradient(
            nhwc(dz), weight, None, channels_out=inputs, negative_slope=1.0, scale=scale
        )
        for_input = nchw(found)
    if need_weight and own_weight:
        sides = (dz, x) if transposed else (x, dz)
        for_weight, _ = conv3x3_weight_gradient.conv3x3_weight_gradient(
            nhwc(sides[0]), nhwc(sides[1]), bias=False, scale=scale
        )
        for_weight = like_parameter(for_weight, parameter)
    by_library = [need_input and not own_input, need_weight and not own_weight, False]
    if any(by_library):
        found_input, found_weight, _ = torch.ops.aten.convolution_backward(
            dz, x, cast_weight(parameter, dz.dtype), None, [1, 1], [1, 1], [1, 1], transposed, [0, 0], 1, by_library
        )
        if by_library[0]:
            for_input = found_input if scale is None else found_input.mul_(scale)
        if by_library[1]:
            found_weight = found_weight.float() if scale is None else found_weight.float().mul_(scale)
            for_weight = torch.empty_like(parameter).copy_(found_weight)
    return for_input, for_weight
