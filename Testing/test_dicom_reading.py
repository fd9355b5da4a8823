"""Reading DICOM examinations: which series is taken and why, b-values of all vendors, geometry, the ADC fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_samples import (
    AXIAL,
    CORONAL,
    EPI,
    OBLIQUE,
    PIXEL,
    SAGITTAL,
    SHAPE,
    STEP,
    T2W,
    TRACEW,
    array,
    dataset,
    enhanced,
    noise,
    write,
    write_examination,
)
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from MedRationaleLib.dicom_frames import b_from_sequence_name, b_from_text, b_value
from MedRationaleLib.dicom_reading import read_examination
from MedRationaleLib.dicom_stacks import fit_adc, scan
from MedRationaleLib.errors import InputError
from MedRationaleLib.study import Study


def test_an_examination_is_recognised_and_says_why(tmp_path):
    write_examination(tmp_path)
    study = Study.from_dicom(tmp_path)
    p = study.provenance
    assert [p[name].series_number for name in ("t2w", "adc", "dwi")] == [2, 5, 4]
    assert p["dwi"].b_value == 800 and "b 400 (lower b-value)" in p["dwi"].reason and "SequenceName" in p["dwi"].reason
    assert "TE 104" in p["t2w"].reason and len(p["t2w"].instance_uids) == SHAPE[0] and not p["adc"].calculated
    assert study.patient["age"] == 64 and study.patient["id"] == "P1" and study.warnings == ()
    assert np.array_equal(array(study.t2w), noise(1, 900))


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE, (-1.0, 0, 0, 0, -1.0, 0), (0, 1.0, 0, 1.0, 0, 0)])
def test_shuffled_and_oblique_slices_are_sorted_by_geometry(tmp_path, orientation):
    order = np.random.default_rng(3).permutation(SHAPE[0])
    write(tmp_path, noise(1, 900), 2, orientation=orientation, order=order, **T2W)
    image = Study.from_dicom(tmp_path).t2w
    row, column = np.array(orientation).reshape(2, 3)
    assert np.allclose(image.GetSpacing(), (PIXEL[1], PIXEL[0], STEP))
    assert np.allclose(np.array(image.GetDirection()).reshape(3, 3).T, [row, column, np.cross(row, column)], atol=1e-5)
    centre = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
    assert np.allclose(centre, 0, atol=1e-4)
    assert np.array_equal(array(image), noise(1, 900))


def test_rescale_slope_and_intercept_are_applied(tmp_path):
    write(tmp_path, noise(1, 900), 2, RescaleSlope=2, RescaleIntercept=-5, **T2W)
    assert np.array_equal(array(Study.from_dicom(tmp_path).t2w), noise(1, 900) * 2 - 5)


VENDORS = [
    ("SIEMENS", (0x0019, "SIEMENS MR HEADER", 0x0C, "IS", 1400)),
    ("SIEMENS", (0x0019, "SIEMENS MR HEADER", 0x0C, "OB", b"1400")),
    ("GE MEDICAL SYSTEMS", (0x0043, "GEMS_PARM_01", 0x39, "IS", [1400, 8, 0, 0])),
    ("GE MEDICAL SYSTEMS", (0x0043, "GEMS_PARM_01", 0x39, "IS", [1000001400, 8, 0, 0])),
    ("GE MEDICAL SYSTEMS", (0x0043, "GEMS_PARM_01", 0x39, "UN", b"1000001400\\8\\0\\0 ")),
    ("Philips Medical Systems", (0x2001, "Philips Imaging DD 001", 0x03, "FL", 1400.0)),
    ("Philips Medical Systems", (0x2001, "Philips Imaging DD 001", 0x03, "UN", np.float32(1400).tobytes())),
]


@pytest.mark.parametrize(("manufacturer", "private"), VENDORS)
def test_the_b_value_is_read_from_every_vendors_private_tag(tmp_path, manufacturer, private):
    write_examination(tmp_path, b_values=(50,))
    tags = {
        **EPI,
        "SeriesDescription": "x",
        "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"],
        "Manufacturer": manufacturer,
    }
    write(tmp_path / "high", noise(1, 90), 7, private=private, **tags)
    source = Study.from_dicom(tmp_path).provenance["dwi"]
    assert (source.series_number, source.b_value) == (7, 1400.0)
    assert "private tag" in source.reason


def test_a_private_b_value_is_found_in_a_shifted_block_and_without_its_creator():
    shifted = Dataset()
    shifted.add_new((0x0019, 0x0010), "LO", "ANOTHER CREATOR")
    shifted.add_new((0x0019, 0x0011), "LO", "SIEMENS MR HEADER")
    shifted.add_new((0x0019, 0x100C), "IS", 7)
    shifted.add_new((0x0019, 0x110C), "IS", 900)
    assert b_value(shifted)[0] == 900
    bare = Dataset()
    bare.Manufacturer = "SIEMENS"
    bare.add_new((0x0019, 0x100C), "IS", 600)
    assert b_value(bare)[0] == 600


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"DiffusionBValue": 800.0, "SequenceName": "ep_b50"}, 800),
        ({"SequenceName": "*ep_b1000#3", "SeriesDescription": "b50"}, 1000),
        ({"SequenceName": "*ep_b50_800", "ImageComments": "b=1400"}, 1400),
        ({"SeriesDescription": "DWI_b2000_tra"}, 2000),
        ({"SeriesDescription": "ep2d_diff_b50_400_800"}, None),
        ({}, None),
    ],
)
def test_b_values_are_taken_from_standard_tag_then_sequence_name_then_text(tags, expected):
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    assert b_value(ds)[0] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DWI b=1400", 1400),
        ("bval 800", 800),
        ("tra b 50, 1000", None),
        ("b0 b1000", None),
        ("lab2 web3", None),
        ("", None),
    ],
)
def test_b_values_in_text_are_read_only_where_there_is_one(text, expected):
    assert b_from_text(text) == expected
    assert b_from_sequence_name("*ep_b50_800") == (None, True) and b_from_sequence_name("*tse2d1_25") == (None, False)


def test_the_higher_b_value_wins_even_if_calculated_and_is_marked_so(tmp_path):
    write_examination(tmp_path)
    truth = np.random.default_rng(1).uniform(500, 2500, SHAPE)
    calculated = 4000 * np.exp(-1400 * truth * 1e-6)
    tags = {**TRACEW, "SeriesDescription": "diffCALC_BVAL", "SequenceName": "*ep_b50_800"}
    write(tmp_path / "calc", calculated, 8, private=(0x0019, "SIEMENS MR HEADER", 0x0C, "IS", 1400), **tags)
    study = Study.from_dicom(tmp_path)
    source = study.provenance["dwi"]
    assert (source.series_number, source.b_value, source.calculated) == (8, 1400.0, True)
    assert "calculated, not acquired" in source.reason and study.warnings == ()


def test_a_calculated_series_whose_signal_contradicts_its_tag_is_remarked(tmp_path):
    write_examination(tmp_path)
    truth = np.random.default_rng(1).uniform(500, 2500, SHAPE)
    tags = {**TRACEW, "SequenceName": "*ep_b50_800", "DiffusionBValue": 2000.0}
    write(tmp_path / "calc", 4000 * np.exp(-1000 * truth * 1e-6), 8, **tags)
    study = Study.from_dicom(tmp_path)
    assert any("states b = 2000" in note and "corresponds to 10" in note for note in study.warnings)


def test_a_calculated_series_without_b_value_gets_it_from_its_signal(tmp_path):
    write_examination(tmp_path)
    truth = np.random.default_rng(1).uniform(500, 2500, SHAPE)
    write(tmp_path / "calc", 4000 * np.exp(-1200 * truth * 1e-6), 8, **{**TRACEW, "SeriesDescription": "CALC"})
    source = Study.from_dicom(tmp_path).provenance["dwi"]
    assert (source.series_number, source.b_value) == (8, 1200.0) and "of its signal" in source.reason


def test_the_fit_equals_an_independent_least_squares_fit():
    rng = np.random.default_rng(5)
    b_values = [0.0, 50.0, 400.0, 1000.0]
    signals = [rng.uniform(50, 60, (3, 4)) * np.exp(-b * 1e-3) + rng.uniform(1, 2, (3, 4)) for b in b_values]
    adc, log_s0 = fit_adc(signals, b_values)
    slope, intercept = np.polyfit(b_values, np.log(np.stack(signals).reshape(4, -1)), 1)
    assert np.allclose(adc.ravel(), -slope * 1e6, rtol=1e-4) and np.allclose(log_s0.ravel(), intercept, rtol=1e-4)
    assert fit_adc([np.zeros((1, 1)), np.ones((1, 1))], [0, 800])[0][0, 0] == 0


def test_without_an_adc_map_it_is_computed_from_the_multi_b_series(tmp_path):
    write_examination(tmp_path, adc=False)
    study = Study.from_dicom(tmp_path)
    source = study.provenance["adc"]
    assert source.calculated and "50, 400, 800" in source.reason and any("computed" in note for note in study.warnings)
    truth = np.random.default_rng(1).uniform(500, 2500, SHAPE)
    assert np.abs(array(study.adc) - truth).max() < 5  # the images are stored as integers
    assert len(source.instance_uids) == 3 * SHAPE[0]


def test_one_b_value_alone_leaves_adc_missing(tmp_path):
    write_examination(tmp_path, b_values=(800,), adc=False)
    assert Study.from_dicom(tmp_path).missing == ("adc",)


def test_directions_become_their_geometric_mean_and_ready_traces_are_preferred(tmp_path):
    write(tmp_path / "t2", noise(1, 900), 2, **T2W)
    directions = [noise(10, 900, seed) for seed in (1, 2, 3)]
    tags = {**EPI, "ImageType": ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"], "SeriesDescription": "diff"}
    for i, volume in enumerate(directions):
        write(
            tmp_path / "dwi",
            volume,
            4,
            prefix=f"d{i}-",
            DiffusionBValue=1000.0,
            DiffusionDirectionality="DIRECTIONAL",
            **tags,
        )
    mean = np.exp(np.mean(np.log(np.stack(directions)), axis=0))
    assert np.allclose(array(read_examination(tmp_path).images["dwi"]), mean, rtol=1e-4)
    ready = noise(10, 900, 9)
    write(tmp_path / "dwi", ready, 4, prefix="t-", DiffusionBValue=1000.0, DiffusionDirectionality="ISOTROPIC", **tags)
    assert np.array_equal(array(read_examination(tmp_path).images["dwi"]), ready)


def test_b0_images_stored_as_spin_echo_in_the_diffusion_series_are_not_taken_for_t2w(tmp_path):
    tags = {"ScanningSequence": ["SE"], "EchoTime": 80, "RepetitionTime": 4000, "SeriesDescription": "DWI"}
    for b in (0.0, 900.0):
        write(tmp_path, 4000 * np.exp(-b * noise(500, 2500) * 1e-6), 4, prefix=f"{b}", DiffusionBValue=b, **tags)
    assert {(stack.kind, stack.b) for stack in scan(tmp_path)[0]} == {("dwi", 0.0), ("dwi", 900.0)}
    with pytest.raises(InputError, match="axial T2-weighted"):
        Study.from_dicom(tmp_path)


def test_axial_t2w_is_preferred_to_sagittal_coronal_localiser_fat_suppressed_and_t1(tmp_path):
    write_examination(tmp_path)
    write(tmp_path / "sag", noise(1, 900), 1, SAGITTAL, **{**T2W, "SeriesDescription": "t2_tse_sag"})
    write(tmp_path / "cor", noise(1, 900), 3, CORONAL, **{**T2W, "SeriesDescription": "t2_tse_cor"})
    write(tmp_path / "fs", noise(1, 900), 6, **{**T2W, "SeriesDescription": "t2_tse_tra_fs"})
    write(tmp_path / "t1", noise(1, 900), 9, **{**T2W, "SeriesDescription": "t2_named_but_t1", "EchoTime": 12})
    write(tmp_path / "loc", noise(1, 900), 10, **{**T2W, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]})
    reason = Study.from_dicom(tmp_path).provenance["t2w"].reason
    assert reason.startswith("series 2")
    for words in ('"t2_tse_sag" (sagittal)', '"t2_tse_cor" (coronal)', "(fat-suppressed)", "(localiser)"):
        assert words in reason


def test_sagittal_only_and_localiser_only_are_refused(tmp_path):
    write(tmp_path / "s", noise(1, 900), 1, SAGITTAL, **T2W)
    with pytest.raises(InputError, match="only sagittal"):
        Study.from_dicom(tmp_path / "s")
    for plane, prefix in ((AXIAL, "a"), (SAGITTAL, "s"), (CORONAL, "c")):
        write(tmp_path / "l", noise(1, 900)[:3], 1, plane, prefix=prefix, **{**T2W, "SeriesDescription": "planes"})
    with pytest.raises(InputError, match="only localisers"):
        Study.from_dicom(tmp_path / "l")


def test_two_patients_and_two_examinations_in_one_folder_are_refused(tmp_path):
    write(tmp_path / "a", noise(1, 900), 1, **T2W)
    write(tmp_path / "b", noise(1, 900), 2, PatientID="P2", **T2W)
    with pytest.raises(InputError, match="one patient.*got 2"):
        Study.from_dicom(tmp_path)
    write(tmp_path / "b", noise(1, 900), 2, StudyInstanceUID=generate_uid(), **T2W)
    with pytest.raises(InputError, match="one examination"):
        Study.from_dicom(tmp_path)
    assert Study.from_dicom(tmp_path, t2w=2).provenance["t2w"].series_number == 2


def test_an_empty_folder_and_one_without_mr_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="empty folder"):
        Study.from_dicom(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        Study.from_dicom(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no DICOM")
    with pytest.raises(InputError, match="MR images"):
        Study.from_dicom(tmp_path)


def test_unreadable_files_are_skipped_with_a_warning_and_other_dicom_is_ignored(tmp_path, capfd):
    write_examination(tmp_path)
    (tmp_path / "junk.dcm").write_bytes(b"no dicom at all")
    (tmp_path / "notes.txt").write_text("a note")
    ct = dataset(noise(1, 9)[0], 20, Modality="CT")
    ct.save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    middle = tmp_path / "t2" / "005.dcm"
    middle.write_bytes(middle.read_bytes()[:-500])
    study = Study.from_dicom(tmp_path)
    assert any("junk.dcm" in note and "1 unreadable" in note for note in study.warnings)
    assert any("005.dcm" in note for note in study.warnings) and any("interpolated" in note for note in study.warnings)
    truth = noise(1, 900).astype(np.float32)
    assert np.allclose(array(study.t2w)[5], (truth[4] + truth[6]) / 2)
    assert np.array_equal(array(study.t2w)[6:], truth[6:]) and capfd.readouterr().err == ""


def test_a_series_with_large_gaps_is_refused(tmp_path):
    write(tmp_path, noise(1, 900), 2, **T2W)
    for i in (3, 4, 5, 6):
        (tmp_path / f"{i:03d}.dcm").unlink()
    with pytest.raises(InputError, match="evenly spaced"):
        Study.from_dicom(tmp_path)


def test_a_broken_adc_series_is_left_out_with_a_warning_and_the_fit_takes_its_place(tmp_path):
    write_examination(tmp_path)
    for i in (3, 4, 5, 6):
        (tmp_path / "adc" / f"{i:03d}.dcm").unlink()
    study = Study.from_dicom(tmp_path)
    assert study.provenance["adc"].calculated and any('"diff_ADC" was left out' in note for note in study.warnings)


def test_damaged_headers_are_skipped_like_unreadable_files(tmp_path):
    write_examination(tmp_path)
    damage = {"ImagePositionPatient": [1, 2], "PixelSpacing": [0, 0], "ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}
    for folder, (keyword, value) in zip(("t2", "t2", "adc"), damage.items(), strict=True):
        path = tmp_path / folder / f"00{len(keyword) // 3}.dcm"
        ds = pydicom.dcmread(path)
        setattr(ds, keyword, value)
        ds.save_as(path)
    write(tmp_path / "more", noise(1, 900)[:1], 2, prefix="x", **T2W)
    content = (tmp_path / "more" / "x000.dcm").read_bytes()
    (tmp_path / "more" / "x000.dcm").write_bytes(content.replace(b"\x20\x00\x11\x00IS", b"\x20\x00\x11\x00\x55\xa1"))
    study = Study.from_dicom(tmp_path)
    assert any("4 unreadable DICOM files" in note for note in study.warnings)
    assert study.t2w.GetSize()[2] == SHAPE[0] and study.missing == ()


def test_the_choice_is_overridden_by_number_uid_folder_and_file(tmp_path):
    write_examination(tmp_path / "exam")
    write(tmp_path / "exam" / "more", noise(1, 700, 4), 6, **{**T2W, "SeriesDescription": "t2_fs"})
    write(tmp_path / "else", noise(1, 700, 5), 30, **{**T2W, "SeriesDescription": "elsewhere"})
    other = sitk.GetImageFromArray(noise(1, 700, 6).astype(np.float32))
    other.CopyInformation(Study.from_dicom(tmp_path / "exam").t2w)
    sitk.WriteImage(other, str(tmp_path / "t2w.nii.gz"))
    uid = generate_uid(entropy_srcs=["series 6"])
    cases: list[tuple[Any, int]] = [
        (6, 4),
        ("6", 4),
        (str(uid), 4),
        (tmp_path / "else", 5),
        (tmp_path / "else" / "003.dcm", 5),
    ]
    for value, seed in [*cases, (tmp_path / "t2w.nii.gz", 6)]:
        study = Study.from_dicom(tmp_path / "exam", t2w=value)
        assert np.array_equal(array(study.t2w), noise(1, 700, seed)), value
        assert "given by the user" in study.provenance["t2w"].reason
    fitted = Study.from_dicom(tmp_path / "exam", adc=4)
    assert fitted.provenance["adc"].calculated
    with pytest.raises(InputError, match='none; the series are 2 "t2_tse_tra"'):
        Study.from_dicom(tmp_path / "exam", dwi=99)


def test_a_series_whose_tags_contradict_its_given_role_is_used_with_a_warning(tmp_path):
    write_examination(tmp_path)
    write(tmp_path / "more", noise(1, 900, 3), 7, **{**T2W, "SeriesDescription": "t2_tse_tra_2"})
    study = Study.from_dicom(tmp_path, t2w=2, dwi=7)
    (note,) = [warning for warning in study.warnings if "its tags say" in warning]
    assert note.startswith('series 7 "t2_tse_tra_2" was given as the DWI, but its tags say T2W (spin echo')
    assert not [w for w in Study.from_dicom(tmp_path, adc=5).warnings if "its tags say" in w]


def test_enhanced_multi_frame_files_are_read_frame_by_frame(tmp_path):
    t2w = enhanced(noise(1, 900), 2, ["ORIGINAL", "PRIMARY", "T2", "NONE"], [0], {"EchoPulseSequence": "SPIN"})
    t2w.save_as(tmp_path / "t2.dcm", enforce_file_format=True)
    dwi = enhanced(
        noise(1, 900, 1),
        3,
        ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"],
        [50, 1400],
        {"EchoPlanarPulseSequence": "YES"},
    )
    dwi.save_as(tmp_path / "dwi.dcm", enforce_file_format=True)
    study = Study.from_dicom(tmp_path)
    assert study.provenance["dwi"].b_value == 1400 and "spin echo, TE 100" in study.provenance["t2w"].reason
    expected = (noise(1, 900) * 2 + np.arange(SHAPE[0])[:, None, None])[::-1]  # the lowest slice comes last in the file
    assert np.array_equal(array(study.t2w), expected)
    assert study.t2w.GetOrigin() == pytest.approx((0, 0, -STEP * (SHAPE[0] - 1)))


def test_file_names_and_folders_do_not_matter(tmp_path):
    write(tmp_path / "a", noise(1, 900), 2, **T2W)
    (tmp_path / "b").mkdir()
    for i, path in enumerate(sorted((tmp_path / "a").iterdir())):
        (tmp_path / "b" / f"IM{(i * 7) % 97}").write_bytes(path.read_bytes())
    first, second = (Study.from_dicom(tmp_path / name) for name in ("a", "b"))
    assert first.provenance["t2w"].sha256 == second.provenance["t2w"].sha256
    assert np.array_equal(array(first.t2w), array(second.t2w))


def test_the_real_examination_from_dicom_equals_the_one_from_files(shared_data):
    case = shared_data / "prostatex-0000"
    dicom, files = Study.from_dicom(case / "dicom"), Study.from_case(case)
    for name in ("t2w", "adc", "dwi"):
        first, second = getattr(dicom, name), getattr(files, name)
        assert np.allclose(array(first), array(second), atol=0.05)
        assert np.allclose(first.GetOrigin(), second.GetOrigin(), atol=1e-3)
    assert dicom.warnings == () and dicom.patient["age"] == 63


def test_linked_series_folders_are_followed_once(tmp_path):
    write_examination(tmp_path / "exam")
    links = tmp_path / "links"
    links.mkdir()
    (links / "exam").symlink_to(tmp_path / "exam", target_is_directory=True)
    (links / "again").symlink_to(links, target_is_directory=True)
    direct, linked = (Study.from_dicom(folder) for folder in (tmp_path / "exam", links))
    assert direct.provenance["t2w"].sha256 == linked.provenance["t2w"].sha256
    assert direct.warnings == linked.warnings


def test_the_calculated_series_of_the_real_examination_is_b_1000_by_its_tag_and_by_its_signal(shared_data):
    source = Study.from_dicom(shared_data / "prostatex-0000" / "dicom").provenance["dwi"]
    assert (source.series_number, source.b_value, source.calculated) == (8, 1000.0, True)
    assert "(0019,100c)" in source.reason and "corresponds to b = 9" in source.reason
    for b in (50, 400, 800):
        assert f"b {b} (lower b-value)" in source.reason


def test_the_fit_agrees_with_the_scanners_adc_map(shared_data):
    folder = shared_data / "prostatex-0000" / "dicom"
    scanner = read_examination(folder).images["adc"]
    fitted = read_examination(folder, {"adc": 6}).images["adc"]
    body = (array(scanner) > 500) & (array(scanner) < 2500)
    ratio = array(fitted)[body] / array(scanner)[body]
    assert np.corrcoef(array(fitted)[body], array(scanner)[body])[0, 1] > 0.97
    assert np.median(ratio) == pytest.approx(1.0, abs=0.06)


def test_a_file_that_lies_there_twice_is_read_once(tmp_path):
    write(tmp_path / "a", noise(1, 900), 2, **T2W)
    for path in sorted((tmp_path / "a").iterdir()):
        (tmp_path / f"copy-{path.name}").write_bytes(path.read_bytes())
    assert len(Study.from_dicom(tmp_path).provenance["t2w"].instance_uids) == SHAPE[0]


def test_compressed_files_are_read_too(tmp_path):
    write(tmp_path / "plain", noise(1, 900), 2, **T2W)
    (tmp_path / "packed").mkdir()
    for path in (tmp_path / "plain").iterdir():
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(tmp_path / "packed" / path.name))
        writer.SetUseCompression(True)
        writer.SetCompressor("JPEG2000")
        writer.Execute(sitk.ReadImage(str(path)))
        packed = pydicom.dcmread(tmp_path / "packed" / path.name)
        assert packed.file_meta.TransferSyntaxUID.is_compressed
        original = pydicom.dcmread(path, stop_before_pixels=True)
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            setattr(packed, keyword, original[keyword].value)
        packed.save_as(tmp_path / "packed" / path.name)
    assert np.array_equal(array(Study.from_dicom(tmp_path / "packed").t2w), noise(1, 900))
