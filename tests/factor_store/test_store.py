"""What a factor store holds, and that nothing but what was written is ever read from it."""

import dataclasses
import itertools
import json
import shutil
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ftfast import FactorTransfer, FTLoss, Paraphraser, Translator
from ftfast.cli import main
from ftfast.distillation.store import header as headers
from ftfast.distillation.store import shard_files
from ftfast.distillation.store.build import Request
from ftfast.distillation.store.read import Rows, Store
from ftfast.distillation.store.shard_files import DTYPES, as_factors, quantise
from ftfast.distillation.store.stored_images import make_ahead
from ftfast.distillation.store.verify import verify
from ftfast.errors import StoreError
from tests.factor_store.store_folder import REQUEST, contents, make_run, make_store

# Relative L2 error of a direction: twice what factors of normally distributed numbers give, of any seed.
MOST_ERROR = {"int8": 0.02, "float8_e4m3fn": 0.05, "bfloat16": 4e-3, "float16": 5e-4}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def built(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(run_folder, tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(built, tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_a_stored_factor_keeps_its_direction(dtype: str, scale: float) -> None:
    factors = F.leaky_relu(torch.randn(16, 24, 5, 3), 0.1) * scale
    stored = as_factors(quantise(factors, DTYPES[dtype]))
    assert stored.dtype == DTYPES[dtype]
    assert stored.is_contiguous(memory_format=torch.channels_last)
    ours, theirs = (F.normalize(values.double().flatten(1)) for values in (stored, factors))
    assert float((ours - theirs).norm(dim=1).max()) < MOST_ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_zeros_and_one_of_a_single_number_are_stored(dtype: str) -> None:
    factors = torch.zeros(3, 4, 2, 2)
    factors[1, 2, 1, 0], factors[2, 0, 0, 1] = -3e-9, 5.0
    stored = as_factors(quantise(factors, DTYPES[dtype])).float()
    assert torch.equal(stored.sign(), factors.sign())
    assert torch.isfinite(stored).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("maps", [torch.float32, torch.bfloat16])
def test_the_fused_head_reads_the_stored_factor_itself(
    dtype: str, maps: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftfast.ops.ft_loss.native import LossPlan

    head = FactorTransfer(Paraphraser(16), Translator(6, 8), backend="native")
    features = torch.randn(12, 6, 7, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    stored = as_factors(quantise(torch.randn(12, 8, 7, 5), DTYPES[dtype]))
    read: list[tuple[torch.dtype, int]] = []
    launch = LossPlan.forward_with_gradient

    def noted(plan: LossPlan, student: torch.Tensor, teacher: torch.Tensor, *rest: float) -> object:
        read.append((teacher.dtype, teacher.data_ptr()))
        return launch(plan, student, teacher, *rest)

    monkeypatch.setattr(LossPlan, "forward_with_gradient", noted)
    with torch.autocast("cpu", torch.bfloat16, enabled=maps == torch.bfloat16):
        assert "fused" in head.explain(features, teacher_factor=stored)
        loss = head(features, teacher_factor=stored)
        translated = head.translator(features.detach()).detach()
    assert read == [(stored.dtype, stored.data_ptr())]
    expected = FTLoss(backend="reference")(translated.double(), stored.double())
    assert loss.item() == pytest.approx(float(expected), rel=1e-5 if maps == torch.float32 else 1e-2)
    loss.backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()


def test_a_store_holds_what_its_header_says(built: Path) -> None:
    header = headers.read(built)
    assert (header.images, header.views, header.factor, header.classes) == (1000, 3, (8, 2, 2), 10)
    assert header.shard_count == len(list(built.glob("shard-*"))) == 10
    tensors = load_file(shard_files.shard_path(built, 4))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "factors": (100, 3, 2, 2, 8),
        "views": (100, 3, 5),
        "labels": (100,),
        "logits": (100, 3, 10),
    }
    boxes = tensors["views"]
    assert (boxes[..., 2:4] == 8).all()
    assert boxes[..., :2].min() == -1
    assert boxes[..., :2].max() == 1
    assert {tuple(box) for box in boxes[0].tolist()} == {tuple(box) for box in Store(built).boxes[400].tolist()}
    assert all(len({tuple(box) for box in views}) == 3 for views in boxes.tolist())  # no view twice
    assert not [path for path in built.rglob("*") if path.name.startswith(".")]


def test_rows_are_read_by_number_and_view(built: Path) -> None:
    store = Store(built)
    whole = [load_file(shard_files.shard_path(built, shard)) for shard in range(10)]
    random = np.random.default_rng(0)
    rows = Rows(random.integers(0, 1000, 257), random.integers(0, 3, 257))
    factors, logits = store.read(rows)
    for name, found in (("factors", factors.permute(0, 2, 3, 1)), ("logits", logits)):
        expected = torch.cat([part[name] for part in whole])[rows.images, rows.views]
        assert torch.equal(found, expected)
    assert [tensor.shape[0] for tensor in store.read(Rows(rows.images[:0], rows.views[:0]))] == [0, 0]
    store.close()


def test_verify_computes_a_sample_anew(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "verify", str(built), "--sample", "120", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "every byte is as it was written" in out
    assert 0 < float(out.split("at most ")[1].split(" ")[0]) < 0.02
    assert main(["store", "info", str(built)]) == 0
    out = capsys.readouterr().out
    assert "1,000 images x 3 views, factors 8x2x2 in int8 and 10 logits" in out
    assert ", finished" in out


@pytest.mark.parametrize("name", ["factors", "views", "labels", "logits"])
def test_a_flipped_byte_is_found_and_named(store: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = shard_files.shard_path(store, 7)
    place = shard_files.read_head(path).places[name]
    content = bytearray(path.read_bytes())
    content[place.first + place.bytes // 3] ^= 16
    path.write_bytes(content)
    assert main(["store", "verify", str(store), "--sample", "0"]) == 2
    assert f"shard-00007.safetensors: {name} are not as they were written" in capsys.readouterr().err


def test_every_byte_of_a_shard_is_covered(store: Path) -> None:
    path = shard_files.shard_path(store, 3)
    whole = path.read_bytes()
    for place in [0, 9, *np.random.default_rng(1).integers(0, len(whole), 30).tolist()]:
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(StoreError, match="shard-00003"):
            verify(store, sample=0)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


def swapped(path: Path) -> None:
    shutil.copy(path.with_name("shard-00001.safetensors"), path)


@pytest.mark.parametrize("damage", [cut_short, cut_to_nothing, grown, swapped, Path.unlink])
def test_a_damaged_shard_is_refused_when_the_store_is_opened(store: Path, damage: object) -> None:
    damage(shard_files.shard_path(store, 9))  # type: ignore[operator]
    with pytest.raises(StoreError, match="shard-00009"):
        Store(store)


def test_a_shard_that_is_cut_while_it_is_read_ends_in_words(store: Path) -> None:
    opened = Store(store)
    path = shard_files.shard_path(store, 2)
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(StoreError, match=r"shard-00002.*was cut short"):
        opened.read(Rows(np.arange(290, 300), np.zeros(10, np.int64)))


@pytest.mark.parametrize("name", ["teacher", "paraphraser"])
def test_another_teacher_or_paraphraser_in_the_store_is_named(
    store: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ftfast.distillation.runtime import checkpoint

    kept = checkpoint.load(store / name)
    shutil.rmtree(store / name)
    weight = next(key for key, tensor in kept.tensors.items() if tensor.is_floating_point())
    other = {**kept.tensors, weight: kept.tensors[weight] + 1e-3}
    checkpoint.save(store / name, dataclasses.replace(kept, tensors=other))
    assert main(["store", "verify", str(store)]) == 2
    assert f"{name} differs from what the store" in capsys.readouterr().err


def changed(store: Path, **values: object) -> None:
    header = json.loads((store / headers.FILE).read_text())
    (store / headers.FILE).write_text(json.dumps({**header, **values}))


def test_a_newer_version_is_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(store, version=2)
    for words in (["store", "info", str(store)], ["distill", "--store", str(store)]):
        assert main(words) == 2
        assert "store format version 2; this ftfast reads version 1" in capsys.readouterr().err


def test_a_header_that_lacks_a_shard_is_refused(store: Path) -> None:
    changed(store, shards=headers.read(store).to_json()["shards"][:-1])
    with pytest.raises(StoreError, match="it names 9 shards of 10"):
        Store(store)


def test_factors_of_other_weights_are_found_by_a_sample(store: Path, run_folder: Path, tmp_path: Path) -> None:
    """Whole by its checksums, and yet not what its teacher gives: another view of the same images."""
    other = make_store(run_folder, tmp_path / "other", dataclasses.replace(REQUEST, seed=1))
    for shard in range(10):
        ours, theirs = (load_file(shard_files.shard_path(path, shard)) for path in (store, other))
        shard_files.write_shard(shard_files.shard_path(store, shard), {**ours, "factors": theirs["factors"]})
    heads = [shard_files.read_head(shard_files.shard_path(store, shard)) for shard in range(10)]
    changed(store, shards=[{"bytes": head.bytes, "head": head.checksum} for head in heads])
    with pytest.raises(StoreError, match=r"the factor of image .* is .* away"):
        verify(store, sample=50, device="cpu")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "int4"], "dtype is 'int4'; it takes int8"),
        (["--views", "0"], "views is 0; it takes a number of at least 1"),
        (["--views", "19"], "views is 19, and with crop_padding 1 and flip on an image has 18"),
        (["--shard-images", "70"], "shard_images is 70; it takes whole batches, a multiple of 64"),
    ],
)
def test_a_store_that_cannot_be_is_refused(
    run_folder: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "build", str(run_folder), str(tmp_path / "store"), "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_folder_without_a_teacher_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "build", str(tmp_path), str(tmp_path / "store")]) == 2
    assert "settings.json cannot be read" in capsys.readouterr().err
    assert main(["store", "verify", str(tmp_path)]) == 2
    assert "is no factor store: store.json cannot be read" in capsys.readouterr().err


def counted(number: int) -> int:
    if number == 3:
        raise StoreError("the disk is gone")
    return number


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("factor reader")]


def test_what_is_read_ahead_comes_in_order_and_leaves_no_thread() -> None:
    ahead = make_ahead(abs, range(100), depth=2)
    assert next(ahead) == 0
    assert readers()
    assert list(ahead) == list(range(1, 100))
    assert not readers()


def test_a_reader_that_nobody_asks_any_more_ends() -> None:
    with closing(make_ahead(abs, itertools.count())) as ahead:
        assert next(ahead) == 0
    assert not readers()


def test_an_error_of_the_reader_comes_where_its_value_was_due() -> None:
    ahead = make_ahead(counted, range(10))
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StoreError, match="the disk is gone"):
        next(ahead)
    assert not readers()


def test_an_estimate_writes_nothing(run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["store", "build", str(run_folder), str(tmp_path / "store"), "--device", "cpu", "--estimate"]
    assert main([*words, "--dtype", "float16"]) == 0
    said = capfd.readouterr().err
    assert "1,000 images x 4 views, factors 8x2x2 in float16: 344.0 kB in 1 shard" in said
    assert "to do: 1,000 images, 344.0 kB" in said
    assert not (tmp_path / "store").exists()


def test_the_predicted_size_is_the_size(built: Path) -> None:
    from ftfast.distillation.store.compute import image_bytes

    found = sum(path.stat().st_size for path in built.glob("shard-*"))
    predicted = 1000 * image_bytes(headers.read(built))
    assert predicted <= found < predicted + 10 * 2000  # the heads


def test_a_full_disk_is_met_before_the_build(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    assert main(["store", "build", str(run_folder), str(tmp_path / "store"), "--device", "cpu"]) == 2
    assert "has 100.0 kB free, and the store takes 216.0 kB more; make room" in capsys.readouterr().err


def test_a_request_and_its_store_agree_on_every_byte(run_folder: Path, built: Path, tmp_path: Path) -> None:
    assert contents(make_store(run_folder, tmp_path / "store")) == contents(built)
    other = make_store(run_folder, tmp_path / "other", Request(views=1, batch_size=50))
    assert contents(other)["teacher/model.safetensors"] == contents(built)["teacher/model.safetensors"]
