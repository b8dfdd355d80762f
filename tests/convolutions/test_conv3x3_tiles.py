"""The 3x3 convolution on matrix tiles and its weight gradient are float64's, whatever the sizes.

The kernels are compiled here with the tile instructions emulated, so that packing, loops and sums are tested on
processors without tiles, and run as they are where there are some.
"""

import copy
import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness.measuring import QUICK_PLAN
from bench.harness.registry import Settings
from bench.kernels import conv3x3 as bench
from bench.kernels.layers import WORKS, Layer
from ftfast import FactorTransfer, Paraphraser, Translator
from ftfast import extension as extension_module
from ftfast.backends.native import Native
from ftfast.commands import info
from ftfast.commands.tune.heads import HEADS
from ftfast.diagnosis import check_head
from ftfast.diagnosis.check_loss import relative_error
from ftfast.distillation.models.inference_graph import FusedConvolution
from ftfast.extension import extension, load_extension, why_no_tiles
from ftfast.ops import batch_norm
from ftfast.ops.conv3x3 import direct, native

pytestmark = pytest.mark.skipif(load_extension()[0] is None, reason="the extension is not built")

CPU = torch.device("cpu")
SOURCES = Path(__file__).resolve().parents[2] / "csrc"
COMPILED = ("cpu_amx/conv3x3.cpp", "cpu_amx/weight_gradient.cpp", "conv3x3/conv3x3_tiles.cpp")
COMPILED += ("conv3x3/conv3x3_tiles_gradient.cpp", "conv3x3/tile_permission.cpp")
# The kernels as the extension has them, but for the tiles.
HOST_PROGRAM = """
#include "conv3x3/conv3x3_tiles.h"
#include "conv3x3/tile_permission.h"

namespace ftfast {
namespace emulated {
TileKernels tile_kernels();
TileGradientKernels tile_gradient_kernels();
}
TileKernels tile_kernels() { return emulated::tile_kernels(); }
TileGradientKernels tile_gradient_kernels() { return emulated::tile_gradient_kernels(); }
}

using namespace ftfast;

extern "C" void conv3x3_tiles_(uint16_t* input, uint16_t* weight, float* bias, uint16_t* residual, uint16_t* result,
                               int64_t* sizes, float negative_slope, int threads) {
  conv3x3_tiles({input, weight, bias, residual, result, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                 negative_slope, threads});
}
extern "C" void pack_tiles_weight_(float* from, int64_t* strides, int64_t outputs, int64_t channels, bool for_gradient,
                                   uint16_t* to, int threads) {
  pack_tiles_weight(from, strides, outputs, channels, for_gradient, to, threads);
}
extern "C" void conv3x3_tiles_weight_gradient_(uint16_t* input, uint16_t* gradient, int64_t* sizes, float* result,
                                               int64_t* strides, int threads) {
  conv3x3_tiles_weight_gradient({input, gradient, result, {strides[0], strides[1], strides[2], strides[3]}, sizes[0],
                                 sizes[1], sizes[2], sizes[3], sizes[4], threads});
}
extern "C" const char* request_tiles_() { return request_tiles(); }
"""
AVX512_BF16 = "avx512f avx512bw avx512dq avx512vl fma f16c avx512bf16"


def processor_flags() -> list[str]:
    """Those of AVX512-BF16 where this processor has it, so that the kernels' vectors are what they are beside tiles."""
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text() if cpuinfo.exists() else ""
    return [f"-m{name}" for name in AVX512_BF16.split()] if re.search(r"\bavx512_bf16\b", known) else []


def compile_emulated(folder: Path, flags: list[str]) -> Path:
    """The library of these sources, compiled once."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler here")
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-Wno-psabi", *flags]
    command += [f"-I{SOURCES}", "-DFTFAST_EMULATED_TILES", "-DFTFAST_INSTRUCTION_SET=emulated"]
    digest = hashlib.sha256(" ".join([*command, HOST_PROGRAM]).encode())
    for source in sorted(path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h")):
        digest.update(source.read_bytes())
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            program, compiled = Path(aside) / "host.cpp", Path(aside) / "host.so"
            program.write_text(HOST_PROGRAM)
            sources = [str(program), *(str(SOURCES / name) for name in COMPILED)]
            subprocess.run([*command, *sources, "-o", str(compiled)], check=True)
            compiled.replace(library)
    return library


def as_extension(library: ctypes.CDLL) -> SimpleNamespace:
    """The library's functions with the arguments of the extension's."""

    def numbers(values: Any) -> Any:
        return (ctypes.c_int64 * len(values))(*values)

    def convolve(*given: Any) -> None:
        *addresses, slope, threads = (*map(ctypes.c_void_p, given[:5]), *given[10:])
        library.conv3x3_tiles_(*addresses, numbers(given[5:10]), ctypes.c_float(slope), ctypes.c_int(threads))

    def pack(weight: int, strides: Any, outputs: int, channels: int, gradient: bool, to: int, threads: int) -> None:
        sizes = ctypes.c_int64(outputs), ctypes.c_int64(channels), ctypes.c_bool(gradient)
        library.pack_tiles_weight_(
            ctypes.c_void_p(weight), numbers(strides), *sizes, ctypes.c_void_p(to), ctypes.c_int(threads)
        )

    def weight_gradient(x: int, dz: int, *rest: Any) -> None:
        *sizes, result, strides, threads = rest
        maps = ctypes.c_void_p(x), ctypes.c_void_p(dz)
        to = ctypes.c_void_p(result), numbers(strides), ctypes.c_int(threads)
        library.conv3x3_tiles_weight_gradient_(*maps, numbers(sizes), *to)

    library.request_tiles_.restype = ctypes.c_char_p
    return SimpleNamespace(
        **{name: getattr(extension(), name) for name in dir(extension()) if not name.startswith("_")}
        | {"conv3x3_tiles": convolve, "pack_tiles_weight": pack, "conv3x3_tiles_weight_gradient": weight_gradient},
        request_tiles=lambda: library.request_tiles_().decode(),
    )


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest) -> Callable[[bool], SimpleNamespace]:
    """The extension with emulated tiles, its vectors the processor's or plain C++."""

    @cache
    def load(plain_vectors: bool) -> SimpleNamespace:
        folder = Path(request.config.cache.mkdir("emulated_tiles"))
        flags = [] if plain_vectors else processor_flags()
        return as_extension(ctypes.CDLL(str(compile_emulated(folder, flags))))

    return load


PLAIN = "emulated in plain C++"
with_plain_vectors = pytest.mark.parametrize("kernels", ["emulated", PLAIN, "tiles"], indirect=True)


@pytest.fixture(params=["emulated", "tiles"])
def kernels(
    request: pytest.FixtureRequest, emulated: Callable[[bool], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """An extension whose tiles ftfast uses; ``calls`` counts what was asked of them."""
    if request.param == "tiles":
        if reason := why_no_tiles():
            pytest.skip(reason)
        found = SimpleNamespace(**{name: getattr(extension(), name) for name in dir(extension())})
    else:
        found = SimpleNamespace(**vars(emulated(request.param == PLAIN)))
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., None]:
        run = getattr(found, name)
        return lambda *given: (calls.update([name]), run(*given))[1]

    for name in ("conv3x3_tiles", "conv3x3_tiles_weight_gradient"):
        setattr(found, name, counted(name))
    found.calls = calls
    for module in (direct, native):
        monkeypatch.setattr(module, "extension", lambda: found)
    monkeypatch.setattr(direct, "FASTEST", direct.TILES)
    monkeypatch.setattr(native, "CANDIDATES", ("library", "native", direct.TILES))
    return found


ROUNDED_ONCE = 2**-8  # bfloat16's, and float32's sums below it
SUMMED = 1e-6
SIZES = [  # samples, channels, outputs, height, width
    pytest.param((2, 64, 64, 8, 8), id="64-channels"),
    pytest.param((3, 16, 48, 5, 3), id="half-tiles"),
    pytest.param((1, 48, 16, 1, 9), id="one-row"),
    pytest.param((5, 80, 80, 7, 1), id="one-column"),
    pytest.param((2, 32, 32, 1, 1), id="one-pixel"),
    pytest.param((1, 32, 16, 3, 40), id="wide"),
    pytest.param((36, 32, 32, 7, 7), id="many-samples"),
    pytest.param((15, 512, 16, 7, 7), id="two-bands"),
]


def maps(samples: int, channels: int, height: int, width: int, seed: int) -> Tensor:
    values = torch.randn(samples, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().contiguous(memory_format=torch.channels_last)


def weight_of(outputs: int, channels: int) -> Tensor:
    """Numbers that bfloat16 holds, in float32."""
    return torch.randn(outputs, channels, 3, 3, generator=torch.Generator().manual_seed(9)).bfloat16().float()


def with_threads(counts: tuple[int, ...], compute: Callable[[], Tensor]) -> list[Tensor]:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(compute())
        return results
    finally:
        torch.set_num_threads(threads)


@with_plain_vectors
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("kernels", "poisoned")
def test_convolution_bias_residual_and_activation_are_float64s(size: tuple[int, ...]) -> None:
    samples, channels, outputs, height, width = size
    x, residual = maps(samples, channels, height, width, 1), maps(samples, outputs, height, width, 2)
    weight, bias = weight_of(outputs, channels), torch.linspace(-3, 3, outputs)
    plain = F.conv2d(x.double(), weight.double(), padding=1)
    assert relative_error(direct.convolve(x, direct.pack(weight)), plain) < ROUNDED_ONCE
    for slope in (0.1, 0.0):
        found = direct.convolve(x, direct.pack(weight), bias, residual=residual, negative_slope=slope)
        assert found.is_contiguous(memory_format=torch.channels_last)
        expected = F.leaky_relu(plain + bias.double().view(-1, 1, 1) + residual.double(), slope)
        assert relative_error(found, expected) < ROUNDED_ONCE


@with_plain_vectors
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("kernels", "poisoned")
def test_both_gradients_are_float64s(size: tuple[int, ...]) -> None:
    samples, channels, outputs, height, width = size
    x, dz, weight = (
        maps(samples, channels, height, width, 3),
        maps(samples, outputs, height, width, 4),
        weight_of(outputs, channels),
    )
    exact = torch.ops.aten.convolution_backward(
        dz.double(), x.double(), weight.double(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    for_input = direct.convolve(dz, direct.pack(weight, for_gradient=True))
    assert relative_error(for_input, exact[0]) < ROUNDED_ONCE
    for parameter in (
        weight,
        weight.contiguous(memory_format=torch.channels_last),
        weight.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ):
        _, for_weight = native.gradients(x, dz, parameter, need_input=False, kernel="tiles")
        assert for_weight.stride() == parameter.stride()
        assert relative_error(for_weight, exact[1]) < SUMMED


@pytest.mark.usefixtures("kernels")
def test_a_weights_strides_and_dtype_do_not_matter() -> None:
    weight = weight_of(48, 80)
    for other in (weight.contiguous(memory_format=torch.channels_last), weight.bfloat16(), weight.double()):
        for for_gradient in (False, True):
            expected = direct.pack(weight, for_gradient=for_gradient)
            assert torch.equal(direct.pack(other, for_gradient=for_gradient).words, expected.words)


@pytest.mark.parametrize(
    "size", [(16, 64, 64, 8, 8), (1, 256, 96, 7, 7), (2, 32, 32, 24, 24)], ids=["bands", "outputs", "taps"]
)
@pytest.mark.usefixtures("kernels")
def test_the_number_of_threads_changes_no_bit(size: tuple[int, ...]) -> None:
    samples, channels, outputs, height, width = size
    x, dz, weight = (
        maps(samples, channels, height, width, 5),
        maps(samples, outputs, height, width, 6),
        weight_of(outputs, channels),
    )
    computations = (
        lambda: direct.pack(weight).words,
        lambda: direct.convolve(x, direct.pack(weight)),
        lambda: direct.convolve(dz, direct.pack(weight, for_gradient=True)),
        lambda: native.gradients(x, dz, weight, need_input=False, kernel="tiles")[1],
    )
    for compute in computations:
        first, *others = with_threads((1, 2, 3, 7, 7), compute)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.usefixtures("kernels")
def test_a_nan_reaches_its_neighbours_and_nobody_else() -> None:
    x = maps(3, 16, 6, 9, 5)
    x[1, 3, 0, 8] = float("nan")
    found = direct.convolve(x, direct.pack(weight_of(16, 16)), negative_slope=0.0).isnan()
    expected = torch.zeros_like(found)
    expected[1, :, :2, 7:] = True
    assert torch.equal(found, expected)
    dz = maps(3, 32, 6, 9, 6)
    dz[2, 7, 1, 2] = float("nan")
    _, for_weight = native.gradients(maps(3, 16, 6, 9, 5), dz, weight_of(32, 16), need_input=False, kernel="tiles")
    assert for_weight[7].isnan().all()
    assert for_weight.isnan().sum() == for_weight[7].numel()


def test_emulated_tiles_give_the_bits_of_the_processors(
    emulated: Callable[[bool], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := why_no_tiles():
        pytest.skip(reason)
    x, dz, weight = maps(3, 80, 7, 7, 1), maps(3, 48, 7, 7, 2), weight_of(48, 80)
    # Sums beside which bfloat16's smallest products are lost, and some that are subnormal.
    x[:, 5] *= 2.0**-60
    dz[:, 7] *= 2.0**-70

    def results() -> list[Tensor]:
        convolved = direct.convolve(x, direct.pack(weight, kernel="tiles"))
        return [convolved, *native.gradients(x, dz, weight, need_input=False, kernel="tiles")[1:]]

    here = results()
    for module in (direct, native):
        monkeypatch.setattr(module, "extension", lambda: emulated(False))
    assert all(torch.equal(one, other) for one, other in zip(here, results(), strict=True))


def errors_with_and_without(compute: Callable[[], list[Tensor]], exact: list[Tensor]) -> Iterator[tuple[float, float]]:
    """Of each result, and how far the library is off in the same place, where bfloat16 is what both are off by."""
    found = compute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "FASTEST", None)
        by_library = compute()
    for one, other, wanted in zip(found, by_library, exact, strict=True):
        yield relative_error(one, wanted), relative_error(other, wanted)


def test_the_head_is_computed_on_tiles(kernels: SimpleNamespace) -> None:
    """Both networks' three convolutions, three input gradients and three weight gradients."""
    torch.manual_seed(0)
    paraphraser, translator = Paraphraser(64, factor_channels=64).requires_grad_(False), Translator(64, 64)
    student, teacher = maps(4, 64, 4, 4, 1), maps(4, 64, 4, 4, 2)
    head = FactorTransfer(paraphraser, translator, p=2)

    def compute(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        own = copy.deepcopy(head).to(torch.promote_types(dtype, torch.float32))
        x = student.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = own(x, teacher.to(dtype))
        return [loss, *torch.autograd.grad(loss, [x, *own.translator.parameters()])]

    exact = compute(torch.float64)
    for error, by_library in errors_with_and_without(compute, exact):
        assert error < 1.5 * (by_library + ROUNDED_ONCE)
    assert kernels.calls == {"conv3x3_tiles": 9, "conv3x3_tiles_weight_gradient": 3}


def test_a_students_layer_and_a_frozen_one_are_computed_on_tiles(kernels: SimpleNamespace) -> None:
    torch.manual_seed(0)
    layer = batch_norm.Layer(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), relu=True)
    weight = layer.convolution.weight
    x, residual, upstream = maps(4, 64, 5, 5, 1).requires_grad_(), maps(4, 64, 5, 5, 2), maps(4, 64, 5, 5, 3)

    def compute() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = batch_norm.convolution_norm(layer, x, residual)
        frozen = FusedConvolution(copy.deepcopy(layer.convolution).bfloat16(), relu=True)(x.detach(), residual)
        return [frozen, y, *torch.autograd.grad(y, [x, weight], upstream)]

    exact_weight, exact_x = weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    convolved = F.conv2d(exact_x, exact_weight, padding=1)
    exact_y = F.relu(F.batch_norm(convolved, None, None, training=True) + residual.double())
    exact = torch.autograd.grad(exact_y, [exact_x, exact_weight], upstream.double(), retain_graph=True)
    for error, by_library in errors_with_and_without(compute, [F.relu(convolved + residual), exact_y, *exact]):
        assert error < 1.5 * (by_library + ROUNDED_ONCE)
    assert kernels.calls == {"conv3x3_tiles": 3, "conv3x3_tiles_weight_gradient": 1}


def test_tiles_compute_what_they_were_measured_faster_for(kernels: SimpleNamespace) -> None:
    def kernel_of(channels: int, outputs: int, dtype: torch.dtype = torch.bfloat16) -> tuple[str | None, ...]:
        works = direct.CONVOLUTION, direct.WEIGHT_GRADIENT
        return tuple(direct.kernel_for(work, dtype, channels, outputs) for work in works)

    assert kernel_of(64, 512) == ("tiles", "tiles")
    for sizes in ((64, 32), (32, 64), (72, 64), (64, 100)):
        assert kernel_of(*sizes) == (None, None)
    assert kernel_of(64, 64, torch.float32) == (None, None)
    assert native.weight_gradient_kernel(maps(2, 64, 4, 4, 0), 64) == "tiles"
    assert native.weight_gradient_kernel(maps(2, 32, 4, 4, 0), 64) == "library"
    with pytest.raises(ValueError, match=r"kernel is 'tiles', which takes multiples of 16 channels, not 24 and 16"):
        native.gradients(
            maps(2, 24, 4, 4, 0), maps(2, 16, 4, 4, 0), weight_of(16, 24), need_input=False, kernel="tiles"
        )


def test_an_empty_batch_has_an_empty_result_and_a_gradient_of_zeros(kernels: SimpleNamespace) -> None:
    x, weight = maps(0, 32, 4, 4, 0), weight_of(16, 32)
    y = direct.convolve(x, direct.pack(weight))
    assert y.shape == (0, 16, 4, 4)
    assert not native.gradients(x, y, weight, need_input=False, kernel="tiles")[1].any()


def test_check_has_a_head_that_tiles_compute(kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_head, "why_no_tiles", str)
    monkeypatch.setattr(check_head, "SHAPES", {})
    found = list(check_head.check_heads(Native(), CPU))
    assert {outcome.dtype for outcome in found} == {"float32", "bfloat16"}
    assert all(outcome.ok for outcome in found)
    assert kernels.calls["conv3x3_tiles"] >= 9


def test_the_bench_has_each_kernel_beside_the_library(kernels: SimpleNamespace) -> None:
    settings = Settings(CPU, (), (), (), (), QUICK_PLAN, heads=(HEADS["cifar-r56-r20"],))
    assert {Layer(128, 64, 64, 8, 8), Layer(128, 32, 32, 16, 16)} <= set(bench.layers(settings))
    found = bench.candidates(settings, Layer(4, 32, 48, 5, 5), torch.bfloat16)
    for name in (bench.LIBRARY, bench.TILES, bench.DOT_PRODUCTS):
        assert [candidate.work for candidate in found if candidate.name == name] == list(WORKS)
    for candidate in found:
        if candidate.name == bench.TILES:
            assert candidate.gate().passed
    assert kernels.calls == {"conv3x3_tiles": 2, "conv3x3_tiles_weight_gradient": 1}


def test_linux_that_refuses_tiles_is_a_reason(
    emulated: Callable[[bool], SimpleNamespace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = emulated(False).request_tiles()
    if why_no_tiles() == "the processor has none":
        assert re.fullmatch(r"Linux does not give them to this process: [A-Z].*", asked)
    refusal = "Linux does not give them to this process: Invalid argument"
    without = SimpleNamespace(instruction_set=lambda: "avx512", conv3x3_direct=None, why_no_tiles=lambda: refusal)
    for module in (extension_module, direct):
        monkeypatch.setattr(module, "load_extension", lambda: (without, "compiled extension"))
    assert direct._fastest() == direct.DIRECT  # oneDNN has no tiles either
    assert why_no_tiles() == refusal
    monkeypatch.setattr(info, "load_extension", lambda: (without, "compiled extension"))
    assert info.collect()["extension"]["matrix_tiles"] == f"not used: {refusal}"


def test_tiles_that_the_library_alone_has_leave_it_the_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    without = SimpleNamespace(conv3x3_direct=None, why_no_tiles=lambda: "")
    for module in (extension_module, direct):
        monkeypatch.setattr(module, "load_extension", lambda: (without, "compiled extension"))
    assert direct._fastest() is None
    monkeypatch.setattr(extension_module, "build_report", lambda: {"without_amx": "g++ does not compile for them"})
    assert why_no_tiles() == "g++ does not compile for them"
    monkeypatch.setenv("FTFAST_INSTRUCTION_SET", "avx512")
    assert why_no_tiles() == "FTFAST_INSTRUCTION_SET is 'avx512'"
    without.conv3x3_tiles = None
    assert (direct._fastest(), why_no_tiles()) == (direct.TILES, "")
