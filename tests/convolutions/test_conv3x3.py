"""Paraphrasers and translators by themselves: every layer, transposed ones too, on the CPU's kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F

import ftfast
from ftfast.diagnosis.check_loss import relative_error
from ftfast.extension import load_extension
from ftfast.ops.conv3x3.function import Conv3x3Function

pytestmark = pytest.mark.skipif(load_extension()[0] is None, reason="the extension is not built")


@pytest.fixture
def layers(monkeypatch):
    """The maps' shapes of the layers that our kernels computed."""
    seen = []
    apply = Conv3x3Function.apply
    monkeypatch.setattr(Conv3x3Function, "apply", lambda *args: seen.append(args[0].shape) or apply(*args))
    return seen


def reconstruct(paraphraser, features):
    """Loss and gradients of a paraphraser's training step, by torch's modules in the dtype of its parameters."""
    x = features
    for layer in [*paraphraser.encoder, *paraphraser.decoder]:
        x = F.leaky_relu(layer(x), paraphraser.negative_slope)
    return step(paraphraser, x, features)


def step(paraphraser, reconstructed, features):
    loss = F.mse_loss(reconstructed.to(features.dtype), features.detach())
    return [reconstructed, *torch.autograd.grad(loss, [features, *paraphraser.parameters()])]


def exact(paraphraser, features):
    return reconstruct(copy.deepcopy(paraphraser).double(), features.detach().double().requires_grad_())


@pytest.mark.parametrize("shape", [(2, 8, 5, 5), (1, 12, 3, 7), (3, 16, 4, 4), (2, 3, 1, 1)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_a_training_step_in_float32(layers, shape):
    paraphraser = ftfast.Paraphraser(shape[1], 0.75)
    features = torch.randn(shape, requires_grad=True)
    found = step(paraphraser, paraphraser(features), features)
    assert len(layers) == 6
    for got, truth in zip(found, exact(paraphraser, features), strict=True):
        assert relative_error(got, truth) < 2e-5


def test_a_training_step_in_bfloat16_is_no_worse_than_torchs(layers):
    ours, torchs = [], []
    for seed in range(20):  # a number that rounding takes across zero changes one draw's gradients by a tenth
        torch.manual_seed(seed)
        paraphraser = ftfast.Paraphraser(16, 0.5)
        features = torch.randn(4, 16, 5, 5, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            reconstructed = paraphraser(features)
        found = step(paraphraser, reconstructed, features)
        assert reconstructed.dtype == torch.bfloat16
        wanted = exact(paraphraser, features)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = reconstruct(paraphraser, features)
        assert [got.dtype for got in found] == [got.dtype for got in theirs]
        ours.append([relative_error(got, truth) for got, truth in zip(found, wanted, strict=True)])
        torchs.append([relative_error(got, truth) for got, truth in zip(theirs, wanted, strict=True)])
    assert sum(map(sum, ours)) < 1.2 * sum(map(sum, torchs))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_have_the_parameters_strides(memory_format):
    paraphraser = ftfast.Paraphraser(8).to(memory_format=memory_format)
    paraphraser(torch.randn(2, 8, 5, 5)).sum().backward()
    for parameter in paraphraser.parameters():
        assert parameter.grad.stride() == parameter.stride()


def test_a_gradient_penalty_can_be_trained_with():
    translator = ftfast.Translator(4, 6)
    double = copy.deepcopy(translator).double()
    results = []
    for network in (translator, double):
        torch.manual_seed(1)
        x = torch.randn(2, 4, 5, 5).to(next(network.parameters()).dtype).requires_grad_()
        (slope,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        results.append([parameter.grad for parameter in network.parameters()])
    for got, truth in zip(*results, strict=True):
        assert relative_error(got, truth) < 2e-5


def test_layers_that_our_kernels_do_not_take_run_as_modules(layers):
    translator = ftfast.Translator(4, 6)
    translator.double()(torch.randn(2, 4, 5, 5, dtype=torch.float64))
    translator.float()
    with pytest.raises(RuntimeError):
        translator(torch.randn(2, 5, 5, 5))
    translator(torch.randn(0, 4, 5, 5))
    normed = ftfast.Translator(4, 6, norm="batch")
    normed(torch.randn(2, 4, 5, 5))
    torch.func.vmap(translator)(torch.randn(3, 2, 4, 5, 5))
    assert layers == []


def test_the_reference_backend_runs_torchs_modules(layers, monkeypatch):
    monkeypatch.setenv("FTFAST_BACKEND", "reference")
    ftfast.Translator(4, 6)(torch.randn(2, 4, 5, 5))
    assert layers == []
