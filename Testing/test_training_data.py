"""Sets on disk, label maps, real backgrounds and the examples that are drawn from them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

torch = pytest.importorskip("torch")

from MedRationaleTraining.config import SamplingConfig  # noqa: E402
from MedRationaleTraining.data import synthetic  # noqa: E402
from MedRationaleTraining.data.label_maps import EXCLUDED, PicaiLabels, open_label_maps, split_of  # noqa: E402
from MedRationaleTraining.data.real_backgrounds import RealBackgrounds, bend, load_case, outlined_zones  # noqa: E402
from MedRationaleTraining.data.stacks import DIFFUSION_NODES, StackDataset, slice_answers, whole_exam  # noqa: E402
from MedRationaleTraining.data.synthetic import StoredExam, SynthesisConfig, make_set, stored_exams  # noqa: E402
from MedRationaleTraining.metrics import dice  # noqa: E402
from MedRationaleTraining.speed import measure, stock_attention  # noqa: E402
from training_samples import TINY, tiny_run  # noqa: E402

from MedRationaleLib.decision_tree import DecisionTree  # noqa: E402
from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.synthesis import phantom_anatomy  # noqa: E402


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------ sets


def test_an_interrupted_set_goes_on_and_is_the_same_as_one_made_at_once(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny_set / "00000", half / "00000")
    shutil.copy(tiny_set / "config.json", half)
    (half / ".00001.999").mkdir()  # what a kill leaves behind
    (half / ".00001.999" / "images.npy").write_bytes(b"half")
    made = []
    monkeypatch.setattr(synthetic, "_make_one", lambda index, **_: made.append(index))
    make_set(half, SynthesisConfig(cases=3, seed=6))
    assert made == [1, 2]
    assert sorted(p.name for p in half.iterdir()) == ["00000", "config.json"]


def test_an_examination_depends_on_seed_and_number_alone(tiny_set: Path, tmp_path: Path) -> None:
    make_set(tmp_path / "again", SynthesisConfig(cases=1, seed=6))
    assert contents(tmp_path / "again" / "00000") == contents(tiny_set / "00000")


def test_a_folder_with_a_set_of_other_settings_is_refused(tiny_set: Path) -> None:
    with pytest.raises(InputError, match="same settings in .*, got one with seed 6; choose"):
        make_set(tiny_set, SynthesisConfig(cases=3, seed=7))


@pytest.mark.parametrize("change", [{"cases": 0}, {"phantoms": 1.5}, {"workers": 0}, {"seed": -1}])
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(tmp_path: Path, change: dict) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        make_set(tmp_path / "new", SynthesisConfig(**change))
    assert not (tmp_path / "new").exists()


def test_what_is_stored_is_what_was_rendered_and_walked(tiny_set: Path) -> None:
    tree = DecisionTree.load()
    for folder in stored_exams(tiny_set):
        exam = StoredExam.open(folder)
        assert exam.images.shape == (3, 24, 256, 256)
        assert set(np.unique(exam.regions)) == {0, *(r.label for r in exam.rationales)}
        lesion = np.isin(exam.regions, [r.label for r in exam.rationales if r.is_lesion])
        assert np.array_equal((exam.labels & 4) > 0, lesion)
        for region in exam.rationales:
            assert tree.scores(region.answers).pirads == region.pirads
            assert type(region.answers) is dict and type(region.label) is int


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "rationales.json"])
def test_a_damaged_examination_is_named_in_one_sentence(tiny_set: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_set / "00001", tmp_path / "00001")
    path = tmp_path / "00001" / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="00001") as refused:
        StoredExam.open(tmp_path / "00001")
    assert "\n" not in str(refused.value)


def test_an_empty_folder_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        stored_exams(tmp_path)


# ------------------------------------------------------------------ stacks


def test_example_i_is_the_same_whoever_draws_it_and_when(tiny_set: Path) -> None:
    def draw(index: int, seed: int = 0):
        return StackDataset([tiny_set], SamplingConfig(), length=9, seed=seed)[index]

    first, again, other = draw(4), draw(4), draw(4, seed=1)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.regions, again.regions)
    assert first.answers == again.answers
    assert not torch.equal(first.images, other.images)


def test_a_stack_has_the_promised_shapes_and_is_z_scored(tiny_set: Path) -> None:
    dataset = StackDataset([tiny_set], SamplingConfig(drop_adc=0, drop_dwi=0, drop_both=0), length=4, seed=0)
    for stack in (dataset[i] for i in range(4)):
        assert stack.images.shape == (8, 3, 256, 256) and stack.images.dtype == torch.float32
        assert stack.masks.shape == (8, 4, 128, 128)
        assert stack.regions.shape[1:] == (8, 64, 64)
        assert len(stack.answers) == len(stack.is_lesion) == len(stack.regions)
        assert stack.masks.min() >= 0 and stack.masks.max() <= 1
        assert torch.allclose(stack.masks[:, 0], stack.masks[:, 1] + stack.masks[:, 2], atol=1e-6)
        assert stack.images.abs().max() < 100


def test_dropped_sequences_are_zero(tiny_set: Path) -> None:
    stack = StackDataset([tiny_set], SamplingConfig(drop_both=1.0), length=1, seed=0)[0]
    assert not stack.images[:, 1:].any()
    assert stack.images[:, 0].any()


def test_a_slice_is_told_by_its_largest_lesion_or_has_none(tiny_set: Path) -> None:
    for folder in stored_exams(tiny_set):
        exam = StoredExam.open(folder)
        stack = whole_exam(exam)
        answers = slice_answers(stack)
        has_lesion = (stack.masks[:, 3].sum((1, 2)) > 6).tolist()
        for told, there in zip(answers, has_lesion, strict=True):
            if there:
                assert told["lesion_presence"] == "lesion_present" and "zone" in told
        assert {"lesion_presence": "lesion_absent"} in answers


def test_loading_synthesis_and_steps_are_timed_and_leave_the_model_as_it_was(tiny_set: Path, tmp_path: Path) -> None:
    speed = measure(tiny_run(tmp_path, tiny_set), examples=2, exams=1, rounds=2)
    assert speed.stacks > 0 and speed.exams > 0
    assert len(speed.steps) == len(speed.stock) == 2
    assert speed.trained == pytest.approx(2 / np.mean(speed.steps))
    assert speed.gain == pytest.approx(np.mean(speed.stock) / np.mean(speed.steps))
    assert not list(tmp_path.iterdir())


def test_the_step_is_also_timed_with_segment_anythings_own_attention() -> None:
    from MedRationaleLib.model.attention import FoldedAttention
    from MedRationaleLib.model.rationale_model import RationaleModel

    images = torch.randn(1, 2, 3, 256, 256)
    called = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        model = RationaleModel(TINY, ["a"]).eval()
        folded = FoldedAttention.forward
        patch.setattr(FoldedAttention, "forward", lambda *given: called.append(1) or folded(*given))
        ours = model(images).embedding
        count = len(called)
        with stock_attention(model):
            stock = model(images).embedding
        assert count == TINY.depth and len(called) == count
        model(images)
        assert len(called) == 2 * count
    assert torch.allclose(ours, stock, atol=1e-4)


# ------------------------------------------------------------------ label maps


def test_the_split_is_by_patient_and_leaves_the_test_cases_out(shared_data: Path) -> None:
    maps = open_label_maps(shared_data / "picai_anatomy")
    cases = {split: maps.cases(split) for split in ("train", "val", "test")}
    patients = {split: {case.split("_")[0] for case in ids} for split, ids in cases.items()}
    assert not patients["train"] & patients["val"]
    assert not patients["train"] & patients["test"]
    assert not patients["val"] & patients["test"]
    assert min(len(ids) for ids in cases.values()) > 100
    assert not EXCLUDED & {case for ids in cases.values() for case in ids}
    assert {"11373_1001396", "11063_1001085"} <= EXCLUDED


def test_no_patient_of_the_real_backgrounds_is_in_the_test_or_validation_split(shared_data: Path) -> None:
    maps = open_label_maps(shared_data / "picai_anatomy")
    held_out = {case.split("_")[0] for split in ("val", "test") for case in maps.cases(split)}
    used = {p.name.removeprefix("picai-") for p in (shared_data / "real-train").glob("picai-*")}
    assert used
    assert not used & held_out


def test_two_studies_of_a_patient_are_in_one_split() -> None:
    assert split_of("10010_1000010") == split_of("10010_1000999") == "test"
    assert split_of("10011_1000011") == "val"
    assert {split_of(f"1000{digit}_1") for digit in range(2, 10)} == {"train"}


def test_a_clone_of_picai_labels_is_read_on_its_own_grid(tmp_path: Path) -> None:
    zones = np.zeros((10, 80, 80), np.uint8)
    zones[2:8, 20:60, 20:60] = 1
    zones[3:6, 24:40, 30:50] = 2
    lesion = np.zeros_like(zones)
    lesion[4, 50:56, 24:30] = 3
    for place, array in ((PicaiLabels.ZONES, zones), (PicaiLabels.LESIONS, lesion)):
        (tmp_path / place).mkdir(parents=True)
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((1.0, 1.0, 3.0))
        sitk.WriteImage(image, str(tmp_path / place / "10005_1000005.nii.gz"))
    maps = open_label_maps(tmp_path)
    assert maps.cases("train") == ["10005_1000005"]
    assert maps.cases("test") == []
    label_map = maps.load("10005_1000005")
    assert label_map.zones.shape == (24, 256, 256)
    assert (label_map.zones > 0).sum() * 0.5**2 == pytest.approx((zones > 0).sum(), rel=0.05)
    assert set(np.unique(label_map.lesions)) == {0, 3}
    assert (label_map.zones[label_map.lesions > 0] > 0).all()


def test_label_maps_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="picai_anatomy_meta.csv"):
        open_label_maps(tmp_path)
    (tmp_path / PicaiLabels.ZONES).mkdir(parents=True)
    with pytest.raises(InputError, match="completely"):
        open_label_maps(tmp_path)


def test_a_missing_shard_of_the_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "picai_anatomy_meta.csv").write_text("case_id,truncated,shard\n10005_1000005,False,3\n")
    with pytest.raises(InputError, match="picai_anatomy_03.npz"):
        open_label_maps(tmp_path).load("10005_1000005")


# ------------------------------------------------------------------ real backgrounds


@pytest.mark.parametrize("name", ["picai-10000", "picai-11184"])
def test_bending_maps_the_real_outline_on_the_new_gland(shared_data: Path, name: str) -> None:
    case = load_case(shared_data / "real-train" / name)
    rng = np.random.default_rng(0)
    for _ in range(2):
        gland = phantom_anatomy(rng).gland
        bent = bend(case, gland, rng, wobble_mm=0)
        assert dice(bent["zones"] > 0, gland) > 0.95
        assert set(bent) >= ({"t2w"} if case.t2w is not None else {"adc", "dwi"})


def test_a_background_has_what_its_cases_have(shared_data: Path, tmp_path: Path) -> None:
    shutil.copytree(shared_data / "real-train" / "picai-10270", tmp_path / "picai-10270")
    rng = np.random.default_rng(0)
    background = RealBackgrounds(tmp_path, share=1.0, keep_gland=0.0)(phantom_anatomy(rng), rng)
    assert background is not None
    assert background.t2w is None and background.adc is not None and background.dwi is not None
    assert background.interior is None and background.zones is None


def test_a_folder_without_examinations_gives_no_backgrounds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"zones\.nii\.gz"):
        RealBackgrounds(tmp_path, share=1.0, keep_gland=0.0)


def test_the_settings_of_a_set_are_beside_it(tiny_set: Path) -> None:
    assert json.loads((tiny_set / "config.json").read_text(encoding="utf-8"))["seed"] == 6
    about = synthetic.describe_set(tiny_set)
    assert about["examinations"] == 3 and not about["picai_labels"]


def test_a_volume_of_the_outlines_needs_no_masks(tmp_path: Path) -> None:
    t2w = sitk.GetImageFromArray(np.random.default_rng(0).random((19, 384, 384), np.float32))
    t2w.SetSpacing((0.5, 0.5, 3.0))
    folder = tmp_path / "prostate3t-03-0001"
    folder.mkdir()
    sitk.WriteImage(t2w, str(folder / "t2w.nii.gz"))
    case = load_case(folder)
    assert {1, 2} <= set(np.unique(case.zones))
    assert 20 < (case.zones > 0).sum() * 0.75**2 * 3 / 1000 < 90  # ml
    zones = sitk.GetArrayFromImage(outlined_zones(folder.name, t2w))
    assert np.flatnonzero(zones.any((1, 2))).tolist() == list(range(3, 15))


def test_a_real_interior_is_of_one_sequence_and_brings_its_zones(shared_data: Path) -> None:
    draw = RealBackgrounds(shared_data / "real-train", share=1.0, keep_gland=1.0)
    rng = np.random.default_rng(1)
    kept = set()
    for _ in range(4):
        anatomy = phantom_anatomy(rng)
        background = draw(anatomy, rng)
        assert background is not None and background.interior is not None and background.zones is not None
        assert (background.t2w if background.interior == "t2w" else background.adc) is not None
        both = anatomy.gland & (background.zones > 0)
        assert 2 * both.sum() / (anatomy.gland.sum() + (background.zones > 0).sum()) > 0.85
        kept.add(background.interior)
    assert kept == {"t2w", "diffusion"}


def test_without_adc_and_dwi_nobody_is_asked_about_diffusion(tiny_set: Path) -> None:
    def nodes(**drop: float) -> set[str]:
        config = SamplingConfig(drop_adc=0, drop_dwi=0, drop_both=0, lesion_stacks=1)
        data = StackDataset([tiny_set], replace(config, **drop), length=12, seed=0)
        return {node for i in range(12) for answers in data[i].answers for node in answers}

    assert {"adc_signal", "dwi_signal"} <= nodes()
    assert nodes(drop_adc=1) == nodes()
    assert not nodes(drop_both=1) & set(DIFFUSION_NODES) and "t2w_signal" in nodes(drop_both=1)
