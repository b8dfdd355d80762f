"""Models by name: the paper's families for small images, and those of torchvision and timm; and their feature maps."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.distillation.models import libraries
from ftfast.distillation.models.cifar import SHORTCUTS, VGG, VGG_STAGES, ResNet, WideResNet
from ftfast.distillation.runtime.seeds import seeded
from ftfast.errors import SettingsError
from ftfast.features.tap import FeatureTap


class Outputs(NamedTuple):
    """What a network says about a batch: logits ``[N, classes]`` and last feature map ``[N, C, H, W]``."""

    logits: Tensor
    features: Tensor


__all__ = ["SHORTCUTS", "FeatureMap", "ResNet", "build_model", "feature_map", "place"]
LAST_STAGE = "stage3"  # of a ResNet

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Family:
    """A family of models: the names it takes, with examples, and what its paper's networks have.

    Attributes:
        takes: whether there is a model with the name's numbers.
        make: those numbers and by name channels, in_channels, classes and shortcut to a model.
        layer: the name of the last feature map.
        channels: of the first convolution or stage.
    """

    pattern: str
    examples: str
    takes: Callable[..., bool]
    make: Callable[..., nn.Module]
    layer: str
    channels: int


FAMILIES = (
    Family(
        r"resnet(\d{1,4})",
        "resnet<6n+2> (resnet8, resnet14, resnet20, ...)",
        lambda depth: depth >= 8 and depth % 6 == 2,
        ResNet,
        LAST_STAGE,
        16,
    ),
    Family(
        r"wrn-(\d{1,4})-(\d{1,3})",
        "wrn-<6n+4>-<k> (wrn-16-2, wrn-40-1, ...)",
        lambda depth, width: depth >= 10 and depth % 6 == 4 and width > 0,
        lambda *numbers, shortcut, **sizes: WideResNet(*numbers, **sizes),
        "activation",
        16,
    ),
    Family(
        r"vgg(\d{1,2})",
        ", ".join(f"vgg{depth}" for depth in VGG_STAGES),
        lambda depth: depth in VGG_STAGES,
        lambda *numbers, shortcut, **sizes: VGG(*numbers, **sizes),
        "stage5",
        64,
    ),
)


def check_name(name: str) -> None:
    """Raises SettingsError where no family and no library has a model of that name."""
    if libraries.is_library_model(name):
        libraries.check_name(name)
    else:
        _family(name)


def own_channels(name: str) -> int:
    """The channels of the first stage in the family's paper; 0 for a library's model, which has its own."""
    return 0 if libraries.is_library_model(name) else _family(name)[0].channels


def build_model(
    name: str,
    channels: int,
    *,
    in_channels: int,
    classes: int,
    shortcut: str = "identity",
    seed: int,
    pretrained: bool = False,
) -> nn.Module:
    """The model of that name with weights drawn from ``seed`` alone; the global random state is left as it was.

    Args:
        name: ``resnet<6n+2>``, ``wrn-<6n+4>-<k>``, ``vgg11`` to ``vgg19``, ``torchvision/NAME`` or ``timm/NAME``.
        channels: of the first stage, 0 for the family's own; libraries' models have theirs.
        shortcut: of ResNets alone.
        pretrained: start from the library's weights; a classifier for other classes starts anew.

    Raises:
        SettingsError: an unknown name, or weights that cannot be had.
    """
    with seeded(seed):
        if libraries.is_library_model(name):
            return libraries.build(name, in_channels=in_channels, classes=classes, pretrained=pretrained)
        if pretrained:
            raise SettingsError(f"{name} has no weights to start from; they come with torchvision/NAME and timm/NAME.")
        family, numbers = _family(name)
        sizes = {"channels": channels or family.channels, "in_channels": in_channels, "classes": classes}
        return family.make(*numbers, shortcut=shortcut, **sizes)


def _family(name: str) -> tuple[Family, list[int]]:
    for family in FAMILIES:
        match = re.fullmatch(family.pattern, name)
        numbers = [int(number) for number in match.groups()] if match else []
        if match and family.takes(*numbers):
            return family, numbers
    taken = ", ".join(family.examples for family in FAMILIES)
    raise SettingsError(f"model is {name!r}; it takes {taken}, torchvision/NAME or timm/NAME.")


def place(model: Model, device: torch.device) -> Model:
    """The model itself, moved to the device, its convolutions channels_last."""
    model.to(device)
    return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class FeatureMap:
    """A layer's name and the shape of its output for one image."""

    layer: str
    channels: int
    height: int
    width: int


@lru_cache(maxsize=64)
def feature_map(
    name: str,
    channels: int,
    shortcut: str,
    image_shape: tuple[int, int, int],
    *,
    layer: str | None = None,
    option: str = "layer",
) -> FeatureMap:
    """What a layer of a model gives for an image of that shape, found out with an empty one.

    Args:
        layer: a name as ``model.named_modules()`` has it; None for the family's last feature map.
        option: what the error calls the layer.

    Raises:
        SettingsError: no such layer, with the nearest names; a layer without maps; images that the model cannot take.
    """
    model = _probed(name, channels, shortcut, image_shape[0])
    if layer is None:
        is_library = libraries.is_library_model(name)
        layer = libraries.default_layer(name, model) if is_library else _family(name)[0].layer
    names = [known for known, _ in model.named_modules() if known]
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=4, cutoff=0.4) or [
            known for known in names if "." not in known
        ]
        raise SettingsError(f"{option} is {layer!r}, which {name} does not have; the nearest are {', '.join(near)}.")
    size = "x".join(map(str, image_shape))
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            _, features = FeatureTap(model.eval(), layer)(torch.zeros(1, *image_shape, device=device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise SettingsError(f"{name} cannot take images of {size} up to {layer} ({error}).") from None
    if not isinstance(features, Tensor) or features.dim() != 4:
        raise SettingsError(f"{option} {layer!r} of {name} gives no feature map [N, C, H, W]; name one that does.")
    return FeatureMap(layer, *features.shape[1:])


def _probed(name: str, channels: int, shortcut: str, in_channels: int) -> nn.Module:
    """The model without memory for its weights, where it can be built so."""

    def build() -> nn.Module:
        return build_model(name, channels, in_channels=in_channels, classes=10, shortcut=shortcut, seed=0)

    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # a library's initialisation may look at the weights
        return build()


class Teacher(nn.Module):
    """A model in eval mode whatever is asked of it, without gradients or a graph, and otherwise as it is.

    The plain engine's; :class:`ftfast.FrozenTeacher` is faster and checked against it.
    """

    def __init__(self, model: nn.Module, layer: str = LAST_STAGE) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self._tap = FeatureTap(self.model, layer)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """``[N, C, H, W]`` to logits and last features."""
        return Outputs(*self._tap(images))


Network = TypeVar("Network", bound=Callable[[Tensor], Outputs])


class Resized(nn.Module):
    """A network's outputs with its features as maps ``[N, C, H, W]`` of one size.

    Args:
        network: images to :class:`~ftfast.distillation.models.registry.Outputs`, in a module or not.
        size: height and width to which maps of another size are pooled.
        as_map: makes maps of what the network has in the features' place.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Outputs],
        size: tuple[int, int],
        as_map: Callable[[Any], Tensor] = lambda features: features,
    ) -> None:
        super().__init__()
        self.network, self.size, self.as_map = network, size, as_map

    def forward(self, images: Tensor) -> Outputs:
        """``[N, C, H, W]`` to logits and maps."""
        logits, found = self.network(images)
        maps = self.as_map(found)
        return Outputs(logits, maps if maps.shape[2:] == self.size else F.adaptive_avg_pool2d(maps, self.size))


def resized(network: Network, features: FeatureMap, size: tuple[int, int]) -> "Network | Resized":
    """The network itself where its features have that size, else with them pooled."""
    return network if (features.height, features.width) == size else Resized(network, size)
