"""FeatureTap returns what a hook on the layer would see, and leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn

import ftfast

resnet18 = pytest.importorskip("torchvision.models").resnet18


@pytest.fixture
def model():
    return resnet18(num_classes=10).eval()


def seen_by_a_hook(model, layer, x):
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output))
    output = model(x)
    handle.remove()
    return output, seen[0]


@pytest.mark.parametrize("layer", ["layer4", "layer2.0.conv1", "fc"])
def test_output_and_features(model, layer):
    x = torch.randn(2, 3, 64, 64)
    expected = seen_by_a_hook(model, layer, x)
    got = ftfast.FeatureTap(model, layer)(x)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(ftfast.FeatureTap(model, layer, features_only=True)(x), expected[1])


def test_parameters_are_shared_and_keep_no_graph(model):
    tap = ftfast.FeatureTap(model, "layer4")
    assert {id(p) for p in tap.parameters()} == {id(p) for p in model.parameters()}
    model(torch.randn(1, 3, 32, 32))
    copy.deepcopy(tap)  # would fail on a kept feature map with a graph


def test_features_only_skips_what_comes_after(model):
    tap = ftfast.FeatureTap(model, "layer3", features_only=True)
    assert sum(p.numel() for p in tap.parameters()) < sum(p.numel() for p in model.parameters()) / 2


def test_a_model_that_cannot_be_traced_is_tapped_all_the_same():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            features = self.body(x)
            return self.head(features.mean((2, 3))) if features.sum() > 0 else self.head(features.amax((2, 3)))

    model = Untraceable()
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(ftfast.FeatureTap(model, "body", features_only=True)(x), model.body(x))
    assert torch.equal(ftfast.FeatureTap(model, "body")(x)[0], model(x))


def test_under_compile(model):
    tap = ftfast.FeatureTap(model, "layer4")
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(tap, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(x), tap(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_models_own_modes_stay(model):
    model.train()
    model.bn1.eval()
    for features_only in (False, True):
        ftfast.FeatureTap(model, "layer4", features_only=features_only)
        assert model.layer1.training
        assert not model.bn1.training


def test_of_a_layer_that_runs_twice_the_last_output_is_taken(model):
    x = torch.randn(1, 3, 64, 64)
    seen = []
    model.get_submodule("layer4.1.relu").register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
    model(x)
    for features_only in (False, True):
        found = ftfast.FeatureTap(model, "layer4.1.relu", features_only=features_only)(x)
        assert torch.equal(found if features_only else found[1], seen[-1])


def test_a_layer_that_does_not_run_is_named_and_nothing_is_kept(model):
    model.unused = nn.Linear(1, 1)
    tap = ftfast.FeatureTap(model, "unused")
    with pytest.raises(RuntimeError, match="layer 'unused' did not run"):
        tap(torch.randn(1, 3, 32, 32))
    tap = ftfast.FeatureTap(model, "layer1")
    with pytest.raises(RuntimeError, match="channels"):
        tap(torch.randn(1, 7, 32, 32))
    copy.deepcopy(tap)
