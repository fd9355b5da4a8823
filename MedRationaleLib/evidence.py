"""Concept heatmaps: where the image resembles a concept, h(x, c_k) = upsample(f_img(x) . f_txt(c_k)) (paper, Eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import SimpleITK as sitk

from MedRationaleLib.preprocessing import Grid


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


def rank(candidates: tuple[str, ...], similarity: Mapping[str, float]) -> list[str]:
    """Candidates, most similar first (ties in the tree's order): argmax_c mean(f_img . f_txt(c)) comes first."""
    return sorted(candidates, key=lambda c: -similarity[c])
