"""The reference is the method: pinned to the formulas that other implementations publish, written out here by hand."""

import pytest
import torch
import torch.nn.functional as F

import ftfast
from ftfast import reference

FLOATS = [torch.float64, torch.float32]


def factors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 6, 5, 3, dtype=dtype), torch.randn(4, 6, 5, 3, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_mean_p1_is_l1_loss_of_normalised_factors(dtype):
    s, t = factors(dtype)
    official = torch.nn.L1Loss()(F.normalize(s.view(4, -1)), F.normalize(t.view(4, -1)))
    torch.testing.assert_close(reference.ft_loss(s, t), official, rtol=1e-6, atol=0)


def test_mean_p2_is_the_mean_norm_of_the_difference():
    s, t = factors()
    a, b = s.flatten(1) / s.flatten(1).norm(dim=1, keepdim=True), t.flatten(1) / t.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(reference.ft_loss(s, t, p=2), (a - b).norm(2, dim=1).mean(), rtol=1e-12, atol=0)


def test_batchmean_p1_is_the_papers_formula():
    s, t = factors()
    a, b = s.flatten(1) / s.flatten(1).norm(dim=1, keepdim=True), t.flatten(1) / t.flatten(1).norm(dim=1, keepdim=True)
    paper = torch.stack([(a[n] - b[n]).abs().sum() for n in range(4)]).mean()
    torch.testing.assert_close(reference.ft_loss(s, t, reduction="batchmean"), paper, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [1, 2])
def test_reductions_are_multiples_of_each_other(p):
    s, t = factors()
    rows = reference.ft_loss(s, t, p=p, reduction="none")
    assert rows.shape == (4,)
    values = {name: reference.ft_loss(s, t, p=p, reduction=name) for name in ("mean", "batchmean", "sum")}
    torch.testing.assert_close(values["sum"], rows.sum())
    torch.testing.assert_close(values["batchmean"], rows.mean())
    torch.testing.assert_close(values["mean"], rows.mean() / (90 if p == 1 else 1))


def test_gradient_is_the_closed_form():
    s, t = factors()
    s.requires_grad_()
    (got,) = torch.autograd.grad(reference.ft_loss(s, t, reduction="sum"), s)
    flat, target = s.detach().flatten(1), F.normalize(t.flatten(1))
    norm = flat.norm(dim=1, keepdim=True)
    a = flat / norm
    g = (a - target).sign()
    expected = (g - a * (g * a).sum(1, keepdim=True)) / norm
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-10, atol=1e-14)


def test_gradient_has_no_radial_part():
    s, t = factors()
    s.requires_grad_()
    (got,) = torch.autograd.grad(reference.ft_loss(s, t, reduction="sum"), s)
    radial = (got * s).flatten(1).sum(1).abs() / (got.flatten(1).norm(dim=1) * s.flatten(1).norm(dim=1))
    assert radial.max() < 1e-14


def test_sixteen_bit_factors_give_a_float32_loss_inside_and_outside_autocast():
    s, t = (factor.bfloat16() for factor in factors())
    exact = reference.ft_loss(s.double(), t.double())
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = reference.ft_loss(s, t)
        assert loss.dtype == torch.float32
        assert abs(loss.item() / exact.item() - 1) < 1e-6


def test_factor_transfer_is_encode_translate_compare():
    paraphraser, translator = ftfast.Paraphraser(8).double(), ftfast.Translator(6, 4).double()
    student, teacher = torch.randn(2, 6, 5, 5).double(), torch.randn(2, 8, 5, 5).double()
    got = reference.factor_transfer(student, teacher, paraphraser, translator, weight=3.0)
    x, y = student, teacher
    for layer in translator.encoder:
        x = F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, padding=1), 0.1)
    for layer in paraphraser.encoder:
        y = F.leaky_relu(F.conv2d(y, layer.weight, layer.bias, padding=1), 0.1)
    official = torch.nn.L1Loss()(F.normalize(x.view(2, -1)), F.normalize(y.view(2, -1)))
    torch.testing.assert_close(got, 3 * official, rtol=1e-12, atol=0)
