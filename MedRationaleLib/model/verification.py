"""Whether a model folder is whole and what it says it is."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import InvalidVersion, Version
from safetensors import SafetensorError, safe_open
from torch import Tensor

from MedRationaleLib import __version__
from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import file_sha256
from MedRationaleLib.model.checkpoint import read_weights
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.model.text_encoder import TextEncoder
from MedRationaleLib.model_folders import CARD, FORMAT, WEIGHTS, ModelSettings, read_settings
from MedRationaleLib.postprocessing import PostprocessingConfig

UNIT_LENGTH = 2e-3
"""How far a stored embedding's length may be from 1; float16 leaves 5e-4."""
SAME_EMBEDDING = 1e-2
"""Greatest distance of a stored embedding from the one that the stored text tower gives."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool | None
    """None where it could not be looked at."""
    detail: str


def verify(folder: Path) -> list[Check]:
    """Look at everything that can be told from a model folder; nothing is raised for what is wrong with it."""
    try:
        settings = read_settings(folder)
    except InputError as error:
        return [Check(name="configuration", passed=False, detail=str(error))]
    read_as = "" if settings.format == FORMAT else f", read as {FORMAT}"
    checks = [
        Check(name="configuration", passed=True, detail=f"format {settings.format}{read_as}"),
        _version(settings),
        _hash(settings),
    ]
    without_text = _reason_against_text(folder)
    try:
        model, weights = read_weights(settings, with_text=not without_text)
    except InputError as error:
        checks.append(Check(name="tensors", passed=False, detail=str(error)))
    else:
        detail = f"{len(weights)} of the names and shapes expected{without_text}"
        checks.append(Check(name="tensors", passed=True, detail=detail))
        checks.append(_values(weights))
        if checks[-1].passed:
            model.load_state_dict(weights)
            checks.append(_embeddings(model.eval()))
    return [*checks, _concepts(settings), _postprocessing(settings), _card(folder)]


def _reason_against_text(folder: Path) -> str:
    """Why the text tower cannot be looked at; empty where it can."""
    if not all(importlib.util.find_spec(name) for name in ("open_clip", "transformers")):
        return "; the text tower was not looked at, which needs the train extra"
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            stored = any(name.startswith("f_txt.") for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError):
        return ""  # read_weights says what is wrong
    return "" if stored else "; no text tower is stored, so that training cannot go on from it"


def _version(settings: ModelSettings) -> Check:
    written = settings.training.get("medrationale")
    detail = f"written by MedRationale {written}" if written else "does not say which MedRationale wrote it"
    try:
        newer = bool(written) and Version(str(written)) > Version(__version__)
    except InvalidVersion:
        newer = False
    return Check(name="version", passed=True, detail=detail + (f", newer than this {__version__}" if newer else ""))


def _hash(settings: ModelSettings) -> Check:
    path = settings.folder / WEIGHTS
    if not path.is_file():
        return Check(name="hash", passed=False, detail=f"there is no {WEIGHTS}")
    got, expected = file_sha256(path), settings.weights_sha256
    if expected is None:
        return Check(name="hash", passed=None, detail=f"SHA-256 {got}; the configuration has none to compare with")
    if got != expected:
        return Check(name="hash", passed=False, detail=f"expected SHA-256 {expected}, got {got}")
    return Check(name="hash", passed=True, detail=f"SHA-256 {got}")


def _values(weights: dict[str, Tensor]) -> Check:
    wrong = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if wrong:
        return Check(name="values", passed=False, detail=f"not finite in {', '.join(wrong[:3])}")
    return Check(
        name="values", passed=True, detail=f"{sum(t.numel() for t in weights.values()) / 1e6:.1f} M, all finite"
    )


def _embeddings(model: RationaleModel) -> Check:
    """Those stored are of unit length, and of the stored text tower, where it could be built."""
    stored, name = model.concept_embeddings, "embeddings"
    if (off := float((stored.norm(dim=1) - 1).abs().max())) > UNIT_LENGTH:
        return Check(name=name, passed=False, detail=f"the concepts' lengths are off 1 by up to {off:.3g}")
    bank = ConceptBank.load()
    if model.f_txt is None or model.concepts != tuple(bank) or not _has_tokenizer(model):
        return Check(name=name, passed=None, detail="of unit length; not compared with the text tower's")
    assert isinstance(model.f_txt, TextEncoder)
    distance = float((model.f_txt.concept_embeddings(bank) - stored).norm(dim=1).max())
    detail = f"of unit length, up to {distance:.1g} from what the stored text tower gives"
    return Check(name=name, passed=distance <= SAME_EMBEDDING, detail=detail)


def _has_tokenizer(model: RationaleModel) -> bool:
    return model.config.text.kind == "clip" or model.config.text.folder is not None


def _concepts(settings: ModelSettings) -> Check:
    bank = ConceptBank.load()
    if unknown := [concept for concept in bank if concept not in settings.concepts]:
        return Check(name="concepts", passed=False, detail=f"does not know {', '.join(unknown)}")
    beyond = len(settings.concepts) - len(bank)
    more = f", and {beyond} that this version does not ask for" if beyond else ""
    return Check(name="concepts", passed=True, detail=f"all {len(bank)} of the concept bank{more}")


def _postprocessing(settings: ModelSettings) -> Check:
    try:
        PostprocessingConfig(**settings.postprocessing)
    except TypeError as error:
        return Check(name="thresholds", passed=False, detail=str(error).partition("__init__() ")[2] or str(error))
    return Check(name="thresholds", passed=True, detail=f"{len(settings.postprocessing)} of its own")


def _card(folder: Path) -> Check:
    there = (folder / CARD).is_file()
    return Check(name="card", passed=there, detail=CARD if there else f"there is no {CARD}")
