"""Writing files so that a failed run leaves nothing behind: temporary names first, then one rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from MedRationaleLib.errors import InputError

MANIFEST = "manifest.json"
GENERATOR = "MedRationale"
"""What `manifest.json` says under "generator", so that a later run knows which files it may replace."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, with the same suffixes; it takes the name `path` on success only.

    Raises InputError where the folder is not writable or the disk is full; nothing half-written stays.
    """
    path = Path(path)
    with _reported(path.parent):
        handle, name = tempfile.mkstemp(prefix=".medrationale-", suffix="".join(path.suffixes), dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def staged_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; its files move into `folder` when the block ends without an exception.

    A new `folder` appears by one rename. In an existing one, only files that an earlier run listed under "files" in
    its manifest.json are replaced or removed; a foreign file of the same name is refused before anything is written.
    """
    folder = Path(folder).absolute()
    home = _home(folder)
    with _reported(folder):
        stage = Path(tempfile.mkdtemp(prefix=".medrationale-", dir=home))
        try:
            yield stage
            stage.chmod(0o777 & ~_umask())
            if folder.is_dir():
                _replace_contents(stage, folder)
            else:
                folder.parent.mkdir(parents=True, exist_ok=True)
                os.replace(stage, folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def check_writable(folder: str | Path, names: Collection[str] = (MANIFEST,)) -> None:
    """Raise InputError if `staged_folder(folder)` could not write files of these names there: asked before the long
    work, not after it."""
    folder = Path(folder).absolute()
    with _reported(folder), tempfile.TemporaryDirectory(prefix=".medrationale-", dir=_home(folder)):
        _refuse_foreign(folder, set(names), written_files(folder))


def _home(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists; refuses a file in either place."""
    home = next(path for path in (folder, *folder.parents) if path.exists())
    if not home.is_dir():
        got = f"the file {folder}" if home == folder else f"{folder} below the file {home}"
        raise InputError(f"Expected an output folder, got {got}: choose another name.")
    return home


def written_files(folder: Path) -> set[str]:
    """Relative paths of the files that an earlier run left in `folder`, by its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    if not isinstance(manifest, dict) or manifest.get("generator") != GENERATOR:
        return set()
    names = {str(name) for name in manifest.get("files", ())} | {MANIFEST}
    return {name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts}


def _refuse_foreign(folder: Path, new: set[str], old: set[str]) -> None:
    foreign = sorted(name for name in new - old if (folder / name).exists())
    if foreign:
        raise InputError(
            f"Expected to write {', '.join(foreign[:3])} in {folder}, where a file of that name is not "
            "from MedRationale: choose another output folder or move that file."
        )


def _replace_contents(stage: Path, folder: Path) -> None:
    """Put the files of `stage` in the place of those of the earlier run; on a failure, put the earlier ones back."""
    new = {path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()}
    old = written_files(folder)
    _refuse_foreign(folder, new, old)
    with tempfile.TemporaryDirectory(prefix=".medrationale-", dir=folder) as backup:
        moved: list[tuple[Path, Path]] = []

        def move(source: Path, target: Path) -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            moved.append((source, target))

        try:
            for name in sorted(old):
                if (folder / name).is_file():
                    move(folder / name, Path(backup) / name)
            for name in sorted(new):
                move(stage / name, folder / name)
        except BaseException:  # also an interrupt: the earlier run's files come back before it goes on
            for source, target in reversed(moved):
                source.parent.mkdir(parents=True, exist_ok=True)
                os.replace(target, source)
            raise
    for parent in {(folder / name).parent for name in old - new} - {folder}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """OSError -> InputError with one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"Expected room for the results in {folder}, but the disk or the quota is full: "
                "free some space or choose another output folder; nothing was left there."
            ) from error
        raise InputError(
            f"Expected to write in {folder}, but {error.strerror or error}: "
            "choose a folder that you may write to; nothing was left there."
        ) from error


def _umask() -> int:
    """The process's umask, which temporary files ignore; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
