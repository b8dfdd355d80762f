"""bench/on_gpu.sh: a small run of every step on the CPU, and what the runner does when steps go wrong."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.on_gpu.__main__ import ARCHIVE_LIMIT, DONE, FAILED, SKIPPED, TIMED_OUT, Runner, main, write_archive
from bench.on_gpu.findings import Findings, try_each
from bench.on_gpu.repeats import count_differing
from bench.on_gpu.steps import Step, steps

CHECKOUT = Path(__file__).resolve().parent.parent
SCRIPT = CHECKOUT / "bench" / "on_gpu.sh"
LEFT_OUT = {"tests_triton", "tests_cuda", "tests_backends"}
LEFT_OUT |= {f"bench_{name}" for name in ("preset_synthetic", "preset_gpu", "step", "store", "loaders")}
if importlib.util.find_spec("ftfast._C") is None:
    LEFT_OUT.add("tune")


def packed(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        members = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read().decode() for name, file in members.items() if file is not None}


def environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FTFAST_BACKEND")}
    return {**own, "PYTHON": sys.executable}


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_dry_run_does_every_step_that_needs_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    for name in ("TRITON_INTERPRET", "FTFAST_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(CHECKOUT)
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--out", str(out), "--revision", "abc123", "--dry-run", "--minutes", "4"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "results.tar.gz"]
    assert (out / "results.tar.gz").stat().st_size < ARCHIVE_LIMIT
    files = packed(out / "results.tar.gz")
    outcomes = json.loads(files["steps.json"])
    assert [outcome["name"] for outcome in outcomes] == [step.name for step in steps(Path())]
    for outcome in outcomes:
        expected = SKIPPED if outcome["name"] in LEFT_OUT else DONE
        assert outcome["status"] == expected, outcome
        assert bool(outcome["reason"]) == (expected == SKIPPED)
        assert outcome["exit_status"] == (None if expected == SKIPPED else 0)
    machine = json.loads(files["machine.json"])
    assert machine["revision"] == "abc123"
    assert machine["packages"]["torch"] == torch.__version__.partition("+")[0]
    for name in ("convolutions", "matmuls", "repeats"):
        found = [json.loads(line) for line in files[f"{name}.jsonl"].splitlines()]
        assert found, name
        assert not [line for line in found if "error" in line]
    for name in ("bench_head", "bench_convolutions", "bench_loss"):
        assert json.loads(files[f"{name}.json"])["rows"]
    assert "all steps done or skipped" in files["log.txt"]


def runner_in(folder: Path, minutes: float = 1.0) -> Runner:
    for name in ("out", "results"):
        (folder / name).mkdir()
    return Runner(folder / "out", folder / "results", minutes, {"OF_ALL_STEPS": "1"})


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_what_goes_wrong_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    runner = runner_in(tmp_path, minutes=0.05)
    broken = [
        Step("fails", python("import sys; print('half'); sys.exit(3)")),
        Step("hangs", python("print('begun', flush=True); import time; time.sleep(60)")),
        Step("needs", python("pass"), needs=("json", "no_such_package")),
        Step("absent", python("pass"), probe=python("import sys; sys.exit(2)")),
        Step("no_such_program", ["/no/such/program"]),
        Step(
            "works", python("import os; print(os.environ['OF_ALL_STEPS'], os.environ['OWN'])"), environment={"OWN": "2"}
        ),
    ]
    for step in broken:
        runner.run(step, has_gpu=True)
    outcomes: dict[str, Any] = {outcome.name: outcome for outcome in runner.outcomes}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "fails": FAILED,
        "hangs": TIMED_OUT,
        "needs": SKIPPED,
        "absent": SKIPPED,
        "no_such_program": FAILED,
        "works": DONE,
    }
    assert outcomes["fails"].exit_status == 3
    assert "no_such_package" in outcomes["needs"].reason
    assert "json" not in outcomes["needs"].reason
    assert "ends with 2" in outcomes["absent"].reason
    assert 3 <= outcomes["hangs"].seconds < 30
    files = packed(tmp_path / "out" / "results.tar.gz")
    assert files["fails.txt"] == "half\n"
    assert files["hangs.txt"] == "begun\n"
    assert files["works.txt"] == "1 2\n"
    assert len(json.loads(files["steps.json"])) == len(broken)


def test_the_archive_is_whole_after_every_step(tmp_path: Path) -> None:
    runner = runner_in(tmp_path)
    for count in (1, 2):
        runner.run(Step(f"step{count}", python("print('done')")), has_gpu=True)
        files = packed(tmp_path / "out" / "results.tar.gz")
        assert len(json.loads(files["steps.json"])) == count
        assert f"step{count}: done" in files["log.txt"]


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("hangs", [True, False])
def test_nothing_that_a_step_started_outlives_it(hangs: bool, tmp_path: Path) -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = f"import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)"
    code += "; time.sleep(60)" if hangs else "; time.sleep(0.5)"
    outcome = runner_in(tmp_path, minutes=0.03).run(Step("parent", python(code)), has_gpu=True)
    assert outcome.status == (TIMED_OUT if hangs else DONE)
    started = int((tmp_path / "results" / "parent.txt").read_text())
    for _ in range(50):
        if not alive(started):
            return
        time.sleep(0.1)
    raise AssertionError("a process of the step still runs")


@pytest.mark.process
def test_told_to_end_it_leaves_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [str(SCRIPT), "--out", str(out), "--revision", "abc", "--dry-run", "--steps", "build,convolutions"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("== convolutions"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 143
    files = packed(out / "results.tar.gz")
    assert [outcome["name"] for outcome in json.loads(files["steps.json"])] == ["build"]
    assert "told to end" in files["log.txt"]


def test_an_archive_too_large_leaves_the_largest_out(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    (folder / "below").mkdir(parents=True)
    (folder / "small.txt").write_text("small")
    (folder / "below" / "large.bin").write_bytes(os.urandom(50_000))
    archive = tmp_path / "results.tar.gz"
    assert write_archive(folder, archive, 1_000_000) == []
    assert write_archive(folder, archive, 20_000) == [folder / "below" / "large.bin"]
    assert archive.stat().st_size <= 20_000
    assert packed(archive) == {"small.txt": "small", "left_out.txt": "below/large.bin 50000\n"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--out", "OUT"], "--revision"),
        (["--revision", "abc"], "--out"),
        (["--out", "OUT", "--revision", "abc", "--steps", "build,nothing"], "nothing"),
        (["--out", "OUT", "--revision", "abc", "--minutes", "0"], "--minutes"),
        (["--out", "/dev/null/below", "--revision", "abc"], "/dev/null/below"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            main([argument.replace("OUT", str(tmp_path)) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().rpartition("error: ")[2]
    assert named in error
    assert "\n" not in error


def test_a_run_that_differs_in_one_bit_is_counted() -> None:
    device = torch.device("cpu")
    same = torch.tensor([1.0, float("nan"), -0.0])
    assert count_differing(lambda: [same.clone()], 5, device)["differing"] == 0
    runs: list[int] = []

    def changing() -> list[torch.Tensor]:
        runs.append(1)
        found = same.clone()
        # The fourth run after the first has the other zero.
        found[2] = 0.0 if len(runs) == 5 else -0.0
        return [same.to(torch.bfloat16), found]

    report = count_differing(changing, 6, device)
    assert report["differing"] == 1
    assert "1 of 6 runs differ" in report["error"]


def test_findings_stand_line_by_line(tmp_path: Path) -> None:
    def wrong() -> dict[str, Any]:
        raise RuntimeError("no memory\nsecond line")

    def absent() -> dict[str, Any]:
        raise ImportError("no kernel")

    path = tmp_path / "found.jsonl"
    assert try_each(Findings(path), {"wrong": wrong, "absent": absent, "right": lambda: {"ms": 2.0}}) == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"case": "wrong", "error": "RuntimeError: no memory"},
        {"case": "absent", "absent": "no kernel"},
        {"case": "right", "ms": 2.0},
    ]
