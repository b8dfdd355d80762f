"""Public names and signatures: a change here breaks somebody's training code."""

import inspect
from typing import get_args

import pytest
import torch

import ftfast
from ftfast import reference

OPTIONS = {"p": 1, "reduction": "mean", "eps": 1e-12, "weight": 1.0}
DISTILL = {
    "method": "ft",
    "epochs": 20,
    "beta": None,
    "weights": None,
    "rate": 0.5,
    "paraphraser": None,
    "resize_features": False,
    "optimizer": "sgd",
    "learning_rate": None,
    "momentum": 0.9,
    "weight_decay": None,
    "warm_up": 0.0,
    "schedule": "cosine",
    "milestones": (),
    "gamma": 0.1,
    "clip_gradient": None,
    "ema": None,
    "graph": True,
    "device": None,
    "dtype": None,
    "output": None,
    "resume": False,
    "checkpoint_seconds": 30.0,
    "track": None,
    "seed": 0,
    "progress": True,
}
SIGNATURES = {
    ftfast.FTLoss: {**OPTIONS, "backend": "auto"},
    ftfast.ft_loss: {"student_factor": ..., "teacher_factor": ..., **OPTIONS, "backend": "auto"},
    ftfast.FTLoss.forward: {"self": ..., "student_factor": ..., "teacher_factor": ...},
    ftfast.Paraphraser: {
        "in_channels": ...,
        "rate": 0.5,
        "factor_channels": None,
        "norm": None,
        "negative_slope": 0.1,
    },
    ftfast.Translator: {"in_channels": ..., "factor_channels": ..., "norm": None, "negative_slope": 0.1},
    ftfast.FactorTransfer: {"paraphraser": ..., "translator": ..., **OPTIONS, "backend": "auto"},
    ftfast.FactorTransfer.forward: {
        "self": ...,
        "student_features": ...,
        "teacher_features": None,
        "teacher_factor": None,
    },
    ftfast.FactorTransfer.hold_weights: {"self": ...},
    ftfast.FactorTransfer.weights_changed: {"self": ...},
    ftfast.FeatureTap.close: {"self": ...},
    ftfast.train_paraphraser: {
        "teacher": ...,
        "loader": None,
        "layer": None,
        "rate": 0.5,
        "norm": None,
        "paraphraser": None,
        "steps": None,
        "epochs": None,
        "batch_size": 128,
        "learning_rate": 3e-3,
        "loss": "l1",
        "held_out": None,
        "strict": True,
        "seed": 0,
        "device": None,
        "dtype": None,
        "progress": True,
    },
    ftfast.distill: {
        **{"teacher": ..., "student": ..., "train": ..., "val": None, "teacher_layer": ..., "student_layer": ...},
        **DISTILL,
    },
    ftfast.diagnose_paraphraser: {"paraphraser": ..., "features": ...},
    ftfast.write_factors: {
        **{"path": ..., "teacher": ..., "paraphraser": ..., "loader": ...},
        **{"dtype": "int8", "logits": False},
    },
    ftfast.FactorStore: {"path": ..., "images": None, "view": 0},
    ftfast.FrozenTeacher: {
        "model": ...,
        "layer": ...,
        "dtype": torch.float32,
        "classifier": False,
        "example": None,
        "execution": "eager",
        "limit": None,
    },
    ftfast.FeatureTap: {"model": ..., "layer": ..., "features_only": False},
    ftfast.FeatureTaps: {"model": ..., "layers": ..., "features_only": False},
    ftfast.FactorTransfers: {"heads": ...},
    ftfast.convert_state_dict: {"state_dict": ..., "to": "ftfast", "source": None, "part": "", "prefix": ""},
    ftfast.doctor: {"student": ..., "teacher": ..., "loss": ..., "batch": ..., "optimizer": None},
    ftfast.explain: {"student_factor": ..., "teacher_factor": ...},
    reference.ft_loss: {"student_factor": ..., "teacher_factor": ..., **OPTIONS},
    reference.factor_transfer: {
        "student_features": ...,
        "teacher_features": ...,
        "paraphraser": ...,
        "translator": ...,
        **OPTIONS,
    },
}
KEYWORD_ONLY = {
    ftfast.distill: ["teacher_layer", "student_layer", *DISTILL],
    ftfast.ft_loss: [*OPTIONS, "backend"],
    ftfast.Paraphraser: ["factor_channels", "norm", "negative_slope"],
    ftfast.Translator: ["norm", "negative_slope"],
    ftfast.FactorTransfer: [*OPTIONS, "backend"],
    ftfast.FactorTransfer.forward: ["teacher_factor"],
    ftfast.train_paraphraser: [
        *("rate", "norm", "paraphraser", "steps", "epochs", "batch_size", "learning_rate", "loss", "held_out"),
        *("strict", "seed", "device", "dtype", "progress"),
    ],
    ftfast.write_factors: ["dtype", "logits"],
    ftfast.FactorStore: ["view"],
    ftfast.FrozenTeacher: ["dtype", "classifier", "example", "execution", "limit"],
    ftfast.FeatureTap: ["features_only"],
    ftfast.FeatureTaps: ["features_only"],
    ftfast.convert_state_dict: ["source", "part", "prefix"],
    reference.ft_loss: list(OPTIONS),
    reference.factor_transfer: list(OPTIONS),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda it: it.__qualname__)
def test_signature(function):
    parameters = inspect.signature(function).parameters
    found = {name: ... if it.default is inspect.Parameter.empty else it.default for name, it in parameters.items()}
    assert found == SIGNATURES[function]
    keyword_only = [name for name, it in parameters.items() if it.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == KEYWORD_ONLY.get(function, [])


def test_names():
    expected = {
        "Backend",
        "Distilled",
        "FTLoss",
        "FactorStore",
        "FactorTransfer",
        "FactorTransfers",
        "FeatureTap",
        "FeatureTaps",
        "FrozenTeacher",
        "Paraphraser",
        "Reduction",
        "Translator",
        "capture_step",
        "convert_state_dict",
        "diagnose_paraphraser",
        "distill",
        "doctor",
        "explain",
        "ft_loss",
        "reference",
        "train_paraphraser",
        "write_factors",
    }
    assert set(ftfast.__all__) == expected | {"__version__"} == set(dir(ftfast))
    for name in ftfast.__all__:
        assert getattr(ftfast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'loss_of_factors'"):
        _ = ftfast.loss_of_factors


def test_literals_are_what_the_loss_takes():
    factor = torch.ones(2, 3)
    for name in get_args(ftfast.Reduction):
        ftfast.ft_loss(factor, factor, reduction=name)
    for option, literal in (("reduction", ftfast.Reduction), ("backend", ftfast.Backend)):
        with pytest.raises(ValueError, match=", ".join(get_args(literal)[-1:])):
            ftfast.ft_loss(factor, factor, **{option: "other"})


@pytest.mark.parametrize("name", sorted(set(ftfast.__all__) - {"__version__", "Backend", "Reduction"}))
def test_every_public_name_is_documented_and_typed(name):
    thing = getattr(ftfast, name)
    assert thing.__doc__
    assert len(thing.__doc__) > 40
    if inspect.isfunction(thing):
        hints = inspect.get_annotations(thing)
        assert set(hints) == {*inspect.signature(thing).parameters, "return"}
