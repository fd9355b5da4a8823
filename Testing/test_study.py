"""Reading an examination from files and case folders: what is refused, what is remarked, and the one grid."""

from __future__ import annotations

import gzip
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from MedRationaleLib.errors import InputError
from MedRationaleLib.study import Study, adc_unit, looks_swapped

SPACING = (2.0, 2.0, 4.0)
SIZE = (48, 48, 16)


def volume(
    values: np.ndarray | float | None = None, *, spacing=SPACING, size=SIZE, origin=None, seed: int = 0
) -> sitk.Image:
    """A centred axial float32 volume; `values` an array (z, y, x), a scale of random numbers, or None."""
    if not isinstance(values, np.ndarray):
        values = np.random.default_rng(seed).uniform(1, 100 if values is None else values, size[::-1])
    image = sitk.GetImageFromArray(values.astype(np.float32))
    image.SetSpacing(spacing)
    image.SetOrigin(origin or [-s * (n - 1) / 2 for s, n in zip(spacing, image.GetSize(), strict=True)])
    return image


def adc_map(scale: float = 1.0) -> sitk.Image:
    """ADC-like values (1e-6 mm²/s times scale) with a smooth course along x."""
    return volume(np.broadcast_to(np.linspace(300, 3000, SIZE[0]), SIZE[::-1]) * scale)


def save(image: sitk.Image, path: Path, compress: bool = False) -> Path:
    sitk.WriteImage(image, str(path), compress)
    return path


def refused(message: str, **files: object) -> str:
    """Run from_files, expect an InputError that matches, and check that it is one readable sentence."""
    with pytest.raises(InputError, match=message) as caught:
        Study.from_files(**files)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "expected" in text and "got" in text and ";" in text and text.endswith(".")
    assert (
        "\n" not in text and "itk" not in text.replace(".nii", "").lower() and ".cxx" not in text and "0x" not in text
    )
    return text


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".mhd", ".nrrd"])
def test_every_file_format_is_read_with_its_geometry_and_values(tmp_path, ending):
    image = volume()
    study = Study.from_files(t2w=save(image, tmp_path / f"t2w{ending}"))
    assert study.t2w.GetPixelID() == sitk.sitkFloat32
    assert np.allclose(study.t2w.GetOrigin(), image.GetOrigin(), atol=1e-4)
    assert np.array_equal(sitk.GetArrayFromImage(study.t2w), sitk.GetArrayFromImage(image))
    assert study.missing == ("adc", "dwi") and len(study.provenance["t2w"].sha256) == 64
    with pytest.raises(FrozenInstanceError):
        study.t2w = None  # type: ignore[misc]


def test_a_file_that_does_not_exist_is_refused(tmp_path):
    refused("does not exist", t2w=tmp_path / "nothing.nii.gz")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    refused("folder", t2w=tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "t2w.nii.gz", "t2w.mha", "t2w.nrrd", "t2w.nii"])
def test_a_text_file_is_refused_as_no_image_or_damaged(tmp_path, name):
    path = tmp_path / name
    path.write_text("this is no image\n" * 50)
    refused("not an image|truncated or damaged", t2w=path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.97])
def test_a_truncated_file_is_refused_in_words_and_nothing_leaks_to_stderr(tmp_path, capfd, ending, compress, part):
    path = save(volume(), tmp_path / f"t2w{ending}", compress)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    refused("truncated or damaged|not an image", t2w=path)
    assert capfd.readouterr().err == ""


def test_a_2d_image_is_refused(tmp_path):
    refused("2-D", t2w=save(volume()[:, :, 3], tmp_path / "t2w.nii.gz"))
    refused("2-D", t2w=save(volume()[:, :, 3:4], tmp_path / "one.nii.gz"))


def test_a_4d_image_is_refused_unless_it_holds_one_volume(tmp_path):
    refused("4-D", t2w=save(sitk.JoinSeries([volume(), volume()]), tmp_path / "two.nii.gz"))
    single = Study.from_files(t2w=save(sitk.JoinSeries([volume()]), tmp_path / "one.nii.gz"))
    assert single.t2w.GetSize() == SIZE


def test_a_colour_image_is_refused(tmp_path):
    colour = sitk.Compose([sitk.Cast(volume(), sitk.sitkUInt8)] * 3)
    refused("components", t2w=save(colour, tmp_path / "t2w.mha"))


def test_a_constant_image_is_refused(tmp_path):
    refused("constant", t2w=save(volume(np.full(SIZE[::-1], 7.0)), tmp_path / "t2w.nii.gz"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    array = sitk.GetArrayFromImage(volume())
    array[2, 3, 4] = value
    refused("1 voxels that are NaN or infinite", t2w=save(volume(array), tmp_path / "t2w.nii.gz"))


@pytest.mark.parametrize("spacing", ["-2 2 4", "0 2 4", "nan 2 4", "2 2 4000", "0.001 2 4"])
def test_a_negative_or_absurd_spacing_in_a_metaimage_is_refused(tmp_path, spacing):
    path = save(volume(), tmp_path / "t2w.mha")
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 2 2 4", b"ElementSpacing = " + spacing.encode()))
    refused("spacing", t2w=path)


@pytest.mark.parametrize("spacing", ["-2 2 4", "0 2 4"])
def test_a_metaimage_that_was_converted_from_nifti_is_checked_as_one(tmp_path, spacing):
    """SimpleITK copies NIfTI's header keys into it."""
    converted = sitk.ReadImage(str(save(volume(), tmp_path / "t2w.nii")))
    assert converted.HasMetaDataKey("bitpix")
    path = save(converted, tmp_path / "t2w.mha")
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 2 2 4", b"ElementSpacing = " + spacing.encode()))
    assert "above 0 mm" in refused("spacing", t2w=path)


def test_a_header_without_its_voxel_file_names_it(tmp_path):
    path = save(volume(), tmp_path / "t2w.mhd")
    (tmp_path / "t2w.raw").unlink()
    assert "got no file t2w.raw" in refused("copy both files", t2w=path)


def test_one_file_given_for_two_sequences_is_refused(tmp_path):
    t2w, adc = save(volume(), tmp_path / "t2w.nii.gz"), save(volume(seed=1), tmp_path / "adc.nii.gz")
    refused("DWI: expected another image than the T2W", t2w=t2w, adc=adc, dwi=t2w)


@pytest.mark.parametrize("value", [-2.0, 0.0, math.nan])
def test_a_negative_or_missing_spacing_in_a_nifti_is_refused(tmp_path, value):
    path = save(volume(), tmp_path / "t2w.nii")
    content = bytearray(path.read_bytes())
    content[80:84] = np.float32(value).tobytes()
    path.write_bytes(content)
    refused("spacing", t2w=path)
    zipped = tmp_path / "t2w.nii.gz"
    zipped.write_bytes(gzip.compress(bytes(content)))
    refused("spacing", t2w=zipped)


@pytest.mark.parametrize("name", ["t2w", "adc", "dwi"])
def test_a_map_of_labels_is_no_image(name, tmp_path):
    given = {"t2w": volume(), "adc": adc_map(), "dwi": volume(40.0, seed=1)}
    given[name] = volume(np.random.default_rng(0).integers(0, 4, SIZE[::-1]))
    refused("a map of labels", **{n: save(image, tmp_path / f"{n}.nii.gz") for n, image in given.items()})


def test_a_case_folder_with_only_folders_names_them(tmp_path):
    (tmp_path / "case" / "1_t2").mkdir(parents=True)
    with pytest.raises(InputError, match="1_t2 in it; name one of them, or read a DICOM folder"):
        Study.from_case(tmp_path / "case")


def test_an_image_of_a_few_millimetres_is_refused(tmp_path):
    refused("imaged block", t2w=save(volume(spacing=(0.1, 0.1, 0.2)), tmp_path / "t2w.nii.gz"))


@pytest.mark.parametrize(("axis", "plane"), [(0, "sagittal"), (1, "coronal")])
def test_a_sagittal_or_coronal_t2w_is_refused(axis, plane, tmp_path):
    spacing, size = [1.0, 1.0, 1.0], [64, 64, 64]
    spacing[axis], size[axis] = 4.0, 16
    refused(plane, t2w=save(volume(spacing=tuple(spacing), size=tuple(size)), tmp_path / "t2w.nii.gz"))


@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR", "SAL", "ASL"])
def test_an_axial_t2w_stored_in_any_orientation_is_read(tmp_path, code):
    stored = sitk.DICOMOrient(volume(), code)
    study = Study.from_files(t2w=save(stored, tmp_path / "t2w.nii.gz"))
    assert study.t2w.GetSize() == stored.GetSize()


def test_volumes_that_do_not_overlap_are_refused_with_their_distance(tmp_path):
    far = volume(origin=(500.0, 0.0, 0.0))
    text = refused("overlaps", t2w=save(volume(), tmp_path / "t.nii.gz"), dwi=save(far, tmp_path / "d.nii.gz"))
    assert "mm apart" in text


def test_an_adc_map_that_lies_elsewhere_than_its_dwi_is_remarked_on():
    near, far = (Study.from_images(t2w=volume(), adc=_moved(adc_map(), by), dwi=volume(40.0, seed=1)) for by in (4, 14))
    assert not [w for w in near.warnings if "apart" in w]
    (told,) = [w for w in far.warnings if "apart" in w]
    assert told.startswith("ADC and DWI lie 14 mm apart")


def _moved(image: sitk.Image, by: float) -> sitk.Image:
    image.SetOrigin([image.GetOrigin()[0] + by, *image.GetOrigin()[1:]])
    return image


def test_a_missing_t2w_is_refused():
    refused("without which nothing", t2w=None)


def test_sequences_of_any_grid_and_orientation_land_on_the_t2w_grid_with_linear_interpolation():
    def field(x: np.ndarray) -> np.ndarray:  # linear in space, so linear interpolation is exact
        return 1500 + x @ np.array([9.0, -7.0, 5.0])

    angle = math.radians(18)
    oblique = (1, 0, 0, 0, math.cos(angle), math.sin(angle), 0, -math.sin(angle), math.cos(angle))
    adc = sitk.Image([70, 60, 40], sitk.sitkFloat32)
    adc.SetSpacing((2.5, 2.5, 3.0))
    adc.SetDirection(oblique)
    adc.SetOrigin(np.array(oblique).reshape(3, 3) @ np.array([-86.0, -74.0, -58.0]))
    index = np.indices(adc.GetSize()[::-1])[::-1].reshape(3, -1).T
    points = np.array(adc.GetOrigin()) + (index * adc.GetSpacing()) @ np.array(oblique).reshape(3, 3).T
    values = sitk.GetImageFromArray(field(points).reshape(adc.GetSize()[::-1]).astype(np.float32))
    values.CopyInformation(adc)
    t2w = volume()
    for code in ("LPS", "RAI", "SAL"):
        study = Study.from_images(t2w=t2w, adc=sitk.DICOMOrient(values, code))
        assert study.adc is not None and study.adc.GetSize() == t2w.GetSize()
        valid = sitk.GetArrayFromImage(study.valid["adc"]).astype(bool)
        assert valid.mean() > 0.9
        index = np.indices(t2w.GetSize()[::-1])[::-1].reshape(3, -1).T
        expected = field(np.array(t2w.GetOrigin()) + index * np.array(t2w.GetSpacing())).reshape(valid.shape)
        inner = valid & ~sitk.GetArrayFromImage(sitk.BinaryDilate(1 - study.valid["adc"], (2, 2, 2))).astype(bool)
        assert np.abs(sitk.GetArrayFromImage(study.adc) - expected)[inner].max() < 0.1


def test_validity_is_zero_where_a_sequence_has_no_data_and_partial_coverage_is_remarked():
    half = volume(3000.0)[: SIZE[0] // 2]
    study = Study.from_images(t2w=volume(), adc=half)
    valid = sitk.GetArrayFromImage(study.valid["adc"])
    assert valid.mean() == pytest.approx(0.5, abs=0.03)
    assert np.all(sitk.GetArrayFromImage(study.adc)[valid == 0] == 0)
    assert any("covers only" in note for note in study.warnings)


def test_a_t2w_smaller_than_the_gland_region_is_remarked():
    study = Study.from_images(t2w=volume()[12:36, 12:36, :])
    assert any("parts of it may be cut off" in note for note in study.warnings)


@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.0), (1e-3, 1e3), (1e-6, 1e6)])
def test_adc_units_are_recognised_and_brought_to_1e_6(scale, factor):
    study = Study.from_images(t2w=volume(), adc=adc_map(scale))
    values = sitk.GetArrayFromImage(study.adc)
    assert values.max() == pytest.approx(3000, rel=1e-4) and study.provenance["adc"].factor == factor
    assert any("multiplied" in note for note in study.warnings) == (factor != 1)


def test_adc_values_of_no_known_unit_are_refused():
    with pytest.raises(InputError, match="99th percentile"):
        adc_unit(adc_map(0.02))


def test_low_and_unknown_b_values_are_remarked(tmp_path):
    t2w, dwi = save(volume(), tmp_path / "t.nii.gz"), save(volume(seed=1), tmp_path / "d.nii.gz")
    assert any("b = 500" in note for note in Study.from_files(t2w=t2w, dwi=dwi, b_value=500).warnings)
    assert any("not known" in note for note in Study.from_files(t2w=t2w, dwi=dwi).warnings)
    assert not any("b-value" in note for note in Study.from_files(t2w=t2w, dwi=dwi, b_value=1400).warnings)


def test_a_missing_sequence_is_remarked_with_the_answers_it_weakens():
    study = Study.from_images(t2w=volume(), adc=adc_map())
    assert study.missing == ("dwi",) and study.dwi is None
    assert any(note.startswith("DWI missing") and "DWI score" in note for note in study.warnings)


@pytest.mark.parametrize(
    "names", [("10_11_t2w.mha", "10_11_adc.mha", "10_11_hbv.mha"), ("t2w.nii.gz", "adc.nii.gz", "dwi.nii.gz")]
)
def test_a_case_folder_is_read_by_its_names(tmp_path, names):
    for name, image in zip(names, (volume(), adc_map(), volume(40.0)), strict=True):
        save(image, tmp_path / name)
    save(volume(), tmp_path / "10_11_sag.mha")
    (tmp_path / "notes.txt").write_text("a note")
    study = Study.from_case(tmp_path)
    assert study.missing == () and study.patient["id"] == ("10" if "_" in names[0] else tmp_path.name)
    assert names[0] in study.provenance["t2w"].reason


def test_a_case_folder_that_is_empty_ambiguous_or_without_axial_t2w_is_refused(tmp_path):
    with pytest.raises(InputError, match="empty folder"):
        Study.from_case(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        Study.from_case(tmp_path / "absent")
    save(volume(), tmp_path / "1_1_sag.mha")
    with pytest.raises(InputError, match="sagittal or coronal"):
        Study.from_case(tmp_path)
    save(volume(), tmp_path / "1_1_t2w.mha")
    save(volume(), tmp_path / "1_2_t2w.mha")
    with pytest.raises(InputError, match="expected one file"):
        Study.from_case(tmp_path)


def test_swapped_adc_and_dwi_are_noticed_on_real_cases_and_only_then(shared_data):
    for case in ("prostatex-0000", "picai-11063", "real-train/picai-10270", "real-train/picai-11184"):
        adc, dwi = (sitk.ReadImage(str(shared_data / case / f"{n}.nii.gz"), sitk.sitkFloat32) for n in ("adc", "dwi"))
        for scale in (1.0, 1e-3, 60.0):  # whatever unit the DWI has
            assert not looks_swapped(adc, dwi * scale), case
            assert looks_swapped(dwi * scale, adc), case


def test_a_swapped_real_examination_is_read_as_given_with_a_warning(shared_data):
    case = shared_data / "prostatex-0000"
    right = Study.from_case(case)
    swapped = Study.from_files(t2w=case / "t2w.nii.gz", adc=case / "dwi.nii.gz", dwi=case / "adc.nii.gz")
    assert not any("swapped" in note for note in right.warnings)
    assert any("swapped" in note for note in swapped.warnings)
    assert np.allclose(sitk.GetArrayViewFromImage(swapped.adc), sitk.GetArrayViewFromImage(right.dwi))


def test_a_real_case_without_t2w_is_refused_and_one_without_adc_is_read(shared_data):
    with pytest.raises(InputError, match="T2W"):
        Study.from_case(shared_data / "picai-11063")
    study = Study.from_case(shared_data / "prostate158-001")
    assert study.missing == ("adc",) and study.valid["dwi"].GetSize() == study.t2w.GetSize()


@pytest.mark.parametrize("ng_ml", [0.0, -1.0, float("nan"), 1e6])
def test_a_psa_that_nobody_has_is_refused_in_scripts_too(ng_ml):
    study = Study.from_images(t2w=volume())
    assert study.with_psa(6.5).patient["psa_ng_ml"] == 6.5
    with pytest.raises(InputError, match="above 0 and up to 100,000"):
        study.with_psa(ng_ml)
