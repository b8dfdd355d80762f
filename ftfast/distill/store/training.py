"""A training from a store: what has to agree with it, and what it gives in the place of the first two phases."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ftfast.distill.data.images import Images
from ftfast.distill.data.stored_views import viewed
from ftfast.distill.phases.setup import Setup, load_images
from ftfast.distill.phases.teacher import read_teacher
from ftfast.distill.phases.trainable import TeacherSide
from ftfast.distill.runtime import files
from ftfast.distill.runtime.checkpoint import Checkpoint
from ftfast.distill.settings.run_settings import Settings
from ftfast.distill.store import header as headers
from ftfast.distill.store.read import PARAPHRASER, TEACHER, Store
from ftfast.distill.store.stored_images import StoredImages
from ftfast.distill.store.teacher_side import NoTeacher, filled_paraphraser
from ftfast.distill.training.methods import any_needs
from ftfast.errors import StoreError


def check(settings: Settings) -> None:
    """Raises StoreError where resolved settings cannot train from their store, naming what differs from it."""
    store = _opened(settings)
    for name in (TEACHER, PARAPHRASER):
        store.checkpoint_of(name)
    if settings.teacher_checkpoint is not None:
        headers.check_hashes(store.path, store.header, {"teacher": files.hash_tensors(read_teacher(settings))})
    train, _ = load_images(settings)
    try:
        images = viewed(train, _data_folder(settings))
        headers.check_hashes(store.path, store.header, images.hashes())
    finally:
        train.close()


def _opened(settings: Settings) -> Store:
    assert settings.store is not None
    path = Path(settings.store)
    headers.check_settings(path, headers.read(path), settings)
    store = Store(path)
    if any_needs(settings.methods, "logits") and not store.header.classes:
        raise StoreError(
            f"methods has {', '.join(settings.methods)}, and the store {path} has no logits; leave kd out, or build it "
            "with --logits."
        )
    height, width = settings.map_size()
    if any_needs(settings.methods, "factors") and store.header.factor[1:] != (height, width):
        raise StoreError(
            f"student gives maps of {height}x{width}, and the store {path} has factors of "
            f"{store.header.factor[1]}x{store.header.factor[2]}; take another --student or --student-layer."
        )
    return store


def _data_folder(settings: Settings) -> Path | None:
    return None if settings.data_dir is None else Path(settings.data_dir)


def stored_images(settings: Settings, train: Images) -> StoredImages:
    """The training images of resolved settings, which :func:`check` has let pass, with what their store holds."""
    return StoredImages.of(viewed(train, _data_folder(settings)), _opened(settings), torch.device(settings.device))


def stored_teacher_side(setup: Setup, store: Store) -> tuple[TeacherSide, Checkpoint, dict[str, Any] | None]:
    """The paraphraser, a teacher that is never asked, its checkpoint, and the paraphraser's diagnosis.

    Both checkpoints are copied into the run folder, which then has what every run folder has.
    """
    found = {name: setup.processes.on_first(partial(store.checkpoint_of, name)) for name in (TEACHER, PARAPHRASER)}
    for name, path in ((TEACHER, setup.folder.teacher), (PARAPHRASER, setup.folder.paraphraser)):
        if not setup.processes.on_first(path.exists):
            setup.keep(path, found[name])
    teacher, paraphraser = found[TEACHER], found[PARAPHRASER]
    header = store.header
    setup.progress.say(
        f"factor store: {header.settings['teacher']}, {teacher.description['accuracy']:.2f} % of the test images; "
        f"{header.images:,} images x {header.views} view{'s' * (header.views > 1)} in {header.dtype}"
    )
    filled = filled_paraphraser(setup.settings, paraphraser)
    return TeacherSide(NoTeacher(), filled), teacher, paraphraser.description["diagnosis"]
