"""Measurements against ellipsoids of known size and place, in several storages, and against expert masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import SimpleITK as sitk

from MedRationaleLib.findings import measure_gland, measure_lesions
from MedRationaleLib.postprocessing import (
    PostprocessingConfig,
    clean_gland,
    clean_masks,
    label_lesions,
    lesion_candidates,
    split_zones,
)
from MedRationaleLib.preprocessing import Grid
from MedRationaleLib.sectors import LEVELS, GlandFrame, Sector

CENTER = np.array([12.0, -30.0, 45.0])
GLAND, TZ_SHIFT, TZ_AXES = (25.0, 18.0, 21.0), (0.0, -4.0, 0.0), (17.0, 11.0, 17.0)
TILT = sitk.Euler3DTransform((0, 0, 0), 0.3, 0.0, 0.0).GetMatrix()
STORAGES = ["LPS", "RAI", "LAS", "SPL", "PSR"]
IDENTITY = tuple(np.eye(3).ravel())


@dataclass
class Phantom:
    """Ellipsoids given in the grid's own axes relative to CENTER, on 0.5 x 0.5 x 3 mm."""

    direction: tuple[float, ...] = IDENTITY
    storage: str = "LPS"

    def __post_init__(self) -> None:
        size, spacing = (160, 140, 24), (0.5, 0.5, 3.0)
        half = (np.array(size) - 1) / 2 * spacing
        origin = CENTER - np.reshape(self.direction, (3, 3)) @ half
        self.grid = Grid(origin=tuple(origin), spacing=spacing, direction=self.direction, size=size)
        z, y, x = np.meshgrid(*(np.arange(n) for n in size[::-1]), indexing="ij")
        self.local = np.stack([x, y, z], axis=-1) * spacing - half

    def ellipsoid(self, center, axes) -> np.ndarray:
        return np.square((self.local - center) / axes).sum(-1) <= 1

    def store(self, array) -> sitk.Image:
        return sitk.DICOMOrient(self.grid.image(array), self.storage)

    def point(self, local) -> np.ndarray:
        return CENTER + np.reshape(self.direction, (3, 3)) @ np.asarray(local, float)

    @property
    def gland(self) -> np.ndarray:
        return self.ellipsoid((0, 0, 0), GLAND)

    @property
    def tz(self) -> np.ndarray:
        return self.ellipsoid(TZ_SHIFT, TZ_AXES) & self.gland

    def measure(self, lesion: np.ndarray, config: PostprocessingConfig | None = None):
        lesions, *anatomy = (
            self.store(i) for i in (lesion.astype(np.uint8), self.gland, self.gland & ~self.tz, self.tz)
        )
        return measure_lesions(lesions, [1.0], *anatomy, config)[0]

    def candidates(self, probability: np.ndarray, config: PostprocessingConfig, **sequences: np.ndarray):
        seen = {name: (values, np.ones(values.shape, bool)) for name, values in sequences.items()}
        spacing = self.grid.spacing[::-1]
        return lesion_candidates(probability, self.gland & ~self.tz, self.tz, seen, spacing, config)

    def labels(self, probability: np.ndarray, config: PostprocessingConfig | None = None, **sequences: np.ndarray):
        config = config or PostprocessingConfig()
        return label_lesions(self.candidates(probability, config, **sequences), self.gland.shape, config)


def soft(phantom: Phantom, mask: np.ndarray, peak: float = 1.0) -> np.ndarray:
    """A probability that is `peak` inside and falls off over two millimetres."""
    image = sitk.SmoothingRecursiveGaussian(phantom.grid.image(mask.astype(np.float32)), (0.8, 0.8, 0.8))
    return sitk.GetArrayFromImage(image).clip(0, 1) * peak


@pytest.mark.parametrize("direction", [IDENTITY, TILT])
@pytest.mark.parametrize("storage", STORAGES)
def test_gland_dimensions_are_those_of_the_ellipsoid_in_any_storage(storage, direction):
    phantom = Phantom(direction, storage)
    result = measure_gland(phantom.store(phantom.gland))
    assert (result.width_mm, result.height_mm) == pytest.approx((50, 36), abs=1.0)
    assert result.length_mm == pytest.approx(42, abs=3.0)
    true_ml = 4 / 3 * np.pi * np.prod(GLAND) / 1000
    assert result.volume_ml == pytest.approx(true_ml, rel=0.02)
    assert result.ellipsoid_ml == pytest.approx(0.52 * result.length_mm * result.width_mm * result.height_mm / 1000)
    np.testing.assert_allclose(result.center_mm, CENTER, atol=0.1)


def test_a_gland_stored_on_a_grid_turned_in_plane_keeps_its_width_and_height():
    turned = Phantom(sitk.Euler3DTransform((0, 0, 0), 0, 0, np.pi / 6).GetMatrix())
    rotation = np.reshape(turned.direction, (3, 3))
    gland = np.square(turned.local @ rotation.T / GLAND).sum(-1) <= 1
    result = measure_gland(turned.store(gland))
    assert (result.width_mm, result.height_mm) == pytest.approx((50, 36), abs=1.0)


@pytest.mark.parametrize("seed", range(4))
def test_a_gland_and_its_zones_are_cleaned_alike_wherever_they_lie_in_the_field_of_view(seed):
    """Pieces, holes and islands as they come, and the same with more field of view around."""
    rng = np.random.default_rng(seed)
    inner = rng.random((6, 20, 20)).cumsum(1).cumsum(2) % 1.0  # patches of all sizes
    config, spacing, around = PostprocessingConfig(gland_threshold=0.4), (3.0, 1.0, 1.0), ((0, 0), (4, 9), (7, 3))
    framed = np.pad(inner, ((0, 0), (1, 1), (1, 1)))  # nothing touches the edge, where a hole would be open
    gland, wide = (clean_gland(p, spacing, config) for p in (framed, np.pad(framed, around)))
    assert 0 < gland.sum() < framed.size and np.array_equal(np.pad(gland, around), wide)
    pz, tz = rng.random((2, *framed.shape))
    zones = split_zones(pz, tz, gland, spacing, config)
    for narrow, far in zip(
        zones, split_zones(np.pad(pz, around), np.pad(tz, around), wide, spacing, config), strict=True
    ):
        assert narrow.any() and np.array_equal(np.pad(narrow, around), far)


def test_no_gland_is_measured_as_none():
    assert measure_gland(Phantom().store(np.zeros((24, 140, 160), bool))) is None


@pytest.mark.parametrize("direction", [IDENTITY, TILT])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_lesion_has_its_size_volume_centre_and_zone_in_any_storage(storage, direction):
    phantom = Phantom(direction, storage)
    result = phantom.measure(phantom.ellipsoid((-7, 13, 0), (6, 3, 6)))
    assert result.axial_mm == pytest.approx(12, abs=0.6)
    assert result.size_mm == result.axial_mm and result.size_plane == "axial"
    assert result.volume_ml == pytest.approx(4 / 3 * np.pi * 6 * 3 * 6 / 1000, rel=0.05)
    np.testing.assert_allclose(result.center_mm, phantom.point((-7, 13, 0)), atol=0.25)
    assert result.zone == "PZ" and result.zone_fraction > 0.9
    assert result.sector.text == "right peripheral zone posteromedial mid gland"
    assert sum(share for _, share in result.sectors) == pytest.approx(1)


def test_all_numbers_are_the_same_in_every_storage():
    results = []
    for storage in STORAGES:
        phantom = Phantom(TILT, storage)
        results.append(phantom.measure(phantom.ellipsoid((9, 12, -6), (5, 4, 8))))
    for other in results[1:]:
        np.testing.assert_allclose(other.center_mm, results[0].center_mm, atol=1e-6)
        np.testing.assert_allclose(
            (other.size_mm, other.greatest_mm, other.volume_ml),
            (results[0].size_mm, results[0].greatest_mm, results[0].volume_ml),
        )
        assert other.sectors == results[0].sectors


def test_a_diagonal_lesion_is_measured_along_its_own_axis():
    phantom = Phantom()
    turn = np.array([[1, 1], [-1, 1]]) / np.sqrt(2)
    local = phantom.local[..., :2] @ turn.T / (9, 3)
    lesion = (np.square(local).sum(-1) <= 1) & (np.abs(phantom.local[..., 2]) < 3)
    assert phantom.measure(lesion).axial_mm == pytest.approx(18, abs=0.6)


def test_a_lesion_longer_across_the_slices_is_measured_there():
    phantom = Phantom()
    result = phantom.measure(phantom.ellipsoid((0, 13, 1.5), (4, 3, 12)))
    assert result.axial_mm == pytest.approx(8, abs=0.6)
    assert result.size_plane == "other" and result.size_mm == pytest.approx(24, abs=3)


def test_a_ball_is_measured_in_the_axial_plane():
    phantom = Phantom()
    result = phantom.measure(phantom.ellipsoid((0, 8, 0), (6, 6, 6)))
    assert result.size_plane == "axial" and result.size_mm == pytest.approx(12, abs=0.6)


def test_a_single_voxel_and_a_single_row_have_a_size():
    phantom = Phantom()
    lesion = np.zeros((24, 140, 160), bool)
    lesion[12, 95, 80] = True
    assert phantom.measure(lesion).size_mm == pytest.approx(0.5)
    lesion[12, 95, 80:90] = True
    assert phantom.measure(lesion).size_mm == pytest.approx(5.0)


def test_the_centre_of_a_bent_lesion_lies_in_the_lesion():
    phantom = Phantom()
    ring = phantom.ellipsoid((0, 0, 0), (22, 15, 4)) & ~phantom.ellipsoid((0, 0, 0), (18, 12, 100))
    image = phantom.store(ring)
    index = image.TransformPhysicalPointToIndex(phantom.measure(ring).center_mm)
    assert image[index] == 1


@pytest.mark.parametrize(
    ("local", "sector"),
    [
        ((-7, 13, 0), ("right", "PZ", "posteromedial", "mid")),
        ((7, 13, 0), ("left", "PZ", "posteromedial", "mid")),
        ((19, 7, 0), ("left", "PZ", "posterolateral", "mid")),
        ((-21, -4, 0), ("right", "PZ", "anterior", "mid")),
        ((8, -10, 0), ("left", "TZ", "anterior", "mid")),
        ((-8, 2, 0), ("right", "TZ", "posterior", "mid")),
        ((-5, 9, 14), ("right", "PZ", "posteromedial", "base")),
        ((5, 9, -14), ("left", "PZ", "posteromedial", "apex")),
        ((6, -8, 10), ("left", "TZ", "anterior", "base")),
    ],
)
@pytest.mark.parametrize("direction", [IDENTITY, TILT])
@pytest.mark.parametrize("storage", ["LPS", "RAI"])
def test_sectors_are_named_from_the_patients_side(local, sector, direction, storage):
    phantom = Phantom(direction, storage)
    frame = GlandFrame.of(phantom.store(phantom.gland), phantom.store(phantom.tz))
    found = frame.sector(phantom.point(local), sector[1])
    assert (found.side, found.zone, found.part, found.level) == sector


def test_the_midline_is_the_glands_and_not_the_patients():
    phantom = Phantom()
    assert phantom.point((-4, 0, 0))[0] > 0  # left of the patient's origin, right of the gland's midline
    assert phantom.measure(phantom.ellipsoid((-6, 13, 0), (3, 3, 6))).sector.side == "right"


def test_every_sector_has_its_code_in_cid_6304():
    pytest.importorskip("pydicom")
    sectors = [
        Sector(side=side, zone=zone, part=part, level=level)
        for side in ("right", "left")
        for zone, parts in (("PZ", ("anterior", "posteromedial", "posterolateral")), ("TZ", ("anterior", "posterior")))
        for part in parts
        for level in LEVELS
    ]
    codes = {s.code for s in sectors}
    assert len(codes) == len(sectors) == 30
    for sector in sectors:
        assert sector.code[1:] == ("SCT", sector.meaning)
    assert Sector(side="right", zone="PZ", part="posteromedial", level="mid").code[0] == "716923005"


def test_extension_is_measured_outside_the_gland_only():
    phantom = Phantom()
    confined = phantom.measure(phantom.ellipsoid((0, 12, 0), (4, 3, 5))).extension
    assert (confined.extent_mm, confined.volume_ml, confined.present) == (0, 0, False)
    lesion = phantom.ellipsoid((0, 17, 0), (8, 7, 8))
    beyond = phantom.measure(lesion).extension
    assert beyond.extent_mm == pytest.approx(6, abs=0.7) and beyond.present
    assert beyond.volume_ml == pytest.approx((lesion & ~phantom.gland).sum() * 0.75e-3)
    assert not phantom.measure(lesion, PostprocessingConfig(epe_extent_mm=9)).extension.present


@pytest.mark.parametrize("storage", STORAGES)
def test_clean_masks_are_one_gland_whose_every_voxel_has_one_zone(storage):
    phantom = Phantom(TILT, storage)
    stray = phantom.ellipsoid((0, 29, 0), (6, 4, 6))
    bridge = phantom.ellipsoid((0, 21, 0), (0.8, 6, 2))
    hole = phantom.ellipsoid((0, 0, 0), (3, 3, 3))
    island = phantom.ellipsoid((0, -4, 3), (1, 1, 1))
    gland = (phantom.gland | stray | bridge) & ~hole
    pz = phantom.gland & ~phantom.tz | island
    arrays = {"gland": gland, "pz": pz, "tz": phantom.tz & ~island, "lesion": np.zeros_like(gland)}
    masks = clean_masks({name: phantom.store(a.astype(np.float32)) for name, a in arrays.items()})
    assert masks.gland.GetDirection() == phantom.store(gland).GetDirection()
    found, found_pz, found_tz = (
        sitk.GetArrayFromImage(sitk.DICOMOrient(i, "LPS")) > 0 for i in (masks.gland, masks.pz, masks.tz)
    )
    assert not (found & stray).any() and found[hole].all()
    assert 2 * (found & phantom.gland).sum() / (found.sum() + phantom.gland.sum()) > 0.98
    assert not (found_pz & found_tz).any() and ((found_pz | found_tz) == found).all()
    assert found_tz[island].all()


def test_each_slice_keeps_one_piece_of_the_gland():
    """A second piece that hangs on through a neighbouring slice, as where the outline ran into the rectal wall."""
    phantom = Phantom()
    arm = phantom.ellipsoid((0, 20, 3), (5, 10, 2.9))
    island = phantom.ellipsoid((0, 24, 6), (5, 4, 2.9))
    low = phantom.store(np.zeros_like(arm, np.float32))
    gland = phantom.store((phantom.gland | arm | island).astype(np.float32))
    found = sitk.GetArrayFromImage(clean_masks({"gland": gland, "pz": low, "tz": low, "lesion": low}).gland) > 0
    beside = island & ~arm.any((1, 2))[:, None, None]
    assert beside.any() and not (found & beside).any() and (found & arm).any()
    assert (found & phantom.gland).sum() > 0.99 * phantom.gland.sum()


def test_nothing_above_the_threshold_gives_empty_masks():
    phantom = Phantom()
    low = phantom.store(np.full((24, 140, 160), 0.2, np.float32))
    masks = clean_masks(dict.fromkeys(("gland", "pz", "tz", "lesion"), low))
    assert not any(sitk.GetArrayFromImage(i).any() for i in (masks.gland, masks.pz, masks.tz, masks.lesions))
    assert measure_lesions(masks.lesions, masks.likelihood, masks.gland, masks.pz, masks.tz) == ()


def test_candidates_are_ordered_by_likelihood_and_kept_only_where_they_lie_in_the_gland():
    phantom = Phantom(TILT)
    strong, weak = phantom.ellipsoid((-8, 13, 0), (4, 3, 6)), phantom.ellipsoid((9, -5, 3), (5, 5, 6))
    outside, faint = phantom.ellipsoid((0, 23, 0), (5, 4, 6)), phantom.ellipsoid((0, 0, -10), (4, 4, 6))
    speck = phantom.ellipsoid((0, 8, 9), (1, 1, 1))
    probability = np.maximum.reduce([
        soft(phantom, strong, 0.95), soft(phantom, weak, 0.7), soft(phantom, outside, 0.99), soft(phantom, faint, 0.4),
        0.9 * speck,
    ])  # fmt: skip
    found, likelihood = phantom.labels(probability)
    assert found.dtype == np.uint8 and found.max() == 2
    assert likelihood == pytest.approx([probability[found == label].max() for label in (1, 2)])
    for label, truth in ((1, strong), (2, weak)):
        assert 2 * (truth & (found == label)).sum() / (truth.sum() + (found == label).sum()) > 0.9


def test_a_candidate_ends_where_probability_falls_under_half_its_peak():
    phantom = Phantom()
    core, halo = phantom.ellipsoid((0, 8, 0), (4, 4, 5)), phantom.ellipsoid((0, 6, 0), (12, 8, 12))
    probability = np.where(core, 0.9, np.where(halo, 0.35, 0)).astype(np.float32)
    for fraction, extent in ((0.5, core), (0.3, core | halo)):
        (candidate,) = phantom.candidates(probability, PostprocessingConfig(lesion_fraction_of_peak=fraction))
        assert (candidate.mask == extent).all()


def test_no_more_candidates_than_configured_are_kept():
    phantom = Phantom()
    spots = [phantom.ellipsoid((x, 0, z), (3, 3, 4)) for x in (-12, 0, 12) for z in (-9, 9)]
    probability = np.maximum.reduce([(0.6 + 0.05 * i) * s for i, s in enumerate(spots)]).astype(np.float32)
    config = PostprocessingConfig()
    for maximum in (config.lesion_maximum, 2):
        found, likelihood = phantom.labels(probability, replace(config, lesion_maximum=maximum))
        assert found.max() == len(likelihood) == maximum and (found[spots[-1]] == 1).all()


def test_a_candidates_diffusion_is_measured_against_the_rest_of_its_zone():
    phantom = Phantom()
    spot, other = phantom.ellipsoid((-8, 14, 0), (4, 3, 6)), phantom.ellipsoid((8, 14, 0), (4, 3, 6))
    probability = np.where(spot | other, 0.8, 0).astype(np.float32)
    dwi = np.where(spot, 30.0, np.where(other, 90.0, np.where(phantom.tz, 50.0, 10.0)))
    unseen = np.full_like(dwi, np.nan)
    config = PostprocessingConfig()
    spacing = phantom.grid.spacing[::-1]
    seen = {"dwi": (dwi, np.ones(dwi.shape, bool)), "adc": (unseen, np.zeros(dwi.shape, bool))}
    found = lesion_candidates(probability, phantom.gland & ~phantom.tz, phantom.tz, seen, spacing, config)
    by_place = {bool(c.mask[spot].any()): c for c in found}
    assert {c.seen_on for c in found} == {"mask+dwi"} and len(found) == 2
    assert np.exp(by_place[True].features["dwi"]) == pytest.approx(3)
    assert np.exp(by_place[False].features["dwi"]) == pytest.approx(9)
    assert by_place[True].features["peak"] == pytest.approx(np.log(4)) and by_place[True].features["tz"] == 0
    assert np.exp(by_place[True].features["volume"]) == pytest.approx(spot.sum() * np.prod(spacing) / 1000)


def test_likelihood_is_the_logistic_regression_for_what_was_seen_and_decides_what_is_shown():
    phantom = Phantom()
    dark, bright = phantom.ellipsoid((-8, 14, 0), (4, 3, 6)), phantom.ellipsoid((8, 14, 0), (4, 3, 6))
    probability = np.where(dark, 0.9, np.where(bright, 0.6, 0)).astype(np.float32)
    dwi = np.where(dark, 5.0, np.where(bright, 20.0, 10.0))
    weights = {"intercept": -1.0, "peak": 0.5, "dwi": 2.0}
    config = PostprocessingConfig(lesion_likelihood=0.3, likelihood={"mask+dwi": weights})
    labels, likelihood = phantom.labels(probability, config, dwi=dwi)
    expected = 1 / (1 + np.exp(1 - 0.5 * np.log(0.6 / 0.4) - 2 * np.log(2)))
    assert likelihood == pytest.approx([expected], rel=1e-4) and (labels[bright] == 1).all() and not labels[dark].any()
    labels, likelihood = phantom.labels(probability, config)
    assert likelihood == pytest.approx([0.9, 0.6]) and (labels[dark] == 1).all()


@pytest.mark.parametrize("storage", ["LPS", "RAI"])
def test_candidates_below_the_threshold_are_kept_apart_with_their_place(storage):
    phantom = Phantom(storage=storage)
    shown, likelier, other = (phantom.ellipsoid(c, (4, 3, 6)) for c in ((-8, 14, 0), (8, 14, 0), (0, -6, 3)))
    probability = np.where(shown, 0.9, np.where(likelier, 0.45, np.where(other, 0.4, 0))).astype(np.float32)
    maps = {
        "gland": phantom.gland, "pz": phantom.gland & ~phantom.tz, "tz": phantom.tz, "lesion": probability,
    }  # fmt: skip
    masks = clean_masks({n: phantom.store(m.astype(np.float32)) for n, m in maps.items()}, PostprocessingConfig())
    assert masks.likelihood == pytest.approx([0.9])
    assert [c.likelihood for c in masks.not_shown] == pytest.approx([0.45, 0.4], abs=1e-3)
    assert [c.zone for c in masks.not_shown] == ["PZ", "TZ"]
    np.testing.assert_allclose(masks.not_shown[0].center_mm, phantom.point((8, 14, 0)), atol=0.5)
    assert masks.not_shown[0].volume_ml == pytest.approx(
        likelier.sum() * np.prod(phantom.grid.spacing) / 1000, abs=1e-3
    )
    assert masks.on(phantom.store(phantom.gland.astype(np.uint8))).not_shown == masks.not_shown


def test_the_expert_masks_of_a_real_case_measure_as_described(shared_data):
    gland, zones, lesion = (
        sitk.ReadImage(str(shared_data / "prostatex-0000" / f"{name}.nii.gz")) for name in ("gland", "zones", "lesion")
    )
    result = measure_gland(gland)
    assert result.volume_ml == pytest.approx(44.3, abs=0.1)
    assert result.ellipsoid_ml == pytest.approx(result.volume_ml, rel=0.1)
    (found,) = measure_lesions(lesion > 0, [1.0], gland, zones == 1, zones == 2)
    assert found.volume_ml == pytest.approx(0.31, abs=0.005)
    assert found.zone == "PZ" and found.in_gland_fraction == 1 and not found.extension.present
    assert found.sector.text == "right peripheral zone posteromedial mid gland"
    assert 7 < found.size_mm < 15
    assert (lesion > 0)[(lesion).TransformPhysicalPointToIndex(found.center_mm)] == 1
