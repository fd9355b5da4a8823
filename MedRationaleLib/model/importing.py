"""A model folder out of published weights: SAM's image encoder and mask decoder, BiomedCLIP's text tower.

What comes out is where fine-tuning starts, and is not of use before it: its card says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import torch

from MedRationaleLib import __version__
from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.errors import InputError
from MedRationaleLib.files import staged_folder
from MedRationaleLib.hub import Repository
from MedRationaleLib.model.biomedclip import TextWeights, published_files, read_biomedclip
from MedRationaleLib.model.checkpoint import save_checkpoint
from MedRationaleLib.model.config import ModelConfig, medsam_biomedclip
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.model.sam_weights import SamWeights, read_sam
from MedRationaleLib.model.text_encoder import TextEncoder
from MedRationaleLib.model.weight_files import Taken
from MedRationaleLib.model_folders import TEXT, UNTRAINED, check_new
from MedRationaleLib.resources import resource_path

SEED = 0
"""Of what starts at random, so that the same files give the same folder."""
CARD_TEMPLATE = "Report/imported_model_card.md.j2"


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """What an import made, and of what."""

    folder: Path
    name: str
    pixels: int
    parameters: int
    image: Taken
    text: Taken
    random: tuple[str, ...]
    """Tensors that no file gave."""
    unknown_words: int
    """Tokens of the concepts' phrasings that the text tower's vocabulary does not have."""

    @property
    def warning(self) -> str:
        """What has to be known of it before anything else."""
        return UNTRAINED.format(name=self.name)


def import_model(
    medsam: Path,
    biomedclip: Path,
    out: Path,
    *,
    config: ModelConfig | None = None,
    hub: Repository | None = None,
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> ImportedModel:
    """Write a new model folder `out`, in float32 as the published files are.

    Args:
        medsam: .pth in segment_anything's names, of MedSAM or SAM, ViT-B.
        biomedclip: folder with open_clip_config.json, weights and tokenizer.
        out: model folder; it appears when it is complete.
        config: sizes of the image side, `medsam_biomedclip` where None; those of the text side are the files'.
        hub: where `biomedclip` was fetched from, for the record.
        progress: told the stage: "medsam", "biomedclip", "embed", "write".
    """
    config = config or medsam_biomedclip()
    if problem := config.problem():
        raise InputError(f"Expected a model that can be built, got one where {problem}; choose other pixels.")
    check_new(out)
    published_files(biomedclip)  # before a large file is read
    bank = ConceptBank.load()
    progress("medsam", 0.0)
    sam = read_sam(medsam, config)
    progress("biomedclip", 0.0)
    text = read_biomedclip(biomedclip)
    with staged_folder(out) as stage:
        text.write_folder(stage / TEXT)
        config = replace(config, shared_dim=text.shared_dim, text=replace(text.config, folder=str(stage / TEXT)))
        model, random = _assembled(config, bank, sam, text)
        image_taken, text_taken = sam.taken, text.taken
        del sam, text  # a gigabyte
        progress("embed", 0.0)
        encoder = model.f_txt
        assert isinstance(encoder, TextEncoder)
        model.concept_embeddings.copy_(encoder.concept_embeddings(bank))
        result = ImportedModel(
            folder=out,
            name=config.name,
            pixels=config.pixels,
            parameters=sum(p.numel() for p in model.parameters()),
            image=image_taken,
            text=text_taken,
            random=random,
            unknown_words=encoder.unknown_words(bank),
        )
        progress("write", 0.0)
        save_checkpoint(
            model,
            stage,
            card=_card(result),
            vocabulary=[],
            training={"imported": _record(result, hub), "medrationale": __version__, "torch": str(torch.__version__)},
            precision=torch.float32,
        )
    return result


def _assembled(
    config: ModelConfig, bank: ConceptBank, sam: SamWeights, text: TextWeights
) -> tuple[RationaleModel, tuple[str, ...]]:
    """The model with what the files give, and the names of the tensors that start at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = RationaleModel(config, list(bank))
        model.attach_text()
    given = sam.tensors | {f"f_txt.{name}": tensor for name, tensor in text.tensors.items()}
    left = model.load_state_dict(given, strict=False)
    if left.unexpected_keys:
        raise RuntimeError(f"tensors that the model does not have: {left.unexpected_keys}")
    return model.eval(), tuple(name for name in left.missing_keys if name.startswith(("f_", "projection.")))


def _record(result: ImportedModel, hub: Repository | None) -> dict[str, Any]:
    """For config.json: from which files, by their hashes; no paths of this machine."""
    text = asdict(result.text)
    if hub is not None:
        text |= {"repository": hub.name, "revision": hub.revision}
    # BiomedCLIP's image encoder has some hundred names that say nothing here.
    text["left_out"] = len(result.text.left_out)
    return {"image": asdict(result.image), "text": text, "random": list(result.random), "seed": SEED}


def _card(result: ImportedModel) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True)
    template = resource_path(CARD_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(model=result, seed=SEED, version=__version__)
