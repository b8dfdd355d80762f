"""FactorTransfer: paraphraser, translator and loss as one module to put beside a student."""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ftfast.arguments import Backend, Reduction, check_features, check_map_dtype, check_options, check_parameter
from ftfast.backends import Options
from ftfast.loss import FTLoss
from ftfast.modules import Paraphraser, Translator, convolution_stack
from ftfast.ops.ft_head.function import run
from ftfast.ops.ft_head.operands import Plan
from ftfast.ops.ft_head.plan import SEPARATE, describe, kind_of_head, known_plans, plan_head
from ftfast.ops.ft_head.stack import Stack
from ftfast.ops.maps import autocasts


class FactorTransfer(nn.Module):
    """The head of section 3 of the paper: ``FTLoss(translator(student), paraphraser.encode(teacher))``.

    The paraphraser is frozen when the head is built: ``requires_grad_(False)``, eval, and eval it stays after
    ``.train()``. It stays in the state_dict, gets no gradient, and keeps out of optimisers and DDP's buckets.
    Where it is written to all the same, the next call sees it; :meth:`hold_weights` trades some of that for time.

    Args:
        paraphraser: trained beforehand; a :class:`ftfast.Paraphraser`, or any module with ``encode``, which may then
            take and give features of another kind, such as tokens ``[N, L, C]``.
        translator: trained with the student: give ``head.parameters()`` to the student's optimiser. Where both have
            ``factor_channels``, these must be equal.
        p, reduction, eps, weight, backend: as :class:`ftfast.FTLoss`.

    Raises:
        TypeError: a paraphraser without ``encode``.
        ValueError: unlike ``factor_channels``, or an argument that FTLoss refuses.
    """

    _held: int | None = None

    def __init__(
        self,
        paraphraser: Paraphraser,
        translator: Translator,
        *,
        p: int = 1,
        reduction: Reduction = "mean",
        eps: float = 1e-12,
        weight: float | Tensor = 1.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if not hasattr(paraphraser, "encode"):
            raise TypeError(
                f"paraphraser is a {type(paraphraser).__name__}, which has no encode; the order is "
                "FactorTransfer(paraphraser, translator)."
            )
        given, made = (getattr(module, "factor_channels", None) for module in (paraphraser, translator))
        if None not in (given, made) and given != made:
            raise ValueError(
                f"translator makes factors of {made} channels and the paraphraser of {given}; build it as "
                f"Translator(..., factor_channels={given})."
            )
        self.paraphraser = paraphraser.requires_grad_(False).eval()
        self.translator = translator
        self.loss = FTLoss(p, reduction, eps, weight, backend)

    def hold_weights(self) -> Self:
        """Says that the frozen paraphraser is written to in ways that torch sees, if at all; returns the head.

        Without it, its weights are looked at in every call: a CPU reads them, a GPU prepares them for the kernels
        anew. With it they are prepared once, and again after what torch's version counters see: ``load_state_dict``,
        an in-place operator, ``.to``. After a write through ``.data``, numpy or a collective, call
        :meth:`weights_changed`.
        """
        self._held = self._held or 0
        return self

    def weights_changed(self) -> None:
        """Has the paraphraser's weights prepared anew at the next call; needed after :meth:`hold_weights` alone."""
        if self._held is not None:
            self._held += 1

    def train(self, mode: bool = True) -> Self:
        """Sets the translator's mode; the paraphraser stays in eval."""
        super().train(mode)
        self.paraphraser.eval()
        return self

    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor | None = None,
        *,
        teacher_factor: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``student_features [N, C_student, H, W]`` against exactly one of the teacher's two forms.

        Args:
            teacher_features: ``[N, C_teacher, H, W]``; the paraphraser runs on them without a graph.
            teacher_factor: a known factor ``[N, factor_channels, H, W]``, floating, int8 or float8_e4m3fn.
        """
        plan, translator, paraphraser, options = self._plan(student_features, teacher_features, teacher_factor)
        if plan.kernel != SEPARATE:
            assert isinstance(translator, Stack)
            known = paraphraser if isinstance(paraphraser, Stack) else None
            return run(student_features, teacher_features, teacher_factor, plan, translator, known, options, self._held)
        if teacher_factor is None:
            assert teacher_features is not None
            with torch.no_grad():
                teacher_factor = self.paraphraser.encode(teacher_features)
        return self.loss(self.translator(student_features), teacher_factor)

    if TYPE_CHECKING:  # torch's own says that a call gives anything

        def __call__(
            self,
            student_features: Tensor,
            teacher_features: Tensor | None = None,
            *,
            teacher_factor: Tensor | None = None,
        ) -> Tensor: ...

    def explain(
        self,
        student_features: Tensor,
        teacher_features: Tensor | None = None,
        *,
        teacher_factor: Tensor | None = None,
    ) -> str:
        """How :meth:`forward` computes these features, and why so, in one line; under autocast as it stands here."""
        plan, *_ = self._plan(student_features, teacher_features, teacher_factor)
        return describe(plan, self.loss.backend)

    def _plan(
        self, student_features: Tensor, teacher_features: Tensor | None, teacher_factor: Tensor | None
    ) -> tuple[Plan, Stack | str, Stack | str, Options]:
        if (teacher_features is None) == (teacher_factor is None):
            raise ValueError(
                "FactorTransfer takes exactly one of teacher_features and teacher_factor; "
                f"it got {'neither' if teacher_features is None else 'both'}."
            )
        # From the dictionary, as to ask the module itself takes longer than all that is asked of them.
        own: Any = self._modules
        loss, networks = own["loss"], (own["translator"], own["paraphraser"])
        options = Options(loss.p, loss.reduction, loss.eps, loss.weight)
        translator, paraphraser = convolution_stack(networks[0]), convolution_stack(networks[1])
        sides = (student_features, teacher_features, teacher_factor)
        kind = kind_of_head(*sides, translator, paraphraser, options, loss.backend)
        if kind is not None:
            kind += (networks[0].in_channels, getattr(networks[1], "in_channels", None))
        plan = known_plans.get(kind)
        if plan is None:
            self._check(*sides)
            check_options(**options._asdict())
            plan = known_plans.keep(kind, plan_head(*sides, translator, paraphraser, loss.backend))
        return plan, translator, paraphraser, options

    def _check(self, student_features: Tensor, teacher_features: Tensor | None, teacher_factor: Tensor | None) -> None:
        if isinstance(self.translator, Translator) and isinstance(self.paraphraser, Paraphraser):
            parameter = next(self.translator.parameters())
            check_parameter("translator", parameter)
            check_parameter("paraphraser", next(self.paraphraser.parameters()))
            check_features(
                student_features,
                teacher_features,
                teacher_factor,
                student_channels=self.translator.in_channels,
                teacher_channels=self.paraphraser.in_channels,
                factor_channels=self.paraphraser.factor_channels,
                parameter=parameter,
            )
            if not autocasts(student_features):
                check_map_dtype(student_features.dtype, parameter)
