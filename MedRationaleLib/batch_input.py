"""Which examinations a batch has: the subfolders of a folder, the prefixes of its files, or the rows of a manifest.

Nothing is read here but names and the manifest, so that a damaged examination fails when its turn comes, and alone.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import cast, get_args

from MedRationaleLib.arguments import MOST_B_VALUE, MOST_PSA
from MedRationaleLib.decision_tree import Dce
from MedRationaleLib.dicom_stacks import _files as files_below
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import written_files
from MedRationaleLib.image_files import SUFFIXES
from MedRationaleLib.serialization import SEGMENTATION_FILE
from MedRationaleLib.study import CASE_SUFFIXES, NAMES, Study

SUMMARY_FILE, SUMMARY_START = "summary.csv", "id,status,error,"
"""The name of a batch's table, and how it begins."""
MANIFEST_KINDS = {"t2w": {"t2w", "adc", "dwi", "b_value"}, "case": {"case", "b_value"}, "dicom": {"dicom"}}
"""The column that a manifest must have besides `id` -> the columns that it may have, besides CLINICAL."""
CLINICAL = {"psa", "dce"}
"""Columns of any manifest: PSA in ng/ml, and a reader's verdict on contrast enhancement."""
MANIFEST_COLUMNS = (
    "id and t2w (with adc, dwi, b_value), or id and case (with b_value), or id and dicom, and psa and dce where they "
    "are known"
)
FOLDER_NAME = re.compile(r"""[^\s./\\:*?"<>|][^/\\:*?"<>|\x00-\x1f]*(?<![\s.])""")
"""What can be the name of a result folder on every system, and is not hidden."""

_IMAGE = re.compile(rf"(.+?)({'|'.join(map(re.escape, SUFFIXES))})", re.IGNORECASE)
_SEQUENCE = re.compile(rf"(?:(.+)_)?({'|'.join(sum(CASE_SUFFIXES.values(), ()))})", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class StudySource:
    """One examination of a batch, not read yet."""

    id: str
    """Also the name of its result folder."""
    read: Callable[[], Study]
    paths: tuple[Path, ...]
    """The files or the folder that it is read from."""
    row: str = ""
    """Its row of the manifest: which sequence each file is, and what is known besides."""
    dce: Dce = "not available"
    """A reader's verdict on contrast enhancement."""

    def fingerprint(self) -> str:
        """SHA-256 over the name, size and time of change of the files that it may be read from, and its manifest row.

        Contents are not read: a DICOM archive has a thousand times what the names have. A copy that got new times of
        change counts as changed.
        """
        digest = hashlib.sha256(self.row.encode())
        for path in self.paths:
            for file in files_below(path) if path.is_dir() else [path]:
                if file.name.startswith("."):  # what a desktop puts there when somebody looks into the folder
                    continue
                name = file.relative_to(path.parent).as_posix()
                state = file.stat() if file.is_file() else None
                size, changed = (state.st_size, state.st_mtime_ns) if state else (None, None)
                digest.update(f"{name}|{size}|{changed}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def find_studies(given: Path, output: Path) -> tuple[StudySource, ...]:
    """The examinations of a folder or of a CSV manifest. Results must not land among them, so `output` is checked too.

    Raises InputError where there are none, where two have one id, or where the manifest is wrong.
    """
    if given.is_dir():
        sources = tuple(_from_folder(given, output))
        if not sources:
            raise InputError(
                f"Expected examinations in {given} (a subfolder each, or files like 10000_1000000_t2w.mha), got none; "
                "one examination alone is read by `medrationale predict`."
            )
    elif given.is_file() and given.suffix.lower() == ".csv":
        sources = tuple(_from_manifest(given))
        if not sources:
            raise InputError(f"Expected a row for each examination in {given}, got none; add them.")
    else:
        got = "a file of another kind" if given.exists() else "nothing there"
        raise InputError(f"Expected a folder of examinations or a manifest.csv at {given}, got {got}; check the path.")
    seen: dict[str, StudySource] = {}
    for source in sources:
        other = seen.setdefault(source.id.casefold(), source)  # one folder on systems that do not tell A from a
        if other is not source:
            raise InputError(
                f"Expected another id for each examination in {given}, got '{source.id}' twice (for "
                f"{other.paths[0]} and for {source.paths[0]}); rename one."
            )
    _check_apart(sources, output)
    return sources


def is_summary(path: Path) -> bool:
    """Whether a batch wrote this file."""
    return path.is_file() and path.read_bytes().startswith(SUMMARY_START.encode())


def _check_apart(sources: Sequence[StudySource], output: Path) -> None:
    """Refuse an output folder where results would land in an examination's own folder, or above it."""
    inputs = {path.resolve() for source in sources for path in source.paths}
    above = inputs.union(*(path.parents for path in inputs))
    for source in sources:
        target = (output / source.id).resolve()
        if target in above or not inputs.isdisjoint(target.parents):
            raise InputError(
                f"Expected an output folder apart from the examinations, got {output}, where the results of "
                f"'{source.id}' would lie among input files; choose another folder."
            )


def _from_folder(folder: Path, output: Path) -> Iterator[StudySource]:
    yield from _by_prefix(folder, _prefixes(folder))
    for sub in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        try:
            yield from tuple(_from_subfolder(sub, output))
        except OSError:  # one that may not be looked into fails when its turn comes
            yield StudySource(id=sub.name, read=partial(Study.from_case, sub), paths=(sub,))


def _from_subfolder(folder: Path, output: Path) -> Iterator[StudySource]:
    prefixes = _prefixes(folder)
    images = [path for path in folder.iterdir() if _IMAGE.fullmatch(path.name) and path.name != SEGMENTATION_FILE]
    if _several(prefixes):
        yield from _by_prefix(folder, prefixes)
    elif images:
        yield StudySource(id=folder.name, read=partial(Study.from_case, folder), paths=(folder,))
    elif not _holds_results(folder, output):
        yield StudySource(id=folder.name, read=partial(Study.from_dicom, folder), paths=(folder,))


def _holds_results(folder: Path, output: Path) -> bool:
    """Whether a folder without images has what an earlier run wrote and no more, or is for this run's results."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    written = {Path(name).parts[0] for name in written_files(folder)}
    empty = not names and folder.resolve() == output.resolve()
    return empty or (bool(written) and names <= written) or is_summary(folder / SUMMARY_FILE)


def _prefixes(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """Prefix -> (ending, file) of the files `<prefix>_<ending>.<suffix>` with an ending of CASE_SUFFIXES."""
    found: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        image = _IMAGE.fullmatch(path.name)
        if image and (parts := _SEQUENCE.fullmatch(image[1])):
            found[parts[1] or ""].append((parts[2].lower(), path))
    return found


def _several(prefixes: Mapping[str, Sequence[tuple[str, Path]]]) -> bool:
    """Whether two prefixes have the same sequence, as where an archive has all examinations of a patient in a folder.

    A file without a prefix makes it one examination, whose reader says which file is one too many.
    """
    endings = [ending for files in prefixes.values() for ending in {ending for ending, _ in files}]
    return "" not in prefixes and len(set(endings)) < len(endings)


def _by_prefix(folder: Path, prefixes: Mapping[str, Sequence[tuple[str, Path]]]) -> Iterator[StudySource]:
    for prefix, files in prefixes.items():
        paths = tuple(path for _, path in files)
        name = prefix or folder.resolve().name
        yield StudySource(id=name, read=partial(_read_prefix, folder, name, files), paths=paths)


def _read_prefix(folder: Path, name: str, files: Sequence[tuple[str, Path]]) -> Study:
    given: dict[str, Path] = {}
    for sequence, endings in CASE_SUFFIXES.items():
        for ending in endings:
            matches = [path for found, path in files if found == ending]
            if len(matches) > 1:
                names = " and ".join(path.name for path in matches)
                raise InputError(f"{NAMES[sequence]}: expected one file in {folder}, got {names}; move one away.")
            if matches:
                given.setdefault(sequence, matches[0])
    identity = re.fullmatch(r"(\d+)_(\d+)", name)
    patient = {"id": identity[1], "study_id": identity[2]} if identity else {"id": name}
    return _read_files(given, None, patient, folder)


def _read_files(given: Mapping[str, Path], b_value: float | None, patient: Mapping[str, str], where: Path) -> Study:
    if "t2w" not in given:
        got = " and ".join(NAMES[name] for name in given) or "nothing"
        raise InputError(f"T2W: expected an axial T2W of '{patient['id']}', got {got} only; add it to {where}.")
    return Study.from_files(
        t2w=given["t2w"], adc=given.get("adc"), dwi=given.get("dwi"), b_value=b_value, patient=patient
    )


def _from_manifest(path: Path) -> Iterator[StudySource]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            columns = [name.strip() for name in next(lines, [])]
            rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Expected {path} to be a CSV file in UTF-8, got {error}; save it as one.") from error
    given = set(columns) - CLINICAL
    kinds = [kind for kind, others in MANIFEST_KINDS.items() if {kind, "id"} <= given <= others | {"id"}]
    if not kinds or len(set(columns)) < len(columns):
        got = ", ".join(columns) or "an empty file"
        hint = "save it with commas between the columns" if ";" in got else "correct its first line"
        raise InputError(f"Expected the columns {MANIFEST_COLUMNS}, got {got} in {path}; {hint}.")
    sources, mistakes = [], {}
    for line, cells in rows:
        try:
            if len(cells) > len(columns):
                raise InputError(
                    f"Expected {len(columns)} cells in line {line} of {path}, got {len(cells)}; put a cell that holds "
                    "a comma into quotation marks."
                )
            row = dict(zip_longest(columns, cells, fillvalue=""))
            sources.append(_from_row(row, kinds[0], path, line))
        except InputError as error:
            mistakes[line] = str(error)
    if mistakes:
        first, *others = mistakes
        word = "line" if len(others) == 1 else "lines"
        also = f" Also wrong: {word} {', '.join(map(str, others))}." if others else ""
        raise InputError(mistakes[first] + also)
    yield from sources


def _from_row(row: dict[str, str], kind: str, manifest: Path, line: int) -> StudySource:
    name, where = row["id"], f"line {line} of {manifest}"
    if not FOLDER_NAME.fullmatch(name) or name.casefold() == SUMMARY_FILE:
        raise InputError(f"Expected an id that can name a folder in {where}, got '{name}'; choose another.")
    b_value = _number(row, "b_value", f"b-value above 0 and up to {MOST_B_VALUE:,} s/mm²", MOST_B_VALUE, where)
    psa = _number(row, "psa", f"PSA above 0 and up to {MOST_PSA:,} ng/ml", MOST_PSA, where)
    dce = row.get("dce", "").lower().replace("-", " ") or "not available"
    if dce not in get_args(Dce):
        raise InputError(f"Expected a DCE that is positive, negative or empty in {where}, got '{dce}'; correct it.")
    given = {key: manifest.parent / row[key] for key in ("t2w", "adc", "dwi", "case", "dicom") if row.get(key)}
    if not given:
        raise InputError(f"Expected a path in {where}, got none for '{name}'; add it or remove the line.")
    if kind == "t2w" and b_value is not None and "dwi" not in given:
        raise InputError(f"Expected a DWI beside the b-value in {where}, got none; add it or leave the b-value empty.")
    read: Callable[[], Study]
    if kind == "dicom":
        read = partial(Study.from_dicom, given["dicom"])
    elif kind == "case":
        read = partial(Study.from_case, given["case"], b_value=b_value)
    else:
        read = partial(_read_files, given, b_value, {"id": name}, manifest)
    told = ",".join(f"{key}={value}" for key, value in sorted(row.items()) if value)
    known = read if psa is None else lambda: read().with_psa(psa)
    return StudySource(id=name, read=known, paths=tuple(given.values()), row=told, dce=cast(Dce, dce))


def _number(row: Mapping[str, str], column: str, expected: str, most: float, where: str) -> float | None:
    text = row.get(column, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        raise InputError(f"Expected a {expected} in {where}, got '{text}'; correct it.")
    return value
