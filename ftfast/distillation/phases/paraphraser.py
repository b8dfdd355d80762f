"""The paraphraser's phase: trained without labels to reconstruct the teacher's features, and judged before its use."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftfast.distillation.data.images import Images
from ftfast.distillation.models.registry import place
from ftfast.distillation.phases.setup import Setup
from ftfast.distillation.runtime import checkpoint, hub
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.runtime.seeds import seeded
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.methods import Terms, any_needs
from ftfast.distillation.training.paraphrasing.diagnosis import Diagnosis, diagnose_paraphraser
from ftfast.distillation.training.paraphrasing.feature_batches import draw
from ftfast.distillation.training.paraphrasing.reconstruction import DISTANCES, fit
from ftfast.distillation.training.schedule import Schedule, cosine
from ftfast.distillation.training.step.step import Precision
from ftfast.errors import IN_A_NEW_RUN, CheckpointError, ParaphraserError, shown
from ftfast.modules import Paraphraser


def build_paraphraser(settings: Settings) -> Paraphraser:
    """An untrained paraphraser, its weights drawn from ``settings.seed``."""
    with seeded(settings.seed):
        paraphraser = Paraphraser(settings.teacher_features().channels, settings.rate)
    return place(paraphraser, torch.device(settings.device))


def paraphraser_images(settings: Settings) -> int:
    """How many images the paraphraser draws."""
    if settings.paraphraser_checkpoint is not None:
        return 0
    if settings.paraphraser_epochs:
        return settings.paraphraser_epochs * (settings.dataset().train_images - settings.paraphraser_held_out)
    return settings.paraphraser_steps * settings.paraphraser_batch_size


def read_paraphraser(settings: Settings) -> dict[str, Tensor]:
    """The tensors of the paraphraser that ``settings.paraphraser_checkpoint`` names, checked against the settings'.

    Raises:
        CheckpointError: not readable, not plain tensors, or not of such a paraphraser.
        HubError: not to be had from the Hub.
    """
    assert settings.paraphraser_checkpoint is not None
    path = hub.local(settings.paraphraser_checkpoint)
    tensors, description = checkpoint.load_tensors(path)
    if (kind := description.get("kind", "paraphraser")) != "paraphraser":
        raise CheckpointError(
            f"{path} is the checkpoint of a {shown(str(kind))}; paraphraser_checkpoint takes a paraphraser's."
        )
    channels = settings.teacher_features().channels
    title = f"a paraphraser of {channels} channels at a rate of {settings.rate:g}"
    checkpoint.fill(Paraphraser(channels, settings.rate), tensors, path, title)
    return tensors


@torch.no_grad()
def teacher_features(teacher: nn.Module, images: Images, precision: Precision) -> Tensor:
    """The teacher's last feature maps ``[N, C, H, W]`` in its own dtype, channels_last; no image is augmented."""
    with precision.autocast():
        features = torch.cat([teacher(batch).features for batch, _ in images.in_order(images.test_batch_size)])
    return features.contiguous(memory_format=torch.channels_last)


def train_paraphraser(
    paraphraser: Paraphraser,
    features: Tensor,
    settings: Settings,
    precision: Precision,
    after_step: Callable[[int], None] = lambda _: None,
    *,
    penalty: float = 0.0,
) -> None:
    """Trains a paraphraser in place on feature maps ``[N, C, H, W]``, section 3.1 of the paper.

    ``after_step`` is called with the size of the batch after every step; ``penalty`` as
    :func:`ftfast.distillation.training.paraphrasing.reconstruction.fit` takes it.

    The paper's own recipe (SGD at 0.1 for a few epochs) suits large data sets; a small one has too few steps for it.
    """
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[settings.paraphraser_optimiser]
    options: dict[str, float] = {"weight_decay": settings.paraphraser_weight_decay}
    if kind is torch.optim.SGD:
        options["momentum"] = settings.momentum
    peak, steps = settings.paraphraser_learning_rate, settings.paraphraser_steps
    falls = settings.paraphraser_learning_rate_schedule == "cosine"
    fit(
        paraphraser,
        islice(draw(features, settings.paraphraser_batch_size, settings.seed), steps),
        kind(paraphraser.parameters(), lr=peak, **options),
        lambda step: cosine(peak, step, steps) if falls else peak,
        settings.paraphraser_loss,
        precision.autocast,
        after_step,
        penalty=penalty,
    )


def diagnose(
    paraphraser: Paraphraser, features: Tensor, precision: Precision, *, of_noise: bool = False
) -> tuple[Diagnosis, str | None]:
    """What a paraphraser is worth on feature maps ``[N, C, H, W]`` that it was not trained on, and what to warn of.

    Args:
        of_noise: of images that show nothing, whose factors may be alike.

    Raises:
        ParaphraserError: its factors are not finite, or nearly the same for every image; the message has the remedy.
    """
    with precision.autocast():
        diagnosis = diagnose_paraphraser(paraphraser, features)
    if diagnosis.fault and not (of_noise and diagnosis.is_finite):
        raise ParaphraserError(
            f"{diagnosis.fault}; lower --paraphraser-learning-rate, raise --paraphraser-steps, or take "
            f"--paraphraser-optimiser adam, {IN_A_NEW_RUN}."
        )
    remedy = f"give it more steps (--paraphraser-steps) or another learning rate, {IN_A_NEW_RUN}."
    return diagnosis, diagnosis.weakness and f"{diagnosis.weakness}: {remedy}"


def prepare_paraphraser(setup: Setup, teacher: torch.nn.Module) -> tuple[Paraphraser | None, dict[str, Any] | None]:
    """The paraphraser, trained or read back or taken from ``paraphraser_checkpoint``, and its diagnosis.

    Both are None where no method uses factors.

    Raises:
        ParaphraserError: it learned nothing.
    """
    settings, path, progress = setup.settings, setup.folder.paraphraser, setup.progress
    if not any_needs(settings.methods, "factors"):
        return None, None
    progress.begin("paraphraser", paraphraser_images(settings))
    start = time.perf_counter()
    paraphraser = build_paraphraser(settings)
    model = {"in_channels": paraphraser.in_channels, "factor_channels": paraphraser.factor_channels}
    source = settings.paraphraser_checkpoint
    description = setup.describe("paraphraser", model, **({} if source is None else {"source": source}))

    def make() -> None:
        held_out, fitted = setup.train.stratified(settings.paraphraser_held_out)
        if source is not None:
            paraphraser.load_state_dict(setup.processes.on_first(lambda: read_paraphraser(settings)))
        elif settings.paraphraser_epochs:
            with closing(fitted):
                _train_on_the_way(setup, teacher, paraphraser, fitted, description)
        else:
            features = teacher_features(teacher, fitted, setup.precision)
            train_paraphraser(paraphraser, features, settings, setup.precision, progress.advance)
        features = teacher_features(teacher, held_out, setup.precision)
        diagnosis, warning = setup.processes.on_first(
            lambda: diagnose(paraphraser, features, setup.precision, of_noise=settings.is_noise)
        )
        judged = {**asdict(diagnosis), "held_out_images": len(held_out), "warning": warning}
        setup.keep(path, Checkpoint(paraphraser.state_dict(), {}, {**description, "diagnosis": judged}))
        setup.forget(_trained_on_the_way(setup))

    finished = setup.finished(path, description, make)
    checkpoint.fill(paraphraser, finished.tensors, path, "this paraphraser")
    progress.end()
    judged = finished.description["diagnosis"]
    progress.say(
        f"paraphraser: explains {judged['explained_variance']:.3f} of the variance held out, spread "
        f"{judged['spread']:.2f}, {time.perf_counter() - start:.1f} s"
    )
    if judged["warning"]:
        progress.say(f"warning: {judged['warning']}")
    return paraphraser, judged


def _trained_on_the_way(setup: Setup) -> Path:
    """Where a paraphraser lies that is trained and not judged yet."""
    return setup.folder.paraphraser.with_name("paraphraser.untested")


def _train_on_the_way(
    setup: Setup, teacher: torch.nn.Module, paraphraser: Paraphraser, images: Images, description: dict[str, Any]
) -> None:
    """Trains a paraphraser while the images pass by, as a student is trained; no feature map is kept."""
    settings = setup.settings
    distance = DISTANCES[settings.paraphraser_loss]

    def terms(batch: Tensor, labels: Tensor) -> Terms:
        features = teacher(batch).features.float()
        return {"reconstruction": distance(paraphraser(features).float(), features)}

    schedule = Schedule(
        settings.paraphraser_epochs,
        settings.paraphraser_batch_size,
        settings.paraphraser_learning_rate,
        settings.momentum,
        settings.paraphraser_weight_decay,
        nesterov=False,
        kind="cosine" if settings.paraphraser_learning_rate_schedule == "cosine" else "steps",
        optimiser=settings.paraphraser_optimiser,
    )
    trainable = torch.nn.ModuleDict({"model": paraphraser})
    training = Training(
        trainable,
        terms,
        images,
        schedule,
        setup.precision,
        seed=settings.seed,
        processes=setup.processes,
        replayed=settings.graph == "on",
        frozen=[teacher],
    )
    path = _trained_on_the_way(setup)
    untested = {**description, "kind": "untested paraphraser"}
    finished = setup.finished(path, untested, lambda: setup.train_to_end(training, path, untested))
    checkpoint.fill(paraphraser, finished.tensors, path, "this paraphraser")
    paraphraser.eval()
