"""torchdistill's sample of Factor Transfer for COCO, with and without our one line, on scenes in COCO's format."""

import json
import logging
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ftfast.compat import torchdistill as ours

for package in ("torchdistill", "torchvision", "pycocotools"):
    pytest.importorskip(package)
logging.getLogger("torchdistill").setLevel(logging.ERROR)

from torchdistill.datasets.registry import COLLATE_FUNC_DICT  # noqa: E402
from torchdistill.models.official import OFFICIAL_MODEL_DICT  # noqa: E402
from torchvision.utils import save_image  # noqa: E402

from examples.detection.models import detector  # noqa: E402
from examples.detection.scenes import Scenes  # noqa: E402
from tests.conversions.torchdistill_runs import REPLACING, built_by, run_config  # noqa: E402

# The structure of configs/sample/coco2017/ft/custom_fasterrcnn_resnet18_fpn_from_fasterrcnn_resnet50_fpn.yaml, with
# smaller models and images, the data set read by examples/detection in the place of torchdistill's example, and the
# forward_proc of its first stage, which 1.1.5 asks for and the sample leaves out.
CONFIG = """
{dependencies}
datasets:
  &train_id coco2017/train: !import_call
    key: 'examples.detection.data.coco'
    init:
      kwargs: {{images: '{root}/train2017', labels: '{root}/annotations/instances_train2017.json', training: True}}
models:
  teacher_model: &model
    key: 'small_fasterrcnn'
    kwargs: {{num_classes: 4}}
  student_model: *model
train:
  stage1:
    num_epochs: 1
    train_data_loader: &loader
      dataset_id: *train_id
      sampler:
        class_or_func: !import_get
          key: 'torch.utils.data.RandomSampler'
        kwargs:
      collate_fn: 'coco_collate_fn'
      kwargs: {{batch_size: 2, num_workers: 0}}
    teacher:
      forward_proc: 'forward_batch_only'
      sequential: []
      auxiliary_model_wrapper:
        key: &teacher_key 'Teacher4FactorTransfer'
        kwargs:
          minimal:
            auxiliary_model_wrapper:
              key: 'HeadRCNN'
              kwargs:
                head_rcnn:
                  sequential: ['backbone.body']
          input_module_path: &reduced 'teacher_model.seq.backbone.body.3'
          paraphraser_kwargs: &paraphraser_kwargs
            k: 0.5
            num_input_channels: 32
            kernel_size: 3
            stride: 1
            padding: 1
            uses_bn: True
          paraphraser_ckpt: &paraphraser_ckpt '{checkpoint}'
          uses_decoder: True
      forward_hook:
        input: []
        output: [*reduced, 'paraphraser']
      requires_grad: True
      frozen_modules: ['teacher_model']
    student:
      forward_proc: 'forward_batch_only'
      auxiliary_model_wrapper:
        key: 'EmptyModule'
      sequential: []
      forward_hook:
        input: []
        output: []
      requires_grad: False
    optimizer: &optimizer
      key: 'SGD'
      kwargs: {{lr: 0.0001, momentum: 0.9, weight_decay: 0.0005}}
    criterion:
      key: 'WeightedSumLoss'
      kwargs:
        sub_terms:
          reconst:
            criterion:
              key: 'MSELoss'
              kwargs: {{reduction: 'sum'}}
            criterion_wrapper:
              key: 'SimpleLossWrapper'
              kwargs:
                input: {{is_from_teacher: True, module_path: 'paraphraser', io: 'output'}}
                target: {{is_from_teacher: True, module_path: *reduced, io: 'output'}}
            weight: 1.0
  stage2:
    num_epochs: 1
    train_data_loader: *loader
    teacher:
      forward_proc: 'forward_batch_target'
      sequential: []
      auxiliary_model_wrapper:
        key: *teacher_key
        kwargs:
          minimal:
          input_module_path: &whole 'teacher_model.backbone.body.3'
          paraphraser_kwargs: *paraphraser_kwargs
          paraphraser_ckpt: *paraphraser_ckpt
          uses_decoder: False
      forward_hook:
        input: []
        output: [*whole, 'paraphraser']
      requires_grad: False
    student:
      forward_proc: 'forward_batch_target'
      sequential: []
      auxiliary_model_wrapper:
        key: 'Student4FactorTransfer'
        kwargs:
          input_module_path: &tapped 'student_model.backbone.body.3'
          translator_kwargs:
            num_input_channels: 32
            num_output_channels: 16
            kernel_size: 3
            stride: 1
            padding: 1
            uses_bn: True
          find_unused_parameters: True
      forward_hook:
        input: []
        output: [*tapped, 'translator']
      requires_grad: True
      frozen_modules: ['student_model.backbone.body.0']
    optimizer: *optimizer
    criterion:
      key: 'WeightedSumLoss'
      func2extract_model_loss: 'extract_model_loss_dict'
      kwargs:
        model_term: {{weight: 1.0}}
        sub_terms:
          factor_transfer:
            criterion:
              key: 'FTLoss'
              kwargs: {{p: 1, reduction: 'mean', paraphraser_path: 'paraphraser', translator_path: 'translator'}}
            weight: 1000.0
"""


def write_coco(root: Path, count: int) -> None:
    """Scenes as COCO's images and annotations."""
    (root / "train2017").mkdir(parents=True)
    images, annotations = [], []
    for number, (image, target) in enumerate(Scenes(count, seed=0)[index] for index in range(count)):
        name = f"{number:012}.png"
        save_image(image, root / "train2017" / name)
        images.append({"id": number, "file_name": name, "height": image.shape[1], "width": image.shape[2]})
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            found = {"image_id": number, "category_id": label, "bbox": sides, "area": sides[2] * sides[3]}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **found})
    categories = [{"id": label, "name": str(label)} for label in (1, 2, 3)]
    (root / "annotations").mkdir()
    told = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(told))


def small_fasterrcnn(num_classes: int) -> nn.Module:
    model = detector("small-student", num_classes)
    model.backbone = nn.Sequential(OrderedDict(body=model.backbone))
    return model


def test_the_sample_logs_the_same_losses_with_one_line_more(tmp_path, monkeypatch):
    write_coco(tmp_path / "coco", 4)
    monkeypatch.setitem(OFFICIAL_MODEL_DICT, "small_fasterrcnn", small_fasterrcnn)
    monkeypatch.setitem(COLLATE_FUNC_DICT, "coco_collate_fn", lambda batch: tuple(map(list, zip(*batch, strict=True))))
    write = partial(CONFIG.format, root=(tmp_path / "coco").as_posix())
    ours.restore_keys()
    found = {}
    for side, line in (("torchdistill", ""), ("ftfast", REPLACING)):
        sys.modules.pop("ftfast.compat.torchdistill.replace", None)  # as in a process of its own
        text = write(dependencies=line, checkpoint=(tmp_path / f"{side}.pt").as_posix())
        found[side], box = run_config(text, tmp_path)
        assert built_by(box) == {side}
    ours.restore_keys()
    assert len(found["ftfast"]) == 4
    for number, (step, other) in enumerate(zip(found["ftfast"], found["torchdistill"], strict=True)):
        assert step.keys() == other.keys() == {"loss", "reconst" if number < 2 else "factor_transfer"}
        for name in step:
            assert step[name] == pytest.approx(other[name], rel=1e-3 if number == 3 else 1e-5), (number, name)
    assert all(torch.isfinite(torch.tensor(step["loss"])) for step in found["ftfast"])
