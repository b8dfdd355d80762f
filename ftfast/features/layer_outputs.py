"""What some layers of a model return while it runs, each call and each thread for itself."""

import difflib
import sys
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from ftfast.features.layer_graph import cut_model


class _Kept(NamedTuple):
    """A layer's output, with what tells whether something wrote to it afterwards.

    ``copy`` was taken at once and ``versions`` are the tensors' then; one of the two may be None.
    """

    output: Any
    copy: Any
    versions: list[int] | None
    circumstances: tuple[str, bool, bool]


class _Call(NamedTuple):
    kept: dict[str, _Kept]
    inputs: Any
    differentiates: bool


class LayerOutputs(nn.Module):
    """The common part of :class:`ftfast.FeatureTap` and :class:`ftfast.FeatureTaps`."""

    def __init__(self, model: nn.Module, layers: Mapping[str, str], *, features_only: bool) -> None:
        super().__init__()
        for layer in layers.values():
            check_layer(model, layer)
        self.features_only = features_only
        self._named = dict(layers)
        # The model may also be called past the tap; nothing is kept then.
        self._calls: dict[int, _Call] = {}
        self._compiled_call: dict[str, _Kept] | None = None
        # Whether the model writes to a layer's output, by the layer, its mode and whether there are gradients.
        self._written: dict[tuple[str, bool, bool], bool] = {}
        self._handles: list[RemovableHandle] = []
        self._is_closed = False
        cut = cut_model(model, list(self._named.values())) if features_only else None
        self.is_cut = cut is not None
        self.model: nn.Module = model
        if cut is None:
            for name, layer in self._named.items():
                hook = model.get_submodule(layer).register_forward_hook(partial(self._keep, name))
                self._handles.append(hook)
        else:
            self.model = cut[0]
            self._eval_code: tuple[fx.GraphModule] = (cut[1],)  # a tuple, so that no parameter has two names
        self.training = model.training

    def close(self) -> None:
        """Takes the hooks off the model; the tap cannot be called afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._is_closed = [], True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def outputs(self, *inputs: Any, **named: Any) -> tuple[Any, dict[str, Any]]:
        """The model's output, None where it is cut, and the layers' outputs by their names."""
        if self._is_closed:
            raise RuntimeError("this tap was closed; make another one.")
        if self.is_cut:
            in_eval = type(self._eval_code[0]).forward
            *found, output = self.model(*inputs, **named) if self.training else in_eval(self.model, *inputs, **named)
            return output, dict(zip(self._named, found, strict=True))
        kept: dict[str, _Kept] = {}
        if torch.compiler.is_compiling():
            self._compiled_call = kept
            try:
                output = self.model(*inputs, **named)
            finally:
                self._compiled_call = None
        else:
            output = self._run(kept, inputs, named)
        silent = [layer for name, layer in self._named.items() if name not in kept]
        if silent:
            raise RuntimeError(
                f"layer {silent[0]!r} did not run when the model was called; tap one that does, and a compiled model "
                "before its first call or after torch.compiler.reset()."
            )
        return output, {name: self._own(kept[name]) for name in self._named}

    def _run(self, kept: dict[str, _Kept], inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        caller = threading.get_ident()
        outer, outer_compiled = self._calls.get(caller), self._compiled_call
        self._calls[caller] = _Call(kept, (inputs, named), torch.is_grad_enabled())
        self._compiled_call = kept  # of a compiled model in this tap
        try:
            return self.model(*inputs, **named)
        finally:
            self._compiled_call = outer_compiled
            if outer is None:
                del self._calls[caller]
            else:
                self._calls[caller] = outer

    def _keep(self, name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        circumstances = (name, module.training, torch.is_grad_enabled())
        if torch.compiler.is_compiling():  # the compiler sees for itself whether the copy is needed
            if self._compiled_call is not None:
                self._compiled_call[name] = _Kept(None, _copied(output), None, circumstances)
            return
        call = self._calls.get(threading.get_ident())
        if call is None:
            if self._calls and getattr(module, "_is_replica", False):
                raise RuntimeError(
                    f"layer {self._named[name]!r} ran in a replica of DataParallel inside of the tap, which sees a "
                    "part of the batch; put DataParallel around the tap."
                )
            return
        if call.differentiates and not torch.is_grad_enabled() and self._is_cut_off(call.inputs):
            raise RuntimeError(
                f"layer {self._named[name]!r} ran inside of a reentrant checkpoint, so its features have no gradient; "
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or tap a layer outside of it."
            )
        leaves = _tensors(output)
        if any(leaf.is_inference() for leaf in leaves):  # these have no version
            call.kept[name] = _Kept(None, _copied(output), None, circumstances)
        else:
            copy = _copied(output) if self._written.get(circumstances, True) else None
            call.kept[name] = _Kept(_apart(output), copy, [leaf._version for leaf in leaves], circumstances)

    def _own(self, kept: _Kept) -> Any:
        """What the layer returned, whatever was done to it since."""
        if kept.versions is None:
            return kept.copy
        is_written = [leaf._version for leaf in _tensors(kept.output)] != kept.versions
        before = self._written.get(kept.circumstances)
        self._written[kept.circumstances] = is_written or before is True
        if is_written and kept.copy is None:
            raise RuntimeError(
                f"the output of layer {self._named[kept.circumstances[0]]!r} was written to later in this call, and in "
                "none before; call again, from now on it is copied."
            )
        return kept.copy if is_written else kept.output

    def _is_cut_off(self, inputs: Any) -> bool:
        """Whether a reentrant checkpoint keeps gradients from here that there would be else."""
        frame: Any = sys._getframe()
        while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
            frame = frame.f_back
        return frame is not None and any(it.requires_grad for it in (*_tensors(inputs), *self.model.parameters()))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _apart(output: Any) -> Any:
    """The same tensors in containers of their own: the model may put others into what the layer returned."""
    return tree_map_only(Tensor, lambda tensor: tensor, output)


def _copied(output: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, output)


def check_layer(model: nn.Module, layer: str) -> None:
    """Raises ValueError with the nearest names where the model has no such layer."""
    names = [name for name, _ in model.named_modules() if name]
    if layer in names:
        return
    near = difflib.get_close_matches(str(layer), names, n=4, cutoff=0.5)
    top = ", ".join(name for name in names if "." not in name) or "none, it is a layer itself"
    advice = f"the nearest are {', '.join(near)}" if near else f"its top-level layers are {top}"
    raise ValueError(f"layer is {layer!r}, which the model does not have; {advice}.")
