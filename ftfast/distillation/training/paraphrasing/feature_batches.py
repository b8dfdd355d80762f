"""A teacher's feature maps in batches without an end: drawn from those at hand, or made of a loader's images."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftfast.distillation.models.frozen_teacher import FrozenTeacher

MOST_HELD_OUT = 1024


class FeatureBatches(NamedTuple):
    """Batches of feature maps ``[N, C, H, W]``, without an end.

    Attributes:
        in_an_epoch: how many; None where nobody knows.
        held_out: maps that are not among them; None where there are none.
    """

    batches: Iterator[Tensor]
    in_an_epoch: int | None
    held_out: Tensor | None


def autocast(dtype: torch.dtype, kind: str) -> torch.autocast:
    """To ``dtype`` on a kind of device; float32 turns it off.

    Nothing is kept: inside another autocast, torch would keep a weight's cast for as long as that lasts, past the steps
    that change the weight.
    """
    return torch.autocast(kind, dtype, enabled=dtype in (torch.bfloat16, torch.float16), cache_enabled=False)


def device_of(source: Tensor | nn.Module | None) -> torch.device | None:
    """Where features lie or a module computes; None where nobody knows."""
    parameter = next(source.parameters(), None) if isinstance(source, nn.Module) else None
    found = getattr(source if parameter is None else parameter, "device", None)
    return found if isinstance(found, torch.device) else None


def draw(features: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Rows drawn at random, any of them at any time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(features), (batch_size,), generator=generator)
        yield features[rows.to(features.device)]


def of_features(features: Tensor, held_out: Any, batch_size: int, seed: int) -> FeatureBatches:
    """Of maps ``[N, C, H, W]``; of these a tenth is held out where ``held_out``, maps too, is None."""
    for name, given in (("teacher", features), ("held_out", held_out)):
        if given is not None:
            _check_maps(given, name)
    if held_out is None:
        if len(features) < 3:
            raise ValueError(
                f"teacher has {len(features)} feature maps; it takes at least 3, of which two are held out."
            )
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
        count = max(2, len(features) // 10)
        held_out, features = features[order[:count]], features[order[count:]]
    return FeatureBatches(draw(features, batch_size, seed), -(-len(features) // batch_size), held_out)


def of_images(
    teacher: nn.Module, layer: str | None, loader: Iterable[Any] | None, held_out: Any, dtype: torch.dtype
) -> FeatureBatches:
    """Of what the teacher, or its layer, makes of a loader's images."""
    if loader is None:
        raise TypeError("loader is missing; a model takes one that gives images, features themselves take none.")
    read = _reader(teacher, layer, dtype)
    kept = None
    if held_out is not None:
        found: list[Tensor] = []
        for images in images_of([held_out] if isinstance(held_out, Tensor) else held_out):
            found.append(read(images[: MOST_HELD_OUT - sum(map(len, found))]))
            if sum(map(len, found)) == MOST_HELD_OUT:
                break
        if not found:
            raise ValueError("held_out gives no batch; it takes images or a loader of them.")
        sizes = sorted({"x".join(map(str, maps.shape[1:])) for maps in found})
        if len(sizes) > 1:  # they are judged as one batch
            raise ValueError(f"held_out gives maps of {', '.join(sizes)}; it takes images of one size.")
        kept = torch.cat(found)
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        length = None
    return FeatureBatches((read(images) for images in _again_and_again(loader)), length, kept)


def _reader(teacher: nn.Module, layer: str | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Images to maps, without a graph; images go where the teacher is."""
    model = teacher.eval() if layer is None else FrozenTeacher(teacher, layer, dtype=dtype)
    where = taken_by(teacher)

    @torch.no_grad()
    def read(images: Tensor) -> Tensor:
        images = images.to(**where)
        with autocast(dtype, images.device.type):
            found = model(images)
        return maps_of(found)

    return read


def maps_of(output: Any) -> Tensor:
    """The maps ``[N, C, H, W]`` that a teacher gives, or that are its output's ``features``."""
    return _check_maps(getattr(output, "features", output), "the teacher's output")


def taken_by(teacher: nn.Module) -> dict[str, Any]:
    """What ``Tensor.to`` takes to make images those of a teacher's device and dtype."""
    parameter = next(teacher.parameters(), None)
    return {"device": device_of(teacher), "dtype": None if parameter is None else parameter.dtype}


def _check_maps(features: Any, name: str) -> Tensor:
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} is a {type(features).__name__}; it takes feature maps [N, C, H, W], so name a layer.")
    if features.dim() != 4 or not features.is_floating_point():
        raise ValueError(
            f"{name} is {list(features.shape)} of {features.dtype}; it takes floating feature maps [N, C, H, W], so "
            "name a layer that gives them."
        )
    return features


def images_of(loader: Iterable[Any]) -> Iterator[Tensor]:
    """The images of a loader's batches, which may be tuples that begin with them."""
    for batch in loader:
        images = batch if isinstance(batch, Tensor) else batch[0] if isinstance(batch, tuple | list) else None
        if not isinstance(images, Tensor):
            raise TypeError(f"loader gives a {type(batch).__name__}; it takes images, or tuples that begin with them.")
        yield images


def _again_and_again(loader: Iterable[Any]) -> Iterator[Tensor]:
    while True:
        is_empty = True
        for images in images_of(loader):
            is_empty = False
            yield images
        if is_empty:
            raise ValueError("loader gives no batch, or none when it is gone through again; it takes one that does.")
