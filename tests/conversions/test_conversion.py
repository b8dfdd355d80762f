"""A converted state_dict loads into the other project's network, strictly, and gives the same numbers."""

import os
from itertools import pairwise

import pytest
import torch
from torch import nn

import ftfast
from ftfast.conversion.state_dicts import convert, convert_state_dict

PROJECTS = ("ftfast", "official", "torchdistill", "mmrazor", "repdistiller", "zoo")
NETWORKS = ("paraphraser", "translator")
CHANNELS, FACTOR_CHANNELS = 5, 3
CASES = [
    (project, network, norm)
    for project in PROJECTS
    for network in NETWORKS
    for norm in (False, True)
    if not (norm and project == "official")
]


class Official(nn.Module):
    """The authors' formula: numbered attributes, LeakyReLU after each."""

    def __init__(self, network):
        super().__init__()
        m, mk = CHANNELS, FACTOR_CHANNELS
        for place, (before, after) in enumerate(pairwise((m, m, mk, mk))):
            self.add_module(f"conv{place}", nn.Conv2d(before, after, 3, 1, 1))
        if network == "paraphraser":
            for place, (before, after) in enumerate(pairwise((mk, mk, m, m))):
                self.add_module(f"deconv{place}", nn.ConvTranspose2d(before, after, 3, 1, 1))

    def forward(self, x):
        for layer in self.children():
            x = nn.functional.leaky_relu(layer(x), 0.1)
        return x


def sequential(kind, channels, norm, *, bias=True, placeholder=True):
    layers = []
    for before, after in pairwise(channels):
        layers.append(kind(before, after, 3, 1, 1, bias=bias))
        if norm:
            layers.append(nn.BatchNorm2d(after))
        elif placeholder:
            layers.append(nn.Sequential())
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


def build(project, network, norm):
    """The project's network as its own code writes it, in float64 with weights and statistics of its own."""
    m, mk = CHANNELS, FACTOR_CHANNELS
    if project == "ftfast":
        kinds = {"paraphraser": ftfast.Paraphraser, "translator": ftfast.Translator}
        made = kinds[network](m, factor_channels=mk, norm="batch" if norm else None)
    elif project == "official":
        made = Official(network)
    else:
        options = {"bias": project != "zoo" or not norm, "placeholder": project != "torchdistill"}
        encoder = sequential(nn.Conv2d, (m, m, mk, mk), norm, **options)
        if network == "paraphraser":
            parts = {"encoder": encoder, "decoder": sequential(nn.ConvTranspose2d, (mk, mk, m, m), norm, **options)}
        else:
            parts = {"encoder": encoder}
        bare = project == "torchdistill" and network == "translator"
        made = encoder if bare else nn.Sequential()
        for name, part in parts.items() if not bare else ():
            made.add_module(name, part)
    for name, buffer in made.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    for name, parameter in made.named_parameters():
        nn.init.normal_(parameter, 1.0 if ".weight" in name and parameter.dim() == 1 else 0.0, 0.3)
    return made.double()


def assert_same_function(one, other):
    x = torch.randn(4, CHANNELS, 6, 5, dtype=torch.float64)
    for mode in (False, True, False):  # the second evaluation sees the statistics that training moved
        expected, got = one.train(mode)(x), other.train(mode)(x)
        assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("to", PROJECTS)
@pytest.mark.parametrize(("source", "network", "norm"), CASES)
def test_every_pair_gives_the_same_function(source, network, norm, to):
    peer = build(source, network, norm)
    if norm and to == "official":
        with pytest.raises(ValueError, match=r"official.*no batch norm"):
            convert_state_dict(peer.state_dict(), to)
        return
    moved = build(to, network, norm)
    moved.load_state_dict(convert_state_dict(peer.state_dict(), to), strict=True)
    assert_same_function(peer, moved)


@pytest.mark.parametrize("to", PROJECTS)
@pytest.mark.parametrize(("source", "network", "norm"), CASES)
def test_there_and_back_is_bit_equal(source, network, norm, to):
    """But for a bias that the Zoo has no place for."""
    if norm and (to == "official" or (to == "zoo" and source != "zoo")):
        pytest.skip("not kept as it was")
    own = build(source, network, norm).state_dict()
    back = convert_state_dict(convert_state_dict(own, to), source)
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], own[key]) for key in own)
    assert all(tensor.dtype == own[key].dtype for key, tensor in back.items())


@pytest.mark.parametrize(("source", "network", "norm"), CASES)
def test_the_project_and_the_channels_are_recognised(source, network, norm):
    found = convert(build(source, network, norm).state_dict(), "ftfast")
    assert source in found.sources
    assert (found.network, found.has_norm) == (network, norm)
    assert (found.in_channels, found.factor_channels) == (CHANNELS, FACTOR_CHANNELS)
    assert convert_state_dict(build(source, network, norm).state_dict(), "ftfast", source=source)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda own: {f"module.{key}": tensor for key, tensor in own.items()},
        lambda own: {"epoch": 3, "state_dict": own, "optimizer": {"state": {0: own}, "param_groups": [{"lr": 0.1}]}},
        lambda own: {"model": {f"module._orig_mod.{key}": tensor for key, tensor in own.items()}},
        lambda own: {"n_averaged": torch.tensor(3)} | {f"module.{key}": tensor for key, tensor in own.items()},
    ],
    ids=["DataParallel", "checkpoint", "both", "AveragedModel"],
)
@pytest.mark.parametrize(("source", "network", "norm"), CASES)
def test_what_stands_around_the_network_is_taken_off(source, network, norm, wrap):
    own = build(source, network, norm).state_dict()
    found, expected = convert_state_dict(wrap(own)), convert_state_dict(own)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_prefix_is_put_before_every_key():
    own = build("official", "translator", False).state_dict()
    plain = convert_state_dict(own, "zoo")
    assert list(convert_state_dict(own, "zoo", prefix="module.")) == [f"module.{key}" for key in plain]


def test_one_network_of_several_is_named():
    head = ftfast.FactorTransfer(ftfast.Paraphraser(4), ftfast.Translator(3, 2)).state_dict()
    with pytest.raises(
        ValueError, match=r"several networks.*under 'translator'.*under 'paraphraser'; name one of them with part"
    ):
        convert_state_dict(head, "official")
    found = convert_state_dict(head, "official", part="translator")
    assert torch.equal(found["conv0.weight"], head["translator.encoder.0.weight"])
    assert len(convert_state_dict(head, "official", part="paraphraser")) == 12
    with pytest.raises(ValueError, match="part is 'student'"):
        convert_state_dict(head, "official", part="student")


def test_other_tensors_are_not_passed_over_in_silence():
    own = build("mmrazor", "translator", True).state_dict()
    whole = {f"connectors.s4.{key}": tensor for key, tensor in own.items()} | {"head.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"1 other tensors \(head.weight\).*part='connectors.s4'"):
        convert_state_dict(whole)
    assert list(convert_state_dict(whole, part="connectors.s4")) == list(convert_state_dict(own))


def test_old_checkpoints_without_counters():
    own = build("repdistiller", "translator", True).state_dict()
    old = {key: tensor for key, tensor in own.items() if not key.endswith("num_batches_tracked")}
    moved = build("ftfast", "translator", True)
    moved.load_state_dict(convert_state_dict(old), strict=True)
    assert_same_function(build_with("repdistiller", own), moved)


def build_with(project, state_dict):
    made = build(project, "translator", True)
    made.load_state_dict(state_dict)
    return made


def test_tensors_are_not_copied():
    own = build("official", "paraphraser", False).state_dict()
    found = convert_state_dict(own, "torchdistill")
    assert found["encoder.2.weight"].data_ptr() == own["conv1.weight"].data_ptr()


def without(key):
    own = build("official", "paraphraser", False).state_dict()
    del own[key]
    return own


def reshaped(key, shape):
    own = build("official", "paraphraser", False).state_dict()
    return own | {key: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("state_dict", "options", "error", "says"),
    [
        ({}, {}, ValueError, "no tensors"),
        (
            {"layer4.0.bn1.running_mean": torch.zeros(3)},
            {},
            ValueError,
            r"has layer4.0.bn1.running_mean, which fits no",
        ),
        ("without", {}, ValueError, "paraphraser of official but lacks deconv1.bias; ftfast has encoder"),
        (
            "reshaped",
            {},
            ValueError,
            r"conv1.weight has shape \(3, 5, 1, 1\).*5 channels.*factors of 3.*\(3, 5, 3, 3\)",
        ),
        ("whole", {"to": "caffe"}, ValueError, "to is 'caffe'; it takes ftfast, official"),
        ("whole", {"source": "zoo"}, ValueError, "source is 'zoo', and the keys are those of official"),
        ([1], {}, TypeError, "state_dict is a list"),
    ],
    ids=["empty", "foreign", "lacks", "shape", "to", "source", "list"],
)
def test_what_fits_nothing_is_refused_in_a_sentence(state_dict, options, error, says):
    made = {
        "without": lambda: without("deconv1.bias"),
        "reshaped": lambda: reshaped("conv1.weight", (3, 5, 1, 1)),
        "whole": lambda: build("official", "translator", False).state_dict(),
    }
    with pytest.raises(error, match=says):
        convert_state_dict(made[state_dict]() if isinstance(state_dict, str) else state_dict, **options)


@pytest.mark.parametrize(
    "key", ["\x1b[2J\x07", "x" * 5_000_000, "." * 5_000_000, "\u202e"], ids=["escape", "long", "dots", "bidi"]
)
def test_names_from_files_are_printed_escaped_and_cut(key):
    own = build("official", "translator", False).state_dict()
    for state_dict in (
        {key: torch.zeros(1)},
        {f"net.{name}": tensor for name, tensor in own.items()} | {key: torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match="state_dict has") as raised:
            convert_state_dict(state_dict)
        assert str(raised.value).isprintable()
        assert len(str(raised.value)) < 1000


def test_the_networks_of_torchdistill_load_it():
    wrapper = pytest.importorskip("torchdistill.models.wrapper")
    for norm in (False, True):
        own = ftfast.Paraphraser(8, norm="batch" if norm else None)
        theirs = wrapper.Paraphraser4FactorTransfer(0.5, 8, uses_bn=norm)
        theirs.load_state_dict(convert_state_dict(own.state_dict(), "torchdistill"), strict=True)
        theirs.double()
        assert_same_function_of(own.double(), theirs, 8)
        translator = ftfast.Translator(6, 4, norm="batch" if norm else None)
        others = wrapper.Translator4FactorTransfer(6, 4, uses_bn=norm)
        others.load_state_dict(convert_state_dict(translator.state_dict(), "torchdistill"), strict=True)
        assert_same_function_of(translator.double(), others.double(), 6)


def assert_same_function_of(one, other, channels):
    x = torch.randn(2, channels, 4, 4, dtype=torch.float64)
    expected, got = one.eval()(x), other.eval()(x)
    assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.skipif("FTFAST_OFFICIAL_PARAPHRASER" not in os.environ, reason="FTFAST_OFFICIAL_PARAPHRASER is not set")
def test_the_authors_trained_paraphraser_loads():
    loaded = torch.load(os.environ["FTFAST_OFFICIAL_PARAPHRASER"], map_location="cpu", weights_only=True)
    own = ftfast.Paraphraser(64, 0.5)
    own.load_state_dict(convert_state_dict(loaded), strict=True)
    assert torch.equal(own.decoder[2].bias, loaded["state_dict"]["deconv2.bias"])
