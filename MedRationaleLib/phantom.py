"""A synthetic examination on disk, as an archive would give it: three oblique files on two grids, and the truth.

It needs no data and is made by the renderer that made the training set, so it shows that the programme runs, not how
well it reads patients. Its files say in their headers that they are synthetic (study.SYNTHETIC_FIELD).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from MedRationaleLib import __version__
from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.files import GENERATOR, MANIFEST, staged_folder
from MedRationaleLib.segmentation_io import like
from MedRationaleLib.serialization import to_json
from MedRationaleLib.study import ADC_P99, B_VALUE_FIELD, SYNTHETIC_FIELD
from MedRationaleLib.synthesis import SyntheticExam, phantom_anatomy, synthesize
from MedRationaleLib.synthesis.fields import PIXEL_MM, SLICE_MM

log = logging.getLogger(__name__)

STREAM = 13
"""First word of every seed; chosen so that the default phantom is found at the first attempt."""
TILT_DEG = (11.0, -2.0, 1.5)
"""Rotation about the right-left, front-back and foot-head axis: axial slices at right angles to the rectal wall."""
CENTRE_MM = (4.2, -17.6, 23.9)
"""Centre of the T2W, LPS."""
T2W_SPACING_MM = (0.5, 0.5, SLICE_MM)
"""As scanners reconstruct it: finer than what was drawn, over the same field of view."""
DIFFUSION_SPACING_MM = (2.0, 2.0, SLICE_MM)
DIFFUSION_SIZE = (86, 80, 22)
DIFFUSION_SHIFT_MM = (1.3, -2.2, 0.0)
"""Of the centre, along the slices' own axes."""
LESION_ML = (0.4, 12.0)
"""Size of a lesion that is easily seen and is still one."""

README = """SYNTHETIC EXAMINATION - NOT A PATIENT

medrationale phantom, version {version}, seed {seed}. A computer drew these images; no patient was imaged.

{name}_t2w.mha, {name}_adc.mha, {name}_hbv.mha
    T2W, ADC (1e-6 mm^2/s) and DWI (b = {b_value} s/mm^2), oblique, the latter two on a coarser grid of their own.
truth/zones.mha       0 background, 1 peripheral zone, 2 transition zone, on the T2W grid
truth/lesions.mha     0, or the label of a lesion (PI-RADS 3 and up)
truth/regions.mha     0, or the label of a lesion or of a mimic that is none
truth/rationale.json  of each label the answers to the questions of the decision tree, and the scores

Read it with:  medrationale predict --case THIS_FOLDER --out REPORT_FOLDER
"""


@dataclass(frozen=True, kw_only=True)
class PhantomPaths:
    """What `write_phantom` wrote."""

    folder: Path
    t2w: Path
    adc: Path
    dwi: Path
    truth: Path
    """Folder."""


def write_phantom(folder: str | Path, seed: int = 0) -> PhantomPaths:
    """Write the phantom of that seed, or nothing; the same seed gives the same voxels.

    Raises InputError where `folder` cannot be written, or holds foreign files of these names (see files.staged_folder).
    """
    folder, name = Path(folder), f"phantom_{seed}"
    exam = draw_exam(seed)
    images = images_of(exam)
    masks = {
        key: sitk.Resample(
            like(drawn_grid(exam), mask.astype(np.uint8)), images["t2w"], interpolator=sitk.sitkLabelLinear
        )
        for key, mask in (
            ("zones", exam.anatomy.zones),
            ("lesions", exam.regions * exam.lesions),
            ("regions", exam.regions),
        )
    }
    files = {f"{name}_{'hbv' if key == 'dwi' else key}.mha": image for key, image in images.items()}
    files |= {f"truth/{key}.mha": mask for key, mask in masks.items()}
    b_value = f"{exam.b_value:.0f}"
    texts = {
        "README.txt": README.format(version=__version__, seed=seed, name=name, b_value=b_value),
        "truth/rationale.json": to_json({"synthetic": True, "seed": seed, **_truth(exam, masks)}),
    }
    manifest = {"generator": GENERATOR, "version": __version__, "synthetic": True, "seed": seed}
    texts[MANIFEST] = to_json(manifest | {"files": [*files, *texts, MANIFEST]})
    with staged_folder(folder) as stage:
        (stage / "truth").mkdir()
        for path, image in files.items():
            fields = {SYNTHETIC_FIELD: "yes"} | ({B_VALUE_FIELD: b_value} if path.endswith("_hbv.mha") else {})
            _write_mha(stage / path, image, fields)
        for path, text in texts.items():
            (stage / path).write_text(text, encoding="utf-8")
    paths = {key: folder / path for key, path in zip(images, files, strict=False)}
    return PhantomPaths(folder=folder, truth=folder / "truth", **paths)


def draw_exam(seed: int) -> SyntheticExam:
    """The first examination of this seed that has one lesion, clearly visible, of PI-RADS 4 or 5 (about 1 s a try)."""
    for attempt in count():
        rng = np.random.default_rng((STREAM, seed, attempt))
        exam = synthesize(phantom_anatomy(rng), rng, cancers=1, crop_field_of_view=False)
        if _is_clear(exam):
            log.info("phantom %d: found at attempt %d", seed, attempt + 1)
            return exam
    raise AssertionError("count() does not end")


def drawn_grid(exam: SyntheticExam) -> sitk.Image:
    """The lattice that the examination was drawn on, in space; its values are 0."""
    return _grid(exam.regions.shape[::-1], (PIXEL_MM, PIXEL_MM, SLICE_MM), np.asarray(CENTRE_MM))


def images_of(exam: SyntheticExam) -> dict[str, sitk.Image]:
    """ "t2w", "adc", "dwi" -> uint16 images, tilted, T2W and diffusion each on a grid of its own (LPS mm)."""
    drawn = drawn_grid(exam)
    field = np.asarray(drawn.GetSize()) * drawn.GetSpacing()
    fine = _grid(np.rint(field / T2W_SPACING_MM), T2W_SPACING_MM, np.asarray(CENTRE_MM))
    coarse = _grid(DIFFUSION_SIZE, DIFFUSION_SPACING_MM, CENTRE_MM + _tilt().apply(DIFFUSION_SHIFT_MM))
    t2w, adc, dwi = exam.images
    images = {}
    for key, values, grid in (("t2w", t2w, fine), ("adc", adc, coarse), ("dwi", dwi, coarse)):
        scaled = values * (1000 / np.percentile(dwi, 99.9)) if key == "dwi" else values
        image = like(drawn, np.clip(scaled, 0, 65535).astype(np.float32))
        image = sitk.Resample(image, grid, interpolator=sitk.sitkLinear, useNearestNeighborExtrapolator=key == "t2w")
        images[key] = sitk.Cast(sitk.Round(image), sitk.sitkUInt16)
    return images


def _tilt() -> Rotation:
    return Rotation.from_euler("xyz", TILT_DEG, degrees=True)


def _grid(size: npt.ArrayLike, spacing: tuple[float, float, float], centre: np.ndarray) -> sitk.Image:
    """A tilted image of zeros, uint16; centre in mm LPS."""
    size = np.asarray(size)
    image = sitk.Image([int(n) for n in size], sitk.sitkUInt16)
    image.SetSpacing(spacing)
    image.SetDirection(_tilt().as_matrix().ravel())
    image.SetOrigin(centre - _tilt().apply((size - 1) * spacing / 2))
    return image


def _is_clear(exam: SyntheticExam) -> bool:
    """Whether a reader would see one lesion of PI-RADS 4 or 5 at a glance, and no second one."""
    found = [region for region in exam.rationales if region.pirads >= 4]
    if len(found) != 1 or found[0].dwi_score < 4:
        return False
    lesion, gland = exam.regions == found[0].label, exam.anatomy.gland & (exam.regions == 0)
    t2w, adc, dwi = (float(np.median(image[lesion]) / np.median(image[gland])) for image in exam.images)
    fluid = float(np.percentile(exam.images[1][exam.images[1] > 0], 99))
    return (
        LESION_ML[0] <= _volume_ml(lesion) <= LESION_ML[1]
        and (t2w < 0.75 and adc < 0.75 and dwi > 1.5)
        and 1.2 * ADC_P99[0] < fluid < ADC_P99[1] / 1.2
    )


def _volume_ml(mask: np.ndarray) -> float:
    return float(mask.sum() * PIXEL_MM**2 * SLICE_MM / 1000)


def _truth(exam: SyntheticExam, masks: Mapping[str, sitk.Image]) -> dict[str, Any]:
    """The rationales as they were drawn and rendered, lesions first; places and volumes as they are stored."""
    stored, zones = (sitk.GetArrayViewFromImage(masks[key]) for key in ("regions", "zones"))
    voxel_ml = float(np.prod(T2W_SPACING_MM)) / 1000
    bank = ConceptBank.load()
    regions = []
    for region in sorted(exam.rationales, key=lambda region: (-region.pirads, region.label)):
        mask = stored == region.label
        index = np.argwhere(mask)[:, ::-1].mean(axis=0)
        steps = [{"node": node, "concept": c, "text": bank[c].text} for node, c in region.answers.items()]
        regions.append(
            {
                "label": region.label,
                "is_lesion": region.is_lesion,
                "volume_ml": round(float(mask.sum() * voxel_ml), 3),
                "center_mm": [
                    round(v, 2) for v in masks["regions"].TransformContinuousIndexToPhysicalPoint(index.tolist())
                ],
                "t2w_score": region.t2w_score,
                "dwi_score": region.dwi_score,
                "pirads": region.pirads,
                "rationale": steps,
            }
        )
    volumes = {name: round(float((zones == value).sum() * voxel_ml), 3) for name, value in (("pz", 1), ("tz", 2))}
    return {"b_value": exam.b_value, "decision_tree": "pirads_v2_1", "volumes_ml": volumes, "regions": regions}


def _write_mha(path: Path, image: sitk.Image, fields: Mapping[str, str]) -> None:
    """Write compressed, and raise OSError where the file did not arrive whole (SimpleITK may miss a full disk)."""
    for key, value in fields.items():
        image.SetMetaData(key, value)
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(f"the image could not be written whole: {str(error).splitlines()[-1]}") from error
    header, _, pixels = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
    size = re.search(rb"CompressedDataSize = (\d+)", header)
    if size is None or len(pixels) != int(size[1]):
        raise OSError("the image could not be written whole")
