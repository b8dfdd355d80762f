"""Tables of measured choices: who wins, what is refused, and that only ftfast tune measures."""

import contextlib
import json
import time
from types import SimpleNamespace

import pytest
import torch

from ftfast.cli import main
from ftfast.commands.tune import measuring
from ftfast.commands.tune.candidates import Candidate
from ftfast.extension import load_extension
from ftfast.ops import kernel_table
from ftfast.ops.conv3x3 import native as conv3x3_native

CPU = torch.device("cpu")
WORK = kernel_table.Work("weight_gradient", "bfloat16", 32, 7, 7, 24, 16)
CANDIDATES = conv3x3_native.CANDIDATES


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's own folder of tables, empty; shipped tables are out of sight."""
    monkeypatch.setenv("FTFAST_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(kernel_table, "SHIPPED", tmp_path / "shipped")
    kernel_table.forget_tables()
    yield tmp_path
    kernel_table.forget_tables()


def write(folder, *entries, version=kernel_table.VERSION):
    folder.mkdir(parents=True, exist_ok=True)
    table = {"version": version, "device": "here", "entries": list(entries)}
    (folder / kernel_table.file_name(CPU)).write_text(json.dumps(table))
    kernel_table.forget_tables()


def entry(kernel, **changes):
    return {**WORK._asdict(), "kernel": kernel, "torch": "2.15", **changes}


def choose(work=WORK):
    return kernel_table.choose_kernel(work, CPU, CANDIDATES, "library")


def test_unmeasured_work_takes_the_default_and_says_so(folder):
    assert choose() == ("library", "not measured on this device; ftfast tune measures it")


def test_the_users_table_wins_over_the_shipped_one(folder):
    write(folder / "shipped", entry("unfolded"))
    assert choose().kernel == "unfolded"
    write(folder / "user", entry("library"))
    assert choose().kernel == "library"
    assert "measured fastest" in choose().reason


def test_an_entry_speaks_for_batches_near_its_own(folder):
    write(folder / "user", entry("unfolded"))
    for samples, kernel in ((16, "unfolded"), (64, "unfolded"), (15, "library"), (65, "library")):
        assert choose(WORK._replace(samples=samples)).kernel == kernel
    write(folder / "user", entry("unfolded"), entry("library", samples=48))
    assert choose(WORK._replace(samples=47)).kernel == "library"


@pytest.mark.parametrize("field", ["operation", "dtype", "height", "width", "channels_in", "channels_out"])
def test_an_entry_speaks_for_nothing_else(folder, field):
    write(folder / "user", entry("unfolded"))
    other = "other" if isinstance(getattr(WORK, field), str) else 99
    assert choose(WORK._replace(**{field: other})).kernel == "library"


def test_a_kernel_that_is_no_candidate_is_passed_by(folder):
    write(folder / "user", entry("a kernel of another version"))
    assert choose().kernel == "library"


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 99, "entries": []}', '{"version": 1}'])
def test_a_damaged_or_newer_table_is_refused_in_a_sentence(folder, text):
    (folder / "user").mkdir()
    (folder / "user" / kernel_table.file_name(CPU)).write_text(text)
    kernel_table.forget_tables()
    with pytest.raises(ValueError, match="tune") as raised:
        choose()
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(load_extension()[0] is None, reason="the extension is not built")
def test_tune_measures_prints_and_keeps(folder, capsys):
    assert main(["tune", "4x8+8:8x3x3", "--seconds", "0.001"]) == 0
    printed = capsys.readouterr().out
    assert "weight_gradient" in printed
    kept = kernel_table.read_table(folder / "user" / kernel_table.file_name(CPU))
    assert [found["operation"] for found in kept] == ["weight_gradient"]
    assert set(kept[0]["milliseconds"]) == set(conv3x3_native.candidates(8, 8))
    assert min(kept[0]["milliseconds"], key=kept[0]["milliseconds"].get) == kept[0]["kernel"]
    work = WORK._replace(samples=4, height=3, width=3, channels_in=8, channels_out=8)
    assert choose(work).reason.startswith("measured fastest")
    # The next run keeps what it does not measure anew.
    assert main(["tune", "4x16+16:16x3x3", "--seconds", "0.001", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert len(kernel_table.read_table(folder / "user" / kernel_table.file_name(CPU))) == 2


@pytest.mark.skipif(load_extension()[0] is None, reason="the extension is not built")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["8x16"], "HEAD: head is '8x16'"),
        (["4x8+8:8x3x3", "--seconds", "0"], "seconds is 0.0"),
        (["4x8+8:8x3x3", "--device", "nowhere"], "device is 'nowhere'"),
    ],
)
def test_bad_input_is_refused(folder, capsys, words, said):
    try:
        status = main(["tune", *words])
    except SystemExit as leaving:
        status = leaving.code
    captured = capsys.readouterr()
    assert status == 2
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (folder / "user").exists()


def test_a_step_measures_nothing(folder, monkeypatch):
    """Choosing inside a step reads tables and no clock."""
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: pytest.fail("a clock was read"))
    import ftfast

    head = ftfast.FactorTransfer(ftfast.Paraphraser(8), ftfast.Translator(6, 4))
    head(torch.randn(2, 6, 3, 3), torch.randn(2, 8, 3, 3)).backward()


class Gpu:
    """torch.cuda as far as tune uses it: kernels add to a clock of their own, or to the graph that is captured."""

    def __init__(self):
        self.clock = 0.0
        self.recording = None

    def work(self, milliseconds):
        if self.recording is None:
            self.clock += milliseconds
        else:
            self.recording.milliseconds += milliseconds

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.recording = graph
        yield
        self.recording = None

    def new_graph(self):
        graph = SimpleNamespace(milliseconds=0.0)
        graph.replay = lambda: self.work(graph.milliseconds)
        return graph

    def new_event(self, enable_timing):
        event = SimpleNamespace(synchronize=lambda: None, elapsed_time=lambda last: last.at - event.at)
        event.record = lambda: setattr(event, "at", self.clock)
        return event


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    for name, value in {
        "device": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: None,
        "CUDAGraph": made.new_graph,
        "Event": made.new_event,
        "graph": made.graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_on_a_gpu_kernels_decide_and_not_what_python_costs(gpu):
    """A single pass of few launches lost or won by its Python, which a captured step does not run."""

    def candidate(name, python, kernels):
        def run():
            time.sleep(python / 1e3)
            gpu.work(kernels)
            return [torch.ones(3)]

        return Candidate(name, run)

    device = torch.device("cuda", 0)
    candidates = [candidate("much Python", 20.0, 0.25), candidate("long kernels", 0.0, 0.5)]
    captured = measuring.captured(candidates, WORK, device)
    assert measuring.median_milliseconds(captured, device, 0.001) == {"much Python": 0.25, "long kernels": 0.5}


def test_what_cannot_be_captured_is_named_and_not_timed(gpu, capsys):
    def refuses():
        if gpu.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return [torch.ones(3)]

    candidates = [Candidate("refuses", refuses), Candidate("good", lambda: [torch.ones(3)])]
    assert [kept.kernel for kept in measuring.captured(candidates, WORK, torch.device("cuda", 0))] == ["good"]
    assert "refuses cannot compute" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_a_result_of_another_size_is_left_out(factor, capsys):
    """Each result was divided by its own norm first, and one twice as long agreed."""
    right = [torch.randn(5), torch.randn(3)]
    candidates = [
        Candidate("right", lambda: right),
        Candidate("wrong", lambda: [right[0], factor * right[1]]),
    ]
    work = WORK._replace(operation="head")
    assert [kept.kernel for kept in measuring.agreeing(candidates, work)] == ["right"]
    assert "wrong is off by" in capsys.readouterr().err
