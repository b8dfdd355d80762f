"""A head in a single pass: its launches, forward and backward, and what memory they share.

All that depends on the kind of a call is worked out once. A call allocates one piece of memory for what its kernels
hand to each other, one for what backward needs, and its results.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ftfast.kernels.device import arrival_counters, current_stream, device_guard, is_current
from ftfast.kernels.launch import PlannedLaunch
from ftfast.kernels.layout import Layout, Piece, Place
from ftfast.kernels.loss_numbers import norm_floor, reduction_scale, split_weight

from .ft_head_loss import direction_scale
from .ft_head_small import forward_launch
from .ft_head_small_backward import input_gradients_launch
from .ft_head_small_shape import HeadShape
from .ft_head_small_weights import WeightGradients
from .pack_weights import TAPS, Packing, packed_pieces


class Frozen(NamedTuple):
    """The teacher's side: weights ``[K, C, 3, 3]`` to be packed in each call, or memory into which they were packed
    forward by a layout of their own, and biases, float32.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    packed: Tensor | None = None


class SmallHeadPlan:
    """A head that :func:`~ftfast.kernels.ft_head_small_shape.small_head_fits`, for calls of one kind.

    Maps are ``[N, C, H, W]`` channels_last, or ``[N, H, W, C]`` contiguous, none of their sizes 0, on one GPU (on the
    CPU in Triton's interpreter). Nothing is checked here.

    Args:
        weights: the student's three, ``[K, C, 3, 3]``, float32, bfloat16 or float16, of any strides; their kind alone
            counts.
        teacher_weights: the teacher's, where each call packs them; of any dtype of these.
        p, reduction, eps: as :func:`ftfast.ft_loss` takes them.
        slopes: of the LeakyReLUs, the student's and the teacher's.
        weighted: whether the loss's weight is a tensor on the device, whose dtype is that of all calls.
        keeps: whether backward is to come.
    """

    def __init__(
        self,
        shape: HeadShape,
        weights: Sequence[Tensor],
        teacher_weights: Sequence[Tensor] = (),
        *,
        p: int,
        reduction: str,
        eps: float,
        slopes: tuple[float, float],
        weighted: bool,
        keeps: bool,
    ) -> None:
        self.shape, self._device = shape, shape.device
        samples, factor, dtype = shape.samples, shape.factor, shape.dtype
        size = shape.pixels * factor
        self._per_sample, self._weighted = reduction == "none", weighted
        self._loss_shape = (samples,) if self._per_sample else ()
        self._scale = reduction_scale(samples, size, p, reduction)
        self._direction_scale = direction_scale(samples, size, p, reduction)
        sizes = (shape.height, shape.width, samples, TAPS)
        self._sizes, self._slopes, self._floor = sizes, slopes, norm_floor(eps, torch.float32)
        # Whether the gradients are written as autograd keeps them; else they are contiguous and float32.
        strides = [weight.stride() == _channels_last_strides(tuple(weight.shape)) for weight in weights]
        self._channels_last = all(strides)
        self.like_parameters = all(weight.dtype == torch.float32 for weight in weights) and (
            self._channels_last or all(weight.is_contiguous() for weight in weights)
        )
        self._scratch, self._kept = Layout(), Layout()
        self._packing = Packing(weights, dtype, self._scratch, self._kept if keeps else None)
        self._teacher_packing = Packing(teacher_weights, dtype, self._scratch)
        self.a1, self.a2, self.direction = (
            self._kept.add(shape.map(count), dtype) for count in (shape.student, factor, factor)
        )
        self.inverse_norm = self._kept.add((samples,), torch.float32)
        self._forward = self._plan_forward(p)
        self._back_scratch = Layout()
        self._backward: dict[bool, PlannedLaunch] = {}
        if keeps:
            self._plan_backward()

    def _plan_forward(self, p: int) -> PlannedLaunch:
        shape, scratch = self.shape, self._scratch
        student, teacher, memory, kept, packed, loss, counters, weight, first_bias = map(Place, range(9))
        student_factor = scratch.add(shape.map(shape.factor), torch.float32)
        distances = scratch.add((shape.samples,), torch.float32)
        weights = [Place(memory.tensor, piece) for piece in self._packing.forward]
        teacher_map, teacher_factor, maps, teacher_weights = student, teacher, student, weights
        if shape.teacher is not None:
            teacher_map = teacher
            teacher_factor = Place(memory.tensor, scratch.add(shape.map(shape.factor), shape.dtype))
            maps = Place(memory.tensor, scratch.add(shape.map(shape.teacher + shape.factor), shape.dtype))
            layers = ((shape.teacher, shape.teacher), (shape.factor, shape.teacher), (shape.factor, shape.factor))
            teacher_weights = [Place(packed.tensor, piece) for piece in packed_pieces(layers, shape.dtype, Layout())]
        if self._teacher_packing.forward:
            teacher_weights = [Place(memory.tensor, piece) for piece in self._teacher_packing.forward]
        biases = [Place(first_bias.tensor + place) for place in range(6)]
        places = [
            student,
            teacher_map,
            Place(memory.tensor, student_factor),
            teacher_factor,
            maps,
            *weights,
            *biases[:3],
            *teacher_weights,
            *biases[3:],
            *[Place(kept.tensor, piece) for piece in (self.a1, self.a2, self.direction, self.inverse_norm)],
            Place(memory.tensor, distances),
            loss,
            counters,
            weight,
        ]
        return forward_launch(shape, places, p=p, per_sample=self._per_sample, weighted=self._weighted)

    def _plan_backward(self) -> None:
        shape, scratch = self.shape, self._back_scratch
        maps = [scratch.add(shape.map(count), shape.dtype) for count in (shape.student, shape.factor)]
        rest = [(shape.samples, shape.student + 2 * shape.factor), (shape.samples,), (1,)]
        partials, factors, final = (scratch.add(each, torch.float32) for each in rest)
        kept, memory, upstream, weight, dx = map(Place, range(5))

        def of(tensor: Place, pieces: Sequence[Piece]) -> list[Place]:
            return [Place(tensor.tensor, piece) for piece in pieces]

        places = [
            *of(kept, (self.direction, self.inverse_norm)),
            upstream,
            weight if self._weighted else Place(memory.tensor, final),
            *of(kept, (*self._packing.backward, self.a1, self.a2)),
            *of(memory, maps),
        ]
        for needed in (False, True):
            into = dx if needed else Place(memory.tensor, maps[0])
            everything = [*places, into, *of(memory, (partials, factors, final))]
            self._backward[needed] = input_gradients_launch(
                shape, everything, needs_input=needed, weighted=self._weighted
            )
        self._weights = WeightGradients(shape, scratch, channels_last=self._channels_last)
        kept, memory, student, counters, *results = map(Place, range(8))
        self._weight_launch = self._weights.launch(
            [
                student,
                *of(kept, (self.a1, self.a2)),
                *of(memory, maps),
                *of(kept, (self.direction,)),
                *of(memory, (factors, partials, final, *self._weights.shares)),
                counters,
                *results,
            ]
        )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        frozen: Frozen | None,
        weight: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The loss, float32, 0-d or ``[N]``, and what backward needs; four launches with those that pack.

        Args:
            student: in the shape's dtype.
            teacher: in the shape's dtype; where the shape has none, its factor, also int8 or float8_e4m3fn, in one
                dtype in all calls.
            weights, biases: the student's, the biases float32.
            frozen: None without a teacher.
            weight: of the loss.
        """
        if not is_current(self._device):
            with device_guard(self._device):
                return self.forward(student, teacher, weights, biases, frozen, weight)
        stream = current_stream(self._device)
        memory, kept = self._scratch.empty(self._device), self._kept.empty(self._device)
        loss = torch.empty(self._loss_shape, dtype=torch.float32, device=self._device)
        self._packing(weights, memory, kept, stream)
        packed, teacher_biases = None, biases
        if frozen is not None:
            teacher_weights, teacher_biases, packed = frozen
            self._teacher_packing(teacher_weights, memory, memory, stream)
        factor, weight_tensor = split_weight(weight, self._device)
        tensors = (
            student,
            teacher,
            memory,
            kept,
            memory if packed is None else packed,
            loss,
            arrival_counters(self._device, self.shape.samples + 1),
            loss if weight_tensor is None else weight_tensor,
            *biases,
            *teacher_biases,
        )
        self._forward(tensors, (*self._sizes, self._floor, self._scale * factor, *self._slopes), stream)
        return loss, kept

    def backward(
        self,
        student: Tensor,
        kept: Tensor,
        upstream: Tensor,
        weights: Sequence[Tensor],
        weight: float | Tensor,
        *,
        needs_input: bool,
    ) -> tuple[Tensor | None, list[Tensor], tuple[Tensor, ...]]:
        """The gradients, in two launches.

        Args:
            student, weight: as forward got them.
            kept: as forward returned it; nothing of it is written to.
            upstream: the gradient of the loss, 0-d, or ``[N]`` with any stride for "none"; float32.
            weights: the student's, whose layout the results take.
            needs_input: whether the gradient of the features is wanted.

        Returns:
            The gradient of the features, as they are laid out, or None; three weights' and three biases', float32.
        """
        if not is_current(self._device):
            with device_guard(self._device):
                return self.backward(student, kept, upstream, weights, weight, needs_input=needs_input)
        stream = current_stream(self._device)
        memory = self._back_scratch.empty(self._device)
        dx = torch.empty_like(student) if needs_input else None
        if self.like_parameters:
            gradients = [torch.empty_like(each) for each in weights]
        else:
            order = torch.channels_last if self._channels_last else torch.contiguous_format
            gradients = [torch.empty_like(each, dtype=torch.float32, memory_format=order) for each in weights]
        widths = [self.shape.student, self.shape.factor, self.shape.factor]
        biases = torch.empty(sum(widths), dtype=torch.float32, device=self._device)
        factor, weight_tensor = split_weight(weight, self._device)
        height, width, samples, taps = self._sizes
        stride = upstream.stride(0) if self._per_sample else 0
        self._backward[needs_input](
            (
                kept,
                memory,
                upstream,
                memory if weight_tensor is None else weight_tensor,
                memory if dx is None else dx,
            ),
            (height, width, samples, taps, stride, self._direction_scale * factor, self._slopes[0]),
            stream,
        )
        counters = arrival_counters(self._device, self._weights.counters)
        self._weight_launch((kept, memory, student, counters, *gradients, biases), self._weights.numbers, stream)
        return dx, gradients, biases.split(widths)


def _channels_last_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    channels, height, width = shape[1:]
    return channels * height * width, 1, width * channels, channels
