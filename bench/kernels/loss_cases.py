"""One pair of factors, and a loss on it as candidates: forward, backward and both, judged and counted."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.gate import BACKWARD, FORWARD, FORWARD_BACKWARD, Candidate, Gate, Judge
from bench.harness.measuring import raised
from bench.peers import OFFICIAL, Formula, Loss
from bench.shapes import FactorShape


def saved_for_backward(loss: Loss, student_factor: Tensor, teacher_factor: Tensor) -> dict[str, int]:
    """Bytes kept between forward and backward.

    Counted are the storages of all tensors that autograd saves and of those that an ``autograd.Function`` keeps as
    attributes of its context, which hooks on saved tensors do not see; each storage once and whole, since whole it
    stays allocated. On a GPU the allocator is asked as well, which sees what neither does.

    Args:
        loss: run once, with gradients.
        student_factor, teacher_factor: any layout; the student's requires a gradient.

    Returns:
        ``saved_bytes``: all of it. ``saved_beyond_factors_bytes``: without the two factors' own storages; a factor
        that is kept is not copied, and the student's mostly lives on for the layer before. On a GPU
        ``allocated_for_backward_bytes``: what the allocator holds more after a forward than before it.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
        return tensor

    device = student_factor.device
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    value = loss(student_factor, teacher_factor)
    found = {}
    if device.type == "cuda":
        found["allocated_for_backward_bytes"] = torch.cuda.memory_allocated(device) - before
    del value
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(student_factor, teacher_factor)
    for tensor in _held_by_contexts(value.grad_fn):
        keep(tensor)
    factors = {factor.untyped_storage().data_ptr() for factor in (student_factor, teacher_factor)}
    found["saved_bytes"] = sum(storage.nbytes() for storage in kept.values())
    found["saved_beyond_factors_bytes"] = sum(
        storage.nbytes() for address, storage in kept.items() if address not in factors
    )
    return found


def _held_by_contexts(root: Any) -> list[Tensor]:
    """The tensors among the attributes of the graph's nodes; only nodes written in Python have attributes."""
    found: list[Tensor] = []
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for held in getattr(node, "__dict__", {}).values():
            members = held if isinstance(held, (list, tuple)) else (held,)
            found += [member for member in members if isinstance(member, Tensor)]
        waiting += [parent for parent, _ in node.next_functions]
    return found


LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
WORKS = (FORWARD, BACKWARD, FORWARD_BACKWARD)
FLOPS_PER_ELEMENT = {FORWARD: 9, BACKWARD: 6, FORWARD_BACKWARD: 15}
FORMULA = (
    "bytes: forward 2*N*D*e (both factors read), e bytes an element; forward+backward 3*N*D*e (the gradient written "
    "too) where the gradient written in the forward pass can be the final one: 32 and 64 bit with upstream gradient 1; "
    "5*N*D*e otherwise, since it is computed again or multiplied once the upstream gradient is known; backward alone "
    "3*N*D*e, and nothing is counted where forward has written the gradient; copy 2*N*D*e; yardstick F 3*N*D*e. "
    "FLOPs: forward 9*N*D (two sums of squares 4, two divisions 2, difference, absolute value and sum 3), backward "
    "6*N*D (sign, its product with the student's direction and that product's sum 3, the gradient's two factors and "
    "their difference 3); what an implementation computes beyond these is not counted"
)


def factors(shape: FactorShape, dtype: torch.dtype, layout: str, device: torch.device, seed: int) -> list[Tensor]:
    """A student and a teacher factor as the last LeakyReLU leaves them; the student's requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        F.leaky_relu(torch.randn(shape.dims, generator=generator), 0.1)
        .to(device=device, dtype=dtype)
        .contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    return [student.requires_grad_(), teacher]


def least_factors(work: str, dtype: torch.dtype, upstream: float) -> int:
    """How many factors' worth of memory traffic the work needs at least; see ``FORMULA``."""
    if work == FORWARD:
        return 2
    return 3 if work == BACKWARD or (upstream == 1.0 and dtype.itemsize >= 4) else 5


class LossCases:
    """Makes candidates on one pair of factors, which the student's gradient and the float64 reference belong to."""

    def __init__(self, shape: FactorShape, dtype: torch.dtype, layout: str, device: torch.device, seed: int) -> None:
        self.student, self.teacher = factors(shape, dtype, layout, device, seed)
        self._judges: dict[Formula, Judge] = {}
        self._seed = seed

    def _judge(self, formula: Formula) -> Judge:
        if formula not in self._judges:
            self._judges[formula] = Judge(self.student, self.teacher, self._seed, formula)
        return self._judges[formula]

    def clear(self) -> None:
        """Before a step: as an optimizer's ``zero_grad`` leaves it."""
        self.student.grad = None

    def kept_by(self, loss: Loss) -> dict[str, Any]:
        """What a loss keeps for its backward, or why that cannot be said."""
        try:
            return dict(saved_for_backward(loss, self.student, self.teacher))
        except Exception as error:  # The gate says whether it runs at all.
            return {"saved_unknown": raised(error)}

    def entries(
        self,
        name: str,
        loss: Loss,
        *,
        teacher: Tensor | None = None,
        upstream: float = 1.0,
        works: tuple[str, ...] = WORKS,
        formula: Formula | None = OFFICIAL,
        rounds_throughout: bool = False,
        moved: int | None = None,
        **details: Any,
    ) -> list[Candidate]:
        """A candidate for each of ``works``.

        Args:
            teacher: the same numbers in another layout.
            upstream: the gradient that backward starts from.
            formula: what the gate judges by, None for what computes nothing that could be wrong.
            rounds_throughout: see :func:`bench.harness.gate.limits`.
            moved: factors' worth of traffic of every work, where ``FORMULA`` is not what counts.
            details: further fields of the record rows; ``gradient_in_forward`` says that backward has no traffic.
        """
        student, dtype = self.student, self.student.dtype
        teacher = self.teacher if teacher is None else teacher
        # A plain backward() for 1, as training scripts have it; the tensor stands for a loss weight or an AMP scale.
        gradient = None if upstream == 1.0 else torch.tensor(upstream, device=student.device)
        graphs: list[Tensor] = []

        def forward() -> None:
            with torch.no_grad():
                loss(student, teacher)

        def build_graph() -> None:
            self.clear()
            graphs[:] = [loss(student, teacher)]

        def backward() -> None:
            graphs.pop().backward(gradient)

        def forward_backward() -> None:
            loss(student, teacher).backward(gradient)

        @cache
        def gate() -> Gate:
            assert formula is not None
            rounds = rounds_throughout and dtype.itemsize < 4
            return self._judge(formula)(loss, student, teacher, rounds_throughout=rounds)

        def moved_bytes(work: str) -> int | None:
            if work == BACKWARD and details.get("gradient_in_forward"):
                return None
            return student.nbytes * (moved or least_factors(work, dtype, upstream))

        def counted(work: str) -> dict[str, int]:
            return {"flops": FLOPS_PER_ELEMENT[work] * student.numel()} if formula is OFFICIAL else {}

        steps = {FORWARD: forward, BACKWARD: backward, FORWARD_BACKWARD: forward_backward}
        return [
            Candidate(
                name=name,
                work=work,
                step=steps[work],
                prepare=build_graph if work == BACKWARD else self.clear,
                least_bytes=moved_bytes(work),
                gate=gate if formula else None,
                details={"upstream": upstream, **counted(work), **details},
            )
            for work in works
        ]
