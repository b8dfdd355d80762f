"""Building a store: the frozen teacher and paraphraser run once over fixed views of all training images.

Shards are made one by one, each from its own images alone, so that a build that was ended goes on with the shards that
are missing and ends in the same bytes; several processes take every so-manieth shard.
"""

import dataclasses
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from ftfast.distillation.data import class_names
from ftfast.distillation.data.photographs import listing
from ftfast.distillation.data.photographs.readers import translate_reader_errors
from ftfast.distillation.data.stored_views import SmallImages, ViewedImages, viewed
from ftfast.distillation.monitor.progress import Progress
from ftfast.distillation.phases.run_folder import RunFolder, read_settings
from ftfast.distillation.phases.setup import algorithms, load_images, precision_of
from ftfast.distillation.runtime import checkpoint, files
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.runtime.processes import joined, translate_distributed_errors
from ftfast.distillation.settings.fields import check_fields, setting
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.store import header as headers
from ftfast.distillation.store import shard_files
from ftfast.distillation.store.compute import ShardMaker, describe, describe_work, estimate
from ftfast.distillation.store.header import Header
from ftfast.distillation.store.read import PARAPHRASER, TEACHER
from ftfast.distillation.store.shard_files import DTYPES
from ftfast.distillation.store.teacher_side import frozen_teacher_side, read_run
from ftfast.errors import StoreError

DEFAULT_VIEWS = 4


@dataclasses.dataclass(frozen=True)
class Request:
    """What to store.

    Raises:
        SettingsError: a value outside what its field takes.
    """

    views: int | None = setting(None, "of each image (default: 4, and 1 without augmentation)", least=1, most=1000)
    dtype: str = setting("int8", "of the factors", choices=tuple(DTYPES))
    logits: bool = setting(False, "keep the teacher's too")
    seed: int = setting(0, "of the views", least=0)
    batch_size: int = setting(64, "images that go through the teacher at once, with all their views", least=1)
    shard_images: int | None = setting(None, "in a file, whole batches (default: about 64 MiB)", least=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.shard_images is not None and self.shard_images % self.batch_size:
            raise StoreError(
                f"shard_images is {self.shard_images}; it takes whole batches, a multiple of {self.batch_size}."
            )


def build_store(
    run: Path,
    path: Path,
    request: Request,
    *,
    resume: bool = False,
    only_estimate: bool = False,
    device: str = "auto",
    data_dir: str | None = None,
    workers: int | None = None,
) -> Header:
    """Builds a store from the teacher, paraphraser and settings of a run folder.

    Args:
        path: a new folder or, with ``resume``, one in which the same build was begun.
        only_estimate: say how large the store would be and how long it would take, and write nothing.
        device, data_dir, workers: in place of the run's.

    Raises:
        DistillError: in one sentence, before anything is written where that can be known before.
        OSError: the store cannot be written.
    """
    settings = _settings(run, device=device, data_dir=data_dir, workers=workers)
    with ExitStack() as stack:
        stack.enter_context(translate_distributed_errors())
        stack.enter_context(translate_reader_errors())
        processes = stack.enter_context(joined(settings.device))
        stack.enter_context(algorithms(settings.threads))
        progress = stack.enter_context(Progress(settings.dataset().train_images, quiet=not processes.is_first))
        train, _ = load_images(settings, report=progress.say)
        stack.callback(train.close)
        images = viewed(train, settings.data_dir)
        teacher, paraphraser = processes.on_first(lambda: read_run(run))
        if settings.dataset().is_streamed:
            named = listing.named(settings.data_dir, settings.loader)
            class_names.check_same(RunFolder(run).teacher, teacher.description, named)
        header = header_of(settings, images, teacher, paraphraser, request)
        teacher_side = frozen_teacher_side(settings, header, train, teacher, paraphraser)
        maker = ShardMaker(header, images, teacher_side, precision_of(settings))

        def begin() -> list[int] | None:
            """The shards to make; None where nothing is left to do."""
            if _check_path(path, header, resume=resume):
                progress.say(f"the store {path} is finished already")
                return None
            left = _left(path, header, progress.say)
            found = estimate(path, maker, left, processes.part.ranks)
            progress.say(describe(header))
            progress.say(describe_work(found))
            if found.bytes > found.free:
                raise StoreError(
                    f"{path} has {decimal(found.free)} free, and the store takes {decimal(found.bytes)} more; make "
                    "room, choose another place, fewer --views or a smaller --dtype."
                )
            if only_estimate:
                return None
            try:
                stack.enter_context(files.locked(path))
            except BlockingIOError:
                raise StoreError(f"another process is building {path}; wait for it, or choose another name.") from None
            _check_path(path, header, resume=resume)  # another process may have filled it meanwhile
            _begin(path, header, teacher, paraphraser)
            return left

        left = processes.on_first(begin)
        if left is None:
            return header
        own = left[processes.part.rank :: processes.part.ranks]
        progress.begin("factors", sum(len(header.rows_of(shard)) for shard in own))
        _write(path, maker, own, progress)
        processes.wait()
        processes.on_first(lambda: shard_files.finish(path, header))
        if processes.is_first:
            (path / files.LOCK).unlink(missing_ok=True)
        progress.end()
        progress.say(f"the store {path} is finished")
    return header


def _settings(run: Path, *, device: str, data_dir: str | None, workers: int | None) -> Settings:
    """The run's, on this machine."""
    kept = read_settings(RunFolder(run).settings)
    # A view is a crop and a flip, whatever else the run's own students were shown.
    changes: dict[str, Any] = {"device": device, "compile": "auto", "store": None, "rand_augment": 0, "cutout": 0}
    changes |= {"data_dir": data_dir} if data_dir is not None else {}
    changes |= {"workers": workers} if workers is not None else {}
    return dataclasses.replace(kept, **changes).resolved()


def header_of(
    settings: Settings, images: ViewedImages, teacher: Checkpoint, paraphraser: Checkpoint, request: Request
) -> Header:
    """The header of the store that a request means, unfinished."""
    height, width = settings.map_size()
    factor = (paraphraser.description["model"]["factor_channels"], height, width)
    views = request.views
    if views is None:
        views = min(DEFAULT_VIEWS, images.different_views) if isinstance(images, SmallImages) else DEFAULT_VIEWS
    classes = settings.dataset().classes if request.logits else 0
    count = len(images.labels)
    hashes = {
        "teacher": files.hash_tensors(teacher.tensors),
        "paraphraser": files.hash_tensors(paraphraser.tensors),
        **images.hashes(),
    }
    return Header(
        settings={name: getattr(settings, name) for name in headers.TAKEN},
        hashes=hashes,
        transform=images.transform(),
        images=count,
        views=views,
        factor=factor,
        dtype=request.dtype,
        computed_in=settings.dtype,
        classes=classes,
        seed=request.seed,
        batch_size=request.batch_size,
        shard_images=request.shard_images
        or shard_files.images_in_a_shard(request.batch_size, count, views, factor, request.dtype),
    )


def _check_path(path: Path, header: Header, *, resume: bool) -> bool:
    """Whether the store is finished already; refuses a folder that is not for this build."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file; choose another name for the store.")
    holds_store = (path / headers.FILE).exists()
    if files.contents(path) and not holds_store:
        raise StoreError(f"{path} holds other files; choose another name for the store.")
    if not holds_store:
        return False
    begun = headers.read(path)
    if not resume:
        held = "a finished store" if begun.is_finished else "a store that is not finished; go on with --resume"
        raise StoreError(f"{path} holds {held}{';' if begun.is_finished else ', or'} choose another name.")
    headers.check_same_build(path, begun, header)
    return begun.is_finished


def _begin(path: Path, header: Header, teacher: Checkpoint, paraphraser: Checkpoint) -> None:
    for entry in path.iterdir():
        if files.is_left_over(entry):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name, kept in ((TEACHER, teacher), (PARAPHRASER, paraphraser)):
        if not (path / name).exists():
            checkpoint.save(path / name, kept)
    if not (path / headers.FILE).exists():
        headers.write(path, header)


def _left(path: Path, header: Header, say: Callable[[str], None]) -> list[int]:
    """The shards that are not there."""
    left = []
    for shard in range(header.shard_count):
        file = shard_files.shard_path(path, shard)
        try:
            if file.exists():
                shard_files.check_head(file, shard_files.read_head(file), header, shard)
                continue
        except StoreError as error:
            say(f"warning: {str(error).partition(';')[0].rstrip('.')}; it is made anew")
        left.append(shard)
    return left


def _write(path: Path, maker: ShardMaker, own: list[int], progress: Progress) -> None:
    """One shard is written by a thread while the next is made."""
    with ThreadPoolExecutor(1, thread_name_prefix="shard writer") as thread:
        writing: Future[None] | None = None
        for shard, tensors in maker.make(own):
            if writing is not None:
                writing.result()
            writing = thread.submit(shard_files.write_shard, shard_files.shard_path(path, shard), tensors)
            progress.advance(len(maker.header.rows_of(shard)))
        if writing is not None:
            writing.result()
