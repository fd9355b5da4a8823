"""Files of a model repository on the Hugging Face hub, fetched where the user asks for it.

A transfer that was cut goes on where it stopped, also in a later process, and each file is checked before it takes its
name. huggingface_hub would begin anew and compare no SHA-256, which a file of 0.8 GB over a clinic's line needs both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from MedRationaleLib import __version__
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import file_sha256

HUB = "https://huggingface.co"
TIMEOUT_S = 30.0
"""Silence after which a connection counts as cut."""
ATTEMPTS = 5
"""Cuts in a row without a byte in between after which the transfer is given up."""
CHUNK = 1 << 20
NETWORK = (URLError, ConnectionError, TimeoutError, HTTPException, ssl.SSLError)
"""What a connection ends with; every other OSError is the disk's."""
Progress = Callable[[str, int, int], None]
"""(file, bytes that are there, bytes in all)."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """Some files of one revision of a repository."""

    name: str
    """"owner/name"."""
    revision: str
    """Commit, so that nobody can change what is fetched."""
    files: tuple[str, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)
    """File -> its SHA-256, where it is known beforehand; the others are held to what the hub says of them."""

    @property
    def page(self) -> str:
        """Where a person finds the files."""
        return f"{endpoint()}/{self.name}/tree/{self.revision}"


BIOMEDCLIP = Repository(
    name="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    revision="9f341de24bfb00180f1b847274256e9b65a3a32e",
    files=(
        "open_clip_config.json",
        "vocab.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "open_clip_pytorch_model.bin",
    ),
    sha256={"open_clip_pytorch_model.bin": "52cc993c5c5ff962bd0c60931874bc001e7e9b41666a385530f4a036294576be"},
)
"""MIT; the commit of January 2025, whose weights are those of November 2023."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file as the hub describes it."""

    name: str
    size: int
    """Bytes."""
    sha256: str | None
    """None for small files, of which the hub tells git's hash only."""
    git_sha1: str | None


@dataclass(frozen=True, kw_only=True)
class Download:
    """What is going to be fetched into a folder: made by `look_up`, so that its size can be told first."""

    repository: Repository
    folder: Path
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def present(self) -> int:
        """Bytes of them that are there already, in part files too."""
        return sum(min(_length(self.folder / f.name) or _length(_part(self.folder, f)), f.size) for f in self.files)

    def run(self, progress: Progress, *, wait: Callable[[float], None] = time.sleep) -> None:
        """Fetch what is missing and check every file; a file that is not what it should be is removed and named."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            path, part = self.folder / file.name, _part(self.folder, file)
            if _length(path) == file.size and _fault(path, file) is None:
                progress(file.name, file.size, file.size)
                continue
            try:
                _transfer(self.repository, file, part, progress, wait)
            except NETWORK as error:
                raise _unreachable(self.repository, error) from error
            except OSError as error:
                raise InputError(
                    f"Expected room for {file.size / 1e6:.0f} MB in {self.folder}, where the file is kept, got "
                    f"'{error.strerror or error}'; free some space, or set TORCH_HOME to another folder."
                ) from error
            if fault := _fault(part, file):
                part.unlink()
                raise InputError(
                    f"Expected {file.name} of {self.repository.name} with {fault}; what was fetched has been removed: "
                    f"try again, or put the file from {self.repository.page} into a folder and name that."
                )
            part.replace(path)


def endpoint() -> str:
    """The hub's address, or that of a mirror in HF_ENDPOINT, as in the hub's own tools."""
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def look_up(repository: Repository, folder: Path) -> Download:
    """Ask the hub for sizes and hashes. Raises InputError with what to do by hand where it cannot be reached."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise _unreachable(repository, ConnectionError("HF_HUB_OFFLINE is set"))
    url = f"{endpoint()}/api/models/{repository.name}/tree/{repository.revision}"
    try:
        with urlopen(_request(url), timeout=TIMEOUT_S) as response:
            listed = {row["path"]: row for row in json.load(response)}
        files = tuple(_remote_file(listed[name], repository) for name in repository.files)
    except InputError:
        raise
    except NETWORK as error:
        raise _unreachable(repository, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"Expected the list of files of {repository.name} at {url}, got another answer ({type(error).__name__}: "
            f"{error}); {_by_hand(repository)}."
        ) from error
    return Download(repository=repository, folder=folder, files=files)


def _remote_file(row: Mapping[str, Any], repository: Repository) -> RemoteFile:
    name = str(row["path"])
    stored = row.get("lfs") or {}
    sha256, known = stored.get("oid"), repository.sha256.get(name)
    if sha256 and known and sha256 != known:
        raise InputError(
            f"Expected {name} of {repository.name} with SHA-256 {known}, got {sha256} in the hub's list; "
            f"nothing was fetched, {_by_hand(repository)}."
        )
    return RemoteFile(
        name=name,
        size=int(stored.get("size", row["size"])),
        sha256=known or sha256,
        git_sha1=None if stored else row.get("oid"),
    )


def _transfer(
    repository: Repository, file: RemoteFile, part: Path, progress: Progress, wait: Callable[[float], None]
) -> None:
    """Bring `part` to its full length, from where it is."""
    url = f"{endpoint()}/{repository.name}/resolve/{repository.revision}/{quote(file.name)}"
    if _length(part) > file.size:
        part.unlink()
    failed = 0
    while (have := _length(part)) < file.size:
        progress(file.name, have, file.size)
        try:
            _append(_request(url, start=have), part, have, file, progress)
            error: Exception = ConnectionError("the connection was cut")
        except HTTPError as answer:
            if answer.code < 500 and answer.code not in (408, 416, 429):
                raise
            if answer.code == 416:  # the part is of another file
                part.unlink()
            error = answer
        except NETWORK as cut:
            error = cut
        failed = 0 if _length(part) > have else failed + 1
        if failed >= ATTEMPTS:
            raise ConnectionError(str(error))
        if _length(part) < file.size:
            wait(1.0)
    progress(file.name, file.size, file.size)


def _append(request: Request, part: Path, have: int, file: RemoteFile, progress: Progress) -> None:
    """Read one answer to its end, or to where it is cut."""
    with urlopen(request, timeout=TIMEOUT_S) as response:
        goes_on = response.status == 206 and f"bytes {have}-" in response.headers.get("Content-Range", "")
        with part.open("ab" if goes_on else "wb") as out:
            have = have if goes_on else 0
            while have < file.size and (chunk := response.read(min(CHUNK, file.size - have))):
                out.write(chunk)
                have += len(chunk)
                progress(file.name, have, file.size)


def _fault(path: Path, file: RemoteFile) -> str | None:
    """What was expected and what came, where the content is not the file's; None where it is, or cannot be told."""
    if file.sha256:
        got = file_sha256(path)
        return None if got == file.sha256 else f"SHA-256 {file.sha256}, got {got}"
    if file.git_sha1 and re.fullmatch("[0-9a-f]{40}", file.git_sha1):
        content = path.read_bytes()
        got = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        return None if got == file.git_sha1 else f"git's hash {file.git_sha1}, got {got}"
    return None


def _request(url: str, start: int = 0) -> Request:
    headers = {"User-Agent": f"medrationale/{__version__}", "Accept-Encoding": "identity"}
    return Request(url, headers=headers | ({"Range": f"bytes={start}-"} if start else {}))


def _part(folder: Path, file: RemoteFile) -> Path:
    return folder / f"{file.name}.part"


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _unreachable(repository: Repository, error: Exception) -> InputError:
    reason = " ".join(str(getattr(error, "reason", None) or error).split())
    return InputError(
        f"Expected an answer of {endpoint()}, got '{reason}'; what was fetched so far is kept: repeat the command when "
        f"online, or {_by_hand(repository)}."
    )


def _by_hand(repository: Repository) -> str:
    return (
        f"put {', '.join(repository.files)} from {repository.page} into a folder and name it with --biomedclip FOLDER"
    )
