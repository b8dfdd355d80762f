"""Runs over paraphrase rates: one teacher, pairs of students, one table."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftfast.cli import main
from ftfast.commands.rates import run_rates, settings_of_rates, write_rates
from ftfast.distillation.runtime import checkpoint
from ftfast.errors import SettingsError
from tests.runs.test_distill_run import SMALL_FIXED, what_counts

TINY = replace(SMALL_FIXED, methods=("none", "ft"), student_epochs=1)
RATES = (0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("rates") / "run"
    rates = run_rates(TINY, RATES, output)
    write_rates(output, rates)
    return output, rates


def test_every_rate_has_factors_of_its_own_and_one_teacher(whole: tuple[Path, dict[str, Any]]) -> None:
    output, rates = whole
    assert [row["factor_channels"] for row in rates["rates"]] == [round(16 * rate) for rate in RATES]
    teachers = [checkpoint.load(output / row["folder"] / "teacher").tensors for row in rates["rates"]]
    assert all((teachers[0][name] == tensor).all() for each in teachers for name, tensor in each.items())
    assert not (output / "rate-1" / "students" / "none").exists()


def test_gains_are_those_of_the_same_seed(whole: tuple[Path, dict[str, Any]]) -> None:
    _, rates = whole
    none, first = rates["none"]["accuracies"], rates["rates"][0]["methods"]["ft"]["accuracies"]
    assert rates["rates"][0]["methods"]["ft"]["gain_to_first_rate"] is None
    for row in rates["rates"]:
        ft = row["methods"]["ft"]
        assert ft["gain"]["mean"] == pytest.approx(sum(a - b for a, b in zip(ft["accuracies"], none, strict=True)) / 2)
        if ft["gain_to_first_rate"]:
            mean = sum(a - b for a, b in zip(ft["accuracies"], first, strict=True)) / 2
            assert ft["gain_to_first_rate"]["mean"] == pytest.approx(mean)


def test_the_files_say_what_the_results_say(whole: tuple[Path, dict[str, Any]]) -> None:
    output, rates = whole
    assert json.loads((output / "rates.json").read_text()) == rates
    rows = list(csv.DictReader((output / "rates.csv").open()))
    assert [float(row["rate"]) for row in rows] == list(RATES)
    assert (output / "rates.png").read_bytes().startswith(b"\x89PNG")
    text = (output / "rates.md").read_text()
    assert all(f"[{rate:g}](rate-{rate:g}/report.md)" in text for rate in RATES)
    assert all((output / row["folder"] / "report.md").exists() for row in rates["rates"])


def test_it_resumes_and_gives_the_same(whole: tuple[Path, dict[str, Any]]) -> None:
    output, rates = whole
    assert what_counts(run_rates(TINY, RATES, output, resume=True)) == what_counts(rates)


@pytest.mark.parametrize(
    ("given", "rates", "said"),
    [
        ({}, (0.5,), "at least two"),
        ({}, (0.5, 0.5), "each once"),
        ({}, (0.5, -1.0), "rate is -1"),
        ({"methods": ("none", "kd")}, (0.5, 1.0), "add ft"),
        ({"paraphraser_checkpoint": "somewhere"}, (0.5, 1.0), "paraphraser_checkpoint and rates"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    tmp_path: Path, given: dict[str, Any], rates: tuple[float, ...], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        settings_of_rates(replace(TINY, **given), rates, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_word_among_the_rates_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--rates", "0.5,much", "--output", str(tmp_path / "run")]) == 2
    assert "rates is '0.5,much'" in capsys.readouterr().err
