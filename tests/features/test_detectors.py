"""torchvision's detectors: taps on models that take lists of images, and a teacher that is cut in their backbone."""

import pytest
import torch
from torch import Tensor, nn

import ftfast
from ftfast.distillation.models.frozen_teacher import TeacherError

pytest.importorskip("torchvision")

from examples.detection.models import detector, last_map
from examples.detection.scenes import Scenes

CLASSES = 4


@pytest.fixture(scope="module")
def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images, targets = zip(*(Scenes(3, seed=0)[index] for index in range(3)), strict=True)
    assert len({image.shape for image in images}) == 3
    return list(images), list(targets)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: detector(name, CLASSES, pretrained=False) for name in ("small-student", "small-teacher")}


def test_a_detector_in_training_gives_its_losses_and_a_map_that_has_a_gradient(models, batch):
    student = models["small-student"].train()
    with ftfast.FeatureTap(student, "backbone.3") as tap:
        torch.manual_seed(1)  # of the boxes that are drawn
        losses, features = tap(*batch)
        torch.manual_seed(1)
        named, _ = tap(images=batch[0], targets=batch[1])
    torch.manual_seed(1)
    expected = student(*batch)
    assert losses.keys() == expected.keys() == named.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
        torch.testing.assert_close(named[name], loss)
    (gradient,) = torch.autograd.grad(sum(losses.values()), features)
    assert gradient.abs().sum() > 0


def test_a_detector_in_eval_gives_its_boxes_and_the_teacher_sees_the_students_images(models, batch):
    images, _ = batch
    for model in models.values():
        model.eval()
        layers = {"images": "transform", "map": f"backbone.{last_map(model)}"}
        with ftfast.FeatureTaps(model, layers) as taps, torch.no_grad():
            found, seen = taps(images)
            expected = model(images)
        for boxes, others in zip(found, expected, strict=True):
            assert boxes.keys() == {"boxes", "labels", "scores"}
            torch.testing.assert_close(boxes["boxes"], others["boxes"])
        resized = seen["images"][0].tensors
        assert resized.shape[2:] == (seen["map"].shape[2] * 8, seen["map"].shape[3] * 8)
        frozen = ftfast.FrozenTeacher(model.backbone, last_map(model))
        for tensors in (resized, resized[:, :, 8:, 16:]):  # of another size, without being frozen anew
            torch.testing.assert_close(frozen(tensors).features, model.backbone(tensors), rtol=1e-3, atol=1e-4)


def test_a_backbone_with_a_pyramid_is_cut_below_it():
    torch.manual_seed(0)
    model = detector("resnet18-fpn", CLASSES, pretrained=False).eval()
    images = torch.randn(1, 3, 64, 96)
    frozen = ftfast.FrozenTeacher(model.backbone, last_map(model))
    with torch.no_grad():
        expected = model.backbone.body(images)["3"]
    torch.testing.assert_close(frozen(images).features, expected, rtol=1e-3, atol=1e-4)
    assert "cut after body.layer4" in frozen.explain()
    with pytest.raises(TeacherError, match="classifier is True and the teacher's output is a OrderedDict, no logits"):
        ftfast.FrozenTeacher(model.backbone, last_map(model), classifier=True, example=images)
