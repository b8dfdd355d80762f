"""``store.json``: what a store was made from and how, and the comparison with what it is to be used for."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from ftfast.distillation.data.datasets import DATASETS
from ftfast.distillation.runtime import files
from ftfast.distillation.settings.run_settings import Settings
from ftfast.errors import StoreError, shown

FORMAT = "ftfast-store"
VERSION = 1
FILE = "store.json"
OWN = "own"  # the data set's name in a store that was written from Python
# The settings that decide what a factor is; a training from the store takes them from there.
COMPARED = (
    *("data", "image_size", "classes", "train_images", "crop_padding", "flip"),
    *("teacher", "teacher_channels", "teacher_layer", "shortcut", "rate", "resize_features"),
)
TAKEN = (*COMPARED, "loader")
HASHES = {
    "teacher": "the weights of the teacher",
    "paraphraser": "the weights of the paraphraser",
    "transform": "how an image is cut and normalised",
    "decoder": "what the decoder makes of a file",
    "data": "which training images there are, and in which order",
}


@dataclass(frozen=True)
class Header:
    """What a store holds.

    Attributes:
        settings: those of :data:`TAKEN`, as the run had them that trained teacher and paraphraser.
        hashes: SHA-256 of each of :data:`HASHES`.
        transform: the transform in words and numbers.
        images, views: how many, views of each image.
        factor: channels, height, width.
        dtype: of the factors.
        computed_in: the teacher's and paraphraser's arithmetic.
        classes: of the logits; 0 where none are stored.
        seed: of the views.
        batch_size: images in a forward of the teacher; their views go through together.
        shard_images: images in a shard, the last one's but for.
        shards: of each file its size in bytes and the SHA-256 of its head; None until all are there.
    """

    settings: dict[str, Any]
    hashes: dict[str, str]
    transform: dict[str, Any]
    images: int
    views: int
    factor: tuple[int, int, int]
    dtype: str
    computed_in: str
    classes: int
    seed: int
    batch_size: int
    shard_images: int
    shards: list[dict[str, Any]] | None = None

    @property
    def is_finished(self) -> bool:
        return self.shards is not None

    @property
    def shard_count(self) -> int:
        return -(-self.images // self.shard_images)

    def rows_of(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_images, min(self.images, (shard + 1) * self.shard_images))

    def to_json(self) -> dict[str, Any]:
        content = {**asdict(self), "factor": list(self.factor)}
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(content))}

    @classmethod
    def from_json(cls, content: Any, path: Path) -> Self:
        """Raises StoreError on another format, a newer version, or fields that are not the header's."""
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreError(f'{path} is no factor store: "format" in {FILE} is not "{FORMAT}".')
        if content.get("version") != VERSION:
            raise StoreError(
                f"{path} has store format version {shown(repr(content.get('version')))}; this ftfast reads version "
                f"{VERSION}."
            )
        values = {name: value for name, value in content.items() if name not in ("format", "version")}
        known = {item.name for item in fields(cls)}
        if values.keys() != known or not values["settings"].keys() >= set(TAKEN):
            wrong = sorted(values.keys() ^ known) or sorted(set(TAKEN) - values["settings"].keys())
            raise StoreError(
                f"{path / FILE} was changed: '{shown(wrong[0])}' is missing or unknown; build the store anew."
            )
        found = cls(**{**values, "factor": tuple(values["factor"])})
        if found.shards is not None and len(found.shards) != found.shard_count:
            raise StoreError(
                f"{path / FILE} was changed: it names {len(found.shards)} shards of {found.shard_count}; build the "
                "store anew."
            )
        return found

    def read_settings(self) -> dict[str, Any]:
        """Those of :data:`TAKEN`, as ``Settings`` takes them, and of photographs what they are normalised by.

        Raises:
            StoreError: images that no run of ``ftfast distill`` has.
        """
        taken = {name: self.settings[name] for name in TAKEN}
        if taken["data"] == OWN:
            raise StoreError("the store is of images of one's own, written by ftfast.write_factors; read it in Python.")
        if DATASETS[taken["data"]].is_streamed:
            taken |= {name: tuple(self.transform["normalisation"][name]) for name in ("mean", "deviation")}
        return taken


def read(path: Path) -> Header:
    """The header of a store that may be unfinished.

    Raises:
        StoreError: no store, or one of a newer version.
    """
    file = path / FILE
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise StoreError(f"{path} is no factor store: {FILE} cannot be read ({error.strerror}).") from None
    except ValueError:
        raise StoreError(f"{file} is cut short or not JSON; build the store anew.") from None
    return Header.from_json(content, path)


def with_store(given: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are given; where a ``store`` is among them, with its images, teacher and paraphraser.

    Raises:
        StoreError: no store, or one of a newer version.
    """
    return given if given.get("store") is None else {**read(Path(given["store"])).read_settings(), **given}


def write(path: Path, header: Header) -> None:
    files.write_json(path / FILE, header.to_json())


def check_settings(path: Path, header: Header, settings: Settings) -> None:
    """Raises StoreError where resolved settings are of other images, another teacher or another paraphraser."""
    for name in COMPARED:
        now, before = getattr(settings, name), header.settings[name]
        if now != before:
            raise StoreError(
                f"{name} is {now!r}, and the store {path} was built with {shown(repr(before))}; leave "
                f"--{name.replace('_', '-')} out, or build a store for it."
            )


def check_hashes(path: Path, header: Header, found: Mapping[str, str]) -> None:
    """Raises StoreError naming the first of :data:`HASHES` that differs from the header's."""
    for name, value in found.items():
        if header.hashes.get(name) != value:
            raise StoreError(
                f"{name} differs from what the store {path} was built with ({HASHES[name]}: hash {value[:12]} here, "
                f"{shown(str(header.hashes.get(name))[:12])} there); build a store for it, or go back to what it was."
            )


def check_same_build(path: Path, begun: Header, asked: Header) -> None:
    """Raises StoreError naming the first field in which an unfinished store differs from what is now asked for."""
    check_hashes(path, begun, asked.hashes)
    before, now = begun.to_json(), asked.to_json()
    for those_before, those_now in ((before["settings"], now["settings"]), (before, now)):
        for name, value in those_now.items():
            if name not in ("settings", "shards") and those_before.get(name) != value:
                raise StoreError(
                    f"{name} is {value!r}, and the store {path} was begun with "
                    f"{shown(repr(those_before.get(name)))}; go on as it was begun, or build another one."
                )
