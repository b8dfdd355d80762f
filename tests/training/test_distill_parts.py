"""The parts of a distillation run, each by itself: models, data, methods, settings, the paraphraser's phase."""

import csv
import json
import statistics
import warnings
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from ftfast import FactorTransfer, Paraphraser, Translator, reference
from ftfast.distillation.data import datasets, in_memory
from ftfast.distillation.data.in_memory import Split
from ftfast.distillation.models import registry
from ftfast.distillation.models.registry import Outputs, Teacher
from ftfast.distillation.monitor.epochs import Epoch
from ftfast.distillation.monitor.plots import curve_rows
from ftfast.distillation.monitor.progress import Progress
from ftfast.distillation.phases.paraphraser import build_paraphraser, diagnose, train_paraphraser
from ftfast.distillation.phases.report import write_report
from ftfast.distillation.phases.results import collect, paired_gain, student_result
from ftfast.distillation.phases.selection import Trial, best, candidates, selection_epochs, try_weights
from ftfast.distillation.phases.setup import algorithms
from ftfast.distillation.phases.trainable import TeacherSide
from ftfast.distillation.runtime.checkpoint import Checkpoint
from ftfast.distillation.settings.run_settings import Settings
from ftfast.distillation.training.evaluate import evaluate
from ftfast.distillation.training.loop import Training
from ftfast.distillation.training.losses import DivergedError
from ftfast.distillation.training.methods import METHODS
from ftfast.distillation.training.schedule import Schedule
from ftfast.distillation.training.step.step import Precision
from ftfast.distillation.training.terms import Regressor, Weights
from ftfast.errors import ParaphraserError, SettingsError

CPU = torch.device("cpu")
FLOAT32 = Precision(CPU, torch.float32)


def small_settings(**changes: object) -> Settings:
    return replace(Settings(device="cpu", dtype="float32", threads=1), **changes)


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    return datasets.load("digits", CPU)


def test_digits_are_split_in_proportion_and_without_overlap(digits: tuple[Split, Split]) -> None:
    train, test = digits
    assert (len(train), len(test)) == (1000, 797)
    shares = [torch.bincount(part.labels, minlength=10) / len(part) for part in (train, test)]
    assert (shares[0] - shares[1]).abs().max() < 0.005
    rows = {tuple(image.flatten().tolist()) for image in train.images}
    repeated = sum(tuple(image.flatten().tolist()) in rows for image in test.images)
    assert repeated < 5  # the data set itself may hold equal drawings


def test_folds_use_every_image_once_to_validate(digits: tuple[Split, Split]) -> None:
    split, _ = digits[0].stratified(300)
    folds = split.folds(4)
    validated = torch.cat([part.images for _, part in folds]).flatten(1).sum(1).sort().values
    assert torch.equal(validated, split.images.flatten(1).sum(1).sort().values)
    assert all(len(fitted) + len(part) == 300 for fitted, part in folds)


def test_an_epoch_draws_every_image_once_in_an_order_of_its_own(
    digits: tuple[Split, Split],
) -> None:
    split, _ = digits[0].stratified(97)
    first, again, next_epoch = (
        torch.cat([labels for _, labels in split.draw(32, seed=1, epoch=epoch)]) for epoch in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)
    assert torch.equal(first.sort().values, split.labels.sort().values)


def test_batches_are_of_nearly_equal_size(digits: tuple[Split, Split]) -> None:
    split, _ = digits[0].stratified(97)  # 97 = 3 * 32 + 1: cut plainly, the last batch would hold one image
    sizes = [len(labels) for _, labels in split.draw(32, seed=0, epoch=0)]
    assert max(sizes) <= 32
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("ft-")])  # test_controls has those
def test_methods_have_the_formulas_of_their_papers(name: str) -> None:
    torch.manual_seed(0)
    double = torch.float64
    student = Outputs(torch.randn(6, 5, dtype=double), torch.randn(6, 8, 4, 4, dtype=double))
    teacher = Outputs(torch.randn(6, 5, dtype=double), torch.randn(6, 12, 4, 4, dtype=double))
    labels = torch.arange(6) % 5
    beta, attention, hint, alpha, temperature = 70.0, 900.0, 5.0, 0.3, 3.0
    paraphraser, translator = Paraphraser(12).double(), Translator(8, 6).double()
    regressor = Regressor(8, 12).double()
    between = regressor if name == "fitnet" else FactorTransfer(paraphraser, translator, weight=beta)
    weights = Weights(beta=beta, attention=attention, hint=hint, alpha=alpha, temperature=temperature)

    terms = METHODS[name].terms(student, teacher, labels, between, weights)

    cross_entropy = -(student.logits.softmax(1)[torch.arange(6), labels]).log().mean()
    soft_teacher, soft_student = (outputs.logits.div(temperature).softmax(1) for outputs in (teacher, student))
    divergence = (soft_teacher * (soft_teacher / soft_student).log()).sum(1).mean()
    factors = reference.ft_loss(translator(student.features), paraphraser.encode(teacher.features))
    maps = [outputs.features.pow(2).sum(1).reshape(6, 16) for outputs in (student, teacher)]
    unit_student, unit_teacher = (each / each.norm(dim=1, keepdim=True) for each in maps)
    unlike = attention * (unit_student - unit_teacher).pow(2).mean()
    distilled = (1 - alpha) * cross_entropy + alpha * temperature**2 * divergence
    expected = {
        "none": cross_entropy,
        "kd": distilled,
        "at": cross_entropy + unlike,
        "fitnet": cross_entropy + hint * (regressor(student.features) - teacher.features).pow(2).mean(),
        "ft": cross_entropy + beta * factors,
        "ft+kd": distilled + beta * factors,
        "at+kd": distilled + unlike,
    }
    torch.testing.assert_close(sum(terms.values()).double(), expected[name], rtol=1e-5, atol=0)


def test_the_weight_grid_has_one_size_for_every_method_and_is_centred_on_500_sqrt_d_2048() -> None:
    settings = small_settings(methods=tuple(METHODS)).resolved()
    assert settings.factor_size() == 32 * 2 * 2
    assert settings.beta[len(settings.beta) // 2] == 125
    sizes = {name: len(candidates(settings, name)) for name in METHODS}
    assert sizes["none"] == 1
    assert len({size for name, size in sizes.items() if name != "none"}) == 1
    assert sizes["ft"] > 1


def test_one_beta_leaves_nothing_to_choose_for_ft() -> None:
    settings = small_settings(beta=(125.0,)).resolved()
    assert candidates(settings, "ft") == [Weights(beta=125.0, temperature=settings.temperature)]
    assert {weights["beta"] for weights in candidates(settings, "ft+kd")} == {125.0}


def test_the_number_of_betas_is_free_where_no_method_has_an_alpha() -> None:
    settings = small_settings(methods=("none", "ft"), beta=(1.0, 2.0, 3.0, 4.0)).resolved()
    assert [weights["beta"] for weights in candidates(settings, "ft")] == [1, 2, 3, 4]


def test_selection_takes_the_highest_accuracy_then_the_lowest_loss_and_never_a_diverged_one() -> None:
    trials = [
        Trial({"beta": 1}, 90.0, 0.3),
        Trial({"beta": 2}, 91.0, 0.5),
        Trial({"beta": 3}, 91.0, 0.4),
        Trial({"beta": 4}, None, None),
    ]
    assert best(trials) is trials[2]
    assert best(trials[3:]) is None


def test_selection_students_take_as_many_steps_as_final_ones() -> None:
    settings = small_settings()
    fitted = settings.student_images * (settings.validation_folds - 1) / settings.validation_folds
    steps = selection_epochs(settings) * fitted
    assert steps == pytest.approx(settings.student_epochs * settings.student_images, rel=0.05)


def test_weights_are_judged_on_images_that_were_not_learned(digits: tuple[Split, Split]) -> None:
    """Labels without a meaning can be learned by heart, and then say nothing about other images."""
    split, _ = digits[0].stratified(100)
    labels = torch.randint(10, (100,), generator=torch.Generator().manual_seed(0))
    settings = small_settings(student_channels=8, student_epochs=20, validation_folds=2)
    teacher = Teacher(registry.build_model("resnet8", 2, in_channels=1, classes=10, seed=0))
    teacher_side = TeacherSide(teacher, None)
    trial = try_weights(settings, FLOAT32, teacher_side, in_memory.Split(split.images, labels), "none", Weights())
    assert trial.accuracy is not None
    assert trial.accuracy < 40


def test_settings_survive_json() -> None:
    settings = small_settings(methods=("ft", "kd"), beta=(1.0, 2.0), alpha=(0.1, 0.2), teacher_checkpoint="here")
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "ftfast-settings"),
        ({"colour": 1}, "unknown field, 'colour'"),
        ({"seeds": "6"}, "seeds is '6'"),
        ({"seeds": True}, "seeds is True"),
    ],
)
def test_settings_of_another_kind_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_json({**Settings().to_json(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("ft", "fsp")}, "methods is 'fsp'; it takes none, kd, at, fitnet, ft, ft\\+kd, at\\+kd"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("ft", "ft")}, "each value once"),
        ({"data": "cifar"}, "data is 'cifar'; it takes digits, fashion-mnist, cifar10, cifar100"),
        ({"seeds": 0}, "seeds is 0; it takes a number of at least 1"),
        ({"learning_rate": 0.0}, "more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"alpha": (1.5,)}, "at least 0 and at most 1"),
        ({"alpha": (0.5, 0.6), "beta": (1.0, 2.0, 3.0)}, "one value or equally many"),
        ({"student_images": 20}, "student_images is 20; to choose weights on 4 folds it takes at least 40"),
        ({"student_images": 35}, "at least 40"),
        ({"seed": 10**20}, "seed is 1(0){20}; it takes a number of at least 0 and at most 4294967296"),
        ({"seed": 10**400}, "at most 4294967296"),
        ({"paraphraser_batch_size": 10**20}, "at most 4294967296"),
        ({"student_images": 995}, "student_images is 995; it takes 10 to 990"),
        ({"student": "resnet9"}, "resnet8"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        small_settings(**changes)


def test_few_images_suffice_where_nothing_is_chosen() -> None:
    assert small_settings(student_images=20, batch_size=20, beta=(1.0,), alpha=(0.5,)).student_images == 20


@pytest.mark.parametrize("folds", [2, 4, 10])
def test_the_fewest_images_that_are_taken_fill_every_fold(digits: tuple[Split, Split], folds: int) -> None:
    fewest = 10 * folds
    settings = small_settings(student_images=fewest, validation_folds=folds, batch_size=10)
    assert settings.student_images == fewest
    with warnings.catch_warnings(action="error"):
        cuts = [cut for count in range(fewest, fewest + 12) for cut in digits[0].stratified(count)[0].folds(folds)]
    assert all(len(validated.labels.unique()) == 10 for _, validated in cuts)


def test_all_training_images_may_be_the_students() -> None:
    assert small_settings(student_images=1000).student_images == 1000


def features_of_low_rank(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, 16, 2, 2, generator=torch.Generator().manual_seed(9))
    return torch.einsum("nk,kchw->nchw", torch.randn(count, 3, generator=generator), directions)


def test_a_trained_paraphraser_explains_features_and_an_untrained_one_does_not() -> None:
    settings = small_settings(teacher_channels=4, paraphraser_steps=300)
    held_out = features_of_low_rank(64, seed=1)
    paraphraser = build_paraphraser(settings)
    before, warning = diagnose(paraphraser, held_out, FLOAT32)
    train_paraphraser(paraphraser, features_of_low_rank(512), settings, FLOAT32)
    after, nothing = diagnose(paraphraser, held_out, FLOAT32)
    assert before.explained_variance < 0.1
    assert warning is not None
    assert "0.5" in warning
    assert "in a new --output, with --teacher-checkpoint" in warning
    assert after.explained_variance > 0.8
    assert nothing is None


def test_explained_variance_is_that_of_the_plain_formula() -> None:
    features = features_of_low_rank(50)
    paraphraser = build_paraphraser(small_settings(teacher_channels=4))
    found = diagnose(paraphraser, features, FLOAT32)[0].explained_variance
    with torch.no_grad():
        residual = features - paraphraser(features)
    expected = 1 - residual.square().sum() / (features - features.mean(0)).square().sum()
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_random_factors_have_spread_one() -> None:
    paraphraser = build_paraphraser(small_settings(teacher_channels=4))
    torch.manual_seed(0)
    factors = torch.randn(400, 8, 2, 2)
    paraphraser.encode = lambda _: factors  # type: ignore[method-assign]
    assert diagnose(paraphraser, features_of_low_rank(400), FLOAT32)[0].spread == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("bias", "message"), [(1e3, "nearly the same factor"), (float("nan"), "not finite")])
def test_a_collapsed_paraphraser_stops_the_run_and_names_the_remedy(bias: float, message: str) -> None:
    paraphraser = build_paraphraser(small_settings(teacher_channels=4))
    with torch.no_grad():
        paraphraser.encoder[2].bias.fill_(bias)
    with pytest.raises(
        ParaphraserError, match=f"{message}.*--paraphraser-learning-rate.*--paraphraser-steps.*adam.*new --output"
    ):
        diagnose(paraphraser, features_of_low_rank(50), FLOAT32)


def test_paired_gain_of_known_numbers() -> None:
    gain = paired_gain([92.0, 95.0, 93.0], [91.0, 93.0, 93.0])
    assert gain["mean"] == pytest.approx(1)
    assert gain["standard_error"] == pytest.approx(1 / 3**0.5)
    assert (gain["seeds_up"], gain["seeds"]) == (2, 3)
    assert paired_gain([2.0], [1.0])["standard_error"] is None


def student_of(seed: int, *accuracies: float) -> dict[str, Any]:
    return student_result(seed, [Epoch(number + 1, {}, value, 60, 0.1) for number, value in enumerate(accuracies)])


def test_the_statistics_of_known_accuracies() -> None:
    """Every number by hand: over seeds, and between students of the same seed."""
    none, ft = (50.0, 80.0, 60.0, 71.0), (54.0, 81.0, 59.0, 77.0)
    methods = {
        name: (
            Weights.fromkeys(METHODS[name].weights, 1.0),
            [student_of(seed, 10.0 * seed, value) for seed, value in enumerate(accuracies)],
        )
        for name, accuracies in (("none", none), ("ft", ft))
    }
    settings = small_settings(methods=("none", "ft"), seeds=4).resolved()
    teacher = Checkpoint({}, {"history": []}, {"accuracy": 90.0})
    results = collect(settings, teacher, None, {"none": [], "ft": []}, methods, 1.0)
    for name, accuracies in (("none", none), ("ft", ft)):
        found = results["methods"][name]
        assert found["mean"] == pytest.approx(sum(accuracies) / 4)
        assert found["standard_deviation"] == pytest.approx(statistics.stdev(accuracies))
        rows = [row for row in curve_rows(results) if row["method"] == name]
        assert [row["epoch"] for row in rows] == [1, 2]
        assert rows[1]["accuracy_mean"] == pytest.approx(sum(accuracies) / 4, abs=1e-4)
        assert rows[0]["accuracy_standard_deviation"] == pytest.approx(statistics.stdev([0, 10, 20, 30]), abs=1e-4)
        assert rows[1]["accuracy_standard_deviation"] == pytest.approx(statistics.stdev(accuracies), abs=1e-4)
    gain = results["methods"]["ft"]["gain"]
    assert gain["mean"] == pytest.approx(2.5)
    assert gain["standard_error"] == pytest.approx(statistics.stdev([4, 1, -1, 6]) / 2)
    assert (gain["seeds_up"], gain["seeds"]) == (3, 4)


def test_one_seed_has_no_deviation_anywhere(tmp_path: Path) -> None:
    methods = {"none": (Weights(), [student_of(0, 50.0, 60.0)])}
    settings = small_settings(methods=("none",), seeds=1).resolved()
    teacher = Checkpoint({}, {"history": []}, {"accuracy": 90.0})
    results = collect(settings, teacher, None, {"none": []}, methods, 1.0)
    assert results["methods"]["none"]["standard_deviation"] is None
    write_report(tmp_path, results)
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert [row["accuracy_standard_deviation"] for row in rows] == ["", ""]


@pytest.mark.parametrize(("device", "expected"), [("cpu", "on"), ("cuda", "off")])
def test_photographs_on_a_gpu_take_the_fastest_algorithms(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    sizes = {"student_images": 0, "paraphraser_held_out": 1000}
    photographs = small_settings(data="images", loader="synthetic", methods=("none",), device=device, **sizes)
    assert photographs.resolved().deterministic == expected
    assert replace(photographs, deterministic="on").resolved().deterministic == "on"
    assert small_settings(device=device).resolved().deterministic == "on"


def test_algorithms_are_put_back() -> None:
    before = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.get_num_threads())
    with algorithms(1, repeatable=False):
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (True, False)
        assert torch.get_num_threads() == 1
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.get_num_threads()) == before


def test_curves_have_the_likeliest_five_where_every_epoch_has() -> None:
    def of(*top5: float | None) -> list[dict[str, Any]]:
        history = [Epoch(number + 1, {}, 50.0, 60, 0.1, value) for number, value in enumerate(top5)]
        return curve_rows({"methods": {"ft": {"students": [student_result(seed, history) for seed in range(2)]}}})

    assert [row["top5_accuracy_mean"] for row in of(70.0, 80.0)] == [70.0, 80.0]
    assert all("top5_accuracy_mean" not in row for row in of(None, 80.0))


def test_a_diverged_training_says_how_a_lower_rate_can_be_tried(
    digits: tuple[Split, Split],
) -> None:
    split, _ = digits[0].stratified(20)
    model = torch.nn.Linear(1, 1)

    def terms(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"labels": model(images.new_ones(1)).sum() * float("nan")}

    with pytest.raises(DivergedError, match=r"--learning-rate.*in a new --output, with --teacher-checkpoint"):
        Training(model, terms, split, Schedule(1, 16, 0.05, 0.9, 0.0), FLOAT32, seed=0).run()


def test_a_training_restored_on_the_way_ends_as_an_uninterrupted_one(
    digits: tuple[Split, Split],
) -> None:
    split, _ = digits[0].stratified(64)
    drawn: list[torch.Tensor] = []

    def training() -> Training:
        model = registry.build_model("resnet8", 2, in_channels=1, classes=10, seed=0)
        trainable = torch.nn.ModuleDict({"model": model})

        def terms(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            drawn.append(labels)
            return {"labels": F.cross_entropy(model(images), labels)}

        return Training(
            trainable,
            terms,
            split,
            Schedule(4, 16, 0.05, 0.9, 5e-4),
            FLOAT32,
            seed=0,
        )

    kept: list[dict[str, object]] = []
    whole = training()
    whole.run(lambda current: kept.append(deepcopy(current.state())))
    epochs = torch.cat(drawn).reshape(4, 64)
    assert not torch.equal(epochs[0], epochs[1])
    resumed = training()
    resumed.load_state(kept[1])
    resumed.run()
    assert [record.losses for record in resumed.history] == [record.losses for record in whole.history]
    for name, tensor in whole.trainable.state_dict().items():
        assert torch.equal(tensor, resumed.trainable.state_dict()[name]), name


def test_evaluate_leaves_the_models_mode_and_counts_right_answers(
    digits: tuple[Split, Split],
) -> None:
    split, _ = digits[0].stratified(50)
    model = registry.build_model("resnet8", 2, in_channels=1, classes=10, seed=0).train()
    accuracy, loss, _ = evaluate(model, split, FLOAT32)
    assert model.training
    with torch.no_grad():
        logits = model.eval()(split.images)
    assert accuracy == pytest.approx(100 * sum(logits.argmax(1) == split.labels).item() / 50)
    assert loss == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-5)


class Screen(StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


# FORCE_COLOR makes rich take any file for a terminal, as force_terminal does.
@pytest.mark.parametrize(
    ("kind", "forced", "terminal"), [(Screen, True, True), (StringIO, True, False), (StringIO, None, False)]
)
def test_bars_are_drawn_on_terminals_alone_and_lines_everywhere(
    kind: type[StringIO], forced: bool | None, terminal: bool
) -> None:
    written = kind()
    with Progress(100, Console(file=written, force_terminal=forced, width=100)) as progress:
        progress.begin("students of ft", 100)
        progress.advance(40)
        progress.end()
        progress.say("ft: done")
    assert "ft: done" in written.getvalue()
    assert ("students of ft" in written.getvalue()) == terminal
    assert ("\x1b" in written.getvalue()) == terminal


def test_a_paraphraser_of_noise_is_judged_and_not_refused() -> None:
    """--loader synthetic is for timing, and its images show nothing."""
    paraphraser = Paraphraser(4)
    with torch.no_grad():
        for parameter in paraphraser.parameters():
            parameter.mul_(1e-3 if parameter.dim() > 1 else 1)  # factors that are all the biases'
    features = torch.randn(6, 4, 3, 3)
    with pytest.raises(ParaphraserError, match="same factor for every image"):
        diagnose(paraphraser, features, FLOAT32)
    assert diagnose(paraphraser, features, FLOAT32, of_noise=True)[0].spread < 0.1
