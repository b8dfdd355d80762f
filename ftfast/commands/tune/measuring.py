"""Which candidates agree, and how long each takes.

On a GPU each candidate is captured as a CUDA graph whose replays are timed: between two ways of computing a small head,
what Python and the launches cost would decide otherwise, and a captured step does not pay it.
"""

import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ftfast.commands.tune.candidates import DTYPES, Candidate
from ftfast.ops.kernel_table import Work

# Two kernels for one result may differ by this much, relative to it; TF32 rounds float32 operands.
AGREEMENT = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 4e-3}
BLOCKS = 5
REPLAYS = 20  # of a graph that are timed as one: an event's own time is a microsecond


def agreeing(candidates: list[Candidate], work: Work) -> list[Candidate]:
    """The candidates that run and give the first one's results; the others are named, and not timed."""
    kept: list[Candidate] = []
    wanted: list[Tensor] = []
    for candidate in candidates:
        try:
            found = [result.double() for result in candidate.run()]
        except (RuntimeError, ValueError) as error:
            _leave_out(candidate, work, error)
            continue
        wanted = wanted or found
        errors = [((got - right).norm() / right.norm()).item() for got, right in zip(found, wanted, strict=True)]
        difference = math.sqrt(sum(error * error for error in errors) / len(errors))
        # A sum over samples of signs that rounding may flip agrees less closely than one product does.
        bound = AGREEMENT[DTYPES[work.dtype]] * (10 if work.operation == "head" else 1)
        if difference <= bound:
            kept.append(candidate)
        else:
            print(f"ftfast tune: {candidate.kernel} is off by {difference:.1e} for {work}; left out.", file=sys.stderr)
    return kept


def _leave_out(candidate: Candidate, work: Work, error: Exception) -> None:
    print(f"ftfast tune: {candidate.kernel} cannot compute {work}: {error}", file=sys.stderr)


def captured(candidates: list[Candidate], work: Work, device: torch.device) -> list[Candidate]:
    """The candidates as replays of CUDA graphs; one that cannot be captured is named, and not timed."""
    kept = []
    with torch.cuda.device(device):
        for candidate in candidates:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                # Backward remembers the stream of forward: all of it belongs on the one that is captured.
                with torch.cuda.stream(stream):
                    candidate.run()
                with torch.cuda.graph(graph, stream=stream):
                    results = candidate.run()
            except (RuntimeError, ValueError) as error:
                _leave_out(candidate, work, error)
                continue
            kept.append(Candidate(candidate.kernel, partial(_replay, graph, results)))
    return kept


def _replay(graph: torch.cuda.CUDAGraph, results: Sequence[Tensor]) -> Sequence[Tensor]:
    graph.replay()
    return results


def median_milliseconds(candidates: list[Candidate], device: torch.device, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, in blocks of its own that come in random order."""
    order = [candidate for candidate in candidates for _ in range(BLOCKS)]
    random.Random(0).shuffle(order)
    found: dict[str, list[float]] = {candidate.kernel: [] for candidate in candidates}
    for candidate in order:
        for _ in range(2):
            candidate.run()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(found[candidate.kernel]) < 3:
            found[candidate.kernel].append(_milliseconds(candidate, device))
    return {kernel: statistics.median(times) for kernel, times in found.items()}


def _milliseconds(candidate: Candidate, device: torch.device) -> float:
    """Of one run; on a GPU by its own clock, of some runs back to back."""
    if device.type != "cuda":
        start = time.perf_counter()
        candidate.run()
        return 1e3 * (time.perf_counter() - start)
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(REPLAYS):
            candidate.run()
        last.record()
        last.synchronize()
    return float(first.elapsed_time(last)) / REPLAYS
