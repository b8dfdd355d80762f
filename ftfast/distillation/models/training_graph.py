"""A model's graph with each convolution, its batch norm, residual and ReLU as one call, for training on the CPU;
and a model's forward in training, through its graph where it has one."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ftfast.distillation.models import inference_graph
from ftfast.distillation.models.registry import Outputs
from ftfast.features.layer_graph import layer_graph
from ftfast.features.tap import FeatureTap
from ftfast.ops.batch_norm import Layer, can_run, convolution_norm, fits


class ConvolutionNorm(nn.Module):
    """``relu(norm(convolution(x)) + residual)`` of two modules that stay their model's own.

    Returns ``y``, or ``(y, x)`` with ``passes_input``.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d, *, relu: bool) -> None:
        super().__init__()
        self.convolution, self.norm, self.relu = convolution, norm, relu
        self.passes_input = False
        self._layer = Layer(convolution, norm, relu)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``[N, C, H, W]`` to ``[N, K, H', W']``."""
        if can_run(self._layer, x, residual):
            y, x = convolution_norm(self._layer, x, residual)
        else:
            y = self.norm(self.convolution(x))
            if residual is not None:
                y = y + residual
            if self.relu:
                y = F.relu(y)
        return (y, x) if self.passes_input else y


class _Subsample(torch.autograd.Function):
    """``x[:, :, ::s, ::s]``, whose gradient is channels_last as ``x`` is; torch's own is not, and adds up slowly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: tuple[slice, ...]) -> Tensor:
        ctx.like, ctx.index = torch.empty_like(x, device="meta"), index
        return x[index].contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        for_x = torch.zeros_like(ctx.like, device=gradient.device)
        for_x[ctx.index] = gradient
        return for_x, None


def _subsample(x: Tensor, index: tuple[slice, ...]) -> Tensor:
    return _Subsample.apply(x, index) if isinstance(x, Tensor) and x.dim() == 4 else x[index]


def fused_graph(model: nn.Module, layer: str) -> fx.GraphModule:
    """The model as a graph from images to ``(features of the layer, logits)``.

    Raises:
        Exception: whatever torch.fx raises on a model that cannot be traced.
    """
    module = layer_graph(model, [layer], whole=True)
    count = 0
    for node, convolution in inference_graph.called_modules(module):
        following = inference_graph.only_user(node)
        if following is None or following.op != "call_module":
            continue
        norm = module.get_submodule(str(following.target))
        if not fits(convolution, norm):
            continue
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        tail = inference_graph.tail_of(module, following)
        made = ConvolutionNorm(convolution, norm, relu=tail.has_relu)
        inference_graph.replace_call(module, node, tail, f"convolution_norm_{count}", made)
        count += 1
    module.graph.eliminate_dead_code()
    _pass_inputs(module)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is operator.getitem and _is_subsampling(node.args[1]):
            node.target = _subsample
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _is_subsampling(index: Any) -> bool:
    return (
        isinstance(index, tuple)
        and len(index) == 4
        and all(isinstance(axis, slice) and axis.start is None and axis.stop is None for axis in index)
        and [axis.step for axis in index[:2]] == [None, None]
        and any(isinstance(axis.step, int) for axis in index[2:])
    )


def _pass_inputs(module: fx.GraphModule) -> None:
    """Later readers of a fused convolution's input take it from there, so that its backward adds their gradients."""
    for node, called in inference_graph.called_modules(module):
        source = node.args[0]
        if not isinstance(called, ConvolutionNorm) or not isinstance(source, fx.Node) or len(source.users) < 2:
            continue
        nodes = list(module.graph.nodes)
        later = set(nodes[nodes.index(node) + 1 :])
        readers = [reader for reader in source.users if reader in later and reader.op != "output"]
        if not readers:
            continue
        called.passes_input = True
        with module.graph.inserting_after(node):
            passed = module.graph.call_function(operator.getitem, (node, 1))
            result = module.graph.call_function(operator.getitem, (node, 0))
        own = (passed, result)
        for reader in list(node.users):
            if reader not in own:
                reader.replace_input_with(node, result)
        for reader in readers:
            reader.replace_input_with(source, passed)


def training_forward(
    model: nn.Module, layer: str, *, compiled: bool, fused: bool = False
) -> Callable[[Tensor], Outputs]:
    """Images to the outputs of a model and of one of its layers; parameters and modes stay the model's own.

    Args:
        compiled: through torch.compile, at the first call; a model that torch.fx cannot trace is compiled in the
            pieces that torch finds.
        fused: on the CPU, each convolution with what follows it as one call; where torch.fx cannot trace the model,
            as its own modules. Not together with ``compiled``.
    """
    graph: Callable[[Tensor], Any] | None = None
    try:
        if compiled:
            graph = torch.compile(layer_graph(model, [layer], whole=True), dynamic=False)
        elif fused:
            graph = fused_graph(model, layer)
    except Exception:  # torch.fx gives up on data-dependent forwards in many ways; the hook serves them all
        if compiled:
            model.compile(dynamic=False)
    if graph is not None:

        def run(images: Tensor) -> Outputs:
            features, logits = graph(images)
            return Outputs(logits, features)

        return run
    tap = FeatureTap(model, layer)
    return lambda images: Outputs(*tap(images))
