"""What is found out once about a kind of call: used where nothing changed, found anew where anything did."""

import pytest
import torch
from torch import nn

import ftfast
from ftfast.backends.triton import interpreting
from ftfast.dispatch import BACKENDS
from ftfast.ops import remembered
from ftfast.ops.ft_head import plan as head_plans
from ftfast.ops.ft_loss import function, plans
from ftfast.ops.maps import no_autocast
from ftfast.ops.remembered import Remembered


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch):
    monkeypatch.setattr(function, "_chosen", Remembered())
    monkeypatch.setattr(plans, "_plans", Remembered())
    head_plans.known_plans.clear()


def factors(device, *, samples=3, dtype=torch.float32):
    student = torch.randn(samples, 6, 4, 4, device=device).to(dtype)
    return student, torch.randn(samples, 6, 4, 4, device=device).to(dtype)


@pytest.fixture
def made(monkeypatch, backend, device):
    """How many plans were made so far."""
    plan = BACKENDS[backend].launchers(torch.device(device)).LossPlan
    made, make = [], plan.__init__
    monkeypatch.setattr(plan, "__init__", lambda self, *args: made.append(args[2:]) or make(self, *args))
    return made


def test_one_plan_serves_all_calls_of_a_kind(made, backend, device):
    for weight in (1.0, 2.0, 3.0):
        student, teacher = factors(device)
        loss = ftfast.ft_loss(student.requires_grad_(), teacher, weight=weight, backend=backend)
        loss.backward()
        expected = ftfast.reference.ft_loss(student, teacher, weight=weight)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert len(made) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"p": 2},
        {"reduction": "sum"},
        {"eps": 0.5},
        {"samples": 4},
        {"dtype": torch.bfloat16},
        {"student": lambda it: it.contiguous(memory_format=torch.channels_last)},
        {"teacher": lambda it: it.to(torch.float16)},
        {"teacher": lambda it: it[:1].expand(3, -1, -1, -1)},
    ],
    ids=lambda it: next(iter(it)),
)
def test_whatever_changes_the_kind_gets_a_plan_of_its_own(made, backend, device, changed):
    ftfast.ft_loss(*factors(device), backend=backend)
    sides = {name: changed.pop(name) for name in ("student", "teacher") if name in changed}
    given = {name: changed.pop(name) for name in ("samples", "dtype") if name in changed}
    student, teacher = factors(device, **given)
    student, teacher = sides.get("student", torch.clone)(student), sides.get("teacher", torch.clone)(teacher)
    loss = ftfast.ft_loss(student, teacher, backend=backend, **changed)
    assert len(made) == 2
    torch.testing.assert_close(loss, ftfast.reference.ft_loss(student, teacher, **changed), rtol=1e-3, atol=1e-6)


def test_every_check_is_made_after_a_good_call(backend, device):
    student, teacher = factors(device)
    for _ in range(2):
        ftfast.ft_loss(student, teacher, backend=backend)
        ftfast.ft_loss(student, teacher, weight=torch.tensor(2.0), backend=backend)
    wrong = [
        ((student, teacher[:2]), {}, ValueError),
        ((student[0, 0, 0], teacher[0, 0, 0]), {}, ValueError),
        ((student, teacher.to_sparse()), {}, TypeError),
        ((student.int(), teacher), {}, TypeError),
        ((student, [1.0]), {}, TypeError),
        ((student, teacher), {"p": True}, ValueError),
        ((student, teacher), {"p": 1.0}, ValueError),
        ((student, teacher), {"reduction": ["mean"]}, ValueError),
        ((student, teacher), {"eps": float("nan")}, ValueError),
        ((student, teacher), {"weight": torch.ones(2)}, ValueError),
        ((student, teacher), {"weight": "2"}, TypeError),
    ]
    for sides, options, error in wrong:
        with pytest.raises(error):
            ftfast.ft_loss(*sides, backend=backend, **options)


def test_a_known_kind_is_not_taken_from_who_watches_the_operators():
    student, teacher = factors("cpu")
    ftfast.ft_loss(student, teacher)
    by_sample = torch.func.vmap(lambda s, t: ftfast.ft_loss(s[None], t[None]))(student, teacher)
    torch.testing.assert_close(by_sample, ftfast.reference.ft_loss(student, teacher, reduction="none") / 96)
    gradient = torch.func.grad(ftfast.ft_loss)(student, teacher)
    (expected,) = torch.autograd.grad(ftfast.reference.ft_loss(student.requires_grad_(), teacher), student)
    torch.testing.assert_close(gradient, expected)


def test_a_tensor_that_is_not_its_memory_gets_the_plan_of_its_copy(backend, device):
    """A copy of it may have other strides than those that its kind is known by."""
    student, teacher = factors(device)
    gaps = torch.stack((student, student), -1)[..., 0]
    expected = ftfast.ft_loss(gaps, teacher, backend=backend)
    odd = torch._neg_view(-torch.stack((student, student), -1)[..., 0])
    assert torch.equal(ftfast.ft_loss(odd, teacher, backend=backend), expected)


@pytest.mark.parametrize(
    "hands_back",
    [torch.Tensor.bfloat16, torch.Tensor.contiguous, torch.Tensor.double],
    ids=["bfloat16", "dense", "float64"],
)
def test_saved_tensors_come_back_in_the_dtype_and_strides_of_the_plan(backend, device, hands_back):
    """Those of another dtype would have been read as what they had been."""
    student, teacher = (side.bfloat16() for side in factors(device))
    student.requires_grad_()
    teacher = teacher[:, :1].expand(-1, 6, -1, -1)
    (expected,) = torch.autograd.grad(ftfast.ft_loss(student, teacher, backend=backend), student)
    with torch.autograd.graph.saved_tensors_hooks(lambda it: hands_back(it.detach()), lambda it: it):
        loss = ftfast.ft_loss(student, teacher, backend=backend)
    (got,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 3)
    known: Remembered[int, int] = Remembered()
    for number in range(10):
        assert known.keep(number, number * 2) == number * 2
    assert len(known) <= 3
    assert known.get(9) == 18
    assert known.keep(None, 1) == 1
    assert None not in known


def test_autocast_is_on_again_after_an_error():
    def fail():
        assert not torch.is_autocast_enabled("cpu")
        raise KeyError

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError), no_autocast("cpu"):
            fail()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def head():
    return ftfast.FactorTransfer(ftfast.Paraphraser(8, 1.0), ftfast.Translator(6, 8))


def replaced_layer(it):
    it.translator.encoder[1] = nn.Conv2d(6, 8, 3, padding=1)


def replaced_parameter(it):
    it.translator.encoder[1].weight = nn.Parameter(torch.randn(8, 6, 3, 3))


def frozen_replaced(it):
    it.paraphraser.encoder[0].weight = nn.Parameter(torch.randn(8, 8, 3, 3), requires_grad=False)


def other_slope(it):
    it.translator.negative_slope = 0.4


def hooked(it):
    it.translator.encoder[2].register_forward_hook(lambda module, given, found: found + 1)


def hooked_network(it):
    it.translator.register_forward_hook(lambda module, given, found: found * found)


def other_subclass(it):
    it.translator.encoder[0].__class__ = type("Mine", (nn.Conv2d,), {})


def other_norm(it):
    it.loss.p = 2


CHANGES = [replaced_layer, replaced_parameter, frozen_replaced, other_slope, hooked, hooked_network, other_subclass]


@pytest.mark.skipif(interpreting(), reason="the head's modules are the same everywhere")
@pytest.mark.parametrize("change", [*CHANGES, other_norm], ids=lambda it: it.__name__)
def test_a_head_that_was_changed_after_a_call_is_planned_anew(change):
    built, student, teacher = head(), torch.randn(2, 6, 4, 4), torch.randn(2, 8, 4, 4)
    for _ in range(2):
        built(student, teacher)
    change(built)
    factor = built.paraphraser.encode(teacher)
    expected = ftfast.reference.ft_loss(built.translator(student), factor, p=built.loss.p)
    torch.testing.assert_close(built(student, teacher), expected, rtol=1e-4, atol=0)


@pytest.mark.skipif(interpreting(), reason="the head's modules are the same everywhere")
def test_a_head_checks_its_features_after_a_good_call():
    built, student, teacher = head(), torch.randn(2, 6, 4, 4), torch.randn(2, 8, 4, 4)
    built(student, teacher)
    with pytest.raises(ValueError, match="samples"):
        built(student, teacher[:1])
    with pytest.raises(ValueError, match="channels"):
        built(teacher, teacher)
    with pytest.raises(TypeError, match="float64"):
        built(student.double(), teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in built.explain(student, teacher)
    assert "float32" in built.explain(student, teacher)
    built.double()
    with pytest.raises(TypeError, match="float32"):
        built(student, teacher)
    built.loss.weight = torch.ones(3)
    with pytest.raises(ValueError, match="weight"):
        built(student.double(), teacher.double())
