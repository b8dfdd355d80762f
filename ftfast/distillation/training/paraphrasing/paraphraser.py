"""A paraphraser for a teacher's features, trained and judged in one call."""

import importlib.util
import math
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ftfast.distillation.models.registry import place
from ftfast.distillation.runtime.seeds import seeded
from ftfast.distillation.training.paraphrasing.diagnosis import diagnose_paraphraser
from ftfast.distillation.training.paraphrasing.feature_batches import autocast, device_of, of_features, of_images
from ftfast.distillation.training.paraphrasing.reconstruction import DISTANCES, fit
from ftfast.distillation.training.schedule import cosine
from ftfast.errors import ParaphraserError
from ftfast.modules import Paraphraser

STEPS = 500


def train_paraphraser(
    teacher: Tensor | nn.Module,
    loader: Iterable[Any] | None = None,
    layer: str | None = None,
    *,
    rate: float = 0.5,
    norm: str | None = None,
    paraphraser: Paraphraser | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    loss: Literal["l1", "mse"] = "l1",
    held_out: Tensor | Iterable[Any] | None = None,
    strict: bool = True,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Paraphraser:
    """A paraphraser for a teacher's features, trained without labels, judged, frozen and in eval.

    Adam, whose rate falls to 0 as a cosine, on the distance between features and their reconstruction. A bar shows
    how far it is, on a terminal or in a notebook, where rich is installed.

    Args:
        teacher: its features ``[N, C, H, W]``, floating, all at once; or the model itself, which is put in eval.
        loader: with a model: batches of images ``[N, C, H, W]``, or tuples that begin with them, gone through as often
            as the steps take.
        layer: of the model, whose output the features are. None where the model gives them itself, as
            :class:`ftfast.FrozenTeacher` does: maps, or something with ``features``.
        rate, norm: of a new paraphraser, as :class:`ftfast.Paraphraser`.
        paraphraser: one to be trained in place, where it is; None makes a new one.
        steps: of training, 500 by default; or ``epochs`` over the loader or the features.
        batch_size: of features given all at once; a loader has its own.
        learning_rate: the first one.
        loss: ``"l1"``, as the authors' code, or ``"mse"``, as their paper's formula.
        held_out: what it is judged on and not trained on: features, with a model images or a loader of them, of which
            the first 1,024 are taken. None takes a tenth of the features, and the last batch of a loader, which in a
            first epoch is new.
        strict: raise where its factors are of no use; False warns, for a try on images that show nothing.
        seed: of the new paraphraser's weights and the order of features. A loader has its own order.
        device: where it is trained; None takes that of the features.
        dtype: float32, or bfloat16 or float16 under autocast, the teacher's too; None follows the autocast round it.
        progress: show the bar.

    Raises:
        ParaphraserError: its factors are not finite, or nearly the same for every image, and ``strict``.
        TeacherError: a layer that the model does not have.
        TypeError: features or batches of another kind.
        ValueError: an argument out of range, or a loader that gives no batch.

    Warns:
        UserWarning: it explains less than half of the held-out features' variance.
    """
    if loss not in DISTANCES:
        raise ValueError(f"loss is {loss!r}; it takes {' or '.join(DISTANCES)}.")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate!r}; it takes a positive number.")
    for name, value in (("steps", steps), ("epochs", epochs), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it takes a positive whole number.")
    home = device_of(paraphraser) or (device_of(teacher) if device is None else torch.device(device))
    kind = "cpu" if home is None else home.type
    if dtype is None:
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    source = (
        of_features(teacher, held_out, batch_size, seed)
        if isinstance(teacher, Tensor)
        else of_images(teacher, layer, loader, held_out, dtype)
    )
    count = _steps(steps, epochs, source.in_an_epoch)
    batches = islice(source.batches, count)
    first = next(batches)
    if paraphraser is None:
        with seeded(seed):
            paraphraser = Paraphraser(first.shape[1], rate, norm=norm)
        place(paraphraser, first.device if home is None else home)
    cast = partial(autocast, dtype, kind)
    judged = first if source.held_out is None else source.held_out

    def passing() -> Iterator[Tensor]:
        nonlocal judged
        for batch in chain([first], batches):
            if source.held_out is None and len(batch) > 1:
                judged = batch
            yield batch

    optimiser = torch.optim.Adam(paraphraser.parameters(), lr=learning_rate)
    try:
        with torch.autocast(kind, enabled=False):
            seen = _with_bar(passing(), count) if progress else passing()
            fit(paraphraser, seen, optimiser, lambda step: cosine(learning_rate, step, count), loss, cast)
    finally:
        paraphraser.requires_grad_(False).eval()
    with cast():
        _judge(paraphraser, judged, strict=strict)
    return paraphraser


def _steps(steps: int | None, epochs: int | None, in_an_epoch: int | None) -> int:
    if epochs is None:
        return STEPS if steps is None else steps
    if steps is not None:
        raise ValueError(f"steps is {steps} and epochs {epochs}; it takes one of them.")
    if in_an_epoch is None:
        raise ValueError(f"epochs is {epochs} and the loader has no length; give steps.")
    return max(1, epochs * in_an_epoch)


def _judge(paraphraser: Paraphraser, features: Tensor, *, strict: bool) -> None:
    if len(features) < 2:
        warnings.warn("the paraphraser is not judged, since no batch had two images; give held_out.", stacklevel=3)
        return
    diagnosis = diagnose_paraphraser(paraphraser, features)
    if diagnosis.fault and strict:
        raise ParaphraserError(f"{diagnosis.fault}; lower learning_rate or raise steps (strict=False takes it).")
    if said := diagnosis.fault or diagnosis.weakness:
        warnings.warn(f"{said}: give it more steps or another learning_rate.", stacklevel=3)


def _with_bar(batches: Iterable[Tensor], steps: int) -> Iterable[Tensor]:
    if importlib.util.find_spec("rich") is None:
        return batches
    from ftfast.distillation.monitor.progress import bar

    return bar(batches, "paraphraser", steps)
