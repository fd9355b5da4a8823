"""MONAI's networks on the same road as the model: fit, thresholds, evaluation, resume."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

torch = pytest.importorskip("torch")

from MedRationaleTraining.baselines import BaselineTrainer, SegmentationBaseline  # noqa: E402
from MedRationaleTraining.cli import main  # noqa: E402
from MedRationaleTraining.data.stacks import whole_exam  # noqa: E402
from MedRationaleTraining.data.synthetic import StoredExam, stored_exams  # noqa: E402
from MedRationaleTraining.evaluation import raw_dice  # noqa: E402
from MedRationaleTraining.trainer import STATE, read_state  # noqa: E402
from training_samples import small_networks, tiny_run  # noqa: E402

from MedRationaleLib.model.checkpoint import WEIGHTS  # noqa: E402


@pytest.mark.parametrize("name", ["unet", "swin_unetr"])
def test_a_baseline_sees_each_slice_alone_and_gives_masks_of_the_examples_size(name: str) -> None:
    torch.manual_seed(0)
    network, images = SegmentationBaseline(name).eval(), torch.randn(1, 2, 3, 256, 256)
    with torch.no_grad():
        both, alone = network(images), network(images[:, 1:])
    assert both.shape == (1, 2, 4, 128, 128)
    assert torch.allclose(both[:, 1:], alone, atol=1e-4)


def test_a_baseline_is_trained_and_measured_by_the_same_commands(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One examination stands for three, and one threshold for many."""
    one = tmp_path / "one"
    shutil.copytree(tiny_set, one)
    lesions = [p for p in stored_exams(one) if any(r.is_lesion for r in StoredExam.open(p).rationales)]
    for folder in set(stored_exams(one)) - {lesions[0]}:
        shutil.rmtree(folder)
    small_networks(monkeypatch)
    monkeypatch.setattr("MedRationaleTraining.calibration.GLAND", (0.5,))
    monkeypatch.setattr("MedRationaleTraining.calibration.FLOORS", (0.4,))
    run = tiny_run(tmp_path / "run", tiny_set, steps=2, save_every=1, baseline="unet", val=str(one), validation_cases=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(run)))))
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "val.csv").read_text(encoding="utf-8").startswith("step,dice_gland")
    capsys.readouterr()
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]) == 2
    assert "`medrationale-train resume --run" in capsys.readouterr().err.replace("\n", " ")
    model, out = tmp_path / "run" / "model", tmp_path / "test"
    assert main(["evaluate", "--model", str(model), "--data", str(one), "--out", str(out)]) == 0
    report = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert report["model"] == "unet" and report["data"]["examinations"] == 1
    assert 0 <= report["metrics"]["dice_gland"]["value"] <= 1 and "lesion_ap" in report["metrics"]
    assert "evidence" not in report and "retrieval" not in report
    assert "gland Dice" in (out / "evaluation.md").read_text(encoding="utf-8")
    (model / WEIGHTS).write_bytes(b"nothing")
    assert main(["evaluate", "--model", str(model), "--data", str(one), "--out", str(out)]) == 2
    assert "Expected the weights of a unet" in capsys.readouterr().err


def test_bfloat16_logits_are_measured_like_others(tiny_set: Path) -> None:
    stack = whole_exam(StoredExam.open(stored_exams(tiny_set)[0]))
    logits = torch.randn(stack.masks.shape, generator=torch.Generator().manual_seed(0))
    found = raw_dice(logits.bfloat16(), stack)
    assert found == raw_dice(logits, stack) and 0 < found["gland"] < 1


def test_a_stopped_baseline_goes_on_to_the_same_bits(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_networks(monkeypatch)

    class Stopped(BaselineTrainer):
        def train_step(self, batch):
            if self.step == 1:
                raise KeyboardInterrupt
            return super().train_step(batch)

    def config(name: str):
        return tiny_run(tmp_path / name, tiny_set, steps=2, save_every=1, baseline="unet")

    with pytest.raises(KeyboardInterrupt):
        Stopped(config("stopped")).fit()
    for name in ("stopped", "whole"):
        BaselineTrainer(config(name)).fit()
    stopped, whole = (read_state(tmp_path / name / STATE)["ema"] for name in ("stopped", "whole"))
    assert all(torch.equal(stopped[key], whole[key]) for key in whole)
