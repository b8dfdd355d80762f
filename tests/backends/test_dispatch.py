"""Which backend runs, the reasons in words, and what happens when the wanted one cannot."""

import json
import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

import ftfast
from ftfast import dispatch
from ftfast.backends import KernelBackend, Support, native
from ftfast.extension import load_extension
from ftfast.ops.attention.map import attention_map
from ftfast.ops.crop_resize import Window, can_crop, crop_resize
from ftfast.ops.ft_loss import function as op
from ftfast.ops.ft_loss import plans
from ftfast.ops.remembered import Remembered
from tests.processes.fork_server import Popen
from tests.processes.launching import python

FACTOR = torch.zeros(2, 8)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(op, "_chosen", Remembered())
    monkeypatch.setattr(plans, "_plans", Remembered())
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.delenv("FTFAST_BACKEND", raising=False)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(native, "load_extension", lambda: (None, "no C++ compiler was found"))


def test_the_extension_is_loaded_where_it_must_be():
    extension, reason = load_extension()
    if os.environ.get("FTFAST_REQUIRE_NATIVE") == "1":
        assert extension is not None, reason
    elif extension is None:
        pytest.skip(reason)
    assert extension.instruction_set() in ("baseline", "avx2", "avx512")


def test_an_unknown_instruction_set_is_a_reason(monkeypatch):
    """It meant the slowest one, without a word."""
    monkeypatch.setenv("FTFAST_INSTRUCTION_SET", "avx3")
    reason = "FTFAST_INSTRUCTION_SET is 'avx3', and it takes avx512, avx2, baseline"
    assert load_extension.__wrapped__() == (None, reason)


def test_auto_falls_back_and_says_so_once(no_extension, caplog):
    with caplog.at_level(logging.WARNING, "ftfast"):
        for _ in range(3):
            assert dispatch.choose("auto", FACTOR, FACTOR) == "reference"
            assert dispatch.choose("auto", FACTOR.double(), FACTOR) == "reference"
    assert [record.message for record in caplog.records] == [
        "ftfast falls back from its native backend: no C++ compiler was found."
    ]
    assert ftfast.ft_loss(FACTOR + 1, FACTOR + 1) == 0


def test_an_explicit_backend_raises_its_reason(no_extension):
    with pytest.raises(
        RuntimeError, match='backend "native" cannot run: no C\\+\\+ compiler was found; use backend="auto"'
    ):
        ftfast.ft_loss(FACTOR, FACTOR, backend="native")


def test_the_environment_chooses_where_the_call_does_not(monkeypatch):
    monkeypatch.setenv("FTFAST_BACKEND", "reference")
    assert dispatch.choose("auto", FACTOR, FACTOR) == "reference"
    assert "FTFAST_BACKEND" in ftfast.explain(FACTOR, FACTOR)
    monkeypatch.setenv("FTFAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match="backend is 'fastest'"):
        ftfast.ft_loss(FACTOR, FACTOR)


def test_explain_gives_every_backend_a_line_and_a_reason():
    lines = ftfast.explain(FACTOR, FACTOR).splitlines()
    assert {line.split()[0] for line in lines} == set(dispatch.BACKENDS)
    assert " runs" in lines[0]
    assert all(" does not run: " in line for line in lines[1:])
    meta = ftfast.explain(FACTOR.to("meta"), FACTOR.to("meta"))
    assert meta.startswith("reference runs")
    assert "meta" in meta


class Plan:
    """Kernels in torch's operators: p = 1, the mean, a student's gradient."""

    expected_upstream = None

    def __init__(self, student, teacher, p, reduction, eps):
        assert (p, reduction) == (1, "mean")
        self.p, self.reduction, self.eps = p, reduction, eps

    def forward(self, student, teacher, weight):
        loss = ftfast.reference.ft_loss(student, teacher, eps=self.eps, weight=weight)
        return loss.detach(), student.new_zeros(5, len(student))

    def backward(self, student, teacher, statistics, upstream, weight, needed):
        assert needed == (True, False)
        size = student.norm(dim=1, keepdim=True)
        a, b = student / size, teacher / teacher.norm(dim=1, keepdim=True)
        gradient = (a - b).sign()
        gradient = (gradient - a * (gradient * a).sum(1, keepdim=True)) / (size * student.numel())
        return gradient * weight * upstream, None


class Toy(KernelBackend):
    name = "toy"
    automatic_on = device_types = ("cpu",)

    def supports(self, device, student_dtype, teacher_dtype):
        return Support(student_dtype == torch.float32, "operators of torch in float32")

    def launchers(self, device):
        launchers = ModuleType("plain")
        launchers.LossPlan = Plan
        return launchers


def test_a_backend_names_its_kernels_for_other_operations(monkeypatch, no_extension):
    """Attention maps, convolutions and crops ask the registry for them, and no backend by its name."""
    kernels, called = ModuleType("toy_kernels"), []
    kernels.attention_map = lambda features, exponent: called.append("attention") or features.mean(1).flatten(1)
    kernels.layer = lambda x, *rest, transposed: called.append("conv3x3") or x
    kernels.crop_resize = lambda table, *rest: called.append("crop_resize") or table
    monkeypatch.setitem(sys.modules, "toy_kernels", kernels)
    toy = Toy()
    toy.modules = dict.fromkeys(("attention", "conv3x3", "crop_resize"), "toy_kernels")
    monkeypatch.setitem(dispatch.BACKENDS, "toy", toy)
    maps = torch.randn(2, 16, 4, 4)
    attention_map(maps, 2)
    ftfast.Translator(16, 16)(maps)
    crop_resize([torch.zeros(3, 8, 8, dtype=torch.uint8)], [Window(0, 0, 8, 8, 4, 4, 0, 0, False)], 4)
    assert called == ["attention", *["conv3x3"] * 3, "crop_resize"]
    monkeypatch.setenv("FTFAST_BACKEND", "reference")
    attention_map(maps, 2)
    ftfast.Translator(16, 16)(maps)
    assert not can_crop(maps.device)
    assert len(called) == 5


@pytest.mark.parametrize("asked", ["toy", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backend_is_a_class_and_a_line_in_the_registry(monkeypatch, no_extension, asked, compiled):
    monkeypatch.setitem(dispatch.BACKENDS, "toy", Toy())
    student, teacher = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    launched, forward = [], Plan.forward
    monkeypatch.setattr(Plan, "forward", lambda self, *a: launched.append("toy") or forward(self, *a))
    module = ftfast.FTLoss(weight=500.0, backend=asked)
    loss = (torch.compile(module, backend="eager", fullgraph=True) if compiled else module)(student, teacher)
    loss.backward()
    assert launched == ["toy"]
    exact = student.detach().double().requires_grad_()
    wanted = ftfast.reference.ft_loss(exact, teacher.double(), weight=500.0)
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert ftfast.explain(student, teacher).startswith("toy runs: operators of torch in float32")
    with pytest.raises(RuntimeError, match='backend "toy" cannot run: operators of torch'):
        ftfast.ft_loss(student.double(), teacher, backend="toy")


def test_unsupported_dtypes_have_a_reason():
    support = dispatch.supports("native", FACTOR.device, torch.complex64, torch.float32)
    assert not support.ok
    assert "complex64" in support.reason


def run(*command, start=Popen, **environment):
    return python(*command, start=start, env={**os.environ, **environment})


def test_info_tells_every_reason():
    done = run("-m", "ftfast", "info", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cpu = next(device for device in found["devices"] if device["device"] == "cpu")
    assert set(cpu["backends"]) == set(dispatch.BACKENDS)
    assert all(support["reason"] for support in cpu["backends"].values())
    text = run("-m", "ftfast", "info").stdout
    assert cpu["backends"]["native"]["reason"] in text


@pytest.mark.process
def test_check_exits_with_1_when_a_kernel_is_wrong(tmp_path):
    script = (
        "import torch; from ftfast.ops.ft_loss.native import LossPlan; right = LossPlan._scale\n"
        "LossPlan._scale = lambda *a: right(*a) * 1.001\n"
        "from ftfast.cli import main; raise SystemExit(main(['check', '--backend', 'native']))"
    )
    if load_extension()[0] is None:
        pytest.skip("no extension here")
    done = run("-c", script)
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    assert run("-m", "ftfast", "check", "--backend", "native").returncode == 0


@pytest.mark.process
def test_check_of_a_backend_that_cannot_run_exits_with_2(tmp_path):
    script = (
        "from ftfast import dispatch; from ftfast.cli import main; from ftfast.diagnosis import check\n"
        "check.supports = lambda *a: dispatch.Support(False, 'no C++ compiler was found')\n"
        "raise SystemExit(main(['check', '--backend', 'native']))"
    )
    done = run("-c", script)
    assert done.returncode == 2
    assert done.stderr.strip() == "ftfast check: error: native cannot run here: no C++ compiler was found."


@pytest.mark.process
@pytest.mark.parametrize(("wanted", "words"), [("triton", "cannot run"), ("bogus", "backend is 'bogus'")])
def test_info_explains_a_backend_that_the_environment_cannot_have(wanted, words):
    done = run("-m", "ftfast", "info", FTFAST_BACKEND=wanted)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_import_is_quick_and_needs_neither_triton_nor_the_compiler():
    script = (
        "import sys, torch; before = set(sys.modules); import ftfast; ftfast.FTLoss\n"
        "new = set(sys.modules) - before\n"
        "heavy = ('triton', 'torch._dynamo', 'torch._inductor', 'torchvision')\n"
        "print([name for name in new if name.startswith(heavy)])"
    )
    assert run("-c", script, start=subprocess.Popen).stdout.strip() == "[]"
