"""A frozen model's forward recorded once for each input shape as a CUDA graph, which launches it in one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 3
MOST_SHAPES = 16  # a graph keeps its memory; images of any size would fill the GPU with them


class Captured:
    """Replays ``run`` on a copy of its input; its outputs are copies too, so that they outlive the next call.

    Args:
        run: a CUDA tensor to a tuple of tensors or None, without synchronisation and without random numbers.
    """

    def __init__(self, run: Callable[[Tensor], Any]) -> None:
        self._run = run
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor | None, ...]]] = {}

    def __call__(self, images: Tensor) -> tuple[Tensor | None, ...]:
        """The outputs of ``run``; the first call of each shape, stride and dtype records, unless there were many."""
        if images.is_cuda and torch.cuda.is_current_stream_capturing():  # of a whole step, which has a graph of its own
            return tuple(self._run(images))
        key = (tuple(images.shape), images.stride(), images.dtype, images.device)
        if key not in self._graphs:
            if len(self._graphs) == MOST_SHAPES:
                return tuple(self._run(images))
            self._graphs[key] = self._record(images)
        graph, static_input, outputs = self._graphs[key]
        static_input.copy_(images)
        graph.replay()
        return tuple(None if output is None else output.clone() for output in outputs)

    def _record(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor | None, ...]]:
        static_input = images.clone()
        aside = torch.cuda.Stream(images.device)
        aside.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(aside):  # libraries choose their algorithms and workspaces outside the recording
            for _ in range(_WARM_UPS):
                self._run(static_input)
        torch.cuda.current_stream(images.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may decode photographs
            outputs = tuple(self._run(static_input))
        return graph, static_input, outputs
