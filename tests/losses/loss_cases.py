"""Random cases of the loss, and what is right for each: float64's, elementwise, within what roundings may cause."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ftfast import reference
from ftfast.arguments import FACTOR_DTYPES, QUANTISED_DTYPES

ROUNDINGS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SCALES = (1.0, 1.0, 1.0, 1e-3, 1e3, 1e-12, 1e-20, 1e-30, 1e-40, 1e15, 4e18, 1e25, 1e37)
EPSILONS = (1e-12, 1e-12, 1e-12, 1e-12, 1e-3, 1.0, 1e3, 1e-20, 1e-30, 1e10, 1e30, 0.0, math.inf)


@dataclass
class Case:
    """One call and its upstream gradient; ``described`` says how it was drawn."""

    student: Tensor
    teacher: Tensor
    options: dict[str, Any]
    upstream: Tensor
    trains_teacher: bool
    described: str


def draw(seed: int, device: str) -> Case:
    """The case of this number, always the same one."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = [choose.randint(1, 5), *(choose.randint(1, 6) for _ in range(choose.randint(1, 4)))]
    if choose.random() < 0.05:
        shape = [choose.randint(1, 3), choose.randint(1000, 20000)]
    student_dtype = choose.choice(FACTOR_DTYPES)
    teacher_dtype = choose.choice((student_dtype, *FACTOR_DTYPES, *QUANTISED_DTYPES))
    student, how_student = _factor(choose, generator, shape, student_dtype, device)
    teacher, how_teacher = _factor(choose, generator, shape, teacher_dtype, device)
    if choose.random() < 0.05 and teacher_dtype == student_dtype:
        teacher, how_teacher = student.clone(), "the student's"
    p, reduction = choose.choice((1, 2)), choose.choice(("mean", "batchmean", "sum", "none"))
    weight: float | Tensor = choose.choice((1.0, 1.0, 250.0, -0.5, 0.0, 3))
    how_weight = str(weight)
    if choose.random() < 0.3:
        weight = torch.tensor(float(weight), dtype=choose.choice((torch.float32, torch.float64)))
        kind = choose.choice(("", "negated", "trained", "there"))
        weight = torch._neg_view(-weight) if kind == "negated" else weight
        weight = weight.requires_grad_() if kind == "trained" else weight.to(device) if kind == "there" else weight
        how_weight += f" as a tensor {kind}"
    number = reference.compute_dtype(student, teacher)
    count = shape[:1] if reduction == "none" else []
    kind = choose.choice(("plain", "plain", "negated", "expanded", "sliced", "zeros", "tiny"))
    upstream = torch.randn(count, generator=generator, dtype=number).to(device) * 10 ** choose.uniform(-3, 3)
    if kind == "negated":
        upstream = torch._neg_view(upstream)
    elif kind == "expanded":
        upstream = torch.full((), 1.5, dtype=number, device=device).expand(count)
    elif kind == "sliced":
        upstream = torch.randn([3 * size for size in count], generator=generator, dtype=number).to(device)
        upstream = upstream[::3] if count else upstream
    elif kind == "zeros":
        upstream = torch._efficientzerotensor(count, dtype=number, device=device)
    elif kind == "tiny":
        upstream = upstream * 1e-15
    eps = choose.choice(EPSILONS)
    trains_teacher = teacher_dtype in FACTOR_DTYPES and choose.random() < 0.5
    options = {"p": p, "reduction": reduction, "eps": eps, "weight": weight}
    described = (
        f"case {seed}: {shape}, student {student_dtype} {how_student}, teacher {teacher_dtype} {how_teacher}, p={p}, "
        f"{reduction}, eps={eps}, weight {how_weight}, upstream {kind}, trains_teacher={trains_teacher}"
    )
    return Case(student, teacher, options, upstream, trains_teacher, described)


def _factor(
    choose: random.Random, generator: torch.Generator, shape: list[int], dtype: torch.dtype, device: str
) -> tuple[Tensor, str]:
    steps = [choose.choice((1, 1, 1, 2)) for _ in shape]
    order = list(range(len(shape)))
    if choose.random() < 0.5:
        choose.shuffle(order)
    values = torch.randn([shape[d] * steps[d] for d in order], generator=generator, dtype=torch.float64)
    scale = choose.choice(SCALES) if choose.random() < 0.4 else 1.0
    if dtype in QUANTISED_DTYPES:
        scale = 1.0
        values = (values * 40).clamp(-120, 120)
    if dtype == torch.int8:
        values = values.round()
    limit = torch.finfo(dtype).max if dtype.is_floating_point else 127
    values = (values * scale).clamp(-limit, limit).to(dtype).to(device)
    factor = values.permute([order.index(d) for d in range(len(shape))])
    factor = factor[tuple(slice(None, None, step) for step in steps)]
    how = f"* {scale}, order {order}, steps {steps}"
    row = choose.randrange(shape[0])
    if dtype.is_floating_point and dtype not in QUANTISED_DTYPES:
        kind = choose.random()
        if kind < 0.1:
            factor[row] = 0
            how += f", row {row} zero"
        elif kind < 0.15:
            factor[row] = factor[row] * choose.choice(SCALES)
            how += f", row {row} scaled"
        elif kind < 0.2:
            value = choose.choice((math.nan, math.inf, -math.inf))
            factor[(row, *(0 for _ in shape[1:]))] = value
            how += f", row {row} with {value}"
        elif kind < 0.3:
            factor, how = torch._neg_view(factor), how + ", negated"
        elif kind < 0.32:
            factor, how = torch._efficientzerotensor(shape, dtype=dtype, device=device), how + ", zeros without memory"
        elif kind < 0.36:
            factor, how = factor[:1].expand(shape), how + ", expanded"
    return factor, how


def run(loss_function: Any, case: Case, **more: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of student and teacher."""
    student, teacher = case.student.detach().requires_grad_(), case.teacher.detach()
    if case.trains_teacher:
        teacher.requires_grad_()
    loss = loss_function(student, teacher, **case.options, **more)
    inputs = [student, teacher] if case.trains_teacher else [student]
    return loss.detach(), [*torch.autograd.grad(loss, inputs, case.upstream), None][:2]


@dataclass
class _Side:
    values: Tensor
    floor: Tensor
    clamped: Tensor

    @property
    def direction(self) -> Tensor:
        return self.values / self.floor


def _side(factor: Tensor, eps: float, number: torch.dtype) -> _Side:
    values = factor.clone().double().flatten(1)
    squares = values.square().sum(1, keepdim=True)
    if number == torch.float32:  # a norm beyond it is infinite
        squares = torch.where(squares > torch.finfo(number).max, math.inf, squares)
        eps = float(torch.tensor(max(eps, torch.finfo(number).tiny) if eps else 0.0, dtype=number))
    norm = squares.sqrt()
    clamped = norm < eps
    return _Side(values, torch.where(clamped, eps, norm), clamped)


def wrong(case: Case, loss: Tensor, gradients: list[Tensor | None], *, as_reference: bool) -> str:
    """What of a result is not right; "" where all of it is.

    Args:
        as_reference: a sample may also have what the reference computes in float32: kernels of a GPU sum there alone.
    """
    number = reference.compute_dtype(case.student, case.teacher)
    p, rounding = case.options["p"], ROUNDINGS[number]
    sides = [_side(factor, case.options["eps"], number) for factor in (case.student, case.teacher)]
    a, b = (side.direction for side in sides)
    finite = (a.isfinite() & b.isfinite()).all(1)
    # Under a floor of 0 the reciprocal of a norm below the normal numbers has no place in the compute dtype.
    if any(((side.floor > 0) & (side.floor < torch.finfo(number).tiny)).any() for side in sides):
        return ""
    # Of zeros without memory torch's own operators make 0 where a NaN meets them, and refuse some.
    in_memory = {name: getattr(case, name).clone() for name in ("student", "teacher", "upstream")}
    own_loss, own_gradients = run(reference.ft_loss, replace(case, **in_memory))
    samples, size = a.shape
    divisor = reference.reduction_divisor(samples, size, p=p, reduction=case.options["reduction"])
    weight = case.options["weight"]
    scale = (weight.item() if isinstance(weight, Tensor) else weight) / divisor
    difference = a - b
    length = difference.abs().sum(1) if p == 1 else difference.norm(dim=1)
    loose = as_reference | (length < torch.finfo(number).tiny)  # such a distance may count as 0
    # What the roundings of both directions, and of the norms that they are divided by, may do to their distance.
    noise = 8 * rounding * (a.abs().sum(1) + b.abs().sum(1) if p == 1 else a.norm(dim=1) + b.norm(dim=1))
    tiny = float(torch.finfo(number).tiny)
    right = length * scale
    allowed = (4 * rounding * length + noise) * abs(scale) + tiny
    if loss.dtype != number:
        return f"the loss is {loss.dtype}"
    got, own = loss.double(), own_loss.double()
    if case.options["reduction"] != "none":
        right, allowed, finite_loss = right.sum(), allowed.sum(), finite.all()
    else:
        finite_loss = finite
    near = (got - right).abs() <= allowed
    same = (got == own) | (got.isnan() & own.isnan()) | ((got - own).abs() <= allowed)
    good = torch.where(finite_loss, near | (same & loose.all()), same)
    if not good.all():
        return f"loss {got.tolist()} for {right.tolist()}, in the reference {own.tolist()}"
    g = difference.sign() if p == 1 else difference / torch.where(length > 0, length, 1.0)[:, None]
    upstream = case.upstream.clone().double().reshape(-1, 1)
    if p == 1:
        unsure = difference.abs() <= 4 * rounding * torch.maximum(a.abs(), b.abs())
        g_noise = 2.0 * unsure
    else:
        reciprocal = 1 / length.clamp(min=torch.finfo(number).smallest_normal * rounding)[:, None]
        relative = (noise[:, None] + torch.finfo(number).smallest_normal * rounding) * reciprocal
        g_noise = 8 * rounding * (a.abs() + b.abs()) * reciprocal + relative * g.abs()
        g_noise = torch.where(relative >= 0.1, 2.0, g_noise)
    for name, factor, gradient, own_gradient, side, sign in (
        ("student", case.student, gradients[0], own_gradients[0], sides[0], 1),
        ("teacher", case.teacher, gradients[1], own_gradients[1], sides[1], -1),
    ):
        if gradient is None or own_gradient is None:
            continue
        if gradient.dtype != factor.dtype or gradient.shape != factor.shape:
            return f"the {name}'s gradient is {gradient.dtype} {list(gradient.shape)}"
        x = side.direction
        product = torch.where(side.clamped, 0.0, (g * x).sum(1, keepdim=True))
        product_noise = (g_noise * x.abs()).sum(1, keepdim=True) + 8 * rounding * (g * x).abs().sum(1, keepdim=True)
        c = upstream * scale / side.floor
        right = c * sign * (g - x * product)
        allowed = c.abs() * (g_noise + x.abs() * product_noise + 16 * rounding * (g.abs() + (x * product).abs()))
        allowed = allowed + 2 * ROUNDINGS[factor.dtype] * right.abs() + tiny
        allowed = allowed + torch.finfo(factor.dtype).smallest_normal * ROUNDINGS[factor.dtype] * 2
        got, own = gradient.double().flatten(1), own_gradient.double().flatten(1)
        most = torch.finfo(factor.dtype).max * (1 - ROUNDINGS[factor.dtype])
        near = (got - right).abs() <= allowed
        near |= (right.abs() + allowed > most) & (got.abs() > most / 2) & (got.sign() == right.sign())
        same = (got == own) | (got.isnan() & own.isnan()) | ((got - own).abs() <= 1e-2 * own.abs() + tiny)
        good = torch.where(finite[:, None], near | (same & loose[:, None]), near | same)
        if not good.all():
            n, i = (~good).nonzero()[0].tolist()
            return (
                f"the {name}'s gradient at sample {n}, number {i} is {got[n, i].item()} for {right[n, i].item()}, "
                f"in the reference {own[n, i].item()}"
            )
    return ""
