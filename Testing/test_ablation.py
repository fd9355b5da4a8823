"""The ablation: every arm from one start, measured alike, gone on with, and told in one table."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

pytest.importorskip("torch")

import MedRationaleTraining.ablation as ablation  # noqa: E402
from MedRationaleTraining.ablation import (  # noqa: E402
    ARM,
    ARMS,
    FIGURES,
    METRICS,
    OTHER_SEED,
    ablate,
    arms,
    table,
    terminal_table,
    violations,
)
from MedRationaleTraining.cli import main  # noqa: E402
from MedRationaleTraining.config import ConstraintConfig  # noqa: E402
from MedRationaleTraining.data.stacks import StackDataset, whole_exam  # noqa: E402
from MedRationaleTraining.data.synthetic import StoredExam, stored_exams  # noqa: E402
from training_samples import tiny_run  # noqa: E402

from MedRationaleLib.errors import InputError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FEW = 3
SETTINGS = ROOT / "Training" / "configs" / "ablations"


@pytest.fixture(scope="module")
def few_thresholds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("MedRationaleTraining.calibration.GLAND", (0.5,))
        patch.setattr("MedRationaleTraining.calibration.FLOORS", (0.4,))
        patch.setattr(ablation, "STACKS", FEW)
        yield


@pytest.fixture(scope="module")
def config(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory):
    return tiny_run(tmp_path_factory.mktemp("ablation"), tiny_set, steps=2, val=str(tiny_set), validation_cases=1)


@pytest.fixture(scope="module")
def record(few_thresholds, config, tiny_set: Path):
    return ablate(config, SETTINGS, tiny_set, seeds=[0, 1], cases=1, command="this")


def test_the_arms_differ_in_the_constraints_alone() -> None:
    chosen = arms(SETTINGS, ConstraintConfig(localise_share=0.3, contain_share=0.5))
    assert {k: (c.disentangle, c.localise, c.contain_share, c.solver) for k, c in chosen.items()} == {
        "none": (False, False, 0.5, "augmented"),
        "disentangle": (True, False, 0.5, "augmented"),
        "paper": (True, True, 1.0, "augmented"),
        "both": (True, True, 0.5, "augmented"),
        "penalty": (True, True, 0.5, "penalty"),
    }
    assert {c.localise_share for c in chosen.values()} == {0.3}


def test_arms_that_begin_from_random_weights_are_warned_of(record, config, tiny_set: Path, tmp_path, caplog) -> None:
    shutil.copytree(config.out, tmp_path / "again")
    again = replace(config, out=str(tmp_path / "again"))
    ablate(again, SETTINGS, tiny_set, seeds=[0], only=["none"], cases=1)
    assert "no --initial: every arm begins from random weights" in caplog.text


def test_every_arm_is_measured_alike_and_the_record_says_how(record, config) -> None:
    assert json.loads((Path(config.out) / METRICS).read_text(encoding="utf-8")) == record
    assert record["command"] == "this" and record["seeds"] == [0, 1] and record["commit"]
    assert record["split"]["examinations"] == 1
    assert list(record["ablation"]) == list(ARMS)
    for rows in record["ablation"].values():
        assert list(rows) == list(FIGURES)
        assert all(len(row["per_seed"]) == 2 for row in rows.values())
        assert (
            rows["max_violation"]["mean"] > 0 and rows["max_violation_test"]["mean"] > 0
        )  # two steps from random weights hold no constraint
        low, high = rows["gland_dice"]["ci95"]
        assert low <= rows["gland_dice"]["mean"] <= high


def test_what_is_done_is_not_done_again(record, config, tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_):
        raise AssertionError("a finished run is trained again")

    monkeypatch.setattr(ablation, "Trainer", fails)
    again = ablate(config, SETTINGS, tiny_set, seeds=[0, 1], cases=1, command="this")
    assert again == record


def test_more_examinations_cost_no_second_training(record, config, tiny_set: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ablation, "Trainer", None)
    shutil.copytree(config.out, tmp_path / "runs")
    elsewhere = replace(config, out=str(tmp_path / "runs"))
    more = ablate(elsewhere, SETTINGS, tiny_set, seeds=[0], only=["both"], cases=99)
    assert more["split"]["examinations"] == len(stored_exams(tiny_set))
    then, now = record["ablation"]["both"], more["ablation"]["both"]
    assert now["max_violation"]["per_seed"] == then["max_violation"]["per_seed"][:1]
    assert now["max_violation_test"]["per_seed"] != then["max_violation_test"]["per_seed"][:1]
    again = ablate(elsewhere, SETTINGS, tiny_set, seeds=[0], only=["both"], cases=1)
    assert again["ablation"]["both"]["max_violation_test"]["per_seed"] == then["max_violation_test"]["per_seed"][:1]


def test_violations_are_those_of_the_largest_constraint_and_never_negative(record, config, tiny_set: Path) -> None:
    model = Path(config.out) / "both" / "seed0" / "model"
    stacks = [whole_exam(StoredExam.open(folder)) for folder in stored_exams(tiny_set, 1)]
    found = violations(model, stacks, arms(SETTINGS, config.constraints)["both"])
    known = json.loads((model.parent / ARM).read_text(encoding="utf-8"))
    # `evaluate` takes an examination with its mirror image, which bfloat16 may round otherwise.
    assert known["violations"]["max_violation_test"] == pytest.approx(found, rel=0.01, abs=0.01)
    assert known["figures"]["max_violation"] == max(known["violations"]["max_violation"].values())
    assert any(name.startswith("contain") for name in found)  # that of arms that were not trained with it, too
    assert min(found.values()) >= 0 and max(found.values()) > 0
    assert record["ablation"]["both"]["max_violation_test"]["per_seed"][0] == pytest.approx(
        max(found.values()), rel=0.01
    )
    loose = violations(model, stacks, ConstraintConfig(localise_share=50.0, disentangle=False))
    assert all(loose[name] <= found[name] for name in loose)


def test_an_arm_without_a_constraint_is_measured_with_it(record, config, tiny_set: Path) -> None:
    model = Path(config.out) / "paper" / "seed0" / "model"
    ours = arms(SETTINGS, config.constraints)["both"]
    drawn = StackDataset(config.train, config.sampling, length=FEW, seed=OTHER_SEED)
    trained, tested = (
        [drawn[i] for i in range(FEW)],
        [whole_exam(StoredExam.open(f)) for f in stored_exams(tiny_set, 1)],
    )
    for figure, stacks in (("max_violation", trained), ("max_violation_test", tested)):
        found = violations(model, stacks, ours)
        assert record["ablation"]["paper"][figure]["per_seed"][0] == pytest.approx(max(found.values()), rel=0.01)


def test_the_table_has_a_row_for_each_arm(record) -> None:
    lines = table(record).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(ARMS.values())
    most = record["ablation"]["both"]["max_violation"]["per_seed"]
    assert f"(up to {max(most):.3f})" in lines[4]  # no interval that would reach below 0


def test_the_terminals_table_is_whole_in_80_columns(record) -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(record))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert all(arm in shown for arm in ARMS)
    assert f"{record['ablation']['both']['max_violation']['mean']:.3f}" in shown


def test_a_baseline_has_no_arms(tmp_path: Path, capsys) -> None:
    given = ["ablate", "--baseline", "unet", "--train", "[none]", "--test", "none", "--out", str(tmp_path / "out")]
    assert main(given) == 2
    assert "got a baseline" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_some_arms_alone_are_measured_as_in_the_whole(record, config, tiny_set: Path) -> None:
    """The runs are those of the whole, and none is repeated."""
    whole = (Path(config.out) / METRICS).read_text(encoding="utf-8")
    some = ablate(config, SETTINGS, tiny_set, seeds=[0, 1], only=["penalty", "none"], cases=1, command="this")
    (Path(config.out) / METRICS).write_text(whole, encoding="utf-8")
    assert some["ablation"] == {arm: record["ablation"][arm] for arm in ("none", "penalty")}
    other = replace(config, constraints=replace(config.constraints, contain_share=0.9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "Trainer", None)  # no share has a say in weights without constraints
        ablate(other, SETTINGS, tiny_set, seeds=[0], only=["none"], cases=1)
    (Path(config.out) / METRICS).write_text(whole, encoding="utf-8")
    with pytest.raises(InputError, match="got neither"):
        ablate(config, SETTINGS, tiny_set, only=["neither"])


@pytest.mark.parametrize(
    ("given", "expected"), [("disentangled: yes", "Expected settings"), ("[1", "Expected the settings of an arm")]
)
def test_settings_of_an_arm_that_are_none_are_one_sentence(given: str, expected: str, tmp_path: Path) -> None:
    for arm in ARMS:
        (tmp_path / f"{arm}.yaml").write_text(given)
    with pytest.raises(InputError, match=expected):
        arms(tmp_path, ConstraintConfig())


def test_the_command_asks_for_a_validation_set(tiny_set: Path, tmp_path: Path, capsys) -> None:
    run = tiny_run(tmp_path / "out", tiny_set)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(run)))))
    given = ["ablate", "--config", str(tmp_path / "run.yaml"), "--arms", str(SETTINGS), "--test", str(tiny_set)]
    assert main(given) == 2
    assert "validation set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_other_settings_is_not_taken_for_this_one(record, config, tiny_set: Path) -> None:
    with pytest.raises(InputError, match=r"one with other steps; choose another `out`"):
        ablate(replace(config, steps=3), SETTINGS, tiny_set, seeds=[9, 0], only=["none"], cases=1)
    assert not (Path(config.out) / "none" / "seed9").exists(), "refused before any other run is begun"


def test_what_cannot_be_measured_is_refused_before_anything_is_trained(config, tiny_set: Path, tmp_path: Path) -> None:
    fresh = replace(config, out=str(tmp_path / "runs"))
    with pytest.raises(InputError, match="Expected a synthetic set in"):
        ablate(fresh, SETTINGS, tmp_path / "none", seeds=[0], cases=1)
    with pytest.raises(InputError, match="at least one seed"):
        ablate(fresh, SETTINGS, tiny_set, seeds=[], cases=1)
    assert not Path(fresh.out).exists()


def test_a_value_of_another_type_in_an_arms_file_is_one_sentence(tmp_path: Path) -> None:
    for arm in ARMS:
        (tmp_path / f"{arm}.yaml").write_text("disentangle: maybe\n")
    with pytest.raises(InputError, match=r"none.yaml, got: .*disentangle"):
        arms(tmp_path, ConstraintConfig())
