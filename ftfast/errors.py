"""The errors that end a command with one sentence and exit status 2."""

# Ends advice to change a setting: --resume goes on with the same settings alone.
IN_A_NEW_RUN = "in a new --output, with --teacher-checkpoint <this --output>/teacher"
_MOST_SHOWN = 200


def shown(text: str) -> str:
    """A name or ``repr`` from a file, as a sentence or a terminal can take it, on one line.

    What does not print, such as a terminal's escape codes, is escaped, and the middle of what is long is left out.
    """
    return printable(
        text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN // 2]} ... {text[-_MOST_SHOWN // 2 :]}"
    )


def printable(text: str) -> str:
    """The same, whole: a path may hold bytes that are no text in UTF-8, which no terminal and no file of text takes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class DistillError(ValueError):
    """A request that cannot be met, said in one sentence.

    Attributes:
        is_final: the same command would meet it again, so torchrun's restarts end at once.
        is_shared: all processes of the run have it from the first one, which says it.
    """

    is_final = True
    is_shared = False


class SettingsError(DistillError):
    """A setting outside what is taken, or settings that differ from those of the run to be resumed."""


class CheckpointError(DistillError):
    """A checkpoint that is cut short, of another model, newer than this version, or not plain tensors."""


class RunFolderError(DistillError):
    """An output folder that cannot be written or holds something else."""


class ParaphraserError(DistillError):
    """A paraphraser whose factors say nothing about the images."""


class LostProcessError(DistillError):
    """A run of several processes, one of which no longer answers."""

    is_final = False


class StoreError(DistillError):
    """A factor store that is unfinished, damaged, of something else, or newer than this version."""


class DataError(DistillError):
    """A data set that is not there, cannot be downloaded, or is not as its makers published it."""

    is_final = False  # a file system comes back, and so does a process that read for want of memory
