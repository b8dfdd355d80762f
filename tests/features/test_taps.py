"""Several layers in one call equal single ones; factors of sequences and of volumes equal the float64 reference."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import ftfast
from ftfast import reference
from ftfast.head import FactorTransfer

MAPS = {"low": (12, 6, 8), "high": (8, 10, 4)}  # the student's channels, the teacher's, the factor's


class Backbone(nn.Module):
    """Three stages and a classifier; ``tail`` runs twice."""

    def __init__(self, channels=8):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(a, channels, 3, 2, 1) for a in (3, channels, channels))
        self.tail = nn.ReLU()
        self.unused = nn.ReLU()
        self.head = nn.Linear(channels, 4)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.head(self.tail(self.tail(x).mean((2, 3))))


@pytest.fixture
def model():
    return Backbone().eval()


def single(model, layer, x):
    return ftfast.FeatureTap(model, layer)(x)[1]


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("layers", [["stages.2", "stages.0"], {"a": "stages.0", "b": "head"}, ["tail"]], ids=str)
def test_taps_give_what_single_taps_give(model, layers, features_only):
    x = torch.randn(2, 3, 16, 16)
    taps = ftfast.FeatureTaps(model, layers, features_only=features_only)
    found = taps(x)
    features = found if features_only else found[1]
    named = layers if isinstance(layers, dict) else {layer: layer for layer in layers}
    assert list(features) == list(named)
    for name, layer in named.items():
        assert torch.equal(features[name], single(model, layer, x))
    if not features_only:
        assert torch.equal(found[0], model(x))


def test_the_model_is_shared_and_nothing_past_the_last_layer_runs(model):
    taps = ftfast.FeatureTaps(model, ["stages.0", "stages.1"], features_only=True)
    assert taps.is_cut
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in taps.parameters()} < shared


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
)
def test_a_copy_taps_its_own_model(model, make_copy):
    x = torch.randn(1, 3, 16, 16)
    taps = ftfast.FeatureTaps(model, ["stages.0"])
    copied = make_copy(taps)
    with torch.no_grad():
        copied.model.stages[0].weight.zero_()
    assert not torch.equal(copied(x)[1]["stages.0"], taps(x)[1]["stages.0"])


def test_taps_compile_whole(model):
    taps = ftfast.FeatureTaps(model, ["stages.0", "stages.2"])
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(taps, backend="eager", fullgraph=True)
    for got, expected in zip(compiled(x)[1].values(), taps(x)[1].values(), strict=True):
        torch.testing.assert_close(got, expected)


def test_wrong_layers_are_named(model):
    with pytest.raises(ValueError, match=r"layer is 'stage.2'.*nearest are stages.2, stages.1, stages.0"):
        ftfast.FeatureTaps(model, ["stages.0", "stage.2"])
    with pytest.raises(ValueError, match=r"layer is 'zzz'.*top-level layers are stages, tail"):
        ftfast.FeatureTap(model, "zzz")
    for layers in ([], ["head", "head"], {"a": "head", "b": "head"}):
        with pytest.raises(ValueError, match="at least one layer, and each of them once"):
            ftfast.FeatureTaps(model, layers)
    with pytest.raises(ValueError, match="FeatureTap"):
        ftfast.FeatureTaps(model, "head")
    taps = ftfast.FeatureTaps(model, ["head", "unused"])
    with pytest.raises(RuntimeError, match="layer 'unused' did not run"):
        taps(torch.randn(1, 3, 16, 16))
    assert not taps._calls


def make_head(student, teacher, factor, **options):
    return FactorTransfer(
        ftfast.Paraphraser(teacher, factor_channels=factor), ftfast.Translator(student, factor), **options
    ).double()


def make_heads(**options):
    return {
        name: make_head(*sizes, weight=weight, **options)
        for (name, sizes), weight in zip(MAPS.items(), (2.0, 0.5), strict=True)
    }


def make_maps(side):
    return {
        name: torch.randn(3, sizes[side], 5, 4, dtype=torch.float64, requires_grad=side == 0)
        for name, sizes in MAPS.items()
    }


def reference_sum(heads, student, teacher, **options):
    return sum(
        reference.factor_transfer(
            student[name], teacher[name], head.paraphraser, head.translator, weight=head.loss.weight, **options
        )
        for name, head in heads.items()
    )


@pytest.mark.parametrize("as_sequence", [False, True], ids=["mapping", "sequence"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_several_heads_add_up(reduction, as_sequence):
    heads, student, teacher = make_heads(reduction=reduction), make_maps(0), make_maps(1)
    expected = reference_sum(heads, student, teacher, reduction=reduction)
    both = ftfast.FactorTransfers(list(heads.values()) if as_sequence else heads)
    given = (list(student.values()), tuple(teacher.values())) if as_sequence else (student, teacher)
    total, losses = both(*given), both.losses(*given)
    assert (total - expected).norm() <= 1e-12 * expected.norm()
    assert list(losses) == (["0", "1"] if as_sequence else list(heads))
    assert torch.equal(total, sum(losses.values()))
    inputs = [*student.values(), *(p for p in both.parameters() if p.requires_grad)]
    for got, right in zip(
        torch.autograd.grad(total.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        assert (got - right).norm() <= 1e-11 * right.norm()


def test_known_factors_take_the_place_of_features():
    heads, student, teacher = make_heads(), make_maps(0), make_maps(1)
    both = ftfast.FactorTransfers(heads)
    factors = {name: head.paraphraser.encode(teacher[name]) for name, head in heads.items()}
    assert torch.allclose(both(student, teacher_factors=factors), both(student, teacher), rtol=1e-12, atol=0)


def test_the_paraphrasers_stay_frozen_and_the_keys_say_which_head():
    both = ftfast.FactorTransfers(make_heads()).train()
    assert not any(head.paraphraser.training for head in both.heads)
    trained = {name for name, parameter in both.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in both.named_parameters() if ".translator." in name}
    assert {key.split(".")[1] for key in both.state_dict()} == {"0", "1"}
    other = ftfast.FactorTransfers(make_heads())
    other.load_state_dict(both.state_dict(), strict=True)


def test_layers_with_dots_in_their_names(model):
    heads = {"stages.1": make_head(8, 8, 4), "stages.2": make_head(8, 8, 4)}
    taps = ftfast.FeatureTaps(model.double(), list(heads))
    _, features = taps(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    ftfast.FactorTransfers(heads)(features, {name: it.detach() for name, it in features.items()}).backward()


def test_names_and_sizes_that_do_not_match_are_listed():
    heads, student, teacher = make_heads(), make_maps(0), make_maps(1)
    both = ftfast.FactorTransfers(heads)
    with pytest.raises(ValueError, match="student_features has low and the heads are low, high"):
        both({"low": student["low"]}, teacher)
    with pytest.raises(ValueError, match=r"teacher_features has 1 maps and there are 2 heads \(low, high\)"):
        both(student, [teacher["low"]])
    with pytest.raises(TypeError, match="student_features is a tensor"):
        both(student["low"], teacher)
    with pytest.raises(ValueError, match="exactly one of teacher_features and teacher_factors; it got neither"):
        both(student)
    with pytest.raises(ValueError, match="head 'high': teacher_features has 6 channels and the paraphraser takes 10"):
        both(student, teacher | {"high": teacher["low"]})


def test_what_is_no_set_of_heads_is_refused():
    head = make_head(3, 4, 2)
    with pytest.raises(ValueError, match="heads is empty"):
        ftfast.FactorTransfers({})
    with pytest.raises(ValueError, match="one head under two of a, b"):
        ftfast.FactorTransfers({"a": head, "b": head})
    with pytest.raises(ValueError, match="reductions"):
        ftfast.FactorTransfers([head, make_head(3, 4, 2, reduction="sum")])
    with pytest.raises(TypeError, match=r"heads\['0'\] is a Translator"):
        ftfast.FactorTransfers([head.translator])


class TokenParaphraser(nn.Module):
    """Tokens ``[N, L, C]`` to factors, without convolutions."""

    def __init__(self, channels, factor_channels):
        super().__init__()
        self.projection = nn.Linear(channels, factor_channels)

    def encode(self, tokens):
        return self.projection(tokens)


def test_a_head_of_ones_own_modules_takes_tokens():
    head = FactorTransfer(TokenParaphraser(12, 5), nn.Linear(8, 5)).double()
    student, teacher = (torch.randn(2, 9, c, dtype=torch.float64) for c in (8, 12))
    expected = reference.ft_loss(head.translator(student), head.paraphraser.encode(teacher))
    assert torch.allclose(head(student, teacher), expected, rtol=1e-12, atol=0)


SHAPES = {"tokens": (3, 17, 24), "signal": (3, 6, 50), "video": (2, 6, 4, 5, 3)}


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("kind", "dtype"), list(itertools.product(SHAPES, [torch.float64, torch.float32])), ids=str)
def test_sequences_and_volumes_in_any_memory_order(backend, device, kind, dtype, p):
    shape = SHAPES[kind]
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    orders = list(itertools.permutations(range(len(shape))))
    for order in orders[:: len(orders) // 6]:
        memory = [shape[d] for d in order]
        undo = [order.index(d) for d in range(len(shape))]
        student, teacher = (torch.randn(memory, dtype=dtype, device=device).permute(undo) for _ in range(2))
        for other in (teacher, teacher.contiguous()):
            results = []
            for loss_function, cast in ((ftfast.ft_loss, dtype), (reference.ft_loss, torch.float64)):
                given = student.to(cast).detach().requires_grad_()
                options = {"backend": backend} if loss_function is ftfast.ft_loss else {}
                loss = loss_function(given, other.to(cast), p=p, weight=100.0, **options)
                results.append((loss.detach(), *torch.autograd.grad(loss, given)))
            for got, right in zip(*results, strict=True):
                assert (got.double() - right).norm() <= bound * right.norm()
