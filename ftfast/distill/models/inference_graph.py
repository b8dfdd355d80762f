"""A model as a graph of torch.fx: cut after one layer, batch norms folded, convolutions fused with what follows."""

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ftfast.layer_graph import drop_needless_copies, layer_graph
from ftfast.ops.conv3x3 import direct
from ftfast.ops.conv3x3.direct import PackedWeight

_RELUS = (F.relu, torch.relu, "relu", "relu_", F.relu_, torch.relu_)
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_OUT_OF_PLACE = {operator.iadd: operator.add, F.relu_: F.relu, torch.relu_: torch.relu, "relu_": "relu", "add_": "add"}


@dataclass(frozen=True)
class Cut:
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


def trace(model: nn.Module, layer: str, *, classifier: bool) -> Cut:
    """The graph of a model up to a layer, in the mode that it is in.

    Args:
        model: its modules are shared with the result.
        layer: a submodule's name; its features are the first output.
        classifier: keep the model's own output as the second; without it nothing past the layer runs.

    Raises:
        Exception: as :func:`ftfast.layer_graph.layer_graph`.
    """
    return Cut(layer_graph(model, [layer], whole=classifier), 0, 0, 0)


def fold(found: Cut) -> Cut:
    """The same with batch norms in eval folded into the convolutions before them, and nothing written in place.

    The modules that are called are changed, so they should be nobody else's.
    """
    module = found.module
    _write_nothing_in_place(module)
    folded = _fold_batch_norms(module)
    left = sum(isinstance(called, nn.modules.batchnorm._BatchNorm) for _, called in called_modules(module))
    module.delete_all_unused_submodules()
    module.recompile()
    return Cut(module, folded, left, 0)


def fuse(found: Cut) -> Cut:
    """The same with each convolution, its residual and its ReLU as one call."""
    module, fused = found.module, 0
    for node, convolution in called_modules(module):
        if not isinstance(convolution, nn.Conv2d) or not _is_fusable(convolution):
            continue
        last, residual = node, None
        following = only_user(last)
        if following is not None and (other := summand(following, last)) is not None:
            last, residual = following, other
            following = only_user(last)
        has_relu = following is not None and is_relu(module, following)
        if has_relu:
            assert following is not None
            last = following
        name = f"fused_{fused}"
        module.add_submodule(name, FusedConvolution(convolution, relu=has_relu))
        with module.graph.inserting_after(last):
            arguments = (node.args[0],) if residual is None else (node.args[0], residual)
            replacement = module.graph.call_module(name, arguments)
        last.replace_all_uses_with(replacement)
        fused += 1
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return Cut(module, found.folded, found.left, fused)


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
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        name = f"folded_{folded}"
        module.add_submodule(name, _with(convolution, weight, bias))
        before.target = name
        node.replace_all_uses_with(before)
        module.graph.erase_node(node)
        folded += 1
    return folded


def _with(convolution: nn.Conv2d, weight: nn.Parameter, bias: nn.Parameter) -> nn.Conv2d:
    """The same convolution with other parameters."""
    made = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]
        convolution.stride,  # type: ignore[arg-type]
        convolution.padding,  # type: ignore[arg-type]
        convolution.dilation,  # type: ignore[arg-type]
        convolution.groups,
        padding_mode=convolution.padding_mode,
        device="meta",
    )
    made.weight, made.bias = weight, bias
    return made.requires_grad_(False).eval()


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
