"""HobbitLong/RepDistiller: ``distiller_zoo/FT.py``, ``distiller_zoo/AT.py`` and the two networks of ``models/util.py``.

Its ``FactorTransfer`` is not the paper's loss: it averages the channels away and compares attention maps.
``from ftfast.compat.repdistiller import Attention, FactorTransfer, Paraphraser, Translator`` below its own imports is
the line to change in ``train_student.py``.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ftfast.compat.directions import direction, is_overridden
from ftfast.compat.networks import PeerNetwork, check_channels, convolutions, truncated_channels
from ftfast.ops.attention.difference import attention_difference
from ftfast.reference import attention_map

__all__ = ["Attention", "FactorTransfer", "Paraphraser", "Translator"]


class FactorTransfer(nn.Module):
    """The difference of two attention maps, ``q(f) = normalize(f.pow(p1).mean(1))`` over the map's H*W.

    Args:
        p1: the power that features are raised to, 2 by default.
        p2: of the difference: 1 gives its absolute value's mean over N*H*W, any other the mean of that power of
            it, without a root.
    """

    def __init__(self, p1: int = 2, p2: int = 1) -> None:
        super().__init__()
        for name, power in (("p1", p1), ("p2", p2)):
            if isinstance(power, bool) or not isinstance(power, (int, float)):
                raise TypeError(f"{name} is {power!r}; it takes a number, by default 2 for p1 and 1 for p2.")
        self.p1 = p1
        self.p2 = p2

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss, 0-d, of maps ``[N, C, H, W]``; channels need not agree, and the larger map is pooled to the other.

        Raises:
            TypeError, ValueError: maps or powers that cannot be compared, as
                :func:`ftfast.ops.attention.difference.attention_difference`.
        """
        return self.factor_loss(f_s, f_t)

    def factor_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """What :meth:`forward` calls."""
        if is_overridden(self, FactorTransfer, "factor"):
            difference = _difference(self.factor, f_s, f_t)
            return difference.abs().mean() if self.p2 == 1 else difference.pow(self.p2).mean()
        return attention_difference(f_s, f_t, exponent=self.p1, p=self.p2)

    def factor(self, f: Tensor) -> Tensor:
        """A map ``[N, C, H, W]`` to its normalised attention ``[N, H*W]``, float32 (float64 for float64)."""
        return direction(attention_map(f, self.p1))


class Attention(nn.Module):
    """Attention transfer: the mean square of the difference of attention maps, for each pair of maps.

    Args:
        p: the power that features are raised to, 2 by default.
    """

    def __init__(self, p: int = 2) -> None:
        super().__init__()
        self.p = p

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        """Lists of maps ``[N, C, H, W]`` to a list of losses, 0-d, as many as the shorter list has."""
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of one pair."""
        if is_overridden(self, Attention, "at"):
            return _difference(self.at, f_s, f_t).square().mean()
        return attention_difference(f_s, f_t, exponent=self.p, p=2)

    def at(self, f: Tensor) -> Tensor:
        """A map ``[N, C, H, W]`` to its normalised attention ``[N, H*W]``, float32 (float64 for float64)."""
        return direction(attention_map(f, self.p))


def _difference(attention: Callable[[Tensor], Tensor], f_s: Tensor, f_t: Tensor) -> Tensor:
    """Of two maps' attention, the larger map pooled to squares of the other's height."""
    height = min(f_s.shape[2], f_t.shape[2])
    student, teacher = (
        attention(f if f.shape[2] == height else F.adaptive_avg_pool2d(f, (height, height))) for f in (f_s, f_t)
    )
    return student - teacher


class Paraphraser(PeerNetwork):
    """Encoder and decoder of the teacher's features.

    Args:
        t_shape: the shape ``[N, m, H, W]`` of the teacher's features, of which m is read.
        k: the paraphrase rate; the factor has ``int(m * k)`` channels.
        use_bn: batch norm after every convolution.

    Keys: ``encoder.{0,3,6}.*``, ``decoder.{0,3,6}.*`` and, with batch norm, ``.{1,4,7}.*``.
    """

    def __init__(self, t_shape: Sequence[int], k: float = 0.5, use_bn: bool = False) -> None:
        super().__init__()
        m = _channels("t_shape", t_shape)
        mk = truncated_channels("t_shape[1]", m, k)
        self.encoder = convolutions([m, m, mk, mk], use_bn=use_bn)
        self.decoder = convolutions([mk, mk, m, m], use_bn=use_bn, transposed=True)

    def forward(self, f_s: Tensor, is_factor: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Features ``[N, m, H, W]`` to ``(factor, reconstruction)``, or with ``is_factor`` to the factor alone."""
        factor = self.encoder(f_s)
        return factor if is_factor else (factor, self.decoder(factor))


class Translator(PeerNetwork):
    """Student features to factors.

    Args:
        s_shape: the shape ``[N, C, H, W]`` of the student's features, of which C is read.
        t_shape: the teacher's, of which m is read.
        k: the paraphrase rate; the factor has ``int(m * k)`` channels.
        use_bn: batch norm after every convolution; on by default, unlike the paraphraser's.

    Keys: ``encoder.{0,3,6}.*`` and, with batch norm, ``encoder.{1,4,7}.*``.
    """

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], k: float = 0.5, use_bn: bool = True) -> None:
        super().__init__()
        s = _channels("s_shape", s_shape)
        mk = truncated_channels("t_shape[1]", _channels("t_shape", t_shape), k)
        self.encoder = convolutions([s, s, mk, mk], use_bn=use_bn)

    def forward(self, f_s: Tensor) -> Tensor:
        """Features ``[N, C, H, W]`` to factors ``[N, int(m * k), H, W]``."""
        return self.encoder(f_s)


def _channels(name: str, shape: Sequence[int]) -> int:
    if not isinstance(shape, Sequence) or len(shape) != 4:
        raise ValueError(f"{name} is {shape!r}; it takes the shape [N, C, H, W] of the features.")
    check_channels(**{f"{name}[1]": shape[1]})
    return shape[1]
