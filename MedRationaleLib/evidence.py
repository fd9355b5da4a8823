"""Concept heatmaps: where the image resembles a concept, h(x, c_k) = upsample(f_img(x) . f_txt(c_k)) (paper, Eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import SimpleITK as sitk
from skimage.transform import resize_local_mean

from MedRationaleLib.preprocessing import Grid

TYPICAL_MM2 = 130.0
"""Area of the median lesion (13 mm across) in its largest slice."""


def evidence_image(heat: np.ndarray, grid: Grid, reference: sitk.Image) -> sitk.Image:
    """One concept's heat (S, h, w) on the grid of `reference`, float32 in [0, 1]; 0 beyond the crop.

    `heat` comes from RationaleModel.heat; where its form is the bare cosine, a negative one becomes 0.
    """
    return grid.to_reference(np.clip(heat, 0.0, 1.0).astype(np.float32), reference)


def region_similarity(similarity: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean similarity of a region to every concept: (K, S, h, w), weights (S, h, w) >= 0 -> (K,).

    The mean of the patches' similarities is the similarity of their mean unit embedding, as in training.
    """
    total = weights.sum()
    return np.tensordot(similarity, weights / total, axes=3) if total > 0 else similarity.mean((1, 2, 3))


def asked_of_slices(
    similarity: np.ndarray, gland: np.ndarray, *, present: int, absent: int, patch_mm: float
) -> np.ndarray:
    """Similarity of every slice to every concept, where it looks most like a lesion: (K, S, h, w) -> (S, K).

    The mean over the patches of the gland, as many as a typical lesion has, at which the concept `present` is nearest
    against `absent`. The paper takes the mean over the whole slice. There the median lesion has 0.4 % of the patches,
    and what the slice is said to be hardly depends on it. A slice without gland is asked as a whole.

    Args:
        similarity: of every patch to every concept.
        gland: (S, H, W) probability.
        present: index of the concept that says that there is a lesion.
        absent: of the one that says that there is none.
        patch_mm: side of a patch.
    """
    concepts, slices, *size = similarity.shape
    inside = resize_local_mean(gland, (slices, *size)).reshape(slices, -1) > 0.5
    patches = similarity.reshape(concepts, slices, -1)
    difference = np.where(inside, patches[present] - patches[absent], -np.inf)
    typical = max(1, round(TYPICAL_MM2 / patch_mm**2))
    result = patches.mean(2).T
    for index in np.flatnonzero(inside.any(1)):
        count = min(typical, int(inside[index].sum()))
        chosen = np.argpartition(difference[index], -count)[-count:]
        result[index] = patches[:, index, chosen].mean(1)
    return result


def rank(candidates: tuple[str, ...], similarity: Mapping[str, float]) -> list[str]:
    """Candidates, most similar first (ties in the tree's order): argmax_c mean(f_img . f_txt(c)) comes first."""
    return sorted(candidates, key=lambda c: -similarity[c])
