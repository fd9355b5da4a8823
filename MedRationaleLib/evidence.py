"""Concept heatmaps: where the image resembles a concept, h(x, c_k) = upsample(f_img(x) . f_txt(c_k)) (paper, Eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import SimpleITK as sitk

from MedRationaleLib.preprocessing import Grid


def heatmap(similarity: np.ndarray) -> np.ndarray:
    """Cosine similarity (S, h, w) -> heat in [0, 1], float32; a negative similarity is no evidence, so it becomes 0."""
    return np.clip(similarity, 0.0, 1.0).astype(np.float32)


def evidence_image(similarity: np.ndarray, grid: Grid, reference: sitk.Image) -> sitk.Image:
    """Heatmap of one concept on the grid of `reference`, float32 in [0, 1], linearly upsampled; 0 beyond the crop."""
    return grid.to_reference(heatmap(similarity), reference)


def region_similarity(similarity: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean similarity of a region to every concept: (K, S, h, w), weights (S, h, w) >= 0 -> (K,).

    The mean of the patches' similarities is the similarity of their mean unit embedding, as in training.
    """
    total = weights.sum()
    return np.tensordot(similarity, weights / total, axes=3) if total > 0 else similarity.mean((1, 2, 3))


def rank(candidates: tuple[str, ...], similarity: Mapping[str, float]) -> list[str]:
    """Candidates, most similar first (ties in the tree's order): argmax_c mean(f_img . f_txt(c)) comes first."""
    return sorted(candidates, key=lambda c: -similarity[c])
