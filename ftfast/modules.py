"""The two small networks of Factor Transfer: the paraphraser on the teacher's side, the translator on the student's.

Section 3.1 of the paper; channels and activations as in the authors' code (Models/FeatureProjection.py): three 3x3
convolutions with stride 1 and padding 1, LeakyReLU(0.1) after every one of them, the last included.
"""

import weakref
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ftfast.ops.conv3x3.function import conv3x3_leaky_relu
from ftfast.ops.ft_head.stack import BatchNorm, Stack

NORMS = (None, "batch")


def _check_channels(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it takes a positive number of channels.")


def _norm_layers(norm: str | None, channels: list[int]) -> nn.ModuleList | None:
    if norm not in NORMS:
        raise ValueError(f'norm is {norm!r}; it takes None (the authors\' code) or "batch".')
    return nn.ModuleList(nn.BatchNorm2d(count) for count in channels) if norm == "batch" else None


def _is_watched(layer: nn.Module) -> bool:
    """Whether somebody expects the layer itself to be called: it was replaced, or has hooks."""
    if type(layer) not in (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, Translator) or "forward" in layer.__dict__:
        return True
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(_GLOBAL_HOOKS) or any(hooks)


def _keeps_size(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether it still is the 3x3 convolution that it was built as, with parameters of its own size."""
    channels = (layer.out_channels, layer.in_channels)
    weight_shape = (*(channels[::-1] if isinstance(layer, nn.ConvTranspose2d) else channels), 3, 3)
    if layer.weight.shape != weight_shape or (layer.bias is not None and layer.bias.shape != channels[:1]):
        return False
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding)
    return (*sizes, layer.groups, layer.padding_mode) == ((3, 3), (1, 1), (1, 1), (1, 1), (0, 0), 1, "zeros")


def _follow_each_other(network: "Paraphraser | Translator") -> bool:
    """Whether the encoder's layers are still three, from the network's channels to those of its factor."""
    taken = [layer.in_channels for layer in network.encoder]
    made = [layer.out_channels for layer in network.encoder]
    return len(taken) == 3 and [*taken, network.factor_channels] == [network.in_channels, *made]


def _is_sharded(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"  # its module takes long to import


def _refuse_sharded(parameter: Tensor, x: Tensor) -> None:
    if _is_sharded(parameter) and not _is_sharded(x):
        raise TypeError(
            "the network's parameters are DTensors and its input is none; leave the network out of fully_shard, or of "
            "a Paraphraser call torch.distributed.fsdp.register_fsdp_forward_method(paraphraser, 'encode') after it."
        )


def _run_layers(x: Tensor, layers: nn.ModuleList, norm: nn.ModuleList | None, negative_slope: float) -> Tensor:
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and not _is_watched(layer):
            _refuse_sharded(layer.weight, x)
            transposed = isinstance(layer, nn.ConvTranspose2d)
            bias = layer.bias if norm is None and _keeps_size(layer) else None
            fused = conv3x3_leaky_relu(x, layer.weight, bias, negative_slope, transposed=transposed)
            if fused is not None:
                x = fused
                continue
        x = layer(x)
        if norm is not None:
            x = norm[index](x)
        x = F.leaky_relu(x, negative_slope)
    return x


def _convolutions(channels: list[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))


# What of a layer decides whether it is the plain convolution that it was built as.
_SIZES = itemgetter("kernel_size", "stride", "padding", "dilation", "output_padding", "groups", "padding_mode")
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class _Inspected(NamedTuple):
    network: "weakref.ref[Paraphraser | Translator]"
    state: list[Any]
    stack: "Stack | str"


# By the network's id.
_inspected: dict[int, _Inspected] = {}


def _inspected_state(network: nn.Module) -> list[Any] | None:
    """What changes whenever the network's stack does; None where that is not told by what is quick to read."""
    own = network.__dict__
    modules = own["_modules"]
    if network.__class__ not in _OWN or modules.get("norm") is not None:
        return None
    watchers = [*_GLOBAL_HOOKS, *_HOOKS(own), "forward" in own, "encode" in own]
    state: list[Any] = [own["negative_slope"], own["in_channels"], own["factor_channels"]]
    for layer in modules["encoder"].__dict__["_modules"].values():
        if layer.__class__ is not nn.Conv2d:
            return None
        of_layer = layer.__dict__
        parameters = of_layer["_parameters"]
        watchers += (*_HOOKS(of_layer), "forward" in of_layer)
        state.append(_SIZES(of_layer))
        for name in ("weight", "bias"):
            parameter = parameters.get(name)
            # By its id, as tensors compare by their elements; the stack holds it. Another .data has another shape.
            state += (id(parameter), None if parameter is None else parameter.shape)
    state.append(any(watchers))
    return state


def convolution_stack(network: "Paraphraser | Translator") -> Stack | str:
    """The convolutions of a paraphraser's encoder or a translator, or why they must run as torch modules.

    A head computed whole calls no module, so it may not pass by a subclass's own code, a hook or a replaced layer.
    """
    if torch.compiler.is_compiling():
        return _inspect(network)
    state = _inspected_state(network)
    found = _inspected.get(id(network))
    if found is not None and found.state == state and found.network() is network:
        return found.stack
    stack = _inspect(network)
    if state is not None and isinstance(stack, Stack):
        place = id(network)
        of_network = weakref.ref(network, lambda _: _inspected.pop(place, None))
        _inspected[place] = _Inspected(of_network, state, stack)
    return stack


def _inspect(network: "Paraphraser | Translator") -> Stack | str:
    side = "the paraphraser" if isinstance(network, Paraphraser) else "the translator"
    for owner, method in ((Paraphraser, "encode"), (Translator, "forward")):
        is_own = getattr(type(network), method, None) is getattr(owner, method) and method not in network.__dict__
        if isinstance(network, owner) and not is_own:
            return f"{side} has a {method} of its own"
    if not isinstance(network, Paraphraser | Translator):
        return f"the {type(network).__name__} is not of ftfast's own classes"
    if any(_is_watched(layer) for layer in (*network.encoder, *(network.norm or ()))):
        return f"a layer of {side} was replaced, parametrised or has hooks"
    if isinstance(network, Translator):
        if _is_watched(network):
            return "the translator has module hooks"
        if network.norm is not None:
            return 'the translator has norm="batch", which torch computes; the loss alone is ours'
    if not network.negative_slope > 0:
        return f"a negative_slope of {network.negative_slope} hides the sign that backward reads"
    weights, biases, norms = [], [], []
    for layer in network.encoder:
        assert isinstance(layer, nn.Conv2d)
        if layer.bias is None:
            return f"a convolution of {side} has no bias"
        if not _keeps_size(layer):
            return f"a convolution of {side} is no longer 3x3 with stride 1 and padding 1"
        if _is_sharded(layer.weight):
            return f"the parameters of {side} are DTensors"
        weights.append(layer.weight)
        biases.append(layer.bias)
    if not _follow_each_other(network):
        return f"the convolutions of {side} are no longer those that it was built with"
    for norm in network.norm or ():
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return f"a batch norm of {side} takes its statistics from the batch"
        norms.append(BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps))
    return Stack(tuple(weights), tuple(biases), float(network.negative_slope), tuple(norms))


class Paraphraser(nn.Module):
    """Compresses teacher features into factors, and reconstructs the features from them to be trained without labels.

    Args:
        in_channels: m, the channels of the teacher's feature map.
        rate: k, the paraphrase rate; the factor has ``max(1, round(m * k))`` channels.
        factor_channels: the factor's channels, overriding ``rate``.
        norm: None, as the authors' code, or ``"batch"`` for a batch norm after every convolution.
        negative_slope: of the LeakyReLUs.

    Keys: ``encoder.{0,1,2}.*``, ``decoder.{0,1,2}.*`` and, with batch norm, ``norm.{0,1,2}.*`` and ``decoder_norm.*``.
    """

    def __init__(
        self,
        in_channels: int,
        rate: float = 0.5,
        *,
        factor_channels: int | None = None,
        norm: str | None = None,
        negative_slope: float = 0.1,
    ) -> None:
        super().__init__()
        _check_channels("in_channels", in_channels)
        if factor_channels is None:
            if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise ValueError(f"rate is {rate!r}; it takes a positive number, 0.5 in the authors' code.")
            factor_channels = max(1, round(in_channels * rate))
        _check_channels("factor_channels", factor_channels)
        self.in_channels = in_channels
        self.factor_channels = factor_channels
        self.negative_slope = negative_slope
        m, mk = in_channels, factor_channels
        self.encoder = _convolutions([m, m, mk, mk])
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(a, b, 3, padding=1) for a, b in ((mk, mk), (mk, m), (m, m)))
        self.norm = _norm_layers(norm, [m, mk, mk])
        self.decoder_norm = _norm_layers(norm, [mk, m, m])

    def encode(self, features: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to factors ``[N, factor_channels, H, W]``."""
        return _run_layers(features, self.encoder, self.norm, self.negative_slope)

    def decode(self, factor: Tensor) -> Tensor:
        """Factors ``[N, factor_channels, H, W]`` to reconstructed features ``[N, in_channels, H, W]``."""
        return _run_layers(factor, self.decoder, self.decoder_norm, self.negative_slope)

    def forward(self, features: Tensor) -> Tensor:
        """The reconstruction ``decode(encode(features))``, whose distance to ``features`` is the training loss."""
        return self.decode(self.encode(features))

    if TYPE_CHECKING:  # torch's own says that a call gives anything

        def __call__(self, features: Tensor) -> Tensor: ...


class Translator(nn.Module):
    """Maps student features to factors of the teacher's shape; trained together with the student.

    Args:
        in_channels: the channels of the student's feature map.
        factor_channels: the paraphraser's ``factor_channels``.
        norm: None, as the authors' code, or ``"batch"`` for a batch norm after every convolution.
        negative_slope: of the LeakyReLUs.

    Keys: ``encoder.{0,1,2}.*`` and, with batch norm, ``norm.{0,1,2}.*``.
    """

    def __init__(
        self, in_channels: int, factor_channels: int, *, norm: str | None = None, negative_slope: float = 0.1
    ) -> None:
        super().__init__()
        _check_channels("in_channels", in_channels)
        _check_channels("factor_channels", factor_channels)
        self.in_channels = in_channels
        self.factor_channels = factor_channels
        self.negative_slope = negative_slope
        channels = [in_channels, in_channels, factor_channels, factor_channels]
        self.encoder = _convolutions(channels)
        self.norm = _norm_layers(norm, channels[1:])

    def forward(self, features: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to factors ``[N, factor_channels, H, W]``."""
        return _run_layers(features, self.encoder, self.norm, self.negative_slope)

    if TYPE_CHECKING:  # torch's own says that a call gives anything

        def __call__(self, features: Tensor) -> Tensor: ...


_OWN = (Paraphraser, Translator)
