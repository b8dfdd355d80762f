"""The accuracy check must be able to fail: each launcher is replaced by one that is slightly wrong."""

import pytest
import torch

from ftfast.backends.triton import interpreting
from ftfast.diagnosis import check_head
from ftfast.diagnosis.check_loss import LAYOUTS, check_case
from ftfast.dispatch import BACKENDS
from ftfast.ops.ft_loss import function as op
from ftfast.ops.ft_loss.native import LossPlan

pytestmark = pytest.mark.usefixtures("overflow_unchecked")


def scaled(results):
    return [None if result is None else result * 1.001 for result in results]


def one_sign_flipped(results):
    flipped = [None if result is None else result.clone() for result in results]
    for result in flipped:
        if result is not None:
            place = torch.unravel_index(torch.tensor(result.numel() // 3), result.shape)
            result[tuple(int(index) for index in place)].neg_()
    return flipped


def last_row_skipped(results):
    skipped = [None if result is None else result.clone() for result in results]
    for result in skipped:
        if result is not None:
            result[-1] = 0
    return skipped


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_check_is_green_on_the_real_kernels(backend, device, dtype, layout):
    assert check_case(BACKENDS[backend], torch.device(device), dtype, 1, layout).ok


@pytest.mark.parametrize("wrong", [scaled, one_sign_flipped, last_row_skipped])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("p", [1, 2])
def test_a_wrong_backward_is_seen(monkeypatch, backend, device, p, dtype, wrong):
    plan = BACKENDS[backend].launchers(torch.device(device)).LossPlan
    right = plan.backward
    monkeypatch.setattr(plan, "backward", lambda *args: tuple(wrong(right(*args))))
    assert not check_case(BACKENDS[backend], torch.device(device), dtype, p, "nchw").ok


@pytest.mark.parametrize("wrong", [scaled, one_sign_flipped, last_row_skipped])
@pytest.mark.parametrize("launcher", ["forward_with_gradient", "backward"])
def test_a_wrong_gradient_on_the_way_that_training_takes_is_seen(monkeypatch, backend, device, launcher, wrong):
    """On the CPU with a frozen teacher: forward writes the gradient for an upstream gradient that it expects."""
    if (backend, device) != ("native", "cpu"):
        pytest.skip("this way is the native backend's on the CPU")
    right = getattr(LossPlan, launcher)

    def replaced(*args, **options):
        if launcher == "backward":
            return tuple(wrong(right(*args, **options)))
        loss, gradient = right(*args, **options)
        return loss, wrong([gradient])[0]

    assert check_case(BACKENDS[backend], torch.device(device), torch.float32, 1, "nchw", frozen=True).ok
    monkeypatch.setattr(LossPlan, launcher, replaced)
    assert not check_case(BACKENDS[backend], torch.device(device), torch.float32, 1, "nchw", frozen=True).ok


@pytest.mark.parametrize("p", [1, 2])
def test_a_loss_scaled_by_a_thousandth_is_seen(monkeypatch, backend, device, p):
    plan = BACKENDS[backend].launchers(torch.device(device)).LossPlan
    right = plan.forward

    def wrong(*args):
        loss, statistics = right(*args)
        return loss * 1.001, statistics

    monkeypatch.setattr(plan, "forward", wrong)
    assert not check_case(BACKENDS[backend], torch.device(device), torch.float32, p, "nchw").ok


def test_the_named_backend_is_the_one_that_runs(monkeypatch, backend, device):
    """A test that names a backend must not pass on another one."""
    launches = []
    plan = BACKENDS[backend].launchers(torch.device(device)).LossPlan
    right = plan.forward
    monkeypatch.setattr(plan, "forward", lambda *args: launches.append(1) or right(*args))
    factor = torch.randn(2, 8, device=device)
    op.run(factor, factor, p=1, reduction="mean", eps=1e-12, weight=1.0, backend=backend)
    assert launches == [1]


SHAPE = check_head.SHAPES["8x8"]


def head_module(backend, device):
    module = BACKENDS[backend].head_kernels(torch.device(device))
    return module or pytest.skip("CUDA C++ has the loss alone")


def verdicts(backend, device):
    kernels, place = BACKENDS[backend], torch.device(device)
    # Of float32 on a GPU, those that do not round to TF32.
    ways = ("layers",) if device == "cuda" else check_head.ways(kernels, place, torch.float32, SHAPE)
    return [check_head.check_head(kernels, place, way, torch.float32, 1, "8x8", SHAPE).ok for way in ways]


@pytest.mark.parametrize("wrong", [scaled, one_sign_flipped, last_row_skipped])
def test_a_wrong_head_gradient_is_seen(monkeypatch, backend, device, wrong):
    module = head_module(backend, device)
    right, answers = module.ft_head_backward, {}

    def once(kept, upstream, head, needed):
        # The same inputs each time, for which the interpreter takes seconds.
        if head.plan.kernel not in answers:
            answers[head.plan.kernel] = right(kept, upstream, head, needed)
        return list(answers[head.plan.kernel])

    monkeypatch.setattr(module, "ft_head_backward", once)
    assert all(verdicts(backend, device))
    for place in (0, 1, 6) if interpreting() else range(7):

        def replaced(*args, place=place):
            gradients = once(*args)
            gradients[place] = wrong([gradients[place]])[0]
            return gradients

        monkeypatch.setattr(module, "ft_head_backward", replaced)
        assert not any(verdicts(backend, device))


def test_a_head_loss_scaled_by_a_thousandth_is_seen(monkeypatch, backend, device):
    module = head_module(backend, device)
    right = module.ft_head_forward

    def wrong(*args, **options):
        loss, kept = right(*args, **options)
        return loss * 1.001, kept

    monkeypatch.setattr(module, "ft_head_forward", wrong)
    assert not any(verdicts(backend, device))
