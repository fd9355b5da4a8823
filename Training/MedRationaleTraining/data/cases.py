"""Real examinations as every reader gives them: where the files are, and what the numbers in the masks mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from MedRationaleLib.errors import InputError
from MedRationaleLib.model.config import CLASSES


@dataclass(frozen=True, kw_only=True)
class Labels:
    """One file of masks."""

    path: Path
    values: Mapping[str, tuple[int, ...]]
    """Class (of CLASSES) -> the values that mean it; empty: every value above 0."""
    on_t2w: bool = True
    """The set promises masks on the T2W's own grid, so another grid is an error; False: they are resampled."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One examination. Nothing is read before it is prepared."""

    id: str
    """Unique within the set; the name of its folder in a prepared set and of its lines in a rationale set."""
    patient: str
    """Examinations of one patient never part."""
    t2w: Path
    adc: Path | None = None
    dwi: Path | None = None
    volumes: Mapping[str, int] = field(default_factory=dict)
    """Sequence -> which volume of a 4-D file it is; empty where every file holds one volume."""
    labels: tuple[Labels, ...] = ()
    split: str | None = None
    """Of the set's own or of the project's split."""
    fold: int | None = None
    """Of the set's own cross-validation."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What the set's table says of it, word for word."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of CLASSES that somebody labelled; PZ and TZ together are the gland."""
        given = {name for labels in self.labels for name in labels.values}
        if {"pz", "tz"} <= given:
            given.add("gland")
        return tuple(name for name in CLASSES if name in given)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it takes to prepare it."""
        images = (path for path in (self.t2w, self.adc, self.dwi) if path is not None)
        return tuple(dict.fromkeys((*images, *(labels.path for labels in self.labels))))


class Reader(Protocol):
    """A data set in its official layout."""

    name: str
    """As the command line calls it."""
    settings: Mapping[str, Any]
    """Which part of the set was chosen; no paths. Goes into config.json."""

    def cases(self) -> list[Case]:
        """The chosen examinations, complete; raises InputError where the download is not."""

    def ids(self) -> frozenset[str]:
        """Of all examinations of the set, chosen or not."""


def check_complete(cases: Sequence[Case], folder: Path, remedy: str) -> list[Case]:
    """The cases, if there are any and all their files exist and are not empty; else one InputError for all."""
    if not cases:
        raise InputError(f"Expected examinations of the chosen part in {folder}, got none; choose another part.")
    lacking = [
        (case, missing)
        for case in cases
        if (missing := [path for path in case.files if not path.is_file() or not path.stat().st_size])
    ]
    if lacking:
        first, missing = lacking[0]
        words = f"{len(lacking)} are incomplete, the first is" if len(lacking) > 1 else "incomplete is"
        raise InputError(
            f"Expected {len(cases)} complete examinations in {folder}, got {len(cases) - len(lacking)}: {words} "
            f"{first.id} (no {', '.join(path.name for path in missing)} in {missing[0].parent}); {remedy}."
        )
    return list(cases)
