"""The concept bank: the clinical phrases a rationale is made of, with their phrasings and their codes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jsonschema
import yaml

from MedRationaleLib.errors import InputError
from MedRationaleLib.resources import resource_path

Zone = Literal["PZ", "TZ"]
ZONES: tuple[Zone, ...] = ("PZ", "TZ")


@dataclass(frozen=True, kw_only=True)
class Code:
    """One coded concept of DICOM PS3.16."""

    scheme: str
    """Coding scheme designator: DCM, SCT or RADLEX."""
    value: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One clinical phrase of the lexicon."""

    id: str
    node: str
    """Id of the decision tree's node that it can answer."""
    phrasings: tuple[str, ...]
    """Phrasings that hold wherever the concept is used; the first is shown to the reader."""
    zone: Zone | None
    """The only zone in which it is used; None means both."""
    sequence: Literal["t2w", "adc", "dwi", "dce"] | None
    """The sequence it describes; None means none or all of them."""
    code: Code | None
    """None where DICOM has no code for it."""
    phrasings_by_zone: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further phrasings that hold in one zone only."""

    @property
    def text(self) -> str:
        """The concept in words, as it is shown to the reader."""
        return self.phrasings[0]

    def phrasings_for(self, zone: Zone | None) -> tuple[str, ...]:
        """All phrasings that hold in a zone; with None, those that hold in any."""
        return self.phrasings + (tuple(self.phrasings_by_zone.get(zone, ())) if zone else ())

    @property
    def all_phrasings(self) -> tuple[str, ...]:
        """Every phrasing once, those of one zone included."""
        return tuple(dict.fromkeys(text for zone in ZONES for text in self.phrasings_for(zone)))


class ConceptBank(Mapping[str, Concept]):
    """All concepts of one organ by their id, in the order of the file."""

    def __init__(
        self, id: str, concepts: Mapping[str, Concept], assessment_codes: Mapping[str, Mapping[str, Code]] | None = None
    ) -> None:
        self.id = id
        self._concepts = MappingProxyType(dict(concepts))
        self.assessment_codes = assessment_codes or {}
        """Codes of the scores: "overall", "lesion", "t2w_pz", "t2w_tz", "dwi" -> "1" .. "5", "X" -> Code."""

    @classmethod
    def load(cls, path: str | Path | None = None) -> ConceptBank:
        """Read and validate a concept bank; without a path, the prostate's."""
        path = Path(path) if path is not None else resource_path("Concepts/prostate.yaml")
        data = read_yaml(path, "concepts.schema.json")
        concepts: dict[str, Concept] = {}
        phrasing_of: dict[str, str] = {}
        for entry in data["concepts"]:
            by_zone = {zone: tuple(texts) for zone, texts in entry.pop("phrasings_by_zone", {}).items()}
            code = entry.pop("code")
            concept = Concept(
                **(entry | {"phrasings": tuple(entry["phrasings"])}),
                code=Code(**code) if code else None,
                phrasings_by_zone=by_zone,
            )
            if concept.id in concepts:
                raise InputError(
                    f"{path.name}: expected every concept once, got '{concept.id}' twice; remove or rename one of them."
                )
            for text in (*concept.phrasings, *(text for texts in by_zone.values() for text in texts)):
                if text.casefold() in phrasing_of:
                    raise InputError(
                        f"{path.name}: expected every phrasing to name one concept, got '{text}' for both "
                        f"'{phrasing_of[text.casefold()]}' and '{concept.id}'; reword one of them."
                    )
                phrasing_of[text.casefold()] = concept.id
            concepts[concept.id] = concept
        codes = {
            table: {score: Code(**code) for score, code in rows.items()}
            for table, rows in data.get("assessment_codes", {}).items()
        }
        return cls(data["id"], concepts, codes)

    def __getitem__(self, id: str) -> Concept:
        return self._concepts[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._concepts)

    def __len__(self) -> int:
        return len(self._concepts)

    def for_node(self, node: str, zone: Zone | None = None) -> tuple[Concept, ...]:
        """The concepts that can answer a node; with a zone, only those that are used in it."""
        return tuple(c for c in self.values() if c.node == node and (zone is None or c.zone in (None, zone)))


def read_yaml(path: Path, schema: str) -> Any:
    """Read a YAML file and check it against a schema of Resources/Schemas."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"Expected a readable YAML file at {path}, got '{error.strerror}'; check the path and its permissions."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path.name}: expected YAML in UTF-8, got '{reason}'; correct the file there.") from error
    rules = json.loads(resource_path(f"Schemas/{schema}").read_text(encoding="utf-8"))
    fault = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(rules).iter_errors(data))
    if fault is not None:
        where = "/".join(str(part) for part in fault.absolute_path) or "the top level"
        raise InputError(
            f"{path.name}: expected a file that follows {schema}, got {fault.message[:200]} at {where}; "
            "correct it there."
        )
    return data
