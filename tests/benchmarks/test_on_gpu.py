"""python -m bench.on_gpu: a rehearsal on the stand-in GPU, and what becomes of a visit whose parts go wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.arguments import build_parser
from bench.harness.records import RecordError, load
from bench.harness.registry import discover
from bench.on_gpu import REHEARSAL, Visit, main, parts
from bench.results.visited import main as record_main
from bench.results.visited import record_of
from tests.stand_in_gpu.build import CannotBuildError
from tests.stand_in_gpu.running import ROOT, environment

# What does a part goes by its name: it ends, fails, hangs with a process of its own, or dies.
WORKER = """
import json, os, subprocess, sys, time
for name in sys.argv[1].split(","):
    print(json.dumps({"part": name, "begins": True}), flush=True)
    print("a word of some library", flush=True)
    if name == "fails":
        print(json.dumps({"part": name, "error": "of memory"}), flush=True)
    if name == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(json.dumps({"part": name, "child": child.pid}), flush=True)
        time.sleep(60)
    if name == "dies":
        os._exit(1)
    print(json.dumps({"part": name, "ends": True, "pid": os.getpid()}), flush=True)
"""


def findings(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "visit.jsonl").read_text().splitlines()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def visited(folder: Path, limits: dict[str, float], seconds: float = 60.0) -> Visit:
    visit = Visit(folder, seconds, [sys.executable, "-c", WORKER], limits)
    visit.run()
    return visit


def test_a_part_that_goes_wrong_leaves_the_others_their_time(tmp_path: Path) -> None:
    limits = {"first": 30.0, "fails": 30.0, "hangs": 1.0, "dies": 30.0, "last": 30.0}
    visit = visited(tmp_path, limits)
    assert visit.wrong == ["fails", "hangs", "dies"]
    found = findings(tmp_path)
    ended = {line["part"]: line["pid"] for line in found if line.get("ends")}
    assert list(ended) == ["first", "fails", "last"]
    assert ended["first"] == ended["fails"] != ended["last"]
    stopped = {line["part"]: line["stopped"] for line in found if "stopped" in line}
    assert stopped == {"hangs": "its time was over", "dies": "its process ended"}
    (child,) = [line["child"] for line in found if "child" in line]
    for _ in range(50):
        if not alive(child):
            return
        time.sleep(0.1)
    raise AssertionError("a process of the part that was stopped still runs")


def test_after_the_visits_time_nothing_is_begun(tmp_path: Path) -> None:
    visit = visited(tmp_path, {"hangs": 30.0, "last": 30.0}, seconds=1.0)
    assert visit.wrong == ["hangs", "last"]
    assert findings(tmp_path)[-1]["left_out"] == "out of time"


def test_the_benches_take_the_words_that_a_visit_gives_them() -> None:
    benches = discover()
    parser = build_parser(benches)
    words = [words for part in parts() if part.is_bench for words in (part.words, part.small) if words]
    assert words
    for given in words:
        (name,) = parser.parse_args(list(given)).what
        assert name in benches


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--out", "OUT"], "--revision"),
        (["--revision", "abc"], "--out"),
        (["--out", "OUT", "--revision", "abc", "--parts", "build,nothing"], "nothing"),
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


@pytest.mark.parametrize("lines", ["no JSON", "{}", '{"part": "build", "begins": true}\n'])
def test_what_came_to_no_bench_is_no_record(lines: str) -> None:
    with pytest.raises(RecordError, match=r"^visit\.jsonl "):
        record_of(lines, "visit.jsonl")


@pytest.mark.slow
@pytest.mark.process
def test_a_rehearsal_on_the_stand_in_goes_from_the_build_to_the_tables(tmp_path: Path) -> None:
    try:
        given = environment()
    except CannotBuildError as error:
        pytest.skip(f"there is no stand-in GPU: {error}")
    command = [sys.executable, "-m", "bench.on_gpu", "--out", str(tmp_path), "--revision", "abc123", "--small"]
    done = subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    found = findings(tmp_path)
    rehearsed = [part for part in parts() if part.small]
    assert [line["part"] for line in found if line.get("ends")] == [part.name for part in rehearsed]
    path = tmp_path / "record.json"
    assert record_main([str(tmp_path / "visit.jsonl"), "--out", str(path)]) == 0
    record = load(path)
    assert record.notes == [REHEARSAL]
    assert record.software["revision"] == "abc123"
    benches = discover()
    for name in {part.words[0] for part in rehearsed if part.is_bench}:
        rows = record.of(name)
        assert rows
        missing = {row.candidate: row.reason for row in rows if row.timing is None}
        assert not missing or set(missing) == {"torchdistill"}, missing
        assert benches[name].markdown({"cuda": ("picture.svg", record)})
        assert list(benches[name].tables(rows))
