"""Which volumes of the scene are T2W, ADC and DWI: by their study and their DICOM tags first, by their names second."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import slicer
import vtk
from slicer.i18n import tr as _

SEQUENCES = ("t2w", "adc", "dwi")
TITLES = {"t2w": "T2W", "adc": "ADC", "dwi": "DWI"}
NAMES = (
    ("adc", re.compile(r"adc|apparent[ _-]?diff", re.IGNORECASE)),
    ("dwi", re.compile(r"dwi|hbv|b[ _-]?val|(?<![a-z])b[ _=-]?\d{3,4}(?!\d)|ep2d|diff|trace", re.IGNORECASE)),
    ("t2w", re.compile(r"(?<![a-z0-9])t2(?!\*|[ _-]?star)", re.IGNORECASE)),
)
"""What names of volumes tell, the first that matches."""
OTHER_PLANES = re.compile(r"(?<![a-z])(sag|cor)", re.IGNORECASE)
AXIAL_COSINE = 0.8
"""A volume is axial where the normal of its slices is at least this close to the body's axis."""
FROM_TAGS, FROM_NAME = "DICOM tags", "name"
SEQUENCE = "MedRationale.sequence"
"""Attribute of a volume that was loaded from a folder here: what the folder told that it is."""


@dataclass(frozen=True)
class Guess:
    """What one volume may be."""

    node: Any
    sequence: str
    source: str
    """FROM_TAGS or FROM_NAME."""
    b: float | None = None
    """s/mm² of a DWI, as far as tags or name tell."""


@dataclass(frozen=True)
class Suggestion:
    """The volumes suggested for one examination; it is the reader who confirms them."""

    chosen: dict[str, Guess] = field(default_factory=dict)
    unclear: tuple[str, ...] = ()
    """Names of volumes that may each be the T2W, of which nothing tells the examinations apart."""

    def __getitem__(self, sequence: str) -> Any:
        """The node, or None."""
        return self.chosen[sequence].node if sequence in self.chosen else None

    @property
    def text(self) -> str:
        """What was chosen by what, to be confirmed."""
        if not self.chosen and self.unclear:
            return _(
                "Not chosen: {names} may each be the T2W of an examination of its own. Choose the three volumes "
                "yourself, or put each examination's volumes into a folder in the Data module."
            ).format(names=", ".join(self.unclear))
        if not self.chosen:
            return ""
        by = _("{sequence} by its {source}")
        told = [by.format(sequence=TITLES[s], source=self.chosen[s].source) for s in SEQUENCES if s in self.chosen]
        missing = [TITLES[s] for s in SEQUENCES if s not in self.chosen]
        if not missing:
            return _("Chosen: {told}. Please check.").format(told=", ".join(told))
        text = _("Chosen: {told}. Not found: {missing}. Please check.")
        return text.format(told=", ".join(told), missing=", ".join(missing))


def suggest() -> Suggestion:
    """The examination of the scene that has most of the three sequences (the latest loaded of equals)."""
    best, unclear = Suggestion(), ()
    for guesses in _by_study().values():
        t2w = [g for g in guesses if g.sequence == "t2w"]
        if len(t2w) > 1 and all(g.source == FROM_NAME for g in t2w):  # ADC and DWI of which? they must not be mixed
            unclear += tuple(g.node.GetName() for g in t2w)
            continue
        chosen = {}
        for sequence in SEQUENCES:
            fitting = [g for g in guesses if g.sequence == sequence]
            if fitting:
                chosen[sequence] = max(fitting, key=_rank)
        if "t2w" in chosen and len(chosen) >= len(best.chosen):
            best = Suggestion(chosen)
    return best if best.chosen else Suggestion(unclear=unclear)


def b_value(node: Any) -> float | None:
    """Of a DWI in s/mm², by its DICOM tags, else by its name ("b1400")."""
    if node is None:
        return None
    frame = _frame(node)
    if frame is not None and frame.b is not None:
        return float(frame.b)
    given = node.GetAttribute("MedRationale.bValue") or ""
    found = re.search(r"(?<![a-z])b[ _=-]?(\d{3,4})(?!\d)", node.GetName(), re.IGNORECASE)
    return float(given) if given else float(found[1]) if found else None


def series_uid(node: Any) -> str | None:
    """Series Instance UID, where the volume came from DICOM."""
    shown = slicer.mrmlScene.GetSubjectHierarchyNode()
    uid = shown.GetItemUID(shown.GetItemByDataNode(node), "DICOM")
    return uid or node.GetAttribute("MedRationale.seriesUID") or None


def _by_study() -> dict[int, list[Guess]]:
    """Item of the study (or folder) -> what its volumes may be."""
    shown = slicer.mrmlScene.GetSubjectHierarchyNode()
    groups: dict[int, list[Guess]] = defaultdict(list)
    for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode"):
        if node.GetHideFromEditors() or node.IsA("vtkMRMLLabelMapVolumeNode") or node.GetAttribute("MedRationale.role"):
            continue
        guess = _guess(node)
        if guess is not None:
            groups[study_item(shown, shown.GetItemByDataNode(node))].append(guess)
    return groups


def study_item(shown: Any, item: int) -> int:
    """The study above an item of the subject hierarchy, else the folder that it lies in."""
    study = shown.GetItemAncestorAtLevel(item, slicer.vtkMRMLSubjectHierarchyConstants.GetDICOMLevelStudy())
    return study or shown.GetItemParent(item) or shown.GetSceneItemID()


def _guess(node: Any) -> Guess | None:
    if node.GetAttribute(SEQUENCE):
        source = FROM_TAGS if node.GetAttribute("MedRationale.seriesUID") else FROM_NAME
        return Guess(node, node.GetAttribute(SEQUENCE), source, b_value(node))
    frame = _frame(node)
    if frame is not None:
        kind = frame.kind[0]
        fits = kind in ("adc", "dwi") or (kind == "t2w" and _axial(node))
        return Guess(node, kind, FROM_TAGS, frame.b) if fits else None
    name = node.GetName()
    sequence = next((s for s, pattern in NAMES if pattern.search(name)), None)
    if sequence is None or not _axial(node) or (sequence == "t2w" and OTHER_PLANES.search(name)):
        return None
    return Guess(node, sequence, FROM_NAME, b_value(node))


def _rank(guess: Guess) -> tuple[bool, float, int]:
    """Tags before names, the highest b-value, then the most slices."""
    return guess.source == FROM_TAGS, guess.b or 0.0, guess.node.GetImageData().GetDimensions()[2]


def _axial(node: Any) -> bool:
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASDirectionMatrix(matrix)
    return node.GetImageData() is not None and abs(matrix.GetElement(2, 2)) >= AXIAL_COSINE


def _frame(node: Any) -> Any:
    """The first DICOM file of a volume as the engine reads it (dicom_frames.Frame); None where there is none."""
    uids = (node.GetAttribute("DICOM.instanceUIDs") or "").split()
    database = getattr(slicer, "dicomDatabase", None)
    path = database.fileForInstance(uids[0]) if uids and database else ""
    if not path:
        return None
    from pydicom.errors import InvalidDicomError

    from MedRationaleLib.dicom_frames import read_frames

    try:
        return read_frames(Path(path))[0]
    except (OSError, ValueError, IndexError, InvalidDicomError) as error:
        logging.info("%s: its DICOM tags could not be read (%s); its name is used", node.GetName(), error)
        return None
