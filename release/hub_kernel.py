"""Lays out the loss as Hugging Face's package ``kernels`` loads it: ``python release/hub_kernel.py FOLDER``.

The layout holds the sources that ``ftfast.loss`` imports, as they are but for three things: they import each other
relatively, since a kernel has no name of its own to be imported by; their library operators have a namespace of their
own, so that an installed ftfast, or another version of the kernel, may be loaded beside it; and the head is left out,
which the loss never asks for.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "ftfast.loss"
LEFT_OUT = "ftfast.ops.ft_head"
NAME = "ftfast-loss"
# Raised whenever a call that worked would no longer work.
API_VERSION = 1
# On CPUs the reference computes: C++ would need a build for each system.
BACKENDS = ("cpu", "cuda")
REASON = "ftfast's loss was loaded by the package kernels, which brings no C++ extension; pip install ftfast has it"

INIT = '''"""The factor transfer loss (Kim, Park, Kwak, NeurIPS 2018) in Triton, with autograd."""

from .dispatch import explain
from .loss import FTLoss, ft_loss

__version__ = "{version}"
__all__ = ["FTLoss", "explain", "ft_loss"]
'''

CARD = """---
library_name: kernels
license: mit
tags: [kernels, knowledge-distillation, factor-transfer]
---
# The factor transfer loss

`ft_loss` and `FTLoss` of ftfast {version}, in Triton on GPUs of compute capability 8.0 or newer and in plain PyTorch
elsewhere, with gradients for both factors. No package but torch and the triton that comes with it is needed.

```python
from pathlib import Path

import torch
from kernels import get_local_kernel

loss = get_local_kernel(Path("{name}"))
student_factor = torch.randn(8, 64, 8, 8, requires_grad=True)
teacher_factor = torch.randn(8, 64, 8, 8)
loss.ft_loss(student_factor, teacher_factor).backward()
```
"""


def source_of(module: str) -> Path | None:
    """The file of a module of the checkout; None where the name is none of a module."""
    stem = ROOT.joinpath(*module.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def imported_by(module: str, text: str, is_package: bool) -> set[str]:
    """The names that a source imports, inside its functions too; those of modules and those of what modules hold.

    Raises:
        ValueError: ``import ftfast...``, which has no relative form.
    """
    home = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "ftfast" for alias in node.names):
            raise ValueError(f"{module} has 'import ftfast' in line {node.lineno}; write 'from ftfast import ...'.")
        if isinstance(node, ast.ImportFrom):
            above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def sources() -> dict[str, Path]:
    """Every module that the loss needs, ftfast itself left out, and its file."""
    found: dict[str, Path] = {}
    waiting = {ENTRY}
    while waiting:
        module = waiting.pop()
        path = source_of(module)
        if path is None or module in found or module.startswith(LEFT_OUT) or not module.startswith("ftfast."):
            continue
        found[module] = path
        waiting |= imported_by(module, path.read_text(), path.name == "__init__.py")
    return found


def made_relative(module: str, path: Path, namespace: str) -> str:
    """A source's text with relative imports and with its operators in ``namespace``."""
    dots = "." * (module.count(".") + (path.name == "__init__.py"))
    text = re.sub(r"(?m)^(\s*)from ftfast\.?([\w.]*) import", rf"\1from {dots}\2 import", path.read_text())
    text = re.sub(r'import_module\("ftfast\.([\w.]+)"\)', rf'import_module("{dots}\1", __package__)', text)
    return text.replace('"ftfast::', f'"{namespace}::').replace("torch.ops.ftfast.", f"torch.ops.{namespace}.")


def version() -> str:
    """ftfast's version."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "ftfast" / "__init__.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def write(folder: Path) -> None:
    """Writes the layout into ``folder``, whose ``build`` is replaced."""
    modules = sources()
    digest = hashlib.sha256(b"".join(path.read_bytes() for _, path in sorted(modules.items()))).hexdigest()[:12]
    shutil.rmtree(folder / "build", ignore_errors=True)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        identifier = f"ftfast_loss_{backend}_{digest}"
        for module, path in modules.items():
            target = variant.joinpath(*module.split(".")[1:])
            target = target / "__init__.py" if path.name == "__init__.py" else target.with_suffix(".py")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(made_relative(module, path, identifier))
        (variant / "__init__.py").write_text(INIT.format(version=version()))
        (variant / "_build_report.json").write_text(json.dumps({"reason": REASON}) + "\n")
        metadata = {"name": NAME, "id": identifier, "version": API_VERSION, "license": "MIT"}
        metadata |= {"python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (folder / "README.md").write_text(CARD.format(version=version(), name=NAME))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path, help="where the layout goes; made where it is missing")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)
    print(f"{folder}: {len(sources())} sources for {' and '.join(BACKENDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
