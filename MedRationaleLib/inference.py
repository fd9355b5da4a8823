"""Predictor: load a model once, assess many Studies. The one facade of the engine."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import SimpleITK as sitk

from MedRationaleLib import __version__
from MedRationaleLib.assessment import Assessment, Candidate, Finding, SliceRationale
from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.decision_tree import Dce, DecisionTree, Node
from MedRationaleLib.errors import InputError
from MedRationaleLib.evidence import asked_of_slices, evidence_image, rank, region_similarity
from MedRationaleLib.findings import LesionMeasurement, measure_gland, measure_lesions
from MedRationaleLib.network import Network, Precision, Prediction
from MedRationaleLib.postprocessing import DIFFUSION, Masks, PostprocessingConfig, clean_gland, zone_signal
from MedRationaleLib.preprocessing import CropSpec, Grid, ModelInput, prepare
from MedRationaleLib.rationale import LesionAnswers, signal_contradictions
from MedRationaleLib.study import Study

if TYPE_CHECKING:
    from MedRationaleLib.model.checkpoint import Checkpoint

Progress = Callable[[str, float], None]
"""(stage, fraction done in [0, 1]); the stages are "model", "masks", "findings", "evidence"."""
Retrieval = Literal["lesion", "slice"]
"""Whose embeddings answer: the lesion's own patches, or the mean of its whole slices (the paper's way)."""
RECENTRE_MM = (10.0, 10.0, 9.0)
"""A gland whose centre lies further than this from the crop's (x, y, z) is looked at again, in a crop around it."""
FOUND_ML = 10.0
"""Less gland than this in the first crop, and the rest of the field of view is searched."""
LARGEST_ML = 300.0
"""More gland than this in the result, or less than FOUND_ML, and the Assessment warns of it."""
BESIDE = 2
"""Slices (of 3 mm) above and below the shipped model's gland that are looked at with it. Of 90 synthetic validation
examinations 3 lose a slice that has more than 20 mm2 of gland, where one slice on either side would lose 12 of 9; in 2
more the shipped model takes something else for the gland."""


@dataclass
class Stopwatch:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)


class Predictor:
    """A loaded model.

    >>> predictor = Predictor.load()
    >>> assessment = predictor.assess(Study.from_case("case_folder"))
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str,
        postprocessing: PostprocessingConfig,
        *,
        precision: Precision = "auto",
        compiled: bool = False,
        all_slices: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.network = Network(checkpoint.model, device, precision=precision, compiled=compiled)
        self.model = self.network.model
        self.all_slices = all_slices
        self._coarse: Predictor | None = None
        self.postprocessing = postprocessing
        self.bank = ConceptBank.load()
        unknown = [c for c in self.bank if c not in self.model.concepts]
        if unknown:
            raise InputError(
                f"Expected a model that knows the concepts of the bank, got one without {', '.join(unknown)} in "
                f"{checkpoint.folder}; use the MedRationale version that it was made for."
            )
        self.spec = CropSpec(pixels=self.model.config.pixels)

    @property
    def device(self) -> str:
        """Where the network runs: the CPU, too, when the memory of a GPU did not suffice."""
        return self.network.device

    @property
    def settings(self) -> dict[str, Any]:
        """How it computes, as far as that changes more than the last digits."""
        return {"precision": self.network.computes_in, "all_slices": self.all_slices}

    @classmethod
    def load(
        cls,
        name_or_path: str | Path = "compact",
        *,
        device: str = "auto",
        precision: Precision = "auto",
        compiled: bool = False,
        all_slices: bool = False,
    ) -> Predictor:
        """Load a model folder, or a shipped model by its name.

        Args:
            name_or_path: "compact", or a folder with config.json and model.safetensors.
            device: "auto" takes CUDA, then MPS, then the CPU.
            precision: see network.Precision.
            compiled: see network.Network.
            all_slices: show the network all slices, also where a model that looks at them one by one could leave out
                those without gland.
        """
        import torch

        from MedRationaleLib.model.checkpoint import load_checkpoint

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"Expected a usable device, got '{device}' ({str(error).splitlines()[0]}); choose the device cpu."
            ) from error
        checkpoint = load_checkpoint(name_or_path, device=device)
        try:
            postprocessing = PostprocessingConfig(**checkpoint.postprocessing)
        except TypeError as error:
            raise InputError(
                f"Expected postprocessing settings in {checkpoint.folder}/config.json, got {error}; restore the folder."
            ) from error
        return cls(checkpoint, device, postprocessing, precision=precision, compiled=compiled, all_slices=all_slices)

    def assess(
        self,
        study: Study,
        *,
        progress: Progress | None = None,
        retrieval: Retrieval = "lesion",
        decision_tree: str | Path = "pirads_v2_1",
        dce: Dce = "not available",
    ) -> Assessment:
        """Segment, find lesions, and walk the decision tree for each of them.

        Args:
            study: what was read. With "psa_ng_ml" in its patient record, "psa_density_ng_ml2" joins it there.
            progress: told the stage and how much of it is done.
            retrieval: whose embeddings answer the tree's questions.
            decision_tree: a shipped tree's name or a YAML file.
            dce: what a reader saw of contrast enhancement; it answers wherever the tree asks for it.
        """
        report = progress or (lambda stage, fraction: None)
        tree = DecisionTree.load(decision_tree, self.bank)
        clock = Stopwatch()
        report("model", 0.0)
        prediction = self._predict(study, clock, report)
        report("masks", 0.0)
        with clock.time("masks"):
            masks = prediction.masks(self.postprocessing, study)
        report("findings", 0.0)
        with clock.time("findings"):
            gland = measure_gland(masks.gland)
            measured = (
                measure_lesions(masks.lesions, masks.likelihood, masks.gland, masks.pz, masks.tz, self.postprocessing)
                if gland
                else ()
            )
            findings = [self._finding(m, masks, prediction, study, tree, retrieval, dce) for m in measured]
            findings.sort(key=index_first, reverse=True)
            slices = self._slices(study, prediction, tree)
            findings = [_with_slices(finding, masks, study, slices, tree) for finding in findings]
        report("evidence", 0.0)
        with clock.time("evidence"):
            evidence = self._evidence(findings, prediction, study, report)
        warnings = [*([self.checkpoint.warning] if self.checkpoint.warning else []), *study.warnings]
        if gland is None:
            warnings.append("No prostate was found in the images; nothing else could be assessed.")
        elif not FOUND_ML <= gland.volume_ml <= LARGEST_ML:
            warnings.append(
                f"The segmented prostate has {gland.volume_ml:.1f} ml, where {FOUND_ML:g} to {LARGEST_ML:g} ml are "
                "expected: check its outline, and that the T2W is one of the prostate; lesions outside the outline are "
                "not found."
            )
        volumes = {"gland": 0.0, "ellipsoid": 0.0}
        if gland is not None:
            volumes = {"gland": gland.volume_ml, "ellipsoid": gland.ellipsoid_ml}
        for name, mask in (("pz", masks.pz), ("tz", masks.tz)):
            volumes[name] = float(sitk.GetArrayViewFromImage(mask).sum() * np.prod(mask.GetSpacing()) / 1000)
        if "psa_ng_ml" in study.patient and volumes["ellipsoid"]:
            density = round(study.patient["psa_ng_ml"] / volumes["ellipsoid"], 3)
            study = replace(study, patient={**study.patient, "psa_density_ng_ml2": density})
        return Assessment(
            study=study,
            gland=masks.gland,
            pz=masks.pz,
            tz=masks.tz,
            lesions=sitk.ChangeLabel(masks.lesions, changeMap={f.label: i for i, f in enumerate(findings, start=1)}),
            findings=tuple(replace(f, id=f"lesion-{i}", label=i) for i, f in enumerate(findings, start=1)),
            evidence=evidence,
            evidence_resolution_mm=self.model.patch_mm,
            slices=slices,
            volumes_ml={k: round(v, 2) for k, v in volumes.items()},
            decision_tree=tree.id,
            not_shown=masks.not_shown,
            warnings=tuple(warnings),
            manifest=self._manifest(study, clock, retrieval, tree),
        )

    # ------------------------------------------------------------ network

    def _predict(self, study: Study, clock: Stopwatch, report: Progress) -> Prediction:
        """First a crop at the centre; a second one around the gland where that lies off it (or was not in it)."""
        with clock.time("prepare"):
            given = prepare(study, self.spec)
        report("model", 0.2)
        with clock.time("model"):
            prediction = self._forward(given, lambda done: report("model", 0.2 + 0.5 * done))
        centre, volume = prediction.gland_centre()
        if _mostly_air(given):
            centre, volume = None, 0.0
        if volume < FOUND_ML:
            for corner in _other_crops(study, self.spec, given.grid):
                with clock.time("prepare"):
                    given = prepare(study, self.spec, corner)
                if _mostly_air(given):
                    continue
                with clock.time("model"):
                    other = self._forward(given)
                found, larger = other.gland_centre()
                if larger > volume:
                    prediction, centre, volume = other, found, larger
        report("model", 0.7)
        if centre is not None and self._off_centre(study, prediction.grid, centre):
            with clock.time("prepare"):
                given = prepare(study, self.spec, centre.tolist())
            with clock.time("model"):
                prediction = self._forward(given, lambda done: report("model", 0.7 + 0.3 * done))
        report("model", 1.0)
        return prediction

    def _off_centre(self, study: Study, grid: Grid, centre: np.ndarray) -> bool:
        """Whether a crop around the gland would show more of what surrounds it."""
        offset = np.abs(grid.point_to_index(centre) - (np.array(grid.size) - 1) / 2) * grid.spacing
        stored = Grid.of(study.t2w)
        beyond = np.array(stored.size) * stored.spacing > np.array(grid.size) * grid.spacing + 1e-3
        return bool((offset > RECENTRE_MM)[beyond | np.array([True, True, False])].any())

    def _forward(self, given: ModelInput, progress: Callable[[float], None] | None = None) -> Prediction:
        """One crop; of a model that looks at slices one by one, those near the gland only."""
        return self.network(given, self.near_gland(given), progress)

    def near_gland(self, given: ModelInput) -> np.ndarray | None:
        """(S,) bool: slices with gland by the shipped model's masks, made far faster, and BESIDE on either side.

        None, for all of them, where this is turned off, pays nothing, or finds less than FOUND_ML of gland.
        """
        if self.all_slices or not self.network.by_slice:
            return None
        if self._coarse is None:
            self._coarse = Predictor.load("compact", device=self.device)
        probability = self._coarse.network(given).probabilities[0]
        spacing = np.array(given.grid.spacing) * given.grid.size / probability.shape[::-1]
        gland = clean_gland(probability, tuple(spacing[::-1]), self._coarse.postprocessing)
        if gland.sum() * np.prod(spacing) / 1000 < FOUND_ML:
            return None
        return np.asarray(np.convolve(gland.any((1, 2)), np.ones(2 * BESIDE + 1), "same") > 0)

    # ------------------------------------------------------------ findings

    def _finding(
        self,
        lesion: LesionMeasurement,
        masks: Masks,
        prediction: Prediction,
        study: Study,
        tree: DecisionTree,
        retrieval: Retrieval,
        dce: Dce,
    ) -> Finding:
        weights = prediction.grid.from_reference(
            sitk.Cast(masks.lesions == lesion.label, sitk.sitkFloat32), pixels=prediction.similarity.shape[-1]
        )
        if retrieval == "slice":
            share = weights.sum((1, 2))
            values = share @ prediction.slice_similarity / max(float(share.sum()), 1e-6)
        else:
            values = region_similarity(prediction.similarity, weights)
        similarity = dict(zip(self.model.concepts, (float(v) for v in values), strict=True))
        answering = LesionAnswers(lesion, similarity, tree, missing=_not_imaged(lesion, masks, study), dce=dce)
        walk = tree.walk(answering)
        return Finding(
            id=f"lesion-{lesion.label}",
            label=lesion.label,
            zone=lesion.zone,
            sector=lesion.sector.text,
            size_mm=round(lesion.size_mm, 1),
            volume_ml=round(lesion.volume_ml, 3),
            center_mm=_rounded(lesion.center_mm),
            likelihood=round(lesion.likelihood, 4),
            t2w_score=walk.t2w_score,
            dwi_score=walk.dwi_score,
            dce=dce,  # what the reader saw, whether or not the tree asked for it
            pirads=walk.pirads,
            rationale=tuple(answering.steps),
            contradictions=(
                *answering.contradictions,
                *signal_contradictions(answering.steps, tree, _signal(lesion, masks, study)),
            ),
        )

    def _evidence(
        self, findings: list[Finding], prediction: Prediction, study: Study, report: Progress
    ) -> dict[str, sitk.Image]:
        """Concept -> its heatmap, of the concepts that a finding's rationale shows; findings share them."""
        import torch

        concepts = dict.fromkeys(s.evidence for f in findings for s in f.rationale if s.evidence)
        evidence = {}
        for done, concept in enumerate(concepts, start=1):
            similarity = prediction.similarity[self.model.concepts.index(concept)]
            with torch.inference_mode():
                heat = self.model.heat(torch.from_numpy(similarity).to(self.device)).float().cpu().numpy()
            evidence[concept] = evidence_image(heat, prediction.grid, study.t2w)
            report("evidence", done / len(concepts))
        return evidence

    def _slices(self, study: Study, prediction: Prediction, tree: DecisionTree) -> tuple[SliceRationale, ...]:
        """The tree's retrieval questions asked of every slice, as far as they lead without a measurement."""
        asked = asked_of_slices(
            prediction.similarity,
            prediction.probabilities[0],
            present=self.model.concepts.index(tree.present),
            absent=self.model.concepts.index(tree.absent),
            patch_mm=self.model.patch_mm,
        )
        stored = Grid.of(study.t2w)
        middle = (np.array(stored.size) - 1) / 2
        result = []
        for index in range(stored.size[2]):
            point = stored.index_to_point([middle[0], middle[1], index])
            nearest = round(float(prediction.grid.point_to_index(point)[2]))
            if not 0 <= nearest < prediction.grid.size[2] or not prediction.seen[nearest]:
                continue
            similarity = dict(zip(self.model.concepts, (float(v) for v in asked[nearest]), strict=True))
            there = similarity[tree.present] - similarity[tree.absent] > self.postprocessing.presence_margin
            answers: dict[str, Candidate] = {}

            def answer(
                node: Node,
                candidates: tuple[str, ...],
                so_far: Mapping[str, str],
                said=answers,
                near=similarity,
                first=tree.present if there else tree.absent,
            ):
                if node.answered_by == "retrieval" or node.id == "zone":
                    best = first if node.id == tree.start else rank(candidates, near)[0]
                    said[node.id] = Candidate(concept=best, similarity=round(near[best], 4))
                    return best
                return node.default or candidates[0]

            tree.walk(answer)
            x, y, z = (float(v) for v in point)
            result.append(SliceRationale(slice_index=index, position_mm=(x, y, z), answers=answers))
        return tuple(result)

    def _manifest(self, study: Study, clock: Stopwatch, retrieval: Retrieval, tree: DecisionTree) -> dict[str, Any]:
        packages = ("torch", "segment-anything", "SimpleITK", "numpy", "scipy", "scikit-image")
        return {
            "assessed_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {"medrationale": __version__, "python": platform.python_version()}
            | {p: metadata.version(p) for p in packages},
            "platform": platform.platform(),
            "device": self.device,
            **self.settings,
            "model": {
                "name": self.model.config.name,
                "sha256": self.checkpoint.sha256,
                "postprocessing": vars(self.postprocessing),
            },
            "inputs": {name: {"path": s.path, "sha256": s.sha256} for name, s in study.provenance.items()},
            "decision_tree": tree.id,
            "retrieval": retrieval,
            "timings_s": clock.seconds,
            "seed": None,
        }


def _rounded(point: tuple[float, float, float]) -> tuple[float, float, float]:
    """To 0.01 mm."""
    x, y, z = (round(v, 2) for v in point)
    return x, y, z


def _not_imaged(lesion: LesionMeasurement, masks: Masks, study: Study) -> tuple[str, ...]:
    """ADC and DWI as far as the Study lacks them, or they have no data in most of this lesion."""
    array = sitk.GetArrayViewFromImage
    here = array(masks.lesions) == lesion.label
    dark = tuple(name for name, valid in study.valid.items() if array(valid)[here].mean() < 0.5)
    return (*study.missing, *dark)


def _signal(lesion: LesionMeasurement, masks: Masks, study: Study) -> dict[str, tuple[float, float]]:
    """Sequence -> its mean over a lesion, its median over the rest of the lesion's zone; where it has data."""
    array = sitk.GetArrayViewFromImage
    lesions, zone = array(masks.lesions), array(masks.pz if lesion.zone == "PZ" else masks.tz) > 0
    sequences = {
        name: (array(image), array(study.valid[name]) > 0 if name in study.valid else np.ones_like(zone))
        for name in ("t2w", *DIFFUSION)
        if (image := getattr(study, name)) is not None
    }
    return zone_signal(lesions == lesion.label, zone & (lesions == 0), sequences)


def _with_slices(
    finding: Finding, masks: Masks, study: Study, slices: Sequence[SliceRationale], tree: DecisionTree
) -> Finding:
    """The finding with a sentence where slices by themselves deny the lesion that its mask has there (Appendix E)."""
    lesion = sitk.GetArrayFromImage(sitk.DICOMOrient(masks.lesions == finding.label, "LPS")) > 0
    here = [s for s in slices if lesion[s.slice_index].any() and tree.start in s.answers]
    denied = sum(s.answers[tree.start].concept == tree.absent for s in here)
    if not denied:
        return finding
    sentence = (
        f"{tree.nodes[tree.start].question} The mask has the lesion on {len(here)} slices; asked of each slice by "
        f'itself, the model says "{tree.bank[tree.absent].text}" on {denied} of them.'
    )
    return replace(finding, contradictions=(*finding.contradictions, sentence))


def index_first(finding: Finding) -> tuple[int, bool, float]:
    """The order of findings, the largest first: category, then extension, then size (PI-RADS v2.1, index lesion)."""
    extends = any(step.concept == "epe_present" for step in finding.rationale)
    return finding.pirads, extends, finding.size_mm


def _mostly_air(given: ModelInput) -> bool:
    """Whether more than half of the T2W pixels have their slice's lowest value: nothing to find there."""
    t2w = given.images[:, 0]
    return bool((t2w <= t2w.min(axis=(1, 2), keepdims=True) + 1e-6).mean() > 0.5)


def _other_crops(study: Study, spec: CropSpec, first: Grid) -> list[list[float]]:
    """Centres (LPS mm) of crops that cover the rest of the T2W, a quarter of a crop apart and within its extent."""
    stored = Grid.of(study.t2w)
    crop = np.array(spec.size) * spec.spacing_mm
    beyond = np.maximum(np.array(stored.size) * stored.spacing - crop, 0)
    counts = np.ceil(beyond / (crop / 4) - 1e-6).astype(int) + 1
    shifts = [np.linspace(-b / 2, b / 2, n) if n > 1 else np.zeros(1) for b, n in zip(beyond, counts, strict=True)]
    middle = (np.array(first.size) - 1) / 2
    return [
        first.index_to_point(middle + np.array(shift) / first.spacing).tolist() for shift in itertools.product(*shifts)
    ]
