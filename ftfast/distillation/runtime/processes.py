"""The processes of one run, as torchrun starts them: which is this one, and what they tell each other.

Every process calls the same functions in the same order; one alone talks to nobody.
"""

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from ftfast.errors import DistillError, LostProcessError, SettingsError


class Part(NamedTuple):
    """Which share of every batch a process takes: that of ``rank`` among ``ranks``."""

    rank: int = 0
    ranks: int = 1


WHOLE = Part()


Value = TypeVar("Value")
# A paraphraser is judged and a checkpoint written by one process, while the others wait.
_PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        part: its rank, and how many there are.
        local: its place among those on this machine, which is that of its GPU.
    """

    part: Part = field(default_factory=Part)
    local: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.part.rank == 0

    @property
    def are_many(self) -> bool:
        return self.part.ranks > 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of tensors of one shape and dtype; alone, the tensor itself."""
        if not self.are_many:
            return values
        total = values.clone()
        with translate_distributed_errors():
            dist.all_reduce(total)
        return total

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Fills tensors of one shape and dtype in all processes with those of the first one."""
        if self.are_many:
            with translate_distributed_errors():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def gather(self, value: Value) -> list[Value]:
        """What each process gives, by rank, in all of them; it travels over the CPU."""
        if not self.are_many:
            return [value]
        found: list[Any] = [None] * self.part.ranks
        with translate_distributed_errors():
            dist.all_gather_object(found, value)
        return found

    def on_first(self, work: Callable[[], Value]) -> Value:
        """What ``work`` gives in the first process, sent to all; what it refuses is refused in all."""
        if not self.are_many:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except (DistillError, OSError) as error:
                outcome[1] = error
        with translate_distributed_errors():
            dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            outcome[1].is_shared = True
            raise outcome[1]
        return outcome[0]

    def wait(self) -> None:
        """Returns once every process has come here."""
        self.on_first(lambda: None)


ALONE = Processes()


@contextmanager
def joined(device_type: str) -> Iterator[Processes]:
    """Inside, the processes that torchrun started know each other: over gloo on the CPU, NCCL between GPUs.

    Without torchrun's environment there is one.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``; each process of a machine takes the GPU of its place there.

    Raises:
        SettingsError: fewer GPUs than processes.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        if local >= torch.cuda.device_count():
            raise SettingsError(
                f"process {rank} is the machine's number {local + 1}, and there are {torch.cuda.device_count()} GPUs; "
                "give torchrun --nproc-per-node as many as there are."
            )
        torch.cuda.set_device(local)
    import_module("torch._dynamo")  # DDP brings it in, and it would keep the group that is there when it first comes

    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    with translate_distributed_errors():
        dist.init_process_group(backend, store=_own_store(rank, ranks), rank=rank, world_size=ranks, timeout=_PATIENCE)
    try:
        yield Processes(Part(rank, ranks), local)
    finally:
        dist.destroy_process_group()
        # The group goes only with what holds it, and threads of it that outlive Python end the process by SIGABRT.
        gc.collect()


def _own_store(rank: int, ranks: int) -> dist.Store:
    """What the processes find each other by, under a name of this start alone.

    torchrun's store outlives a restart, and with it the addresses of processes that are gone. So the first process
    makes up a name, and the others ask for it under words that nobody used before.
    """
    store = next(dist.rendezvous("env://", timeout=_PATIENCE))[0]
    if rank:
        asked = uuid4().hex
        store.set(f"asked/{rank}", asked)
        name = store.get(f"answer/{asked}").decode()
        store.set(f"{name}/heard/{rank}", "")
        return dist.PrefixStore(name, store)
    name, deadline = uuid4().hex, time.monotonic() + _PATIENCE.total_seconds()
    waiting, answered = set(range(1, ranks)), set()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{name}/heard/{other}"]):
                waiting.remove(other)
            elif store.check([f"asked/{other}"]) and (asked := store.get(f"asked/{other}").decode()) not in answered:
                store.set(f"answer/{asked}", name)
                answered.add(asked)
        if time.monotonic() > deadline:
            raise LostProcessError(f"process {min(waiting)} of {ranks} did not start within {_PATIENCE}.")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


@contextmanager
def translate_distributed_errors() -> Iterator[None]:
    """What torch says when a process is gone, as one sentence."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise LostProcessError(
                "a process that reads images was ended from outside, for want of memory perhaps; the last checkpoint "
                "stands: run the same command with --resume, and with fewer --workers."
            ) from None
        signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out", "NCCL", "aborted")
        found = next((sign for sign in signs if sign.lower() in str(error).lower()), None)
        if found is None and not isinstance(error, dist.DistError):
            raise
        raise LostProcessError(
            f"another process of the run no longer answers ({found or type(error).__name__}); the last checkpoint "
            "stands: run the same command with --resume, or let torchrun do so with --max-restarts."
        ) from None


class Agreement:
    """Wishes of single processes, on which all act at the same step: one step after the first has uttered it.

    The answer travels while the step runs, so no step waits for it.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._asked: Tensor | None = None
        self._work: Any = None

    def __call__(self, *wishes: int) -> tuple[int, ...]:
        """The largest that any process had at the step before of each wish, 0 being none; alone, at this one."""
        if not self._processes.are_many:
            return wishes
        heard = self.hear() or (0,) * len(wishes)
        self._asked = torch.tensor(wishes, dtype=torch.int32)
        with translate_distributed_errors():
            self._work = dist.all_reduce(self._asked, op=dist.ReduceOp.MAX, async_op=True)
        return heard

    def hear(self) -> tuple[int, ...]:
        """The wishes still on their way, which no later call then hears; none where there are none."""
        if self._asked is None:
            return ()
        with translate_distributed_errors():
            self._work.wait()
        heard, self._asked = tuple(self._asked.tolist()), None
        return heard

    def settle(self, *wishes: int) -> tuple[int, ...]:
        """As when called, with the wishes of now among those heard; every process waits for the others."""
        before, now = self(*wishes), self.hear() or wishes
        return tuple(map(max, before, now))
