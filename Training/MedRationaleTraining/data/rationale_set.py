"""The rationale set: (image, region, rationale) triples, one JSON object a line.

    {"case": "10005_1000005", "lesion": 1, "rationale": {"zone": "zone_pz", "adc_signal": "adc_normal", ...}}
    {"case": "10005_1000005", "slice": 9, "rationale": {"lesion_presence": "lesion_absent"}}

`lesion` counts the connected lesions (26 neighbours) of the expert's mask by their centres from inferior to superior,
from 1. `slice` counts the T2W's own slices from inferior to superior, from 0; what it describes is that slice's
lesion, or its gland where it has none. What can be measured on the mask (zone, size, extension) may be left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.errors import InputError

PRESENCE, PRESENT, ZONE = "lesion_presence", "lesion_present", "zone"
KEYS = ({"case", "lesion", "rationale"}, {"case", "slice", "rationale"})


@dataclass(frozen=True, kw_only=True)
class Rationale:
    """One line."""

    case: str
    lesion: int | None
    """From 1, from inferior to superior; None where `slice` is given."""
    slice: int | None
    """Of the T2W, from 0, from inferior to superior."""
    answers: Mapping[str, str]
    """Node id -> concept id, as written."""
    line: str
    """"rationales.jsonl, line 3", for messages."""


def read_rationales(path: str | Path, cases: Collection[str], tree: DecisionTree) -> dict[str, tuple[Rationale, ...]]:
    """Case id -> its lines, each checked against the tree; `cases` are the ids that there are.

    Raises InputError with the line's number.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Expected a rationale set of one JSON object a line, got {path}, which cannot be read; check the path."
        ) from error
    found: dict[str, dict[tuple[int | None, int | None], Rationale]] = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        line = f"{path.name}, line {number}"
        rationale = _read(text, line)
        if rationale.case not in cases:
            raise InputError(
                f"{line}: expected the id of one of the set's {len(cases)} examinations, got '{rationale.case}'; "
                "correct it."
            )
        _check(rationale, tree)
        of_case = found.setdefault(rationale.case, {})
        place = (rationale.lesion, rationale.slice)
        if place in of_case:
            raise InputError(f"{line}: expected one line a region, got {of_case[place].line} for it too; remove one.")
        of_case[place] = rationale
    return {case: tuple(of_case.values()) for case, of_case in found.items()}


def _read(text: str, line: str) -> Rationale:
    try:
        data: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"{line}: expected a JSON object, got text that is none ({error}); correct it.") from error
    if not isinstance(data, dict) or set(data) not in KEYS:
        got = ", ".join(data) if isinstance(data, dict) else text[:40]
        raise InputError(f"{line}: expected case, rationale and either lesion or slice, got {got}; correct it.")
    lesion, index, answers = data.get("lesion"), data.get("slice"), data["rationale"]
    number, first = (index, 0) if lesion is None else (lesion, 1)
    if not isinstance(number, int) or isinstance(number, bool) or number < first:
        name = "slice" if lesion is None else "lesion"
        raise InputError(f"{line}: expected {name} as a whole number from {first}, got {number}; correct it.")
    if not isinstance(answers, dict) or not all(isinstance(v, str) for v in answers.values()):
        raise InputError(f"{line}: expected the rationale as node: concept, got {answers}; correct it.")
    return Rationale(case=str(data["case"]), lesion=lesion, slice=index, answers=answers, line=line)


def _check(rationale: Rationale, tree: DecisionTree) -> None:
    """Nodes and concepts exist, and with a zone the path can be walked, whatever is measured later."""
    answers = rationale.answers
    zone = tree.zones.get(answers.get(ZONE, ""))
    for id, concept in answers.items():
        if id not in tree.nodes:
            raise InputError(
                f"{rationale.line}: expected nodes of {tree.id} ({', '.join(tree.nodes)}), got '{id}'; correct it."
            )
        candidates = tree.nodes[id].candidates(zone)
        if concept not in candidates:
            raise InputError(
                f"{rationale.line}: expected one of {', '.join(candidates)} at '{id}', got '{concept}'; correct it."
            )
    if zone is not None or answers.get(PRESENCE) == tree.absent:
        later = {n.id: n.candidates(zone)[0] for n in tree.nodes.values() if n.answered_by == "measurement"}
        walk(rationale, later, tree)


def walk(rationale: Rationale, measured: Mapping[str, str], tree: DecisionTree) -> dict[str, str]:
    """Answers on the whole path: as written, else as measured. Raises InputError where one is missing."""
    try:
        return tree.walk_answers({PRESENCE: PRESENT, **measured, **rationale.answers}).answers
    except InputError as error:
        message = str(error)
        raise InputError(f"{rationale.line}: {message[0].lower()}{message[1:]}") from error
