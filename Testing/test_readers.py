"""Real data sets in their official layouts, the cache they are prepared into, and what training makes of them."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

torch = pytest.importorskip("torch")

from MedRationaleTraining import cli  # noqa: E402
from MedRationaleTraining.config import LossConfig, SamplingConfig  # noqa: E402
from MedRationaleTraining.data import cache  # noqa: E402
from MedRationaleTraining.data.cache import PrepareConfig, open_reader, prepare_set  # noqa: E402
from MedRationaleTraining.data.label_maps import EXCLUDED  # noqa: E402
from MedRationaleTraining.data.msd import MsdReader  # noqa: E402
from MedRationaleTraining.data.picai import ANATOMY, HUMAN, MARKSHEET, PicaiReader, read_folds  # noqa: E402
from MedRationaleTraining.data.prostate158 import Prostate158Reader  # noqa: E402
from MedRationaleTraining.data.rationale_set import read_rationales  # noqa: E402
from MedRationaleTraining.data.stacks import StackDataset, slice_answers, whole_exam  # noqa: E402
from MedRationaleTraining.data.synthetic import StoredExam, describe_set, stored_exams  # noqa: E402
from MedRationaleTraining.losses import SegmentationLoss  # noqa: E402

from MedRationaleLib.decision_tree import DecisionTree  # noqa: E402
from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.study import Study  # noqa: E402

SHAPE, SPACING = (14, 80, 80), (1.0, 1.0, 3.0)
RATIONALE = {
    "zone": "zone_pz",
    "adc_signal": "adc_marked_hypointense",
    "dwi_signal": "dwi_marked_hyperintense",
    "diffusion_pattern": "diffusion_focal",
    "t2w_signal": "t2w_moderate_hypointense",
    "shape": "round_oval",
    "margin": "circumscribed",
    "homogeneity": "homogeneous",
}


# ------------------------------------------------------------------ small files in the official layouts


def masks(lesions: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Zones (1 PZ, 2 TZ) and up to two lesions: the first below in the PZ, the second above in the TZ."""
    zones = np.zeros(SHAPE, np.uint8)
    zones[3:11, 20:60, 24:64] = 1
    zones[4:10, 20:44, 30:58] = 2
    lesion = np.zeros_like(zones)
    if lesions > 0:
        lesion[4:6, 48:56, 30:38] = 3
    if lesions > 1:
        lesion[8:10, 26:36, 40:50] = 2
    return zones, lesion


def sequences() -> dict[str, np.ndarray]:
    """T2W, ADC (1e-6 mm²/s) and DWI with the histograms of such images."""
    rng = np.random.default_rng(0)
    return {
        "t2w": rng.uniform(50, 900, SHAPE).astype(np.float32),
        "adc": rng.uniform(600, 2400, SHAPE).astype(np.float32),
        "dwi": rng.gamma(1.2, 12, SHAPE).astype(np.float32),
    }


def write(array: np.ndarray, path: Path, *, like: sitk.Image | None = None, shift_mm: float = 0.0) -> None:
    """An image of SPACING, or with the geometry of `like`, moved to the left by `shift_mm`."""
    image = sitk.GetImageFromArray(array)
    if like is not None:
        image.CopyInformation(like)
    else:
        image.SetSpacing(SPACING)
    image.SetOrigin([o + shift_mm * (axis == 0) for axis, o in enumerate(image.GetOrigin())])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def picai(folder: Path, ids: Mapping[str, int]) -> PicaiReader:
    """PI-CAI with these examinations and numbers of lesions; the reader of its train split."""
    images, labels = folder / "images", folder / "picai_labels"
    for id, lesions in ids.items():
        for name, array in sequences().items():
            ending = "hbv" if name == "dwi" else name
            write(array, images / id.split("_")[0] / f"{id}_{ending}.mha")
        zones, lesion = masks(lesions)
        write(zones, labels / ANATOMY[0][0] / f"{id}.nii.gz")
        write(lesion, labels / HUMAN / "resampled" / f"{id}.nii.gz")
    (labels / MARKSHEET).parent.mkdir(parents=True, exist_ok=True)
    with (labels / MARKSHEET).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["patient_id", "study_id", "psa", "lesion_GS", "case_csPCa"])
        for id, lesions in ids.items():
            table.writerow([*id.split("_"), "7.7", "4+3,0+0", "YES" if lesions else "NO"])
    return PicaiReader(images, labels)


def prostate158(folder: Path) -> Path:
    """One study with and one without a tumour in train.csv, one in valid.csv."""
    home = folder / "prostate158_train"
    rows: dict[str, list[list[str]]] = {"train.csv": [], "valid.csv": []}
    zones, lesion = masks(1)
    for id, table in (("020", "train.csv"), ("021", "train.csv"), ("022", "valid.csv")):
        at = home / "train" / id
        for name, array in sequences().items():
            write(array, at / f"{'t2' if name == 't2w' else name}.nii.gz")
        write(np.array([0, 2, 1], np.uint8)[zones], at / "t2_anatomy_reader1.nii.gz")  # 1 central gland, 2 PZ
        tumour = "adc_tumor_reader1" if id == "020" else "empty"
        write(lesion if id == "020" else lesion * 0, at / f"{tumour}.nii.gz")
        files = ("t2", "adc", "dwi", "t2_anatomy_reader1", tumour)
        rows[table].append([id, *(f"train/{id}/{name}.nii.gz" for name in files)])
    for name, lines in rows.items():
        with (home / name).open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["ID", "t2", "adc", "dwi", "t2_anatomy_reader1", "adc_tumor_reader1"])
            table.writerows(lines)
    return folder


def msd(folder: Path, numbers: tuple[str, ...] = ("02", "10")) -> Path:
    """Task05_Prostate with 4-D images."""
    home = folder / "Task05_Prostate"
    arrays = sequences()
    zones, _ = masks()
    for number in numbers:
        volumes = []
        for name in ("t2w", "adc"):
            image = sitk.GetImageFromArray(arrays[name])
            image.SetSpacing(SPACING)
            volumes.append(image)
        (home / "imagesTr").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.JoinSeries(volumes), str(home / "imagesTr" / f"prostate_{number}.nii.gz"))
        write(zones, home / "labelsTr" / f"prostate_{number}.nii.gz")
    names = [f"prostate_{number}.nii.gz" for number in numbers]
    about = {
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names],
    }
    (home / "dataset.json").write_text(json.dumps(about))
    return home


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def picai_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[PicaiReader, Path]:
    """A reader of two examinations, and the set prepared from them with a rationale of the first one's first lesion."""
    folder = tmp_path_factory.mktemp("picai")
    reader = picai(folder, {"10005_1000005": 2, "10006_1000006": 0})
    lines = folder / "rationales.jsonl"
    lines.write_text(json.dumps({"case": "10005_1000005", "lesion": 1, "rationale": RATIONALE}) + "\n")
    done = prepare_set(reader, folder / "set", rationales=lines)
    assert (done.made, done.total, dict(done.refused)) == (2, 2, {})
    return reader, folder / "set"


# ------------------------------------------------------------------ PI-CAI


def test_picai_gives_paths_split_and_the_words_of_the_marksheet(picai_set: tuple[PicaiReader, Path]) -> None:
    first, second = picai_set[0].cases()
    assert (first.id, first.patient, first.split, first.fold) == ("10005_1000005", "10005", "train", None)
    assert (first.t2w.name, first.dwi and first.dwi.name) == ("10005_1000005_t2w.mha", "10005_1000005_hbv.mha")
    assert first.classes == ("gland", "pz", "tz", "lesion")
    assert first.facts["lesion_GS"] == "4+3,0+0" and second.facts["case_csPCa"] == "NO"


def test_an_incomplete_picai_download_is_one_sentence_with_the_number_and_the_first(tmp_path: Path) -> None:
    reader = picai(tmp_path, {"10005_1000005": 0, "10006_1000006": 0, "10007_1000007": 0})
    (tmp_path / "images/10006/10006_1000006_adc.mha").unlink()
    (tmp_path / "images/10007/10007_1000007_hbv.mha").write_bytes(b"")
    message = refused(reader.cases)
    assert "3 complete examinations" in message and "got 1: 2 are incomplete" in message
    assert "first is 10006_1000006 (no 10006_1000006_adc.mha" in message and "unpack" in message
    refused(lambda: prepare_set(reader, tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_clone_without_labels_or_table_is_named(tmp_path: Path) -> None:
    reader = picai(tmp_path, {"10005_1000005": 0})
    shutil.rmtree(tmp_path / "picai_labels" / ANATOMY[0][0])
    assert "Yuan23" in refused(reader.cases)
    (tmp_path / "picai_labels" / MARKSHEET).unlink()
    assert "marksheet.csv" in refused(reader.cases)


def test_the_best_human_lesion_mask_is_taken_and_whole_glands_stand_in_for_zones(tmp_path: Path) -> None:
    reader = picai(tmp_path, {"10005_1000005": 1})
    human = tmp_path / "picai_labels" / HUMAN
    (human / "Pooch25").mkdir()
    assert [c.labels[1].on_t2w for c in reader.cases()] == [True]
    (human / "resampled/10005_1000005.nii.gz").rename(human / "Pooch25/10005_1000005.nii.gz")
    (case,) = reader.cases()
    assert case.labels[1].path.parent.name == "Pooch25" and not case.labels[1].on_t2w
    (tmp_path / "picai_labels" / ANATOMY[2][0]).parent.mkdir(parents=True)
    (tmp_path / "picai_labels" / ANATOMY[0][0]).rename(tmp_path / "picai_labels" / ANATOMY[2][0])
    (case,) = reader.cases()
    assert case.classes == ("gland", "lesion")


def test_images_may_stay_in_the_folders_of_the_five_archives(tmp_path: Path) -> None:
    reader = picai(tmp_path, {"10005_1000005": 0})
    (tmp_path / "images/picai_public_images_fold3").mkdir()
    (tmp_path / "images/10005").rename(tmp_path / "images/picai_public_images_fold3/10005")
    assert reader.cases()[0].t2w.is_file()


def test_the_official_folds_come_from_their_file_and_keep_patients_together(tmp_path: Path) -> None:
    ids = ("10002_1000002", "10003_1000003", "10003_1000004")
    picai(tmp_path, dict.fromkeys(ids, 0))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps([{"train": ids[1:], "val": ids[:1]}, {"train": ids[:1], "val": ids[1:]}]))

    def chosen(*folds: int) -> list[str]:
        reader = PicaiReader(tmp_path / "images", tmp_path / "picai_labels", folds=folds, splits=splits)
        return [f"{case.id} {case.fold}" for case in reader.cases()]

    assert chosen(0) == ["10002_1000002 0"]
    assert chosen(1) == ["10003_1000003 1", "10003_1000004 1"]
    assert "choose of these" in refused(lambda: chosen(4))
    splits.write_text(json.dumps([{"train": [], "val": ids[:2]}, {"train": [], "val": ids[2:]}]))
    assert "patient 10003 in folds 0 and 1" in refused(lambda: read_folds(splits))
    splits.write_text('{"train": []}')
    assert "picai_baseline" in refused(lambda: read_folds(splits))
    assert "splits.json" in refused(lambda: PicaiReader(tmp_path, tmp_path, folds=[0]))


def test_the_projects_test_cases_are_left_out_of_picai(tmp_path: Path) -> None:
    reader = picai(tmp_path, {"11373_1001396": 0, "10005_1000005": 0})
    assert "11373_1001396" in EXCLUDED
    assert [case.id for case in reader.cases()] == ["10005_1000005"]


# ------------------------------------------------------------------ Prostate158 and MSD


def test_prostate158_is_read_by_its_tables(tmp_path: Path) -> None:
    folder = prostate158(tmp_path)
    train = Prostate158Reader(folder).cases()
    assert [case.id for case in train] == ["020", "021"]
    assert [case.id for case in Prostate158Reader(folder / "prostate158_train", split="val").cases()] == ["022"]
    assert Prostate158Reader(folder).ids() == {"020", "021", "022"}
    assert train[1].labels[1].path.name == "empty.nii.gz"
    assert "prostate158_test.zip" in refused(Prostate158Reader(folder, split="test").cases)
    (folder / "prostate158_train/train/021/dwi.nii.gz").unlink()
    message = refused(Prostate158Reader(folder).cases)
    assert "got 1: incomplete is 021 (no dwi.nii.gz" in message
    table = folder / "prostate158_train/train.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("t2_anatomy_reader1,", "", 1))
    assert "t2_anatomy_reader1" in refused(Prostate158Reader(folder).cases)


def test_zones_of_prostate158_and_msd_mean_the_same_after_preparation(tmp_path: Path) -> None:
    first = prepare_set(Prostate158Reader(prostate158(tmp_path)), tmp_path / "p158")
    second = prepare_set(MsdReader(msd(tmp_path)), tmp_path / "msd")
    assert (first.made, second.made) == (2, 1)
    a, b = (StoredExam.open(stored_exams(tmp_path / name)[0]) for name in ("p158", "msd"))
    assert np.array_equal(a.labels & 3, b.labels & 3)
    assert {1, 2} <= set(np.unique(a.labels & 3))


def test_an_incomplete_or_foreign_msd_folder_is_named(tmp_path: Path) -> None:
    home = msd(tmp_path)
    assert [case.id for case in MsdReader(home).cases()] == ["prostate_02"]
    assert [case.id for case in MsdReader(home, split="test").cases()] == ["prostate_10"]
    assert "got none" in refused(MsdReader(home, split="val").cases)
    (home / "labelsTr/prostate_02.nii.gz").unlink()
    assert "incomplete is prostate_02 (no prostate_02.nii.gz in" in refused(MsdReader(home).cases)
    (home / "dataset.json").write_text('{"modality": {"0": "CT"}, "labels": {}, "training": []}')
    assert "Task05_Prostate" in refused(MsdReader(home).cases)


def test_a_cut_off_4d_image_is_refused_not_filled_with_zeros(tmp_path: Path) -> None:
    home = msd(tmp_path)
    path = home / "imagesTr/prostate_02.nii.gz"
    path.write_bytes(path.read_bytes()[:-20000])
    assert "truncated" in refused(lambda: prepare_set(MsdReader(home), tmp_path / "set"))


# ------------------------------------------------------------------ the cache


def test_a_prepared_examination_is_laid_out_as_a_synthetic_one(
    picai_set: tuple[PicaiReader, Path], tiny_set: Path
) -> None:
    real, synthetic = (StoredExam.open(stored_exams(folder)[0]) for folder in (picai_set[1], tiny_set))
    for name in ("images", "labels", "regions"):
        ours, theirs = getattr(real, name), getattr(synthetic, name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert isinstance(ours, np.memmap)
    assert real.source == "10005_1000005"
    assert {p.name for p in stored_exams(picai_set[1])[0].iterdir()} == {"images.npy", "labels.npy", "rationales.json"}
    about = describe_set(picai_set[1])
    assert (about["examinations"], about["split"], about["reader"]) == (2, "train", "picai")
    assert about["picai_labels"], "weights trained on it carry PI-CAI's licence"
    assert str(picai_set[1].parent) not in (picai_set[1] / "config.json").read_text(encoding="utf-8")


def test_the_crop_is_centred_on_the_gland_and_keeps_its_volume(picai_set: tuple[PicaiReader, Path]) -> None:
    exam = StoredExam.open(stored_exams(picai_set[1])[0])
    gland = (exam.labels & 3) > 0
    centre = np.argwhere(gland).mean(0)
    assert np.allclose(centre, [11.5, 127.5, 127.5], atol=1.0)
    zones, lesion = masks()
    assert gland.sum() * 0.75**2 == pytest.approx((zones > 0).sum(), rel=0.05)
    assert ((exam.labels & 4) > 0).sum() * 0.75**2 == pytest.approx((lesion > 0).sum(), rel=0.1)
    valid = (exam.labels >> 3) & 7
    assert set(np.unique(valid)) == {0, 7}
    assert not np.asarray(exam.images)[:, valid == 0].any()


def test_lesions_are_numbered_from_below_and_only_told_ones_have_a_category(
    picai_set: tuple[PicaiReader, Path],
) -> None:
    exam = StoredExam.open(stored_exams(picai_set[1])[0])
    told, untold = exam.rationales
    assert np.argwhere(exam.regions == 1).mean(0)[0] < np.argwhere(exam.regions == 2).mean(0)[0]
    assert np.array_equal(exam.regions > 0, (exam.labels & 4) > 0)
    tree = DecisionTree.load()
    assert told.answers.items() >= RATIONALE.items()
    assert told.answers["size"] == "size_below_15mm" and told.answers["epe"] == "epe_absent", "measured on the mask"
    assert told.pirads == tree.walk_answers(told.answers).pirads == 4
    assert untold.answers == {"lesion_presence": "lesion_present", "zone": "zone_tz"}
    assert (untold.pirads, untold.is_lesion) == (0, True)


def test_an_interrupted_preparation_goes_on_and_prepares_each_case_once(
    picai_set: tuple[PicaiReader, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, whole = picai_set
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(whole / "10006_1000006", half / "10006_1000006")
    settings = json.loads((whole / "config.json").read_text(encoding="utf-8")) | {"rationales": None}
    (half / "config.json").write_text(json.dumps(settings))
    (half / ".10005_1000005.999").mkdir()  # what a kill leaves behind
    (half / ".10005_1000005.999" / "images.npy").write_bytes(b"half")
    made, real = [], cache.prepare_case
    monkeypatch.setattr(cache, "prepare_case", lambda case, lines: made.append(case.id) or real(case, lines))
    assert prepare_set(reader, half).made == 1
    assert prepare_set(reader, half).made == 0
    assert made == ["10005_1000005"]
    assert sorted(p.name for p in half.iterdir()) == ["10005_1000005", "10006_1000006", "config.json"]
    for name in ("images.npy", "labels.npy"):
        again, before = ((folder / "10005_1000005" / name).read_bytes() for folder in (half, whole))
        assert again == before


def test_a_set_of_other_settings_is_not_mixed_with(picai_set: tuple[PicaiReader, Path]) -> None:
    assert "same settings" in refused(lambda: prepare_set(picai_set[0], picai_set[1]))  # without the rationales


def test_several_processes_prepare_the_same_set(picai_set: tuple[PicaiReader, Path], tmp_path: Path) -> None:
    reader, whole = picai_set
    assert prepare_set(reader, tmp_path / "set", workers=2).made == 2
    for name in ("images.npy", "labels.npy"):
        path = Path("10006_1000006") / name
        assert (tmp_path / "set" / path).read_bytes() == (whole / path).read_bytes()


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    picai_set: tuple[PicaiReader, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("MedRationaleTraining.data.synthetic.np.save", full)
    assert "No space left on device" in refused(lambda: prepare_set(picai_set[0], tmp_path / "set"))
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["config.json"]


# ------------------------------------------------------------------ grids


def test_a_mask_on_another_grid_is_left_out_with_a_sentence_and_the_others_go_on(tmp_path: Path) -> None:
    reader = picai(tmp_path, {"10005_1000005": 1, "10006_1000006": 1, "10007_1000007": 1})
    resampled = tmp_path / "picai_labels" / HUMAN / "resampled"
    _, lesion = masks(1)
    write(lesion, resampled / "10006_1000006.nii.gz", shift_mm=2.0)
    write(lesion[:, ::2, ::2], resampled / "10007_1000007.nii.gz")
    done = prepare_set(reader, tmp_path / "set")
    assert (done.made, done.total) == (1, 1)
    assert [path.name for path in stored_exams(tmp_path / "set")] == ["10005_1000005"]
    why = json.loads((tmp_path / "set/refused.json").read_text(encoding="utf-8"))
    assert set(why) == {"10006_1000006", "10007_1000007"}
    assert "corners up to 2.0 mm apart" in why["10006_1000006"] and "80 x 80 x 14" in why["10006_1000006"]
    assert "40 x 40 x 14" in why["10007_1000007"]
    write(lesion, resampled / "10006_1000006.nii.gz", shift_mm=0.0001)  # rounding is no other grid
    write(lesion, resampled / "10007_1000007.nii.gz")
    assert prepare_set(reader, tmp_path / "set").made == 2, "mended files are tried again"
    assert not (tmp_path / "set/refused.json").exists()


def test_masks_that_promise_no_grid_are_resampled(tmp_path: Path) -> None:
    reader = picai(tmp_path, {"10005_1000005": 1})
    human = tmp_path / "picai_labels" / HUMAN
    (human / "resampled/10005_1000005.nii.gz").unlink()
    _, lesion = masks(1)
    coarse = sitk.GetImageFromArray(lesion)
    coarse.SetSpacing(SPACING)
    coarse = sitk.Resample(coarse, (60, 60, 14), sitk.Transform(), sitk.sitkNearestNeighbor, (4, 4, 0), (1.2, 1.2, 3))
    (human / "Pooch25").mkdir()
    sitk.WriteImage(coarse, str(human / "Pooch25/10005_1000005.nii.gz"))
    prepare_set(reader, tmp_path / "set")
    exam = StoredExam.open(stored_exams(tmp_path / "set")[0])
    assert ((exam.labels & 4) > 0).sum() * 0.75**2 == pytest.approx((lesion > 0).sum(), rel=0.25)


def test_values_that_were_never_published_are_refused(tmp_path: Path) -> None:
    reader = picai(tmp_path, {"10005_1000005": 1})
    zones, _ = masks()
    write(zones * 2, tmp_path / "picai_labels" / ANATOMY[0][0] / "10005_1000005.nii.gz")
    message = refused(lambda: prepare_set(reader, tmp_path / "set"))
    assert "values 0, 1, 2" in message and "got 4" in message


# ------------------------------------------------------------------ rationales


@pytest.mark.parametrize(
    ("line", "expected"),
    {
        "no JSON": ("{case", "expected a JSON object"),
        "no region": ({"case": "a", "rationale": {}}, "either lesion or slice"),
        "two regions": ({"case": "a", "lesion": 1, "slice": 1, "rationale": {}}, "either lesion or slice"),
        "a list": ([1], "either lesion or slice"),
        "lesion 0": ({"case": "a", "lesion": 0, "rationale": {}}, "lesion as a whole number from 1"),
        "no number": ({"case": "a", "slice": "x", "rationale": {}}, "slice as a whole number from 0"),
        "no mapping": ({"case": "a", "slice": 1, "rationale": ["x"]}, "node: concept"),
        "unknown case": ({"case": "b", "lesion": 1, "rationale": RATIONALE}, "'b'"),
        "unknown node": ({"case": "a", "lesion": 1, "rationale": {"colour": "red"}}, "got 'colour'"),
        "unknown concept": (
            {"case": "a", "lesion": 1, "rationale": RATIONALE | {"margin": "spiky"}},
            "circumscribed, non_circumscribed at 'margin', got 'spiky'",
        ),
        "concept of the other zone": (
            {"case": "a", "lesion": 1, "rationale": RATIONALE | {"margin": "encapsulated"}},
            "got 'encapsulated'",
        ),
        "missing answer": (
            {"case": "a", "lesion": 1, "rationale": {k: v for k, v in RATIONALE.items() if k != "shape"}},
            "expected an answer to 'shape'",
        ),
    }.values(),
)
def test_a_wrong_line_of_the_rationale_set_is_named_by_its_number(tmp_path: Path, line: object, expected: str) -> None:
    good = json.dumps({"case": "a", "lesion": 2, "rationale": RATIONALE})
    path = tmp_path / "rationales.jsonl"
    path.write_text(f"{good}\n\n{line if isinstance(line, str) else json.dumps(line)}\n")
    message = refused(lambda: read_rationales(path, {"a"}, DecisionTree.load()))
    assert message.startswith("rationales.jsonl, line 3: ") and expected in message


def test_a_region_is_told_once_and_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rationales.jsonl"
    path.write_text((json.dumps({"case": "a", "lesion": 2, "rationale": RATIONALE}) + "\n") * 2)
    assert "line 1 for it too" in refused(lambda: read_rationales(path, {"a"}, DecisionTree.load()))
    assert "check the path" in refused(lambda: read_rationales(tmp_path / "none", {"a"}, DecisionTree.load()))


def test_a_slice_is_told_on_its_lesion_or_its_gland(tmp_path: Path) -> None:
    reader = picai(tmp_path, {"10005_1000005": 1})
    lines = tmp_path / "rationales.jsonl"
    rows = [
        {"case": "10005_1000005", "slice": 5, "rationale": RATIONALE},
        {"case": "10005_1000005", "slice": 8, "rationale": {"lesion_presence": "lesion_absent"}},
    ]
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    prepare_set(reader, tmp_path / "set", rationales=lines)
    exam = StoredExam.open(stored_exams(tmp_path / "set")[0])
    lesion, gland = (exam.labels & 4) > 0, (exam.labels & 3) > 0
    on, rest = (np.flatnonzero((exam.regions == k).any((1, 2))) for k in (2, 1))
    assert len(on) == len(rest) == 1 and on[0] == rest[0] + 1, "slice 5 is the lesion's upper one"
    assert np.array_equal(exam.regions[on[0]] == 2, lesion[on[0]])
    assert np.array_equal(exam.regions[on[0] + 3] == 3, gland[on[0] + 3])
    answers = slice_answers(whole_exam(exam))
    assert answers[on[0]]["adc_signal"] == "adc_marked_hypointense"
    assert answers[rest[0]] == {"lesion_presence": "lesion_present", "zone": "zone_pz"}


@pytest.mark.parametrize(
    ("region", "expected"),
    [({"lesion": 2}, "one of the 1 lesions"), ({"slice": 99}, "slice from 0 to 13"), ({"slice": 0}, "gland or lesion")],
)
def test_a_region_that_is_not_there_is_named_with_its_line(tmp_path: Path, region: dict, expected: str) -> None:
    reader = picai(tmp_path, {"10005_1000005": 1})
    lines = tmp_path / "rationales.jsonl"
    lines.write_text(json.dumps({"case": "10005_1000005", **region, "rationale": RATIONALE}))
    message = refused(lambda: prepare_set(reader, tmp_path / "set", rationales=lines))
    assert "rationales.jsonl, line 1" in message and expected in message


# ------------------------------------------------------------------ what nobody labelled


@pytest.fixture(scope="module")
def msd_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("msd")
    prepare_set(MsdReader(msd(folder, ("02",))), folder / "set")
    return folder / "set"


def test_without_lesion_masks_no_slice_is_said_to_be_healthy(msd_set: Path, tiny_set: Path) -> None:
    stack = whole_exam(StoredExam.open(stored_exams(msd_set)[0]))
    assert stack.known.tolist() == [True, True, True, False]
    assert set(map(tuple, (a.items() for a in stack.answers))) == {(("zone", "zone_pz"),), (("zone", "zone_tz"),)}
    assert slice_answers(stack) == [{}] * len(stack.images)
    assert not stack.images[:, 2].any(), "there is no DWI"
    older = json.loads((stored_exams(tiny_set)[0] / "rationales.json").read_text(encoding="utf-8"))
    assert "classes" not in older
    assert whole_exam(StoredExam.open(stored_exams(tiny_set)[0])).known.all(), "older sets have all four"


def test_unknown_classes_are_part_of_a_damaged_record(msd_set: Path, tmp_path: Path) -> None:
    shutil.copytree(stored_exams(msd_set)[0], tmp_path / "exam")
    record = json.loads((tmp_path / "exam/rationales.json").read_text(encoding="utf-8")) | {
        "classes": ["gland", "urethra"]
    }
    (tmp_path / "exam/rationales.json").write_text(json.dumps(record))
    assert "urethra" in refused(lambda: StoredExam.open(tmp_path / "exam"))


def test_training_draws_stacks_from_real_and_synthetic_sets_alike(
    picai_set: tuple[PicaiReader, Path], msd_set: Path, tiny_set: Path
) -> None:
    dataset = StackDataset([picai_set[1], msd_set, tiny_set], SamplingConfig(), length=12, seed=1)
    stacks = [dataset[i] for i in range(12)]
    assert len({tuple(s.known.tolist()) for s in stacks}) == 2
    for stack in stacks:
        assert torch.isfinite(stack.images).all()
        assert stack.images.shape == (8, 3, 256, 256) and stack.masks.shape == (8, 4, 128, 128)


def loss_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 8, 8, generator=generator)
    return logits, (torch.rand(3, 4, 8, 8, generator=generator) > 0.7).float()


def test_the_loss_is_the_same_to_the_bit_where_everything_is_known() -> None:
    loss = SegmentationLoss(LossConfig(lesion_weight=2.0))
    logits, masks = loss_inputs()
    for plain, told in zip(loss(logits, masks), loss(logits, masks, torch.ones(3, 4, dtype=torch.bool)), strict=True):
        assert torch.equal(plain, told)


def test_an_unknown_mask_moves_neither_the_loss_nor_the_weights() -> None:
    loss = SegmentationLoss(LossConfig())
    logits, masks = loss_inputs()
    known = torch.tensor([[True, True, True, False], [True] * 4, [True, False, False, True]])
    expected = [float(v) for v in loss(logits, masks, known)]
    other, wrong = logits.clone(), masks.clone()
    other[~known], wrong[~known] = 50.0, 1.0
    other.requires_grad_()
    found = loss(other, wrong, known)
    assert [v.item() for v in found] == pytest.approx(expected, rel=1e-6)
    torch.stack(found).sum().backward()
    assert not other.grad[~known].any() and other.grad[known].all()


def test_the_loss_over_known_masks_is_that_of_a_batch_without_the_others() -> None:
    loss = SegmentationLoss(LossConfig())
    logits, masks = loss_inputs()
    whole = torch.tensor([[True] * 4, [True] * 4, [False] * 4])
    for alone, told in zip(loss(logits[:2], masks[:2]), loss(logits, masks, whole), strict=True):
        assert float(told) == pytest.approx(float(alone), rel=1e-5)
    nothing = loss(logits, masks, torch.zeros(3, 4, dtype=torch.bool))
    assert [float(v) for v in nothing] == [0.0, 0.0]


# ------------------------------------------------------------------ command line


def test_prepare_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = msd(tmp_path, ("02",))
    arguments = ["prepare", "--reader", "msd", "--data", str(home), "--out", str(tmp_path / "set")]
    assert cli.main(arguments) == 0
    assert "1 examinations prepared, 1 are in" in " ".join(capsys.readouterr().out.split())
    assert cli.main(arguments) == 0
    assert "0 examinations prepared" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*arguments[:-1], str(tmp_path / "other"), "--split", "val"]) == 2
    assert re.fullmatch(r"medrationale-train: Expected .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"reader": "picai"}, "picai_labels"),
        ({"reader": "msd", "folds": [0]}, "folds with the reader picai only"),
        ({"reader": "picai", "labels": "x", "folds": [0]}, "splits.json"),
    ],
)
def test_options_that_do_not_belong_to_a_reader_are_refused(change: dict, expected: str) -> None:
    assert expected in refused(lambda: open_reader(PrepareConfig(data="nowhere", **change)))


# ------------------------------------------------------------------ real examinations


def test_a_real_examination_is_prepared_from_picais_layout(shared_data: Path, tmp_path: Path) -> None:
    id, real = "10005_1000005", shared_data / "prostatex-0000"  # under another id, for its own is a test case
    reader = picai(tmp_path, {id: 1})
    for name, ending in (("t2w", "t2w"), ("adc", "adc"), ("dwi", "hbv")):
        image = sitk.ReadImage(str(real / f"{name}.nii.gz"))
        sitk.WriteImage(image, str(tmp_path / f"images/10005/{id}_{ending}.mha"))
    shutil.copy(real / "zones.nii.gz", tmp_path / "picai_labels" / ANATOMY[0][0] / f"{id}.nii.gz")
    shutil.copy(real / "lesion.nii.gz", tmp_path / "picai_labels" / HUMAN / "resampled" / f"{id}.nii.gz")
    assert not prepare_set(reader, tmp_path / "set").refused
    exam = StoredExam.open(stored_exams(tmp_path / "set")[0])
    voxel_ml = 0.75**2 * 3 / 1000
    zones = sitk.ReadImage(str(real / "zones.nii.gz"))
    volume = (sitk.GetArrayViewFromImage(zones) > 0).sum() * np.prod(zones.GetSpacing()) / 1000
    assert ((exam.labels & 3) > 0).sum() * voxel_ml == pytest.approx(volume, rel=0.03)
    (lesion,) = exam.rationales
    assert (exam.regions == lesion.label).sum() * voxel_ml == pytest.approx(0.31, rel=0.25)
    assert lesion.answers == {"lesion_presence": "lesion_present", "zone": "zone_pz"}
    columns = np.argwhere(exam.regions == lesion.label)[:, 2]
    assert columns.mean() < 128, "it is on the patient's right"
    images = np.asarray(exam.images, np.float32)
    inside, healthy = (images[:, ((exam.labels & 3) == 1) & ((exam.regions > 0) == ill)] for ill in (True, False))
    assert inside[1].mean() < healthy[1].mean() and inside[2].mean() > healthy[2].mean(), "dark on ADC, bright on DWI"


def test_real_volumes_are_prepared_from_msds_layout(shared_data: Path, tmp_path: Path) -> None:
    real = shared_data / "prostatex-0000"
    home = msd(tmp_path, ("02",))
    study = Study.from_case(real)
    assert study.adc is not None
    sitk.WriteImage(sitk.JoinSeries([study.t2w, study.adc]), str(home / "imagesTr/prostate_02.nii.gz"))
    shutil.copy(real / "zones.nii.gz", home / "labelsTr/prostate_02.nii.gz")
    assert not prepare_set(MsdReader(home), tmp_path / "set").refused
    exam = StoredExam.open(stored_exams(tmp_path / "set")[0])
    assert exam.classes == ("gland", "pz", "tz") and not exam.rationales
    assert not ((exam.labels >> 5) & 1).any() and ((exam.labels >> 4) & 1).any()


def test_a_real_study_of_prostate158_lacks_its_adc_and_is_called_incomplete(shared_data: Path, tmp_path: Path) -> None:
    folder = prostate158(tmp_path)
    at, real = folder / "prostate158_train/train/020", shared_data / "prostate158-001"
    for name, ours in (("t2w", "t2"), ("dwi", "dwi")):
        shutil.copy(real / f"{name}.nii.gz", at / f"{ours}.nii.gz")
    (at / "adc.nii.gz").unlink()
    assert "020 (no adc.nii.gz" in refused(Prostate158Reader(folder).cases)
