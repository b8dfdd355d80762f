"""The peers' classes: their keys, defaults and numbers, and where theirs break, the right ones."""

import copy
import importlib
import inspect
import logging
import os
import re
import sys
import time
import types
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ftfast
from ftfast.compat import mmrazor, official, repdistiller, zoo
from ftfast.compat.torchdistill import networks as torchdistill_networks

Loss = Callable[[Tensor, Tensor], Tensor]
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
FACTORS = (4, 6, 5, 3)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def maps(*shape: int, dtype: torch.dtype = torch.float64, layout: str = "nchw") -> Tensor:
    """Features as a LeakyReLU leaves them."""
    return F.leaky_relu(torch.randn(shape), 0.1).to(dtype).contiguous(memory_format=LAYOUTS[layout])


# --- The peers' formulas, written out -------------------------------------------------------------------------------


def unit(factor: Tensor) -> Tensor:
    return F.normalize(factor.reshape(factor.shape[0], -1))


def l1_of_directions(student: Tensor, teacher: Tensor) -> Tensor:
    return nn.L1Loss()(unit(student), unit(teacher))


def attention_map(features: Tensor, power: int) -> Tensor:
    return F.normalize(features.pow(power).mean(1).flatten(1))


def attention_formula(student: Tensor, teacher: Tensor, power: int, p: int) -> Tensor:
    height = min(student.shape[2], teacher.shape[2])
    student, teacher = (
        f if f.shape[2] == height else F.adaptive_avg_pool2d(f, (height, height)) for f in (student, teacher)
    )
    difference = attention_map(student, power) - attention_map(teacher, power)
    return difference.abs().mean() if p == 1 else difference.pow(p).mean()


def sequence(
    channels: list[int], *, norm: bool, bias: bool = True, transposed: bool = False, gap: bool = True
) -> nn.Sequential:
    """A peer's encoder or decoder in plain torch; ``gap`` leaves a place where a batch norm would be."""
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        layers.append(kind(before, after, 3, 1, 1, bias=bias))
        if norm:
            layers.append(nn.BatchNorm2d(after))
        elif gap:
            layers.append(nn.Sequential())
        layers.append(nn.LeakyReLU(0.1, inplace=True))
    return nn.Sequential(*layers)


class Named(nn.Module):
    """Holds networks under a peer's attribute names."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            setattr(self, name, network)


def official_layers(decoder: bool) -> nn.Module:
    names = {"conv0": nn.Conv2d(6, 6, 3, 1, 1), "conv1": nn.Conv2d(6, 4, 3, 1, 1), "conv2": nn.Conv2d(4, 4, 3, 1, 1)}
    if decoder:
        names |= {
            "deconv0": nn.ConvTranspose2d(4, 4, 3, 1, 1),
            "deconv1": nn.ConvTranspose2d(4, 6, 3, 1, 1),
            "deconv2": nn.ConvTranspose2d(6, 6, 3, 1, 1),
        }
    return Named(**names)


def through(network: nn.Module, names: list[str], x: Tensor) -> Tensor:
    for name in names:
        x = F.leaky_relu(getattr(network, name)(x), 0.1)
    return x


ENCODER, DECODER = ["conv0", "conv1", "conv2"], ["deconv0", "deconv1", "deconv2"]
DOWN, UP = [6, 6, 4, 4], [4, 4, 6, 6]


def pair(norm: bool, bias: bool = True) -> nn.Module:
    return Named(
        encoder=sequence(DOWN, norm=norm, bias=bias), decoder=sequence(UP, norm=norm, bias=bias, transposed=True)
    )


def single(norm: bool, bias: bool = True) -> nn.Module:
    return Named(encoder=sequence(DOWN, norm=norm, bias=bias))


def encode(network: nn.Module, x: Tensor) -> Tensor:
    return network.encoder(x)


def rebuild(network: nn.Module, x: Tensor) -> Tensor:
    return network.decoder(network.encoder(x))


Network = tuple[Callable[[], nn.Module], Callable[[], nn.Module], dict[str, tuple[Callable, Callable]]]
# Ours, theirs in plain torch, and by a name the calls that must agree.
NETWORKS: dict[str, Network] = {
    "official paraphraser": (
        lambda: official.Paraphraser(6, 4),
        lambda: official_layers(decoder=True),
        {
            "mode 0": (lambda ours, x: ours(x, 0), lambda theirs, x: through(theirs, ENCODER + DECODER, x)),
            "mode 1": (lambda ours, x: ours(x, 1), lambda theirs, x: through(theirs, ENCODER, x)),
            "mode 2": (
                lambda ours, x: ours(x[:, :4], mode=2),
                lambda theirs, x: through(theirs, DECODER, x[:, :4]),
            ),
        },
    ),
    "official translator": (
        lambda: official.Translator(6, 4, stride=2),
        lambda: official_layers(decoder=False),
        {"forward": (lambda ours, x: ours(x), lambda theirs, x: through(theirs, ENCODER, x))},
    ),
    "zoo translator": (
        lambda: zoo.translator(6, 8, 0.5, use_bn=False),
        lambda: single(norm=False),
        {"forward": (lambda ours, x: ours(x), encode)},
    ),
}
for _norm in (False, True):
    _with = "with" if _norm else "without"
    NETWORKS |= {
        f"mmrazor paraphraser {_with} norm": (
            lambda norm=_norm: mmrazor.Paraphraser(6, 4, use_bn=norm),
            lambda norm=_norm: pair(norm),
            {"forward": (lambda ours, x: ours(x), rebuild), "train": (lambda o, x: o.forward_train(x), encode)},
        ),
        f"mmrazor translator {_with} norm": (
            lambda norm=_norm: mmrazor.Translator(6, 4, use_bn=norm),
            lambda norm=_norm: single(norm),
            {"forward": (lambda ours, x: ours(x), encode)},
        ),
        f"repdistiller paraphraser {_with} norm": (
            lambda norm=_norm: repdistiller.Paraphraser((2, 6, 5, 5), 0.8, norm),
            lambda norm=_norm: pair(norm),
            {
                "factor": (lambda ours, x: ours(x, is_factor=True), encode),
                "first": (lambda ours, x: ours(x)[0], encode),
                "second": (lambda ours, x: ours(x)[1], rebuild),
            },
        ),
        f"repdistiller translator {_with} norm": (
            lambda norm=_norm: repdistiller.Translator((2, 6, 5, 5), (2, 9, 5, 5), use_bn=norm),
            lambda norm=_norm: single(norm),
            {"forward": (lambda ours, x: ours(x), encode)},
        ),
        f"zoo paraphraser {_with} norm": (
            lambda norm=_norm: zoo.paraphraser(6, 0.8, norm),
            lambda norm=_norm: pair(norm, bias=not norm),
            {"factor": (lambda ours, x: ours(x)[0], encode), "second": (lambda ours, x: ours(x)[1], rebuild)},
        ),
    }
CALLS = [(name, call) for name, (_, _, calls) in NETWORKS.items() for call in calls]


def loaded(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours with the weights of theirs, batch norms' statistics included."""
    make_ours, make_theirs, _ = NETWORKS[name]
    ours, theirs = make_ours(), make_theirs()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor in (layer.weight, layer.bias, layer.running_mean):
                    tensor.normal_()
                layer.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "call"), CALLS, ids=[f"{name}, {call}" for name, call in CALLS])
def test_networks_load_the_peers_checkpoint_and_give_its_numbers(name, call, training, layout):
    ours, theirs = loaded(name)
    run_ours, run_theirs = NETWORKS[name][2][call]
    exact = copy.deepcopy(theirs).double().train(training)
    x = maps(3, 6, 7, 5, layout=layout)
    expected = run_theirs(exact, x)
    assert relative_error(run_ours(copy.deepcopy(ours).double().train(training), x), expected) < 1e-12
    assert relative_error(run_ours(ours.train(training), x.float()), expected) < 1e-5


@pytest.mark.parametrize("name", [name for name in NETWORKS if "zoo" not in name])
def test_the_same_seed_draws_the_peers_initial_weights(name):
    make_ours, make_theirs, _ = NETWORKS[name]
    torch.manual_seed(3)
    ours = make_ours().state_dict()
    torch.manual_seed(3)
    theirs = make_theirs().state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert list(ours) == list(theirs)


def test_zoo_initialises_convolutions_as_he_and_their_biases_with_zeros():
    network = zoo.paraphraser(64, 1, use_bn=False)
    weight, bias = network.encoder[3].weight, network.encoder[3].bias
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert bias.eq(0).all()
    assert not network.decoder[0].bias.eq(0).all()  # torch's


# As the peers' sources have them.
SIGNATURES: list[tuple[Callable, str]] = [
    (official.Paraphraser, "(in_planes, planes, stride=1)"),
    (official.Paraphraser.forward, "(self, x, mode)"),
    (official.Translator, "(in_planes, planes, stride=1)"),
    (zoo.FT.forward, "(self, factor_s, factor_t)"),
    (zoo.paraphraser, "(in_channels_t, k, use_bn=True)"),
    (zoo.translator, "(in_channels_s, in_channels_t, k, use_bn=True)"),
    (zoo.define_paraphraser, "(in_channels_t, k, use_bn, cuda=True)"),
    (zoo.define_translator, "(in_channels_s, in_channels_t, k, use_bn=True, cuda=True)"),
    (mmrazor.FTLoss, "(loss_weight=1.0)"),
    (mmrazor.FTLoss.forward, "(self, s_feature, t_feature)"),
    (mmrazor.Paraphraser, "(in_channel, out_channel, phase='pretrain', use_bn=False, init_cfg=None)"),
    (mmrazor.Translator, "(in_channel, out_channel, use_bn=True, init_cfg=None)"),
    (repdistiller.FactorTransfer, "(p1=2, p2=1)"),
    (repdistiller.FactorTransfer.forward, "(self, f_s, f_t)"),
    (repdistiller.Attention, "(p=2)"),
    (repdistiller.Attention.forward, "(self, g_s, g_t)"),
    (repdistiller.Paraphraser, "(t_shape, k=0.5, use_bn=False)"),
    (repdistiller.Paraphraser.forward, "(self, f_s, is_factor=False)"),
    (repdistiller.Translator, "(s_shape, t_shape, k=0.5, use_bn=True)"),
]


@pytest.mark.parametrize(("ours", "theirs"), SIGNATURES, ids=[each.__qualname__ for each, _ in SIGNATURES])
def test_arguments_and_defaults_are_the_peers(ours, theirs):
    signature = inspect.signature(ours)
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == theirs


def test_gradients_of_a_network_are_the_peers():
    ours, theirs = loaded("official paraphraser")
    x = maps(3, 6, 7, 5)
    exact = theirs.double()
    through(exact, ENCODER + DECODER, x).square().mean().backward()
    ours(x.float(), 0).square().mean().backward()
    for (name, found), expected in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert relative_error(found.grad, expected.grad) < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_are_laid_out_as_torchs_so_that_a_peers_view_takes_them(layout):
    x = maps(2, 16, 6, 6, dtype=torch.float32, layout=layout)
    factor = official.Translator(16, 8)(x)
    expected = nn.Conv2d(16, 8, 3, 1, 1)(x)
    assert factor.is_contiguous(memory_format=LAYOUTS[layout])
    assert factor.stride() == expected.stride()
    if layout == "nchw":
        assert factor.view(2, -1).shape == (2, 8 * 36)


def test_convolutions_run_on_our_kernel(monkeypatch):
    if not ftfast.explain(torch.ones(2, 2), torch.ones(2, 2)).startswith("native"):
        pytest.skip("the native backend does not run here")
    from ftfast.compat import networks

    seen = []
    kernel = networks.conv3x3_leaky_relu

    def watched(*args, transposed):
        result = kernel(*args, transposed=transposed)
        seen.append((transposed, result is not None))
        return result

    monkeypatch.setattr(networks, "conv3x3_leaky_relu", watched)
    repdistiller.Paraphraser((2, 6, 5, 5))(torch.randn(2, 6, 5, 5))
    assert seen == [(False, True)] * 3 + [(True, True)] * 3


@pytest.mark.parametrize("change", ["hook", "replaced", "slope", "dilation"])
def test_a_layer_that_its_user_changed_is_the_one_that_runs(change):
    network = mmrazor.Translator(6, 4, use_bn=False)
    x = torch.randn(2, 6, 5, 5)
    before = network(x)
    if change == "hook":
        network.encoder[2].register_forward_hook(lambda module, inputs, output: output * 0)
    elif change == "replaced":
        network.encoder[0] = nn.Conv2d(6, 6, 1)
    elif change == "slope":
        network.encoder[8] = nn.LeakyReLU(0.5)
    else:
        network.encoder[0].dilation = network.encoder[0].padding = (2, 2)
    plain = nn.Sequential(*copy.deepcopy(network.encoder)).double()
    found = network(x)
    assert relative_error(found, before) > 1e-2
    assert relative_error(found, plain(x.double())) < 1e-5


def test_networks_compile_in_one_graph():
    network = repdistiller.Paraphraser((2, 6, 5, 5))
    x = torch.randn(2, 6, 5, 5)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert relative_error(compiled(x, is_factor=True), network(x, is_factor=True)) < 1e-5


def test_a_sequence_can_be_copied_and_cut():
    encoder = copy.deepcopy(mmrazor.Translator(6, 4, use_bn=False).encoder)
    x = torch.randn(2, 6, 5, 5)
    assert relative_error(encoder[3:](encoder[:3](x)), encoder(x)) < 1e-5


# Not the official and RepDistiller's paraphrasers, whose result's kind a flag decides.
RECORDED: dict[str, Callable[[], nn.Module]] = {
    name: make
    for name, (make, _, _) in NETWORKS.items()
    if name != "official paraphraser" and "repdistiller paraphraser" not in name
} | {
    "torchdistill paraphraser": lambda: torchdistill_networks.Paraphraser4FactorTransfer(0.5, 6),
    "torchdistill translator": lambda: torchdistill_networks.Translator4FactorTransfer(6, 4, uses_bn=False),
    "mmrazor train phase": lambda: mmrazor.Paraphraser(6, 4, phase="train"),
}


@pytest.mark.parametrize("record", [torch.jit.script, torch.fx.symbolic_trace], ids=["script", "fx"])
@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_networks_can_be_scripted_and_traced_where_the_peers_can(name, record):
    network = RECORDED[name]().eval()
    recorded, x = record(network), torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(recorded(x), network(x))


def test_a_paraphraser_with_a_flag_is_traced_for_one_value():
    x = torch.randn(2, 6, 5, 5)
    for network, flag, value in (
        (official.Paraphraser(6, 4), "mode", 1),
        (repdistiller.Paraphraser(x.shape), "is_factor", True),
    ):
        traced = torch.fx.symbolic_trace(network, concrete_args={flag: value})
        torch.testing.assert_close(traced(x, value), network(x, value))


class OwnFactor:
    """Overrides what the peers' forward calls."""

    def factor(self, f: Tensor) -> Tensor:
        return f.flatten(1)

    normalize = at = factor


OWN: dict[str, tuple[type, Loss]] = {
    "zoo": (zoo.FT, F.l1_loss),
    "mmrazor": (mmrazor.FTLoss, F.l1_loss),
    "repdistiller": (repdistiller.FactorTransfer, F.l1_loss),
    "attention": (repdistiller.Attention, F.mse_loss),
}


@pytest.mark.parametrize("name", OWN)
def test_what_a_subclass_or_an_instance_overrides_is_what_runs(name):
    home, formula = OWN[name]
    student, teacher = maps(2, 4, 3, 3), maps(2, 4, 3, 3)
    by_class, by_instance = type("Own", (OwnFactor, home), {})(), home()
    for method in ("factor", "normalize", "at"):
        if hasattr(home, method):
            setattr(by_instance, method, lambda f: f.flatten(1))
    for loss in (by_class, by_instance):
        found = loss([student], [teacher])[0] if name == "attention" else loss(student, teacher)
        assert relative_error(found, formula(student, teacher)) < 1e-12


def test_mmrazors_criterion_can_be_replaced():
    loss, student, teacher = mmrazor.FTLoss(loss_weight=3.0), maps(*FACTORS), maps(*FACTORS)
    assert type(loss.criterion) is nn.L1Loss
    loss.criterion = nn.MSELoss()
    assert relative_error(loss(student, teacher), 3 * F.mse_loss(unit(student), unit(teacher))) < 1e-12
    loss.forward_train = lambda s, t: (s - t).sum()
    assert relative_error(loss(student, teacher), 3 * (student - teacher).sum()) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_peers_factors_on_their_own(layout):
    x = maps(2, 4, 3, 5, layout=layout)
    for found in (zoo.FT().normalize(x), mmrazor.FTLoss().factor(x), official.FT(x)):
        assert relative_error(found, unit(x)) < 1e-12
    assert relative_error(repdistiller.FactorTransfer(p1=3).factor(x), attention_map(x, 3)) < 1e-12
    assert relative_error(repdistiller.Attention().at(x), attention_map(x, 2)) < 1e-12
    loss = repdistiller.FactorTransfer(p2=3)
    assert torch.equal(loss.factor_loss(x, 2 * x + 1), loss(x, 2 * x + 1))


def test_attention_compares_as_many_pairs_as_the_shorter_list_has():
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, 4, 4)
    attention = repdistiller.Attention()
    found = attention(iter([student, student]), [teacher])
    assert found == attention([student], [teacher])


MMRAZOR = {
    "__init__.py": "",
    "registry.py": """
class Registry:
    found = {}

    def register_module(self, force=False, module=None):
        if module.__name__ in self.found and not force:
            raise KeyError(f"{module.__name__} is already registered")
        self.found[module.__name__] = module


MODELS = Registry()
""",
    "models.py": """
from mmrazor.registry import MODELS

for name in ("FTLoss", "Paraphraser", "Translator", "CRDLoss"):
    MODELS.register_module(module=type(name, (), {}))
""",
}


def test_one_import_gives_mmrazors_names_to_our_classes(tmp_path, monkeypatch):
    """Though its models, which register their own without force, were not imported before."""
    (tmp_path / "mmrazor").mkdir()
    for name, content in MMRAZOR.items():
        (tmp_path / "mmrazor" / name).write_text(content)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmrazor", None)
        with pytest.raises(ImportError, match=r"mmrazor does not import .*ftfast\.compat\.mmrazor"):
            importlib.import_module("ftfast.compat.mmrazor.replace")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("ftfast.compat.mmrazor.replace")
        importlib.import_module("mmrazor.models")
        found = importlib.import_module("mmrazor.registry").MODELS.found
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mmrazor"]:
            del sys.modules[name]
        sys.modules.pop("ftfast.compat.mmrazor.replace", None)
    assert found["CRDLoss"].__module__ == "mmrazor.models"
    for cls in (mmrazor.FTLoss, mmrazor.Paraphraser, mmrazor.Translator):
        assert found[cls.__name__] is cls


def test_init_cfg_is_acted_upon_once_by_mmengine(monkeypatch):
    network = mmrazor.Translator(6, 4, init_cfg=[{"type": "Constant", "layer": "Conv2d", "val": 2.0}])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmengine.model", None)
        with pytest.raises(ImportError, match=r"init_cfg is .*Constant.*mmengine"):
            network.init_weights()
        mmrazor.Translator(6, 4).init_weights()  # asks for nothing
    module = types.ModuleType("mmengine.model")
    module.initialize = lambda given, configuration: given.encoder[0].weight.data.add_(configuration[0]["val"])
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.model", module)
    before = network.encoder[0].weight.detach().clone()
    network.init_weights()
    network.init_weights()
    torch.testing.assert_close(network.encoder[0].weight.detach(), before + 2)


def test_mmrazor_train_phase_gives_factors_without_a_graph_and_may_be_changed():
    network, x = mmrazor.Paraphraser(6, 4), torch.randn(2, 6, 5, 5)
    assert network(x).shape == x.shape
    assert network(x).requires_grad
    network.phase = "train"
    assert network(x).shape == (2, 4, 5, 5)
    assert not network(x).requires_grad


def test_zoo_definitions_have_the_prefix_of_data_parallel():
    network = zoo.define_paraphraser(6, 0.5, use_bn=True, cuda=False)
    keys = {key for key in network.state_dict() if key.endswith("weight")}
    assert keys == {f"module.{side}.{i}.weight" for side in ("encoder", "decoder") for i in (0, 1, 3, 4, 6, 7)}
    assert zoo.define_translator(6, 8, 0.5, cuda=False)(torch.randn(2, 6, 5, 5)).shape == (2, 4, 5, 5)


# --- Losses --------------------------------------------------------------------------------------------------------

# Ours, and theirs written out; by name.
FACTOR_LOSSES: dict[str, tuple[Loss, Loss]] = {
    "official": (official.factor_transfer_loss, lambda s, t: 500 * l1_of_directions(s, t.detach())),
    "official with beta": (
        lambda s, t: official.factor_transfer_loss(s, t, 200.0),
        lambda s, t: 200 * l1_of_directions(s, t.detach()),
    ),
    "official, FT alone": (
        lambda s, t: nn.L1Loss()(official.FT(s), official.FT(t.detach())),
        lambda s, t: l1_of_directions(s, t.detach()),
    ),
    "zoo": (zoo.FT(), l1_of_directions),
    "mmrazor": (mmrazor.FTLoss(), l1_of_directions),
    "mmrazor with a weight": (mmrazor.FTLoss(loss_weight=3), lambda s, t: 3 * l1_of_directions(s, t)),
    "mmrazor forward_train": (mmrazor.FTLoss(3.0).forward_train, l1_of_directions),
}
MAP_LOSSES: dict[str, tuple[Loss, Loss]] = {
    f"repdistiller {p1}, {p2}": (
        repdistiller.FactorTransfer(p1, p2),
        lambda s, t, p1=p1, p2=p2: attention_formula(s, t, p1, p2),
    )
    for p1 in (1, 2, 3)
    for p2 in (1, 2, 3)
} | {
    "attention": (lambda s, t: repdistiller.Attention()([s], [t])[0], lambda s, t: attention_formula(s, t, 2, 2)),
    "attention, 4": (lambda s, t: repdistiller.Attention(4)([s], [t])[0], lambda s, t: attention_formula(s, t, 4, 2)),
}
LOSSES = FACTOR_LOSSES | MAP_LOSSES


def value_and_gradient(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(student, teacher)
    assert value.dim() == 0
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_peers_formula_in_double(name):
    ours, theirs = LOSSES[name]
    student, teacher = maps(*FACTORS), maps(*FACTORS)
    value, gradient = value_and_gradient(ours, student, teacher)
    expected_value, expected_gradient = value_and_gradient(theirs, student, teacher)
    assert value.dtype == torch.float64
    assert relative_error(value, expected_value) < 1e-12
    assert relative_error(gradient, expected_gradient) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_right_in_any_layout_and_dtype(name, dtype, layout):
    """channels_last breaks the peers' ``view``; in 16 bits theirs round every step."""
    ours, theirs = LOSSES[name]
    student, teacher = (maps(*FACTORS, dtype=dtype, layout=layout) for _ in range(2))
    value, gradient = value_and_gradient(ours, student, teacher)
    expected_value, expected_gradient = value_and_gradient(theirs, student.double(), teacher.double())
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert relative_error(value, expected_value) < 1e-5
    assert relative_error(gradient, expected_gradient) < max(torch.finfo(dtype).eps, 1e-4)


def test_channels_last_breaks_the_peers_view():
    """What the drop-ins spare: should torch ever take it, this says so."""
    factor = maps(*FACTORS, layout="channels_last")
    with pytest.raises(RuntimeError, match="view"):
        factor.view(factor.shape[0], -1)
    assert torch.equal(official.FT(factor), unit(factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_zero_sample_is_finite(name, dtype):
    """The peers' normalisation gives nan for it in float16, where 1e-12 is 0."""
    student, teacher = maps(*FACTORS, dtype=dtype), maps(*FACTORS, dtype=dtype)
    student[1] = teacher[2] = 0
    value, gradient = value_and_gradient(LOSSES[name][0], student, teacher)
    assert relative_error(value, LOSSES[name][1](student.double(), teacher.double())) < 1e-5
    assert gradient[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    ours, theirs = LOSSES[name]
    student, teacher = maps(*FACTORS, dtype=torch.float32), maps(*FACTORS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(ours, student, teacher)
    expected_value, expected_gradient = value_and_gradient(theirs, student.double(), teacher.double())
    assert value.dtype == gradient.dtype == torch.float32
    assert relative_error(value, expected_value) < 1e-5
    assert relative_error(gradient, expected_gradient) < 1e-4


@pytest.mark.parametrize("name", FACTOR_LOSSES)
def test_large_float16_factors_are_right(name):
    """The peers' norm overflows float16, and their loss is then silently 0."""
    ours, theirs = FACTOR_LOSSES[name]
    student, teacher = (maps(2, 64, 8, 8).mul(3000).half() for _ in range(2))
    assert relative_error(ours(student, teacher), theirs(student.double(), teacher.double())) < 1e-5


@pytest.mark.parametrize("name", ["zoo", "mmrazor", "repdistiller 2, 1", "attention"])
def test_a_teacher_that_requires_a_gradient_gets_the_peers(name):
    ours, theirs = LOSSES[name]
    student, teacher = maps(*FACTORS), maps(*FACTORS)
    _, gradient = value_and_gradient(lambda t, s: ours(s, t), teacher, student)
    _, expected = value_and_gradient(lambda t, s: theirs(s, t), teacher, student)
    assert relative_error(gradient, expected) < 1e-10


def test_the_official_loss_detaches_the_teacher():
    student, teacher = maps(*FACTORS).requires_grad_(), maps(*FACTORS).requires_grad_()
    official.factor_transfer_loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", MAP_LOSSES)
@pytest.mark.parametrize(("student_size", "teacher_size"), [(6, 3), (3, 6), (7, 4)])
def test_the_larger_map_is_pooled_to_the_smaller_and_channels_may_differ(name, student_size, teacher_size):
    ours, theirs = MAP_LOSSES[name]
    student, teacher = maps(3, 5, student_size, student_size), maps(3, 8, teacher_size, teacher_size)
    value, gradient = value_and_gradient(ours, student, teacher)
    expected_value, expected_gradient = value_and_gradient(theirs, student, teacher)
    assert relative_error(value, expected_value) < 1e-12
    assert relative_error(gradient, expected_gradient) < 1e-10


def test_attention_takes_lists_and_gives_a_list():
    students, teachers = [maps(2, 3, 8, 8), maps(2, 6, 4, 4)], [maps(2, 5, 8, 8), maps(2, 7, 2, 2)]
    found = repdistiller.Attention()(students, teachers)
    assert isinstance(found, list)
    for value, student, teacher in zip(found, students, teachers, strict=True):
        assert relative_error(value, attention_formula(student, teacher, 2, 2)) < 1e-12


def test_a_step_of_the_official_script_is_the_peers():
    """Factors, beta, labels and two optimizers, as the authors' training script has them."""
    torch.manual_seed(1)
    features, labels = maps(4, 6, 5, 5), torch.randint(0, 6, (4,))
    teacher_features = maps(4, 6, 5, 5)
    ours, theirs = loaded("official translator")
    paraphraser, their_paraphraser = loaded("official paraphraser")
    ours, theirs, paraphraser, their_paraphraser = (
        network.double() for network in (ours, theirs, paraphraser, their_paraphraser)
    )
    found = official.factor_transfer_loss(ours(features), paraphraser(teacher_features, 1), 500)
    factor = through(their_paraphraser, ENCODER, teacher_features)
    expected = 500 * nn.L1Loss()(unit(through(theirs, ENCODER, features)), unit(factor.detach()))
    for loss, network in ((found, ours), (expected, theirs)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        (loss + F.cross_entropy(features.mean((2, 3)), labels)).backward()
        optimizer.step()
    assert relative_error(found.detach(), expected.detach()) < 1e-12
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(mine.detach(), other.detach()) < 1e-12


def test_the_authors_trained_paraphraser_loads_as_it_is():
    path = Path(os.environ.get("FTFAST_OFFICIAL_PARAPHRASER", ""))
    if not path.is_file():
        pytest.skip("FTFAST_OFFICIAL_PARAPHRASER names no file")
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = official.Paraphraser(64, round(64 * 0.5))
    network.load_state_dict(state["state_dict"], strict=True)
    assert network(torch.rand(2, 64, 8, 8), 1).shape == (2, 32, 8, 8)


# --- What they do not take ------------------------------------------------------------------------------------------

ONE_SENTENCE: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "mode": (ValueError, "mode is 3; it takes 0", lambda: official.Paraphraser(6, 4)(torch.zeros(1, 6, 3, 3), 3)),
    "planes": (ValueError, "planes is 0; it takes a positive", lambda: official.Translator(6, 0)),
    "planes of 2.5": (ValueError, "planes is 2.5; it takes", lambda: official.Paraphraser(5, 2.5)),
    "FT of a list": (TypeError, "factor is a list; it takes a floating-point tensor", lambda: official.FT([1.0])),
    "FT of a row": (ValueError, r"factor has shape \(3,\); it takes", lambda: official.FT(torch.ones(3))),
    "factors' sizes": (
        ValueError,
        r"student_factor has shape \(2, 4, 3, 3\) and teacher_factor \(2, 4, 3, 2\)",
        lambda: official.factor_transfer_loss(torch.ones(2, 4, 3, 3), torch.ones(2, 4, 3, 2)),
    ),
    "a factor of numpy": (
        TypeError,
        "teacher_factor is a ndarray",
        lambda: official.factor_transfer_loss(torch.ones(2, 4), torch.ones(2, 4).numpy()),
    ),
    "beta": (
        TypeError,
        "weight is a str; it takes",
        lambda: official.factor_transfer_loss(torch.ones(2, 4), torch.ones(2, 4), "500"),
    ),
    "k": (ValueError, "k is 0; it takes a positive number", lambda: zoo.translator(6, 8, 0)),
    "k too small": (ValueError, r"k is 0.1, which leaves int\(6 \* k\) = 0", lambda: zoo.paraphraser(6, 0.1)),
    "in_channels_t": (ValueError, "in_channels_t is '64'; it takes", lambda: zoo.translator(6, "64", 0.5)),
    "phase": (ValueError, "phase is 'test'; it takes", lambda: mmrazor.Paraphraser(6, 4, "test")),
    "loss_weight": (TypeError, "weight is a str; it takes a float", lambda: mmrazor.FTLoss("1")),
    "t_shape": (ValueError, r"t_shape is 64; it takes the shape \[N", lambda: repdistiller.Paraphraser(64)),
    "s_shape": (
        ValueError,
        r"s_shape\[1\] is 0; it takes",
        lambda: repdistiller.Translator((2, 0, 4, 4), (2, 4, 4, 4)),
    ),
    "p2": (
        TypeError,
        "p2 is 'L1'; it takes a number",
        lambda: repdistiller.FactorTransfer(p2="L1"),
    ),
    "maps of unlike width": (
        ValueError,
        r"student_features has maps of \(4, 6\) and teacher_features of \(4, 5\)",
        lambda: repdistiller.FactorTransfer()(torch.ones(1, 2, 4, 6), torch.ones(1, 2, 4, 5)),
    ),
    "maps of other batches": (
        ValueError,
        "student_features has 2 samples .* teacher_features 3 samples",
        lambda: repdistiller.FactorTransfer()(torch.ones(2, 2, 4, 4), torch.ones(3, 2, 4, 4)),
    ),
    "no map": (
        ValueError,
        r"teacher_features has shape \(2, 8\); it takes a map",
        lambda: repdistiller.Attention()([torch.ones(2, 2, 4, 4)], [torch.ones(2, 8)]),
    ),
    "a map of integers": (
        TypeError,
        "student_features is a tensor of torch.int64; it takes",
        lambda: repdistiller.FactorTransfer()(torch.ones(2, 2, 4, 4, dtype=torch.int64), torch.ones(2, 2, 4, 4)),
    ),
    "keys": (
        RuntimeError,
        r"has encoder.0.weight, .* that ftfast.compat.official.Paraphraser does not take, and lacks conv0.* 8 more",
        lambda: official.Paraphraser(6, 4).load_state_dict(ftfast.Paraphraser(6).state_dict()),
    ),
    "a prefix": (
        RuntimeError,
        "has module.encoder.0.weight, .* strip a prefix",
        lambda: zoo.translator(6, 8, 0.5).load_state_dict(zoo.define_translator(6, 8, 0.5, cuda=False).state_dict()),
    ),
}


@pytest.mark.parametrize("name", ONE_SENTENCE)
def test_what_they_do_not_take_is_said_in_one_sentence(name):
    error, message, call = ONE_SENTENCE[name]
    with pytest.raises(error, match=message) as raised:
        call()
    said = str(raised.value)
    assert "\n" not in said
    assert said.endswith(".")


def test_strict_false_still_loads_what_fits():
    network = official.Paraphraser(6, 4)
    result = network.load_state_dict({"conv0.bias": torch.ones(6), "other": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["other"]
    assert network.conv0.bias.eq(1).all()


def test_strict_false_says_where_nothing_fits(caplog):
    """The official script loads so, after it has silenced all warnings."""
    network, theirs = official.Paraphraser(6, 4), {"module.conv0.bias": torch.ones(6)}
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "ftfast"):
        warnings.simplefilter("ignore")
        network.load_state_dict(theirs, strict=False)
        network.load_state_dict({"conv0.bias": torch.ones(6), "other": torch.ones(1)}, strict=False)
    (said,) = (record.message for record in caplog.records)
    assert re.match(r"nothing was loaded.* has module\.conv0\.bias, and .*official.Paraphraser has", said)


# --- How fast ------------------------------------------------------------------------------------------------------


def test_the_bench_says_how_much_faster_and_how_much_more_than_the_bare_call():
    pytest.importorskip("rich")
    from bench.harness.records import Row, Timing
    from bench.kernels import compat

    def row(group: str, candidate: str, milliseconds: float | None, **details: object) -> Row:
        timing = None if milliseconds is None else Timing(milliseconds, milliseconds, milliseconds, 1, [milliseconds])
        return Row(compat.STEM, group, candidate, "forward+backward", timing, reason="", details=details)

    rows = [
        row("a", "peer", 12.0, peer="peer"),
        row("a", compat.OURS, 1.5, peer="peer", aimed=5),
        row("b", compat.OURS, 2.0, peer="absent"),
        row("c", "ft_loss", 0.020, bare="ft_loss"),
        row("c", "zoo.FT", 0.023, bare="ft_loss"),
        row("c", "mmrazor.FTLoss", None, bare="ft_loss"),
    ]
    assert [(each.name, each.speedup) for each in compat.compared(rows)] == [("a", 8.0), ("b", None)]
    found = [(call, each.candidate, more) for call, each, more in compat.added(rows)]
    assert found[1] == ("ft_loss", "zoo.FT", pytest.approx(3.0))
    assert found[2] == ("ft_loss", "mmrazor.FTLoss", None)
    assert sum(table.row_count for table in compat.show(rows)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["official", "zoo", "mmrazor"])
def test_a_loss_adds_less_than_30_microseconds_to_the_bare_call(name):
    student, teacher = (maps(2, 2, 2, 2, dtype=torch.float32) for _ in range(2))

    def fastest(loss: Loss) -> float:
        elapsed = []
        for _ in range(2000):
            begin = time.perf_counter_ns()
            loss(student, teacher)
            elapsed.append(time.perf_counter_ns() - begin)
        return min(elapsed) / 1e3

    assert fastest(FACTOR_LOSSES[name][0]) - fastest(ftfast.ft_loss) < 30
