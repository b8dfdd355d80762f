"""A stand-in for huggingface_hub in this process: a Hub that is a folder, with one commit after another."""

import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class HfHubHTTPError(OSError):
    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.response = SimpleNamespace(status_code=status)


class RepositoryNotFoundError(HfHubHTTPError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(HfHubHTTPError):
    pass


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(FileNotFoundError, EntryNotFoundError):
    pass


ERRORS = (
    *(HfHubHTTPError, RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError),
    *(EntryNotFoundError, LocalEntryNotFoundError),
)


class Hub:
    """What is on the Hub, and what is in the cache here.

    Attributes:
        fails: what every call raises, which has to reach the network.
        token: of who is logged in.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.fails: Exception | None = None
        self.token: str | None = "a token"
        self.commits: dict[str, list[str]] = {}

    def make(self, repository: str) -> None:
        self.commits[repository] = []

    def commit(self, repository: str, files: dict[str, Path]) -> str:
        commit = f"{len(self.commits[repository]):040x}"
        self.commits[repository].append(commit)
        for name, path in files.items():
            place = self._folder / "hub" / repository / commit / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        return commit

    def read(self, repository: str, name: str) -> Path:
        return self._folder / "hub" / repository / self.commits[repository][-1] / name

    def hf_hub_download(self, repo_id: str, filename: str, revision: str | None = None) -> str:
        cache = self._folder / "cache" / f"models--{repo_id.replace('/', '--')}" / "snapshots"
        if revision is not None and (cache / revision / filename).exists():
            return str(cache / revision / filename)
        self._reach(repo_id)
        commits = self.commits[repo_id]
        commit = commits[-1] if revision in (None, "main") else revision
        if commit not in commits:
            raise RevisionNotFoundError(404)
        source = self._folder / "hub" / repo_id / commit / filename
        if not source.exists():
            raise EntryNotFoundError(filename)
        (cache / commit / filename).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(source, cache / commit / filename))

    def get_token(self) -> str | None:
        return self.token

    def HfApi(self) -> Any:
        return SimpleNamespace(model_info=self._reach, upload_folder=self._upload)

    def _upload(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        self._reach(repo_id)
        assert commit_message
        commit = self.commit(repo_id, {path.name: path for path in Path(folder_path).iterdir()})
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{commit}")

    def _reach(self, repo_id: str) -> None:
        if self.fails is not None:
            raise self.fails
        if repo_id not in self.commits:
            raise RepositoryNotFoundError(404)


def put_in_place(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Hub:
    """A Hub with nothing on it."""
    hub, module, errors = Hub(folder), ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    vars(errors).update({error.__name__: error for error in ERRORS})
    vars(module).update(
        {"errors": errors, "hf_hub_download": hub.hf_hub_download, "HfApi": hub.HfApi, "get_token": hub.get_token}
    )
    for each in (module, errors):
        each.__spec__ = ModuleSpec(each.__name__, None)
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return hub
