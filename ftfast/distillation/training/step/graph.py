"""A step recorded for each shape of its batch as a CUDA graph: one launch in the place of hundreds.

What is recorded reads and writes memory by its address, and numbers as they were. So all that changes from step to step
is a tensor, written to in place; where anything else has changed, the step is recorded anew.
"""

import random
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftfast.distillation.models.frozen_teacher import FrozenTeacher

# Calls that run as they are before one is recorded: libraries choose algorithms, compilers compile, optimisers make
# their state, and what is prepared once is prepared outside the recording.
WARM_UPS = 3


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    rows: tuple[Any, ...]
    result: Any


class StepGraph:
    """``step`` as it is on a CPU and in the first calls with each kind of batch on a GPU, and then as a CUDA graph.

    Every call is one step, whichever way it runs. Where a step cannot be recorded it goes on as it is, and the reason
    is said once.

    Args:
        step: a batch of tensors, floats and constants to tensors. A float reaches it on a GPU as a 0-d float32 tensor
            there, which may have another value in every call. What it draws at random on the GPU is drawn anew by
            every replay from torch's generator; it must not draw on the CPU.
        optimizers: those that step in it. A learning rate that is set as a number is written to a tensor before each
            step; other numbers of theirs that change, a loaded state and moved parameters have the step recorded anew.
        frozen: modules that it reads but does not train. Where one is written to, the step is recorded anew.
        device: where it runs; None takes the batch's.
        say: takes the reason why it is not recorded.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        frozen: Iterable[nn.Module] = (),
        device: torch.device | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._step = step
        self._optimizers = tuple(optimizers)
        self._frozen = tuple(frozen)
        self._device = device
        self._say = say
        self._reason = ""
        self._stream: torch.cuda.Stream | None = None
        self._rates: Tensor = torch.empty(0)
        self._watched: list[weakref.ref[nn.Module]] = []
        self._recordings: dict[Any, _Recording] = {}
        self._warmed: Counter[Any] = Counter()
        self._state: Any = None
        for optimizer in self._optimizers:
            optimizer.register_load_state_dict_post_hook(lambda _: self.forget())  # it makes new tensors

    def __call__(self, *batch: Any) -> Any:
        """One step. Tensors of the result are written to again by the next call."""
        return self._on_stream(self._run, batch)

    def eagerly(self, *batch: Any) -> Any:
        """One step as it is, between those that are replayed."""
        return self._on_stream(self._as_it_is, batch)

    def forget(self) -> None:
        """Drops what was recorded, and its memory; the step is warmed up and recorded anew."""
        self._recordings.clear()
        self._warmed.clear()

    def explain(self) -> str:
        """How the last step ran, and why so."""
        if self._reason:
            return f"as it is: {self._reason}"
        if self._recordings:
            return f"as a CUDA graph, recorded for {len(self._recordings)} of its kinds of batch"
        return "as it is, until it is warmed up"

    @contextmanager
    def stream(self, device: torch.device) -> Iterator[None]:
        """Inside, work goes to the step's stream, after what was asked for before; afterwards all others wait for it.

        A node of autograd's runs its backward where its forward was: all steps have one stream from the first on.
        """
        current = torch.cuda.current_stream(device)
        if self._stream is None:
            is_own = current != torch.cuda.default_stream(device)
            self._stream = current if is_own else torch.cuda.Stream(device)
        if current == self._stream:
            yield
            return
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _on_stream(self, run: Callable[..., Any], batch: tuple[Any, ...]) -> Any:
        device = self._device or next((it.device for it in batch if isinstance(it, Tensor)), torch.device("cpu"))
        if device.type != "cuda":
            self._reason = f"it runs on the {device.type}, and graphs are CUDA's"
            return self._step(*batch)
        with self.stream(device):
            self._write_rates(device)
            return run(device, batch)

    def _as_it_is(self, device: torch.device, batch: tuple[Any, ...]) -> Any:
        return self._step(*(torch.full((), it, device=device) if isinstance(it, float) else it for it in batch))

    def _run(self, device: torch.device, batch: tuple[Any, ...]) -> Any:
        if self._reason:
            return self._as_it_is(device, batch)
        state = self._read_state()
        if self._recordings and state != self._state:
            self.forget()
        kind = tuple(map(_kind, batch))
        if kind not in self._recordings:
            self._warmed[kind] += 1
            if self._warmed[kind] <= WARM_UPS:
                return self._warm_up(device, batch, is_last=self._warmed[kind] == WARM_UPS)
            try:
                self._record(kind, device, batch)
            except RuntimeError as error:  # a synchronisation, say, or too little memory
                first = error.__context__ or error  # the end of a recording that failed fails too
                self._leave(str(first).strip().partition("\n")[0])
                return self._as_it_is(device, batch)
        recording = self._recordings[kind]
        for row, given in zip(recording.rows, batch, strict=True):
            if isinstance(given, Tensor):
                row.copy_(given, non_blocking=True)
            elif isinstance(given, float):
                row.fill_(given)
        recording.graph.replay()
        return recording.result

    def _warm_up(self, device: torch.device, batch: tuple[Any, ...], *, is_last: bool) -> Any:
        before = _drawn_on_the_host() if is_last else None
        result = self._as_it_is(device, batch)
        if is_last and before != _drawn_on_the_host():
            self._leave("it draws at random on the CPU, and every replay would have the same draws")
        return result

    def _record(self, kind: Any, device: torch.device, batch: tuple[Any, ...]) -> None:
        assert self._stream is not None
        rows = tuple(_row(it, device) for it in batch)
        pool = next((recording.graph.pool() for recording in self._recordings.values()), None)
        graph = torch.cuda.CUDAGraph()
        # Other threads may decode photographs meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            result = self._step(*rows)
        self._recordings[kind] = _Recording(graph, rows, result)
        self._watched = [weakref.ref(module) for module in _modules(self._frozen)]
        self._state = self._read_state()

    def _leave(self, reason: str) -> None:
        if reason != self._reason:
            self._reason = reason
            self.forget()
            self._say(f"the step is not replayed as a CUDA graph: {reason}")

    def _write_rates(self, device: torch.device) -> None:
        """To where a recording finds them changed; a number would be recorded as it is."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        if len(self._rates) != len(groups):
            self._rates = torch.zeros(len(groups), dtype=torch.float32, device=device)
        given = {group["lr"] for group in groups}
        are_one = len(given) == 1 and not isinstance(next(iter(given)), Tensor)
        if are_one:
            self._rates.fill_(given.pop())
        for group, rate in zip(groups, self._rates, strict=True):
            if not isinstance(group["lr"], Tensor):
                group["lr"] = rate if are_one else rate.fill_(group["lr"])

    def _read_state(self) -> Any:
        """What changes whenever a recording no longer does what the step would; replays change nothing of it."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        given = [value for group in groups for name, value in group.items() if name != "params"]
        numbers = [value.data_ptr() if isinstance(value, Tensor) else value for value in given]
        learned = [(it.data_ptr(), it.requires_grad) for group in groups for it in group["params"]]
        alive = [module for reference in self._watched if (module := reference()) is not None]
        places = [place for it in alive for place in (*it._parameters.values(), *it._buffers.values())]
        frozen = [(it.data_ptr(), None if it.is_inference() else it._version) for it in places if it is not None]
        return numbers, learned, frozen


def _kind(given: Any) -> Any:
    """What a recording is for: of a tensor all but its values, of a float nothing."""
    if isinstance(given, Tensor):
        return given.shape, given.stride(), given.dtype, given.device
    return float if isinstance(given, float) else given


def _row(given: Any, device: torch.device) -> Any:
    """Where a recording reads a part of its batch."""
    if isinstance(given, float):
        return torch.empty((), device=device)
    return torch.empty_like(given) if isinstance(given, Tensor) else given


def _drawn_on_the_host() -> Any:
    """What has changed where something was drawn on the CPU."""
    drawn = (bytes(torch.get_rng_state().tolist()), random.getstate())
    numpy = sys.modules.get("numpy")  # where nobody has imported it, nobody draws from it
    if numpy is None:
        return drawn
    _, keys, place, *_ = numpy.random.get_state()
    return *drawn, keys.tobytes(), place


def _modules(frozen: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Those whose tensors a recording depends on, with those that a frozen teacher is a copy of."""
    for module in (part for whole in frozen for part in whole.modules()):
        yield module
        if isinstance(module, FrozenTeacher):
            yield from module.sources()
