"""Whether a store is what was written, and what its teacher and paraphraser say today."""

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ftfast.distillation.data.stored_views import viewed
from ftfast.distillation.monitor.progress import Progress
from ftfast.distillation.phases.setup import algorithms, load_images, precision_of
from ftfast.distillation.store import header as headers
from ftfast.distillation.store.read import PARAPHRASER, TEACHER, Rows, Store, check_whole
from ftfast.distillation.store.teacher_side import factors_of, frozen_teacher_side, settings_for
from ftfast.errors import StoreError

# Distance of two directions. int8 leaves 0.01 and float8 0.03, other kernels or another device's roundings of bfloat16
# about 0.02; another view of the same image is ten times as far.
MOST_DISTANCE = 0.08


class Verified(NamedTuple):
    """How many views were computed anew, and the largest distance of a stored factor's direction from its own."""

    views: int
    distance: float


def verify(path: Path, *, sample: int = 64, seed: int = 0, **places: Any) -> Verified:
    """Reads every byte of a store, then computes the factors of a sample of its images anew.

    Args:
        sample: how many images, one view of each; 0 looks at the bytes alone and needs no images.
        seed: of the sample.
        places: ``device``, ``data_dir``, ``loader`` and ``workers`` in place of the store's.

    Raises:
        StoreError: naming the file and the field that is not as it was written, or what has changed since.
    """
    with closing(Store(path)) as store:
        for name in (TEACHER, PARAPHRASER):
            if name in store.header.hashes:  # a store that was written from Python has no teacher
                store.checkpoint_of(name)
        with Progress(store.header.images) as progress:
            progress.begin("reading", store.header.images)
            check_whole(store, progress.advance)
        return _compute_anew(store, sample, seed, places) if sample else Verified(0, 0.0)


def _compute_anew(store: Store, sample: int, seed: int, places: dict[str, Any]) -> Verified:
    header = store.header
    settings = settings_for(header, **places)
    headers.check_settings(store.path, header, settings)
    with algorithms(settings.threads), ExitStack() as stack:
        train, _ = load_images(settings)
        stack.callback(train.close)
        images = viewed(train, settings.data_dir)
        headers.check_hashes(store.path, header, images.hashes())
        both = (store.checkpoint_of(name) for name in (TEACHER, PARAPHRASER))
        teacher_side = frozen_teacher_side(settings, header, train, *both)
        largest = 0.0
        rows = _sample(header.images, header.views, sample, seed)
        for first in range(0, len(rows.images), header.batch_size):
            batch = Rows(*(values[first : first + header.batch_size] for values in rows))
            pixels = next(images.cut(iter([(batch.images, store.boxes[batch.images, batch.views])])))[0]
            factors, logits = factors_of(teacher_side, precision_of(settings), pixels)
            found = store.read(batch)
            largest = max(largest, _check(store, batch, "factor", found[0].to(factors.device), factors))
            if header.classes:
                _check(store, batch, "logits", found[1].to(logits.device), logits)
    return Verified(len(rows.images), largest)


def _sample(images: int, views: int, sample: int, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(images, min(sample, images), replace=False))
    return Rows(chosen, random.integers(0, views, len(chosen)))


def _check(store: Store, rows: Rows, what: str, stored: Tensor, computed: Tensor) -> float:
    directions = [F.normalize(values.float().flatten(1), dim=1) for values in (stored, computed)]
    distances = (directions[0] - directions[1]).norm(dim=1)
    worst = int(distances.argmax())
    if not float(distances[worst]) <= MOST_DISTANCE:
        raise StoreError(
            f"the store {store.path} differs from what its teacher and paraphraser give: the {what} of image "
            f"{rows.images[worst]}, view {rows.views[worst]}, is {float(distances[worst]):.2f} away, and at most "
            f"{MOST_DISTANCE} is taken; build the store anew."
        )
    return float(distances[worst])
