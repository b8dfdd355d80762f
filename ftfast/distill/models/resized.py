"""Feature maps pooled to one size, where teacher and student have maps of two."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from ftfast.distill.models.registry import FeatureMap, resize
from ftfast.distill.training.methods import Outputs

Network = TypeVar("Network", bound=Callable[[Tensor], Outputs])


class Resized(nn.Module):
    """A network's outputs with its features ``[N, C, H, W]`` pooled to ``size`` (height, width).

    Args:
        network: images to :class:`~ftfast.distill.training.methods.Outputs`.
        size: at most that of the features.
    """

    def __init__(self, network: Callable[[Tensor], Outputs], size: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.size = size

    def forward(self, images: Tensor) -> Outputs:
        """``[N, C, H, W]`` to logits and pooled features."""
        logits, features = self.network(images)
        return Outputs(logits, resize(features, self.size))


def resized(network: Network, features: FeatureMap, size: tuple[int, int]) -> "Network | Resized":
    """The network itself where its features have that size, else with them pooled."""
    return network if (features.height, features.width) == size else Resized(network, size)
