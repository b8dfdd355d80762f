"""Paraphraser, Translator and FactorTransfer: keys, shapes, freezing, and who gets a gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F

import ftfast
from ftfast import reference


def test_state_dict_keys_are_the_published_ones():
    plain = set(ftfast.Paraphraser(8).state_dict())
    assert plain == {
        f"{side}.{i}.{kind}" for side in ("encoder", "decoder") for i in range(3) for kind in ("weight", "bias")
    }
    translator = set(ftfast.Translator(6, 4).state_dict())
    assert translator == {f"encoder.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    normed = set(ftfast.Paraphraser(8, norm="batch").state_dict()) - plain
    assert {key.split(".")[0] for key in normed} == {"norm", "decoder_norm"}
    assert {key.split(".")[0] for key in set(ftfast.Translator(6, 4, norm="batch").state_dict()) - translator} == {
        "norm"
    }


@pytest.mark.parametrize(
    ("channels", "rate", "expected"), [(64, 0.5, 32), (3, 0.5, 2), (5, 0.5, 2), (1, 0.1, 1), (8, 2, 16)]
)
def test_factor_channels_are_rounded_as_the_official_code_does(channels, rate, expected):
    assert ftfast.Paraphraser(channels, rate).factor_channels == expected
    assert ftfast.Paraphraser(channels, rate, factor_channels=7).factor_channels == 7


@pytest.mark.parametrize("norm", [None, "batch"])
def test_shapes(norm):
    paraphraser, translator = ftfast.Paraphraser(8, 0.75, norm=norm), ftfast.Translator(5, 6, norm=norm)
    features = torch.randn(2, 8, 7, 3)
    factor = paraphraser.encode(features)
    assert factor.shape == (2, 6, 7, 3) == translator(torch.randn(2, 5, 7, 3)).shape
    assert paraphraser(features).shape == features.shape
    assert torch.equal(paraphraser(features), paraphraser.decode(paraphraser.encode(features))) or norm == "batch"


def test_the_decoder_is_made_of_transposed_convolutions():
    paraphraser = ftfast.Paraphraser(8)
    x = torch.randn(2, 4, 5, 5)
    expected = x
    for layer in paraphraser.decoder:
        expected = F.leaky_relu(F.conv_transpose2d(expected, layer.weight, layer.bias, padding=1), 0.1)
    torch.testing.assert_close(paraphraser.decode(x), expected, rtol=1e-5, atol=1e-6)


def test_negative_slope_is_used_after_every_convolution():
    translator = ftfast.Translator(4, 4, negative_slope=1.0)  # then the whole translator is linear but for its biases
    x, y = torch.randn(1, 4, 5, 5).double(), torch.randn(1, 4, 5, 5).double()
    translator.double()
    zero = translator(torch.zeros_like(x))
    torch.testing.assert_close(translator(x + y) - zero, translator(x) - zero + translator(y) - zero)


def head():
    return ftfast.FactorTransfer(ftfast.Paraphraser(8), ftfast.Translator(6, 4), weight=500.0)


def test_the_paraphraser_is_frozen_and_stays_in_eval():
    module = ftfast.FactorTransfer(ftfast.Paraphraser(8, norm="batch"), ftfast.Translator(6, 4, norm="batch"))
    module.train()
    assert module.translator.training
    assert not any(part.training for part in module.paraphraser.modules())
    before = copy.deepcopy(module.paraphraser.state_dict())
    module(torch.randn(2, 6, 5, 5), torch.randn(2, 8, 5, 5)).backward()
    assert all(torch.equal(before[key], value) for key, value in module.paraphraser.state_dict().items())
    assert all(parameter.grad is None for parameter in module.paraphraser.parameters())
    assert all(parameter.grad is not None for parameter in module.translator.parameters())
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {f"translator.{name}" for name, _ in module.translator.named_parameters()}
    assert any(key.startswith("paraphraser.") for key in module.state_dict())


def test_loss_and_gradients_are_the_references():
    module = head().double()
    student, teacher = torch.randn(2, 6, 5, 5).double().requires_grad_(), torch.randn(2, 8, 5, 5).double()
    inputs = [student, *module.translator.parameters()]
    loss = module(student, teacher)
    expected = reference.factor_transfer(student, teacher, module.paraphraser, module.translator, weight=500.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, right in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert (got - right).norm() <= 1e-11 * right.norm()


def test_a_known_factor_gives_the_same_loss():
    module = head()
    student, teacher = torch.randn(2, 6, 5, 5), torch.randn(2, 8, 5, 5)
    factor = module.paraphraser.encode(teacher).detach()
    assert torch.equal(module(student, teacher), module(student, teacher_factor=factor))


def test_no_graph_reaches_the_teacher():
    teacher = torch.randn(2, 8, 5, 5, requires_grad=True)
    head()(torch.randn(2, 6, 5, 5), teacher).backward()
    assert teacher.grad is None


def test_deepcopy_and_state_dict_round_trip():
    module, other = head(), head()
    other.load_state_dict(module.state_dict())
    student, teacher = torch.randn(2, 6, 5, 5), torch.randn(2, 8, 5, 5)
    assert torch.equal(module(student, teacher), other(student, teacher))
    assert torch.equal(module(student, teacher), copy.deepcopy(module)(student, teacher))
