"""Photographs decoded in a thread ahead of the step: what is drawn, what is left behind, and who decodes how many."""

import io
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ftfast.distillation.data.photographs import crops, decoding, listing, streamed
from ftfast.distillation.data.photographs.gpu_pipeline import Balance, decoded_ahead
from ftfast.distillation.data.photographs.readers import Reader
from ftfast.distillation.data.photographs.streamed import Streamed
from ftfast.errors import DataError
from tests.photographs.photograph_folder import make_folder

CPU = torch.device("cpu")
CLASSES, TRAIN, SIDE = 4, 40, 20
FEW_LEVELS = 6 / 255 / 0.225  # decoders differ in how they enlarge the colours; another box differs by far more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    make_folder(folder, classes=CLASSES, train=TRAIN, val=8)
    return folder


def loaded(folder: Path, loader: str, device: torch.device, workers: int = 2) -> tuple[Streamed, Streamed]:
    parts = streamed.load(
        *(folder, loader, device), image_size=SIDE, workers=workers, rand_augment=0, classes=CLASSES,
        train_images=TRAIN, test_images=8,
    )  # fmt: skip
    assert all(isinstance(part, Streamed) for part in parts)
    return parts  # type: ignore[return-value]


def on_device(images: Streamed) -> Streamed:
    return replace(images, reading=replace(images.reading, on_device=True), _loaders={})


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decoding", "reading"))]


def test_tested_photographs_are_those_of_the_processes(folder: Path) -> None:
    _, test = loaded(folder, "folder", CPU, workers=0)
    for ours, theirs in zip(on_device(test).in_order(3), test.in_order(3), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_a_pass_that_is_left_early_leaves_no_thread(folder: Path) -> None:
    images = on_device(loaded(folder, "folder", CPU)[0])
    begun = images.draw(2, seed=0, epoch=0)
    next(begun)
    assert own_threads()
    begun.close()
    assert not own_threads()
    assert len(list(images.draw(2, seed=0, epoch=0))) == TRAIN // 2
    assert not own_threads()


def test_batches_are_decoded_while_the_step_runs(folder: Path) -> None:
    images = on_device(loaded(folder, "folder", CPU)[0])
    batches = images.draw(4, seed=0, epoch=0)
    next(batches)
    time.sleep(1)
    begin = time.perf_counter()
    next(batches)
    assert time.perf_counter() - begin < 0.1
    batches.close()


def test_the_process_draws_what_it_would_have_drawn(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(on_device(loaded(folder, "folder", CPU)[0]).draw(8, seed=0, epoch=0))
    assert torch.equal(torch.get_rng_state(), before)


class Lost(listing.FolderFiles):
    """Files of a disk that fails."""

    def read(self, index: int) -> bytes:
        raise OSError("input/output error")


def test_what_goes_wrong_in_a_thread_is_raised_in_the_training(folder: Path) -> None:
    found = listing.list_photographs(folder, "folder", "train")
    reader = Reader(Lost(folder, ["a", "b", "c"]), found.labels[:3], SIDE)
    with pytest.raises(DataError, match=r"a cannot be read \(input/output error\); see to the disk"):
        list(decoded_ahead(reader, [[(0, 0, 0)]], CPU, 1))
    assert not own_threads()

    def batches() -> object:
        yield [(0, 0, 0)]
        raise ValueError("no more")

    reader = Reader(found.files, found.labels, SIDE)
    with pytest.raises(ValueError, match="no more"):
        list(decoded_ahead(reader, batches(), CPU, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize(
    ("reading", "decoding", "on_gpu"), [(1e-4, 3e-3, 1e-4), (1e-4, 3e-3, 2e-3), (1e-3, 3e-3, 1e-4)]
)
def test_gpu_and_processor_are_done_at_the_same_time(
    threads: int, reading: float, decoding: float, on_gpu: float
) -> None:
    balance = Balance(threads)
    count = 256
    for _ in range(40):
        share = balance.share(count)
        balance.learn("reading", count * reading, count)
        balance.learn("decoding", share * decoding, share)
        balance.learn("on_gpu", (count - share) * on_gpu, count - share)
    share = balance.share(count)
    of_gpu = (count - share) * on_gpu
    of_threads = (count * reading + share * decoding) / threads
    assert 0 <= share < count
    if share == 0:
        assert of_threads > of_gpu - on_gpu
    else:
        assert of_gpu == pytest.approx(of_threads, abs=max(on_gpu, decoding / threads))


def test_a_first_batch_that_sets_up_the_decoder_is_soon_forgotten() -> None:
    balance = Balance(2)
    for seconds in (3.0, 0.01, 0.01):
        balance.learn("on_gpu", seconds, 100)
    assert balance.on_gpu == pytest.approx(1e-4)


def encoded(picture: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def test_sizes_are_read_from_headers() -> None:
    picture = Image.new("RGB", (37, 53), (1, 2, 3))
    exif = Image.Exif()
    exif[0x010E] = "words" * 500
    plain = encoded(picture)
    for content in (
        plain,
        encoded(picture, progressive=True),
        encoded(picture, exif=exif),
        encoded(picture.convert("L")),
        encoded(picture.convert("CMYK")),
        encoded(picture, "PNG"),
        plain[:2] + b"\xff\xff" + plain[3:],  # filled
    ):
        found = decoding.Encoded.of(content, "a")
        assert (found.height, found.width) == (53, 37)
    for content in (b"", b"\xff\xd8", plain[:40], b"words"):
        with pytest.raises(ValueError, match=r"."):
            decoding.Encoded.of(content, "a")


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (97, 1000), (33, 32), (32, 32), (1000, 61)])
@pytest.mark.parametrize("size", [28, 56, 224])
def test_windows_of_middles_are_where_torchvision_cuts(height: int, width: int, size: int) -> None:
    """On a photograph whose pixels tell their place, to a pixel of the grid."""
    window = crops.middle_of(height, width, size)
    from torchvision.transforms.v2 import functional

    small = functional.resize(torch.zeros(1, height, width), [round(size / crops.MIDDLE)])
    assert small.shape[1:] == (window.grid_height, window.grid_width)
    places = torch.arange(window.grid_height * window.grid_width).reshape(1, window.grid_height, window.grid_width)
    middle = functional.center_crop(places, [size, size])[0]
    assert int(middle[0, 0]) == window.first_row * window.grid_width + window.first_column


@pytest.mark.parametrize(("height", "width"), [(1000, 3), (3, 1000), (1, 1), (40, 30)])
def test_boxes_lie_within_photographs_of_any_shape(height: int, width: int) -> None:
    for seed in range(50):
        box = crops.draw_box(height, width, seed)
        assert box == crops.draw_box(height, width, seed)
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width
        assert min(box.height, box.width) >= 1
    assert len({crops.draw_box(height, width, seed) for seed in range(50)}) > 1


@pytest.mark.cuda
def test_a_gpu_sees_the_photographs_that_the_processor_sees(folder: Path) -> None:
    """JPEG decoders differ by a few levels, and where they round."""
    device = torch.device("cuda")
    trained, tested = loaded(folder, "gpu", device)
    expected_trained, expected_tested = loaded(folder, "folder", device, workers=0)
    for epoch in (0, 1):
        pairs = zip(trained.draw(8, seed=1, epoch=epoch), expected_trained.draw(8, seed=1, epoch=epoch), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours[1], theirs[1])
            assert ours[0].stride() == theirs[0].stride()
            assert difference(ours[0], theirs[0]) < FEW_LEVELS
    for ours, theirs in zip(tested.in_order(3), expected_tested.in_order(3), strict=True):
        assert difference(ours[0], theirs[0]) < FEW_LEVELS


def difference(found: Tensor, expected: Tensor) -> float:
    """The mean over an image's pixels, of the image where it is largest."""
    return float((found - expected).abs().mean((1, 2, 3)).max())
