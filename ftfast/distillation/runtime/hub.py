"""The Hugging Face Hub, through huggingface_hub: files by their address, and a folder of files to be published.

An address is ``hf://owner/name[/path/to/file][@revision]``.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ftfast.errors import DistillError, shown

PREFIX = "hf://"
MODEL_FILE = "model.safetensors"  # where an address names none
_REPOSITORY = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]{,94}\w)?", re.ASCII)


class HubError(DistillError):
    """Something that cannot be had from the Hub, or published there."""


class Address(NamedTuple):
    """A file on the Hub; without a revision that of the main branch."""

    repository: str
    file: str
    revision: str | None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}/{self.file}" + f"@{self.revision}" * (self.revision is not None)


def is_address(text: str) -> bool:
    """Whether it names a file on the Hub rather than one here."""
    return text.startswith(PREFIX)


def pinned(text: str) -> str:
    """An address with its file and commit, which later calls find in the cache; the file is fetched.

    Raises:
        HubError: it cannot be had.
    """
    address = _parse(text)
    path = _fetch(address)
    # The cache keeps a commit's files in snapshots/<commit>.
    above = path.parts[: len(path.parts) - len(Path(address.file).parts)]
    return str(address._replace(revision=above[-1]))


def local(text: str) -> Path:
    """The file that a path or an address names, fetched where it is on the Hub and not here yet.

    Raises:
        HubError: it cannot be had.
    """
    return _fetch(_parse(text)) if is_address(text) else Path(text)


def check_writable(repository: str) -> None:
    """Raises HubError where :func:`publish` would end without having written anything, as far as can be known."""
    if not _REPOSITORY.fullmatch(repository):
        raise HubError(f"push is {shown(repr(repository))}; it takes owner/name.")
    library = _library(f"push is {repository!r}")
    if library.get_token() is None:
        raise HubError(
            f"push is {repository!r}, and there is no token for the Hub; run hf auth login, or set HF_TOKEN."
        )
    with _translated(repository):
        library.HfApi().model_info(repository)


def publish(folder: Path, repository: str, message: str) -> str:
    """Puts a folder's files into a model's repository, in one commit; returns the commit's address.

    Raises:
        HubError: it cannot be written.
    """
    with _translated(repository):
        api = _library(f"push is {repository!r}").HfApi()
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message).commit_url)


def _parse(text: str) -> Address:
    path, _, revision = text.removeprefix(PREFIX).partition("@")
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    strays = file != "" and not {"", ".", ".."}.isdisjoint(file.split("/"))
    if not _REPOSITORY.fullmatch(f"{owner}/{name}") or ("@" in text and not revision) or strays:
        raise HubError(
            f"{shown(text)} is no address on the Hub; it takes {PREFIX}owner/name[/path/to/file][@revision]."
        )
    return Address(f"{owner}/{name}", file or MODEL_FILE, revision or None)


def _fetch(address: Address) -> Path:
    library = _library(str(address))
    with _translated(str(address)):
        return Path(library.hf_hub_download(address.repository, address.file, revision=address.revision))


def _library(asked: str) -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise HubError(f"{asked}, which needs the package huggingface_hub; pip install 'ftfast[hub]'.") from None
    return huggingface_hub


@contextmanager
def _translated(asked: str) -> Iterator[None]:
    """What the library and the network below it raise, as one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        reason = "its owner gives access to those who ask on its page; do that, and run hf auth login"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or your token may not see it; mend the name, or make it there first"
    except errors.RevisionNotFoundError:
        reason = "the repository has no such revision"
    except errors.LocalEntryNotFoundError:
        reason = "the Hub cannot be reached, and the file is not in the cache"
    except errors.EntryNotFoundError:
        reason = "the repository has no such file"
    except errors.HfHubHTTPError as error:
        answer = getattr(error.response, "status_code", None)
        refused = "your token may not do that; give one that may, by hf auth login or HF_TOKEN"
        reason = refused if answer in (401, 403) else f"the Hub answers {_first_line(error)}"
    except Exception as error:  # of the network, whose library differs from version to version
        reason = f"the Hub cannot be reached ({_first_line(error)})"
    else:
        return
    raise HubError(f"{asked}: {reason}.")


def _first_line(error: Exception) -> str:
    return shown((str(error).strip() or type(error).__name__).partition("\n")[0].rstrip("."))
