"""Model folders: config.json, model.safetensors, MODEL_CARD.md. No pickles."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from MedRationaleLib.errors import InputError
from MedRationaleLib.files import atomic_path
from MedRationaleLib.model.config import ModelConfig
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.resources import resource_path

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "MODEL_CARD.md"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model as it was read from its folder."""

    model: RationaleModel
    folder: Path
    sha256: str
    """Of the weights file."""
    postprocessing: dict[str, Any] = field(default_factory=dict)
    """Settings of PostprocessingConfig chosen on the validation split."""
    training: dict[str, Any] = field(default_factory=dict)
    """What the trainer wrote about the run."""
    vocabulary: list[int] = field(default_factory=list)
    """Token ids of open_clip's tokenizer that f_txt knows."""


def save_checkpoint(
    model: RationaleModel,
    folder: Path,
    *,
    card: str,
    vocabulary: list[int],
    postprocessing: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write a model folder, weights in float16; all files go to temporary names first."""
    weights = serialized(model)
    config = {
        "format": FORMAT,
        "model": asdict(model.config),
        "concepts": list(model.concepts),
        "vocabulary": vocabulary,
        "postprocessing": postprocessing or {},
        "training": training or {},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (
        atomic_path(folder / CARD) as card_file,
        atomic_path(folder / CONFIG) as config_file,
        atomic_path(folder / WEIGHTS) as weights_file,
    ):
        weights_file.write_bytes(weights)
        config_file.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        card_file.write_text(card, encoding="utf-8")


def serialized(model: RationaleModel) -> bytes:
    """The weights file's content: every tensor of the state_dict, float16; the same model gives the same bytes."""
    weights = {
        name: tensor.detach().to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    return save(weights)


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
            "`medrationale doctor` lists the models that are there."
        ) from error


def load_checkpoint(
    name_or_path: str | Path = "compact", *, with_text: bool = False, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Read a model folder; a damaged or wrong-shaped one is refused with the reason.

    with_text also builds f_txt and loads its weights (for training and fine-tuning).
    """
    folder = model_folder(name_or_path)
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise InputError(
                f"Expected a model folder of format {FORMAT}, got {data['format']} in {folder}; "
                "use the MedRationale version that wrote it."
            )
        config = ModelConfig.from_dict(data["model"])
        if problem := config.problem():
            raise ValueError(problem)
        concepts, vocabulary = data["concepts"], data["vocabulary"]
        postprocessing, training = dict(data["postprocessing"]), dict(data["training"])
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"Expected the configuration of a MedRationale model in {folder / CONFIG}, got one that cannot be read "
            f"({type(error).__name__}: {error}); restore the folder."
        ) from error
    path = folder / WEIGHTS
    if not path.exists():
        raise InputError(f"Expected {WEIGHTS} beside {folder / CONFIG}, found none; restore the folder.")
    try:
        content = path.read_bytes()
        weights = load(content)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"Expected weights in safetensors format in {path}, got a damaged file ({error}); restore it."
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    model = RationaleModel(config, concepts)
    if with_text:
        model.attach_text(vocabulary)
    else:
        weights = {k: v for k, v in weights.items() if not k.startswith("f_txt.")}
    _check_shapes(model, weights, path)
    if data.get("weights_sha256", sha256) != sha256:
        raise InputError(
            f"Expected the weights that were written with {folder / CONFIG}, got a file with another SHA-256 "
            f"({sha256[:12]}...); restore the folder."
        )
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return Checkpoint(
        model=model.to(device).eval(),
        folder=folder,
        sha256=sha256,
        postprocessing=postprocessing,
        training=training,
        vocabulary=vocabulary,
    )


def _check_shapes(model: RationaleModel, weights: dict[str, torch.Tensor], path: Path) -> None:
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    got = {k: tuple(v.shape) for k, v in weights.items()}
    if expected == got:
        return
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    shapes = [f"{k} {got[k]} instead of {expected[k]}" for k in expected.keys() & got.keys() if expected[k] != got[k]]
    parts = [
        f"{len(items)} {what} (such as {items[0]})"
        for what, items in (("missing", missing), ("unexpected", extra), ("of another shape", sorted(shapes)))
        if items
    ]
    raise InputError(
        f"Expected the weights that {CONFIG} describes in {path}, got {' and '.join(parts)}; "
        "the two files are not of the same model."
    )
