"""Factors of images of one's own: written from a loader in Python, read beside the same images."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ftfast import FactorStore, FactorTransfer, FrozenTeacher, Paraphraser, Translator, write_factors
from ftfast.cli import main
from ftfast.distillation.store import shard_files
from ftfast.distillation.store.read import Store
from ftfast.errors import StoreError

IMAGES, LABELS = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 4
DATA = TensorDataset(IMAGES, LABELS)


def teacher() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def teacher_side(**options: object) -> tuple[FrozenTeacher, Paraphraser]:
    return FrozenTeacher(teacher(), "0", **options), Paraphraser(6, 0.5)  # type: ignore[arg-type]


def relative(found: Tensor, expected: Tensor) -> float:
    first, second = (F.normalize(each.detach().double().flatten(1), dim=1) for each in (found, expected))
    return float((first - second).norm(dim=1).max())


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 17 images in int8: the last one is not full, and batches cross their borders."""
    monkeypatch.setattr(shard_files, "_SHARD_BYTES", 17 * 3 * 4 * 4)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.02), ("float8_e4m3fn", 0.06), ("float16", 1e-3)])
def test_each_image_gets_the_direction_of_its_own_factor(
    dtype: str, most: float, tmp_path: Path, small_shards: None
) -> None:
    frozen, paraphraser = teacher_side(classifier=True)
    store = write_factors(tmp_path / "store", frozen, paraphraser, DataLoader(DATA, 12), dtype=dtype, logits=True)
    assert len(store) == 50
    assert len(list((tmp_path / "store").glob("shard-*"))) == (3 if dtype != "float16" else 7)
    loader = DataLoader(FactorStore(tmp_path / "store", DATA), batch_size=16, shuffle=True)
    seen = 0
    for images, labels, factors, logits in loader:
        found = frozen(images)
        assert relative(factors, paraphraser.encode(found.features)) < most
        torch.testing.assert_close(logits.float(), found.logits, rtol=1e-2, atol=1e-3)
        assert torch.equal(labels, LABELS[(images[:, None] == IMAGES).flatten(2).all(2).nonzero()[:, 1]])
        seen += len(images)
    assert seen == 50


def test_a_student_learns_from_it_without_a_teacher(tmp_path: Path) -> None:
    write_factors(tmp_path / "store", *teacher_side(), DataLoader(DATA, 32))
    store = FactorStore(tmp_path / "store", DATA)
    translator = Translator(5, 3)
    head = FactorTransfer(store.paraphraser(), translator, weight=100.0)
    for images, _, factor in DataLoader(store, batch_size=25):
        head(torch.randn(len(images), 5, 4, 4), teacher_factor=factor).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in translator.parameters())


def test_without_images_it_gives_the_factors_alone_and_counts_from_both_ends(tmp_path: Path) -> None:
    store = write_factors(tmp_path / "store", *teacher_side(), IMAGES.split(20))
    assert [item[0].shape for item in store] == [(3, 4, 4)] * 50
    assert torch.equal(store[-1][0], store[49][0])
    with pytest.raises(IndexError):
        store[50]


def test_workers_read_what_the_first_process_had_opened(tmp_path: Path) -> None:
    store = write_factors(tmp_path / "store", *teacher_side(), IMAGES.split(20))
    here = store[3][0]  # a file is open now
    there = next(iter(DataLoader(store, batch_size=4, num_workers=1, multiprocessing_context="fork")))[0]
    assert torch.equal(there[3], here)
    assert Store(tmp_path / "store").__getstate__()["_files"] == store._store.__getstate__()["_files"] == {}


def test_the_paraphraser_comes_back_as_it_was(tmp_path: Path) -> None:
    frozen, _ = teacher_side()
    paraphraser = Paraphraser(6, 0.5, norm="batch").eval()
    found = write_factors(tmp_path / "store", frozen, paraphraser, IMAGES.split(20)).paraphraser()
    features = torch.randn(2, 6, 4, 4)
    assert torch.equal(found.encode(features), paraphraser.encode(features))
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_images_in_another_order_are_noticed_by_their_labels(tmp_path: Path) -> None:
    write_factors(tmp_path / "store", *teacher_side(), DataLoader(DATA, 32))
    store = FactorStore(tmp_path / "store", TensorDataset(IMAGES.flip(0), LABELS.flip(0)))
    with pytest.raises(StoreError, match=r"image 0 has label 1, and 0 in the store"):
        next(iter(DataLoader(store, batch_size=4)))
    with pytest.raises(StoreError, match=r"images has 10 items, and the store .* is of 50"):
        FactorStore(tmp_path / "store", TensorDataset(IMAGES[:10]))
    with pytest.raises(StoreError, match=r"view is 1; the store .* has 1"):
        FactorStore(tmp_path / "store", view=1)


class Broken:
    def __iter__(self):
        yield IMAGES[:20]
        raise KeyboardInterrupt


def test_nothing_is_left_of_what_was_not_written_to_its_end(tmp_path: Path) -> None:
    frozen, paraphraser = teacher_side()
    for loader, error in ((Broken(), KeyboardInterrupt), ([], StoreError), ([IMAGES * float("inf")], StoreError)):
        with pytest.raises(error):
            write_factors(tmp_path / "store", nn.Identity() if loader else frozen, Paraphraser(3), loader)
    with pytest.raises(StoreError, match="classifier=True"):
        write_factors(tmp_path / "store", frozen, paraphraser, [IMAGES], logits=True)
    with pytest.raises(StoreError, match="dtype is 'int4'"):
        write_factors(tmp_path / "store", frozen, paraphraser, [IMAGES], dtype="int4")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "store").mkdir()
    with pytest.raises(FileExistsError):
        write_factors(tmp_path / "store", frozen, paraphraser, [IMAGES])


def test_the_command_line_describes_and_checks_it_and_refuses_to_train_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "store")
    write_factors(path, *teacher_side(), DataLoader(DATA, 32))
    assert main(["store", "info", path]) == 0
    assert "50 images x 1 view, factors 3x4x4 in int8" in capsys.readouterr().out
    assert main(["store", "verify", path, "--sample", "0"]) == 0
    for words in (["store", "verify", path], ["distill", "--store", path, "--output", str(tmp_path / "run")]):
        assert main(words) == 2
        assert "images of one's own" in capsys.readouterr().err
