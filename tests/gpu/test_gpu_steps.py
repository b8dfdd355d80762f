"""What a training gives to a GPU: steps and factors that are waited for nowhere, and steps that are captured whole."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftfast
from bench.training.store_files import write_store
from ftfast.distillation.data.augment import Augmentation
from ftfast.distillation.data.in_memory import Split
from ftfast.distillation.data.stored_views import SmallImages
from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.store.shard_files import quantise
from ftfast.distillation.store.stored_images import StoredImages
from ftfast.distillation.training.methods import Terms
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.step.step import BesideStudent, LearningStep, Precision
from tests.stand_in_gpu.running import Counts, contents, counted

pytestmark = pytest.mark.stand_in_gpu
DEVICE = torch.device("cuda", 0)
PLAIN = Schedule(epochs=3, batch_size=8, learning_rate=0.1, momentum=0.9, weight_decay=1e-4)
KINDS = {
    "plain": (PLAIN, torch.bfloat16),
    "clipped": (replace(PLAIN, clip_gradient=1.0), torch.bfloat16),
    "accumulated": (replace(PLAIN, accumulate=2), torch.bfloat16),
    "float16": (PLAIN, torch.float16),
}


class Network(nn.Module):
    """A convolution with batch norm, whose map is compared, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Outputs:
        features = F.relu(self.norm(self.first(images)))
        return Outputs(self.last(features.mean((2, 3))), features)


def step_of(kind: str) -> Callable[[], Terms]:
    """A step with a teacher beside the student, on a batch that stays."""
    schedule, dtype = KINDS[kind]
    teacher = Network().to(DEVICE).eval().requires_grad_(False)
    student = Network().to(DEVICE).to(memory_format=torch.channels_last)
    paraphraser = ftfast.Paraphraser(16).to(DEVICE).requires_grad_(False)
    head = ftfast.FactorTransfer(paraphraser, ftfast.Translator(16, 8).to(DEVICE))
    both = BesideStudent(teacher, student)

    def terms(images: Tensor, labels: Tensor) -> Terms:
        found, taught = both(images)
        return {"labels": F.cross_entropy(found.logits, labels), "ft": head(found.features, taught.features)}

    trainable = nn.ModuleDict({"model": student, "translator": head.translator})
    step = LearningStep(trainable, terms, schedule, Precision(DEVICE, dtype))
    images = torch.empty(8, 3, 8, 8, device=DEVICE, memory_format=torch.channels_last)
    batch = (images, torch.zeros(8, dtype=torch.int64, device=DEVICE))
    return lambda: step(batch, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing_and_is_captured_whole(kind: str) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step = step_of(kind)
        for _ in range(4):
            step()
        with counted() as eager:
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream), counted() as captured:
            step()
        with counted() as replayed:
            graph.replay()
    beside = eager.launches + eager.copies - eager.own  # the teacher's, on a stream of its own
    assert eager == Counts(launches=eager.launches, copies=eager.copies, own=eager.own), eager
    assert 0 < beside < eager.own, eager
    known = Counts(captured=captured.captured, own=captured.own, allocations=captured.allocations)
    assert captured == known, captured
    assert captured.captured >= eager.launches, (captured, eager)
    assert replayed == Counts(replays=1, own=1), replayed


def test_factors_of_a_store_are_copied_from_page_locked_memory_and_not_waited_for(tmp_path: Path) -> None:
    factors = torch.randn(8, 4, 2, 2)
    pixels = torch.zeros(32, 3, 8, 8, dtype=torch.uint8, device=DEVICE)
    labels = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    images = SmallImages(Split(pixels, labels, augmentation=Augmentation(crop_padding=1, flip=True)))
    with closing(write_store(tmp_path, factors, 32)) as store:
        drawn = StoredImages.of(images, store, DEVICE).draw(8, seed=0, epoch=0)
        batches = [next(drawn)]
        with counted() as found:
            batches.append(next(drawn))
        batches += drawn
        assert (found.pageable, found.synchronisations) == (0, 0), found
        rows = {row.numpy().tobytes() for row in quantise(factors, torch.int8)}
        for _, _, found_factors in batches:
            assert {contents(row) for row in found_factors} <= rows
