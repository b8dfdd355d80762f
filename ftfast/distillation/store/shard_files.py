"""Shards: safetensors files of consecutive images, written whole or not at all, read row by row.

A shard's head holds the checksums of its tensors, and ``store.json`` those of the heads, so every byte is covered.
"""

import dataclasses
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ftfast.distillation.runtime import files
from ftfast.distillation.store import header as headers
from ftfast.distillation.store.header import Header
from ftfast.errors import StoreError, shown

FACTORS, VIEWS, LABELS, LOGITS = "factors", "views", "labels", "logits"
_LENGTH = struct.Struct("<Q")
_LONGEST_HEAD = 1 << 20


_SHARD_BYTES = 64 << 20
_MOST_SHARDS = 512


class Place(NamedTuple):
    """Where a tensor lies in its file: the first byte and how many, and the shape."""

    first: int
    bytes: int
    shape: tuple[int, ...]


class Head(NamedTuple):
    """The head of a shard: places and checksums by the tensors' names, the file's size, the head's own checksum."""

    places: dict[str, Place]
    checksums: dict[str, str]
    bytes: int
    checksum: str


def images_in_a_shard(batch_size: int, images: int, views: int, factor: tuple[int, int, int], dtype: str) -> int:
    """Whole batches that make about 64 MiB, or more where the shards of so many images would be too many."""
    image_bytes = views * factor[0] * factor[1] * factor[2] * DTYPES[dtype].itemsize
    wanted = max(_SHARD_BYTES, images * image_bytes // _MOST_SHARDS) // image_bytes
    return max(1, wanted // batch_size) * batch_size


def finish(path: Path, header: Header) -> None:
    """Writes the header that makes a folder with all its shards a store."""
    heads = []
    for shard in range(header.shard_count):
        file = shard_path(path, shard)
        head = read_head(file)
        check_head(file, head, header, shard)
        heads.append({"bytes": head.bytes, "head": head.checksum})
    headers.write(path, dataclasses.replace(header, shards=heads))


def tensors_of(
    factors: Tensor, logits: Tensor | None, boxes: Tensor, labels: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a shard holds of N images in V views, on the CPU.

    Args:
        factors, logits: ``[N * V, ...]``, those of one image together.
        boxes: of the views, ``[N, V, 5]`` int32.
        labels: ``[N]`` int64.
        dtype: of the stored factors.

    Raises:
        StoreError: factors or logits that are not finite.
    """
    kept = {} if logits is None else {LOGITS: logits.to(LOGITS_DTYPE)}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (factors, *kept.values())):
        raise StoreError(
            "the teacher or the paraphraser gives numbers that are not finite, or logits beyond float16; look at what "
            "trained them, or leave logits out."
        )
    made = {FACTORS: quantise(factors, dtype), **kept}
    views = {name: tensor.unflatten(0, boxes.shape[:2]).cpu() for name, tensor in made.items()}
    return {**views, VIEWS: boxes.cpu(), LABELS: labels.cpu()}


def shard_path(store: Path, shard: int) -> Path:
    return store / f"shard-{shard:05}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replaces a shard; a kill on the way leaves none, or the one before.

    Raises:
        OSError: it cannot be written, as on a full disk; its ``filename`` says where.
    """
    checksums = {name: hashlib.sha256(_bytes_of(tensor).data).hexdigest() for name, tensor in tensors.items()}
    # One entry alone: safetensors writes several in an order of chance.
    files.write_bytes(path, save(tensors, metadata={"sha256": json.dumps(checksums, sort_keys=True)}))


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def read_head(path: Path) -> Head:
    """Reads no tensor.

    Raises:
        StoreError: not there, cut short or no shard.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_LENGTH.size)
            length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
            text = file.read(length) if length <= _LONGEST_HEAD else b""
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}).") from None
    try:
        content = json.loads(text)
        checksums = json.loads(content.pop("__metadata__")["sha256"])
        base = _LENGTH.size + length
        places = {}
        for name, entry in content.items():
            first, last = map(int, entry["data_offsets"])
            places[name] = Place(base + first, last - first, tuple(entry["shape"]))
        end = max(place.first + place.bytes for place in places.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(f"{path} is cut short or no shard of a factor store.") from None
    if end != size:
        raise StoreError(f"{path} is cut short or has grown: it has {size} bytes, and its head speaks of {end}.")
    return Head(places, checksums, size, hashlib.sha256(start + text).hexdigest())


def shapes_of(header: Header, images: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a shard of so many images, and their shapes."""
    channels, height, width = header.factor
    found: dict[str, tuple[int, ...]] = {
        FACTORS: (images, header.views, height, width, channels),
        VIEWS: (images, header.views, 5),
        LABELS: (images,),
    }
    return {**found, LOGITS: (images, header.views, header.classes)} if header.classes else found


def check_head(path: Path, head: Head, header: Header, shard: int) -> None:
    """Raises StoreError where a shard is not the one that the header speaks of."""
    expected = shapes_of(header, len(header.rows_of(shard)))
    found = {name: place.shape for name, place in head.places.items()}
    if found != expected or head.checksums.keys() != expected.keys():
        wrong = next((name for name in (*expected, *found) if found.get(name) != expected.get(name)), "its head")
        raise StoreError(
            f"{path}: {shown(wrong)} is {shown(str(found.get(wrong)))} there and {expected.get(wrong)} by store.json; "
            "bring the shard back, or build the store anew."
        )
    if header.shards is not None and header.shards[shard] != {"bytes": head.bytes, "head": head.checksum}:
        raise StoreError(f"{path}: its head is not as it was written; bring the shard back, or build the store anew.")


def read_whole(path: Path, head: Head, name: str, dtype: np.dtype[Any]) -> np.ndarray:
    """One of a shard's tensors, in memory."""
    place = head.places[name]
    with open(path, "rb") as file:
        file.seek(place.first)
        content = file.read(place.bytes)
    if len(content) != place.bytes:
        raise StoreError(f"{path} is cut short.")
    return np.frombuffer(content, dtype).reshape(place.shape)


def check_content(path: Path, head: Head) -> None:
    """Raises StoreError naming the first tensor that is not as it was written; reads the whole file."""
    for name, tensor in load_file(path).items():
        if hashlib.sha256(_bytes_of(tensor).data).hexdigest() != head.checksums[name]:
            raise StoreError(
                f"{path}: {name} are not as they were written; bring the shard back, or build the store anew."
            )


LOGITS_DTYPE = torch.float16
DTYPES = {
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# What a factor's largest number becomes. bfloat16 has float32's range, so a factor of a bfloat16 teacher stays itself.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float16: 1.0}


def quantise(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors ``[N, C, H, W]``, floating, to ``[N, H, W, C]`` contiguous in a dtype of :data:`DTYPES`.

    A factor of zeros stays one.
    """
    pixels = factors.permute(0, 2, 3, 1)
    if dtype in _LARGEST:
        pixels = pixels.float()
        largest = pixels.abs().amax((1, 2, 3), keepdim=True)
        pixels = pixels * torch.where(largest > 0, _LARGEST[dtype] / largest, 0)
        # Rounding may pass the largest number by a last bit, which in float8_e4m3fn would be nan.
        pixels = pixels.clamp_(-_LARGEST[dtype], _LARGEST[dtype])
    return (pixels.round_() if dtype == torch.int8 else pixels).to(dtype).contiguous()


def as_factors(stored: Tensor) -> Tensor:
    """``[N, H, W, C]`` as the loss takes it: ``[N, C, H, W]``, channels_last, nothing copied."""
    return stored.permute(0, 3, 1, 2)
