"""convert_state_dict: a paraphraser's or translator's weights under the names that another project has for them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ftfast.conversion.layouts import AVERAGES, COUNTER, FORMS, LAYOUTS, NORM_OF, Form
from ftfast.errors import shown

# How deep the tensors of a training checkpoint may lie: {"model": {"paraphraser": {...}}}.
_DEEPEST = 4
_MOST_NAMED = 6
_LONGEST_KEY = 1000
# Of the keys of one layout and those at hand: below it, naming the nearest layout would mislead.
_LEAST_LIKENESS = 0.4


class ConvertedTensor(NamedTuple):
    """One tensor on its way: the key it had ("" for one made anew), the key it gets, and its value."""

    old: str
    new: str
    tensor: Tensor


class Conversion(NamedTuple):
    """A network that was found in a checkpoint and named anew.

    Attributes:
        sources: the projects that have such keys; several share a layout.
        network: "paraphraser" or "translator"; an encoder alone counts as a translator.
        has_norm: whether a batch norm follows every convolution.
        in_channels, factor_channels: as the tensors' shapes say.
        prefix: what stood before every key.
        tensors: layer by layer.
    """

    sources: tuple[str, ...]
    network: str
    has_norm: bool
    in_channels: int
    factor_channels: int
    prefix: str
    tensors: tuple[ConvertedTensor, ...]


def convert_state_dict(
    state_dict: Mapping[str, Any], to: str = "ftfast", *, source: str | None = None, part: str = "", prefix: str = ""
) -> dict[str, Tensor]:
    """A paraphraser's or translator's state_dict under another project's names.

    The tensors' shapes decide the channels, so this needs no rounding rule for ``m * k``. Whoever builds a network
    from ``k`` does: ftfast and the official code round, the other projects cut the fraction off.

    Args:
        state_dict: names to tensors, or a training checkpoint that holds them at some depth, for example under
            ``"state_dict"``. What stands before every key, such as ``module.``, is taken off.
        to: ``"ftfast"``, ``"official"``, ``"torchdistill"``, ``"mmrazor"``, ``"repdistiller"`` or ``"zoo"``.
        source: the project it comes from, one of the same; None recognises it by its keys.
        part: where the network is, for example ``"translator"``; needed where ``state_dict`` has other tensors too.
        prefix: put before every new key, for example ``"module."`` for a network inside DataParallel.

    Returns:
        The tensors themselves, uncopied, under their new names. Two kinds are made anew: the Knowledge Distillation
        Zoo has no convolution bias beside a batch norm, so a network from there gets zeros, and one on its way there
        has its bias taken off the running mean, which leaves its output as it was in training and in evaluation.

    Raises:
        TypeError: ``state_dict`` is not a mapping.
        ValueError: an unknown project, keys that fit none, shapes that contradict each other, several networks or
            other tensors and no ``part``, or a batch norm on its way to the official code, which has none.
    """
    return {entry.new: entry.tensor for entry in convert(state_dict, to, source, part, prefix).tensors}


def convert(
    state_dict: Mapping[str, Any], to: str, source: str | None = None, part: str = "", prefix: str = ""
) -> Conversion:
    """As :func:`convert_state_dict`, with what was found and each tensor's old name."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; it takes a mapping of names to tensors.")
    for name, project in (("to", to), ("source", source)):
        if project not in LAYOUTS and (project is not None or name == "to"):
            raise ValueError(f"{name} is {project!r}; it takes {', '.join(LAYOUTS)}.")
    tensors = dict(flat_tensors(state_dict))
    found, forms = _find_network(tensors, source, part)
    known = forms[0]
    wanted = FORMS.get((to, known.network, known.has_norm))
    if wanted is None:
        raise ValueError(f"to is {to!r}, whose networks have no batch norm, and state_dict has; name another project.")
    old = {role: found + key for role, key in known.keys.items() if found + key in tensors}
    ours = {role: tensors[key] for role, key in old.items()}
    in_channels, factor_channels = _check_shapes(ours, old)
    moved = tuple(_renamed(ours, old, wanted, prefix))
    sources = tuple(form.project for form in forms)
    return Conversion(sources, known.network, known.has_norm, in_channels, factor_channels, found, moved)


def flat_tensors(values: Mapping[Any, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its dotted path; optimisers number their states by integers, and so drop out."""
    for key, value in values.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            if key.rpartition(".")[2] != AVERAGES:
                yield path + key, value
        elif isinstance(key, str) and isinstance(value, Mapping) and depth < _DEEPEST:
            yield from flat_tensors(value, f"{path}{key}.", depth + 1)


def _find_network(tensors: dict[str, Tensor], source: str | None, part: str) -> tuple[str, list[Form]]:
    """What stands before the keys of the one whole network, and the forms that it fits."""
    fits: dict[str, list[Form]] = {}
    for prefix in _prefixes(tensors):
        if any(prefix.startswith(outer) for outer in fits):
            continue
        keys = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
        if forms := [form for form in FORMS.values() if form.has(keys)]:
            fits[prefix] = forms
    if not fits:
        raise ValueError(_what_is_nearest(tensors))
    listed = _listed([f"{forms[0]} under '{shown(prefix[:-1])}'" for prefix, forms in fits.items()])
    within = [prefix for prefix in fits if not part or f".{part.strip('.')}." in f".{prefix}"]
    if not within:
        raise ValueError(f"part is {part!r}, under which state_dict has no whole network; it has {listed}.")
    if len(within) > 1:
        raise ValueError(f"state_dict has several networks, {listed}; name one of them with part.")
    (prefix,) = within
    others = [key for key in tensors if not key.startswith(prefix)]
    if others and not part:
        raise ValueError(
            f"state_dict has {listed} and {len(others)} other tensors ({_listed(others)}); take the network alone with "
            f"part='{shown(prefix[:-1])}'."
        )
    forms = [form for form in fits[prefix] if source in (None, form.project)]
    if not forms:
        fitting = " or ".join(form.project for form in fits[prefix])
        raise ValueError(f"source is {source!r}, and the keys are those of {fitting}; name that or leave source out.")
    return prefix, forms


def _prefixes(tensors: dict[str, Tensor]) -> list[str]:
    """Every dotted beginning of a key, the shortest first; a key of megabytes has none that matters."""
    found = {""}
    for key in (key for key in tensors if len(key) <= _LONGEST_KEY):
        found.update(key[: place + 1] for place, letter in enumerate(key) if letter == ".")
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _listed(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_NAMED else ""
    return ", ".join(shown(name) for name in names[:_MOST_NAMED]) + more


def _what_is_nearest(tensors: dict[str, Tensor]) -> str:
    if not tensors:
        return "state_dict has no tensors; it takes the state_dict of a paraphraser or a translator."
    has = f"state_dict has {_listed(list(tensors))}"
    known = "; ".join(f"{project} has {layout.example}" for project, layout in LAYOUTS.items())
    best, nearest, under = _LEAST_LIKENESS, None, ""
    for prefix in _prefixes(tensors):
        keys = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
        for form in FORMS.values():
            likeness = len(keys & form.required) / len(keys | form.required)
            if likeness > best:
                best, nearest, under = likeness, form, prefix
    if nearest is None:
        return f"{has}, which fits no project; {known}."
    keys = {key.removeprefix(under) for key in tensors if key.startswith(under)}
    lacks = [key for key in nearest.keys.values() if key in nearest.required - keys]
    unknown = [key for key in tensors if key.startswith(under) and key.removeprefix(under) not in nearest.allowed]
    faults = [f"lacks {_listed(lacks)}"] if lacks else []
    faults += [f"has {_listed(unknown)} beside"] if unknown else []
    return f"{has}, which is nearest to {nearest} but {' and '.join(faults)}; {known}."


def _check_shapes(ours: dict[str, Tensor], old: dict[str, str]) -> tuple[int, int]:
    """The channels of the features and of the factor; ValueError where the tensors contradict each other."""
    first, last = ours["encoder.0.weight"], ours["encoder.2.weight"]
    m, mk = (first.shape[1] if first.dim() > 1 else 0), (last.shape[0] if last.dim() else 0)
    encoder, decoder = ((m, m), (m, mk), (mk, mk)), ((mk, mk), (mk, m), (m, m))
    for role, tensor in ours.items():
        stack, index, kind = role.split(".")
        taken, given = (encoder if stack in ("encoder", "norm") else decoder)[int(index)]
        if stack in NORM_OF and kind == "weight":
            expected: tuple[int, ...] = (given, taken, 3, 3) if stack == "encoder" else (taken, given, 3, 3)
        else:
            expected = () if kind == COUNTER else (given,)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"state_dict's {shown(old[role])} has shape {tuple(tensor.shape)}, and a network for {m} channels with "
                f"factors of {mk} has {expected} there; it takes three 3x3 convolutions m -> m -> m*k -> m*k, and a "
                "decoder that mirrors them."
            )
    return m, mk


def _renamed(ours: dict[str, Tensor], old: dict[str, str], wanted: Form, prefix: str) -> Iterator[ConvertedTensor]:
    bias_of = {
        f"{norm}.{index}.running_mean": f"{stack}.{index}.bias" for stack, norm in NORM_OF.items() for index in range(3)
    }
    for role, key in wanted.keys.items():
        bias = bias_of.get(role, "")
        if bias in ours and bias not in wanted.keys:
            moved = ours[role] - ours[bias].to(ours[role])
            yield ConvertedTensor(f"{old[role]} - {old[bias]}", prefix + key, moved)
        elif role in ours:
            yield ConvertedTensor(old[role], prefix + key, ours[role])
        elif not role.endswith(COUNTER):  # a bias beside a batch norm, from a project without one
            channels = ours[f"{NORM_OF[role.split('.')[0]]}.{role.split('.')[1]}.bias"].shape
            yield ConvertedTensor("", prefix + key, ours[role.replace("bias", "weight")].new_zeros(channels))
