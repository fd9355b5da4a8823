"""Geometry of the crop by invariance: round trips, oblique grids, re-oriented storage, padding, missing sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import SimpleITK as sitk

from MedRationaleLib.preprocessing import CropSpec, Grid, prepare, resize, zscore

SPEC = CropSpec(size=(96, 96, 12), pixels=64)
OBLIQUE = sitk.Euler3DTransform((0, 0, 0), 0.32, -0.05, 0.04).GetMatrix()
STORAGES = ["LPS", "RPS", "LAS", "RAI", "SPL", "PSR", "ALI"]


@dataclass
class StandInStudy:
    t2w: sitk.Image
    adc: sitk.Image | None = None
    dwi: sitk.Image | None = None
    valid: dict[str, sitk.Image] = field(default_factory=dict)


def smooth_image(size=(80, 72, 15), spacing=(0.6, 0.6, 3.0), direction=OBLIQUE, seed=0) -> sitk.Image:
    noise = np.random.default_rng(seed).normal(size=size[::-1]).astype(np.float32)
    image = sitk.GetImageFromArray(noise)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    image.SetOrigin((-21.3, 13.7, -40.9))
    return sitk.SmoothingRecursiveGaussian(image, (2.0, 2.0, 4.0)) * 1000 + 300


def ones(image: sitk.Image) -> sitk.Image:
    return sitk.Cast(image * 0 + 1, sitk.sitkUInt8)


def dice(a, b) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("storage", STORAGES)
def test_points_go_to_indices_and_back_within_a_hundredth_of_a_millimetre(storage):
    grid = Grid.for_image(sitk.DICOMOrient(smooth_image(), storage), SPEC)
    points = np.random.default_rng(1).uniform(-300, 300, (50, 3))
    assert np.abs(grid.index_to_point(grid.point_to_index(points)) - points).max() < 0.01


def test_the_grid_agrees_with_simpleitk_about_where_a_voxel_is():
    grid = Grid.for_image(smooth_image(), SPEC)
    image = grid.image(np.zeros((12, 96, 96), np.float32))
    np.testing.assert_allclose(grid.index_to_point((3, 50, 7)), image.TransformIndexToPhysicalPoint((3, 50, 7)))
    corner = grid.index_to_point((-0.5, -0.5, 0))
    np.testing.assert_allclose(grid.resized(64, 32).index_to_point((-0.5, -0.5, 0)), corner)


def test_axes_run_to_left_posterior_and_superior_and_keep_the_tilt_of_the_t2w():
    grid = Grid.for_image(sitk.DICOMOrient(smooth_image(), "RAI"), SPEC)
    np.testing.assert_allclose(grid.direction, OBLIQUE, atol=1e-9)
    assert (np.diag(np.reshape(grid.direction, (3, 3))) > 0.9).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_reoriented_storage_gives_the_same_tensor(storage):
    t2w, adc = smooth_image(), smooth_image(seed=1)
    edge = sitk.GetArrayFromImage(ones(t2w))
    edge[:, :20] = 0
    valid = sitk.GetImageFromArray(edge)
    valid.CopyInformation(t2w)
    plain = prepare(StandInStudy(t2w, adc, None, {"adc": valid}), SPEC)
    turned = [sitk.DICOMOrient(i, storage) for i in (t2w, adc, valid)]
    other = prepare(StandInStudy(turned[0], turned[1], None, {"adc": turned[2]}), SPEC)
    np.testing.assert_allclose(other.images, plain.images, atol=2e-3)
    assert (other.valid == plain.valid).all()
    assert other.grid.size == plain.grid.size
    np.testing.assert_allclose(other.grid.origin, plain.grid.origin, atol=1e-6)


@pytest.mark.parametrize("axes", [(True, False, False), (False, True, True), (True, True, True)])
def test_flipped_storage_gives_the_same_tensor(axes):
    t2w = smooth_image()
    flipped = sitk.Flip(t2w, axes)
    assert flipped.GetDirection() != t2w.GetDirection()
    np.testing.assert_allclose(
        prepare(StandInStudy(flipped), SPEC).images, prepare(StandInStudy(t2w), SPEC).images, atol=2e-3
    )


def test_storage_on_a_rotated_grid_gives_the_same_picture_in_space():
    t2w = smooth_image(size=(140, 140, 40), spacing=(0.6, 0.6, 1.5))
    rotated = sitk.Image((180, 180, 50), sitk.sitkFloat32)
    rotated.SetSpacing((0.5, 0.5, 1.5))
    rotated.SetDirection(sitk.Euler3DTransform((0, 0, 0), 0.2, 0.0, 0.15).GetMatrix())
    rotated.SetOrigin(t2w.GetOrigin())
    rotated = sitk.Resample(t2w, rotated, sitk.Transform(), sitk.sitkBSpline, 300.0)
    center = t2w.TransformContinuousIndexToPhysicalPoint((70, 70, 20))
    spec = CropSpec(size=(60, 60, 5), spacing_mm=(0.5, 0.5, 1.5), pixels=60)
    a, b = (prepare(StandInStudy(i), spec, center) for i in (t2w, rotated))
    back = [sitk.GetArrayFromImage(p.grid.to_reference(p.images[:, 0], t2w, outside=np.nan)) for p in (a, b)]
    both = np.isfinite(back[0]) & np.isfinite(back[1])
    assert both.sum() > 1000
    assert np.corrcoef(back[0][both], back[1][both])[0, 1] > 0.98


def test_an_image_at_the_models_spacing_is_copied_and_not_blurred():
    t2w = smooth_image(size=(96, 96, 19), spacing=(0.5, 0.5, 3.0))
    grid = Grid.for_image(t2w, CropSpec(size=(96, 96, 24)))
    stored = sitk.GetArrayFromImage(t2w)
    np.testing.assert_allclose(grid.from_reference(t2w)[2:21], stored, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(
        sitk.GetArrayFromImage(grid.to_reference(grid.from_reference(t2w), t2w)), stored, rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("storage", ["LPS", "RAI", "PSR"])
def test_the_grid_is_the_same_however_finely_the_field_of_view_is_stored(storage):
    coarse = smooth_image()
    size, spacing = (160, 96, 45), (0.3, 0.45, 1.0)
    corner = np.array(coarse.TransformContinuousIndexToPhysicalPoint([-0.5] * 3))
    fine = sitk.Image(size, sitk.sitkFloat32)
    fine.SetSpacing(spacing)
    fine.SetDirection(OBLIQUE)
    fine.SetOrigin((corner + np.array(OBLIQUE).reshape(3, 3) @ (np.array(spacing) / 2)).tolist())
    first, second = (Grid.for_image(sitk.DICOMOrient(image, storage), SPEC) for image in (coarse, fine))
    np.testing.assert_allclose(first.origin, second.origin, atol=1e-6)
    assert first.spacing == second.spacing


def test_a_grid_takes_the_lattice_of_another_along_the_axes_where_that_is_coarser():
    t2w = sitk.DICOMOrient(smooth_image(spacing=(0.3, 0.6, 4.5)), "RAI")
    grid, stored = Grid.for_image(t2w, SPEC), Grid.of(t2w)
    both = grid.coarsened(stored)
    assert both.spacing == pytest.approx((0.5, 0.6, 4.5))
    assert both.size == (grid.size[0], stored.size[1], stored.size[2])
    np.testing.assert_allclose(grid.point_to_index(both.origin)[0], 0, atol=1e-9)
    np.testing.assert_allclose(stored.point_to_index(both.origin)[1:], 0, atol=1e-9)
    assert grid.coarsened(grid) == grid


def test_a_field_of_view_smaller_than_the_crop_is_padded_and_marked_invalid():
    t2w = smooth_image(size=(40, 40, 5), spacing=(0.5, 0.5, 3.0), direction=np.eye(3).ravel().tolist())
    result = prepare(StandInStudy(t2w), CropSpec(size=(96, 96, 12), pixels=96))
    assert result.valid[:, 0].sum() == 40 * 40 * 5
    assert (result.images[~result.valid] == 0).all()
    inside = result.images[:, 0][result.valid[:, 0]].reshape(5, -1)
    np.testing.assert_allclose(inside.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(inside.std(axis=1), 1, atol=1e-3)


def test_the_crop_follows_a_given_centre_by_whole_voxels():
    t2w = smooth_image()
    wanted = np.array(t2w.TransformContinuousIndexToPhysicalPoint((60.3, 20.1, 4.2)))
    base, moved = Grid.for_image(t2w, SPEC), Grid.for_image(t2w, SPEC, wanted)
    steps = base.point_to_index(moved.origin)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)
    offset = moved.point_to_index(wanted) - (np.array(SPEC.size) - 1) / 2
    assert (np.abs(offset) <= 0.5 + 1e-6).all()


@pytest.mark.parametrize("missing", ["adc", "dwi"])
def test_a_missing_sequence_is_a_channel_of_zeros_that_is_marked_absent(missing):
    t2w = smooth_image()
    given = {"adc": smooth_image(seed=1), "dwi": smooth_image(seed=2)}
    del given[missing]
    result = prepare(StandInStudy(t2w, **given, valid={k: ones(t2w) for k in given}), SPEC)
    channel = ("t2w", "adc", "dwi").index(missing)
    assert not result.present[channel] and result.present.sum() == 2
    assert not result.images[:, channel].any() and not result.valid[:, channel].any()
    assert result.images.dtype == np.float32 and result.images.shape == (12, 3, 64, 64)


def test_values_next_to_the_edge_of_a_sequence_are_not_mixed_with_padding():
    t2w = smooth_image()
    covered = np.zeros(sitk.GetArrayFromImage(t2w).shape, np.uint8)
    covered[:, 17:50, 13:60] = 1
    valid = sitk.GetImageFromArray(covered)
    valid.CopyInformation(t2w)
    ramp = np.broadcast_to(np.arange(80, dtype=np.float32) + 1000, covered.shape) * covered
    adc = sitk.GetImageFromArray(np.ascontiguousarray(ramp))
    adc.CopyInformation(t2w)
    result = prepare(StandInStudy(t2w, adc, None, {"adc": valid}), SPEC)
    assert (
        np.abs(result.images[:, 1]).max() < 2
    )  # a ramp's z-score ends at 1.73; mixed with zeros it would be far below


def test_zscore_ignores_invalid_pixels_and_leaves_a_constant_plane_at_zero():
    images = np.random.default_rng(0).normal(50, 7, (2, 3, 16, 16)).astype(np.float32)
    images[0, 1] = 12.5
    valid = np.ones(images.shape, bool)
    valid[:, :, :4] = False
    images[~valid] = 1e6
    result = zscore(images, valid)
    assert not result[~valid].any() and not result[0, 1].any()
    plane = images[1, 2][valid[1, 2]].astype(float)
    np.testing.assert_allclose(result[1, 2][valid[1, 2]], (plane - plane.mean()) / plane.std(), atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [((384, 384), (256, 256)), ((64, 48), (256, 96)), ((50, 70), (50, 70))])
def test_resizing_agrees_with_torch_antialiased_bilinear(old, new):
    torch = pytest.importorskip("torch")
    array = np.random.default_rng(0).normal(size=(2, *old)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(array)[None], size=new, mode="bilinear", antialias=True, align_corners=False
    )[0]
    np.testing.assert_allclose(resize(array, *new), theirs.numpy(), atol=2e-5)


def test_thin_slices_are_averaged_and_not_skipped():
    noise = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(36, 96, 96)).astype(np.float32))
    noise.SetSpacing((0.5, 0.5, 1.0))
    grid = Grid.for_image(noise, SPEC)
    skipped = zscore(grid.from_reference(noise, pixels=64), np.ones((12, 64, 64), bool))
    prepared = prepare(StandInStudy(noise), SPEC).images[:, 0]
    stored = sitk.GetArrayFromImage(noise)
    slabs = resize(np.stack([stored[3 * i : 3 * i + 3].mean(0) for i in range(12)]), 64, 64)
    slabs = zscore(slabs, np.ones(slabs.shape, bool))
    correlation = [np.corrcoef(x[1:-1].ravel(), slabs[1:-1].ravel())[0, 1] for x in (skipped, prepared)]
    assert correlation[1] > 0.9 > correlation[0]


def test_an_expert_mask_goes_to_the_grid_and_back(shared_data):
    case = shared_data / "prostatex-0000"
    t2w, gland = (sitk.ReadImage(str(case / f"{name}.nii.gz")) for name in ("t2w", "gland"))
    grid = Grid.for_image(t2w, CropSpec())
    truth = sitk.GetArrayFromImage(gland) > 0
    soft = grid.from_reference(gland, pixels=256)
    assert dice(sitk.GetArrayFromImage(grid.to_reference(soft, t2w)) > 0.5, truth) > 0.97
    labels = grid.from_reference(gland, nearest=True, pixels=256)
    back = grid.to_reference(labels, t2w, nearest=True)
    assert back.GetPixelID() == gland.GetPixelID()
    assert dice(sitk.GetArrayFromImage(back) > 0, truth) > 0.97


def test_a_real_examination_without_adc_on_other_spacing_goes_to_the_grid_and_back(shared_data):
    case = shared_data / "prostate158-001"
    t2w, gland = (sitk.ReadImage(str(case / f"{name}.nii.gz")) for name in ("t2w", "gland"))
    result = prepare(StandInStudy(t2w), CropSpec())
    assert result.images.shape == (24, 3, 256, 256) and result.present.tolist() == [True, False, False]
    soft = result.grid.from_reference(gland, pixels=256)
    assert (
        dice(sitk.GetArrayFromImage(result.grid.to_reference(soft, t2w)) > 0.5, sitk.GetArrayFromImage(gland) > 0)
        > 0.97
    )
