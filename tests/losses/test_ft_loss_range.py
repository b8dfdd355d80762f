"""The loss where numbers leave a dtype's range or a tensor's memory is not its value: fixed cases, and random ones."""

import math

import pytest
import torch
from loss_cases import Case, draw, run, wrong
from torch import Tensor

import ftfast
from ftfast import reference
from ftfast.arguments import FACTOR_DTYPES, QUANTISED_DTYPES
from ftfast.diagnosis.check_loss import relative_error
from ftfast.ops.memory import plain

pytestmark = pytest.mark.usefixtures("overflow_unchecked")

# Random cases of each backend: Triton's interpreter takes a tenth of a second for one, its compiler more.
CASES = {("native", "cpu"): 10_000, ("native", "cuda"): 3000, ("triton", "cpu"): 500, ("triton", "cuda"): 200}


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def factors(device: str, *dtypes: torch.dtype, shape: tuple[int, ...] = (3, 4, 5)) -> list[Tensor]:
    made = [torch.randn(shape) for _ in dtypes]
    return [
        (each * 40).clamp(-120, 120).to(device, dtype) if dtype in QUANTISED_DTYPES else each.to(device, dtype)
        for each, dtype in zip(made, dtypes, strict=True)
    ]


def sums_in_float32(backend: str, device: str) -> bool:
    """A GPU's kernels have no second way for samples whose squares vanish in float32; nor has the reference."""
    return (backend, device) != ("native", "cpu")


def assert_right(student: Tensor, teacher: Tensor, backend: str, **options: object) -> None:
    """The loss and both gradients, where both are trained, of "none" under an upstream gradient of 1."""
    settings = {"p": 1, "reduction": "none", "eps": 1e-12, "weight": 1.0, **options}
    number = reference.compute_dtype(student, teacher)
    upstream = torch.ones(len(student), dtype=number, device=student.device)
    case = Case(student, teacher, settings, upstream, teacher.dtype in FACTOR_DTYPES, "")
    assert not wrong(
        case, *run(ftfast.ft_loss, case, backend=backend), as_reference=sums_in_float32(backend, student.device.type)
    )


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, *QUANTISED_DTYPES], ids=name)
def test_a_student_beyond_float32_against_any_teacher(backend, device, teacher_dtype, p):
    """Against int8 it was NaN."""
    student, teacher = factors(device, torch.float32, teacher_dtype)
    student[1] *= 1e25
    assert_right(student, teacher, backend, p=p)
    student *= 1e25
    assert_right(student.bfloat16(), teacher, backend, p=p)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_both_norms_beyond_the_compute_dtype(backend, device, dtype, p):
    student, teacher = factors(device, dtype, dtype)
    scale = 1e25 if dtype == torch.float32 else 1e200
    student[1:] *= scale
    teacher[:2] *= scale
    assert_right(student, teacher, backend, p=p)


@pytest.mark.parametrize("p", [1, 2])
def test_a_zero_student_under_a_tiny_eps(backend, device, p):
    """The squares of what is left of the teacher, in units of eps, were 0."""
    for dtype in (torch.float32, *QUANTISED_DTYPES):
        student, teacher = factors(device, torch.float32, dtype)
        student[1] = 0
        assert_right(student, teacher, backend, p=p, eps=1e-30)
    loss = ftfast.ft_loss(student, teacher, p=2, reduction="none", eps=1e-30, backend=backend)
    assert loss[1].item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("p", [1, 2])
def test_factors_of_very_unlike_sizes(backend, device, p):
    """A huge student against a tiny teacher was NaN: the ratio of their norms is beyond float32."""
    student, teacher = factors(device, torch.bfloat16, torch.float16)
    assert_right(student * 1e18, teacher * 1e-7, backend, p=p, eps=1e-30)
    student, teacher = factors(device, torch.bfloat16, torch.bfloat16)
    assert_right(student * 4e18, teacher * 1e-18, backend, p=p, eps=1e-30)
    assert_right(student * 1e-18, teacher * 4e18, backend, p=p, eps=1e-30)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1.0, math.inf])
def test_zero_subnormal_and_non_finite_samples_have_the_references_pattern(backend, device, eps, p):
    special = [0.0, 1e-40, math.nan, math.inf, -math.inf, 1.0]
    for dtype in (torch.float32, torch.float64):
        student, teacher = factors(device, dtype, dtype, shape=(36, 5))
        for n, value in enumerate(special * 6):
            for factor, each in ((student, value), (teacher, special[n // 6])):
                if each in (0.0, 1e-40):
                    factor[n] *= each
                elif each != 1.0:
                    factor[n, 2] = each
        if eps == 0 and dtype == torch.float32:  # the reciprocal of a subnormal norm has no place in float32
            subnormal = [(side.abs() > 0).any(1) & (side.abs() < 1e-37).all(1) for side in (student, teacher)]
            kept = ~(subnormal[0] | subnormal[1])
            student, teacher = student[kept], teacher[kept]
        assert_right(student, teacher, backend, p=p, eps=eps)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_students_nan_reaches_the_teachers_gradient_as_in_the_reference(backend, device, value, p):
    """For p=1 the sign of a NaN is 0, and so is that gradient: it was NaN."""
    student, teacher = factors(device, torch.float32, torch.float32)
    student[1, 2, 3] = value
    assert_right(student, teacher, backend, p=p)


@pytest.mark.parametrize("p", [1, 2])
def test_long_samples_are_summed_without_drift(backend, device, p):
    """Equal numbers are rounded the same way in every addition: 64 running sums were wrong in the fifth digit."""
    size = 2**21 if backend == "native" else 2**19
    student = torch.full((1, size), 1.1, device=device)
    teacher = torch.tensor([0.3, 0.7], device=device).repeat(1, size // 2)
    exact = reference.ft_loss(student.double(), teacher.double(), p=p)
    assert relative_error(ftfast.ft_loss(student, teacher, p=p, backend=backend), exact) < 1e-6
    loss = ftfast.ft_loss(student.requires_grad_(), teacher, p=p, backend=backend)
    assert relative_error(loss.detach(), exact) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 2])
def test_the_longest_samples_are_summed_without_drift(p):
    student, teacher = torch.full((2, 2**26), 1.1), torch.tensor([0.3, 0.7]).repeat(2, 2**25)
    student[1].normal_()
    teacher[1].normal_()
    loss = ftfast.ft_loss(student, teacher, p=p, reduction="none")
    exact = torch.cat([reference.ft_loss(s.double()[None], t.double()[None], p=p, reduction="none")
                       for s, t in zip(student, teacher, strict=True)])  # fmt: skip
    assert ((loss - exact).abs() / exact).max() < 1e-6


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES, ids=name)
@pytest.mark.parametrize("backend_or_reference", ["auto", "reference"])
def test_a_quantised_teacher_that_requires_a_gradient_is_refused(backend_or_reference, dtype):
    """float8_e4m3fn was written as two bytes an element: past the end of its memory."""
    student, teacher = factors("cpu", torch.float32, dtype)
    ftfast.ft_loss(student, teacher, backend=backend_or_reference)
    if dtype == torch.int8:
        return  # torch itself refuses
    with pytest.raises(TypeError, match=r"float8_e4m3fn and requires a gradient.*detach"):
        ftfast.ft_loss(student, teacher.requires_grad_(), backend=backend_or_reference)


def elsewhere(kind: str, tensor: Tensor) -> Tensor:
    """A tensor of the same value whose memory is not it, or zeros without memory."""
    if kind == "negated":
        return torch._neg_view(-tensor)
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["negated", "zeros"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", FACTOR_DTYPES, ids=name)
def test_tensors_whose_memory_is_not_their_value(backend, device, dtype, reduction, kind):
    """The upstream gradient's sign was lost, and zeros without memory were a segmentation fault."""
    student, teacher = factors(device, dtype, dtype)
    number = reference.compute_dtype(student, teacher)
    upstream = torch.randn(3 if reduction == "none" else (), device=device).to(number)
    options = {"p": 1, "reduction": reduction, "eps": 1e-12, "weight": 1.5}
    for odd in ("student", "teacher", "upstream"):
        given = {"student": student, "teacher": teacher, "upstream": upstream}
        given[odd] = elsewhere(kind, given[odd])
        for trains_teacher in (False, True):
            case = Case(**given, options=options, trains_teacher=trains_teacher, described="")
            assert not wrong(
                case, *run(ftfast.ft_loss, case, backend=backend), as_reference=sums_in_float32(backend, device)
            )


def test_the_gradient_behind_a_conjugate(backend, device):
    """autograd hands on a lazily negated view there."""
    student, teacher = factors(device, torch.float64, torch.float64)
    results = []
    for loss_function in (ftfast.ft_loss, reference.ft_loss):
        leaf = student.clone().requires_grad_()
        options = {"backend": backend} if loss_function is ftfast.ft_loss else {}
        loss = loss_function(leaf, teacher, reduction="none", **options)
        torch.complex(torch.zeros_like(loss), loss).conj().imag.sum().backward()
        results.append(leaf.grad)
    assert relative_error(*results) < 1e-12


def test_a_negated_weight_and_freed_memory(backend, device):
    student, teacher = factors(device, torch.float32, torch.float32)
    weight = torch._neg_view(torch.tensor(-2.0, device=device))
    expected = ftfast.ft_loss(student, teacher, weight=2.0, backend=backend)
    assert torch.equal(ftfast.ft_loss(student, teacher, weight=weight, backend=backend), expected)
    teacher.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory behind it"):
        ftfast.ft_loss(student, teacher, backend=backend)


def test_fake_tensors_are_the_references(backend, device):
    """Outside their mode they were given to the kernels, which read address 0."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        student, teacher = torch.empty(3, 4, device=device), torch.empty(3, 4, device=device)
    if backend == "native" and device == "cpu":
        assert type(ftfast.ft_loss(student, teacher)) is type(student)
    with pytest.raises(RuntimeError, match="FakeTensor"):
        ftfast.ft_loss(student, teacher, backend=backend)


def test_plain_is_the_tensor_itself_where_it_can_be():
    tensor = torch.randn(3)
    assert plain(tensor) is tensor
    assert plain(tensor[:0]) is not None
    assert torch.equal(plain(torch._neg_view(tensor)), -tensor)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned", "one_thread")
def test_random_cases(backend, device):
    """Ten thousand on the CPU, half a minute of one core: any shape, strides, dtypes, values, options and upstream."""
    for seed in range(CASES[backend, device]):
        case = draw(seed, device)
        try:
            problem = wrong(
                case, *run(ftfast.ft_loss, case, backend=backend), as_reference=sums_in_float32(backend, device)
            )
        except Exception as error:
            raise AssertionError(case.described) from error
        assert not problem, f"{case.described}: {problem}"
