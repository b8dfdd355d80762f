"""Mixup, cutmix and label smoothing: what is done to a whole batch before teacher and student see it.

Both networks get the same mixed images, so factors and soft labels are those of the mixed image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ftfast.distill.models.registry import seeded


class Mixing:
    """Changes a batch's images and labels; false where nothing is to be changed.

    Args:
        classes: of the labels.
        label_smoothing: share of the label that all classes get alike, as ``F.cross_entropy`` has it.
        mixup: alpha of mixup's beta distribution (Zhang et al. 2018), 0 for none.
        cutmix: alpha of cutmix's (Yun et al. 2019), 0 for none; of both, each batch draws one.
    """

    def __init__(self, classes: int, label_smoothing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self._classes = classes
        self._smoothing = label_smoothing
        self._mixup, self._cutmix = float(mixup), float(cutmix)

    def __bool__(self) -> bool:
        return bool(self._smoothing or self._mixup or self._cutmix)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images ``[N, C, H, W]``, channels_last as they came, and labels ``[N, classes]`` float32.

        Args:
            labels: ``[N]`` int64.
            seed: decides what is drawn; torch's own random state stays as it was.
        """
        if not self:
            return images, labels
        mixed = F.one_hot(labels, self._classes).float()
        if self._mixup or self._cutmix:
            with seeded(seed):
                images, mixed = self._mix(images, labels)
            images = images.contiguous(memory_format=torch.channels_last)
        return images, mixed * (1 - self._smoothing) + self._smoothing / self._classes

    def _mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from torchvision.transforms import v2

        kinds = []
        if self._mixup:
            kinds.append(v2.MixUp(alpha=self._mixup, num_classes=self._classes))
        if self._cutmix:
            kinds.append(v2.CutMix(alpha=self._cutmix, num_classes=self._classes))
        chosen = int(torch.randint(len(kinds), ())) if len(kinds) > 1 else 0
        return kinds[chosen](images, labels)
