"""Models of torchvision and timm by name, fitted to the images and classes of a data set."""

import difflib
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.errors import SettingsError

# Each with the extra of ours that brings it.
LIBRARIES = {"torchvision": "distill", "timm": "timm"}
# Their forward gives a tuple while they train.
_WITH_SIDE_OUTPUTS = ("googlenet", "inception_v3")
_LAST_STAGES = ("layer4", "features", "trunk_output")


def is_library_model(name: str) -> bool:
    """Whether the name is of the form ``torchvision/NAME`` or ``timm/NAME``."""
    return name.partition("/")[0] in LIBRARIES and "/" in name


def check_name(name: str) -> None:
    """Raises SettingsError where the library is not installed or has no such model for images."""
    library, _, model = name.partition("/")
    known = _known_models(library)
    if model not in known:
        near = difflib.get_close_matches(model, known, n=4)
        advice = f"it is near to {', '.join(f'{library}/{other}' for other in near)}" if near else "see its own list"
        raise SettingsError(f"model is {name!r}, which {library} does not have as a classifier; {advice}.")


def build(name: str, *, in_channels: int, classes: int, pretrained: bool = False) -> nn.Module:
    """The model for ``in_channels`` images and ``classes`` logits.

    Args:
        pretrained: start from the library's weights, downloading them where they are not kept already; a first
            convolution or classifier of another size starts anew, but that one channel gets the sum over colours.

    Raises:
        SettingsError: the weights cannot be had.
    """
    library, _, model = name.partition("/")
    if library == "timm":
        make = _import("timm").create_model
        return _download(name, lambda: make(model, pretrained=pretrained, num_classes=classes, in_chans=in_channels))
    made = _torchvision_model(model, in_channels, classes)
    if pretrained:
        given = _download(name, lambda: _models().get_model(model, weights="DEFAULT")).state_dict()
        own = made.state_dict()
        first = next(key for key, value in own.items() if value.dim() == 4)
        if in_channels == 1:
            given[first] = given[first].sum(1, keepdim=True)
        own.update({key: value for key, value in given.items() if key in own and own[key].shape == value.shape})
        made.load_state_dict(own)
    return made


def pretrained_tensors(name: str, *, in_channels: int, classes: int) -> dict[str, Tensor]:
    """The library's weights as a teacher has them, downloaded where they are not kept already.

    Raises:
        SettingsError: no weights, or weights for another number of classes.
    """
    if not is_library_model(name):
        raise SettingsError(f"teacher is {name!r}, and --pretrained takes torchvision/NAME or timm/NAME.")
    check_name(name)
    trained_on = _pretrained_classes(name)
    if trained_on != classes:
        raise SettingsError(
            f"teacher {name} comes with weights for {trained_on} classes, and the data have {classes}; give "
            "--teacher-checkpoint with a teacher of these data, or --no-pretrained to train one."
        )
    return build(name, in_channels=in_channels, classes=classes, pretrained=True).state_dict()


def pretrained_colours(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of the colours with which a library's weights were trained; None where it has none."""
    library, _, model = name.partition("/")
    if not is_library_model(name):
        return None
    if library == "timm":
        known = _import("timm").get_pretrained_cfg(model)
        found = None if known is None else (known.mean, known.std)
    else:
        transforms = _models().get_model_weights(model).DEFAULT.transforms()
        found = (transforms.mean, transforms.std)
    if found is None or any(len(values) != 3 for values in found):
        return None
    mean, deviation = (tuple(float(value) for value in values) for values in found)
    return mean, deviation


def default_layer(name: str, model: nn.Module) -> str:
    """The layer whose output is the last feature map, where it is known.

    Raises:
        SettingsError: it is not.
    """
    named = dict(model.named_modules())
    info = getattr(model, "feature_info", None)
    candidates = [stage["module"] for stage in info] if isinstance(info, list) else []
    for layer in (*_LAST_STAGES[:1], *reversed(candidates), *_LAST_STAGES[1:]):
        if layer in named:
            return layer
    top = ", ".join(layer for layer in named if layer and "." not in layer)
    raise SettingsError(
        f"{name} has no layer known to be its last feature map; name one with --teacher-layer or --student-layer, "
        f"at or below {top}."
    )


def _known_models(library: str) -> list[str]:
    if library == "timm":
        return list(_import("timm").list_models())
    models = _models()
    return [name for name in models.list_models(module=models) if name not in _WITH_SIDE_OUTPUTS]


def _pretrained_classes(name: str) -> int:
    library, _, model = name.partition("/")
    if library == "timm":
        known = _import("timm").get_pretrained_cfg(model)
        return int(known.num_classes) if known is not None else 0
    return len(_models().get_model_weights(model).DEFAULT.meta["categories"])


def _torchvision_model(model: str, in_channels: int, classes: int) -> nn.Module:
    made = _models().get_model(model, weights=None, num_classes=classes)
    name, first = next((name, module) for name, module in made.named_modules() if isinstance(module, nn.Conv2d))
    if first.in_channels != in_channels:
        # The attributes of a Conv2d that its constructor takes.
        kept = {key: getattr(first, key) for key in ("stride", "padding", "dilation", "padding_mode")}
        size = (first.kernel_size[0], first.kernel_size[1])
        bias = first.bias is not None
        fitted = nn.Conv2d(in_channels, first.out_channels, size, groups=first.groups, bias=bias, **kept)
        made.set_submodule(name, fitted)
    return made


def _models() -> Any:
    return _import("torchvision").models


def _import(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise SettingsError(
            f"a model of {library} is asked for, and {library} is not installed; "
            f"pip install 'ftfast[{LIBRARIES[library]}]'."
        ) from None


def _download(name: str, get: Any) -> nn.Module:
    try:
        return get()
    except (OSError, RuntimeError) as error:  # libraries wrap what the network says in both
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingsError(f"{name} cannot be had with its weights ({reason}); give --no-pretrained.") from None
