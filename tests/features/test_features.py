"""FeatureTap returns what a hook on the layer would see, and leaves the model as it was."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ftfast

torchvision_models = pytest.importorskip("torchvision.models")
resnet18 = torchvision_models.resnet18


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


def returned(model, layer, x):
    """What a layer returns, copied before anything can write to it, and its gradient to the images."""
    kept = []
    x = x.clone().requires_grad_()
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _i, output: kept.append(output.clone()))
    model(x)
    handle.remove()
    return kept[-1], torch.autograd.grad(kept[-1].square().sum(), x)[0]


def small_resnet():
    return torchvision_models.ResNet(torchvision_models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)


def small_densenet():
    return torchvision_models.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=4)


WRITTEN_LATER = {
    "a batch norm before a sum and a ReLU, as ResNet's": (small_resnet, "layer4.0.bn2"),
    "features before a ReLU, as DenseNet's": (small_densenet, "features"),
    "a convolution before a ReLU, as VGG's": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.Flatten()),
        "0",
    ),
}


@pytest.mark.parametrize("name", WRITTEN_LATER)
@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_features_are_what_the_layer_returned(name, features_only, training):
    build, layer = WRITTEN_LATER[name]
    torch.manual_seed(0)
    model = build().train(training)
    x = torch.randn(2, 3, 64, 64)
    taps = ftfast.FeatureTaps(model, {"it": layer, "last": list(dict(model.named_modules()))[-1]}, features_only=True)
    tap = ftfast.FeatureTap(model, layer, features_only=features_only)
    expected, expected_gradient = returned(model, layer, x)
    for _ in range(2):  # the first call finds out that it is written to
        images = x.clone().requires_grad_()
        found = tap(images) if features_only else tap(images)[1]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), images)[0], expected_gradient)
        torch.testing.assert_close(taps(x)["it"], expected)
    with torch.inference_mode():
        torch.testing.assert_close(tap(x) if features_only else tap(x)[1], expected)


class Meeting(nn.Module):
    """Waits behind its layer until so many threads have come there."""

    def __init__(self, threads):
        super().__init__()
        self.body, self.head, self.barrier = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1), threading.Barrier(threads)

    def forward(self, x):
        features = self.body(x)
        self.barrier.wait(timeout=30)
        return self.head(features)


def replica_of(module):
    """As DataParallel makes one for a device."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter)
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child)
    return replica


@pytest.mark.parametrize("replicas", [False, True], ids=["threads", "DataParallel around it"])
def test_threads_that_share_a_tap_get_their_own_features(replicas):
    model = Meeting(4)
    tap = ftfast.FeatureTap(model, "body")
    taps = [replica_of(tap) if replicas else tap for _ in range(4)]
    batches = [torch.randn(place + 1, 1, 3, 3) for place in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each, batch: each(batch)[1], taps, batches))
    for features, batch in zip(found, batches, strict=True):
        assert torch.equal(features, model.body(batch))
    assert not tap._calls


@pytest.mark.parametrize("training", [False, True])
def test_a_replica_of_a_cut_model_computes_with_its_own_parameters(training):
    tap = ftfast.FeatureTap(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "0", features_only=True)
    assert tap.is_cut
    replica = replica_of(tap.train(training))
    replica.model._modules["0"].bias = nn.Parameter(tap.model.get_submodule("0").bias + 1)
    x = torch.randn(3, 2)
    torch.testing.assert_close(replica(x), tap(x) + 1)


def test_data_parallel_inside_a_tap_is_refused():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Meeting(2)

        def forward(self, x):
            replicas = [replica_of(self.module) for _ in range(2)]
            with ThreadPoolExecutor(2) as pool:
                return torch.cat(list(pool.map(lambda replica, part: replica(part), replicas, x.chunk(2))))

    tap = ftfast.FeatureTap(Parallel(), "module.body")
    with pytest.raises(RuntimeError, match=r"'module.body' ran in a replica .* put DataParallel around the tap"):
        tap(torch.randn(4, 1, 3, 3))
    assert not tap._calls


def test_a_tap_that_is_called_inside_another_call_of_itself(model):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.taps = nn.Linear(3, 3), []

        def forward(self, x):
            features = self.body(x)
            return self.taps[0](features[:1])[1] if len(x) > 1 else features

    outer = Twice()
    tap = ftfast.FeatureTap(outer, "body")
    outer.taps.append(tap)
    x = torch.randn(2, 3)
    output, features = tap(x)
    assert torch.equal(features, outer.body(x))
    assert torch.equal(output, outer.body(features[:1]))


def test_a_closed_tap_leaves_no_hook_and_is_not_called(model):
    x = torch.randn(1, 3, 32, 32)
    with ftfast.FeatureTap(model, "layer4") as tap:
        expected = tap(x)[1]
        others = [copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))]
    assert not any(module._forward_hooks for module in model.modules())
    for closed in (tap, copy.deepcopy(tap)):
        with pytest.raises(RuntimeError, match="was closed"):
            closed(x)
    for other in others:
        assert torch.equal(other(x)[1], expected)
        other.close()
        assert not any(module._forward_hooks for module in other.model.modules())
    taps = ftfast.FeatureTaps(model, ["layer3", "layer4"])
    taps.close()
    assert not any(module._forward_hooks for module in model.modules())


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, self.first(x), use_reentrant=self.use_reentrant))


def test_a_layer_in_a_reentrant_checkpoint_is_refused_where_its_gradient_would_be_lost():
    x = torch.randn(2, 3)
    tap = ftfast.FeatureTap(Checkpointed(use_reentrant=True), "body")
    with pytest.raises(RuntimeError, match=r"'body' ran inside of a reentrant checkpoint.*use_reentrant=False"):
        tap(x)
    with torch.no_grad():
        tap(x)
    tap.requires_grad_(False)(x)
    tap = ftfast.FeatureTap(Checkpointed(use_reentrant=False), "body")
    output, features = tap(x)
    (output.sum() + features.sum()).backward()
    outside = ftfast.FeatureTap(Checkpointed(use_reentrant=True), "first")
    assert outside(x)[1].requires_grad


def test_a_write_that_no_call_made_before_is_named_once():
    class Sometimes(nn.Sequential):
        def forward(self, x):
            features = self[0](x)
            return features.zero_() if x.sum() > 0 else features + 1

    tap = ftfast.FeatureTap(Sometimes(nn.Conv2d(1, 1, 1)), "0")
    ones = torch.ones(1, 1, 2, 2)
    with torch.no_grad():
        tap(-ones)
        with pytest.raises(RuntimeError, match=r"layer '0' was written to later .* call again"):
            tap(ones)
        assert torch.equal(tap(ones)[1], tap.model[0](ones))


def test_a_compiled_model_in_a_tap(model):
    x = torch.randn(1, 3, 32, 32)
    tap = ftfast.FeatureTap(torch.compile(model, backend="eager"), "_orig_mod.layer4.1.bn2")
    expected = returned(model, "layer4.1.bn2", x)[0]
    torch.testing.assert_close(tap(x)[1], expected)


class Branches(nn.Module):
    """Its body returns what it did not compute last; a branch aside writes to its own memory, as Inception's does."""

    def __init__(self):
        super().__init__()

        class Body(nn.Module):
            def __init__(self):
                super().__init__()
                self.kept, self.side = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(True))

            def forward(self, x):
                kept = self.kept(x)
                self.beside = self.side(kept)
                return kept

        self.body, self.drop, self.head = Body(), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.drop(self.body(x)).mean((2, 3)))


def test_a_cut_model_gives_what_its_layer_returned_and_drops_out_in_training_alone():
    model, x = Branches().eval(), torch.randn(2, 3, 5, 5)
    tap = ftfast.FeatureTap(model, "body", features_only=True)
    assert tap.is_cut
    assert torch.equal(tap(x), model.body.kept(x))
    dropped = ftfast.FeatureTap(model, "drop", features_only=True)
    for each in (dropped, copy.deepcopy(dropped)):
        assert each.is_cut
        assert torch.equal(each(x), each.eval()(x))
        assert (each.train()(x) == 0).any()
        assert not (each.eval()(x) == 0).any()


def test_a_model_that_puts_something_else_into_what_a_layer_returned():
    """The dictionary was kept, and the features were what the model had put there."""

    class Pair(nn.Module):
        def forward(self, x):
            return {"features": x + 1, "rest": [x]}

    class Replaces(nn.Sequential):
        def forward(self, x):
            found = self[0](x)
            found["features"] = found["rest"].pop() * 0
            return found["features"]

    tap, x = ftfast.FeatureTap(Replaces(Pair()), "0"), torch.randn(2, 3)
    for _ in range(2):
        features = tap(x)[1]
        assert torch.equal(features["features"], x + 1)
        assert torch.equal(features["rest"][0], x)


def test_a_cut_tap_is_pickled():
    """torch.fx traces a pickled graph again, and could not make our tracer."""
    model = small_resnet().eval()
    tap = ftfast.FeatureTap(model, "layer1.0.bn2", features_only=True)
    assert tap.is_cut
    other, x = pickle.loads(pickle.dumps(tap)), torch.randn(2, 3, 32, 32)
    for mode in (False, True):
        assert torch.equal(other.train(mode)(x), tap.train(mode)(x))


def test_a_model_that_was_compiled_before_the_tap_is_refused_with_the_way_out():
    compiled, x = torch.compile(nn.Sequential(nn.Linear(3, 3)), backend="eager"), torch.randn(2, 3)
    expected = compiled(x)
    tap = ftfast.FeatureTap(compiled, "_orig_mod.0")
    with pytest.raises(RuntimeError, match=r"did not run.*torch\.compiler\.reset"):
        tap(x)
    torch.compiler.reset()
    assert torch.equal(tap(x)[1], expected)
