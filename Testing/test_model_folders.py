"""`medrationale model list | info | verify`, and folders of earlier and later versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import training_samples  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from MedRationaleLib.cli import main  # noqa: E402
from MedRationaleLib.concepts import ConceptBank  # noqa: E402
from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.files import file_sha256  # noqa: E402
from MedRationaleLib.inference import Predictor  # noqa: E402
from MedRationaleLib.model.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from MedRationaleLib.model.rationale_model import RationaleModel  # noqa: E402
from MedRationaleLib.model.verification import Check, verify  # noqa: E402
from MedRationaleLib.model_folders import (  # noqa: E402
    CARD,
    CONFIG,
    WEIGHTS,
    card_section,
    licence,
    model_folder,
    model_folders,
    read_settings,
)

CARD_TEXT = """# MedRationale tiny

## Licence

CC BY-NC 4.0, because of the data.

## Figures

### tiny on 3 examinations

| figure | value |
|---|---|
| gland Dice | 0.926 |

| node | accuracy |
|---|---|
| margin | 0.440 |
"""


def unit_model(concepts: list[str] | None = None) -> RationaleModel:
    """Random weights; the stored concepts are of unit length."""
    torch.manual_seed(0)
    model = RationaleModel(training_samples.TINY, concepts or list(ConceptBank.load())).eval()
    model.concept_embeddings.copy_(torch.nn.functional.normalize(torch.randn(len(model.concepts), 8), dim=1))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model without a text tower."""
    save_checkpoint(unit_model(), tmp_path / "tiny", card=CARD_TEXT, vocabulary=[], training={"steps": 3})
    return tmp_path / "tiny"


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    change(data)
    (folder / CONFIG).write_text(json.dumps(data))
    return folder


def with_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Other weights, with the hash that belongs to them."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    return edited(folder, lambda data: data.update(weights_sha256=file_sha256(folder / WEIGHTS)))


# ------------------------------------------------------------------ formats


def to_first_format(data: dict[str, Any]) -> None:
    """As 0.1.0 wrote it."""
    data["format"] = 1
    del data["model"]["heatmap"]
    data["postprocessing"] = {"gland_threshold": 0.7, "lesion_peak": 0.9}


def test_a_folder_of_0_1_0_is_brought_to_todays_format_and_says_what_it_said(folder: Path) -> None:
    with_weights(folder, lambda weights: [weights.pop("heat_scale"), weights.pop("heat_bias")])
    edited(folder, to_first_format)
    predictor = Predictor.load(folder, device="cpu")
    assert predictor.postprocessing.lesion_likelihood == 0.9 and predictor.postprocessing.likelihood == {}
    cosine = torch.tensor([-0.4, 0.3, 1.0])
    assert predictor.model.heat(cosine).tolist() == pytest.approx([0.0, 0.3, 1.0])  # max(cos, 0), as it was then
    assert read_settings(folder).format == 1
    assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["format"] == 1  # what is stored stays as it is


def test_a_folder_of_the_first_format_with_todays_weights_is_read_as_it_is(folder: Path) -> None:
    edited(folder, lambda data: data.update(format=1))
    assert read_settings(folder).newer_tensors == ()
    assert load_checkpoint(folder).model.config.heatmap == "sigmoid"


def test_todays_format_does_not_forgive_what_the_first_one_lacked(folder: Path) -> None:
    with_weights(folder, lambda weights: weights.pop("heat_bias"))
    with pytest.raises(InputError, match="1 missing"):
        load_checkpoint(folder)


@pytest.mark.parametrize("format", [0, 3, "2", None])
def test_another_format_is_refused_with_the_version_that_wrote_it(folder: Path, format: object) -> None:
    edited(folder, lambda data: data.update(format=format, training={"medrationale": "9.1"}))
    with pytest.raises(InputError) as refused:
        load_checkpoint(folder)
    assert f"Expected a model folder of format 2 or earlier, got {format} in" in str(refused.value)
    assert "written by MedRationale 9.1" in str(refused.value)


def test_the_shipped_model_is_of_todays_format_and_whole() -> None:
    assert read_settings(model_folder("compact")).format == 2
    assert [check for check in verify(model_folder("compact")) if check.passed is False] == []


# ------------------------------------------------------------------ list and info


def test_the_list_has_the_shipped_models_and_those_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "notes").mkdir()
    assert main(["model", "list", str(folder.parent)]) == 0
    heading, shipped, ours = capsys.readouterr().out.splitlines()
    assert heading.split() == ["Model", "Parameters", "Size", "State", "Licence", "Folder"]
    assert shipped.split()[0] == "compact" and "trained" in shipped and "CC BY-NC 4.0" in shipped
    assert ours.split()[0] == "tiny" and ours.rstrip().endswith(str(folder)) and " trained " in ours


def test_a_model_that_cannot_be_used_stays_in_the_list_and_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / WEIGHTS).unlink()
    assert main(["model", "list", str(folder)]) == 2
    told = capsys.readouterr().out
    assert "cannot be used" in told and "expected model.safetensors in" in told
    edited(folder, lambda data: data.update(format=99))
    assert main(["model", "list", str(folder)]) == 2
    assert "got 99" in capsys.readouterr().out


def test_a_folder_without_models_is_refused_and_the_others_are_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "list", str(tmp_path / "empty"), str(folder)]) == 2
    told = capsys.readouterr().out
    assert "none is there" in told and "compact" in told and "tiny" in told
    assert main(["model", "info", "no-such-model"]) == 2
    assert "found neither; `medrationale model list`" in capsys.readouterr().err


def test_a_folder_that_only_has_a_config_json_is_not_taken_for_a_model(folder: Path) -> None:
    (folder.parent / "clip").mkdir()
    (folder.parent / "clip" / "config.json").write_text("{}")
    assert folder.parent / "clip" not in model_folders([folder.parent])[0]


def test_info_tells_sizes_provenance_terms_and_the_first_figures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "info", str(folder)]) == 0
    told = capsys.readouterr().out
    for words in (
        "256 x 256 pixels",
        "2 blocks of width 16, 2 heads",
        "CC BY-NC 4.0",
        "F16",
        file_sha256(folder / WEIGHTS),
        "3 steps",
        "gland Dice",
        "0.926",
    ):
        assert words in told
    assert "margin" not in told


def test_info_of_damaged_weights_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    assert main(["model", "info", str(folder)]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("medrationale: ") and "copy the folder" in told.err and "Figures" not in told.out


def test_info_of_the_shipped_model_tells_the_runs_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "info", "compact"]) == 0
    told = capsys.readouterr().out
    run, runs_before = load_checkpoint("compact").training["initial"], 0
    while run:
        run, runs_before = run.get("initial"), runs_before + 1
    assert "text tower 1.87 M" in told and told.count("before that") == runs_before > 1


def test_terms_and_sections_come_from_the_card(folder: Path) -> None:
    assert licence(folder) == "CC BY-NC 4.0"
    assert card_section(folder, "Figures").startswith("### tiny on 3 examinations")
    assert card_section(folder, "Nothing") == ""
    (folder / CARD).unlink()
    assert licence(folder) == "not stated"


def test_list_and_info_do_without_torch(folder: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from MedRationaleLib.cli import main\n"
        f"sys.exit(main(['model', 'list', {str(folder)!r}]) + main(['model', 'info', {str(folder)!r}]))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ verify


def failed(folder: Path) -> list[Check]:
    return [check for check in verify(folder) if check.passed is False]


def test_a_folder_without_a_text_tower_passes_and_says_what_that_means(folder: Path) -> None:
    checks = {check.name: check for check in verify(folder)}
    assert failed(folder) == []
    assert "training cannot go on" in checks["tensors"].detail or "train extra" in checks["tensors"].detail
    assert checks["embeddings"].passed is None and "not compared" in checks["embeddings"].detail


@pytest.fixture
def compact(tmp_path: Path) -> Path:
    """A copy of the shipped model that may be damaged."""
    import shutil

    shutil.copytree(model_folder("compact"), tmp_path / "compact")
    return tmp_path / "compact"


def damage_one_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def damage_concepts(folder: Path) -> None:
    def forget(data: dict[str, Any]) -> None:
        data["concepts"][data["concepts"].index("lenticular")] = "lentiform"

    edited(folder, forget)


def damage_length(folder: Path) -> None:
    with_weights(folder, lambda weights: weights["concept_embeddings"].mul_(2))


def damage_order(folder: Path) -> None:
    with_weights(folder, lambda weights: weights.update(concept_embeddings=weights["concept_embeddings"].flip(0)))


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (damage_one_byte, "hash", "expected SHA-256"),
        (lambda f: (f / WEIGHTS).unlink(), "hash", "there is no model.safetensors"),
        (lambda f: (f / CARD).unlink(), "card", "there is no MODEL_CARD.md"),
        (lambda f: (f / CONFIG).write_text("{"), "configuration", "cannot be read"),
        (lambda f: edited(f, lambda d: d.update(format=99)), "configuration", "got 99"),
        (lambda f: edited(f, lambda d: d["model"].update(neck_dim=96)), "tensors", "of another shape"),
        (lambda f: with_weights(f, lambda w: w["f_img.pos_embed"].fill_(torch.nan)), "values", "f_img.pos_embed"),
        (damage_length, "embeddings", "lengths are off 1 by up to 1"),
        (damage_order, "embeddings", "from what the stored text tower gives"),
        (damage_concepts, "concepts", "does not know lenticular"),
        (lambda f: edited(f, lambda d: d["postprocessing"].update(colour=1)), "thresholds", "colour"),
    ],
)  # fmt: skip
def test_verify_names_what_is_wrong(damage: Callable[[Path], object], name: str, words: str, compact: Path) -> None:
    if name == "embeddings":
        pytest.importorskip("transformers")
    damage(compact)
    found = failed(compact)
    assert name in [check.name for check in found]
    assert words in next(check.detail for check in found if check.name == name)


def test_the_command_prints_every_check_and_fails_where_one_did(
    compact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "verify", str(compact)]) == 0
    told = capsys.readouterr().out
    assert "not checked" not in told and "failed" not in told
    (compact / CARD).unlink()
    assert main(["model", "verify", str(compact)]) == 2
    told = capsys.readouterr()
    assert "card           failed       there is no MODEL_CARD.md" in told.out
    assert told.err.startswith(f"medrationale: {compact} failed card;")


def test_a_folder_of_a_later_version_passes_and_says_so(compact: Path) -> None:
    edited(compact, lambda data: data["training"].update(medrationale="99.0"))
    version = next(check for check in verify(compact) if check.name == "version")
    assert version.passed and "newer than this" in version.detail
