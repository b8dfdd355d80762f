"""The difference of attention maps is float64's, in value and gradient, whatever the dtype, layout and sizes."""

import math

import pytest
import torch
from torch import Tensor

from ftfast import reference
from ftfast.ops.attention.difference import attention_difference
from ftfast.ops.attention.map import attention_map

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDED_ONCE = {torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
SHAPES = [(4, 32, 7, 7), (2, 6, 14, 14), (3, 5, 2, 3), (2, 70, 1, 9), (1, 17, 50, 60), (5, 1, 4, 4), (2, 33, 1, 1)]


def features_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str = "nchw") -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "slices":
        return torch.stack([values, values], dim=-1)[..., 0]
    return values


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


@pytest.mark.parametrize("exponent", [1, 2, 3, 4, 2.5])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_every_exponent_and_order_in_both_layouts(exponent: float, p: int) -> None:
    for layout in ("nchw", "channels_last", "slices"):
        for shape in SHAPES[:3]:
            student = features_of(shape, torch.float32, 1, layout).abs().requires_grad_()
            teacher = features_of(shape, torch.float32, 2, layout).abs()
            wide = student.detach().double().requires_grad_()
            found = attention_difference(student, teacher, exponent=exponent, p=p)
            expected = reference.attention_difference(wide, teacher.double(), exponent=exponent, p=p)
            found.backward()
            expected.backward()
            assert found.dtype == torch.float32
            assert relative(found, expected) < 2e-5
            assert relative(student.grad, wide.grad) < 2e-4  # the loss subtracts neighbours; inputs are float32
            assert student.grad.stride() == student.stride() or layout == "slices"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_maps_and_their_gradients_are_rounded_once(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    for exponent in (1, 2, 3, 4):
        features = features_of(shape, dtype, 3, layout).requires_grad_()
        wide = features.detach().double().requires_grad_()
        found, expected = attention_map(features, exponent), reference.attention_map(wide, exponent)
        upstream = torch.linspace(-1, 1, found.numel()).view_as(found) + 0.01
        found.backward(upstream)
        expected.backward(upstream.double())
        assert found.dtype == torch.float32
        assert relative(found, expected) < 5e-6
        assert features.grad.dtype == dtype
        assert relative(features.grad, wide.grad) < ROUNDED_ONCE[dtype]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(140, 64, 14, 14), (140, 63, 14, 13), (8, 80, 50, 53)], ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_samples_of_a_batch_beyond_the_caches_have_the_bits_that_they_have_alone(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    """Large gradients are stored past the caches, in aligned registers wherever a sample begins."""
    features = features_of((2 * shape[0], *shape[1:]), dtype, 11, layout)
    whole, alone = features.clone().requires_grad_(), features[-3:].clone().requires_grad_()
    maps, maps_alone = attention_map(whole, 2), attention_map(alone, 2)
    upstream = torch.randn(maps.shape, generator=torch.Generator().manual_seed(12))
    maps.backward(upstream)
    maps_alone.backward(upstream[-3:])
    assert torch.equal(maps[-3:], maps_alone)
    assert torch.equal(whole.grad[-3:], alone.grad)


def test_both_sides_get_a_gradient_and_channels_and_sizes_may_differ() -> None:
    student = features_of((3, 8, 4, 4), torch.float32, 4).requires_grad_()
    teacher = features_of((3, 20, 8, 8), torch.bfloat16, 5).requires_grad_()
    sides = [side.detach().double().requires_grad_() for side in (student, teacher)]
    attention_difference(student, teacher).backward()
    reference.attention_difference(*sides).backward()
    assert relative(student.grad, sides[0].grad) < 1e-5
    assert relative(teacher.grad, sides[1].grad) < 2**-8


def test_gradients_of_gradients() -> None:
    student, teacher = (features_of((2, 3, 3, 3), torch.float64, seed) + 3 for seed in (6, 7))
    assert torch.autograd.gradcheck(lambda s: attention_difference(s, teacher, p=2), student.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda s: attention_difference(s, teacher, p=2), student)
    wide = student.detach().requires_grad_()
    narrow = student.detach().float().requires_grad_()
    found = []
    for side in (narrow, wide):
        (first,) = torch.autograd.grad(attention_map(side, 3).sum(), side, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), side)[0])
    assert relative(*found) < 1e-5


def test_a_zero_sample_is_finite_and_its_neighbours_do_not_notice() -> None:
    student, teacher = (features_of((3, 4, 5, 5), torch.float32, seed) for seed in (8, 9))
    student[1] = 0
    student.requires_grad_()
    attention_difference(student, teacher).backward()
    assert torch.isfinite(student.grad).all()
    assert not student.grad[1].any()
    alone = student.detach()[[0, 2]].requires_grad_()
    attention_difference(alone, teacher[[0, 2]]).backward()
    torch.testing.assert_close(student.grad[[0, 2]] * 3 / 2, alone.grad, rtol=1e-5, atol=0)


def test_float16_neither_overflows_nor_vanishes() -> None:
    student, teacher = (features_of((4, 8, 6, 6), torch.float16, seed) * 500 for seed in (10, 11))
    student.requires_grad_()
    wide = student.detach().double().requires_grad_()
    (attention_difference(student, teacher) * 65536).backward()
    (reference.attention_difference(wide, teacher.double()) * 65536).backward()
    assert relative(student.grad, wide.grad) < 2**-10


@pytest.mark.parametrize("samples", [4, 8])
def test_neither_autocast_nor_a_gradient_changes_a_bit_of_the_loss(samples: int) -> None:
    student, teacher = (features_of((samples, 8, 6, 6), torch.float32, seed) for seed in (12, 13))
    for p in (1, 2):
        expected = attention_difference(student, teacher, p=p)
        assert torch.equal(attention_difference(student.clone().requires_grad_(), teacher, p=p).detach(), expected)
    expected = attention_difference(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_difference(student, teacher), expected)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slices"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_batches_whose_gradient_is_written_with_the_loss(dtype: torch.dtype, p: int, layout: str) -> None:
    scale = 2.0**16 if dtype == torch.float16 else 1.0  # as a GradScaler keeps gradients from becoming subnormal
    for exponent, shape in ((2, (9, 12, 7, 7)), (3, (8, 5, 50, 60)), (1, (16, 33, 1, 5))):
        student = features_of(shape, dtype, 31, layout).abs().requires_grad_()
        teacher = features_of((shape[0], 7, *shape[2:]), torch.float32, 32).abs()
        wide = student.detach().double().requires_grad_()
        reference.attention_difference(wide, teacher.double(), exponent=exponent, p=p).backward()
        for upstream in (scale, scale, 250 * scale, 250 * scale, 250 * scale):  # unlike at times, then as expected
            student.grad = None
            loss = attention_difference(student, teacher, exponent=exponent, p=p)
            (loss * upstream).backward()
            assert relative(loss, reference.attention_difference(wide, teacher.double(), exponent=exponent, p=p)) < 2e-5
            assert relative(student.grad, wide.grad * upstream) < max(2e-4, 2 * ROUNDED_ONCE[dtype])
            assert student.grad.stride() == student.stride() or layout == "slices"


@pytest.mark.parametrize("p", [1, 2])
def test_no_bit_depends_on_the_upstream_gradients_before(p: int) -> None:
    """A training that goes on in a new process has seen none of them."""
    student = features_of((8, 13, 6, 6), torch.float32, 39).requires_grad_()
    teacher = features_of((8, 13, 6, 6), torch.float32, 40)
    results = []
    for upstream in (7.3, 7.3, 7.3, 1.9, 2.9, 7.3, 7.3, 7.3):
        student.grad = None
        loss = attention_difference(student, teacher, p=p)
        (loss * upstream).backward()
        if upstream == 7.3:
            results.append(torch.cat([student.grad.flatten(), loss.detach()[None]]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("p", [1, 2])
def test_a_batch_walked_twice_and_a_gradient_that_was_written_to(p: int) -> None:
    student = features_of((8, 4, 5, 5), torch.float32, 33).requires_grad_()
    loss = attention_difference(student, features_of((8, 4, 5, 5), torch.float32, 34), p=p)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(second, expected)
    (twice,) = torch.autograd.grad(loss, student, create_graph=True)
    assert relative(twice, expected) < 1e-5
    assert torch.autograd.grad(twice.square().sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("samples", [3, 8])
def test_a_teacher_overwritten_before_backward_changes_nothing(samples: int) -> None:
    """Loaders reuse their buffers, and of the teacher its map alone is kept."""
    student = features_of((samples, 4, 5, 5), torch.float32, 35).requires_grad_()
    teacher = features_of((samples, 4, 5, 5), torch.float32, 36)
    (expected,) = torch.autograd.grad(attention_difference(student, teacher) * 3.7, student)
    for overwrite in (lambda: teacher.add_(1), lambda: teacher.detach().numpy().fill(2)):
        loss = attention_difference(student, teacher) * 3.7
        kept = teacher.clone()
        overwrite()
        assert torch.equal(torch.autograd.grad(loss, student)[0], expected)
        teacher.copy_(kept)


def test_every_bit_is_the_same_on_any_number_of_threads() -> None:
    student, teacher = (features_of((4, 40, 30, 30), torch.float32, seed) for seed in (14, 15))
    threads, results, gradients = torch.get_num_threads(), [], []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.stack([attention_map(student, 2), attention_map(teacher, 3)]))
            batch = features_of((12, 6, 9, 9), torch.float32, 37).requires_grad_()
            losses = [attention_difference(batch, features_of(batch.shape, torch.float32, 38), p=p) for p in (1, 2)]
            sum(losses).backward()
            gradients.append(torch.cat([batch.grad.flatten(), *(loss.detach()[None] for loss in losses)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("samples", [3, 8])
def test_inference_tensors_compiled_functions_and_vmap(samples: int) -> None:
    student = features_of((samples, 4, 5, 5), torch.float32, 16).requires_grad_()
    with torch.inference_mode():
        teacher = features_of((samples, 4, 5, 5), torch.float32, 17)
    expected = reference.attention_difference(student, teacher.clone())
    assert relative(attention_difference(student, teacher), expected) < 1e-6
    compiled = torch.compile(attention_difference, backend="aot_eager", fullgraph=True)
    assert relative(compiled(student, teacher.clone()), expected) < 1e-6
    stacked = torch.func.vmap(lambda s: attention_difference(s[None], teacher.clone()[:1]))(student.detach())
    assert relative(stacked[0], attention_difference(student[:1], teacher[:1])) < 1e-6


@pytest.mark.parametrize("samples", [3, 8])
@pytest.mark.parametrize("p", [1, 2])
def test_several_upstream_gradients_at_once(p: int, samples: int) -> None:
    student = features_of((samples, 4, 5, 5), torch.float32, 18).requires_grad_()
    loss = attention_difference(student, features_of((samples, 4, 5, 5), torch.float32, 19), p=p)
    upstream = torch.tensor([1.0, -2.0, 0.5])
    (together,) = torch.autograd.grad(loss, student, upstream, is_grads_batched=True, retain_graph=True)
    for gradient, one in zip(together, upstream, strict=True):
        assert relative(gradient, torch.autograd.grad(loss, student, one, retain_graph=True)[0]) < 1e-6


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "message"),
    [
        ((2, 3, 4), (2, 3, 4, 4), {}, ValueError, "student_features has shape"),
        ((2, 3, 4, 4), (3, 3, 4, 4), {}, ValueError, "2 samples"),
        ((2, 3, 4, 5), (2, 3, 4, 4), {}, ValueError, "only square maps"),
        ((2, 3, 4, 4), (2, 3, 4, 4), {"exponent": "2"}, TypeError, "exponent is '2'"),
        ((2, 3, 4, 4), (2, 3, 4, 4), {"p": None}, TypeError, "p is None"),
        ((2, 3, 4, 4), (2, 3, 4, 4), {"exponent": math.nan}, ValueError, "exponent is nan"),
        ((2, 3, 4, 4), (2, 3, 4, 4), {"p": math.inf}, ValueError, "p is inf"),
        ((2, 3, 4, 4), (2, 3, 4, 4), {"p": 0}, ValueError, "p is 0"),
        ((2, 3, 4, 4), (2, 3, 4, 4), {"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
    ids=["dims", "samples", "widths", "exponent", "p", "nan-exponent", "infinite-p", "zero-p", "backend"],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(student, teacher, options, error, message) -> None:
    with pytest.raises(error, match=message):
        attention_difference(torch.ones(student), torch.ones(teacher), **options)
    with pytest.raises(TypeError, match=r"a tensor of torch\.int64"):
        attention_difference(torch.ones(1, 1, 2, 2, dtype=torch.int64), torch.ones(1, 1, 2, 2))
    with pytest.raises(TypeError, match=r"pass teacher_features\.to_dense\(\)"):
        attention_difference(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2).to_sparse())
