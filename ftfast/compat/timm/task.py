"""FactorTransferTask: Factor Transfer as one of timm's training tasks."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ftfast.arguments import Backend
from ftfast.compat.timm.library import (
    DistillationTeacher,
    TrainingTask,
    resolve_criterion,
    unwrap_model,
)
from ftfast.compat.timm.maps import check_sizes, input_size_of, shape_of_map
from ftfast.compat.timm.paraphrasing import fill, is_first, resolve_paraphraser, share
from ftfast.compat.timm.teacher import TeacherMaps, TeacherNormalisation, frozen_teacher
from ftfast.compat.timm.trainable import FactorTransferTrainableModule, StudentTap
from ftfast.distillation.training.paraphrasing.paraphraser import train_paraphraser
from ftfast.errors import shown
from ftfast.head import FactorTransfer
from ftfast.modules import Paraphraser, Translator

_logger = logging.getLogger(__name__)


class FactorTransferTask(TrainingTask):
    """Factor Transfer in timm's training loop, where ``timm.task.FeatureDistillationTask`` stands otherwise.

    The student and the translator are ``trainable_module``, which DDP, ``torch.compile`` and the moving average wrap;
    teacher and paraphraser stay outside, frozen. Checkpoints have the bare student as ``state_dict`` and the two small
    networks as ``task_state``, so that resuming needs no paraphraser. The loss is
    ``task_loss_weight * task_loss + distill_loss_weight * beta * L_FT``.

    The paraphraser must be trained before the first step: give one that is, or a checkpoint of one, or call
    :meth:`train_paraphraser`, or resume.

    Args:
        student_model to task_loss_weight: as timm's task; without weights both are 1, with ``task_loss_weight`` alone
            the other is ``1 - task_loss_weight``. A teacher is a model's name (pretrained weights, classes and input
            channels as the student's), a module, or a ``DistillationTeacher``. It is frozen.
        student_feature_dim, teacher_feature_dim: channels of the two maps; None runs a model once on zeros to see.
        device, dtype, verbose: as timm's task.
        paraphraser: a trained :class:`ftfast.Paraphraser` (any module with ``encode`` and ``factor_channels``), or the
            path of a checkpoint, see :func:`load_paraphraser`; None makes a new one, to be trained.
        rate: k of a new paraphraser.
        student_layer, teacher_layer: names of the layers to take; None takes what ``forward_features`` returns. Tokens
            become maps, without their class and register tokens; both maps must have the same height and width.
        beta: the paper's weight of the mean-form L1 loss; None takes ``500 * sqrt(D / 2048)``, D the elements of a
            factor of the first batch: the published 500 for CIFAR's 32x8x8, and about ImageNet's 1000 for 256x7x7.
        norm: of the translator and a new paraphraser, as :class:`ftfast.Translator`.
        input_size: ``(channels, height, width)`` of the images, where the student's configuration says otherwise.
        backend: as :class:`ftfast.FTLoss`.

    Raises:
        TypeError: a teacher or paraphraser of another kind.
        ValueError: a layer that a model does not have, maps of unlike size, or a paraphraser of other channels.
        FileNotFoundError: no such checkpoint of a paraphraser.
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: str | nn.Module | DistillationTeacher,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        teacher_pretrained_path: str | None = None,
        teacher_pretrained_cfg_overlay: dict[str, Any] | None = None,
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        student_feature_dim: int | None = None,
        teacher_feature_dim: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        *,
        paraphraser: Paraphraser | str | Path | None = None,
        rate: float = 0.5,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        beta: float | None = None,
        norm: str | None = None,
        input_size: Sequence[int] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        student = unwrap_model(student_model)
        self.teacher = frozen_teacher(
            teacher_model, student, teacher_pretrained_path, teacher_pretrained_cfg_overlay, self.device, self.dtype
        )
        self.criterion = resolve_criterion(criterion, self.device, criterion_kwargs)
        self.task_loss_weight, self.distill_loss_weight = _weights(task_loss_weight, distill_loss_weight)

        size = tuple(input_size or input_size_of(student))
        normalise = TeacherNormalisation(student, self.teacher)
        self.teacher_maps: Any = TeacherMaps(unwrap_model(self.teacher.model), teacher_layer, normalise)
        tap = StudentTap(student_model, student_layer)
        teacher_shape: Any = None
        student_shape: Any = None
        if teacher_feature_dim is None or beta is None:
            teacher_shape = shape_of_map(self.teacher_maps, self.teacher, size)
        if student_feature_dim is None:
            student_shape = shape_of_map(lambda images: tap(student_model, images)[1], student_model, size)
        check_sizes(student_shape, teacher_shape, size)

        self.paraphraser = resolve_paraphraser(paraphraser, teacher_feature_dim or teacher_shape[0], rate, norm)
        self.paraphraser_is_trained = paraphraser is not None
        factor_channels = self.paraphraser.factor_channels
        translator = Translator(student_feature_dim or student_shape[0], factor_channels, norm=norm)
        for network in (self.paraphraser, translator):
            network.to(device=self.device, dtype=self.dtype)
        self._beta_is_open = beta is None
        if beta is None:  # until the first batch shows the images' size
            beta = _default_beta(factor_channels, teacher_shape[1:])
        head = FactorTransfer(self.paraphraser, translator, weight=beta, backend=backend)
        self.trainable_module: Any = FactorTransferTrainableModule(student_model, head, tap)
        if self.verbose:
            _logger.info(
                f"FactorTransferTask: student map {student_shape or student_feature_dim}, teacher map "
                f"{teacher_shape or teacher_feature_dim}, factor of {factor_channels} channels, beta={beta:.4g}, "
                f"task_weight={self.task_loss_weight}, distill_weight={self.distill_loss_weight}"
            )

    @property
    def beta(self) -> float | Tensor:
        """The weight of the factor transfer loss inside ``kd_loss``; may be set, to a 0-d tensor to warm it up.

        A default one is that of images of ``input_size`` until the first batch, and from there on of that batch's.
        """
        return unwrap_model(self.trainable_module).head.loss.weight

    @beta.setter
    def beta(self, value: float | Tensor) -> None:
        self._beta_is_open = False
        unwrap_model(self.trainable_module).head.loss.weight = value

    def train_paraphraser(self, loader: Iterable[Any], **options: Any) -> Self:
        """Trains the paraphraser on the teacher's maps; call it before step one.

        Args:
            loader: gives images normalised for the student, or tuples whose first item they are. Under
                torch.distributed every process trains on its own, and the first one's paraphraser is taken by all.
            options: of :func:`ftfast.train_paraphraser`: ``epochs`` or ``steps``, ``learning_rate`` and so on.

        Returns:
            This task.
        """
        if not is_first():
            options["strict"] = False  # it is not taken, and an error here would leave the others waiting
        train_paraphraser(self.teacher_maps, loader, paraphraser=self.paraphraser, **options)
        share(self.paraphraser)
        self.paraphraser_is_trained = True
        return self

    def train(self, mode: bool = True) -> Self:
        """Sets the student's and the translator's mode; teacher and paraphraser stay in eval."""
        super().train(mode)
        self.teacher.eval()
        self.paraphraser.eval()
        return self

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> Self:
        """Wraps student and translator in DistributedDataParallel; all processes take the first one's paraphraser."""
        share(self.paraphraser, ddp_kwargs.get("process_group"))
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> Any:
        """Compiles the student for evaluation, the trainable module, and the teacher up to its map.

        Returns:
            The compiled student.

        Raises:
            RuntimeError: after :meth:`prepare_distributed`.
        """
        if isinstance(self.trainable_module, nn.parallel.DistributedDataParallel):
            raise RuntimeError("compile() came after prepare_distributed(); call it before.")
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.eval_model = torch.compile(unwrap_model(self.trainable_module).student, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self.teacher_maps = torch.compile(self.teacher_maps, **options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare student, compiled where :meth:`compile` was called; of ``module`` or the moving average if asked."""
        resolved = super().get_eval_model(module=module, ema=ema)
        inner = None if resolved is None else unwrap_model(resolved)
        return inner.student if isinstance(inner, FactorTransferTrainableModule) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The student's parameters, less the last two if asked, and the translator's."""
        trainable = unwrap_model(self.trainable_module)
        student = list(trainable.student.parameters())
        return (student[:-2] if exclude_head else student) + list(trainable.translator.parameters())

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, dict[str, Tensor]]:
        """``{"translator": ..., "paraphraser": ...}``, state_dicts; the moving average has a translator alone."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            return {}
        state = {"translator": unwrap_model(module).translator.state_dict()}
        if self.paraphraser_is_trained and not ema:
            state["paraphraser"] = self.paraphraser.state_dict()
        return state

    def load_task_state(
        self,
        state: dict[str, dict[str, Tensor]] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Loads what :meth:`get_task_state` gave.

        Raises:
            RuntimeError: no moving average to load into, or, where ``strict``, a state of another task or of networks
                of other channels.
        """
        if not state:
            _logger.warning("The checkpoint has no task state: the translator stays as it is.")
            return
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError("there is no moving average to load task state into; call setup_ema() before.")
        if "translator" not in state and strict:
            raise RuntimeError(
                f"task state has {shown(', '.join(state))} and no translator; it is of another kind of task."
            )
        networks = {"translator": unwrap_model(module).translator, "paraphraser": None if ema else self.paraphraser}
        for name, network in networks.items():
            if network is not None and name in state:
                fill(network, state[name], name, strict)
                self.paraphraser_is_trained |= name == "paraphraser"

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002 (timm's name)
        """One training step's losses.

        Args:
            input: images ``[N, C, H, W]``, normalised for the student.
            target: what the criterion takes beside the logits.

        Returns:
            ``loss``, ``output`` (the logits), ``task_loss``, and ``kd_loss``, which is beta times the paper's loss.

        Raises:
            RuntimeError: the paraphraser is not trained.
            ValueError: student and teacher maps of unlike height or width.
        """
        if not self.paraphraser_is_trained:
            raise RuntimeError(
                "the paraphraser is not trained: call train_paraphraser(loader), give the task a trained one, or "
                "resume from a checkpoint."
            )
        teacher_map = self.teacher_maps(input)
        if self._beta_is_open:
            self.beta = _default_beta(self.paraphraser.factor_channels, teacher_map.shape[2:])
            if self.verbose:
                _logger.info(f"FactorTransferTask: beta={self.beta:.4g} for images of {list(input.shape[1:])}")
        output, kd_loss = self.trainable_module(input, teacher_map)
        task_loss = self.criterion(output, target)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


def _default_beta(factor_channels: int, size: Sequence[int]) -> float:
    return 500 * math.sqrt(factor_channels * math.prod(size) / 2048)


def _weights(task: float | None, distill: float | None) -> tuple[float, float]:
    """timm's rule: both 1 by default, and the task's weight alone leaves the rest to the distillation."""
    if distill is None:
        return (1.0, 1.0) if task is None else (task, 1.0 - task)
    return (1.0 if task is None else task), distill
