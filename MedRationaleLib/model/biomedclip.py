"""BiomedCLIP's text tower out of a folder of its published files, as starting values of f_txt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from MedRationaleLib.errors import InputError
from MedRationaleLib.files import file_sha256
from MedRationaleLib.hub import BIOMEDCLIP
from MedRationaleLib.model.config import TextConfig
from MedRationaleLib.model.weight_files import Taken, read_tensors
from MedRationaleLib.model_folders import TEXT_FILES

REPOSITORY = BIOMEDCLIP.name
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_pytorch_model.bin"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", WEIGHTS)
"""Names that open_clip writes; the first that is there is read."""
VOCABULARIES = ("vocab.txt", "tokenizer.json")
HEAD_WIDTH = 64
"""Features of one attention head in every BERT, where no config.json says otherwise."""
UNUSED = r"text\.transformer\.(embeddings\.position_ids|pooler\.dense\.(weight|bias))|visual\..*|logit_(scale|bias)"
"""BiomedCLIP's image encoder and temperature, an index that older versions stored, and BERT's pooling layer, which
BiomedCLIP does not ask."""


@dataclass(frozen=True, kw_only=True)
class TextWeights:
    """Tensors of a TextEncoder, float32, by its names, and what it is built from."""

    tensors: dict[str, Tensor]
    config: TextConfig
    """Without a folder yet."""
    shared_dim: int
    bert: dict[str, Any] = field(repr=False)
    """config.json of the BERT."""
    tokenizer: tuple[Path, ...]
    """Files of its tokenizer."""
    taken: Taken

    def write_folder(self, folder: Path) -> None:
        """Write what TextConfig.folder needs: config.json and the tokenizer's files."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.bert, indent=1) + "\n", encoding="utf-8")
        for path in self.tokenizer:
            (folder / path.name).write_bytes(path.read_bytes())


def published_files(folder: Path) -> tuple[Path, tuple[Path, ...]]:
    """The weights and the tokenizer's files of a folder, unread; refused where one of the needed files is missing."""
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    tokenizer = tuple(folder / name for name in TEXT_FILES[1:] if (folder / name).is_file())
    absent = [] if (folder / CONFIG).is_file() else [CONFIG]
    absent += [] if weights else [WEIGHTS]
    absent += [] if any(path.name in VOCABULARIES for path in tokenizer) else [VOCABULARIES[0]]
    if absent or weights is None:
        raise InputError(
            f"Expected {CONFIG}, {WEIGHTS} and vocab.txt of {REPOSITORY} in {folder}, got no {', no '.join(absent)}; "
            "put the files there."
        )
    return weights, tokenizer


def read_biomedclip(folder: Path) -> TextWeights:
    """Read open_clip_config.json, the weights and the tokenizer's files; nothing is asked of a network.

    The BERT's sizes are those of its tensors, so that its own config.json may be missing, as it is in BiomedCLIP's
    repository.
    """
    weights, tokenizer = published_files(folder)
    context, shared = _text_settings(folder / CONFIG)
    found = read_tensors(weights, "BiomedCLIP's weights")
    text = {k: v for k, v in found.items() if k.startswith("text.")}
    bert = _bert_settings(text, folder, weights)
    if context > bert["max_position_embeddings"]:
        raise InputError(
            f"Expected at most {bert['max_position_embeddings']} tokens, as the weights have, in {folder / CONFIG}, "
            f"got {context}; the two files are not of the same model."
        )
    tensors, unexpected = {}, []
    known = _expected(bert, shared)
    for name, tensor in text.items():
        ours = name.replace("text.", "tower.", 1)
        if ours not in known:
            unexpected += [] if re.fullmatch(UNUSED, name) else [name]
        elif tuple(tensor.shape) != known[ours]:
            raise InputError(
                f"Expected {name} of {known[ours]} in {weights}, got {tuple(tensor.shape)}; "
                f"it is not of the model that {CONFIG} describes."
            )
        elif not torch.isfinite(tensor).all():
            raise InputError(f"Expected finite weights in {weights}, got others in {name}; fetch the file anew.")
        else:
            tensors[ours] = tensor.float()
    if missing := sorted(known.keys() - tensors.keys()):
        raise InputError(
            f"Expected a whole BERT with its projection in {weights}, got one without {len(missing)} of its tensors "
            f"(such as {missing[0].replace('tower.', 'text.', 1)}); name another folder."
        )
    sha256 = file_sha256(weights)
    others = [name for name in found if name not in text]
    taken = Taken(
        name=weights.name,
        sha256=sha256,
        identity=f"BiomedCLIP as published ({REPOSITORY})" if sha256 == BIOMEDCLIP.sha256[WEIGHTS] else None,
        tensors=len(tensors),
        parameters=sum(t.numel() for t in tensors.values()),
        left_out=tuple(n for n in (*others, *text) if re.fullmatch(UNUSED, n)),
        unexpected=(*unexpected, *(n for n in others if not re.fullmatch(UNUSED, n))),
    )
    config = TextConfig(
        kind="biomedclip",
        width=bert["hidden_size"],
        layers=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"],
        context_length=context,
    )
    return TextWeights(tensors=tensors, config=config, shared_dim=shared, bert=bert, tokenizer=tokenizer, taken=taken)


def _text_settings(path: Path) -> tuple[int, int]:
    """Tokens of context and dimensions of the shared space; every text tower but BiomedCLIP's kind is refused."""
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        text = model["text_cfg"]
        # Until 2.23 open_clip called the two "proj" and "pooler_type".
        projection = text.get("hf_proj_type", text.get("proj"))
        pooler = text.get("hf_pooler_type", text.get("pooler_type"))
        context, shared = int(text["context_length"]), int(model["embed_dim"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"Expected open_clip's description of BiomedCLIP in {path}, got one that cannot be read "
            f"({type(error).__name__}: {error}); put the file of {REPOSITORY} there."
        ) from error
    if "hf_model_name" not in text or (projection, pooler) != ("mlp", "cls_last_hidden_state_pooler"):
        raise InputError(
            f"Expected a BERT with hf_proj_type mlp and hf_pooler_type cls_last_hidden_state_pooler in {path}, got "
            f"{text.get('hf_model_name', 'no hf_model_name')} with {projection} and {pooler}; name BiomedCLIP's folder."
        )
    return context, shared


def _bert_settings(text: Mapping[str, Tensor], folder: Path, weights: Path) -> dict[str, Any]:
    """config.json of the BERT whose tensors these are; what shapes do not tell is BERT's usual, or from `folder`."""
    prefix = "text.transformer."
    try:
        vocabulary, width = text[f"{prefix}embeddings.word_embeddings.weight"].shape
        positions = text[f"{prefix}embeddings.position_embeddings.weight"].shape[0]
        types = text[f"{prefix}embeddings.token_type_embeddings.weight"].shape[0]
        inner = text[f"{prefix}encoder.layer.0.intermediate.dense.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"Expected open_clip's names of a BERT (text.transformer.*) in {weights}, got none such as {error}; "
            f"name the folder of {REPOSITORY}."
        ) from error
    layers = {m[1] for name in text if (m := re.match(rf"{re.escape(prefix)}encoder\.layer\.(\d+)\.", name))}
    settings = {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
    }
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return settings
    if not isinstance(given, dict) or given.get("model_type") != "bert":
        return settings
    fixed = {k: v for k, v in settings.items() if k != "num_attention_heads"}
    if other := [k for k, v in fixed.items() if given.get(k, v) != v]:
        raise InputError(
            f"Expected {other[0]} of {settings[other[0]]}, as the weights have, in {folder / 'config.json'}, got "
            f"{given[other[0]]}; the two files are not of the same model."
        )
    return settings | given


def _expected(bert: Mapping[str, Any], shared_dim: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a TextEncoder with this BERT."""
    from MedRationaleLib.model.text_encoder import bert_tower

    with torch.device("meta"):
        tower = bert_tower(bert, shared_dim)
    return {f"tower.{k}": tuple(v.shape) for k, v in tower.state_dict().items()}
