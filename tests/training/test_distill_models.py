"""Models by name: the paper's families, the libraries', their feature maps, and other projects' checkpoint files."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast import FeatureTap
from ftfast.distillation.models import checkpoint_names, libraries, registry
from ftfast.distillation.settings.run_settings import Settings
from ftfast.errors import CheckpointError, SettingsError

torchvision = pytest.importorskip("torchvision")


def build(name: str, channels: int = 2, **changes: Any) -> nn.Module:
    options: dict[str, Any] = {"in_channels": 3, "classes": 10, "seed": 0, **changes}
    return registry.build_model(name, channels, **options)


def trained(model: nn.Module) -> nn.Module:
    """The model with statistics and affine parameters that say which norm is which."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


# He et al. 2016, table 6; Zagoruyko and Komodakis 2016, table 4; 9.4 million is what the paper of Factor Transfer has.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 0.27),
        ("resnet32", 0.46),
        ("resnet56", 0.85),
        ("resnet110", 1.7),
        ("wrn-40-1", 0.6),
        ("wrn-40-2", 2.2),
        ("wrn-28-10", 36.5),
        ("vgg13", 9.4),
    ],
)
def test_models_have_their_papers_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(name, 0).parameters())
    digits = len(str(millions).partition(".")[2])
    assert round(count / 1e6, digits) == millions


@pytest.mark.parametrize(
    ("name", "channels", "shape"),
    [
        ("resnet20", 0, (64, 8, 8)),
        ("resnet56", 0, (64, 8, 8)),
        ("wrn-40-1", 0, (64, 8, 8)),
        ("wrn-46-4", 0, (256, 8, 8)),
        ("wrn-16-2", 0, (128, 8, 8)),
        ("vgg13", 0, (512, 2, 2)),
        ("torchvision/resnet18", 0, (512, 1, 1)),
        ("resnet8", 3, (12, 8, 8)),
    ],
)
def test_the_last_feature_map_of_a_32x32_image(name: str, channels: int, shape: tuple[int, int, int]) -> None:
    found = registry.feature_map(name, channels, "identity", (3, 32, 32))
    assert (found.channels, found.height, found.width) == shape


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (28, 28), (1, 5)])
@pytest.mark.parametrize("name", ["resnet8", "wrn-10-1", "vgg11"])
def test_any_image_size_is_taken_and_probed_as_it_is(name: str, size: tuple[int, int]) -> None:
    found = registry.feature_map(name, 3, "projection", (2, *size))
    model = build(name, 3, in_channels=2, classes=5, shortcut="projection").eval()
    logits, features = FeatureTap(model, found.layer)(torch.randn(2, 2, *size))
    assert logits.shape == (2, 5)
    assert features.shape[1:] == (found.channels, found.height, found.width)


@pytest.mark.parametrize("name", ["resnet8", "wrn-10-2", "vgg11"])
def test_the_classifier_sees_the_last_feature_map_and_nothing_else(name: str) -> None:
    """Factor Transfer compares what the student's decision is made of."""
    model = trained(build(name, 4))
    layer = registry.feature_map(name, 4, "identity", (3, 32, 32)).layer
    logits, features = FeatureTap(model, layer)(torch.randn(2, 3, 32, 32))
    pooled = features if name != "vgg11" else F.max_pool2d(features, 2)
    classifier = model.get_submodule("classifier")
    torch.testing.assert_close(classifier(pooled.mean((2, 3))), logits)
    assert features.min() >= 0


def test_a_wide_resnet_block_is_the_papers() -> None:
    """BN-ReLU-conv-BN-ReLU-conv, and a shortcut from the first activation where the shape changes."""
    block: Any = trained(build("wrn-16-2", 2)).get_submodule("stage2")[0]  # type: ignore[index]
    x = torch.randn(2, 4, 6, 6)

    def norm(layer: nn.BatchNorm2d, values: Tensor) -> Tensor:
        mean, variance = (each[:, None, None] for each in (layer.running_mean, layer.running_var))
        scaled = (values - mean) / (variance + layer.eps).sqrt()
        return (scaled * layer.weight[:, None, None] + layer.bias[:, None, None]).clamp_min(0)

    active = norm(block.norm1, x)
    out = F.conv2d(norm(block.norm2, F.conv2d(active, block.conv1.weight, None, 2, 1)), block.conv2.weight, None, 1, 1)
    expected = out + F.conv2d(active, block.projection.weight, None, 2)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-9)


def test_a_seed_fixes_a_models_weights_and_leaves_torchs_state() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    for name in ("resnet8", "wrn-10-1", "torchvision/squeezenet1_1"):
        first, again, other = (build(name, seed=seed).state_dict() for seed in (5, 5, 6))
        key = next(name for name, tensor in first.items() if tensor.dim() == 4)
        assert torch.equal(first[key], again[key])
        assert not torch.equal(first[key], other[key])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["resnet9", "resnet", "resnet2", "vgg8", "resnet08x", "wrn-15-2", "wrn-16-0", "wrn"])
def test_unknown_models_are_refused_with_what_is_taken(name: str) -> None:
    with pytest.raises(SettingsError, match=r"resnet8, resnet14, resnet20.*wrn-16-2.*vgg13.*torchvision/NAME"):
        registry.check_name(name)


def test_a_librarys_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"'torchvision/resnt18'.*near to torchvision/resnet18"):
        registry.check_name("torchvision/resnt18")


def test_an_unknown_layer_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"teacher_layer is 'stage33', which resnet20 does not have.*stage3"):
        Settings(teacher_layer="stage33", device="cpu").resolved()
    with pytest.raises(SettingsError, match=r"student_layer 'classifier' of resnet8 gives no feature map"):
        Settings(student_layer="classifier", device="cpu").resolved()


def test_a_layer_may_be_chosen() -> None:
    settings = Settings(teacher_layer="stage2", student_layer="stage2", device="cpu").resolved()
    assert settings.teacher_features() == registry.FeatureMap("stage2", 32, 4, 4)
    assert settings.factor_size() == 16 * 4 * 4


def test_maps_of_unlike_size_are_refused_with_both_layers_and_sizes_unless_resized() -> None:
    settings = Settings(teacher_layer="stage2", methods=("at",), device="cpu")
    with pytest.raises(SettingsError, match=r"resnet20's stage2 is 4x4 and resnet8's stage3 2x2; give --resize-feat"):
        settings.resolved()
    assert replace(settings, resize_features=True).resolved().map_size() == (2, 2)
    replace(settings, methods=("none", "kd"), beta=(1.0,)).resolved()  # which compare no maps


def test_resizing_takes_the_mean_of_every_part_and_leaves_maps_that_fit() -> None:
    features = torch.randn(2, 3, 8, 8)

    def resized(size: tuple[int, int]) -> torch.Tensor:
        return registry.Resized(lambda images: registry.Outputs(images, features), size)(features).features

    assert resized((8, 8)) is features
    expected = features.double().reshape(2, 3, 2, 4, 2, 4).mean((3, 5))
    torch.testing.assert_close(resized((2, 2)).double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_a_librarys_model_takes_the_datas_channels_and_classes(in_channels: int) -> None:
    model = build("torchvision/resnet18", in_channels=in_channels, classes=7).eval()
    assert model(torch.randn(2, in_channels, 32, 32)).shape == (2, 7)


def test_images_too_small_for_a_model_are_refused() -> None:
    with pytest.raises(SettingsError, match="torchvision/alexnet cannot take images of 3x8x8 up to features"):
        registry.feature_map("torchvision/alexnet", 0, "identity", (3, 8, 8))


@pytest.fixture
def thousand_classes(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """torchvision's pretrained ResNet-18, made up here."""
    source = trained(torchvision.models.resnet18())
    fresh = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models,
        "get_model",
        lambda name, *, weights, **options: source if weights == "DEFAULT" else fresh(name, weights=None, **options),
    )
    return source


@pytest.mark.parametrize("in_channels", [1, 3])
def test_a_pretrained_student_keeps_all_but_the_classifier(thousand_classes: nn.Module, in_channels: int) -> None:
    model = build("torchvision/resnet18", in_channels=in_channels, pretrained=True)
    given, own = thousand_classes.state_dict(), model.state_dict()
    assert torch.equal(
        own["conv1.weight"], given["conv1.weight"].sum(1, keepdim=True) if in_channels == 1 else given["conv1.weight"]
    )
    assert all(torch.equal(own[name], given[name]) for name in own if name.startswith(("layer", "bn")))
    assert own["fc.weight"].shape == (10, 512)


def test_a_pretrained_teacher_for_other_classes_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"weights for 1000 classes, and the data have 10.*--no-pretrained"):
        libraries.pretrained_tensors("torchvision/resnet18", in_channels=3, classes=10)
    with pytest.raises(SettingsError, match="--pretrained takes torchvision/NAME"):
        libraries.pretrained_tensors("resnet20", in_channels=3, classes=10)


def test_weights_that_cannot_be_downloaded_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", unreachable)
    with pytest.raises(SettingsError, match=r"cannot be had with its weights \(no route to host\); give --no-pretr"):
        libraries._download("torchvision/resnet18", unreachable)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SettingsError, match=r"timm is not installed; pip install 'ftfast\[timm\]'"):
        Settings(teacher="timm/resnet18")


def test_timm_is_asked_for_the_datas_channels_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    timm: Any = ModuleType("timm")
    asked: list[dict[str, Any]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        asked.append({"name": name, **options})
        model = torchvision.models.get_model(name, num_classes=options["num_classes"])
        model.feature_info = [{"module": "relu"}, {"module": "layer3"}]
        del model.layer4
        model.layer4, model.fc = nn.Identity(), nn.Linear(256, options["num_classes"])
        return model

    timm.create_model, timm.list_models = create_model, lambda: ["resnet18"]
    timm.get_pretrained_cfg = lambda name: SimpleNamespace(num_classes=1000)
    monkeypatch.setitem(sys.modules, "timm", timm)
    registry.check_name("timm/resnet18")
    model = registry.build_model("timm/resnet18", 0, in_channels=3, classes=10, seed=0)
    assert asked[-1] == {"name": "resnet18", "pretrained": False, "num_classes": 10, "in_chans": 3}
    assert libraries.default_layer("timm/resnet18", model) == "layer4"
    del model.layer4
    assert libraries.default_layer("timm/resnet18", model) == "layer3"
    with pytest.raises(SettingsError, match="weights for 1000 classes"):
        libraries.pretrained_tensors("timm/resnet18", in_channels=3, classes=10)


# The layouts of other projects, written from their keys: ours to theirs.
def official_resnet(name: str, shortcut: str = "shortcut", classifier: str = "linear") -> str:
    pairs = [("stem.", "conv1."), ("stage", "layer"), ("projection", shortcut), ("classifier", classifier)]
    pairs += [("norm1", "bn1"), ("norm2", "bn2"), ("norm.", "bn1.")]
    for own, theirs in pairs:
        name = name.replace(own, theirs)
    return name


def wide_resnet_blocks(name: str) -> str:
    head, *rest = official_resnet(name, "convShortcut", "fc").split(".")
    return ".".join((head.replace("layer", "block"), "layer", *rest) if head.startswith("layer") else (head, *rest))


LAYOUTS = {
    "the authors' code": ("resnet14", official_resnet),
    "CIFAR ResNets with downsample and fc": ("resnet14", lambda name: official_resnet(name, "downsample", "fc")),
    "DataParallel": ("resnet14", lambda name: f"module.{official_resnet(name)}"),
    "compiled": ("resnet14", lambda name: f"_orig_mod.{name}"),
    "WRN by layers": ("wrn-16-2", lambda name: official_resnet(name, "shortcut.0")),
    "WRN by blocks": ("wrn-16-2", wide_resnet_blocks),
    "torchvision": ("torchvision/resnet18", lambda name: name),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_projects_layouts_give_the_same_model(layout: str, tmp_path: Path) -> None:
    from ftfast.distillation.runtime import checkpoint

    name, rename = LAYOUTS[layout]
    source = trained(build(name, 2, shortcut="projection", seed=1))
    theirs = {rename(key): tensor for key, tensor in source.state_dict().items()}
    if layout == "the authors' code":
        theirs = {key: value for key, value in theirs.items() if not key.endswith("num_batches_tracked")}
    assert layout == "torchvision" or theirs.keys() != source.state_dict().keys()
    torch.save({"epoch": 3, "state_dict": theirs, "optimizer": {}}, tmp_path / "theirs.pth")
    tensors, _ = checkpoint.load_tensors(tmp_path / "theirs.pth")
    model = build(name, 2, shortcut="projection")
    checkpoint.fill(model, checkpoint_names.to_own_layout(tensors, model, tmp_path, "cifar10"), tmp_path, name)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), source(images))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.module.", "model.module.", "model._orig_mod.", "module.module.", "_orig_mod.model.module."]
)
def test_prefixes_nested_in_any_order_and_an_averages_count_are_taken_off(prefix: str, tmp_path: Path) -> None:
    model = build("resnet8", 2)
    theirs = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    theirs[f"{prefix.partition('.')[0]}.n_averaged"] = torch.tensor(3)
    theirs["n_averaged"] = torch.tensor(3)
    found = checkpoint_names.to_own_layout(theirs, model, tmp_path, "cifar10")
    assert found.keys() == model.state_dict().keys()


def test_what_is_lacking_is_said_beside_what_was_found(tmp_path: Path) -> None:
    from ftfast.distillation.runtime import checkpoint

    model = build("resnet8", 2)
    theirs = {f"\x1b[31m.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"lacks 'classifier.bias' and has '\\x1b\[31m.classifier.bias'"
    ) as raised:
        checkpoint.fill(model, theirs, tmp_path, "resnet8")
    assert str(raised.value).isprintable()


def test_a_vgg_in_torchvisions_order_gives_the_same_model(tmp_path: Path) -> None:
    source = trained(torchvision.models.vgg13_bn(num_classes=10).features)
    head = nn.Linear(512, 10)
    theirs = {f"features.{name}": tensor for name, tensor in source.state_dict().items()}
    theirs |= {f"classifier.{name}": tensor for name, tensor in head.state_dict().items()}
    model = build("vgg13", 0)
    model.load_state_dict(checkpoint_names.to_own_layout(theirs, model, tmp_path, "cifar10"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), head(source(images).flatten(1)), rtol=1e-4, atol=1e-9)


def test_a_teacher_of_other_classes_is_refused_with_both_numbers(tmp_path: Path) -> None:
    hundred = build("resnet8", 2, classes=100).state_dict()
    with pytest.raises(CheckpointError, match=r"a teacher for 100 classes, and cifar10 has 10"):
        checkpoint_names.to_own_layout(hundred, build("resnet8", 2), tmp_path, "cifar10")


def test_tensors_of_another_network_keep_their_names(tmp_path: Path) -> None:
    """So that the error that follows names what the file has."""
    theirs = {"encoder.weight": torch.zeros(2, 2, 3, 3)}
    for name in ("resnet8", "wrn-10-1", "vgg11"):
        assert "encoder.weight" in checkpoint_names.to_own_layout(dict(theirs), build(name), tmp_path, "cifar10")
