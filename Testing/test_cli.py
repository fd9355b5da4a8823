"""The command line as its user meets it: what it writes, what it says, and what it leaves when something is wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_samples import ADC, CORONAL, SAGITTAL, SHAPE, T2W, noise, write, write_examination
from sample_assessments import PZ_ANSWERS, TZ_ANSWERS, assess_by_hand, drawn_masks
from test_study import adc_map, save, volume

from MedRationaleLib import files, output
from MedRationaleLib.cli import main
from MedRationaleLib.console import console_for, show_stages, summarise, weakened_answers
from MedRationaleLib.image_files import quiet_itk
from MedRationaleLib.serialization import load_assessment
from MedRationaleLib.study import Study

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = {"assessment.json", "segmentation.seg.nrrd", "report.html", "manifest.json", "evidence"}


class FakePredictor:
    """Two drawn findings for whatever it is given; remembers how it was asked, and fails if it is told to."""

    answers = (PZ_ANSWERS, TZ_ANSWERS)

    def __init__(self, fault: BaseException | None = None) -> None:
        self.fault = fault
        self.asked = SimpleNamespace()
        self.checkpoint, self.postprocessing = SimpleNamespace(sha256="0" * 64), None
        self.settings: dict[str, object] = {"precision": "float32", "all_slices": False}

    def load(self, name: str, *, device: str, **how: object) -> FakePredictor:
        self.asked.model, self.asked.device = name, device
        return self

    def assess(self, study, *, progress, retrieval, decision_tree, dce="not available"):
        self.asked.study, self.asked.retrieval, self.asked.tree, self.asked.dce = study, retrieval, decision_tree, dce
        for stage in ("model", "masks", "findings", "evidence"):
            progress(stage, 0.0)
            progress(stage, 1.0)
        if self.fault is not None:
            raise self.fault
        return assess_by_hand(study, drawn_masks(study.t2w), self.answers)


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A folder with three small images in PI-CAI naming."""
    folder = tmp_path / "case"
    folder.mkdir()
    for name, image in (("t2w", volume()), ("adc", adc_map()), ("hbv", volume(40.0, seed=1))):
        save(image, folder / f"10_11_{name}.mha")
    return folder


def predict(*argv: object, predictor: FakePredictor | None = None) -> int:
    return main(["predict", *map(str, argv)], load=(predictor or FakePredictor()).load)


def sentence(text: str) -> str:
    """The one sentence on stderr, after the lines of progress."""
    lines = [line for line in text.splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1 and lines[0].startswith("medrationale: ") and lines[0].endswith("."), text
    return lines[0]


# ---------------------------------------------------------------- what comes out


def test_predict_writes_all_files_and_sums_them_up(case, tmp_path, capsys):
    out = tmp_path / "new" / "report"
    assert predict("--case", case, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN
    assert len(load_assessment(out).findings) == 2
    printed = capsys.readouterr()
    rows = [re.split(r"  +", line.strip()) for line in printed.out.splitlines()]
    header = next(row for row in rows if row[0] == "Lesion")
    assert header[1:] == ["Zone", "Sector", "Size mm", "Volume ml", "T2W", "DWI", "PI-RADS", "Likelihood*"]
    first = dict(zip(header, next(row for row in rows if row[0] == "lesion-1"), strict=True))
    record = json.loads((out / "assessment.json").read_text(encoding="utf-8"))["findings"][0]
    assert first["Sector"] == "right peripheral zone posteromedial mid gland" and first["Likelihood*"] == "0.83"
    assert [int(first[n]) for n in ("T2W", "DWI", "PI-RADS")] == [
        record[n] for n in ("t2w_score", "dwi_score", "pirads")
    ]
    assert "Gland 51.9 ml (PZ 17.3, TZ 33.8); ellipsoid formula 49.2 ml" in printed.out
    assert "Warning: The b-value of the DWI is not known" in printed.out
    assert "Contradiction in lesion-2: The rationale says" in printed.out
    assert printed.out.splitlines()[-1] == f"Report: {out.resolve() / 'report.html'}"
    stages = ["reading the examination ...", "loading the model ...", "running the model ..."]
    assert printed.err.splitlines()[:3] == stages and "\x1b" not in printed.out + printed.err


def test_the_manifest_tells_the_command_line_and_the_time_that_reading_and_loading_took(case, tmp_path):
    assert predict("--case", case, "--out", tmp_path / "o") == 0
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["command_line"] == f"medrationale predict --case {case} --out {tmp_path / 'o'}"
    assert {"read", "load", "total", "write"} <= set(manifest["timings_s"])


def test_files_are_read_with_their_b_value_and_the_options_reach_the_model(case, tmp_path):
    predictor = FakePredictor()
    images = [f"--{name}={case}/10_11_{file}.mha" for name, file in (("t2w", "t2w"), ("adc", "adc"), ("dwi", "hbv"))]
    options = ["--model=other", "--device=cpu", "--retrieval=slice", "--decision-tree=paper_appendix_c"]
    assert predict(*images, "--b-value=1400", *options, "--out", tmp_path / "o", predictor=predictor) == 0
    asked = predictor.asked
    assert asked.study.provenance["dwi"].b_value == 1400 and asked.study.warnings == ()
    assert (asked.model, asked.device, asked.retrieval, asked.tree) == ("other", "cpu", "slice", "paper_appendix_c")


def test_psa_joins_the_patient_and_the_readers_dce_reaches_the_model(case, tmp_path):
    predictor, out = FakePredictor(), tmp_path / "o"
    assert predict("--case", case, "--psa", "7.5", "--dce", "positive", "--out", out, predictor=predictor) == 0
    assert predictor.asked.dce == "positive" and predictor.asked.study.patient == {
        "id": "10", "study_id": "11", "psa_ng_ml": 7.5,
    }  # fmt: skip
    assert load_assessment(out).study.patient["psa_ng_ml"] == 7.5
    assert predict("--case", case, "--out", out, predictor=predictor) == 0
    assert predictor.asked.dce == "not available" and "psa_ng_ml" not in predictor.asked.study.patient


def test_a_file_named_beside_a_case_folder_takes_the_place_of_the_one_in_it(case, tmp_path):
    other, predictor = save(volume(60.0, seed=9), tmp_path / "other.nii.gz"), FakePredictor()
    assert predict("--case", case, "--dwi", other, "--b-value", 1000, "--out", tmp_path / "o", predictor=predictor) == 0
    sources = predictor.asked.study.provenance
    assert (
        sources["dwi"].path == str(other) and sources["dwi"].b_value == 1000 and "case folder" in sources["adc"].reason
    )


def test_a_dicom_examination_is_read_and_a_series_number_overrides_the_choice(tmp_path):
    write_examination(tmp_path / "d")
    write(tmp_path / "d" / "again", np.random.default_rng(1).uniform(500, 2500, SHAPE), 9, **ADC)
    predictor = FakePredictor()
    assert predict("--dicom", tmp_path / "d", "--adc", "9", "--out", tmp_path / "o", predictor=predictor) == 0
    assert predictor.asked.study.provenance["adc"].series_number == 9


def test_quiet_prints_the_path_of_the_report_alone_and_warnings_on_stderr(case, tmp_path, capsys):
    assert predict("--case", case, "--out", tmp_path / "o", "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{(tmp_path / 'o' / 'report.html').resolve()}\n"
    assert printed.err.startswith("Warning: The b-value of the DWI is not known")
    assert all(line.startswith("Warning: ") for line in printed.err.splitlines())


def test_profile_says_where_the_time_went(case, tmp_path, capsys):
    assert predict("--case", case, "--out", tmp_path / "o", "--quiet", "--profile") == 0
    lines = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    names = [name for name in lines if name != "Warning:"]
    assert names[:8] == ["read", "load", "model", "masks", "findings", "evidence", "write", "total"]


def test_a_missing_sequence_is_told_with_the_answers_that_it_weakens(case, tmp_path, capsys):
    (case / "10_11_adc.mha").unlink()
    predictor = FakePredictor()
    assert predict("--case", case, "--out", tmp_path / "o", predictor=predictor) == 0
    out = capsys.readouterr().out
    assert "Warning: ADC missing:" in out
    assert re.search(r"^Weaker: lesion-1.*: .*ADC signal.* \(without ADC\)$", out, re.MULTILINE)


def test_an_examination_without_lesion_says_so(case, tmp_path):
    study, stream = Study.from_case(case), io.StringIO()
    empty = assess_by_hand(study, drawn_masks(study.t2w), ())
    summarise(empty, tmp_path / "[a] report.html", console_for(stream))
    assert "No suspicious lesion was found." in stream.getvalue()
    assert stream.getvalue().endswith(f"Report: {tmp_path}/[a] report.html\n")
    assert list(weakened_answers(empty)) == []


def test_the_density_of_the_psa_is_told_beside_the_gland(case, tmp_path):
    study, stream = Study.from_case(case), io.StringIO()
    found = assess_by_hand(study, drawn_masks(study.t2w), ())
    known = replace(found.study, patient={"psa_density_ng_ml2": 0.114})
    summarise(replace(found, study=known), tmp_path / "report.html", console_for(stream))
    assert "; PSA density 0.11 ng/ml²\n" in stream.getvalue()


def test_an_examination_without_a_prostate_is_called_not_assessed(case, tmp_path):
    study, stream = Study.from_case(case), io.StringIO()
    blind = replace(assess_by_hand(study, drawn_masks(study.t2w), ()), volumes_ml={"gland": 0.0})
    summarise(blind, tmp_path / "report.html", console_for(stream))
    assert "Not assessed: no prostate was found" in stream.getvalue() and "No suspicious" not in stream.getvalue()


def test_a_b_value_without_a_dwi_is_refused_in_a_case_folder_too(case, tmp_path, capsys):
    (case / "10_11_hbv.mha").unlink()
    assert predict("--case", case, "--out", tmp_path / "o", "--b-value", "1000") == 2
    assert "Expected --b-value with a DWI, got none" in sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--b-value", "99999"), "up to 10,000, got '99999'"),
        (("--psa", "99999999"), "up to 100,000, got '99999999'"),
        (("--b-value", "1000"), "Expected --b-value with a DWI, got none"),
    ],
)
def test_numbers_that_cannot_be_are_refused(case, tmp_path, capsys, options, words):
    assert predict("--t2w", case / "10_11_t2w.mha", "--out", tmp_path / "o", *options) == 2
    assert words in sentence(capsys.readouterr().err) and not (tmp_path / "o").exists()


def test_a_second_run_replaces_the_first_and_keeps_other_files(case, tmp_path):
    for _ in range(2):
        assert predict("--case", case, "--out", tmp_path / "o") == 0
        (tmp_path / "o" / "notes.txt").write_text("mine")
    assert {path.name for path in (tmp_path / "o").iterdir()} == WRITTEN | {"notes.txt"}


def test_in_a_terminal_bars_are_drawn_even_while_image_reading_silences_stderr(tmp_path, monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    with open(tmp_path / "screen", "wb") as raw:
        monkeypatch.setattr(sys, "stderr", Terminal(raw))
        with quiet_itk(), show_stages(False) as stages:
            stages("read", 0.0)
            stages("masks", 0.5)
    assert stages.seconds.keys() == {"read", "masks"}
    screen = (tmp_path / "screen").read_text(encoding="utf-8")
    assert "reading the examination" in screen and "cleaning the masks" in screen


def test_threads_are_told_not_to_spin_unless_the_user_says_otherwise(case, tmp_path, monkeypatch):
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        predict("--case", case, "--out", tmp_path / "o", "--quiet")
        assert os.environ["OMP_WAIT_POLICY"] == expected


# ---------------------------------------------------------------- bad input: exit code 2, one sentence, nothing left


def _file(tmp_path: Path, image: sitk.Image, name: str = "t2w.mha") -> list[object]:
    return ["--t2w", save(image, tmp_path / name)]


def _changed(tmp_path: Path, change: Callable[[bytes], bytes]) -> list[object]:
    path = save(volume(), tmp_path / "t2w.mha")
    path.write_bytes(change(path.read_bytes()))
    return ["--t2w", path]


def _with_value(value: float) -> sitk.Image:
    image = volume()
    image[3, 3, 3] = value
    return image


def _folder(tmp_path: Path, option: str, fill: Callable[[Path], object] = lambda folder: None) -> list[object]:
    folder = tmp_path / "examination"
    folder.mkdir()
    fill(folder)
    return [option, folder]


def _two_patients(folder: Path) -> None:
    write(folder / "a", noise(1, 900), 2, **T2W)
    write(folder / "b", noise(1, 900), 3, **{**T2W, "PatientID": "P2"})


def _localiser(folder: Path) -> None:
    for number, orientation in enumerate((SAGITTAL, CORONAL), start=1):
        tags = {**T2W, "SeriesDescription": "localizer", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
        write(folder / str(number), noise(1, 900)[:3], number, orientation=orientation, **tags)


BAD_INPUT: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "no examination": (lambda t: [], "Expected an examination, got none"),
    "no T2W": (lambda t: ["--adc", "a.mha"], "Expected an examination, got only --adc"),
    "case and dicom": (lambda t: ["--case", t, "--dicom", t], "not allowed with"),
    "b-value with dicom": (lambda t: ["--dicom", t, "--b-value", "800"], "--b-value"),
    "b-value of zero": (lambda t: ["--case", t, "--b-value", "0"], "expected a number above 0"),
    "PSA of nothing": (
        lambda t: ["--case", t, "--psa", "high"],
        "--psa: expected a number above 0 and up to 100,000, got 'high'",
    ),
    "unknown DCE": (lambda t: ["--case", t, "--dce", "maybe"], "--dce"),
    "unknown device": (lambda t: ["--case", t, "--device", "tpu"], "--device"),
    "unknown option": (lambda t: ["--case", t, "--colour"], "--colour"),
    "missing file": (lambda t: ["--t2w", t / "nothing.mha"], "does not exist"),
    "folder for a file": (lambda t: ["--t2w", t], "give a DICOM folder with --dicom"),
    "missing case": (lambda t: ["--case", t / "nothing"], "no folder"),
    "missing dicom": (lambda t: ["--dicom", t / "nothing"], "no folder"),
    "not an image": (lambda t: _changed(t, lambda content: b"some text\n" * 9), "not an image|damaged"),
    "truncated": (lambda t: _changed(t, lambda content: content[:-2000]), "truncated"),
    "2-D": (lambda t: _file(t, volume()[:, :, 3]), "2-D image"),
    "4-D": (lambda t: _file(t, sitk.JoinSeries([volume(), volume()]), "t2w.nii.gz"), "4-D image"),
    "empty case": (lambda t: _folder(t, "--case"), "empty folder"),
    "empty dicom": (lambda t: _folder(t, "--dicom"), "empty folder"),
    "two patients": (lambda t: _folder(t, "--dicom", _two_patients), "images of one patient"),
    "far apart": (
        lambda t: [*_file(t, volume()), "--adc", save(volume(3000.0, origin=(900, 0, 0)), t / "a.mha")],
        "overlaps the T2W",
    ),
    "constant": (lambda t: _file(t, volume(np.full((16, 48, 48), 7.0))), "constant value"),
    "NaN": (lambda t: _file(t, _with_value(np.nan)), "NaN or infinite"),
    "infinite": (lambda t: _file(t, _with_value(np.inf)), "NaN or infinite"),
    "negative spacing": (
        lambda t: _changed(t, lambda content: content.replace(b"Spacing = 2 2 4", b"Spacing = -2 2 4")),
        "spacing above 0",
    ),
    "absurd spacing": (lambda t: _file(t, volume(spacing=(2.0, 2.0, 200.0))), "voxel spacing of"),
    "ADC unit": (lambda t: [*_file(t, volume()), "--adc", save(adc_map(0.02), t / "a.mha")], "ADC: expected values in"),
    "sagittal file": (
        lambda t: _file(t, volume(spacing=(4.0, 2.0, 2.0), size=(16, 48, 48))),
        "expected an axial series, got a sagittal",
    ),
    "sagittal case": (lambda t: _folder(t, "--case", lambda f: save(volume(), f / "1_1_sag.mha")), "sagittal"),
    "sagittal dicom": (
        lambda t: _folder(t, "--dicom", lambda f: write(f, noise(1, 900), 2, orientation=SAGITTAL, **T2W)),
        "T2W: expected",
    ),
    "localiser only": (lambda t: _folder(t, "--dicom", _localiser), "T2W: expected"),
    "unknown series": (
        lambda t: [*_folder(t, "--dicom", lambda f: write_examination(f)), "--t2w", "77"],
        "series number, a series UID or a path",
    ),
}


@pytest.mark.parametrize("bad", BAD_INPUT)
def test_bad_input_is_one_sentence_with_exit_code_2_and_leaves_nothing(bad, tmp_path, capfd):
    given = tmp_path / "given"
    given.mkdir()
    make, words = BAD_INPUT[bad]
    argv = make(given)
    assert predict(*argv, "--out", tmp_path / "deep" / "out") == 2
    printed = capfd.readouterr()
    assert re.search(words, sentence(printed.err)) and printed.out == ""
    assert list(tmp_path.iterdir()) == [given]


def test_what_is_only_suspicious_is_remarked_and_read_all_the_same(tmp_path, capsys):
    write_examination(tmp_path / "d", b_values=(50, 500))
    (tmp_path / "d" / "junk.dcm").write_bytes(b"no dicom at all")
    assert predict("--dicom", tmp_path / "d", "--out", tmp_path / "o") == 0
    out = capsys.readouterr().out
    assert re.search(r"^Warning: .*b = 500", out, re.MULTILINE)
    assert "Warning: 1 unreadable DICOM file was skipped (junk.dcm)." in out


def test_results_that_would_replace_the_input_are_refused(tmp_path, capsys, case):
    names = [path.name for path in case.iterdir()]
    (case / files.MANIFEST).write_text(
        json.dumps({"generator": files.GENERATOR, "files": names})
    )  # as a phantom has it
    assert predict("--case", case, "--out", case) == 2
    assert "choose another folder" in sentence(capsys.readouterr().err)
    assert {path.name for path in case.iterdir()} == {*names, files.MANIFEST}


def test_an_unwritable_folder_is_refused_before_anything_is_read(case, tmp_path, monkeypatch, capsys):
    def forbidden(*args: object, **kwargs: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "mkdtemp", forbidden)
    assert predict("--case", case / "nothing", "--out", tmp_path / "o") == 2
    assert "may write to" in sentence(capsys.readouterr().err)


def test_foreign_results_in_the_output_folder_are_refused_before_anything_is_read(case, tmp_path, capsys):
    (tmp_path / files.MANIFEST).write_text("{}")
    assert predict("--case", case / "nothing", "--out", tmp_path) == 2
    assert "not from MedRationale" in sentence(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["report.html", "assessment.json"])
def test_a_foreign_file_of_any_result_is_refused_before_anything_is_read(name, case, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    assert predict("--case", case / "nothing", "--out", tmp_path) == 2
    assert f"write {name}" in sentence(capsys.readouterr().err)


def test_a_file_above_the_output_folder_and_an_empty_name_are_refused(case, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert predict("--case", case / "nothing", "--out", tmp_path / "file" / "deep" / "er") == 2
    assert f"below the file {tmp_path / 'file'}" in sentence(capsys.readouterr().err)
    assert predict("--case", case, "--out", "") == 2
    assert "an empty name" in sentence(capsys.readouterr().err)


@pytest.mark.parametrize("command", ["predict", "batch"])
def test_a_model_that_is_not_there_is_refused_before_anything_is_read(command, case, tmp_path, capsys):
    where = ["--case", case / "nothing", "--out"] if command == "predict" else ["--input", case.parent, "--output"]
    assert main([command, *map(str, where), str(tmp_path / "o"), "--model", "compakt"]) == 2
    assert "model list" in sentence(capsys.readouterr().err)


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on file sizes that stands in for a full disk is POSIX")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(case, tmp_path):
    script = """
import resource, signal, sys
sys.path.insert(0, "Testing")
from test_cli import predict
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
sys.exit(predict("--case", sys.argv[1], "--out", sys.argv[2]))
"""
    run = _python("-c", script, case, tmp_path / "o")
    assert run.returncode == 2 and "nothing was left there" in sentence(run.stderr)
    assert list(tmp_path.iterdir()) == [case]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (MemoryError(), 1, "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            1,
            "out of memory",
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 1, "out of memory"),
        (KeyError("gland"), 1, r"fault of the programme.*KeyError.*report.*--debug"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines"),
        (ImportError("No module named 'x'"), 1, "medrationale doctor"),
        (PermissionError(13, "Permission denied", "secret.mha"), 2, "secret.mha"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_fault_is_one_sentence_and_leaves_nothing(fault, code, words, case, tmp_path, capsys):
    assert predict("--case", case, "--out", tmp_path / "o", predictor=FakePredictor(fault)) == code
    assert re.search(words, sentence(capsys.readouterr().err))
    assert list(tmp_path.iterdir()) == [case]


def test_an_interrupt_while_writing_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "write_segmentation", interrupted)
    assert predict("--case", case, "--out", tmp_path / "o") == 130
    assert list(tmp_path.iterdir()) == [case]


def test_debug_shows_the_traceback(case, tmp_path, capsys):
    assert predict("--case", case, "--out", tmp_path / "o", "--debug", predictor=FakePredictor(KeyError("gland"))) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


# ---------------------------------------------------------------- the commands themselves


def test_help_names_the_commands_and_imports_nothing_slow():
    script = """
import sys
from MedRationaleLib.cli import main
try:
    main(["--help"])
except SystemExit as end:
    slow = {"torch", "numpy", "SimpleITK", "rich", "scipy"} & set(sys.modules)
    sys.exit(f"imported {slow}" if slow else end.code)
"""
    run = _python("-c", script)
    assert run.returncode == 0, run.stderr
    text = " ".join(run.stdout.split())
    assert all(name in text for name in ("predict", "batch", "phantom", "doctor", "does not diagnose", "Exit codes"))


def test_help_of_predict_lists_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["predict", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    options = ["t2w", "adc", "dwi", "case", "dicom", "out", "model", "device", "b-value", "retrieval", "decision-tree"]
    assert [
        option for option in (*options, "psa", "dce", "quiet", "profile", "debug") if f"--{option}" not in text
    ] == []


def test_an_unknown_option_points_to_the_help_of_its_command(capsys):
    for argv, command in ((["predict", "--foo", "1"], "predict"), (["model", "list", "--foo"], "model list")):
        assert main(argv) == 2
        assert f"`medrationale {command} --help`" in sentence(capsys.readouterr().err)


def test_a_wrong_command_line_is_one_sentence(capsys):
    for argv in ([], ["predcit"], ["predict"], ["batch", "--input", "x"], ["phantom", "--out", "x", "--seed", "-1"]):
        assert main(argv) == 2
        assert "--help" in sentence(capsys.readouterr().err)


def test_bad_input_is_refused_in_a_fresh_process_too(tmp_path):
    run = _python("-m", "MedRationaleLib.cli", "predict", "--t2w", tmp_path / "no.mha", "--out", tmp_path / "o")
    assert run.returncode == 2 and "does not exist" in sentence(run.stderr) and run.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_doctor_exits_with_1_where_predict_cannot_run(monkeypatch, capsys):
    from MedRationaleLib import doctor

    for ready in (True, False):
        monkeypatch.setattr(doctor, "report", lambda ready=ready: SimpleNamespace(ready=ready))
        monkeypatch.setattr(doctor, "render", lambda report: "what was found")
        assert main(["doctor"]) == (0 if ready else 1)
    assert "what was found" in capsys.readouterr().out


def _python(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=120, encoding="utf-8"
    )
