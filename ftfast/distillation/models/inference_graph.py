"""A model as a graph of torch.fx: cut after one layer, batch norms folded, convolutions fused with what follows."""

import operator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ftfast.features.layer_graph import drop_needless_copies
from ftfast.ops.conv3x3 import direct
from ftfast.ops.conv3x3.direct import PackedWeight

_RELUS = (F.relu, torch.relu, "relu", "relu_", F.relu_, torch.relu_)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_OUT_OF_PLACE = {operator.iadd: operator.add, F.relu_: F.relu, torch.relu_: torch.relu, "relu_": "relu", "add_": "add"}


@dataclass(frozen=True)
class LayerGraph:
    """A model's graph whose outputs are the features of one layer and, with the classifier, the logits.

    Attributes:
        folded, left: batch norms that were folded into the convolution before them, and those that were not.
        fused: convolutions that take their activation or residual along.
    """

    module: fx.GraphModule
    folded: int
    left: int
    fused: int


class FusedConvolution(nn.Module):
    """Convolution, bias, optional residual and optional ReLU in one call; the weight packed at the first.

    3x3 convolutions of bfloat16 are our own, the others oneDNN's.

    Maps are channels_last; a residual has the shape of the result.
    """

    def __init__(self, convolution: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        self.register_buffer("weight", convolution.weight.detach())
        self.register_buffer("bias", None if convolution.bias is None else convolution.bias.detach())
        self.weight: Tensor
        self.bias: Tensor | None
        self._relu = "relu" if relu else None
        self._shape = [
            list(size) for size in (convolution.padding, convolution.stride, convolution.dilation)
        ]  # padding is numbers here, not a name: is_fusable saw to it
        self._groups = convolution.groups
        self._packed: Tensor | PackedWeight | None = None
        self._bias: Tensor | None = None

    def _is_direct(self, x: Tensor) -> bool:
        outputs, channels = self.weight.shape[:2]
        plain = self.weight.shape[2:] == (3, 3) and self._shape == [[1, 1], [1, 1], [1, 1]] and self._groups == 1
        return plain and direct.takes(x.dtype, channels, outputs)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[N, C, H, W]`` to ``[N, K, H', W']``, ``relu(conv(x) + residual)``."""
        operators = torch.ops.mkldnn
        x = x.contiguous(memory_format=torch.channels_last)
        if self._packed is None and self._is_direct(x):
            self._packed = direct.pack(self.weight)
            self._bias = None if self.bias is None else self.bias.float()
        if isinstance(self._packed, PackedWeight):
            residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
            slope = 0.0 if self._relu else 1.0
            return direct.convolve(x, self._packed, self._bias, residual=residual, negative_slope=slope)
        padding, stride, dilation = self._shape
        if self._packed is None:
            self._packed = operators._reorder_convolution_weight(
                self.weight, padding, stride, dilation, self._groups, list(x.shape)
            )
        common = (padding, stride, dilation, self._groups)
        if residual is None:
            y = operators._convolution_pointwise(x, self._packed, self.bias, *common, self._relu or "none", [], "")
        else:
            residual = residual.contiguous(memory_format=torch.channels_last)
            y = operators._convolution_pointwise.binary(
                x, residual, self._packed, self.bias, *common, "add", 1.0, self._relu, [], ""
            )
        return y.contiguous(memory_format=torch.channels_last)


def fold(module: fx.GraphModule) -> LayerGraph:
    """The graph with batch norms in eval folded into the convolutions before them, and nothing written in place.

    The modules that are called are changed, so they should be nobody else's.
    """
    _write_nothing_in_place(module)
    folded = _fold_batch_norms(module)
    left = sum(isinstance(called, nn.modules.batchnorm._BatchNorm) for _, called in called_modules(module))
    module.delete_all_unused_submodules()
    module.recompile()
    return LayerGraph(module, folded, left, 0)


def fuse(found: LayerGraph) -> LayerGraph:
    """The same with each convolution, its residual and its ReLU as one call."""
    module, fused = found.module, 0
    for node, convolution in called_modules(module):
        if isinstance(convolution, nn.Conv2d) and _is_fusable(convolution):
            tail = tail_of(module, node)
            replace_call(module, node, tail, f"fused_{fused}", FusedConvolution(convolution, relu=tail.has_relu))
            fused += 1
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return LayerGraph(module, found.folded, found.left, fused)


class Tail(NamedTuple):
    """What a call takes along: the last of its nodes, what a sum among them adds, and whether a ReLU ends them."""

    last: fx.Node
    residual: fx.Node | None
    has_relu: bool


def tail_of(module: fx.GraphModule, last: fx.Node) -> Tail:
    """The sum and the ReLU behind a node, as far as nobody else reads what is between them."""
    residual, following = None, only_user(last)
    if following is not None and (other := summand(following, last)) is not None:
        last, residual, following = following, other, only_user(following)
    if following is None or not is_relu(module, following):
        return Tail(last, residual, False)
    return Tail(following, residual, True)


def replace_call(module: fx.GraphModule, node: fx.Node, tail: Tail, name: str, made: nn.Module) -> None:
    """Calls ``made`` on a call's input, and on the residual of its tail, in the place of both."""
    module.add_submodule(name, made)
    with module.graph.inserting_after(tail.last):
        arguments = (node.args[0],) if tail.residual is None else (node.args[0], tail.residual)
        replacement = module.graph.call_module(name, arguments)
    tail.last.replace_all_uses_with(replacement)


def called_modules(module: fx.GraphModule) -> list[tuple[fx.Node, nn.Module]]:
    """Each call of a module in the graph, with the module."""
    return [(node, module.get_submodule(str(node.target))) for node in module.graph.nodes if node.op == "call_module"]


def _write_nothing_in_place(module: fx.GraphModule) -> None:
    """A layer's output may be the features, so that what follows must not write to it."""
    for node in module.graph.nodes:
        node.target = _OUT_OF_PLACE.get(node.target, node.target)
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
    for _, called in called_modules(module):
        if getattr(called, "inplace", False):
            called.inplace = False  # type: ignore[assignment]
    drop_needless_copies(module)


def _fold_batch_norms(module: fx.GraphModule) -> int:
    folded = 0
    for node, norm in called_modules(module):
        before = node.args[0] if node.args else None
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or not isinstance(before, fx.Node):
            continue
        if before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = module.get_submodule(str(before.target))
        if type(convolution) is not nn.Conv2d:
            continue
        name = f"folded_{folded}"
        module.add_submodule(name, fuse_conv_bn_eval(convolution, norm).requires_grad_(False))
        before.target = name
        node.replace_all_uses_with(before)
        module.graph.erase_node(node)
        folded += 1
    return folded


def _is_fusable(convolution: nn.Conv2d) -> bool:
    return (
        type(convolution) is nn.Conv2d
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


def only_user(node: fx.Node) -> fx.Node | None:
    """Who reads a node's result, if it is one alone."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def summand(node: fx.Node, of: fx.Node) -> fx.Node | None:
    """What a sum adds to ``of``; None where ``node`` is no plain sum of two tensors, or writes to one that is read."""
    if node.op not in ("call_function", "call_method") or node.target not in _SUMS or node.kwargs:
        return None
    others = [argument for argument in node.args if argument is not of]
    if len(node.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    written = node.args[0] if node.target in _OUT_OF_PLACE else None
    return None if written is others[0] and only_user(others[0]) is None else others[0]


def is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a ReLU, as a module or a function."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELUS
