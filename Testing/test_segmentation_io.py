"""segmentation.seg.nrrd: names, colours, codes and voxels, as 3D Slicer reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from sample_assessments import drawn_assessment, on_grid

from MedRationaleLib.assessment import Assessment
from MedRationaleLib.errors import InputError
from MedRationaleLib.segmentation_io import read_nrrd, read_segmentation, segments_of, write_segmentation

NAMES = {
    "gland": "Prostate",
    "pz": "Peripheral zone",
    "tz": "Transition zone",
    "lesion-1": "Lesion 1 (PI-RADS 4)",
    "lesion-2": "Lesion 2 (PI-RADS 5)",
}
CODES = {
    "gland": "SCT^41216001^",
    "pz": "SCT^279706003^",
    "tz": "SCT^399384005^",
    "lesion-1": "SCT^52988006^",
    "lesion-2": "SCT^52988006^",
}


@pytest.fixture(scope="module")
def assessment() -> Assessment:
    return drawn_assessment()


@pytest.fixture(scope="module")
def path(assessment: Assessment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("segmentation") / "segmentation.seg.nrrd"
    write_segmentation(file, segments_of(assessment), assessment.gland)
    return file


def test_masks_come_back_voxel_for_voxel_on_the_stored_grid(assessment: Assessment, path: Path) -> None:
    masks = read_segmentation(path)
    assert list(masks) == list(NAMES)
    for segment, expected in segments_of(assessment):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(masks[segment.id]) > 0, expected)
        np.testing.assert_allclose(masks[segment.id].GetDirection(), assessment.study.t2w.GetDirection(), atol=1e-9)
        np.testing.assert_allclose(masks[segment.id].GetOrigin(), assessment.study.t2w.GetOrigin(), atol=1e-9)


def test_overlapping_segments_lie_in_different_layers_and_the_others_share_one(path: Path) -> None:
    image = sitk.ReadImage(str(path))
    layers = {image.GetMetaData(f"Segment{i}_ID"): image.GetMetaData(f"Segment{i}_Layer") for i in range(5)}
    assert layers == {"gland": "0", "pz": "1", "tz": "1", "lesion-1": "2", "lesion-2": "2"}


def test_every_segment_has_name_colour_extent_and_snomed_code(assessment: Assessment, path: Path) -> None:
    image = sitk.ReadImage(str(path))
    for index, (segment, mask) in enumerate(segments_of(assessment)):
        fields = {
            key: image.GetMetaData(f"Segment{index}_{key}")
            for key in ("ID", "Name", "Color", "LabelValue", "Extent", "Tags")
        }
        assert fields["Name"] == NAMES[segment.id]
        assert all(0 <= float(value) <= 1 for value in fields["Color"].split())
        assert CODES[segment.id] in fields["Tags"] and fields["Tags"].count("~") == 6
        z, y, x = np.nonzero(mask)
        assert fields["Extent"] == f"{x.min()} {x.max()} {y.min()} {y.max()} {z.min()} {z.max()}"


def test_a_lesion_says_where_it_lies_and_its_category(path: Path) -> None:
    tags = sitk.ReadImage(str(path)).GetMetaData("Segment3_Tags")
    assert "~SCT^279706003^Peripheral zone of the prostate~" in tags and "MedRationale.Pirads:4|" in tags


def test_a_case_without_lesions_or_gland_still_has_its_segments(assessment: Assessment, tmp_path: Path) -> None:
    nothing = on_grid(np.zeros(assessment.study.t2w.GetSize()[::-1], np.uint8), assessment.gland)
    empty = replace(assessment, gland=nothing, pz=nothing, tz=nothing, lesions=nothing, findings=())
    file = tmp_path / "empty.seg.nrrd"
    write_segmentation(file, segments_of(empty), empty.gland)
    masks = read_segmentation(file)
    assert list(masks) == ["gland", "pz", "tz"]
    assert not any(sitk.GetArrayFromImage(mask).any() for mask in masks.values())


def test_a_damaged_file_is_one_sentence(path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.nrrd"
    damaged.write_bytes(path.read_bytes()[:400])
    with pytest.raises(InputError, match=r"damaged\.nrrd"):
        read_nrrd(damaged)


def test_pynrrd_reads_the_same_fields(path: Path) -> None:
    nrrd = pytest.importorskip("nrrd", reason="pynrrd, another reader of the format, is not installed")
    voxels, header = nrrd.read(str(path))
    assert header["Segment3_ID"] == "lesion-1" and voxels.shape[0] == 3
    assert (voxels[2] == int(header["Segment3_LabelValue"])).any()


def test_slicers_own_reader_takes_names_colours_terminology_and_geometry(assessment: Assessment, path: Path) -> None:
    slicer = pytest.importorskip("slicer", reason="slicer-core, the real MRML scene, is not installed")
    vtk = pytest.importorskip("vtk")
    if not hasattr(slicer, "vtkMRMLSegmentationStorageNode"):
        pytest.skip("the module named slicer is a stand-in without MRML storage")
    log = vtk.vtkStringOutputWindow()
    vtk.vtkOutputWindow.SetInstance(log)
    scene = slicer.vtkMRMLScene()
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    storage = slicer.vtkMRMLSegmentationStorageNode()
    scene.AddNode(storage)
    storage.SetFileName(str(path))
    assert storage.ReadData(node)
    assert not log.GetOutput()
    segmentation = node.GetSegmentation()
    assert [segmentation.GetNthSegmentID(i) for i in range(segmentation.GetNumberOfSegments())] == list(NAMES)
    for segment, mask in segments_of(assessment):
        read = segmentation.GetSegment(segment.id)
        assert read.GetName() == NAMES[segment.id]
        assert [round(c * 255) for c in read.GetColor()] == list(bytes.fromhex(segment.color[1:]))
        entry = vtk.mutable("")
        assert read.GetTag("TerminologyEntry", entry) and CODES[segment.id] in str(entry)
        labelmap = read.GetRepresentation("Binary labelmap")
        spacing = labelmap.GetSpacing()
        assert spacing == pytest.approx(assessment.study.t2w.GetSpacing())
        z, y, x = np.argwhere(mask)[0]
        assert labelmap.GetScalarComponentAsDouble(int(x), int(y), int(z), 0) == read.GetLabelValue()
