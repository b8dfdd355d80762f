"""The ablation's controls: other losses and other factors with Factor Transfer's translator."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ftfast import Paraphraser
from ftfast.distillation.models.registry import Outputs
from ftfast.distillation.phases.report import write_report
from ftfast.distillation.run import run
from ftfast.distillation.training.controls import CONTROLS, Features
from ftfast.distillation.training.methods import METHODS
from ftfast.distillation.training.paraphrasing.reconstruction import fit
from ftfast.distillation.training.terms import Pair, Weights
from ftfast.errors import SettingsError
from tests.runs.test_distill_run import SMALL_FIXED

OURS = [name for name in METHODS if name.startswith("ft-")]
BETA = 70.0


def small_pair(channels: int = 12, rate: float = 0.5) -> Pair:
    torch.manual_seed(0)
    controls = {name: control.build(channels, rate).double() for name, control in CONTROLS.items()}
    return Pair(8, channels, Paraphraser(channels, rate).double(), Weights(beta=BETA), controls, backend="reference")


def outputs(channels: int, height: int = 4, width: int = 4, images: int = 6) -> Outputs:
    double = torch.float64
    return Outputs(
        torch.randn(images, 5, dtype=double), torch.randn(images, channels, height, width, dtype=double).relu()
    )


def by_hand(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The factors' term of factors ``[N, ...]``, every step spelled out."""
    size = student[0].numel()
    unit = [factor.flatten(1) / factor.flatten(1).norm(dim=1, keepdim=True) for factor in (student, teacher)]
    of_random = math.sqrt(2 / math.pi) * math.sqrt(2 / size)  # what p=1 costs where both directions are random
    if name == "ft-p2":
        return BETA * of_random / math.sqrt(2) * (unit[0] - unit[1]).square().sum(1).sqrt().mean()
    if name == "ft-unnormalised":
        return BETA * of_random / (math.sqrt(2) * math.sqrt(2 / math.pi)) * (student - teacher).abs().mean()
    return BETA * (unit[0] - unit[1]).abs().mean()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("sides", [(4, 4), (5, 7), (1, 1)])
def test_a_control_has_its_formula_and_teaches_the_translator_alone(name: str, sides: tuple[int, int]) -> None:
    pair, method = small_pair(), METHODS[name]
    made = method.between(pair)
    assert made is not None
    module, place, translator = made
    module.double()
    student, teacher = outputs(8, *sides), outputs(12, *sides)
    terms = method.terms(student, teacher, torch.arange(6) % 5, module, pair.weights)
    encoder = pair.paraphraser if method.control is None else pair.controls[method.control]
    made, wanted = translator(student.features), encoder.encode(teacher.features)
    assert made.shape == wanted.shape
    torch.testing.assert_close(terms["factors"].double(), by_hand(name, made, wanted), rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["labels"].double(), F.cross_entropy(student.logits, torch.arange(6) % 5))
    sum(terms.values()).backward()
    assert place == "translator"
    assert all(parameter.grad is not None for parameter in translator.parameters())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("name", ["ft", *(name for name in OURS if METHODS[name].control is None)])
def test_one_beta_suits_every_distance(name: str) -> None:
    """Random factors cost the same, whatever the distance."""
    torch.manual_seed(1)
    factors = Outputs(torch.randn(6, 5), torch.randn(6, 32, 8, 8)), Outputs(torch.randn(6, 5), torch.randn(6, 32, 8, 8))
    method = METHODS[name]
    made = method.between(Pair(32, 32, Features(32, 1.0), Weights(beta=1.0)))  # type: ignore[arg-type]
    assert made is not None
    made.module.translator = Features(32, 1.0)
    term = method.terms(*factors, torch.arange(6) % 5, made.module, Weights(beta=1.0))["factors"]
    assert float(term.detach()) == pytest.approx(2 / math.sqrt(math.pi * 32 * 8 * 8), rel=0.03)


def test_the_regularised_one_has_smaller_factors() -> None:
    features = torch.randn(64, 6, 4, 4).relu()
    sizes = []
    for penalty in (0.0, CONTROLS["regularised"].penalty):
        torch.manual_seed(2)
        paraphraser = Paraphraser(6, 1.0)
        optimiser = torch.optim.Adam(paraphraser.parameters())
        cast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
        fit(paraphraser, [features] * 25, optimiser, lambda step: 1e-2, "l1", cast, penalty=penalty)
        sizes.append(float(paraphraser.encode(features).detach().abs().mean()))
    assert sizes[1] < 0.7 * sizes[0]


def test_a_run_of_every_control_says_what_each_is_worth_and_is_read_back(tmp_path: Path) -> None:
    settings = replace(SMALL_FIXED, methods=("none", *OURS), seeds=1, student_epochs=1, teacher_epochs=1)
    results = run(settings, tmp_path / "run")
    write_report(tmp_path / "run", results)
    assert set(results["methods"]) == {"none", *OURS}
    assert set(results["controls"]) == set(CONTROLS)
    assert results["controls"]["features"]["explained_variance"] == 1
    learned, drawn = (results["controls"][name]["explained_variance"] for name in ("regularised", "untrained"))
    assert learned > drawn
    report = (tmp_path / "run" / "report.md").read_text()
    assert all(f"| {name} |" in report for name in (*OURS, *CONTROLS))
    again = run(settings, tmp_path / "run", resume=True)
    assert again["controls"] == results["controls"]
    assert again["methods"] == results["methods"]


@pytest.mark.parametrize("given", [{"data": "images", "paraphraser_epochs": 1}, {"store": "somewhere"}])
def test_a_control_that_cannot_be_had_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="methods has ft-autoencoder"):
        replace(SMALL_FIXED, methods=("none", "ft-autoencoder"), **given)  # type: ignore[arg-type]
