"""The frozen teacher gives the teacher's features, whatever is done to it, or is not handed out."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ftfast.distillation.models import frozen_capture, frozen_teacher, inference_graph, registry
from ftfast.distillation.models.frozen_teacher import FrozenTeacher, TeacherError
from ftfast.distillation.models.training_graph import training_forward
from ftfast.distillation.phases.teacher import Teacher
from ftfast.features.layer_graph import layer_graph


def settled(model: nn.Module, *size: int) -> nn.Module:
    """In eval, with batch norms whose statistics and weights are no identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
            module.running_var.data.mul_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.eval()


def resnet(shortcut: str = "identity") -> nn.Module:
    return settled(registry.build_model("resnet14", 4, in_channels=3, classes=7, shortcut=shortcut, seed=0))


def exact(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits in float64; the features before anything writes to them."""
    double = copy.deepcopy(model).double().eval()
    kept: list[Tensor] = []
    double.get_submodule(layer).register_forward_hook(lambda *arguments: kept.append(arguments[2].detach().clone()))
    with torch.no_grad():
        logits = double(images.double())
    return kept[-1], logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


class Sums(nn.Module):
    """Residuals in every order and in place, a convolution that runs twice, and a ReLU that writes to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))
        self.norm = nn.BatchNorm2d(6)
        self.strided = nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False)
        self.last = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third, fourth = self.convolutions
        x = first(x) + x
        x = (x + self.norm(second(x))).relu()
        out = third(x)
        out += x
        x = F.relu(out, inplace=True) + third(x)
        shortcut = 2 * x
        shortcut += fourth(x)
        x = torch.add(fourth(shortcut), shortcut, alpha=2) * shortcut
        x = self.last(self.strided(x))
        return self.relu(x).mean((2, 3))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.classifier(self.body(x).mean((2, 3)))


CASES: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "identity shortcuts": (resnet, "stage3", (5, 3, 11, 9)),
    "projections": (lambda: resnet("projection"), "stage3", (4, 3, 8, 8)),
    "a layer in the middle": (resnet, "stage2.0.conv1", (4, 3, 8, 8)),
    "sums": (lambda: settled(Sums()), "last", (3, 6, 8, 8)),
    "no trace": (lambda: settled(Untraceable()), "body", (3, 3, 8, 8)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("fusing", [True, False])
def test_features_and_logits_are_the_teachers(
    case: str, classifier: bool, fusing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fusing:
        monkeypatch.setattr(frozen_teacher, "_can_fuse", lambda _: False)
    build, layer, size = CASES[case]
    torch.manual_seed(0)
    model, images = build(), torch.randn(size)
    features, logits = exact(model, layer, images)
    teacher = FrozenTeacher(model, layer, dtype=torch.float32, classifier=classifier, example=images[:2])
    for _ in range(2):  # a second call sees nothing of the first
        found = teacher(images)
        assert relative(found.features, features) < 1e-5
        assert found.logits.shape == (len(images), logits.shape[1] if classifier else 0)
        if classifier:
            assert relative(found.logits, logits) < 1e-5
    lowered = FrozenTeacher(model, layer, dtype=torch.bfloat16, classifier=classifier, example=images)
    assert relative(lowered(images).features, features) == pytest.approx(lowered.error, rel=0.5)
    assert lowered.error < 2e-2


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvisions_models_are_frozen(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, layer = settled(torchvision.models.get_model(name)), {"resnet18": "layer4", "shufflenet_v2_x0_5": "conv5"}
    images = torch.randn(2, 3, 64, 64)
    at = layer.get(name, "features")
    teacher = FrozenTeacher(model, at, dtype=torch.float32, example=images)
    assert relative(teacher(images).features, exact(model, at, images)[0]) < 1e-5
    assert "without" not in teacher.explain()


class WrittenLater(nn.Module):
    """A layer's output that is written to in one of the ways that models do it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem, self.norm, self.tail = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.relu, self.way = nn.ReLU(inplace=True), way
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = out = self.norm(self.stem(x))
        if self.way == "sum":
            out += self.tail(out)
        elif self.way == "view":
            out.flatten(2).sub_(1.0)
        elif self.way == "unassigned":
            self.relu(out)
        elif self.way == "positional":
            out = F.relu(out, True)
        else:
            out = self.relu(out)
        return self.classifier(self.pool(out + x).flatten(1))


WAYS = ["sum", "view", "unassigned", "positional", "module"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["plain", "frozen", "frozen with the classifier", "training"])
def test_every_engine_gives_what_the_layer_returned(way: str, engine: str) -> None:
    torch.manual_seed(0)
    model, images = settled(WrittenLater(way)), torch.randn(4, 3, 6, 6)
    features, logits = exact(model, "norm", images)
    if engine == "plain":
        found = Teacher(model, "norm")(images)
    elif engine == "training":
        found = training_forward(model, "norm", compiled=False, fused=True)(images)
    else:
        classifier = "classifier" in engine
        teacher = FrozenTeacher(model, "norm", dtype=torch.float32, classifier=classifier, example=images)
        found = teacher(images)
    assert relative(found.features.detach(), features) < 1e-5
    if found.logits.shape[1]:
        assert relative(found.logits.detach(), logits) < 1e-5


def test_every_convolution_of_a_resnet_takes_its_neighbours_along() -> None:
    if not frozen_teacher._can_fuse(torch.zeros(1)):
        pytest.skip("torch has no oneDNN here")
    found = inference_graph.fuse(inference_graph.fold(layer_graph(resnet(), ["stage3"], whole=False)))
    assert (found.folded, found.left, found.fused) == (13, 0, 13)
    kinds = [node.target for node in found.module.graph.nodes if node.op in ("call_function", "call_method")]
    assert not any("relu" in str(kind) or "add" in str(kind) for kind in kinds)


def test_batch_norms_before_their_convolution_stay_and_are_counted() -> None:
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten()))
    images = torch.randn(2, 3, 8, 8)
    teacher = FrozenTeacher(model, "3", dtype=torch.float32, example=images)
    assert "0 batch norms folded, 1 not" in teacher.explain()
    assert relative(teacher(images).features, exact(model, "3", images)[0]) < 1e-5


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.names.append(str(function))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("classifier", [False, True])
def test_nothing_past_the_layer_runs_unless_the_classifier_is_wanted(classifier: bool) -> None:
    images = torch.randn(2, 3, 8, 8)
    teacher = FrozenTeacher(resnet(), "stage3", dtype=torch.float32, classifier=classifier, example=images)
    with _Counted() as counted:
        teacher(images)
    assert any("addmm" in name or "linear" in name for name in counted.names) == classifier


def test_it_stays_in_eval_and_has_nothing_to_learn_or_to_save() -> None:
    torch.manual_seed(0)
    model, images = resnet(), torch.randn(4, 3, 8, 8)
    teacher = FrozenTeacher(model, "stage3", dtype=torch.float32, example=images)
    before = teacher(images).features
    nn.ModuleList([teacher]).train()
    assert not teacher.training
    found = teacher(images.clone().requires_grad_()).features
    assert torch.equal(found, before)
    assert not found.requires_grad
    assert list(teacher.parameters()) == []
    assert teacher.state_dict() == {}


def test_autocast_round_it_changes_nothing() -> None:
    images = torch.randn(2, 3, 8, 8)
    teacher = FrozenTeacher(resnet(), "stage3", dtype=torch.float32, example=images)
    before = teacher(images).features
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images).features, before)


@pytest.mark.parametrize(
    "change", ["load_state_dict", "a step", "batch norms", "through data", "eps", "another parameter"]
)
def test_a_teacher_changed_afterwards_is_noticed(change: str) -> None:
    model, images = resnet(), torch.randn(4, 3, 8, 8)
    teacher = FrozenTeacher(model, "stage3", dtype=torch.float32, example=images)
    if change == "load_state_dict":
        model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})
    elif change == "a step":
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0).step(lambda: model(images).sum().backward())
    elif change == "batch norms":
        model.train()(images)
    elif change == "through data":
        model.stem.weight.data[0, 0, 0, 0] += 1e-3
    elif change == "eps":
        model.norm.eps = 1.0
    else:
        model.stem.weight = nn.Parameter(model.stem.weight * 2)
    with pytest.raises(TeacherError, match="was changed after"):
        teacher(images)


def test_a_teacher_put_into_training_mode_without_a_forward_is_unchanged() -> None:
    model, images = resnet(), torch.randn(2, 3, 8, 8)
    teacher = FrozenTeacher(model, "stage3", dtype=torch.float32, example=images)
    model.train()
    teacher(images)


def test_the_model_may_be_dropped_and_is_left_as_it_was() -> None:
    model, images = resnet(), torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    teacher = FrozenTeacher(model, "stage3", dtype=torch.bfloat16, example=images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    del model
    teacher(images)


def test_a_copy_that_differs_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(frozen_teacher.LIMITS, torch.bfloat16, 1e-6)
    with pytest.raises(TeacherError, match=r"off by .*at most 1e-06"):
        FrozenTeacher(resnet(), "stage3", dtype=torch.bfloat16, example=torch.randn(2, 3, 8, 8))


def test_operators_that_compute_something_else_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = inference_graph.FusedConvolution.forward
    monkeypatch.setattr(
        inference_graph.FusedConvolution, "forward", lambda self, *arguments: 1.01 * right(self, *arguments)
    )
    monkeypatch.setattr(frozen_teacher, "_can_fuse", lambda _: True)
    images = torch.randn(2, 3, 8, 8)
    teacher = FrozenTeacher(resnet(), "stage3", dtype=torch.float32, example=images)
    assert "without fusing convolutions (relative error" in teacher.explain()
    assert teacher.error < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "stage9"}, r"layer is 'stage9'.*stem, norm, stage1"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"dtype": torch.float16}, "on a GPU, torch.float16"),
        ({"execution": "graph"}, "execution is 'graph'"),
        ({"execution": "fast"}, "execution is 'fast'"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"layer": "stage3", "dtype": torch.float32, "example": torch.randn(2, 3, 8, 8), **changes}
    with pytest.raises(TeacherError, match=message):
        FrozenTeacher(resnet(), **arguments)
    with pytest.raises(TeacherError, match="model is a str; it takes the teacher"):
        FrozenTeacher("resnet20", "stage3")  # type: ignore[arg-type]


def test_features_that_are_not_finite_are_refused() -> None:
    model = resnet()
    model.stem.weight.data.fill_(float("nan"))
    with pytest.raises(TeacherError, match="not finite"):
        FrozenTeacher(model, "stage3", dtype=torch.float32, example=torch.randn(2, 3, 8, 8))


class _FakeStream:
    def wait_stream(self, _: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_a_captured_forward_replays_on_new_images_and_keeps_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's graphs: a replay writes anew to the outputs of the recording."""
    calls: list[Tensor] = []

    class Graph(_FakeStream):
        def replay(self) -> None:
            self.output.copy_(2 * self.static)

    def run(images: Tensor) -> tuple[Tensor, None]:
        calls.append(images)
        output = 2 * images
        Graph.static, Graph.output = images, output
        return output, None

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: _FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    captured = frozen_capture.Captured(run)
    first, second = torch.ones(2, 3), torch.full((2, 3), 5.0)
    found, nothing = captured(first)
    recorded = len(calls)
    again, _ = captured(second)
    assert nothing is None
    assert len(calls) == recorded
    assert torch.equal(found, 2 * first)
    assert torch.equal(again, 2 * second)
    captured(torch.ones(3, 3))
    assert len(calls) > recorded
    monkeypatch.setattr(frozen_capture, "MOST_SHAPES", 2)  # images of any size would fill a GPU with graphs
    recorded = len(calls)
    for size in (4, 5, 4):
        assert torch.equal(captured(torch.ones(size, 3))[0], 2 * torch.ones(size, 3))
    assert len(calls) == recorded + 3
    captured(first)
    assert len(calls) == recorded + 3


@pytest.mark.slow
def test_compiled_it_agrees_too() -> None:
    images = torch.randn(4, 3, 16, 16)
    model = resnet()
    teacher = FrozenTeacher(model, "stage3", dtype=torch.float32, example=images, execution="compile")
    assert "compiled" in teacher.explain()
    assert relative(teacher(images).features, exact(model, "stage3", images)[0]) < 1e-5
