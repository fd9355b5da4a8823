"""Many examinations: what a folder or a manifest has, what comes of each, and what a failure or a kill leaves."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dicom_samples import write_examination
from test_cli import ROOT, WRITTEN, FakePredictor, sentence
from test_study import adc_map, save, volume

from MedRationaleLib import files, output
from MedRationaleLib.batch import COLUMNS, LOCK_FILE
from MedRationaleLib.cli import main
from MedRationaleLib.decision_tree import DecisionTree

TREE = DecisionTree.load()


class Model(FakePredictor):
    """Finds nothing, remembers which examinations it saw, and fails at those that it is told."""

    answers = ()

    def __init__(self, **faults: BaseException) -> None:
        super().__init__()
        self.faults, self.loaded, self.seen, self.studies, self.verdicts = faults, 0, [], [], []

    def load(self, name: str, *, device: str, **how: object) -> Model:
        self.loaded += 1
        return super().load(name, device=device)

    def assess(self, study, **options):
        self.seen.append(study.patient["id"])
        self.studies.append(study)
        self.verdicts.append(options["dce"])
        self.fault = self.faults.get(study.patient["id"])
        return super().assess(study, **options)


class Finder(Model):
    """Finds two lesions everywhere."""

    answers = FakePredictor.answers


def make_case(folder: Path, prefix: str = "", dwi: str = "hbv", seed: int = 0) -> Path:
    """Three small images in a folder, which they may share with others."""
    folder.mkdir(parents=True, exist_ok=True)
    start = f"{prefix}_" if prefix else ""
    for name, image in (("t2w", volume(seed=seed)), ("adc", adc_map()), (dwi, volume(40.0, seed=seed + 1))):
        save(image, folder / f"{start}{name}.mha")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has tests of its own, and every examination's tree is the same."""
    monkeypatch.setattr(output, "build_report", lambda assessment: "<html></html>")
    monkeypatch.setattr(DecisionTree, "load", lambda *args: TREE)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    for seed, name in enumerate("abc"):
        make_case(folder / name, dwi="dwi", seed=seed)
    return folder


@pytest.fixture
def three(drawn: Path, tmp_path: Path) -> Path:
    """A folder with the examinations a, b and c."""
    return Path(shutil.copytree(drawn, tmp_path / "in"))


@pytest.fixture
def one(drawn: Path, tmp_path: Path) -> Path:
    """A folder with the examination b."""
    shutil.copytree(drawn / "b", tmp_path / "in" / "b")
    return tmp_path / "in"


def batch(given: Path, output: Path, *options: object, model: FakePredictor | None = None) -> int:
    arguments = ["batch", "--input", given, "--output", output, *options]
    return main([*map(str, arguments)], load=(model or Model()).load)


def summary(output: Path) -> list[dict[str, str]]:
    with (output / "summary.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def statuses(output: Path) -> dict[str, str]:
    return {row["id"]: row["status"] for row in summary(output)}


# ---------------------------------------------------------------- what is an examination


def test_a_folder_has_case_folders_plain_files_and_dicom_beside_each_other(tmp_path):
    given, output, model = tmp_path / "in", tmp_path / "out", Finder()
    make_case(given / "picai", "10_11")
    make_case(given / "plain", dwi="dwi")
    write_examination(given / "scanner" / "series" / "deep")
    (given / ".hidden").mkdir()
    (given / "readme.txt").write_text("no examination")
    assert batch(given, output, model=model) == 0
    assert statuses(output) == dict.fromkeys(("picai", "plain", "scanner"), "done")
    assert model.loaded == 1 and model.seen == ["10", "plain", "P1"]
    assert all({path.name for path in (output / name).iterdir()} == WRITTEN for name in statuses(output))


def test_files_of_many_examinations_in_one_folder_are_told_apart_by_their_prefix(tmp_path):
    given, model = make_case(tmp_path / "in", "10_11"), Model()
    make_case(given, "10_12", seed=3)
    (given / "10_12_adc.mha").unlink()
    save(volume(), given / "10_12_sag.mha")
    save(volume(), given / "._10_12_adc.mha")
    assert batch(given, tmp_path / "out", model=model) == 0
    assert statuses(tmp_path / "out") == {"10_11": "done", "10_12": "done"}
    first, second = model.studies
    assert first.missing == () and second.missing == ("adc",)  # which the other examination's file does not fill
    assert second.patient == {"id": "10", "study_id": "12"}


def test_a_patients_folder_with_two_examinations_is_both(tmp_path):
    for prefix in ("10_11", "10_12"):
        make_case(tmp_path / "in" / "10", prefix)
    make_case(tmp_path / "in" / "20", "20_21")
    assert batch(tmp_path / "in", tmp_path / "out") == 0
    assert list(statuses(tmp_path / "out")) == ["10_11", "10_12", "20"]


def test_a_sequence_twice_under_one_prefix_is_refused_for_that_examination_alone(tmp_path):
    given = make_case(make_case(tmp_path / "in", "10_11"), "10_12")
    save(volume(7.0), given / "10_11_t2w.nii.gz")
    assert batch(given, tmp_path / "out") == 1
    failed, done = summary(tmp_path / "out")[:2]
    assert failed["error"].startswith("T2W: expected one file in") and done["status"] == "done"


def test_an_output_folder_among_the_examinations_is_none_of_them(three):
    for _ in range(2):
        assert batch(three, three / "results") == 0
    assert list(statuses(three / "results")) == ["a", "b", "c"]
    assert batch(three, three.parent / "elsewhere") == 0  # nor are the results of another run
    assert list(statuses(three.parent / "elsewhere")) == ["a", "b", "c"]


def test_files_of_many_examinations_may_get_their_results_beside_them(tmp_path):
    given = make_case(make_case(tmp_path / "in", "10_11"), "10_12")
    for _ in range(2):
        assert batch(given, given) == 0
    assert list(statuses(given)) == ["10_11", "10_12"]


def test_results_beside_dicom_files_do_not_hide_them(tmp_path):
    write_examination(tmp_path / "in" / "x")
    folder = str(tmp_path / "in" / "x")
    assert main(["predict", "--dicom", folder, "--out", folder], load=Model().load) == 0
    write_examination(tmp_path / "in" / "y")
    (tmp_path / "in" / "y" / "summary.csv").write_text("of the scanner")
    assert batch(tmp_path / "in", tmp_path / "out") == 0
    assert list(statuses(tmp_path / "out")) == ["x", "y"]


MANIFESTS = {
    "files": ("id,t2w,adc,dwi,b_value", "{name},in/{name}/t2w.mha,in/{name}/adc.mha,in/{name}/dwi.mha,1400"),
    "case": ("id,case", "{name},in/{name}"),
    "no ADC": ("dwi,t2w,id", "in/{name}/dwi.mha,in/{name}/t2w.mha,{name}"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_names_the_files_relative_to_itself(kind, three, tmp_path, monkeypatch):
    header, row = MANIFESTS[kind]
    lines = [f" {header}", *(row.format(name=name) for name in "ca"), ",,", ""]
    manifest, model = tmp_path / "list.CSV", Model()
    manifest.write_text("\n".join(lines[: 3 if kind == "case" else 5]), encoding="utf-8-sig")
    monkeypatch.chdir(three)
    assert batch(manifest, tmp_path / "out", model=model) == 0
    assert list(statuses(tmp_path / "out")) == model.seen == ["c", "a"]
    assert model.studies[0].missing == (("adc",) if kind == "no ADC" else ())
    assert model.studies[0].provenance["dwi"].b_value == (1400 if kind == "files" else None)


@pytest.mark.parametrize("kind", ["files", "case"])
def test_a_manifest_tells_psa_and_dce_where_they_are_known(kind, three, tmp_path):
    header, row = MANIFESTS[kind]
    known = {"a": ",6.2,", "b": ",,Positive", "c": ",,"}
    lines = [f"{header},psa,dce", *(row.format(name=name) + more for name, more in known.items())]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    model = Model()
    assert batch(tmp_path / "list.csv", tmp_path / "out", model=model) == 0
    assert [study.patient.get("psa_ng_ml") for study in model.studies] == [6.2, None, None]
    assert model.verdicts == ["not available", "positive", "not available"]


def test_resume_does_again_what_another_psa_came_to(three, tmp_path):
    manifest, model = tmp_path / "list.csv", Model()
    for psa in ("", "7", "7"):
        manifest.write_text(f"id,case,psa\na,in/a,{psa}\n")
        assert batch(manifest, tmp_path / "out", "--resume", model=model) == 0
    assert [study.patient.get("psa_ng_ml") for study in model.studies] == [None, 7.0]


def test_a_manifest_of_dicom_folders(tmp_path):
    write_examination(tmp_path / "d")
    (tmp_path / "list.csv").write_text("id,dicom\nx,d\n")
    assert batch(tmp_path / "list.csv", tmp_path / "out") == 0
    assert statuses(tmp_path / "out") == {"x": "done"}


def test_what_a_manifest_names_and_is_missing_fails_alone(three, tmp_path):
    (tmp_path / "list.csv").write_text("id,t2w,adc\nx,in/x/t2w.mha,\ny,,in/a/adc.mha\nz,in/a/t2w.mha,in/a/adc.mha\n")
    assert batch(tmp_path / "list.csv", tmp_path / "out") == 1
    x, y, z = summary(tmp_path / "out")[:3]
    assert "which does not exist" in x["error"] and y["error"].startswith("T2W: expected an axial T2W of 'y', got ADC")
    assert z["status"] == "done"


BAD_MANIFESTS = {
    "empty": ("", "Expected the columns id and t2w"),
    "no rows": ("id,case\n", "Expected a row for each examination"),
    "no id": ("name,case\nx,in/a\n", "got name, case in"),
    "no input": ("id,b_value\nx,800\n", "got id, b_value in"),
    "two kinds": ("id,case,dicom\nx,in/a,\n", "got id, case, dicom in"),
    "unknown column": ("id,case,colour\nx,in/a,red\n", "got id, case, colour in"),
    "column twice": ("id,case,case\nx,in/a,in/b\n", "got id, case, case in"),
    "semicolons": ("id;case\nx;in/a\n", "got id;case in .*; save it with commas between the columns"),
    "id twice": ("id,case\nx,in/a\nX,in/b\n", "got 'X' twice"),
    "no name": ("id,case\n,in/a\n", "line 2 .*got ''"),
    "a path": ("id,case\nx,in/a\n../x,in/b\n", r"line 3 .*got '\.\./x'"),
    "hidden": ("id,case\n.x,in/a\n", "can name a folder"),
    "the summary's name": ("id,case\nSummary.csv,in/a\n", "can name a folder"),
    "no path": ("id,case\nx,\n", "Expected a path in line 2"),
    "too many cells": ("id,case\nx,in/a,1\n", "Expected 2 cells in line 2 .* got 3"),
    "b-value": ("id,case,b_value\nx,in/a,high\n", "b-value above 0 .*got 'high'"),
    "b-value of nan": ("id,case,b_value\nx,in/a,nan\n", "b-value above 0"),
    "PSA": ("id,case,psa\nx,in/a,0\n", "PSA above 0 and up to 100,000 ng/ml in line 2 .*got '0'"),
    "PSA that is too high": ("id,case,psa\nx,in/a,1e6\n", "PSA above 0 and up to 100,000 .*got '1e6'"),
    "b-value without a DWI": ("id,t2w,dwi,b_value\nx,a.mha,,800\n", "DWI beside the b-value in line 2"),
    "several lines": ("id,case,psa\nx,a,low\ny,b,7\nz,c,-1\n../w,d,\n", "line 2 .*Also wrong: lines 4, 5"),
    "DCE": ("id,case,dce\nx,in/a,maybe\n", "DCE that is positive, negative or empty in line 2 .*got 'maybe'"),
    "open quotation": ('id,case\nx,"in/a\n', "to be a CSV file"),
    "not UTF-8": (b"id,case\n\xff\xfe,in/a\n", "CSV file in UTF-8"),
}


@pytest.mark.parametrize("bad", BAD_MANIFESTS)
def test_a_wrong_manifest_is_one_sentence_and_nothing_is_begun(bad, tmp_path, capsys):
    text, words = BAD_MANIFESTS[bad]
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    model = Model()
    assert batch(tmp_path / "list.csv", tmp_path / "out", model=model) == 2
    assert re.search(words, sentence(capsys.readouterr().err)) and model.loaded == 0
    assert [path.name for path in tmp_path.iterdir()] == ["list.csv"]


def test_input_that_holds_no_examination_is_one_sentence(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("")
    for given, words in (("in", "Expected examinations in"), ("in/notes.txt", "another kind"), ("no", "nothing there")):
        assert batch(tmp_path / given, tmp_path / "out") == 2
        assert words in sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_one_id_for_two_examinations_is_refused(tmp_path, capsys):
    for site in "xy":
        for prefix in ("10_11", "10_12"):
            make_case(tmp_path / "in" / site, prefix)
    assert batch(tmp_path / "in", tmp_path / "out") == 2
    assert "got '10_11' twice" in sentence(capsys.readouterr().err)


def test_results_are_kept_apart_from_examinations(three, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("id,case\na,in/b\nb,in/c\n")
    for given, results in ((three, three), (three, three / "a"), (tmp_path / "list.csv", three)):
        assert batch(given, results) == 2
        assert "output folder apart from the examinations" in sentence(capsys.readouterr().err)


def test_a_foreign_summary_or_a_file_in_the_way_is_refused_before_the_model_is_loaded(three, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.csv").write_text("mine\n")
    model = Model()
    for name, words in (("out", "not from MedRationale"), ("in/a/t2w.mha", "apart from"), ("file", "got the file")):
        (tmp_path / "file").write_text("")
        assert batch(three, tmp_path / name, model=model) == 2
        assert words in sentence(capsys.readouterr().err)
    assert model.loaded == 0 and (tmp_path / "out" / "summary.csv").read_text() == "mine\n"


# ---------------------------------------------------------------- what comes out


def test_the_summary_has_a_row_for_each_finding(three, tmp_path):
    assert batch(three, tmp_path / "out", model=Finder()) == 0
    rows = summary(tmp_path / "out")
    assert tuple(rows[0]) == COLUMNS and [row["id"] for row in rows] == ["a", "a", "b", "b", "c", "c"]
    record = json.loads((tmp_path / "out" / "a" / "assessment.json").read_text(encoding="utf-8"))
    for row, finding in zip(rows, record["findings"], strict=False):
        assert row["finding"] == finding["id"] and row["findings"] == "2" and row["error"] == ""
        assert (row["zone"], row["sector"]) == (finding["zone"], finding["sector"])
        for name in ("size_mm", "volume_ml", "likelihood", "t2w_score", "dwi_score", "pirads"):
            assert float(row[name]) == finding[name]
        assert row["dwi_inferred"] == "False"
        assert row["gland_ml"] == "51.9" and float(row["seconds"]) >= 0
        assert int(row["warnings"]) == len(record["study"]["warnings"]) > 0


def test_each_warning_is_told_once_and_so_are_results_that_are_not_of_this_batch(three, tmp_path, capsys):
    assert batch(three, tmp_path / "out") == 0
    told = capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "a" / "assessment.json").read_text(encoding="utf-8"))
    assert record["study"]["warnings"]
    assert all(told.count(f"    Warning: {warning}\n") == 1 for warning in record["study"]["warnings"])
    assert "earlier batch" not in told
    shutil.rmtree(three / "a")
    assert batch(three, tmp_path / "out") == 0
    assert "also holds results of 1 that an earlier batch read" in capsys.readouterr().err
    assert statuses(tmp_path / "out") == dict.fromkeys("bc", "done") and (tmp_path / "out" / "a").is_dir()


def test_the_summary_tells_a_dwi_score_that_is_inferred(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    save(volume(), tmp_path / "in" / "a" / "t2w.mha")
    assert batch(tmp_path / "in", tmp_path / "out", model=Finder()) == 0
    assert {row["dwi_inferred"] for row in summary(tmp_path / "out")} == {"True"}


def test_an_examination_without_a_finding_has_a_row_too(three, tmp_path, capsys):
    assert batch(three, tmp_path / "out") == 0
    rows = summary(tmp_path / "out")
    assert [(row["id"], row["findings"], row["finding"], row["pirads"]) for row in rows][0] == ("a", "0", "", "")
    assert len(rows) == 3 and "[1/3] a: no suspicious lesion" in capsys.readouterr().err


def test_each_examination_is_a_line_where_there_is_no_terminal(three, tmp_path, capsys):
    assert batch(three, tmp_path / "out", model=Finder(b=MemoryError())) == 1
    printed = capsys.readouterr()
    path = (tmp_path / "out" / "summary.csv").resolve()
    assert printed.out == f"2 of 3 examinations done, 1 failed: {path}\n"
    first, second, third = [line for line in printed.err.splitlines() if line.startswith("[")]
    assert first.startswith("[1/3] a: 2 findings, PI-RADS 5 (") and third.startswith("[3/3] c: 2 findings")
    assert second.startswith("[2/3] b: failed: out of memory")
    assert batch(three, tmp_path / "out", "--quiet", model=Model(b=MemoryError())) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{path}\n" and [line[:7] for line in printed.err.splitlines()] == ["[2/3] b"]


def test_in_a_terminal_a_bar_shows_how_far_the_batch_is(three, tmp_path, monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    with open(tmp_path / "screen", "wb") as raw:
        monkeypatch.setattr(sys, "stderr", Terminal(raw))
        assert batch(three, tmp_path / "out", model=Model(c=KeyError("gland"))) == 1
    screen = (tmp_path / "screen").read_text(encoding="utf-8")
    assert "[1/3] a: no suspicious lesion" in screen and "3/3" in screen and "left" in screen
    assert "c: failed: this is a fault of the programme" in " ".join(screen.split())


def test_manifests_tell_the_command_line_and_what_was_asked(one, tmp_path):
    options = ("--retrieval", "slice", "--decision-tree", "paper_appendix_c", "--model", "other", "--device", "cpu")
    model = Model()
    assert batch(one, tmp_path / "out", *options, model=model) == 0
    manifest = json.loads((tmp_path / "out" / "b" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["command_line"].startswith("medrationale batch --input") and "read" in manifest["timings_s"]
    assert manifest["request"]["retrieval"] == "slice" and manifest["request"]["weights_sha256"] == "0" * 64
    assert (model.asked.model, model.asked.device, model.asked.tree) == ("other", "cpu", "paper_appendix_c")


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
        (ImportError("No module named 'x'"), "medrationale doctor"),
    ],
)
def test_a_fault_is_recorded_in_one_sentence_and_the_batch_goes_on(fault, words, three, tmp_path):
    assert batch(three, tmp_path / "out", model=Model(a=fault)) == 1
    rows = summary(tmp_path / "out")
    assert rows[0]["status"] == "failed" and words in rows[0]["error"] and rows[0]["findings"] == ""
    assert statuses(tmp_path / "out") == {"a": "failed", "b": "done", "c": "done"}
    assert not (tmp_path / "out" / "a").exists()


def test_an_examination_that_cannot_be_read_is_recorded_and_the_batch_goes_on(three, tmp_path):
    (three / "a" / "t2w.mha").write_bytes(b"no image")
    (three / "b" / "t2w.mha").unlink()
    (three / "d").mkdir()
    assert batch(three, tmp_path / "out") == 1
    assert statuses(tmp_path / "out") == {"a": "failed", "b": "failed", "c": "done", "d": "failed"}
    assert all(row["error"].endswith(".") for row in summary(tmp_path / "out") if row["status"] == "failed")


def test_a_folder_that_may_not_be_looked_into_fails_alone(three, tmp_path, monkeypatch):
    listed = Path.iterdir

    def iterdir(self: Path):
        if self == three / "b":
            raise PermissionError(13, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert batch(three, tmp_path / "out") == 1
    assert statuses(tmp_path / "out") == {"a": "done", "b": "failed", "c": "done"}
    assert "got 'Permission denied'" in summary(tmp_path / "out")[1]["error"]


def test_debug_shows_the_traceback_of_a_failure(three, tmp_path, caplog):
    caplog.set_level("INFO", "MedRationaleLib")
    assert batch(three, tmp_path / "out", "--debug", model=Model(a=KeyError("gland"))) == 1
    assert "Traceback" in caplog.text


def test_a_summary_that_cannot_be_written_ends_the_batch(three, tmp_path, monkeypatch, capsys):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    assert batch(three, tmp_path / "out") == 2
    assert "the disk or the quota is full" in sentence(capsys.readouterr().err)


# ---------------------------------------------------------------- interrupted, killed, resumed


def test_an_interrupt_keeps_what_is_done_and_resume_goes_on(three, tmp_path, capsys):
    assert batch(three, tmp_path / "out", model=Model(b=KeyboardInterrupt())) == 130
    assert "interrupted; the results of 1 of 3 examinations are kept" in capsys.readouterr().err.splitlines()[-1]
    assert statuses(tmp_path / "out") == {"a": "done"}
    model = Model()
    assert batch(three, tmp_path / "out", "--resume", model=model) == 0
    assert model.seen == ["b", "c"] and "1 of 3 done earlier" in capsys.readouterr().err
    assert statuses(tmp_path / "out") == dict.fromkeys("abc", "done")


@pytest.mark.parametrize("moment", ["assess", "write_segmentation"])
def test_a_killed_batch_leaves_a_whole_summary_and_resumes(moment, three, tmp_path):
    script = f"""
import os, sys
sys.path.insert(0, "Testing")
from MedRationaleLib import output
from test_batch import Model, batch
from pathlib import Path

class Killed(Model):
    def assess(self, study, **options):
        if study.patient["id"] == "b":
            output.write_segmentation = lambda *args: os._exit(9)
            if "{moment}" == "assess":
                os._exit(9)
        return super().assess(study, **options)

batch(Path(sys.argv[1]), Path(sys.argv[2]), model=Killed())
"""
    command = [sys.executable, "-c", script, str(three), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == 9
    assert statuses(tmp_path / "out") == {"a": "done"}
    left = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")} - {LOCK_FILE}
    assert bool(left) == (moment != "assess")
    first, model = (tmp_path / "out" / "a" / "manifest.json").read_bytes(), Model()
    assert batch(three, tmp_path / "out", "--resume", model=model) == 0
    assert model.seen == ["b", "c"] and statuses(tmp_path / "out") == dict.fromkeys("abc", "done")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b", "c", "summary.csv"}
    assert (tmp_path / "out" / "a" / "manifest.json").read_bytes() == first


def test_resume_computes_nothing_again_and_writes_the_same_summary(three, tmp_path):
    assert batch(three, tmp_path / "out") == 0
    before, model = (tmp_path / "out" / "summary.csv").read_bytes(), Model()
    (tmp_path / "out" / "summary.csv").unlink()
    assert batch(three, tmp_path / "out", "--resume", model=model) == 0
    assert model.seen == [] and (tmp_path / "out" / "summary.csv").read_bytes() == before
    assert batch(three, tmp_path / "out", model=model) == 0
    assert model.seen == ["a", "b", "c"]  # without --resume all are done again


def test_a_second_batch_in_the_same_folder_is_refused_while_the_first_goes_on(three, tmp_path, capsys):
    class Second(Model):
        def assess(self, study, **options):
            assert batch(three, tmp_path / "out") == 2
            assert "one batch at a time" in capsys.readouterr().err
            return super().assess(study, **options)

    assert batch(three, tmp_path / "out", model=Second()) == 0
    assert statuses(tmp_path / "out") == dict.fromkeys("abc", "done")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b", "c", "summary.csv"}


def test_an_examination_without_a_prostate_is_no_negative_one(one, tmp_path, capsys):
    class Blind(Model):
        def assess(self, study, **options):
            return replace(super().assess(study, **options), volumes_ml={"gland": 0.0})

    for options in ((), ("--resume",)):
        assert batch(one, tmp_path / "out", *options, model=Blind()) == 0
        (row,) = summary(tmp_path / "out")
        assert row["status"] == "not assessed" and row["error"].startswith("No prostate was found")
        told = capsys.readouterr()
        assert "0 of 1 examinations done, 0 failed, 1 not assessed" in told.out
        assert "no suspicious lesion" not in told.err


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


CHANGES = {
    "another T2W": (lambda i, o: save(volume(9.0), i / "t2w.mha"), ()),
    "a T2W of another time": (lambda i, o: _touch(i / "t2w.mha"), ()),
    "no ADC any more": (lambda i, o: (i / "adc.mha").unlink(), ()),
    "one more file": (lambda i, o: save(volume(), i / "b_cor.mha"), ()),
    "retrieval": (lambda i, o: None, ("--retrieval", "slice")),
    "decision tree": (lambda i, o: None, ("--decision-tree", "paper_appendix_c")),
    "no assessment": (lambda i, o: (o / "assessment.json").unlink(), ()),
    "no report": (lambda i, o: (o / "report.html").unlink(), ()),
    "damaged assessment": (lambda i, o: (o / "assessment.json").write_text('{"study"'), ()),
    "emptied assessment": (lambda i, o: (o / "assessment.json").write_text("{}"), ()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_does_again_what_is_not_the_same_any_more(change, one, tmp_path):
    assert batch(one, tmp_path / "out") == 0
    make, options = CHANGES[change]
    make(one / "b", tmp_path / "out" / "b")
    model = Model()
    assert batch(one, tmp_path / "out", "--resume", *options, model=model) == 0
    assert model.seen == ["b"] and statuses(tmp_path / "out") == {"b": "done"}


def test_resume_does_again_what_another_model_or_other_settings_of_it_did(one, tmp_path):
    assert batch(one, tmp_path / "out") == 0
    retrained, tuned, rounded = Model(), Model(), Model()
    retrained.checkpoint.sha256, tuned.postprocessing = "1" * 64, {"lesion_threshold": 0.4}
    rounded.settings = {"precision": "int8", "all_slices": False}
    for model in (retrained, tuned, rounded):
        assert batch(one, tmp_path / "out", "--resume", model=model) == 0
        assert model.seen == ["b"]


def test_a_result_that_a_failure_left_behind_is_called_an_earlier_runs(one, tmp_path):
    assert batch(one, tmp_path / "out") == 0
    assert batch(one, tmp_path / "out", model=Model(b=MemoryError())) == 1
    with (tmp_path / "out" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["status"] == "failed" and "those of an earlier run" in row["error"]
    assert (tmp_path / "out" / "b" / "report.html").exists()


def test_resume_tries_again_what_failed_and_another_b_value_counts(three, tmp_path):
    manifest = tmp_path / "list.csv"
    manifest.write_text("id,case,b_value\na,in/a,\nb,in/b,\n")
    assert batch(manifest, tmp_path / "out", model=Model(a=MemoryError())) == 1
    model = Model()
    assert batch(manifest, tmp_path / "out", "--resume", model=model) == 0
    manifest.write_text("id,case,b_value\na,in/a,\nb,in/b,1400\n")
    assert batch(manifest, tmp_path / "out", "--resume", model=model) == 0
    assert model.seen == ["a", "b"]


def test_moved_examinations_are_still_the_same(one, tmp_path):
    assert batch(one, tmp_path / "out") == 0
    one.rename(tmp_path / "moved")
    (tmp_path / "moved" / "b" / ".DS_Store").write_text("of the desktop")
    model = Model()
    assert batch(tmp_path / "moved", tmp_path / "out", "--resume", model=model) == 0
    assert model.seen == []
