"""Writing: whole or not at all, and never over somebody else's files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from MedRationaleLib import files
from MedRationaleLib.errors import InputError


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


def write_run(folder: Path, contents: dict[str, str]) -> None:
    with files.staged_folder(folder) as stage:
        for name, text in contents.items():
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(text)
        manifest = {"generator": files.GENERATOR, "files": list(contents)}
        (stage / files.MANIFEST).write_text(json.dumps(manifest))


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.seg.nrrd"
    with files.atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == tmp_path and temporary.name.endswith(".seg.nrrd")
    assert target.read_text(encoding="utf-8") == "half"
    assert [p.name for p in tmp_path.iterdir()] == ["a.seg.nrrd"]


def test_a_failure_keeps_the_earlier_file_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "first")
    with pytest.raises(RuntimeError), files.atomic_path(target) as temporary:
        temporary.write_text("second, half")
        raise RuntimeError("interrupted")
    assert tree(tmp_path) == {"a.txt": "first"}


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "is full"), (errno.EACCES, "may write")])
def test_a_full_disk_or_a_forbidden_folder_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, code: int, words: str
) -> None:
    with pytest.raises(InputError, match=words), files.staged_folder(tmp_path / "new" / "out") as stage:
        (stage / "a.txt").write_text("half")
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_a_new_output_folder_appears_at_once_with_its_parents(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with files.staged_folder(out) as stage:
        (stage / "a.txt").write_text("a")
        assert not out.exists()
    assert tree(tmp_path) == {"deep/out/a.txt": "a"}


def test_a_second_run_replaces_its_own_files_and_keeps_those_of_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(out, {"report.html": "1", "evidence/old.nrrd": "1", "evidence/both.nrrd": "1"})
    (out / "notes.txt").write_text("mine")
    write_run(out, {"report.html": "2", "evidence/both.nrrd": "2"})
    left = tree(out)
    left.pop(files.MANIFEST)
    assert left == {"report.html": "2", "evidence/both.nrrd": "2", "notes.txt": "mine"}


def test_a_foreign_file_of_the_same_name_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(InputError, match="report.html"):
        write_run(tmp_path, {"report.html": "theirs"})
    assert tree(tmp_path) == {"report.html": "mine"}


def test_a_manifest_of_another_program_gives_no_leave_to_replace(tmp_path: Path) -> None:
    (tmp_path / files.MANIFEST).write_text(json.dumps({"generator": "other", "files": ["report.html"]}))
    with pytest.raises(InputError, match="manifest.json"):
        files.check_writable(tmp_path)


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    manifest = {"generator": files.GENERATOR, "files": ["../secret.txt", "/etc/passwd", "report.html"]}
    (tmp_path / files.MANIFEST).write_text(json.dumps(manifest))
    assert files.written_files(tmp_path) == {"report.html", files.MANIFEST}


def test_a_failure_while_files_are_exchanged_brings_the_earlier_run_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, {"a.txt": "1", "b.txt": "1"})
    before = tree(tmp_path)
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 5:
            raise OSError(errno.EIO, "device failed")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(InputError, match="device failed"):
        write_run(tmp_path, {"a.txt": "2", "b.txt": "2"})
    assert tree(tmp_path) == before


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for use in (files.check_writable, lambda path: files.staged_folder(path).__enter__()):
        with pytest.raises(InputError, match="choose another name"):
            use(tmp_path / "out")


def test_checking_a_folder_leaves_nothing_in_it(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on file sizes that stands in for a full disk is POSIX")
def test_an_image_that_does_not_fit_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
import numpy as np, SimpleITK as sitk
from MedRationaleLib import files, segmentation_io
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
image = sitk.GetImageFromArray(np.random.default_rng(0).random((4, 64, 64)).astype(np.float32))
for limit in (0, 300, 30000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with files.staged_folder(Path(sys.argv[1]) / "out") as stage:
            segmentation_io.write_nrrd(stage / "a.nrrd", image)
        print("no error", limit)
    except files.InputError as error:
        sys.stderr.write(f"{error}\\n")
"""
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=root, capture_output=True, encoding="utf-8", timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "" and run.stderr.count("nothing was left there") == 3
    assert list(tmp_path.iterdir()) == []
