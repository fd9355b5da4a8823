"""Training from the first step to the exported model, stopped, resumed, and given what cannot work."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ABSENT = [name for name in ("lightning", "open_clip", "monai", "picai_eval", "jsonargparse") if find_spec(name) is None]
if ABSENT:
    pytest.skip(f"the train extra is not installed: {', '.join(ABSENT)}", allow_module_level=True)

from MedRationaleTraining.cli import main  # noqa: E402
from MedRationaleTraining.config import (  # noqa: E402
    ConstraintConfig,
    FitConfig,
    LossConfig,
    OptimizerConfig,
    SamplingConfig,
    TuningConfig,
    check,
)
from MedRationaleTraining.constraints import LESION_SHARE  # noqa: E402
from MedRationaleTraining.data.stacks import slice_lesions, whole_exam  # noqa: E402
from MedRationaleTraining.data.synthetic import StoredExam, stored_exams  # noqa: E402
from MedRationaleTraining.evaluation import evaluate  # noqa: E402
from MedRationaleTraining.export import export_run, model_card  # noqa: E402
from MedRationaleTraining.losses import NodeTargets  # noqa: E402
from MedRationaleTraining.objective import Part, places  # noqa: E402
from MedRationaleTraining.trainer import STATE, Trainer, read_state  # noqa: E402
from training_samples import TINY, tiny_run  # noqa: E402

from MedRationaleLib.concepts import ConceptBank  # noqa: E402
from MedRationaleLib.decision_tree import DecisionTree  # noqa: E402
from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.model.checkpoint import load_checkpoint  # noqa: E402
from MedRationaleLib.model.config import ModelConfig, medsam_biomedclip  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the process that is killed, for sums in another order are other numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    """A finished run."""
    config = tiny_run(
        tmp_path_factory.mktemp("runs") / "whole", tiny_set, val=str(tiny_set), validate_every=6, validation_cases=1
    )
    Trainer(config).fit()
    return config


@pytest.fixture(scope="module")
def model(run: FitConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(Path(run.out), tmp_path_factory.mktemp("models") / "tiny")


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------ going on


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from training_samples import tiny_run
from MedRationaleTraining.trainer import Trainer

class Killed(Trainer):
    def save(self):
        if self.step == 4:  # in the middle of writing the second checkpoint
            (self.out / "state.ckpt.part").write_bytes(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        super().save()

Killed(tiny_run(Path(sys.argv[1]), Path(sys.argv[2]))).fit()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_run_that_was_killed_while_saving_ends_with_the_same_bits_as_one_that_was_not(
    run: FitConfig, tiny_set: Path, tmp_path: Path
) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "Training", ROOT / "Testing")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(tiny_set)],
        capture_output=True, text=True, encoding="utf-8", env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_state(tmp_path / "killed" / STATE)["step"] == 2
    Trainer(tiny_run(tmp_path / "killed", tiny_set)).fit()
    assert same(read_state(tmp_path / "killed" / STATE), read_state(Path(run.out) / STATE))


SEVERAL = """
import sys
from pathlib import Path
from training_samples import tiny_run
from MedRationaleTraining import trainer
from MedRationaleTraining.config import LossConfig
trainer.LOG_EVERY = 1
config = tiny_run(Path(sys.argv[1]), Path(sys.argv[2]), steps=5, batch=4, micro_batch=1, loss=LossConfig(text_every=2))
trainer.Trainer(config).fit()
"""


def test_two_processes_follow_the_loss_curve_of_one(tiny_set: Path, tmp_path: Path) -> None:
    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, str(script), str(tmp_path / name), str(tiny_set)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
    one, two = (np.loadtxt(tmp_path / name / "train.csv", delimiter=",", skiprows=1) for name in launchers)
    assert one.shape == two.shape and len(one) == 5
    np.testing.assert_allclose(np.delete(one, 1, 1), np.delete(two, 1, 1), rtol=1e-3)
    first, second = (read_state(tmp_path / name / STATE) for name in launchers)
    assert np.allclose(first["multipliers"]["value"], second["multipliers"]["value"], rtol=1e-3, atol=1e-5)
    moved = [(a - b).norm() / b.norm().clamp(min=1e-3) for a, b in zip(
        first["model"].values(), second["model"].values(), strict=True)]  # fmt: skip
    assert max(moved) < 0.02


def test_parts_of_a_batch_must_go_evenly_into_the_processes(tiny_set: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lightning.fabric.Fabric.world_size", 2)
    with pytest.raises(InputError, match="evenly into the 2 processes"):
        Trainer(tiny_run(tmp_path / "run", tiny_set, batch=3, micro_batch=1))


def test_a_run_that_learns_its_text_now_and_then_and_warms_up_resumes_to_the_same_bits(
    tiny_set: Path, tmp_path: Path
) -> None:
    def config(name: str) -> FitConfig:
        special = {"loss": LossConfig(text_every=3), "constraints": ConstraintConfig(start=2)}
        return tiny_run(tmp_path / name, tiny_set, steps=4, save_every=1, **special)

    class Stopped(Trainer):
        def train_step(self, stacks):
            if self.step == 2:
                raise KeyboardInterrupt
            return super().train_step(stacks)

    with pytest.raises(KeyboardInterrupt):
        Stopped(config("stopped")).fit()
    Trainer(config("stopped")).fit()
    Trainer(config("whole")).fit()
    assert same(read_state(tmp_path / "stopped" / STATE), read_state(tmp_path / "whole" / STATE))


def test_workers_make_the_same_examples_as_the_process_itself(run: FitConfig, tiny_set: Path, tmp_path: Path) -> None:
    Trainer(tiny_run(tmp_path / "workers", tiny_set, workers=1)).fit()
    assert same(read_state(tmp_path / "workers" / STATE)["ema"], read_state(Path(run.out) / STATE)["ema"])


def test_a_finished_run_is_not_trained_again_and_its_curve_has_no_row_twice(run: FitConfig) -> None:
    before = (Path(run.out) / "val.csv").read_text(encoding="utf-8")
    with (Path(run.out) / "val.csv").open("a") as file:
        file.write("9,0.5\n")  # logged after the checkpoint by a run that was then killed
    Trainer(run).fit()
    assert (Path(run.out) / "val.csv").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("constraints", "terms"),
    [
        (ConstraintConfig(disentangle=False, localise=False), ("dice", "nodes", "slices")),
        (ConstraintConfig(solver="penalty"), ("constraints",)),  # of which no multiplier changes the weight meanwhile
    ],
)
def test_training_on_one_example_lowers_its_terms(
    constraints: ConstraintConfig, terms: tuple[str, ...], tiny_set: Path, tmp_path: Path
) -> None:
    rows = []

    class Repeating(Trainer):
        def batches(self):
            told = [stack for stack in map(self.dataset.__getitem__, range(12)) if len(stack.answers) > 2]
            return iter([[told[:2]]] * self.config.steps)

        def train_step(self, batch):
            rows.append(super().train_step(batch))
            return rows[-1]

    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=5, final_lr=1.0)
    config = tiny_run(tmp_path / "run", tiny_set, steps=40, save_every=40, optimizer=optimizer, constraints=constraints)
    Repeating(config).fit()
    for name in terms:
        assert sum(r[name] for r in rows[-5:]) < 0.95 * sum(r[name] for r in rows[:5]), name


def test_a_run_may_begin_from_a_model_and_its_card_says_so(run: FitConfig, model: Path, tmp_path: Path) -> None:
    begun = replace(run, out=str(tmp_path / "on"), val=None, steps=1, initial=str(model))
    trainer = Trainer(begun)
    before = load_checkpoint(model, with_text=True).model.state_dict()
    assert same(dict(before), dict(trainer.model.state_dict()))
    trainer.fit()
    folder = export_run(tmp_path / "on", tmp_path / "model")
    checkpoint = load_checkpoint(model)
    assert load_checkpoint(folder).training["initial"]["sha256"] == checkpoint.sha256
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"an earlier run (6 steps on tiny, SHA-256 {checkpoint.sha256[:12]}" in card
    Trainer(replace(begun, out=str(tmp_path / "further"), initial=str(folder))).fit()
    card = (export_run(tmp_path / "further", tmp_path / "model2") / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Together that is 8 steps." in card


def test_data_and_terms_of_earlier_runs_stay_in_the_card(model: Path) -> None:
    checkpoint = load_checkpoint(model, with_text=True)
    ours = {**checkpoint.training["sets"][0], "picai_labels": False}
    older = {**ours, "name": "older", "examinations": 5, "seed": 3, "picai_labels": True}
    cards = [
        model_card(checkpoint.model, checkpoint.training | {"sets": [ours], "initial": initial}, {}, None, None)
        for initial in (None, {"sha256": "0" * 64, "steps": 3, "sets": [older, ours]})
    ]
    assert ["CC BY-NC" in card for card in cards] == [False, True]
    assert "`older`: 5 synthetic examinations" in cards[1] and cards[1].count("- `tiny`") == 1


def test_a_run_may_begin_from_a_model_with_another_form_of_heat(run: FitConfig, model: Path, tmp_path: Path) -> None:
    """As the constraints begin from a model that Eq. 2 alone trained, before heat had a form to learn."""
    sizes = replace(run.model, heatmap="relu")
    Trainer(replace(run, out=str(tmp_path / "on"), val=None, steps=1, initial=str(model), model=sizes)).fit()
    begun = load_checkpoint(export_run(tmp_path / "on", tmp_path / "model")).model
    assert load_checkpoint(model).model.config.heatmap == "sigmoid" and begun.config.heatmap == "relu"
    assert begun.heat(torch.tensor([-0.5, 0.25])).tolist() == [0.0, 0.25]


def test_a_run_may_begin_from_a_model_without_the_reasons_own_convolutions(
    run: FitConfig, model: Path, tmp_path: Path
) -> None:
    """What a model of an earlier version lacks begins as if it were not there; its weights cannot be mixed in then."""
    Trainer(replace(run, out=str(tmp_path / "old"), val=None, steps=1, model=replace(run.model, reason_dim=0))).fit()
    old = export_run(tmp_path / "old", tmp_path / "without")
    begun = replace(run, out=str(tmp_path / "on"), val=None, steps=1, initial=str(old))
    trainer = Trainer(begun)
    before, now = load_checkpoint(old, with_text=True).model.state_dict(), trainer.model.state_dict()
    assert same(before, {name: now[name] for name in before})
    trainer.fit()
    assert load_checkpoint(export_run(tmp_path / "on", tmp_path / "new")).model.config.reason_dim == TINY.reason_dim
    with pytest.raises(InputError, match="a run from a model of the same sizes"):
        export_run(tmp_path / "on", tmp_path / "mixed", initial_share=0.5)
    with pytest.raises(InputError, match="a model of the configured sizes"):
        Trainer(replace(begun, initial=str(tmp_path / "new"), model=replace(run.model, reason_dim=0)))


def test_a_run_may_begin_with_concepts_apart_and_goes_on_from_where_it_stopped(run: FitConfig, tmp_path: Path) -> None:
    spread = replace(run, out=str(tmp_path / "spread"), val=None, steps=2, tuning=TuningConfig(spread=True))
    alike = []
    for config in (run, spread):
        embeddings = Trainer(replace(config, out=str(tmp_path / "begun"))).model.f_txt.concept_embeddings(
            ConceptBank.load()
        )
        alike.append(float((embeddings @ embeddings.T).mean()))
    assert alike[1] < 0.9 * alike[0]  # 40 concepts in 8 dimensions
    Trainer(spread).fit()
    on = Trainer(spread)
    on.resume()
    assert same(on.model.state_dict(), read_state(tmp_path / "spread" / STATE)["model"])


def test_settings_of_a_run_from_before_reasons_had_convolutions_are_those_of_a_model_without_them(
    run: FitConfig,
) -> None:
    settings = json.loads(json.dumps(asdict(run)))
    assert FitConfig.from_dict(settings) == run
    del settings["model"]["reason_dim"]
    assert FitConfig.from_dict(settings).model == replace(run.model, reason_dim=0)


def test_slices_are_trained_where_inference_asks_them(run: FitConfig, tmp_path: Path) -> None:
    """Of the two units the one that is asked for: both have a gradient, not the same, and one alone looks at glands."""
    told = []
    for unit in ("whole", "likeliest"):
        loss = replace(run.loss, slice_unit=unit, dice_weight=0.0, focal_weight=0.0, node_weight=0.0)
        loss = replace(loss, rationale_weight=0.0)
        config = replace(run, out=str(tmp_path / unit), val=None, steps=1, loss=loss)
        trainer = Trainer(config)
        parts = next(iter(trainer.batches()))
        terms, _ = trainer.objective(Part(parts[0], 0, 0))
        terms["slices"].backward()
        gradient = trainer.model.f_img.patch_embed.proj.weight.grad
        assert gradient is not None and gradient.abs().sum() > 0
        for stack in parts[0]:
            stack.masks.zero_()  # without a gland, what is not lesion is the whole slice
        without = trainer.objective(Part(parts[0], 0, 0))[0]["slices"]
        told.append((float(terms["slices"].detach()), float(without.detach())))
    assert told[0][0] == told[0][1] and abs(told[1][0] - told[1][1]) > 1e-4


def test_a_slices_lesion_is_nearer_to_presence_by_a_margin_and_nothing_else_is(run: FitConfig, tmp_path: Path) -> None:
    """A margin beyond reach costs itself on lesions, which are half of one question's loss, and nothing elsewhere."""
    loss = replace(run.loss, slice_unit="likeliest", slice_weight=1.0, slice_margin=100.0)
    trainer = Trainer(replace(run, out=str(tmp_path / "run"), val=None, steps=1, loss=loss))
    stacks = next(iter(trainer.batches()))[0]
    assert any(r is not None for s in stacks for r in slice_lesions(s))
    told = trainer.objective(Part(stacks, 0, 0))[0]["slices"]
    nodes = len(NodeTargets(DecisionTree.load(), trainer.model.concepts).nodes)
    assert float(told.detach()) == pytest.approx(trainer.model.logit_scale.exp().item() * 100 / 2 / nodes, rel=0.05)


def test_a_slice_is_trained_in_its_largest_lesion_and_in_the_gland_without_any(tiny_set: Path) -> None:
    exams = [StoredExam.open(folder) for folder in stored_exams(tiny_set)]
    stacks = [whole_exam(exam) for exam in exams]
    assert any(r is not None for s in stacks for r in slice_lesions(s))
    for stack in stacks:
        lesion, elsewhere = places(stack)
        for s, largest in enumerate(slice_lesions(stack)):
            assert largest is None or stack.is_lesion[largest]
            assert torch.equal(lesion[s], torch.zeros(64, 64) if largest is None else stack.regions[largest, s])
        assert not elsewhere[stack.masks[:, 3] > 0].any()
        assert torch.equal(elsewhere[stack.masks[:, 3] == 0], stack.masks[:, 0][stack.masks[:, 3] == 0])


def test_the_heat_of_a_run_may_begin_elsewhere_than_the_initial_models(
    run: FitConfig, model: Path, tmp_path: Path
) -> None:
    begun = replace(run, out=str(tmp_path / "on"), val=None, steps=1, initial=str(model))
    begun = replace(begun, constraints=replace(begun.constraints, heat=(25.0, -16.0)))
    trainer = Trainer(begun)
    assert trainer.model.heat(torch.tensor(0.64)).item() == pytest.approx(0.5)
    assert trainer.model.heat(torch.tensor(0.68)).item() == pytest.approx(1 / (1 + math.exp(-1)))
    trainer.fit()
    again = Trainer(begun)
    assert again.resume() and again.model.heat_bias.item() == trainer.model.heat_bias.item() != -16.0


def test_after_a_warm_up_the_heat_begins_as_bright_as_lesions_are_large(
    run: FitConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever Eq. 2 has left the cosines; a model whose heat was trained, or set, keeps it."""
    caplog.set_level("INFO")
    warm = replace(run, out=str(tmp_path / "run"), val=None, steps=3)
    warm = replace(warm, constraints=replace(warm.constraints, start=2))
    trainer = Trainer(warm)
    batches = trainer.batches()
    first = next(batches)
    trainer.train_step(first)
    model, described = trainer.model, trainer.objective.module.constraints.described
    assert len(described) > 10 and model.heat_bias.item() == -8.0
    trainer._start_heat(first)
    with torch.no_grad():
        output = model(torch.stack([s.images for s in first[0]]))
        cosines = torch.stack([output.similarity(i, model.concept_embeddings[described]) for i in (0, 1)])
    assert model.heat(cosines).mean().item() == pytest.approx(LESION_SHARE, rel=1e-3)
    assert trainer.ema.module.heat_bias == model.heat_bias and trainer.ema.module.heat_scale == model.heat_scale
    trainer = Trainer(warm)
    trainer.fit()
    assert "step 2: the heat begins at 15.0 cos" in caplog.text and trainer.model.heat_bias.item() < -9.0
    caplog.clear()
    for changes in ({"heat": (15.0, -8.0)}, {"disentangle": False, "localise": False}, {"start": 0}):
        other = replace(warm, out=str(tmp_path / next(iter(changes))))
        Trainer(replace(other, constraints=replace(warm.constraints, **changes))).fit()
    Trainer(replace(warm, out=str(tmp_path / "relu"), model=replace(run.model, heatmap="relu"))).fit()
    assert "the heat begins" not in caplog.text


@pytest.mark.parametrize("encoder", ["full", "lora"])
def test_frozen_masks_stay_bit_for_bit_with_their_thresholds_while_heatmaps_are_trained(
    encoder: str, run: FitConfig, model: Path, tiny_set: Path, tmp_path: Path
) -> None:
    initial = Path(shutil.copytree(model, tmp_path / "initial"))
    settings = json.loads((initial / "config.json").read_text())
    settings["postprocessing"] = {"lesion_likelihood": 0.125, "gland_threshold": 0.4}
    (initial / "config.json").write_text(json.dumps(settings))
    tuning = TuningConfig(masks="frozen", image_encoder=encoder, lora_rank=2)
    frozen = replace(run, out=str(tmp_path / "run"), val=None, steps=2, initial=str(initial), tuning=tuning)
    trainer = Trainer(frozen)
    trainer.fit()
    assert math.isfinite(trainer.stationarity)  # the questions' loss still has a gradient
    folder = export_run(tmp_path / "run", tmp_path / "model", calibrate_on=tiny_set)
    before, after = (load_checkpoint(path) for path in (initial, folder))
    images = torch.randn(1, 2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        was, now = before.model(images), after.model(images)
    assert torch.equal(was.mask_logits, now.mask_logits) and not torch.equal(was.embedding, now.embedding)
    assert after.postprocessing.items() >= settings["postprocessing"].items()
    assert "presence_margin" in after.postprocessing
    assert "the masks are those\nof the weights that it began from" in (folder / "MODEL_CARD.md").read_text()
    settings["postprocessing"] = {}  # none to keep: they are chosen, as for any model
    (initial / "config.json").write_text(json.dumps(settings))
    chosen = load_checkpoint(export_run(tmp_path / "run", tmp_path / "chosen", calibrate_on=tiny_set))
    assert chosen.training["calibration"]["gland_dice"] and not after.training["calibration"]["gland_dice"]
    (initial / "model.safetensors").unlink()
    with pytest.raises(InputError):
        export_run(tmp_path / "run", tmp_path / "again", calibrate_on=tiny_set)


def test_frozen_masks_need_a_model_whose_they_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="initial model whose masks stay"):
        check(tiny_run(tmp_path / "run", tmp_path, tuning=TuningConfig(masks="frozen")))


def test_exported_weights_may_lie_between_those_of_the_run_and_those_it_began_from(
    run: FitConfig, model: Path, tmp_path: Path
) -> None:
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=1, final_lr=1.0, ema=0.0)
    further = replace(run, out=str(tmp_path / "further"), val=None, steps=3, initial=str(model), optimizer=optimizer)
    Trainer(further).fit()
    ended, mixed = (
        export_run(tmp_path / "further", tmp_path / name, initial_share=share)
        for name, share in (("ended", 0.0), ("mixed", 0.25))
    )
    weights = [load_checkpoint(folder, with_text=True).model for folder in (model, ended, mixed)]
    name = "f_img.patch_embed.proj.weight"
    began, end, between = (m.state_dict()[name] for m in weights)
    assert (began - end).abs().max() > 1e-3
    assert torch.allclose(between, 0.25 * began + 0.75 * end, atol=1e-3 * float(end.abs().max()))
    expected = weights[2].f_txt.concept_embeddings(ConceptBank.load())  # of the mixed text tower, not a mixture
    assert torch.allclose(weights[2].concept_embeddings, expected, atol=1e-3)
    assert load_checkpoint(mixed).training["initial_share"] == 0.25
    assert "Of these weights 0.25 are those that the run began from" in (mixed / "MODEL_CARD.md").read_text()
    assert "Of these weights" not in (ended / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(("share", "words"), [(1.5, "between 0 and 1"), (0.5, "from random weights")])
def test_a_share_that_cannot_be_is_refused(run: FitConfig, tmp_path: Path, share: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        export_run(Path(run.out), tmp_path / "model", initial_share=share)
    assert not (tmp_path / "model").exists()


def test_weights_are_not_mixed_with_those_of_another_model(run: FitConfig, model: Path, tmp_path: Path) -> None:
    further = replace(run, out=str(tmp_path / "further"), val=None, steps=1, initial=str(model))
    Trainer(further).fit()
    settings = json.loads((tmp_path / "further" / "run.json").read_text())
    settings["initial"]["sha256"] = "0" * 64
    (tmp_path / "further" / "run.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="Expected the model that the run began from"):
        export_run(tmp_path / "further", tmp_path / "out", initial_share=0.25)


# ------------------------------------------------------------------ what cannot work


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": []}, "synthetic set in train"),
        ({"steps": 0}, "steps of at least 1"),
        ({"batch": 0}, "batch of at least 1"),
        ({"model": replace(TINY, heads=3)}, "heads must divide embed_dim"),
        ({"model": replace(TINY, pixels=250)}, "a model that can be built"),
        ({"batch": 3, "micro_batch": 2}, "a multiple of micro_batch"),
        ({"constraints": ConstraintConfig(disentangle_share=1.5)}, "disentangle_share above 0 up to 1"),
        ({"model": replace(TINY, text=replace(TINY.text, kind="biomedclip"))}, "model.text.folder"),
        ({"constraints": ConstraintConfig(margin=-0.1)}, "no negative margin"),
        ({"constraints": ConstraintConfig(heat=(0.0, -8.0))}, "positive first number in constraints.heat"),
        ({"sampling": SamplingConfig(slices=25)}, "sampling.slices from 1 to 24"),
        ({"sampling": SamplingConfig(move=2.0)}, "shares from 0 to 1"),
        ({"loss": LossConfig(dice_weight=-1.0)}, "weights of 0 or more"),
        ({"loss": LossConfig(text_every=0)}, "text_every"),
        ({"loss": LossConfig(slice_margin=0.2)}, "slice_unit likeliest"),
        ({"optimizer": OptimizerConfig(lr=0.0)}, "positive optimizer.lr"),
        ({"optimizer": OptimizerConfig(betas=(0.9, 1.0))}, "optimizer.betas"),
        ({"optimizer": OptimizerConfig(lr=float("inf"))}, "finite numbers, got optimizer.lr"),
        ({"loss": LossConfig(lesion_weight=-1.0)}, "weights of 0 or more"),
        ({"seed": -1}, "a seed of 0 or more"),
        ({"baseline": "unet", "initial": "folder"}, "no initial model for a baseline"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_without_data(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(replace(tiny_run(Path("nowhere"), Path("nowhere")), **changes))


def test_the_defaults_are_compact_and_can_be_trained() -> None:
    check(FitConfig(out="runs/x", train=["data/x"]))
    assert FitConfig(out="runs/x", train=["data/x"]).model == ModelConfig()


def test_a_loss_that_is_not_finite_is_one_sentence(tiny_set: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_run(tmp_path / "nan", tiny_set))
    with torch.no_grad():
        trainer.model.projection.fuse[-1].bias.fill_(float("nan"))
    with pytest.raises(InputError, match="finite loss") as refused:
        trainer.fit()
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "nan" / STATE).exists()


def test_weights_that_are_not_finite_do_not_replace_a_state(tiny_set: Path, tmp_path: Path) -> None:
    """The loss of the last step is finite, and what the step makes of the weights is not."""
    trainer = Trainer(tiny_run(tmp_path / "inf", tiny_set))
    trainer.save()
    before = (tmp_path / "inf" / STATE).read_bytes()
    with torch.no_grad():
        trainer.model.projection.fuse[-1].bias[0] = float("inf")
    with pytest.raises(InputError, match="Expected finite weights, got others at step 0"):
        trainer.save()
    assert (tmp_path / "inf" / STATE).read_bytes() == before


CONFIG = str(Path(__file__).parents[1] / "Training" / "configs" / "compact.yaml")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["fit", "--config", CONFIG, "--train", "one"], "a list such as [one,two] for --train, got one; correct it.\n"),
        (["fit", "--config", CONFIG, "--config", "FILE"], "'constraints.roh' in FILE; did you mean constraints.rho?"),
        (["fit", "--config", CONFIG, "--config", "TYPE"], "a whole number for --steps, got many; correct it in TYPE."),
        (
            ["fit", "--config", CONFIG, "--precision", "half"],
            "one of 'bf16-mixed', '32-true' for --precision, got half",
        ),
        (["fit"], "Expected --out and --train, got none"),
        (["fitt"], "Expected a command, got 'fitt'; did you mean fit?"),
        (["ablate", "--only", "none"], "a list such as [one,two], or null for --only, got none; correct it.\n"),
        (["evaluate", "--cases", "1.5"], "a whole number, or null for --cases, got 1.5; correct it.\n"),
        (["fit", "--baseline", "resnet"], "one of 'unet', 'swin_unetr', or null for --baseline, got resnet"),
        (["fit", "--constraints.heat", "25"], "two numbers such as [1.0,2.0], or null for --constraints.heat, got 25"),
        (["fit", "--config", "BROKEN"], 'in "BROKEN", line 1'),
    ],
)
def test_a_mistaken_option_is_told_in_the_words_that_were_typed(
    given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = {"FILE": "constraints:\n  roh: 1\n", "TYPE": "steps: many\n", "BROKEN": "a: [1\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        given = [str(tmp_path / name) if g == name else g for g in given]
        words = words.replace(name, str(tmp_path / name))
    assert main(given) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1


def test_an_output_that_is_a_file_is_one_sentence(tiny_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Expected an output folder, got the file"):
        Trainer(tiny_run(tmp_path / "file", tiny_set))


def test_an_empty_set_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Expected a synthetic set"):
        Trainer(tiny_run(tmp_path / "run", tmp_path))


def test_the_checkpoint_of_another_model_is_one_sentence(run: FitConfig) -> None:
    with pytest.raises(InputError, match="checkpoint of the configured model"):
        Trainer(replace(run, model=replace(TINY, neck_dim=64))).fit()


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_checkpoint_is_one_sentence(tiny_set: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(InputError, match="Expected a training state") as refused:
        Trainer(tiny_run(tmp_path, tiny_set)).fit()
    assert "\n" not in str(refused.value)


def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_state(
    run: FitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state, path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    trainer = Trainer(run)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="Expected room"):
        trainer.save()
    assert read_state(Path(run.out) / STATE)["step"] == run.steps
    assert not list(Path(run.out).glob("*.part"))


def test_a_damaged_examination_met_by_a_worker_is_one_sentence(tiny_set: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny_set / "00000", tmp_path / "set" / "00000")
    (tmp_path / "set" / "00000" / "labels.npy").write_bytes(b"torn")
    with pytest.raises(InputError, match="^Expected images.npy") as refused:
        Trainer(tiny_run(tmp_path / "run", tmp_path / "set", workers=1)).fit()
    assert "\n" not in str(refused.value)


def test_an_accelerator_that_is_not_there_is_one_sentence(tiny_set: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="accelerator"):
        Trainer(tiny_run(tmp_path / "run", tiny_set, accelerator="nonesuch"))


# ------------------------------------------------------------------ export and evaluation


def test_the_exported_model_has_the_averaged_weights_and_the_embeddings_of_its_text_tower(
    run: FitConfig, model: Path
) -> None:
    averaged = read_state(Path(run.out) / STATE)["ema"]
    loaded = load_checkpoint(model, with_text=True)
    for name, tensor in loaded.model.state_dict().items():
        if name != "concept_embeddings":
            assert torch.equal(tensor, averaged[f"module.{name}"].half().float()), name
    assert torch.allclose(
        loaded.model.concept_embeddings.norm(dim=1), torch.ones(len(loaded.model.concepts)), atol=1e-2
    )
    assert loaded.training["steps"] == run.steps


def test_the_model_folder_says_nothing_about_the_machine(run: FitConfig, model: Path) -> None:
    text = (model / "config.json").read_text(encoding="utf-8") + (model / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert str(Path(run.out).parent) not in text
    assert str(Path(run.train[0]).parent) not in text


def test_the_card_of_phantoms_claims_no_foreign_licence_and_says_what_it_is_not_for(model: Path) -> None:
    card = (model / "MODEL_CARD.md").read_text(encoding="utf-8")
    for words in ("not for diagnosis", "trained on synthetic images", "6 steps of 2 stacks", "Not evaluated yet"):
        assert words in card
    assert "CC BY-NC" not in card


def test_the_card_of_a_model_on_picai_shapes_carries_their_licence_and_citations(
    run: FitConfig, model: Path, tmp_path: Path
) -> None:
    from MedRationaleTraining.export import model_card

    loaded = load_checkpoint(model, with_text=True)
    training = json.loads(json.dumps(loaded.training))
    training["sets"][0] |= {"picai_labels": True, "real_backgrounds": True}
    card = model_card(loaded.model, training, {"lesion_likelihood": 0.4}, None, "val")
    for words in (
        "CC BY-NC 4.0",
        "Saha",
        "2024",
        "Pooch et al. 2025",
        "PROSTATEx (CC BY 3.0)",
        "Prostate-3T",
        "likelihood 0.4",
    ):
        assert words in card


@pytest.mark.parametrize(("reader", "licence"), [("picai", "CC BY-NC 4.0"), ("prostate158", "real examinations under")])
def test_the_card_does_not_call_real_examinations_synthetic(model: Path, reader: str, licence: str) -> None:
    from MedRationaleTraining.export import model_card

    loaded = load_checkpoint(model)
    training = json.loads(json.dumps(loaded.training))
    training["sets"].append({**training["sets"][0], "name": "clinic", "examinations": 7, "reader": reader})
    card = model_card(loaded.model, training, {}, None, None)
    assert f"- `clinic`: 7 real examinations, read as {reader}.\n" in card
    assert "trained on real and synthetic images" in card
    assert licence in card.split("## Licence")[1].split("##")[0] and "Apache" not in card


def test_evaluation_gives_every_figure_with_interval_and_baseline_and_goes_into_the_card(
    run: FitConfig, model: Path, tiny_set: Path, tmp_path: Path
) -> None:
    report = evaluate(model, tiny_set, tmp_path / "result")
    assert report == json.loads((tmp_path / "result" / "evaluation.json").read_text(encoding="utf-8"))
    assert set(report["metrics"]) == {
        *("dice_gland", "dice_pz", "dice_tz", "dice_lesion", "dice_lesion_smoothed"),
        *("lesion_ap", "case_auroc", "lesion_sensitivity", "false_candidates_per_case"),
        *("lesion_sensitivity_at_1_fp", "dice_lesion_at_1_fp"),
    }
    for unit in ("regions", "slices"):
        row = report["retrieval"][unit]["lesion_presence"]
        assert row["n"] > 3 and 0 < row["majority"] <= 1 and 0 <= row["ci95"][0] <= row["value"] <= row["ci95"][1] <= 1
    assert report["data"] == {"name": "tiny", "split": "train", "seed": 6, "examinations": 3}
    told = (tmp_path / "result" / "evaluation.md").read_text(encoding="utf-8")
    assert "gland Dice" in told
    contained = {k: row["value"] for k, row in report["constraints"].items() if k.startswith("contain.")}
    worst = max(contained, key=lambda name: contained[name])
    assert f"at least {contained[worst]:.3f}" in told and f"| {worst.removeprefix('contain.')} |" in told
    # The constraints are measured by the distance that the model was trained with.
    other = shutil.copytree(model, tmp_path / "other") / "config.json"
    config = json.loads(other.read_text(encoding="utf-8"))
    config["training"]["settings"]["constraints"]["distance"] = "iou"
    other.write_text(json.dumps(config), encoding="utf-8")
    by_overlap = evaluate(other.parent, tiny_set, tmp_path / "overlap", gradcam=False)["constraints"]["localise.gland"]
    assert by_overlap["value"] <= 1 < report["constraints"]["localise.gland"]["value"]
    # The model keeps its weights; card and configuration get the figures.
    before = load_checkpoint(model).sha256
    export_run(Path(run.out), model, evaluation=tmp_path / "result" / "evaluation.json")
    assert load_checkpoint(model).sha256 == before
    assert "gland Dice" in (model / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "metrics" in load_checkpoint(model).training["evaluation"]


def test_figures_of_other_weights_do_not_get_into_a_card(run: FitConfig, tmp_path: Path) -> None:
    report = {
        "model": "x", "weights_sha256": "0" * 64, "postprocessing": {}, "metrics": {},
        "data": {"examinations": 1, "split": "test"}, "retrieval": {"regions": {}, "slices": {}},
    }  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="one of others"):
        export_run(Path(run.out), tmp_path / "model", evaluation=tmp_path / "evaluation.json")
    with pytest.raises(InputError, match="got both"):
        export_run(Path(run.out), tmp_path / "model", evaluation=tmp_path / "evaluation.json", calibrate_on="val")
    assert not (tmp_path / "model").exists()


def test_thresholds_chosen_on_a_set_are_stored_and_read_by_inference(
    run: FitConfig, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from MedRationaleLib.postprocessing import PostprocessingConfig

    monkeypatch.setattr("MedRationaleTraining.calibration.GLAND", (0.4, 0.5))
    monkeypatch.setattr("MedRationaleTraining.calibration.FLOORS", (0.25, 0.4))
    folder = export_run(Path(run.out), tmp_path / "model", calibrate_on=tiny_set)
    stored = load_checkpoint(folder).postprocessing
    gland, lesions = {"gland_threshold", "gland_opening_mm"}, {"lesion_floor", "lesion_likelihood", "likelihood"}
    assert set(stored) == gland | lesions | {"presence_margin"}
    assert 0 < PostprocessingConfig(**stored).lesion_likelihood < 1
    # Chosen for a model folder, they are the same, and so are its weights.
    assert main(["calibrate", "--model", str(folder), "--data", str(tiny_set), "--out", str(tmp_path / "again")]) == 0
    again, before = load_checkpoint(tmp_path / "again"), load_checkpoint(folder)
    assert again.postprocessing == stored and again.sha256 == before.sha256
    assert again.training["calibration"] == before.training["calibration"]
    # A folder that holds a model is not written over.
    capsys.readouterr()
    for command in (["calibrate", "--model", "compact", "--data", str(tiny_set)], ["export", "--run", run.out]):
        assert main([*command, "--out", str(folder)]) == 2 and "Expected a new folder" in capsys.readouterr().err
    assert main(["export", "--run", run.out, "--out", str(tmp_path / "new")]) == 0
    assert f"of {run.steps} of {run.steps} steps" in " ".join(capsys.readouterr().out.split())
    assert (
        main(["calibrate", "--model", str(folder), "--data", str(tmp_path / "no"), "--out", str(tmp_path / "x")]) == 2
    )
    assert not (tmp_path / "x").exists()


def test_a_run_without_a_description_is_exported_with_its_settings(
    run: FitConfig, tiny_set: Path, tmp_path: Path
) -> None:
    (tmp_path / STATE).write_bytes((Path(run.out) / STATE).read_bytes())
    with pytest.raises(InputError, match=r"run\.json"):
        export_run(tmp_path, tmp_path / "model")
    export_run(tmp_path, tmp_path / "model", config=run)
    with pytest.raises(InputError, match="another"):
        export_run(tmp_path, tmp_path / "other", config=replace(run, model=replace(TINY, neck_dim=64)))


# ------------------------------------------------------------------ command line


def test_fit_from_a_yaml_file_ends_with_a_model_folder(tiny_set: Path, tmp_path: Path, capsys) -> None:
    import yaml

    config = json.loads(json.dumps(asdict(tiny_run(tmp_path / "run", tiny_set, steps=2))))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--save-every", "1"]) == 0
    assert "The model is in" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "model").model.config == TINY


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--out", "x", "--train", "[nowhere]", "--steps", "many"], "steps"),
        (["fit", "--out", "x", "--train", "[nowhere]", "--nonsense", "1"], "nonsense"),
        (["fit", "--out", "x", "--train", "[nowhere]"], "Expected a synthetic set in nowhere"),
        (["evaluate", "--data", "nowhere", "--out", "x"], "Expected a synthetic set in nowhere"),
        (["export", "--run", "nowhere", "--out", "x"], "Expected the folder of a training run"),
        (["synthesize", "--out", "x", "--split", "some"], "split"),
        (["speed", "--out", "x", "--train", "[nowhere]", "--examples", "0"], "at least 1 example"),
        (["fit", "--config", "nowhere.yaml"], "Expected a YAML file of settings"),
        ([], "Expected a command, got none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("medrationale-train: ") and words in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_gone_on_with_by_its_folder_alone(tiny_set: Path, tmp_path: Path, capsys, caplog) -> None:
    run = tmp_path / "run"
    Trainer(tiny_run(run, tiny_set, steps=2, save_every=1)).fit()
    moved = run.rename(tmp_path / "moved")
    assert main(["resume", "--run", str(moved), "--steps", "3"]) == 0, capsys.readouterr().err
    assert read_state(moved / STATE)["step"] == 3
    assert "KKT conditions at step 3" in capsys.readouterr().out
    assert json.loads((moved / "run.json").read_text(encoding="utf-8"))["history"] == [
        {"step": 2, "changed": {"steps": [2, 3]}}
    ]
    assert list((moved / "tensorboard").iterdir())
    # Nothing is left to train: settings that no step was trained with are not written down.
    before = (moved / "run.json").read_bytes()
    with caplog.at_level("WARNING"):
        Trainer(tiny_run(moved, tiny_set, steps=2, save_every=1, batch=4)).fit()
    assert "its settings are others, and stay as they are: steps, batch" in caplog.text
    assert (moved / "run.json").read_bytes() == before and read_state(moved / STATE)["step"] == 3
    assert main(["resume", "--run", str(tmp_path)]) == 2
    assert "Expected a run's settings in" in capsys.readouterr().err


def test_a_validation_set_that_is_trained_on_is_warned_of(tiny_set: Path, tmp_path: Path, caplog) -> None:
    with caplog.at_level("WARNING"):
        Trainer(tiny_run(tmp_path / "run", tiny_set))
        assert "trained on" not in caplog.text
        Trainer(tiny_run(tmp_path / "run", tiny_set, val=f"{tiny_set}/"))
    assert f"{tiny_set}/ is trained on, too" in caplog.text


def test_an_interrupt_says_how_to_go_on(tiny_set: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_, **__) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("MedRationaleTraining.commands.make_set", interrupt)
    assert main(["synthesize", "--out", str(tmp_path / "x")]) == 130
    assert "same command again" in capfd.readouterr().err


@pytest.mark.parametrize("command", [[], ["synthesize"], ["fit"], ["export"], ["evaluate"], ["speed"]])
def test_help_teaches(command: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert "usage: medrationale-train" in text
    if command == ["fit"]:
        assert "Learning rate after warm-up" in text


def test_curves_keep_each_term_in_its_column_whichever_comes_first(tmp_path: Path) -> None:
    from MedRationaleTraining.curves import Curves

    curves = Curves(tmp_path, 0)
    curves.add("train", 1, {"dice": 0.5, "focal": 0.25})
    curves.add("train", 2, {"focal": 0.125, "rationales": 1.0, "dice": 0.75})
    curves.close()
    curves = Curves(tmp_path, 2)
    curves.add("train", 3, {"rationales": 2.0, "dice": 1.0, "focal": 0.0})
    curves.close()
    rows = (tmp_path / "train.csv").read_text(encoding="utf-8").split()
    assert rows == ["step,dice,focal,rationales", "1,0.5,0.25,", "2,0.75,0.125,1.0", "3,1.0,0.0,2.0"]


def config_of(*paths: Path, also: tuple[str, ...] = ()) -> FitConfig:
    from MedRationaleTraining.commands import fit_config, fit_parser

    files = [word for path in paths for word in ("--config", str(path))]
    return fit_config(fit_parser().parse_args([*files, *also]))


def test_the_papers_configuration_is_the_papers_model() -> None:
    config = config_of(ROOT / "Training" / "configs" / "paper.yaml")
    assert replace(config.model, text=medsam_biomedclip().text) == medsam_biomedclip()
    assert config.model.text.kind == "biomedclip" and config.model.text.folder
    assert config.optimizer.betas == (0.9, 0.999) and config.optimizer.weight_decay == 1e-3
    assert config.loss.focal_alpha == 0.97 and config.loss.focal_gamma == 2.0
    assert config.constraints.disentangle and config.constraints.localise and config.constraints.solver == "augmented"


@pytest.mark.parametrize("base", [("compact",), ("compact", "comparison")])
@pytest.mark.parametrize("name", ["unet", "swin_unetr", "no_text"])
def test_what_a_baseline_changes_is_the_network_or_the_text_alone(name: str, base: tuple[str, ...]) -> None:
    folder = ROOT / "Training" / "configs"
    files = [folder / f"{file}.yaml" for file in base]
    ours, other = config_of(*files), config_of(*files, folder / "baselines" / f"{name}.yaml")
    if name == "no_text":
        assert (other.loss.node_weight, other.loss.slice_weight, other.loss.rationale_weight) == (0, 0, 0)
        assert not other.constraints.disentangle and not other.constraints.localise
        other = replace(other, loss=ours.loss, constraints=ours.constraints)
    else:
        assert other.baseline == name
    assert replace(other, out=ours.out, baseline=None) == ours


def test_heatmaps_alone_are_trained_on_top_of_the_shipped_configuration() -> None:
    files = [ROOT / "Training" / "configs" / f"{name}.yaml" for name in ("compact", "heatmaps")]
    config = config_of(*files, also=("--initial", "a model"))
    assert config.tuning.masks == "frozen" and config.constraints.disentangle and config.constraints.localise
    with pytest.raises(InputError, match="initial model"):
        config_of(*files)


def test_the_shipped_configuration_is_what_the_shipped_weights_ended_with() -> None:
    files = [ROOT / "Training" / "configs" / f"{name}.yaml" for name in ("compact", "heatmaps")]
    config = config_of(*files, also=("--initial", "a model"))
    assert config.model == ModelConfig() == load_checkpoint("compact").model.config
    settings = load_checkpoint("compact").training["settings"]
    shipped = FitConfig.from_dict({**asdict(config), **settings})
    assert shipped == config
