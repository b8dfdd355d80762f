"""ftfast features lists what a model's layers really give."""

import json

import pytest
import torch

import ftfast
from ftfast.cli import main


def listed(capsys, *arguments):
    assert main(["features", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def build(name):
    library, _, model = name.partition("/")
    if library == "timm":
        return pytest.importorskip("timm").create_model(model, num_classes=10).eval()
    return pytest.importorskip("torchvision").models.get_model(model, num_classes=10).eval()


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/mobilenet_v2", "timm/resnet18", "timm/test_vit"])
def test_shapes_are_those_that_a_tap_sees(name, capsys):
    model = build(name)
    found = listed(capsys, name, "--depth", "1")
    images = torch.zeros(2, *found["image"])
    assert found["layers"]
    for layer in found["layers"]:
        with torch.no_grad():
            seen = ftfast.FeatureTap(model, layer["name"])(images)[1]
        assert list(seen.shape[1:]) == layer["shape"], layer
        assert type(model.get_submodule(layer["name"])).__name__ == layer["class"]


@pytest.mark.parametrize(("name", "layer", "shape"), [("resnet20", "stage3", [64, 8, 8]), ("vgg13", "stage5", None)])
def test_the_families_for_small_images(name, layer, shape, capsys):
    layers = {it["name"]: it["shape"] for it in listed(capsys, name)["layers"]}
    assert layer in layers
    assert shape in (None, layers[layer])


def test_size_channels_depth_and_filter(capsys):
    pytest.importorskip("torchvision")
    everything = listed(capsys, "torchvision/resnet18", "--depth", "0")["layers"]
    names = [layer["name"] for layer in everything]
    assert "layer1.0.conv1" in names
    by_depth = listed(capsys, "torchvision/resnet18")["layers"]
    assert [layer["name"] for layer in by_depth] == [name for name in names if name.count(".") < 2]
    filtered = listed(capsys, "torchvision/resnet18", "--filter", "layer?.0.conv1")["layers"]
    assert [layer["name"] for layer in filtered] == [f"layer{stage}.0.conv1" for stage in range(1, 5)]
    assert {layer["name"] for layer in listed(capsys, "torchvision/resnet18", "--filter", "downsample")["layers"]} == {
        name for name in names if "downsample" in name
    }
    (small,) = listed(
        capsys, "torchvision/resnet18", "--image-size", "64x96", "--in-channels", "1", "--filter", "layer4"
    )["layers"][:1]
    assert small["shape"] == [512, 2, 3]
    assert next(layer for layer in everything if layer["name"] == "layer1.0.relu")["runs"] == 2


def test_the_table(capsys):
    assert main(["features", "resnet8", "--depth", "1"]) == 0
    shown = capsys.readouterr().out
    assert "64x8x8" in shown
    assert "images of 3x32x32" in shown
    assert "more with --depth 0" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["resnet21"], "model is 'resnet21'"),
        (["torchvision/resnet1"], "near to torchvision/resnet1"),
        (["resnet8", "--image-size", "7x"], "image-size is '7x'"),
        (["resnet8", "--image-size", "0"], "image-size is '0'"),
        (["resnet8", "--in-channels", "0"], "in-channels is 0"),
        (["resnet8", "--depth", "-1"], "depth is -1"),
        (["resnet8", "--filter", "stege3"], "no layer of resnet8 matches; near to it are stage3"),
        (["torchvision/vit_b_16", "--image-size", "100"], "cannot take images of 3x100x100"),
    ],
    ids=lambda it: it if isinstance(it, str) else "-".join(it),
)
def test_bad_input_is_one_sentence(arguments, says, capsys):
    if "/" in arguments[0]:
        pytest.importorskip("torchvision")
    assert main(["features", *arguments]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1
