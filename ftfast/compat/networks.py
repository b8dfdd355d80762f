"""What the peers' networks share: their convolutions on ftfast's kernels, and a refusal of foreign checkpoints."""

import logging
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ftfast.errors import shown
from ftfast.modules import _check_channels, _is_watched
from ftfast.ops.conv3x3.function import conv3x3_leaky_relu

NEGATIVE_SLOPE = 0.1
# A state dict has dozens of keys, and a sentence has room for a few.
SHOWN_KEYS = 4
_log = logging.getLogger("ftfast")


def truncated_channels(name: str, channels: int, rate: float) -> int:
    """``int(channels * rate)``, the factor's channels where a peer truncates instead of rounding.

    Raises:
        ValueError: channels or rate that leave no channel.
    """
    _check_channels(name, channels)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise ValueError(f"k is {rate!r}; it takes a positive number, 0.5 in most recipes.")
    found = int(channels * rate)
    if found < 1:
        raise ValueError(f"k is {rate!r}, which leaves int({channels} * k) = 0 channels; take k >= {1 / channels:g}.")
    return found


def check_channels(**channels: int) -> None:
    """Raises ValueError where an argument is no positive number of channels."""
    for name, value in channels.items():
        _check_channels(name, value)


class PeerNetwork(nn.Module):
    """Says in one sentence which keys a checkpoint has and which it needs, where torch lists every one on a line."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; without ``strict``, logs a warning where not one key fits.

        Raises:
            RuntimeError: with ``strict``, keys that do not fit, or tensors of another shape.
        """
        expected = self.state_dict()
        foreign, absent = (
            [key for key in a if key not in b] for a, b in ((state_dict, expected), (expected, state_dict))
        )
        advice = "strip a prefix such as module., or take ftfast.convert_state_dict for another library's layout."
        home = f"{type(self).__module__}.{type(self).__name__}"
        if strict and (foreign or absent):
            raise RuntimeError(
                f"the state dict has {_some(foreign)} that {home} does not take, and lacks {_some(absent)}; {advice}"
            )
        if len(absent) == len(expected):
            # Not by the module warnings, of which the authors' script silences every one.
            _log.warning(
                f"nothing was loaded: the state dict has {_some(foreign)}, and {home} has {_some(absent)}; {advice}"
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _some(keys: Iterable[str]) -> str:
    names = list(keys)
    some = ", ".join(shown(name) for name in names[:SHOWN_KEYS]) or "nothing"
    return some if len(names) <= SHOWN_KEYS else f"{some} and {len(names) - SHOWN_KEYS} more"


class ConvolutionSequence(nn.Sequential):
    """``nn.Sequential`` that runs a 3x3 convolution and the LeakyReLU behind it as one kernel where there is one.

    Keys, indices and results are those of ``nn.Sequential``. A layer that was replaced, parametrised or has hooks is
    called as it stands, and all are under ``torch.jit.script`` and ``torch.fx.symbolic_trace``.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  nn.Sequential calls it so
        """Features ``[N, C, H, W]`` through all layers."""
        if torch.jit.is_scripting():
            x = input
            for layer in self:
                x = layer(x)
            return x
        else:
            return self._fused(input)

    @torch.jit.unused
    def _fused(self, input: Tensor) -> Tensor:  # noqa: A002
        layers = list(self._modules.values())
        x, place = input, 0
        while place < len(layers):
            layer, after = layers[place], place + 1
            while after < len(layers) and type(layers[after]) is nn.Identity and not _has_hooks(layers[after]):
                after += 1  # where a batch norm would be
            activation = layers[after] if after < len(layers) else None
            fused = convolve(x, layer, activation) if type(activation) is nn.LeakyReLU else None
            x, place = (layer(x), place + 1) if fused is None else (fused, after + 1)
        return laid_out_as_torch(x, input, layers)


def convolve(x: Tensor, layer: nn.Module, activation: nn.LeakyReLU) -> Tensor | None:
    """A convolution and its LeakyReLU as one kernel, or None where the two must be called as they stand."""
    if (
        isinstance(x, torch.fx.Proxy)
        or not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        or _is_watched(layer)
        or _has_hooks(activation)
    ):
        return None
    by_default = layer.kernel_size == (3, 3) and layer.stride == layer.padding == layer.dilation == (1, 1)
    if not by_default or layer.groups != 1 or layer.padding_mode != "zeros" or layer.output_padding not in ((0, 0), 0):
        return None
    transposed = isinstance(layer, nn.ConvTranspose2d)
    return conv3x3_leaky_relu(x, layer.weight, layer.bias, activation.negative_slope, transposed=transposed)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def laid_out_as_torch(x: Tensor, features: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    """``x`` in the memory format that torch's convolutions would have given it.

    The fused ones leave channels_last, on which the peers' own ``.view(N, -1)`` raises.
    """
    if (
        isinstance(x, torch.fx.Proxy)
        or x.is_contiguous()
        or torch.compiler.is_compiling()
        or _is_channels_last(features)
    ):
        return x
    if any(isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and _is_channels_last(layer.weight) for layer in layers):
        return x
    return x.contiguous()


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def convolutions(channels: list[int], *, use_bn: bool, transposed: bool = False, bias: bool = True) -> nn.Sequential:
    """Convolution, batch norm or a placeholder, LeakyReLU(0.1), for each step of ``channels``.

    Keys ``{0,3,6}.*`` and, with batch norm, ``{1,4,7}.*``: mmrazor, RepDistiller and Knowledge-Distillation-Zoo.
    """
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        norm = nn.BatchNorm2d(after) if use_bn else nn.Identity()
        layers += [kind(before, after, 3, 1, 1, bias=bias), norm, nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)]
    return ConvolutionSequence(*layers)
