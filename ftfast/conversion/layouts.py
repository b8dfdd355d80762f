"""Where each project keeps the layers of a paraphraser and a translator: its state_dict's keys for ours."""

from functools import cached_property
from itertools import product
from typing import NamedTuple

COUNTER = "num_batches_tracked"
# AveragedModel's count of its updates, beside the network that it averages.
AVERAGES = "n_averaged"
# Of a batch norm; checkpoints of torch before 0.4.1 lack the counter.
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", COUNTER)
# Our name of an encoder's or decoder's batch norms.
NORM_OF = {"encoder": "norm", "decoder": "decoder_norm"}


class Layout(NamedTuple):
    """The names of one project.

    Attributes:
        encoder, decoder, translator: what stands before a layer's number.
        plain, with_norm: the numbers of the three convolutions; None for a project without batch norm.
        apart: the batch norms lie beside the convolutions, in lists of their own; else one number further.
        bias_beside_norm: whether a convolution has a bias where a batch norm follows.
        example: some keys, for a reader.
    """

    encoder: str
    decoder: str
    translator: str
    plain: tuple[int, int, int]
    with_norm: tuple[int, int, int] | None
    apart: bool
    bias_beside_norm: bool
    example: str


_SEQUENTIAL = Layout(
    "encoder.", "decoder.", "encoder.", (0, 3, 6), (0, 3, 6), False, True, "encoder.{0,3,6}.*, decoder.{0,3,6}.*"
)
LAYOUTS = {
    "ftfast": Layout(
        "encoder.", "decoder.", "encoder.", (0, 1, 2), (0, 1, 2), True, True, "encoder.{0,1,2}.*, decoder.{0,1,2}.*"
    ),
    "official": Layout("conv", "deconv", "conv", (0, 1, 2), None, False, True, "conv{0,1,2}.*, deconv{0,1,2}.*"),
    "torchdistill": Layout(
        "encoder.",
        "decoder.",
        "",
        (0, 2, 4),
        (0, 3, 6),
        False,
        True,
        "encoder.{0,2,4}.*, decoder.{0,2,4}.*, a translator {0,2,4}.*, all with {0,3,6} beside batch norm",
    ),
    "mmrazor": _SEQUENTIAL,
    "repdistiller": _SEQUENTIAL,
    "zoo": _SEQUENTIAL._replace(
        bias_beside_norm=False, example=f"{_SEQUENTIAL.example}, without bias beside batch norm"
    ),
}


class Form:
    """The keys that one kind of network has in one project.

    Attributes:
        keys: our name of every tensor to the project's, layer by layer.
        required: the project's keys without the counters of its batch norms.
    """

    def __init__(self, project: str, network: str, has_norm: bool) -> None:
        self.project = project
        self.network = network
        self.has_norm = has_norm
        self.keys = dict(_keys(LAYOUTS[project], network, has_norm))
        self.required = frozenset(key for role, key in self.keys.items() if not role.endswith(COUNTER))

    @cached_property
    def allowed(self) -> frozenset[str]:
        """The required keys and the counters."""
        return frozenset(self.keys.values())

    def has(self, keys: set[str]) -> bool:
        """Whether ``keys`` are those of a whole network of this form and no others."""
        return self.required <= keys <= self.allowed

    def __str__(self) -> str:
        return f"a {self.network} of {self.project}{' with batch norm' if self.has_norm else ''}"


def _keys(layout: Layout, network: str, has_norm: bool) -> list[tuple[str, str]]:
    stacks = [("encoder", layout.translator if network == "translator" else layout.encoder)]
    if network == "paraphraser":
        stacks.append(("decoder", layout.decoder))
    numbers = layout.with_norm if has_norm else layout.plain
    assert numbers is not None
    pairs = []
    for (stack, stem), (index, number) in product(stacks, enumerate(numbers)):
        pairs.append((f"{stack}.{index}.weight", f"{stem}{number}.weight"))
        if layout.bias_beside_norm or not has_norm:
            pairs.append((f"{stack}.{index}.bias", f"{stem}{number}.bias"))
        if has_norm:
            norm = f"{NORM_OF[stack]}.{index}" if layout.apart else f"{stem}{number + 1}"
            pairs.extend((f"{NORM_OF[stack]}.{index}.{kind}", f"{norm}.{kind}") for kind in _NORM_TENSORS)
    return pairs


FORMS = {
    (project, network, has_norm): Form(project, network, has_norm)
    for project, layout in LAYOUTS.items()
    for network in ("paraphraser", "translator")
    for has_norm in (False, True)
    if layout.with_norm is not None or not has_norm
}
