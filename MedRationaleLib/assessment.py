"""The Assessment: all that is said of one Study, as named values that every view (files, report, Slicer, DICOM) shows.

Nothing here computes anything clinical, and nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import SimpleITK as sitk

Source = Literal["model", "measured", "reader"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One possible answer at a node of the decision tree and how similar the image was to it."""

    concept: str
    """Concept id."""
    similarity: float | None = None
    """Cosine similarity in [-1, 1] of the region's embedding and the concept's; None where no model was asked."""


@dataclass(frozen=True, kw_only=True)
class RationaleStep:
    """One step of the path walked through the decision tree."""

    node: str
    """Node id of the decision tree."""
    concept: str
    """Id of the chosen concept."""
    text: str
    """The concept in words."""
    source: Source
    """Who answered: the model by retrieval, a measurement on the mask, or the reader."""
    similarity: float | None = None
    """Similarity of the chosen concept (see Candidate); None where the model was not asked."""
    runners_up: tuple[Candidate, ...] = ()
    """The other candidates of the node, most similar first."""
    measurement: str | None = None
    """What was measured, with its unit ("12.4 mm"); None where nothing was."""
    evidence: str | None = None
    """Key into Assessment.evidence; in files, the path relative to the output folder."""
    weakened_by: tuple[str, ...] = ()
    """Sequences ("adc", "dwi") that this answer rests on and that the Study lacks, or lacks in this lesion."""
    overridden: str | None = None
    """Where source is "reader": the concept id that was chosen before."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One lesion with its reasons. Lengths in mm, volumes in ml, points in LPS."""

    id: str
    """"lesion-1", "lesion-2", ... with the most suspicious first; also the segment id."""
    label: int
    """Value of this lesion in Assessment.lesions and the number in its id; its segment in files goes by the id."""
    zone: Literal["PZ", "TZ"]
    sector: str
    """PI-RADS sector in words, for instance "right peripheral zone posterolateral mid gland"."""
    size_mm: float
    """Greatest diameter."""
    volume_ml: float
    center_mm: tuple[float, float, float]
    """Centroid, LPS."""
    likelihood: float
    """In [0, 1], that a candidate like this is a lesion, as fitted on synthetic examinations (Candidate.likelihood)."""
    t2w_score: int | None
    dwi_score: int | None
    dce: Literal["positive", "negative", "not available"]
    """What a reader saw of contrast enhancement; the category rests on it only where the rationale asks for it."""
    pirads: int
    rationale: tuple[RationaleStep, ...]
    contradictions: tuple[str, ...] = ()
    """Sentences: where mask and rationale, or two answers, contradict each other (paper, Appendix E)."""
    model_pirads: int | None = None
    """Where a reader has changed answers: the category that the model's own led to."""

    @property
    def title(self) -> str:
        """What its segment is called: "Lesion 1 (PI-RADS 4)"."""
        return f"{self.id.replace('-', ' ').capitalize()} (PI-RADS {self.category_in_words})"

    @property
    def dwi_inferred(self) -> bool:
        """Neither ADC nor DWI shows this lesion: PI-RADS v2.1 gives no DWI score then, and this one is a guess."""
        return {"adc", "dwi"} <= {sequence for step in self.rationale for sequence in step.weakened_by}

    @property
    def dwi_in_words(self) -> str:
        """The DWI score as it is shown: "4", "4 (inferred)", or "–" where the tree gave none."""
        return "–" if self.dwi_score is None else f"{self.dwi_score}{' (inferred)' if self.dwi_inferred else ''}"

    @property
    def category_in_words(self) -> str:
        """The category as it is shown: "4", or "2 (reader; model 4)" where a reader has changed answers."""
        return str(self.pirads) if self.model_pirads is None else f"{self.pirads} (reader; model {self.model_pirads})"


@dataclass(frozen=True, kw_only=True)
class UnshownCandidate:
    """A candidate below the likelihood from which findings are shown; where it is, for a reader who wants to look."""

    zone: Literal["PZ", "TZ"]
    volume_ml: float
    center_mm: tuple[float, float, float]
    """Centroid, LPS."""
    likelihood: float
    """As Finding.likelihood."""


@dataclass(frozen=True, kw_only=True)
class SliceRationale:
    """What the model says of one slice by itself, where it looks most like a lesion (evidence.asked_of_slices)."""

    slice_index: int
    """Index on the T2W grid's slowest axis in its canonical (LPS) orientation, from inferior to superior."""
    position_mm: tuple[float, float, float]
    """Centre of the slice, LPS."""
    answers: dict[str, Candidate]
    """Node id -> the model's answer."""


@dataclass(kw_only=True)
class Assessment:
    """All that the model says of a Study. Images are on the T2W grid as it was stored."""

    study: Any
    """The Study (see study.py) that was assessed."""
    gland: sitk.Image
    """uint8 {0, 1}."""
    pz: sitk.Image
    """uint8 {0, 1}."""
    tz: sitk.Image
    """uint8 {0, 1}."""
    lesions: sitk.Image
    """uint8, 0 or Finding.label."""
    findings: tuple[Finding, ...]
    evidence: dict[str, sitk.Image]
    """Concept id -> float32 heatmap in [0, 1]."""
    evidence_resolution_mm: float
    """Side of the image patch that one value of a heatmap stands for, before upsampling."""
    slices: tuple[SliceRationale, ...]
    volumes_ml: dict[str, float]
    """"gland", "pz", "tz" segmented volumes and "ellipsoid" = 0.52 L W H."""
    decision_tree: str
    """Id of the tree that was walked."""
    not_shown: tuple[UnshownCandidate, ...] = ()
    """The likeliest of the candidates that are no findings."""
    warnings: tuple[str, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)
    """Versions, device, inputs and their hashes, weights hash, timings in s, seeds."""
