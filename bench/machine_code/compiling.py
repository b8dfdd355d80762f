"""What Triton makes of a launch, read from the machine code; no GPU is needed.

Launchers run on CPU tensors with a recorder in the kernel's place, so what is compiled is what they ask for::

    with recorded(module, "_name_kernel") as launches:
        module.launcher(torch.empty(...), ...)
    machine = compile_launch(launches[0], 90)
    assert not machine.problems()
    assert machine.tensor_core_instructions > 0
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

# Bytes that a block may ask for, by compute capability.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
ARCHITECTURES = tuple(SHARED_LIMIT)
REGISTERS_PER_BLOCK = 65536
# Triton's metadata counts columns of 32 bits by 128 lanes.
TENSOR_MEMORY_COLUMNS = 512

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"(?:HGMMA|QGMMA|IGMMA|HMMA|QMMA|OMMA|IMMA|DMMA|UTC\w*MMA)\b")
_LOCAL_MEMORY = re.compile(r"(?:LDL|STL)\b")
# A warp group's product whose left operand is in registers, and a wait that lets some products go on.
_REGISTER_OPERAND = re.compile(r"\bHGMMA\.\S+ R\d+, R\d+, gdesc")
_PENDING = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb\d, 0x[1-9a-f]")


class Launch(NamedTuple):
    """One recorded launch: the kernel, its grid, its arguments by name, its options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """A compiled launch.

    Attributes:
        architecture: the compute capability times ten.
        warps: of a program, those included that the compiler adds.
        registers, stack: of a thread, the stack in bytes.
        shared: bytes of shared memory of a program.
        tensor_memory: columns of tensor memory of a program, 0 where there is none.
        sass, ptx: the machine code and what it was assembled from.
    """

    architecture: int
    warps: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    sass: str = field(repr=False)
    ptx: str = field(repr=False)

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction stands in the machine code, by its full name such as ``LDG.E.128``."""
        return Counter(_INSTRUCTION.findall(self.sass))

    def count(self, pattern: str) -> int:
        """How many instructions have a name that begins with the regular expression ``pattern``."""
        return sum(number for name, number in self.opcodes.items() if re.match(pattern, name))

    @property
    def instructions(self) -> int:
        """How many instructions there are."""
        return self.opcodes.total()

    @property
    def tensor_core_instructions(self) -> int:
        """HMMA, HGMMA, QGMMA, UTC*MMA and the like."""
        return self.count(_TENSOR_CORE.pattern)

    def problems(self, *, tensor_cores: bool = False) -> list[str]:
        """Why the launch should not be shipped, one phrase each; empty where it may.

        Args:
            tensor_cores: it has to use them.
        """
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if spills := self.count(_LOCAL_MEMORY.pattern):
            found.append(f"{spills} instructions on local memory")
        limit = SHARED_LIMIT[self.architecture]
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory (limit {limit})")
        # The register file is handed out in eights.
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        if registers > REGISTERS_PER_BLOCK:
            found.append(f"{registers} registers in a program (limit {REGISTERS_PER_BLOCK})")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{self.tensor_memory} columns of tensor memory (limit {TENSOR_MEMORY_COLUMNS})")
        # The next step of a loop would load the operand into registers that a product of this one still reads.
        if _REGISTER_OPERAND.search(self.sass) and _PENDING.search(self.sass):
            found.append("products that may still run while their operands' registers are written")
        if tensor_cores and not self.tensor_core_instructions:
            found.append("no tensor-core instruction")
        return found


class _Recorder:
    """Stands in for a kernel: takes its launches down and launches nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __getitem__(self, grid: Any) -> Any:
        def record(*positional: Any, **named: Any) -> None:
            names = self._kernel.arg_names
            arguments = dict(zip(names, positional, strict=False))
            options = {name: named.pop(name) for name in list(named) if name not in names}
            arguments |= named
            self._launches.append(Launch(self._kernel, grid(arguments) if callable(grid) else grid, arguments, options))

        return record


def interpreting() -> bool:
    """Whether kernels are interpreted in this process (TRITON_INTERPRET=1), so that none can be compiled."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def kernel_names(module: ModuleType) -> list[str]:
    """The kernels of a module that are launched, not called by other kernels: by convention ``_*_kernel``."""
    from triton.runtime.jit import JITFunction

    return [name for name, value in vars(module).items() if name.endswith("_kernel") and isinstance(value, JITFunction)]


@contextmanager
def replaced(module: ModuleType, **attributes: Any) -> Iterator[None]:
    """Put other values in the place of a module's, such as ``capability=lambda device: 80`` of a table of tiles."""
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def recorded(module: ModuleType, *names: str) -> Iterator[list[Launch]]:
    """Collect what the launchers of a module would launch, and launch nothing.

    Launchers that call those of another module need a ``recorded`` for that module too.

    Args:
        module: where the launchers find their kernels.
        names: of the kernels, default: :func:`kernel_names`.

    Yields:
        The launches, in their order; the list grows as launchers are called.

    Raises:
        RuntimeError: in Triton's interpreter.
    """
    if interpreting():
        raise RuntimeError("With TRITON_INTERPRET=1 kernels are interpreted, not compiled; unset it.")
    launches: list[Launch] = []
    recorders = {name: _Recorder(getattr(module, name), launches) for name in names or kernel_names(module)}
    with replaced(module, **recorders):
        yield launches


def _bind(launch: Launch, architecture: int) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Backend, arguments, their types and specialisations, and options, as Triton's runtime finds them at a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", architecture, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    arguments, specialisation, options = bind(**launch.arguments, **launch.options)
    return backend, arguments, specialisation, options


def cache_key(launch: Launch, architecture: int = 90) -> tuple[str, ...]:
    """What Triton finds a compiled kernel by: types, specialisations of values and addresses, constants, options.

    Launches with equal keys share a kernel; no second compilation happens between them.
    """
    _, _, specialisation, options = _bind(launch, architecture)
    return launch.kernel.__name__, str(specialisation), str(sorted(options.items()))


def compile_launch(launch: Launch, architecture: int) -> Machine:
    """Compile a launch for sm_80, sm_90 or sm_100 (``architecture`` 80, 90, 100), as its first call on a GPU would.

    Types, constants and alignments are read from the recorded arguments: tensors, numbers, tuples, constexprs,
    ``TensorDescriptor``. Memory of CPU tensors starts at multiples of 64 bytes, as that of a GPU does.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arguments, specialisation, options = _bind(launch, architecture)
    _, signature, constants, attributes = launch.kernel._pack_args(
        backend, dict(options), arguments, specialisation, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _dump(cubin, "--dump-resource-usage")
        sass = _dump(cubin, "-sass")
    registers, stack = (
        max(int(number) for number in re.findall(rf"\b{what}:(\d+)", usage)) for what in ("REG", "STACK")
    )
    metadata = compiled.metadata
    return Machine(
        architecture=architecture,
        warps=getattr(metadata, "ws_num_warps", None) or metadata.num_warps,
        registers=registers,
        stack=stack,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        sass=sass,
        ptx=compiled.asm["ptx"],
    )


def _dump(cubin: Path, option: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, option, cubin], capture_output=True, text=True, check=True).stdout
