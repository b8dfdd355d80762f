"""What :mod:`bench.kernels.compat` compares: peers' losses and drop-ins, drop-in classes and the bare call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import ftfast
from bench import peers
from bench.peers import ATTENTION, OFFICIAL, Formula, Loss, NotInstalledError, attention, official_formula
from bench.shapes import FactorShape
from ftfast.compat import mmrazor, official, repdistiller, zoo
from ftfast.ops.attention.difference import attention_difference

# So small that only Python is timed.
TINY = FactorShape("tiny", 2, 2, 2, 2)


def transfer_formula(student: Tensor, teacher: Tensor) -> Tensor:
    """The attention transfer of RepDistiller (distiller_zoo/AT.py), of one pair of maps of one size."""
    return (attention(student) - attention(teacher)).square().mean()


def _official() -> Loss:
    return lambda student, teacher: official.factor_transfer_loss(student, teacher, beta=1.0)


def _torchdistill() -> Loss:
    """As torchdistill's box calls its criterion; imported when used, since it imports torchdistill where that is."""
    from ftfast.compat.torchdistill import FTLoss

    loss = FTLoss()
    return lambda student, teacher: loss({"translator": {"output": student}}, {"paraphraser": {"output": teacher}})


def _attention() -> Loss:
    loss = repdistiller.Attention()
    return lambda student, teacher: loss([student], [teacher])[0]


@dataclass(frozen=True)
class Pair:
    """A peer's loss and ours.

    Attributes:
        title: the peer, as tables show it.
        theirs, ours: make the losses.
        line: what a user writes.
        formula: what both compute.
        maps: they compare maps of features and not factors.
        aimed: how many times faster ours is to be, on a CPU.
        package: the name in :data:`bench.peers.PEERS` of a peer that has to be installed.
    """

    title: str
    theirs: Callable[[], Loss]
    ours: Callable[[], Loss]
    line: str
    formula: Formula = OFFICIAL
    maps: bool = False
    aimed: float | None = None
    package: str = ""

    def absent(self) -> str:
        """Why the peer cannot be measured, or nothing."""
        try:
            self.theirs()
        except NotInstalledError as error:
            return str(error)
        return ""


PAIRS = (
    Pair(
        "torchdistill FTLoss",
        lambda: peers.PEERS["torchdistill"].build(),
        _torchdistill,
        "dependencies: [ftfast.compat.torchdistill.replace]",
        aimed=10,
        package="torchdistill",
    ),
    Pair(
        "official script",
        lambda: official_formula,
        _official,
        "loss = factor_transfer_loss(factor_s, factor_t, BETA) + ...",
    ),
    Pair("mmrazor FTLoss", lambda: peers.PEERS["mmrazor"].build(), mmrazor.FTLoss, "register_module(FTLoss)"),
    Pair("Zoo FT", lambda: official_formula, zoo.FT, "from ftfast.compat.zoo import FT"),
    Pair(
        "RepDistiller FactorTransfer",
        lambda: peers.PEERS["repdistiller"].build(),
        repdistiller.FactorTransfer,
        "from ftfast.compat.repdistiller import FactorTransfer",
        formula=ATTENTION,
        maps=True,
        aimed=5,
    ),
    Pair(
        "RepDistiller Attention",
        lambda: transfer_formula,
        _attention,
        "from ftfast.compat.repdistiller import Attention",
        formula=Formula(transfer_formula, ATTENTION.directions),
        maps=True,
        aimed=5,
    ),
)


def calls(device: torch.device) -> dict[str, dict[str, Callable[[], Loss]]]:
    """The drop-ins by the bare call that they make, which comes first."""

    def through(network: nn.Module) -> Loss:
        network.to(device)
        return lambda student, teacher: network(student).sum()

    channels = TINY.channels
    return {
        "ft_loss": {
            "ft_loss": lambda: ftfast.ft_loss,
            "official.factor_transfer_loss": _official,
            "zoo.FT": zoo.FT,
            "mmrazor.FTLoss": mmrazor.FTLoss,
            "torchdistill.FTLoss": _torchdistill,
        },
        "attention_difference": {
            "attention_difference": lambda: attention_difference,
            "repdistiller.FactorTransfer": repdistiller.FactorTransfer,
        },
        "attention_difference, p=2": {
            "attention_difference, p=2": lambda: partial(attention_difference, p=2),
            "repdistiller.Attention": _attention,
        },
        "Translator": {
            "Translator": lambda: through(ftfast.Translator(channels, channels)),
            "official.Translator": lambda: through(official.Translator(channels, channels)),
            "zoo.translator": lambda: through(zoo.translator(channels, channels, 1, use_bn=False)),
            "mmrazor.Translator": lambda: through(mmrazor.Translator(channels, channels, use_bn=False)),
            "repdistiller.Translator": lambda: through(repdistiller.Translator(TINY.dims, TINY.dims, 1, use_bn=False)),
            "torchdistill.Translator4FactorTransfer": lambda: through(_torchdistill_translator(channels)),
        },
    }


def _torchdistill_translator(channels: int) -> nn.Module:
    from ftfast.compat.torchdistill import Translator4FactorTransfer

    return Translator4FactorTransfer(channels, channels, uses_bn=False)
