"""Model folders as they lie on disk: where they are and what they say of themselves. No torch: a list comes at once."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from MedRationaleLib.errors import InputError
from MedRationaleLib.model.config import ModelConfig
from MedRationaleLib.resources import resource_path

FORMAT = 2
"""Of config.json. 1: without `heatmap` that of 0.1.0, whose heat was max(cos, 0) and whose lesions were chosen by their
highest probability alone. 2: the text tower's tokenizer may lie in the folder `text` of the model's."""
WEIGHTS, CONFIG, CARD, TEXT = "model.safetensors", "config.json", "MODEL_CARD.md", "text"
TEXT_FILES = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What BERT's tokenizer and sizes are read from; the folder `text` has those of them that there are."""
UNTRAINED = (
    "The model '{name}' was imported and not fine-tuned: its projection into the shared space is random, and its mask "
    "tokens stand for no class yet, so that findings and reasons mean nothing. It is a starting point for training."
)

State = Literal["trained", "imported, not trained", "not trained"]


def check_new(out: Path) -> None:
    """Refuse a folder that holds anything: a model that was trained in it must not be lost."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"Expected a new folder for the model, got {out}, which is not empty; choose another name.")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What config.json of a model folder says, in the words of today's format."""

    folder: Path
    format: int
    """As stored; what is older is read as if it were FORMAT."""
    model: ModelConfig
    """Its `text.folder`, where there is one, is an absolute path."""
    concepts: tuple[str, ...]
    vocabulary: list[int] = field(default_factory=list)
    postprocessing: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    """None in folders written before it was kept."""
    newer_tensors: tuple[str, ...] = ()
    """Tensors that did not exist in the stored format; they keep their initial values, which nothing reads there."""

    @property
    def state(self) -> State:
        """Whether training has made anything of these weights."""
        if self.training.get("steps"):
            return "trained"
        return "imported, not trained" if "imported" in self.training else "not trained"

    @property
    def warning(self) -> str | None:
        """What a reader of results has to know of the model first; None where it was trained."""
        return UNTRAINED.format(name=self.model.name) if self.state == "imported, not trained" else None


def model_folder(name_or_path: str | Path) -> Path:
    """A folder of that path, or else of that name under Resources/Models."""
    path = Path(name_or_path)
    if (path / CONFIG).exists():
        return path
    try:
        return resource_path(f"Models/{name_or_path}/{CONFIG}").parent
    except InputError as error:
        raise InputError(
            f"Expected a model folder with {CONFIG} at {path}, or a shipped model of that name, found neither; "
            "`medrationale model list` lists the models that are there."
        ) from error


def model_folders(given: Sequence[Path] = ()) -> tuple[list[Path], list[str]]:
    """The shipped models, then those given (model folders, or folders of them), and why there is none in others."""
    problems = []
    found = [path.parent for path in sorted(resource_path("Models").glob(f"*/{CONFIG}"))]
    for path in given:
        inside = [path]
        if not (path / CONFIG).exists():
            below = [config.parent for config in sorted(path.glob(f"*/{CONFIG}"))]
            inside = [
                p for p in below if (p / WEIGHTS).exists() or (p / CARD).exists()
            ]  # others have a config.json, too
        if not inside:
            problems.append(f"Expected a model folder, or a folder of model folders, got {path}; none is there.")
        found += inside
    return list(dict.fromkeys(found)), problems


def read_settings(folder: Path) -> ModelSettings:
    """Read and check config.json; a folder of an earlier format is brought to today's, a later one is refused."""
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stored = data["format"]
        if stored not in range(1, FORMAT + 1):
            written = data.get("training", {}).get("medrationale")
            by = f", written by MedRationale {written}," if written else ""
            raise InputError(
                f"Expected a model folder of format {FORMAT} or earlier, got {stored} in {folder}{by} which this "
                "version does not know; use the MedRationale version that wrote it, or a later one."
            )
        newer_tensors = _from_first_format(data) if stored == 1 else ()
        model = ModelConfig.from_dict(data["model"])
        if problem := model.problem():
            raise ValueError(problem)
        if model.text.folder is not None:
            text = str((folder / model.text.folder).absolute())
            model = replace(model, text=replace(model.text, folder=text))
        return ModelSettings(
            folder=folder,
            format=stored,
            model=model,
            concepts=tuple(data["concepts"]),
            vocabulary=list(data["vocabulary"]),
            postprocessing=dict(data["postprocessing"]),
            training=dict(data["training"]),
            weights_sha256=data.get("weights_sha256"),
            newer_tensors=newer_tensors,
        )
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"Expected the configuration of a MedRationale model in {path}, got one that cannot be read "
            f"({type(error).__name__}: {error}); restore the folder."
        ) from error


def _from_first_format(data: dict[str, Any]) -> tuple[str, ...]:
    """Change format 1 to 2 in place; returns the tensors that its weights may lack."""
    postprocessing = data["postprocessing"]
    if "lesion_peak" in postprocessing:  # a likelihood that was fitted to nothing is the highest probability
        postprocessing["lesion_likelihood"] = postprocessing.pop("lesion_peak")
    if "heatmap" in data["model"]:
        return ()
    data["model"]["heatmap"] = "relu"
    return ("heat_scale", "heat_bias")


def card_section(folder: Path, title: str) -> str:
    """The text under a heading of the second level of MODEL_CARD.md; empty where there is none."""
    try:
        card = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def licence(folder: Path) -> str:
    """The terms that the card names, without their reasons: "CC BY-NC 4.0"."""
    words = " ".join(card_section(folder, "Licence").split())
    return re.split(r"[,;:.](?: |$)", words)[0] or "not stated"


def parts_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Part of the model in words -> its parameters, by the shapes of a weights file."""
    names = {
        "f_img": "image encoder",
        "detail": "pyramid of convolutions",
        "f_mask": "mask decoder",
        "projection": "projection into the shared space",
        "f_txt": "text tower",
        "concept_embeddings": "concept embeddings",
    }
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        part = names.get(name.partition(".")[0])
        if part is not None:
            parts[part] = parts.get(part, 0) + math.prod(shape)
    return {part: parts[part] for part in names.values() if part in parts}
