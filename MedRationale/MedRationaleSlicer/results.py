"""An Assessment in the scene: segmentation, findings table, assessment.json as text, and heatmaps on demand.

All nodes hang on one text node, which holds the assessment.json as it stands with the reader's changes. What the model
said, and every heatmap, are kept in two hidden nodes: a saved scene has all of it, and every change can be undone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _

from MedRationaleSlicer.inputs import SEQUENCES, study_item
from MedRationaleSlicer.nodes import (
    ROLE,
    all_or_nothing,
    fill,
    forget_file,
    heat_colors,
    ijk_to_ras,
    into_folder,
    new_node,
    remove_node,
    role,
    segment_mask,
    sitk_array,
    text_node,
    to_world,
    volume_image,
)
from MedRationaleSlicer.steps import Steps

if TYPE_CHECKING:
    from MedRationaleLib.assessment import Assessment, Finding

CONCEPT = "MedRationale.concept"
"""Attribute of a heatmap: the concept's id."""
FULL = 255
"""Heatmaps are kept as 8 bit: steps of 1/255 are finer than anything they mean."""
LESION_OPACITY, REST_OPACITY = 1.0, 0.35


@dataclass(frozen=True)
class Hottest:
    """A heatmap's highest heat."""

    ras: tuple[float, float, float]
    """Where in the lesion, RAS mm in the world."""
    in_lesion: float
    anywhere: float


class Results:
    """One Assessment in the scene."""

    def __init__(self, node: Any) -> None:
        self.node = node
        """vtkMRMLTextNode with the assessment.json."""
        self._record = json.loads(self._reference("record").GetText())

    # ------------------------------------------------------------ making

    @classmethod
    def create(cls, folder: Path, inputs: Mapping[str, Any]) -> Steps[Results]:
        """Steps that bring an output folder into the scene; where they end early, what they have made goes again."""
        from MedRationaleLib.serialization import SEGMENTATION_FILE, read_json, read_nrrd

        data = read_json(folder / "assessment.json")
        manifest = read_json(folder / "manifest.json")
        t2w = inputs.get("t2w")
        title = t2w.GetName() if t2w else "examination"
        with all_or_nothing() as made:
            yield
            stack, matrix = None, vtk.vtkMatrix4x4()
            for index, path in enumerate(data["evidence"].values()):
                image = read_nrrd(folder / path)
                heat = sitk_array(image)
                if stack is None:
                    stack = np.zeros((len(data["evidence"]) * heat.shape[0], *heat.shape[1:]), np.uint8)
                    matrix = ijk_to_ras(image)
                stack[index * len(heat) : (index + 1) * len(heat)] = np.round(heat * FULL)
                yield
            segmentation = slicer.util.loadSegmentation(str(folder / SEGMENTATION_FILE))
            segmentation.SetName(slicer.mrmlScene.GenerateUniqueName(f"{title} MedRationale"))
            segmentation.SetAttribute(ROLE, "segmentation")
            forget_file(segmentation)
            if t2w is not None:
                segmentation.SetReferenceImageGeometryParameterFromVolumeNode(t2w)
            made.append(segmentation)
            _beside(segmentation, t2w)
            yield
            record = text_node(f"{title} MedRationale record", "record", made, hidden=True)
            kept = {"assessment": data, "manifest": manifest, "evidence": list(data["evidence"]), "overrides": []}
            record.SetText(json.dumps(kept))
            node = text_node(f"{title}: {manifest['model']['name']}, {time.strftime('%H:%M:%S')}", "assessment", made)
            table = new_node("vtkMRMLTableNode", f"{title} findings", role="table")
            made.append(table)
            for name, reference in (("record", record), ("segmentation", segmentation), ("table", table)):
                node.SetNodeReferenceID(role(name), reference.GetID())
            if stack is not None:
                evidence = new_node("vtkMRMLScalarVolumeNode", f"{title} evidence", hidden=True)
                evidence.SetAttribute(ROLE, "evidence")
                made.append(evidence)
                slicer.util.updateVolumeFromArray(evidence, stack)
                evidence.SetIJKToRASMatrix(matrix)
                node.SetNodeReferenceID(role("evidence"), evidence.GetID())
            for name in SEQUENCES:
                if inputs.get(name) is not None:
                    node.SetNodeReferenceID(role(name), inputs[name].GetID())
            yield
            results = cls(node)
            results._place_in_hierarchy(title)
            results._style_segmentation()
            results._show_findings()
            return results

    @classmethod
    def in_scene(cls) -> list[Results]:
        """All that the scene holds, the oldest first."""
        return [
            cls(node) for node in slicer.util.getNodesByClass("vtkMRMLTextNode")
            if node.GetAttribute(ROLE) == "assessment" and node.GetNodeReference(role("record")) is not None
        ]  # fmt: skip

    def remove(self) -> None:
        """Take it out of the scene, with its heatmaps and its folder."""
        folder = self.folder_item
        nodes = [self._reference(name) for name in ("segmentation", "table")]
        for node in (*hidden_nodes(self.node), *nodes, self.node):
            if node is not None:
                remove_node(node)
        if folder:
            slicer.mrmlScene.GetSubjectHierarchyNode().RemoveItem(folder)

    # ------------------------------------------------------------ what it says

    @property
    def data(self) -> dict[str, Any]:
        """The assessment.json, with the reader's changes."""
        found: dict[str, Any] = json.loads(self.node.GetText())
        return found

    @property
    def findings(self) -> tuple[Finding, ...]:
        """With the reader's changes."""
        from MedRationaleLib.serialization import findings_of

        return findings_of(self.data)

    @property
    def overrides(self) -> list[tuple[str, str, str]]:
        """The reader's changes in their order: finding, node of the tree, concept."""
        return [(finding, node, concept) for finding, node, concept in self._record["overrides"]]

    def tree(self) -> Any:
        """The DecisionTree that was walked."""
        return _tree(self._record["assessment"]["decision_tree"])

    def override(
        self,
        finding: str,
        node: str,
        concept: str,
        ask: Callable[[Any, tuple[str, ...]], str | None] = lambda node, candidates: None,
    ) -> None:
        """The reader answers a question of one finding's tree; its scores and category follow.

        Where the tree then asks what it had not asked before, `ask` is given the node and its candidates, and returns
        the reader's answer, None for none. Raises InputError where an answer is missing or impossible; nothing is
        changed then.
        """
        from MedRationaleLib.override import MissingAnswer

        overrides = [*self.overrides, (finding, node, concept)]
        while True:
            try:
                return self._apply(overrides)
            except MissingAnswer as missing:
                answer = ask(missing.node, missing.candidates)
                if answer is None:
                    raise
                # Before the last, so that undoing the last does not leave its question without an answer.
                overrides.insert(-1, (finding, missing.node.id, answer))

    def undo(self) -> None:
        """Take the last change back."""
        self._apply(self.overrides[:-1])

    def _apply(self, overrides: list[tuple[str, str, str]]) -> None:
        from MedRationaleLib.override import override_finding
        from MedRationaleLib.serialization import findings_of, findings_to_list

        original, tree = self._record["assessment"], self.tree()
        found = [
            override_finding(tree, finding, {n: c for f, n, c in overrides if f == finding.id})
            for finding in findings_of(original)
        ]
        self._record["overrides"] = [list(row) for row in overrides]
        self._reference("record").SetText(json.dumps(self._record))
        self._show_findings(original | {"findings": findings_to_list(found, original["evidence"])})

    def _show_findings(self, data: Mapping[str, Any] | None = None) -> None:
        """Text, table and names of the segments from the assessment; without `data` from what the model said."""
        self.node.SetText(json.dumps(data or self._record["assessment"], indent=2, ensure_ascii=False))
        table = self._reference("table")
        if table is not None:
            shown = ({"pirads": f.category_in_words, "dwi_score": f.dwi_in_words} for f in self.findings)
            fill(table, [row | words for row, words in zip(self.data["findings"], shown, strict=True)])
        segmentation = self._reference("segmentation")
        for finding in self.findings:
            segment = segmentation.GetSegmentation().GetSegment(finding.id) if segmentation else None
            if segment is not None:
                segment.SetName(finding.title)

    # ------------------------------------------------------------ what it shows

    @property
    def segmentation(self) -> Any:
        """vtkMRMLSegmentationNode, or None where it was deleted."""
        return self._reference("segmentation")

    @property
    def folder_item(self) -> int:
        """Folder in the subject hierarchy, 0 where there is none."""
        shown = slicer.mrmlScene.GetSubjectHierarchyNode()
        return int(shown.GetItemParent(shown.GetItemByDataNode(self.node))) if self.node.GetScene() else 0

    def input(self, sequence: str) -> Any:
        """The volume that was assessed as this sequence; None where there was none, or it is gone."""
        return self._reference(sequence)

    def heatmap(self, concept: str | None) -> Any:
        """Volume of a concept's heatmap, made when it is first asked for; None where there is no heatmap."""
        stack = self._reference("evidence")
        if stack is None or concept not in self._record["evidence"]:
            return None
        made = next((node for node in self._heatmaps() if node.GetAttribute(CONCEPT) == concept), None)
        if made is not None:
            return made
        text = next(s.text for f in self.findings_of_model() for s in f.rationale if s.evidence == concept)
        node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", f"Evidence: {text}")
        slicer.util.updateVolumeFromArray(node, self._heat(concept))
        matrix = vtk.vtkMatrix4x4()
        stack.GetIJKToRASMatrix(matrix)
        node.SetIJKToRASMatrix(matrix)
        node.SetAttribute(ROLE, "heatmap")
        node.SetAttribute(CONCEPT, concept)
        self.node.AddNodeReferenceID(role("heatmap"), node.GetID())
        node.CreateDefaultDisplayNodes()
        display = node.GetDisplayNode()
        display.SetAndObserveColorNodeID(heat_colors().GetID())
        display.AutoWindowLevelOff()
        display.SetInterpolate(True)
        _beside(node, self.input("t2w"))
        into_folder(node, self.folder_item)
        return node

    def not_shown(self) -> str:
        """What is below the threshold, in a sentence; "" where there is nothing."""
        from MedRationaleLib.report import not_shown
        from MedRationaleLib.serialization import not_shown_of

        return not_shown(not_shown_of(self._record["assessment"]), self._record["manifest"])

    def findings_of_model(self) -> tuple[Finding, ...]:
        """Before any change by the reader."""
        from MedRationaleLib.serialization import findings_of

        return findings_of(self._record["assessment"])

    def hottest(self, concept: str | None, finding: str) -> Hottest | None:
        """Where a concept's heatmap is hottest in a lesion; None where it has no heatmap, or a node of it is gone."""
        stack = self._reference("evidence")
        if None in (stack, self.segmentation, self.input("t2w")) or concept not in self._record["evidence"]:
            return None
        if self.segmentation.GetSegmentation().GetSegment(finding) is None:
            return None
        heat = self._heat(concept)
        inside = heat * self._mask(finding)
        k, j, i = np.unravel_index(int(inside.argmax()), heat.shape)
        matrix = vtk.vtkMatrix4x4()
        stack.GetIJKToRASMatrix(matrix)
        ras = self.world(matrix.MultiplyPoint((float(i), float(j), float(k), 1.0))[:3])
        return Hottest(ras=ras, in_lesion=float(inside.max()), anywhere=float(heat.max()))

    def world(self, ras: Sequence[float]) -> tuple[float, float, float]:
        """A RAS point of the T2W, where its transform puts it."""
        x, y, z, _ = (to_world(self.input("t2w")) @ (*ras, 1.0)).tolist()
        return x, y, z

    def background(self, step: Any) -> Any:
        """The volume that an answer is about: its concept's sequence, else the first that its question rests on."""
        tree = self.tree()
        concept = tree.bank.get(step.concept)
        node = tree.nodes.get(step.node)
        wanted = (concept.sequence if concept else None, *(node.sequences if node else ()), "t2w")
        return next((v for name in wanted if name in SEQUENCES and (v := self.input(name)) is not None), None)

    def emphasise(self, finding: str | None) -> None:
        """Draw one lesion's outline in full, and the others fainter."""
        if self.segmentation is None or self.segmentation.GetDisplayNode() is None:
            return
        display = self.segmentation.GetDisplayNode()
        for segment in self.segmentation.GetSegmentation().GetSegmentIDs():
            if segment.startswith("lesion"):
                chosen = finding in (None, segment)
                display.SetSegmentOpacity2DOutline(segment, LESION_OPACITY if chosen else REST_OPACITY)

    # ------------------------------------------------------------ back to an Assessment

    def assessment(self) -> Assessment:
        """The Assessment with the reader's changes, from what the scene holds (segments that were edited included).

        Raises RuntimeError where a node of it was deleted.
        """
        from MedRationaleLib.assessment import Assessment
        from MedRationaleLib.segmentation_io import like
        from MedRationaleLib.serialization import not_shown_of, slices_of

        if self.segmentation is None or self.input("t2w") is None:
            raise RuntimeError(_("Expected T2W and segmentation in the scene, but one was deleted; run it again."))
        data = self.data
        names = ("gland", "pz", "tz", *(row["id"] for row in data["findings"]))
        gone = [name for name in names if self.segmentation.GetSegmentation().GetSegment(name) is None]
        if gone:
            text = _("Expected the segments of the assessment, but {names} was deleted; run it again.")
            raise RuntimeError(text.format(names=", ".join(gone)))
        study = self._study()
        reference = study.t2w
        lesions = np.zeros(slicer.util.arrayFromVolume(self.input("t2w")).shape, np.uint8)
        edited: tuple[str, ...] = ()
        for finding in self.findings:
            mask = self._mask(finding.id)
            lesions[mask > 0] = finding.label
            edited += self._edited(finding, mask)
        zones = {name: like(reference, self._mask(name).astype(np.uint8)) for name in ("gland", "pz", "tz")}
        changes = {"reader_overrides": [list(row) for row in self.overrides]} if self.overrides else {}
        manifest = {k: v for k, v in self._record["manifest"].items() if k not in ("generator", "files")}
        return Assessment(
            study=study,
            **zones,
            lesions=like(reference, lesions),
            findings=self.findings,
            evidence={c: like(reference, self._heat(c)) for c in self._record["evidence"]},
            evidence_resolution_mm=data["evidence_resolution_mm"],
            slices=slices_of(data),
            volumes_ml=data["volumes_ml"],
            decision_tree=data["decision_tree"],
            not_shown=not_shown_of(data),
            warnings=(*data["warnings"], *edited),
            manifest=manifest | changes,
        )

    def _edited(self, finding: Finding, mask: np.ndarray) -> tuple[str, ...]:
        """A warning where a lesion's outline is not the one that was measured."""
        voxel_ml = float(np.prod(self.input("t2w").GetSpacing())) / 1000
        volume_ml = float(np.count_nonzero(mask)) * voxel_ml
        if abs(volume_ml - finding.volume_ml) <= max(voxel_ml, 0.01 * finding.volume_ml):
            return ()
        text = _(
            "The outline of {name} was edited after the analysis ({before:.3f} ml then, {now:.3f} ml now); its size, "
            "sector, scores and category are those of the analysis."
        )
        return (text.format(name=finding.id.replace("-", " "), before=finding.volume_ml, now=volume_ml),)

    def _study(self) -> Any:
        from dataclasses import replace

        from MedRationaleLib.serialization import study_of
        from MedRationaleLib.study import Study

        told = study_of(self.data["study"])
        t2w = self.input("t2w")
        images = {name: volume_image(self.input(name), t2w) for name in SEQUENCES if self.input(name) is not None}
        study = Study.from_images(**images)
        return replace(study, provenance=told.provenance, patient=told.patient, warnings=told.warnings)

    # ------------------------------------------------------------ pieces

    def _reference(self, name: str) -> Any:
        return self.node.GetNodeReference(role(name))

    def _heatmaps(self) -> list[Any]:
        count = self.node.GetNumberOfNodeReferences(role("heatmap"))
        nodes = (self.node.GetNthNodeReference(role("heatmap"), index) for index in range(count))
        return [node for node in nodes if node is not None]

    def _heat(self, concept: str) -> np.ndarray:
        """(z, y, x) float32 in [0, 1]."""
        stack = slicer.util.arrayFromVolume(self._reference("evidence"))
        slices = len(stack) // len(self._record["evidence"])
        first = self._record["evidence"].index(concept) * slices
        return stack[first : first + slices].astype(np.float32) / FULL

    def _mask(self, segment: str) -> np.ndarray:
        """(z, y, x) uint8 on the grid of the T2W."""
        return segment_mask(self.segmentation, segment, self.input("t2w"))

    def _place_in_hierarchy(self, title: str) -> None:
        shown = slicer.mrmlScene.GetSubjectHierarchyNode()
        t2w = self.input("t2w")
        item = shown.GetItemByDataNode(t2w) if t2w is not None else 0
        parent = study_item(shown, item) if item else shown.GetSceneItemID()
        folder = shown.CreateFolderItem(parent, f"MedRationale: {title}, {time.strftime('%H:%M:%S')}")
        for node in (self.node, self._reference("table"), self.segmentation):
            into_folder(node, folder)

    def _style_segmentation(self) -> None:
        """The gland as an outline, the zones faint, lesions in front."""
        segmentation = self.segmentation
        segmentation.CreateDefaultDisplayNodes()
        display = segmentation.GetDisplayNode()
        display.SetSliceIntersectionThickness(2)
        for segment in segmentation.GetSegmentation().GetSegmentIDs():
            lesion = segment.startswith("lesion")
            display.SetSegmentOpacity2DFill(segment, 0.0)
            display.SetSegmentOpacity2DOutline(segment, 1.0 if lesion else 0.6)
            display.SetSegmentOpacity3D(segment, 1.0 if lesion else 0.15)
            display.SetSegmentVisibility(segment, segment != "gland")


@cache
def _tree(name: str) -> Any:
    from MedRationaleLib.decision_tree import DecisionTree

    return DecisionTree.load(name)


def _beside(node: Any, t2w: Any) -> None:
    """Under the T2W's transform, so that it stays where the T2W is."""
    node.SetAndObserveTransformNodeID(t2w.GetTransformNodeID() if t2w is not None else None)


def hidden_nodes(node: Any) -> list[Any]:
    """What an assessment's text node keeps out of sight, and its heatmaps."""
    roles = ("record", "evidence", "heatmap")
    references = [(role(r), n) for r in roles for n in range(node.GetNumberOfNodeReferences(role(r)))]
    found = (node.GetNthNodeReference(name, index) for name, index in references)
    return [each for each in found if each is not None]
