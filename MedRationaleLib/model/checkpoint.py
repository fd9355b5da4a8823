"""Model folders: config.json, model.safetensors, MODEL_CARD.md. No pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from MedRationaleLib.errors import InputError
from MedRationaleLib.files import atomic_path, file_sha256
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.model_folders import (
    CARD,
    CONFIG,
    FORMAT,
    TEXT,
    TEXT_FILES,
    WEIGHTS,
    ModelSettings,
    model_folder,
    read_settings,
)


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
    """What the trainer wrote about the run, or the import about its files (under "imported")."""
    vocabulary: list[int] = field(default_factory=list)
    """Token ids of open_clip's tokenizer that f_txt knows."""
    warning: str | None = None
    """What a reader of results has to know of the model first."""


def save_checkpoint(
    model: RationaleModel,
    folder: Path,
    *,
    card: str,
    vocabulary: list[int],
    postprocessing: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    precision: torch.dtype = torch.float16,
) -> None:
    """Write a model folder; all files go to temporary names first.

    With a text tower of BERT's, its tokenizer's files are copied into the folder `text`, so that training can go on
    from the folder alone.
    """
    texts = _text_files(model)
    text = replace(model.config.text, folder=TEXT if texts else None)
    (folder / TEXT if texts else folder).mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        names = (CARD, CONFIG, WEIGHTS, *(f"{TEXT}/{name}" for name in texts))
        paths = {name: files.enter_context(atomic_path(folder / name)) for name in names}
        save_file(_tensors(model, precision), paths[WEIGHTS])
        config = {
            "format": FORMAT,
            "model": asdict(replace(model.config, text=text)),
            "concepts": list(model.concepts),
            "vocabulary": vocabulary,
            "postprocessing": postprocessing or {},
            "training": training or {},
            "weights_sha256": file_sha256(paths[WEIGHTS]),
        }
        paths[CONFIG].write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        paths[CARD].write_text(card, encoding="utf-8")
        for name, content in texts.items():
            paths[f"{TEXT}/{name}"].write_bytes(content)


def serialized(model: RationaleModel) -> bytes:
    """The weights file's content in float16: the same model gives the same bytes."""
    return save(_tensors(model, torch.float16))


def _tensors(model: RationaleModel, precision: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the state_dict as it is stored."""
    return {
        name: tensor.detach().to("cpu", precision if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }


def _text_files(model: RationaleModel) -> dict[str, bytes]:
    source = model.config.text.folder
    if model.f_txt is None or source is None:
        return {}
    return {name: path.read_bytes() for name in TEXT_FILES if (path := Path(source, name)).is_file()}


def load_checkpoint(
    name_or_path: str | Path = "compact", *, with_text: bool = False, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Read a model folder; a damaged or wrong-shaped one is refused with the reason.

    with_text also builds f_txt and loads its weights (for training and fine-tuning).
    """
    settings = read_settings(model_folder(name_or_path))
    model, weights = read_weights(settings, with_text=with_text)
    sha256 = file_sha256(settings.folder / WEIGHTS)
    if (settings.weights_sha256 or sha256) != sha256:
        raise InputError(
            f"Expected the weights that were written with {settings.folder / CONFIG}, got a file with another SHA-256 "
            f"({sha256[:12]}...); restore the folder."
        )
    model.load_state_dict(weights)
    return Checkpoint(
        model=model.to(device).eval(),
        folder=settings.folder,
        sha256=sha256,
        postprocessing=settings.postprocessing,
        training=settings.training,
        vocabulary=settings.vocabulary,
        warning=settings.warning,
    )


def read_weights(settings: ModelSettings, *, with_text: bool) -> tuple[RationaleModel, dict[str, Tensor]]:
    """The model of these settings with random weights, and those of the folder in float32, which fit it."""
    path = settings.folder / WEIGHTS
    if not path.exists():
        raise InputError(f"Expected {WEIGHTS} beside {settings.folder / CONFIG}, found none; restore the folder.")
    try:
        with safe_open(path, framework="pt") as file:  # maps the file: what is not asked for is not read
            names = [name for name in file.keys() if with_text or not name.startswith("f_txt.")]  # noqa: SIM118
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"Expected weights in safetensors format in {path}, got a damaged file ({error}); restore it."
        ) from error
    model = RationaleModel(settings.model, settings.concepts)
    if with_text:
        model.attach_text(settings.vocabulary)
    expected = model.state_dict()
    for name in settings.newer_tensors:
        weights.setdefault(name, expected[name])
    _check_shapes(expected, weights, path)
    return model, {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}


def _check_shapes(model: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    expected = {k: tuple(v.shape) for k, v in model.items()}
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
