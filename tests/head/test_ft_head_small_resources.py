"""What the compiler makes of the single-pass head's kernels, read from the machine code; no GPU is needed."""

import os
import re
from itertools import pairwise

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("with TRITON_INTERPRET=1 kernels are interpreted, not compiled", allow_module_level=True)
pytest.importorskip("triton", reason="the package triton is not installed")

from bench.machine_code.compiling import ARCHITECTURES, compile_launch
from bench.machine_code.shipped.ft_head_small import HEADS, launches_of, refusal
from ftfast.kernels.ft_head import ft_head_small_shape

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "head",
    [HEADS[0], *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[1:])],
    ids=str,
)
def test_nothing_spills_and_tensor_cores_multiply(head, architecture):
    if reason := refusal(head, architecture):
        assert "Triton" in reason
        assert architecture == 100
        pytest.skip(reason)
    for launch in launches_of(*head, architecture=architecture):
        assert not compile_launch(launch, architecture).problems(tensor_cores=True)


@pytest.mark.parametrize("architecture", [80, 90])
def test_every_shipped_head_fits(architecture):
    for head in HEADS:
        assert not refusal(head, architecture)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((9, 9, 64, 64, 32), "pixels"),
        ((8, 8, 64, 64, 256), "factor"),
        ((8, 8, 512, 64, 32), "teacher's 512"),
        ((8, 8, 64, 512, 32), "student's 512"),
        ((8, 8, 192, 64, 32), "power of two"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(sizes, reason):
    assert reason in ft_head_small_shape.small_head_fits(CPU, torch.bfloat16, *sizes)


def test_the_scratch_is_read_after_every_thread_has_written_it():
    *sizes, dtype = HEADS[0]
    forward, _, weight_gradients = launches_of(*sizes, dtype)
    ptx = compile_launch(forward, 90).ptx.partition(".acq_rel")[0]
    # Each of the four maps between convolutions: stores, a barrier, and only then loads of it.
    stores = [found.start() for found in re.finditer(r"st\.global", ptx)]
    barriers = [found.start() for found in re.finditer(r"bar\.sync", ptx)]
    loads = [found.start() for found in re.finditer(r"cp\.async|ld\.global", ptx)]
    without = []
    for first, second in pairwise(stores):
        between = [load for load in loads if first < load < second]
        if between and not any(first < barrier < between[0] for barrier in barriers):
            without.append(first)
    assert len(without) <= 1  # where one side's code ends and the other's begins: no program runs both
    for launch, arrivals in ((forward, 2), (weight_gradients, 3)):
        ptx = compile_launch(launch, 90).ptx
        counts = list(re.finditer(r"atom\S*\.acq_rel\S*\.add", ptx))
        assert len(counts) == arrivals  # forward: of the sides of an image, of the images; then a layer each
        for count in counts:
            assert ptx.rindex("bar.sync", 0, count.start()) > ptx.rindex("st.global", 0, count.start())
            assert "ld.global.cg" in ptx[count.end() :]


def test_each_side_of_an_image_has_a_program_of_its_own():
    *sizes, dtype = HEADS[0]
    forward, *_ = launches_of(*sizes, dtype)
    samples = forward.arguments["samples"]
    assert forward.grid == (2 * samples,)
    assert forward.arguments["counters"].numel() == samples + 1
