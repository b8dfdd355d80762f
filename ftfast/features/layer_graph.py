"""A model as a graph of torch.fx whose outputs are those of some of its layers, as the layers returned them."""

import inspect
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

# Modules that return memory of their own.
_FRESH = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)
_WRITING = {
    name: getattr(operator, name)
    for name in ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
}


def own_output(output: Tensor) -> Tensor:
    """What a layer returned, apart from its memory, which a later operator writes to."""
    return output.clone()


class _Proxy(fx.Proxy):
    """Records ``x += y`` as what it is; torch.fx makes ``x = x + y`` of it, which other names of ``x`` do not see."""


def _recorded(target: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name, _target in _WRITING.items():
    setattr(_Proxy, f"__{_name}__", _recorded(_target))


class _LayersTracer(fx.Tracer):
    """Remembers what layers returned, of one that runs several times the last, at the place where they did."""

    def __init__(self, layers: Sequence[nn.Module] = ()) -> None:  # none where torch.fx reads a pickled graph
        super().__init__()
        self._layers = layers
        self.found: dict[int, Any] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        for place, layer in enumerate(self._layers):
            if m is layer:
                is_one = isinstance(output, fx.Proxy)
                self.found[place] = self.create_proxy("call_function", own_output, (output,), {}) if is_one else None
        return output


def layer_graph(model: nn.Module, layers: Sequence[str], *, whole: bool) -> fx.GraphModule:
    """The graph of a model in the mode that it is in, images to ``(outputs of the layers..., the model's own)``.

    Args:
        model: its modules are shared with the result.
        layers: names of submodules. Where something later writes to what one returned, the output is a copy.
        whole: keep the model's own output, which else is None and nothing past the layers runs.

    Raises:
        Exception: whatever torch.fx raises on a model that cannot be traced.
        TypeError: a layer returned no single tensor, or something that is written in place is read in a way that
            torch.fx does not see.
    """
    tracer = _LayersTracer([model.get_submodule(layer) for layer in layers])
    graph = tracer.trace(model)
    missing = [layer for place, layer in enumerate(layers) if not isinstance(tracer.found.get(place), fx.Proxy)]
    if missing:
        raise TypeError(f"layer {missing[0]!r} returned no single tensor")
    outputs = [tracer.found[place].node for place in range(len(layers))]
    last = next(node for node in reversed(graph.nodes) if node.op == "output")
    last.args = ((*outputs, last.args[0] if whole else None),)
    module = fx.GraphModule(model, graph)
    order = {node: place for place, node in enumerate(graph.nodes)}
    end = order[last] if whole else max(order[node] for node in outputs)
    writes = [node for node in graph.nodes if order[node] < end and writes_in_place(module, node)]
    written = {node: _memory_of(module, node) for node in writes}
    graph.eliminate_dead_code()
    left = set(graph.nodes)
    if any(memory & left for node, memory in written.items() if node not in left):
        raise TypeError("something is written in place whose result goes by another name, which torch.fx leaves out")
    drop_needless_copies(module)
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _memory_of(module: fx.GraphModule, write: fx.Node) -> set[fx.Node]:
    """The nodes whose result may lie in the memory that a node writes to."""
    found: set[fx.Node] = set()
    waiting = list(write.all_input_nodes)
    while waiting:
        node = waiting.pop()
        fresh = node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), _FRESH)
        waiting += [] if fresh else [before for before in node.all_input_nodes if before not in found]
        found.add(node)
    return found


def drop_needless_copies(module: fx.GraphModule) -> None:
    """Layers' outputs are copies where something behind them is written in place, and only there."""
    written_later = False
    for node in reversed(module.graph.nodes):
        if node.op == "call_function" and node.target is own_output and not written_later:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        written_later = written_later or writes_in_place(module, node)


def writes_in_place(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node of the graph writes to one of its arguments."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function" or not callable(node.target):
        return False
    if node.target in _WRITING.values() or node.kwargs.get("out") is not None:
        return True
    if getattr(node.target, "__name__", "").endswith("_"):
        return True
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # a builtin without a signature
        given = dict(node.kwargs)
    return bool(given.get("inplace"))


def cut_model(model: nn.Module, layers: Sequence[str]) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """The model up to the last of some layers in training and in eval, or None where torch.fx cannot trace it.

    Both share the model's parameters, and the forward of the second runs on the modules of the first too.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        in_training = layer_graph(model.train(), layers, whole=False)
        in_eval = layer_graph(model.eval(), layers, whole=False)
    except Exception:  # fx gives up on data-dependent forwards in many ways; hooks serve them all
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    named = [
        {(node.op, str(node.target)) for node in graph_module.graph.nodes if node.op in ("call_module", "get_attr")}
        for graph_module in (in_training, in_eval)
    ]
    own = {
        name
        for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    }
    constants = {name for kind, name in named[0] if kind == "get_attr"} - own
    if constants or not named[1] <= named[0]:  # a constant of the trace may be a random number
        return None
    return in_training, in_eval
