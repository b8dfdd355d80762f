"""The command line, ``ftfast`` or ``python -m ftfast``: a table of commands, each imported when it runs."""

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from ftfast import __version__

# Name: what it does, and the module that has add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "info": ("versions, devices, and each backend with its reason", "ftfast.commands.info"),
    "check": ("every kernel that runs here against the float64 reference", "ftfast.diagnosis.check"),
    "distill": ("train a teacher, its paraphraser, and students by several methods", "ftfast.commands.distill"),
    "store": ("factors of fixed views on disk, from which students train without a teacher", "ftfast.commands.store"),
    "tune": ("measure which kernels are fastest here, and keep the choice", "ftfast.commands.tune.command"),
    "evaluate": ("the test accuracy of a checkpoint, and what is taken for what", "ftfast.commands.evaluate"),
    "features": ("a model's layers with the shapes of what they give", "ftfast.commands.features"),
    "convert": (
        "a paraphraser's or translator's checkpoint under another project's names",
        "ftfast.commands.convert",
    ),
    "export": (
        "a trained student by itself, as safetensors or a program of torch.export, here or on the Hub",
        "ftfast.commands.export",
    ),
}
BAD_INPUT, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        _say(f"{self.prog}: error: {message.rstrip('.')}; see {self.prog} --help.")
        self.exit(BAD_INPUT)


class _Stderr(io.TextIOWrapper):
    """Loses what cannot be written, to a full disk or a terminal that is gone: a training says much and goes on."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the words after ``ftfast``; the process's own by default.

    Returns:
        The exit status: the command's, 2 for bad input, 130 for an interruption.
    """
    open_closed_streams()
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the sign for "plus or minus" is no reason to stop
    if argv is None and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Stderr(sys.stderr.buffer, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        prog="ftfast",
        description="Factor Transfer distillation with fused kernels.",
        epilog="commands:\n"
        + "\n".join(f"  {name:10}{summary}" for name, (summary, _) in COMMANDS.items())
        + "\n\n'ftfast COMMAND --help' tells the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="ftfast [--help] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"ftfast {__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    options = parser.parse_args(words[:1])
    if options.command is None:
        parser.print_help()
        return 0
    if options.command not in COMMANDS:
        parser.error(f"command is {options.command!r}; it takes {', '.join(COMMANDS)}")
    return _run_command(options.command, words[1:])


def _run_command(name: str, words: list[str]) -> int:
    summary, home = COMMANDS[name]
    parser = _Parser(prog=f"ftfast {name}", description=summary, allow_abbrev=False)
    try:
        module = importlib.import_module(home)
        module.add_arguments(parser)
        status = int(module.run(parser.parse_args(words)))
        sys.stdout.flush()  # a full disk is met here, where it can still be said
        return status
    except ValueError as error:
        from ftfast.errors import DistillError

        if not isinstance(error, DistillError):
            raise
        _say(f"{parser.prog}: error: {error}", error)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "ftfast", "torch"):
            raise
        if package in sys.stdlib_module_names:  # fcntl and resource, which Windows has not
            _say(f"{parser.prog}: error: it needs Python's module {package}, which {sys.platform} has not; use Linux.")
            return BAD_INPUT
        _say(f"{parser.prog}: error: it needs the package {package}; pip install 'ftfast[distill]'.")
        return BAD_INPUT
    except KeyboardInterrupt as interruption:
        advice = f": {interruption}." if str(interruption) else "."
        _say(f"{parser.prog}: interrupted{advice}", interruption)
        return getattr(interruption, "status", INTERRUPTED)
    except BrokenPipeError:  # the reader has had enough (ftfast ... | head)
        _discard_stdout()
        return 0
    except OSError as error:
        where = f"{os.fspath(error.filename)!s}: " if isinstance(error.filename, str | os.PathLike) else ""
        _say(f"{parser.prog}: error: {where}{(error.strerror or str(error)).rstrip('.')}.", error)
        if error.filename is None:
            _discard_stdout()
        return BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        size = f": it {asked[0].lower()}" if asked else ""
        _say(f"{parser.prog}: error: the memory does not suffice{size}; take smaller models or batches.")
        return BAD_INPUT


def _say(sentence: str, error: BaseException | None = None) -> None:
    """To standard error; of torchrun's processes one says what several meet, and each what it alone meets."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        is_first = os.environ.get("RANK", "0") == "0"
        if getattr(error, "is_shared", False):
            says = is_first
        else:
            from ftfast.distillation.runtime.torchrun import is_first_to_say

            known = is_first_to_say(sentence)
            # Who cannot ask says an error twice rather than never; an interruption is everybody's.
            says = (is_first or not isinstance(error, KeyboardInterrupt)) if known is None else known
        if not says:
            return
    print(sentence, file=sys.stderr)


def open_closed_streams(program: str = "ftfast") -> None:
    """Python has None for a standard stream that is closed; what would go there is discarded.

    The number of a closed one goes to the next file that is opened, and must not be that of a checkpoint.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if "stdout" in closed:
        print(f"{program}: warning: standard output is closed, and what would go there is lost.", file=sys.stderr)


def _discard_stdout() -> None:
    """What is still buffered for standard output would fail again at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    # By name: torch's own class would import torch, and its CPU allocator raises a plain RuntimeError.
    signs = ("DefaultCPUAllocator", "Storage size calculation overflowed")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(sign in str(error) for sign in signs)
