"""Faster R-CNN round backbones whose last map students learn from."""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation, FrozenBatchNorm2d, MultiScaleRoIAlign

from ftfast import FeatureTap

# For generated scenes: the channels of a backbone's three stages, and the blocks of each.
SMALL = {"small-teacher": ((32, 64, 128), 2), "small-student": ((8, 16, 32), 1)}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
NAMES = (*SMALL, "vgg16", *RESNETS, *(f"{name}-fpn" for name in RESNETS))


def detector(name: str, classes: int, *, pretrained: bool = True) -> FasterRCNN:
    """A Faster R-CNN.

    Args:
        name: one of NAMES: a ResNet's last stage looks at each box, unless there is a pyramid (``-fpn``) on all stages.
        classes: the background among them.
        pretrained: torchvision's weights for ImageNet in the backbone; the small ones have none.
    """
    weights = "DEFAULT" if pretrained else None
    if name in SMALL:
        return _small(*SMALL[name], classes)
    if name == "vgg16":
        return _vgg16(classes, weights)
    if name.endswith("-fpn"):
        return FasterRCNN(resnet_fpn_backbone(backbone_name=name.removesuffix("-fpn"), weights=weights), classes)
    return _resnet(name, classes, weights)


def last_map(model: FasterRCNN) -> str:
    """The name, in the backbone, of the layer whose map all that follows shares: the last, or that under a pyramid."""
    body = getattr(model.backbone, "body", None)
    last = list((body or model.backbone).named_children())[-1][0]
    return f"body.{last}" if body else last


@torch.no_grad()
def last_shape(model: FasterRCNN, side: int = 128) -> torch.Size:
    """``[C, H, W]`` of that map, of a square image."""
    with FeatureTap(model.backbone.eval(), last_map(model)) as tap:
        _, features = tap(torch.zeros(1, 3, side, side, device=next(model.parameters()).device))
    return features.shape[1:]


def _small(widths: tuple[int, ...], blocks: int, classes: int) -> FasterRCNN:
    backbone = nn.Sequential(Conv2dNormActivation(3, widths[0]))
    for before, width in pairwise((widths[0], *widths)):
        halved = Conv2dNormActivation(before, width, 1, stride=2, activation_layer=None)
        backbone.append(
            nn.Sequential(BasicBlock(before, width, 2, halved), *(BasicBlock(width, width) for _ in range(blocks - 1)))
        )
    anchors = AnchorGenerator(((16, 28, 44),), ((1.0,),))
    fewer = {f"rpn_pre_nms_top_n_{mode}": 300 for mode in ("train", "test")}
    fewer |= {"rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 50}
    return _single_map(
        backbone,
        widths[-1],
        classes,
        TwoMLPHead(25 * widths[-1], 64),
        64,
        anchors,
        pooled=5,
        min_size=96,
        max_size=160,
        size_divisible=8,
        box_batch_size_per_image=64,
        **fewer,
    )


def _vgg16(classes: int, weights: str | None) -> FasterRCNN:
    """The paper's student: five blocks without the last pooling; two layers of its classifier look at each box."""
    vgg = torchvision.models.vgg16(weights=weights)
    backbone = vgg.features[:-1]
    backbone[:10].requires_grad_(False)
    return _of_its_time(backbone, 512, classes, nn.Sequential(nn.Flatten(), *vgg.classifier[:6]), 4096, pooled=7)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C]``."""
        return x.mean((2, 3))


def _resnet(name: str, classes: int, weights: str | None) -> FasterRCNN:
    """The paper's teacher: all but the last stage is shared, at the scale of VGG-16's last map."""
    resnet = torchvision.models.get_model(name, weights=weights, norm_layer=FrozenBatchNorm2d)
    shared = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    backbone = nn.Sequential(OrderedDict((child, getattr(resnet, child)) for child in shared))
    backbone[:5].requires_grad_(False)
    channels = resnet.fc.in_features
    return _of_its_time(backbone, channels // 2, classes, nn.Sequential(resnet.layer4, _Mean()), channels, pooled=14)


def _of_its_time(*parts: Any, pooled: int) -> FasterRCNN:
    """With the anchors and sizes of Faster R-CNN when the paper was written."""
    anchors = AnchorGenerator(((128, 256, 512),), ((0.5, 1.0, 2.0),))
    return _single_map(*parts, anchors, pooled=pooled, min_size=600, max_size=1000)


def _single_map(
    backbone: nn.Module,
    channels: int,
    classes: int,
    head: nn.Module,
    head_features: int,
    anchors: AnchorGenerator,
    *,
    pooled: int,
    **options: Any,
) -> FasterRCNN:
    backbone.out_channels = channels
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0"], pooled, 2),
        box_head=head,
        box_predictor=FastRCNNPredictor(head_features, classes),
        **options,
    )
