"""FrozenTeacher: a teacher as students need it, which is its features and nothing that training would change."""

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ftfast.distillation.models import inference_graph
from ftfast.distillation.models.frozen_capture import Captured
from ftfast.distillation.models.registry import Outputs
from ftfast.errors import DistillError
from ftfast.features.layer_graph import layer_graph
from ftfast.features.tap import FeatureTap
from ftfast.ops.fingerprint import fingerprint

EXECUTIONS = ("eager", "compile", "graph")
# Relative L2 errors of features; one rounding of a bfloat16 is 4e-3, and every layer adds its own.
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class TeacherError(DistillError):
    """A teacher that cannot be frozen, or was changed after it had been."""


class FrozenTeacher(nn.Module):
    """A copy of a model for inference alone: in eval whatever is asked of it, without parameters and without a graph.

    ``FrozenTeacher(model, "layer4")(images).features`` is what ``layer4`` gives in eval.

    Batch norms are folded into the convolutions before them, weights are in ``dtype`` and channels_last, nothing runs
    past the layer unless the classifier is kept, and on a CPU each convolution takes its residual and ReLU along
    (our own 3x3 convolution or oneDNN's fused operators, no compiler). What cannot be done is said by :meth:`explain`;
    the result is compared with the model's own in float32, and a copy that differs too much is never handed out.

    The model itself is set to eval and left as it is otherwise. It may be dropped afterwards; where it is kept and
    changed (``load_state_dict``, say, or a batch norm's eps), the next call raises, since the copy does not follow. On
    a GPU a write past torch's version counters, through ``.data``, is not seen.

    Args:
        model: images ``[N, C, H, W]`` to logits ``[N, classes]``, float32; without the classifier, to anything.
        layer: the submodule whose output ``[N, C', H', W']`` students learn from.
        dtype: float32, bfloat16 or, on a GPU, float16.
        classifier: keep the logits too, which soft labels need.
        example: images of the size and batch size to come, on the model's device; a few do as well. None takes those
            of the first call, at which the copy is then made.
        execution: ``"eager"``; ``"compile"`` for torch.compile, which constant-folds on the CPU and compiles anew for
            each size of images; ``"graph"`` for a CUDA graph of each input shape, the first 16 of them.
        limit: the largest ``error`` that is taken; None for 1e-4, 1e-2 and 5e-2 for float32, float16 and bfloat16.

    Attributes:
        device: the model's, where images are to come.
        error: relative L2 distance of the features from the model's own in float32, on ``example``.

    Raises:
        TeacherError: a dtype or execution that is not taken here, an unknown layer, features that are not finite, or
            an error above the limit.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        *,
        dtype: torch.dtype = torch.float32,
        classifier: bool = False,
        example: Tensor | None = None,
        execution: str = "eager",
        limit: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TeacherError(f"model is a {type(model).__name__}; it takes the teacher as an nn.Module.")
        self.layer, self.dtype, self.classifier = layer, dtype, classifier
        self._notes: list[str] = []
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        if example is not None:
            self.device = example.device
        _check(model, layer, dtype, self.device, execution)
        self.limit = LIMITS[dtype] if limit is None else limit
        self._run: Callable[[Tensor], Any] | None = None
        # Hidden from torch: it is no part of this module.
        self._freeze_at = partial(self._freeze, model, execution)
        if example is not None:
            self._freeze_at(example)
        self.eval()

    def _freeze(self, model: nn.Module, execution: str, example: Tensor) -> None:
        expected = _reference(model.eval(), self.layer, example, classifier=self.classifier)
        self._sources = [weakref.ref(module) for module in model.modules()]
        self._state = _state(self._sources)
        # The compiler fuses by itself.
        fusing = execution == "eager" and _can_fuse(example)
        run = self._first_that_agrees(model, example, expected, fusing=fusing)
        if execution == "compile":
            run = _compiled(run)
            self._notes.append("compiled")
        elif execution == "graph":
            run = Captured(run)
            self._notes.append("as a CUDA graph")
        if execution != "eager":
            self.error = self._distance(run, example, expected)
        if not self.error <= self.limit:
            raise TeacherError(
                f"the frozen teacher's features are off by {self.error:.1e} of the teacher's own, and at most "
                f"{self.limit:.0e} is taken in {str(self.dtype).removeprefix('torch.')}; take float32 "
                "(--dtype) or the model as it is (--engine plain)."
            )
        # Hidden from torch: moved or cast, the weights would no longer be those that were compared.
        self._run = partial(run)
        del self._freeze_at  # and with it the model

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """``[N, C, H, W]`` to logits, ``[N, 0]`` without the classifier, and features, all in ``dtype``.

        Raises:
            TeacherError: the model that this was made from has changed since.
        """
        if self._run is None:
            self._freeze_at(images)
            assert self._run is not None
        if (state := _state(self._sources)) is not None and state != self._state:
            raise TeacherError("the teacher was changed after it had been frozen; freeze it again: FrozenTeacher(...).")
        return self._outputs(self._run, images)

    if TYPE_CHECKING:  # torch's own says that a call gives anything

        def __call__(self, images: Tensor) -> Outputs: ...

    def explain(self) -> str:
        """What was done to the model, what could not be and why, and the error that it leaves, in one line."""
        if self._run is None:
            return "to be frozen at its first images"
        return (
            f"{'; '.join(self._notes)}; relative error of its features {self.error:.1e}, at most {self.limit:.0e} taken"
        )

    def sources(self) -> list[nn.Module]:
        """The modules of the model that this is a copy of, where it is still there; a write to them makes it stale."""
        return [module for reference in getattr(self, "_sources", ()) if (module := reference()) is not None]

    def _outputs(self, run: Callable[[Tensor], Any], images: Tensor) -> Outputs:
        placed = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            features, logits = run(placed)
        return Outputs(features.new_empty(len(images), 0) if logits is None else logits, features)

    @torch.no_grad()
    def _distance(self, run: Callable[[Tensor], Any], example: Tensor, expected: Outputs) -> float:
        found = self._outputs(run, example)
        distances = [_relative(found.features, expected.features)]
        if self.classifier:
            distances.append(_relative(found.logits, expected.logits))
        return max(distances)

    def _first_that_agrees(
        self, model: nn.Module, example: Tensor, expected: Outputs, *, fusing: bool
    ) -> Callable[[Tensor], Any]:
        """Fused graph, plain graph or modules: the first that runs here and is near enough."""
        for fused in (True, False) if fusing else (False,):
            try:
                run, note = self._graph(model, fused=fused)
                self.error = self._distance(run, example, expected)
                failure = "" if self.error <= self.limit else f"relative error {self.error:.1e}"
            except Exception as error:  # a graph or an operator can fail in many ways, and the modules serve them all
                first_line = str(error).strip().partition("\n")[0]
                failure = f"{type(error).__name__}: {first_line}"
            if not failure:
                self._notes.append(note)
                return run
            title = "fusing convolutions" if fused else "a graph with folded batch norms"
            self._notes.append(f"without {title} ({failure})")
        run, note = self._whole(model)
        self._notes.append(note)
        self.error = self._distance(run, example, expected)
        return run

    def _graph(self, model: nn.Module, *, fused: bool) -> tuple[Callable[[Tensor], Any], str]:
        own = copy.deepcopy(model).eval()
        found = inference_graph.fold(layer_graph(own, [self.layer], whole=self.classifier))
        if fused:
            found = inference_graph.fuse(found)
        parts = [
            f"{'whole' if self.classifier else f'cut after {self.layer}'}",
            f"{found.folded} batch norms folded" + (f", {found.left} not" if found.left else ""),
        ]
        if found.fused:
            parts.append(f"{found.fused} convolutions fused with what follows them")
        note = f"{', '.join(parts)}, {str(self.dtype).removeprefix('torch.')} channels_last"
        return _placed(found.module, self.dtype), note

    def _whole(self, model: nn.Module) -> tuple[Callable[[Tensor], Any], str]:
        tap = FeatureTap(copy.deepcopy(model).eval().to(memory_format=torch.channels_last), self.layer).eval()
        tap.requires_grad_(False)

        def run(images: Tensor) -> tuple[Tensor, Tensor | None]:
            with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits, features = tap(images.float())
            return features, logits if self.classifier else None

        return run, f"as modules under autocast to {str(self.dtype).removeprefix('torch.')}, batch norms not folded"


def _check(model: nn.Module, layer: str, dtype: torch.dtype, device: torch.device, execution: str) -> None:
    if dtype not in LIMITS or (dtype == torch.float16 and device.type == "cpu"):
        raise TeacherError(f"dtype is {dtype}; it takes torch.float32, torch.bfloat16 or, on a GPU, torch.float16.")
    if execution not in EXECUTIONS or (execution == "graph" and device.type != "cuda"):
        raise TeacherError(f"execution is {execution!r}; it takes eager, compile or, on a CUDA GPU, graph.")
    if not layer or layer not in dict(model.named_modules()):
        top = ", ".join(name for name, _ in model.named_children())
        raise TeacherError(f"layer is {layer!r}, which the teacher does not have; its top-level layers are {top}.")


def _can_fuse(example: Tensor) -> bool:
    return (
        example.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


@torch.no_grad()
def _reference(model: nn.Module, layer: str, example: Tensor, *, classifier: bool) -> Outputs:
    """The model's own outputs; the features are copied at once, before a later layer writes to them."""
    kept: list[Any] = []
    hook = model.get_submodule(layer).register_forward_hook(
        lambda _module, _inputs, output: kept.append(output.clone() if isinstance(output, Tensor) else output)
    )
    try:
        with torch.autocast(example.device.type, enabled=False):
            logits = model(example.float())
    finally:
        hook.remove()
    if not kept or not isinstance(kept[-1], Tensor):
        raise TeacherError(f"layer {layer!r} gave no tensor when the teacher ran; take a layer that does.")
    if not classifier:
        logits = kept[-1].new_empty(len(example), 0)  # its output may be anything
    elif not isinstance(logits, Tensor):
        raise TeacherError(f"classifier is True and the teacher's output is a {type(logits).__name__}, no logits.")
    if not torch.isfinite(kept[-1]).all():
        raise TeacherError(f"the teacher's features at {layer!r} are not finite; its checkpoint is of no use.")
    return Outputs(logits, kept[-1])


def _relative(found: Tensor, expected: Tensor) -> float:
    distance = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(distance) if float(expected.norm()) > 0 else float(found.double().norm())


def _state(modules: list["weakref.ref[nn.Module]"]) -> tuple[Any, ...] | None:
    """What changes whenever one of the modules does in a way that counts in eval; None where one is gone.

    A GPU's tensors are told apart by torch's version counters, which a write through ``.data`` passes by.
    """
    alive = [module for reference in modules if (module := reference()) is not None]
    if len(alive) < len(modules):
        return None
    given = (tensor for module in alive for tensor in (*module._parameters.values(), *module._buffers.values()))
    tensors = [tensor for tensor in given if tensor is not None]
    numbers = [
        (name, value)
        for module in alive
        if type(module).__module__.startswith("torch.nn.")  # others may count their calls, say
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, int | float | str | tuple)
    ]
    # A batch norm's count of batches too: its statistics are written to without their version's knowledge.
    versions = [(id(it), None if it.is_inference() else it._version) for it in tensors]
    return numbers, fingerprint(tensors) or versions


def _placed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In the dtype and channels_last; batch norms that stayed keep their float32, which costs nothing."""
    for child in module.modules():
        if not isinstance(child, nn.modules.batchnorm._BatchNorm):
            for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
                if tensor.is_floating_point():
                    like = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
                    cast = tensor.detach().to(dtype).contiguous(memory_format=like)
                    child._parameters.pop(name, None)
                    child._buffers.pop(name, None)
                    child.register_buffer(name, cast, persistent=False)
    return module.requires_grad_(False).eval()


def _compiled(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    compiled = torch.compile(run, dynamic=False)

    def call(images: Tensor) -> Any:
        from torch._inductor import config

        # Freezing constant-folds weights into the layouts that oneDNN wants; read when a shape is compiled.
        with config.patch(freezing=True):
            return compiled(images)

    return call
