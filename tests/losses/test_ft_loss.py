"""The contract of ft_loss on every backend with kernels of its own, against the float64 reference."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ftfast
from ftfast import reference
from ftfast.backends.triton import interpreting
from ftfast.diagnosis.check_loss import GRADIENT_BOUNDS, LAYOUTS, LOSS_BOUNDS, make_factors, relative_error
from ftfast.dispatch import BACKENDS

pytestmark = pytest.mark.usefixtures("overflow_unchecked")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "batchmean", "sum", "none"]


def name(dtype):
    return str(dtype).removeprefix("torch.")


def gradients(loss_function, student, teacher, upstream=None, teacher_too=False, **options):
    student = student.detach().requires_grad_()
    teacher = teacher.detach().requires_grad_(teacher_too)
    loss = loss_function(student, teacher, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return loss.detach(), *torch.autograd.grad(loss, [student, teacher] if teacher_too else [student], upstream)


def unprojected_norm(factor, upstream, p=1, reduction="mean", eps=1e-12, weight=1.0):
    """The length of a gradient before its radial part is taken out: what rounding errors are proportional to."""
    flat = factor.detach().double().flatten(1)
    samples, size = flat.shape
    divisor = reference.reduction_divisor(samples, size, p=p, reduction=reduction)
    row = (upstream.double().cpu() * float(weight) / divisor) / flat.norm(dim=1).clamp_min(eps).cpu()
    return row.norm().item() * (size**0.5 if p == 1 else 1)


def assert_matches(student, teacher, backend, upstream=None, teacher_too=False, **options):
    """Loss and gradients within a rounding of float64's, in the dtype and strides that the contract says."""
    upstream = torch.tensor(1.0) if upstream is None else upstream
    got = gradients(ftfast.ft_loss, student, teacher, upstream, teacher_too, backend=backend, **options)
    exact = gradients(reference.ft_loss, student.double(), teacher.double(), upstream, teacher_too, **options)
    compute = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    rounding = torch.finfo(compute).eps
    assert got[0].dtype == compute
    # two unit vectors: their distance carries rounding errors of unit size, however near they are
    assert (got[0].double() - exact[0]).norm() <= LOSS_BOUNDS[compute] * exact[0].norm() + (
        2 * rounding * abs(float(options.get("weight", 1.0)))
    )
    for gradient, right, factor in zip(got[1:], exact[1:], (student, teacher), strict=False):
        assert gradient.dtype == factor.dtype
        assert gradient.stride() == torch.empty_like(factor).stride()
        bound = max(GRADIENT_BOUNDS[factor.dtype], GRADIENT_BOUNDS[compute])
        error = (gradient.double() - right).norm().item()
        assert error <= bound * right.norm().item() + 4 * rounding * unprojected_norm(factor, upstream, **options)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("p", [1, 2])
def test_matches_float64_under_a_random_upstream_gradient(backend, device, p, dtype, layout):
    student, teacher = (factor.to(device) for factor in make_factors(dtype, layout, (5, 12, 7, 7)))
    upstream = torch.tensor(5 * 12 * 49.0) * 1.37
    assert_matches(student, teacher, backend, upstream, p=p)
    assert_matches(student, teacher, backend, upstream, p=p, teacher_too=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("p", [1, 2])
def test_reductions_weight_and_upstream(backend, device, p, reduction):
    student, teacher = (factor.to(device) for factor in make_factors(torch.float32, "nchw", (5, 8, 3, 3)))
    upstream = torch.randn(5).to(device) if reduction == "none" else torch.tensor(-3.5)
    for weight in (1.0, 250.0, torch.tensor(0.5), torch.tensor(7.0, device=device)):
        assert_matches(student, teacher, backend, upstream, p=p, reduction=reduction, weight=weight)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda it: "-".join(map(name, it)))
def test_mixed_dtypes(backend, device, dtypes):
    student, teacher = torch.randn(3, 40).to(device, dtypes[0]), torch.randn(3, 40).to(device, dtypes[1])
    assert_matches(student, teacher, backend, torch.tensor(99.0), teacher_too=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=name)
def test_quantised_teacher_factors_need_no_scale(backend, device, dtype, stored):
    student = torch.randn(4, 20, 5, 7).to(device, dtype)
    teacher = (torch.randn(4, 20, 5, 7) * 40).clamp(-120, 120).to(stored).to(device)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_matches(student, teacher.contiguous(memory_format=layout), backend, torch.tensor(99.0))
    scaled = ftfast.ft_loss(student, teacher.to(dtype) / 64, backend=backend)
    assert relative_error(ftfast.ft_loss(student, teacher, backend=backend), scaled.double()) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1, 1, 1), (2, 5, 1, 3), (7, 33), (2, 3, 4, 5, 6), (3, 1001)])
def test_odd_sizes(backend, device, shape):
    for p in (1, 2):
        assert_matches(torch.randn(shape).to(device), torch.randn(shape).to(device), backend, p=p)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_strides(backend, device, data):
    """Permuted, sliced, flipped-in-order and expanded factors, each its own way."""

    def draw_factor(shape):
        steps = [data.draw(st.integers(1, 2)) for _ in shape]
        order = data.draw(st.permutations(range(len(shape))))
        wide = torch.randn([shape[d] * steps[d] for d in order])
        factor = wide.permute([order.index(d) for d in range(len(shape))])
        return factor[tuple(slice(None, None, step) for step in steps)]

    shape = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    student, teacher = draw_factor(shape).to(device), draw_factor(shape).to(device)
    assert_matches(student, teacher, backend, torch.tensor(10.0), teacher_too=data.draw(st.booleans()))


def test_expanded_factors(backend, device):
    student = torch.randn(4, 3, 1, 1).expand(4, 3, 5, 5).to(device)
    teacher = torch.randn(1, 3, 5, 5).expand(4, 3, 5, 5).to(device)
    assert_matches(student, teacher, backend)


def test_samples_of_any_stride(backend, device):
    student = torch.randn(8, 4, 3, 3).to(device)[::2]
    teacher = torch.randn(4, 3, 3, 4).to(device).permute(3, 0, 1, 2)
    assert_matches(student, teacher, backend)
    assert_matches(teacher, student, backend)


def test_a_student_whose_samples_interleave_under_another_upstream_gradient(backend, device):
    """Every second row of the scaled gradient was that of another sample."""
    student, teacher = torch.randn(64, 6).to(device).t(), torch.randn(6, 64).to(device)
    assert_matches(student, teacher, backend, torch.tensor(2.0))
    student = torch.randn(3, 5, 4).to(device).transpose(0, 1)
    assert_matches(student, torch.randn(5, 3, 4).to(device), backend, torch.randn(5).to(device), reduction="none")


@pytest.mark.parametrize("p", [1, 2])
def test_equal_factors_have_no_loss_and_no_gradient(backend, device, p):
    for dtype in DTYPES:
        factor = torch.randn(3, 20, 3, 3).to(device, dtype)
        for teacher in (factor.clone(), factor.contiguous(memory_format=torch.channels_last)):
            loss, gradient = gradients(ftfast.ft_loss, factor, teacher, p=p, backend=backend)
            assert loss == 0
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ties_get_sign_zero(backend, device):
    """Half of the elements tie exactly; they may only get the radial part of the gradient."""
    student = torch.tensor([[3.0, 4.0, 0.0, 0.0, 1.0, -1.0]]).to(device)
    teacher = torch.tensor([[3.0, 4.0, 1.0, -1.0, 0.0, 0.0]]).to(device)
    assert_matches(student, teacher, backend)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("p", [1, 2])
def test_zero_rows_are_finite_and_as_the_reference(backend, device, p, which):
    for dtype in DTYPES:
        student, teacher = torch.randn(4, 3, 4, 4).to(device, dtype), torch.randn(4, 3, 4, 4).to(device, dtype)
        if which != "teacher":
            student[1] = 0
        if which != "student":
            teacher[1] = 0
        # the gradient of a zero row is g / eps, beyond float16's range unless upstream is as small
        upstream = torch.tensor(192.0 if which == "teacher" else 192e-12)
        got = gradients(ftfast.ft_loss, student, teacher, upstream, p=p, backend=backend)
        assert all(torch.isfinite(value).all() for value in got)
        exact = gradients(reference.ft_loss, student.double(), teacher.double(), upstream, p=p)
        noise = 1e-6 * unprojected_norm(student, upstream, p=p)  # p=2 against a zero teacher has gradient 0
        assert (got[1][1] - exact[1][1]).norm() <= 2**-8 * exact[1][1].norm() + noise


def test_clamped_norms_are_constants(backend, device):
    student, teacher = torch.randn(4, 30).to(device), torch.randn(4, 30).to(device)
    student[0] *= 1e-3
    assert_matches(student, teacher, backend, teacher_too=True, eps=0.5)
    assert_matches(student, teacher, backend, teacher_too=True, eps=50.0)
    assert_matches(student, teacher, backend, teacher_too=True, eps=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_come_through_as_in_the_reference(backend, device, dtype, p, value):
    for side in range(2):
        factors = [torch.randn(3, 10).to(device, dtype), torch.randn(3, 10).to(device, dtype)]
        factors[side][1, 4] = value
        got = gradients(ftfast.ft_loss, *factors, p=p, reduction="none", backend=backend)
        exact = gradients(reference.ft_loss, *(factor.float() for factor in factors), p=p, reduction="none")
        for mine, right in zip(got, exact, strict=True):
            torch.testing.assert_close(mine.float(), right, rtol=1e-2, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("teacher_too", [False, True])
def test_a_norm_beyond_float32_sends_the_direction_to_zero_as_in_the_reference(backend, device, p, teacher_too):
    for side in range(2):
        factors = [torch.randn(3, 10).to(device), torch.randn(3, 10).to(device)]
        factors[side][1] *= 1e25
        options = {"p": p, "reduction": "none", "teacher_too": teacher_too}
        got = gradients(ftfast.ft_loss, *factors, backend=backend, **options)
        exact = gradients(reference.ft_loss, *factors, **options)
        for mine, right in zip(got, exact, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-7)  # p=2 against direction 0 has gradient 0


@pytest.mark.parametrize("p", [1, 2])
def test_sizes_near_the_ends_of_float32(backend, device, p):
    for student_size, teacher_size, eps in ((4e18, 1.0, 1e-12), (1.0, 4e18, 1e-12), (0.0, 1.0, 1e-30), (1e-3, 1e15, 0)):
        student, teacher = torch.randn(3, 10).to(device) * student_size, torch.randn(3, 10).to(device) * teacher_size
        loss = ftfast.ft_loss(student, teacher, p=p, eps=eps, backend=backend)
        assert relative_error(loss, reference.ft_loss(student.double(), teacher.double(), p=p, eps=eps)) < 1e-6


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("p", [1, 2])
def test_no_samples_gives_what_torch_gives(p, reduction):
    empty = torch.empty(0, 3, 2, 2, requires_grad=True)
    loss = ftfast.ft_loss(empty, torch.empty(0, 3, 2, 2), p=p, reduction=reduction)
    expected = {"sum": 0.0}.get(reduction, math.nan)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert torch.equal(loss.detach().isnan().any(), torch.tensor(math.isnan(expected) and reduction != "none"))
    loss.sum().backward()
    assert empty.grad.shape == empty.shape


def test_float16_gradients_survive_below_its_range(backend, device):
    """The mean-form gradient of this size is under float16's smallest subnormal; a loss scale must bring it back."""
    student, teacher = torch.randn(32, 256, 7, 7).to(device).half(), torch.randn(32, 256, 7, 7).to(device).half()
    scale = torch.tensor(2.0**16)
    got = gradients(ftfast.ft_loss, student, teacher, scale, backend=backend)
    exact = gradients(reference.ft_loss, student.double(), teacher.double(), scale)
    assert exact[1].abs().max() / scale < 6e-8
    assert relative_error(got[1], exact[1]) < 2e-3


# The larger ones are shared by three threads, and by a sample's place in a share hangs which walk sums its squares.
@pytest.mark.parametrize("shape", [(13, 8, 7, 7), (25, 2047), (9, 6001)])
def test_bit_equal_from_run_to_run_and_for_any_thread_count(backend, device, shape):
    if interpreting() and len(shape) == 2:
        pytest.skip("one thread interprets them, slowly")
    student, teacher = torch.randn(shape).to(device), torch.randn(shape).to(device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(gradients(ftfast.ft_loss, student, teacher, torch.tensor(512.0), backend=backend))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_backward_twice_with_retain_graph_gives_the_same_gradient(backend, device):
    for dtype in DTYPES:
        student = torch.randn(3, 50).to(device, dtype).requires_grad_()
        loss = ftfast.ft_loss(student, torch.randn(3, 50).to(device, dtype), backend=backend)
        upstream = torch.tensor(3.0).to(loss)
        (first,) = torch.autograd.grad(loss, student, upstream, retain_graph=True)
        kept = first.clone()
        first.zero_()  # whoever received a gradient may write to it
        (second,) = torch.autograd.grad(loss, student, upstream, retain_graph=True)
        (third,) = torch.autograd.grad(loss, student, upstream)
        assert torch.equal(kept, second)
        assert torch.equal(kept, third)


@pytest.mark.parametrize("upstream", [1.0, 3.7])
def test_a_factor_changed_after_the_call_is_told_of_or_does_not_reach_the_gradient(backend, device, upstream):
    given, teacher = torch.randn(3, 50).to(device).requires_grad_(), torch.randn(3, 50).to(device)
    (expected,) = torch.autograd.grad(upstream * ftfast.ft_loss(given, teacher, backend=backend), given)
    student = given * 1
    loss = upstream * ftfast.ft_loss(student, teacher, backend=backend)
    student.detach().neg_()
    try:
        (got,) = torch.autograd.grad(loss, given)
    except RuntimeError as error:
        assert "inplace operation" in str(error)  # noqa: PT017
    else:
        assert torch.equal(got, expected)
    with pytest.raises(RuntimeError, match=r"second time|inplace operation"):
        torch.autograd.grad(loss, given)


def test_a_factor_of_another_size_in_backward_is_refused(backend, device):
    student, teacher = (torch.nn.Parameter(torch.randn(4, 70, device=device)) for _ in range(2))
    for changed in (student, teacher):
        loss = ftfast.ft_loss(student, teacher, backend=backend)
        before, changed.data = changed.data, torch.randn(2, 3, device=device)
        with pytest.raises(RuntimeError, match="shape"):
            torch.autograd.grad(loss, (student, teacher), torch.tensor(2.0).to(loss))
        changed.data = before


def test_the_default_device_is_not_that_of_the_factors(backend, device):
    student, teacher = torch.randn(3, 47, device=device, requires_grad=True), torch.randn(3, 47, device=device)
    with torch.device("meta"):
        loss = ftfast.ft_loss(student, teacher, backend=backend)
        loss.backward()
    torch.testing.assert_close(loss, reference.ft_loss(student, teacher))
    assert student.grad.device == student.device


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("p", [1, 2])
def test_a_steady_upstream_gradient_is_written_in_forward_with_backwards_bits(monkeypatch, backend, device, p, dtype):
    """A step's beta is the one of the step before: no second pass over the factors, and not one bit of difference."""
    samples = 2 if interpreting() else 5
    student, teacher = (torch.randn(samples, 91, 7, 7).to(device, dtype) for _ in range(2))
    teacher[1] = torch.randint(-8, 9, (91, 7, 7))
    student[1] = 3 * teacher[1]  # one direction but for the norms' rounding
    plan, passes = BACKENDS[backend].launchers(torch.device(device)).LossPlan, []
    launch = plan.backward
    monkeypatch.setattr(plan, "backward", lambda *args: passes.append(1) or launch(*args))

    def step(upstream):
        begun = len(passes)
        (gradient,) = gradients(ftfast.ft_loss, student, teacher, torch.tensor(upstream), p=p, backend=backend)[1:]
        return gradient, len(passes) - begun

    values = [3.0, 3.0, 3.0, 3.0, -0.37, 3.0, 3.0, 3.0, 3.0]
    steps = [step(upstream) for upstream in values]
    same = [gradient for (gradient, _), upstream in zip(steps, values, strict=True) if upstream == 3]
    assert all(torch.equal(gradient, same[0]) for gradient in same)
    steady = 0 if device == "cpu" and BACKENDS[backend].expects_upstream else 1
    assert [steps[place][1] for place in (3, 4, 8)] == [steady, 1, steady]
    assert [step(float(number))[1] for number in range(9)] == [1] * 9  # beta's warm-up


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("size", [49 * 512, 49 * 512 - 1])
def test_samples_of_a_batch_beyond_the_caches_have_the_bits_that_they_have_alone(backend, device, dtype, size):
    """Large gradients are stored past the caches, where their memory is aligned."""
    samples, steps = 140, 3  # in the last step forward writes the student's gradient
    if backend == "triton":  # where it never does
        samples, steps = 4 if interpreting() else 8, 1
    student, teacher = (torch.randn(samples, size).to(device, dtype) for _ in range(2))
    upstream, options = torch.tensor(2.0), {"reduction": "sum", "backend": backend}
    for _ in range(steps):
        (whole,) = gradients(ftfast.ft_loss, student, teacher, upstream, **options)[1:]
        (alone,) = gradients(ftfast.ft_loss, student[-3:], teacher[-3:], upstream, **options)[1:]
        assert torch.equal(whole[-3:], alone)
    both = gradients(ftfast.ft_loss, student, teacher, upstream, True, **options)[1:]
    both_alone = gradients(ftfast.ft_loss, student[-3:], teacher[-3:], upstream, True, **options)[1:]
    assert torch.equal(both[0], whole)
    assert all(torch.equal(one[-3:], other) for one, other in zip(both, both_alone, strict=True))


def test_used_twice_in_one_step(backend, device):
    student = torch.randn(3, 50).to(device).requires_grad_()
    one, other = torch.randn(3, 50).to(device), torch.randn(3, 50).to(device)

    def both(loss_function, student, **options):
        return loss_function(student, one.to(student), **options) + 2 * loss_function(
            student, other.to(student), **options
        )

    (got,) = torch.autograd.grad(both(ftfast.ft_loss, student, backend=backend), student)
    double = student.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(both(reference.ft_loss, double), double)
    assert relative_error(got, exact) < 1e-6


def test_a_teacher_that_requires_a_gradient_gets_one(backend, device):
    student, teacher = torch.randn(3, 50).to(device), torch.randn(3, 50).to(device).requires_grad_()
    ftfast.ft_loss(student, teacher, backend=backend).backward()
    assert teacher.grad is not None
    assert teacher.grad.abs().max() > 0


def test_weight_tensor_may_require_a_gradient(backend, device):
    weight = torch.tensor(2.0, device=device, requires_grad=True)
    student, teacher = torch.randn(3, 50).to(device), torch.randn(3, 50).to(device)
    ftfast.ft_loss(student, teacher, weight=weight, backend=backend).backward()
    assert relative_error(weight.grad, reference.ft_loss(student.double(), teacher.double())) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_weight_changed_after_the_call_does_not_reach_its_gradient(backend, device, dtype):
    student, teacher = torch.randn(3, 50).to(device, dtype).requires_grad_(), torch.randn(3, 50).to(device, dtype)
    weight = torch.tensor(1.0)
    loss = ftfast.ft_loss(student, teacher, weight=weight, backend=backend)
    (expected,) = torch.autograd.grad(ftfast.ft_loss(student, teacher, backend=backend), student)
    weight.fill_(100.0)
    (got,) = torch.autograd.grad(loss, student)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_teacher_factor_made_under_inference_mode(backend, device, dtype):
    student = torch.randn(3, 50).to(device, dtype).requires_grad_()
    with torch.inference_mode():
        teacher = torch.randn(3, 50).to(device, dtype) * 1
    (got,) = torch.autograd.grad(ftfast.ft_loss(student, teacher, backend=backend), student)
    (expected,) = torch.autograd.grad(ftfast.ft_loss(student, teacher.clone(), backend=backend), student)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name)
def test_batched_gradients(backend, device, dtype):
    student, teacher = torch.randn(3, 50).to(device, dtype).requires_grad_(), torch.randn(3, 50).to(device, dtype)
    loss = ftfast.ft_loss(student, teacher, reduction="none", backend=backend)
    upstreams = torch.eye(3, device=device, dtype=loss.dtype)
    (got,) = torch.autograd.grad(loss, student, upstreams, is_grads_batched=True, retain_graph=True)
    for row, upstream in zip(got, upstreams, strict=True):
        (expected,) = torch.autograd.grad(loss, student, upstream, retain_graph=True)
        torch.testing.assert_close(row, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_float64_weight_does_not_change_the_losss_dtype(backend, device):
    student, teacher = torch.randn(3, 50).to(device), torch.randn(3, 50).to(device)
    for weight in (torch.tensor(2.0).double(), torch.tensor(2.0).double().requires_grad_()):
        assert ftfast.ft_loss(student, teacher, weight=weight, backend=backend).dtype == torch.float32
        assert reference.ft_loss(student, teacher, weight=weight).dtype == torch.float32


def test_loss_is_never_rounded_to_16_bits_under_autocast(backend, device):
    student, teacher = torch.randn(3, 50).to(device).bfloat16(), torch.randn(3, 50).to(device).bfloat16()
    exact = reference.ft_loss(student.double(), teacher.double())
    with torch.autocast(device, torch.bfloat16):
        loss = ftfast.ft_loss(student, teacher, backend=backend)
    assert loss.dtype == torch.float32
    assert relative_error(loss, exact) < 1e-6


def saved_bytes(function):
    total = 0

    def count(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        function()
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_memory_kept_for_backward(backend, device, dtype):
    """The two factors and O(N) scalars, and on the CPU the gradient: nothing more."""
    student = torch.randn(8, 64, 7, 7).to(device, dtype).requires_grad_()
    teacher = torch.randn(8, 64, 7, 7).to(device, dtype)
    factors = 2 * student.numel() * student.element_size()
    scalars = 8 * 8 * 8
    gradient = factors // 2 if device == "cpu" and BACKENDS[backend].expects_upstream else 0
    assert saved_bytes(lambda: ftfast.ft_loss(student, teacher, backend=backend)) <= factors + scalars + gradient


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("p", [1, 2])
def test_gradcheck_and_gradgradcheck(backend, device, p, reduction):
    shape = (2, 2, 1, 2) if interpreting() else (3, 2, 1, 3)  # each element moves twice, and a call takes long there
    student, teacher = (torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))

    def loss(s, t):
        return ftfast.ft_loss(s, t, p=p, reduction=reduction, weight=1.5, backend=backend)

    torch.autograd.gradcheck(loss, (student, teacher))
    torch.autograd.gradgradcheck(loss, (student, teacher))


def test_a_second_derivative_is_right_or_raises(backend, device):
    student, teacher = torch.randn(3, 20).to(device).requires_grad_(), torch.randn(3, 20).to(device)
    loss = ftfast.ft_loss(student, teacher, p=2, backend=backend)
    exact = student.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(reference.ft_loss(exact, teacher.double(), p=2), exact, create_graph=True)
    (right,) = torch.autograd.grad(first.square().sum(), exact)
    try:
        (first,) = torch.autograd.grad(loss, student, create_graph=True)
    except RuntimeError as error:
        assert "reference" in str(error)  # noqa: PT017
    else:
        (got,) = torch.autograd.grad(first.square().sum(), student)
        assert relative_error(got, right) < 1e-5


def test_the_module_is_the_function(backend, device):
    student, teacher = torch.randn(3, 20).to(device), torch.randn(3, 20).to(device)
    module = ftfast.FTLoss(2, "sum", 1e-3, 4.0, backend)
    expected = ftfast.ft_loss(student, teacher, p=2, reduction="sum", eps=1e-3, weight=4.0, backend=backend)
    assert torch.equal(module(student, teacher), expected)
    module.weight = 8.0
    torch.testing.assert_close(module(student, teacher), 2 * expected)
    assert "reduction='sum'" in repr(module)
    assert not module.state_dict()


def test_drop_in_for_the_official_formula():
    """What training code holds today, on a channels_last map where its .view raises."""
    s = torch.randn(4, 8, 5, 5).to(memory_format=torch.channels_last)
    t = torch.randn(4, 8, 5, 5).to(memory_format=torch.channels_last)
    official = torch.nn.L1Loss()(F.normalize(s.reshape(4, -1)), F.normalize(t.reshape(4, -1)))
    torch.testing.assert_close(ftfast.FTLoss()(s, t), official, rtol=1e-6, atol=0)
