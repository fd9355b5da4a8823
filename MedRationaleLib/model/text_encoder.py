"""f_txt: an open_clip text tower and its tokenizer. Training and import need it; inference reads stored embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.errors import InputError
from MedRationaleLib.model.config import TextConfig
from MedRationaleLib.model.torchvision_guard import ensure_torchvision


class TextEncoder(nn.Module):
    """Phrases -> unit vectors of the shared space.

    "clip": open_clip's TextTransformer. Its bundled byte-pair vocabulary has 49,408 entries, of which clinical phrases
    use some hundreds; `vocabulary` lists those in use, and every other token becomes one "unknown" entry.
    "biomedclip": a BERT of BiomedCLIP's shape with open_clip's MLP projection (768 -> 640 -> 512).
    """

    def __init__(self, config: TextConfig, shared_dim: int, vocabulary: Sequence[int] = ()) -> None:
        super().__init__()
        ensure_torchvision()
        self.config = config
        self.table: Tensor
        """Token id of open_clip -> token id of this tower."""
        if config.kind == "clip":
            from open_clip.tokenizer import SimpleTokenizer
            from open_clip.transformer import TextTransformer

            self._tokenizer = SimpleTokenizer(context_length=config.context_length)
            vocabulary = sorted(vocabulary) or list(range(self._tokenizer.vocab_size))
            # 0 pads; 1 is unknown; the end token must stay the largest, because CLIP pools at the largest id.
            table = torch.ones(self._tokenizer.vocab_size, dtype=torch.long)
            table[torch.tensor(vocabulary)] = torch.arange(2, len(vocabulary) + 2)
            table[self._tokenizer.sot_token_id] = len(vocabulary) + 2
            table[self._tokenizer.eot_token_id] = len(vocabulary) + 3
            self.register_buffer("table", table, persistent=False)
            self.tower = TextTransformer(
                context_length=config.context_length,
                vocab_size=len(vocabulary) + 4,
                width=config.width,
                heads=config.heads,
                layers=config.layers,
                output_dim=shared_dim,
            )
        else:
            given: Any = None
            self._tokenizer = None
            if config.folder is not None:
                given, self._tokenizer = _bert_files(Path(config.folder))
            self.tower = bert_tower(
                given
                or {
                    "hidden_size": config.width,
                    "num_hidden_layers": config.layers,
                    "num_attention_heads": config.heads,
                    "intermediate_size": 4 * config.width,
                },
                shared_dim,
            )

    @staticmethod
    def vocabulary_of(phrases: Sequence[str]) -> list[int]:
        """Token ids of open_clip's bundled tokenizer that these phrases use."""
        ensure_torchvision()
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer()
        return sorted({token for phrase in phrases for token in tokenizer.encode(phrase)})

    def tokenize(self, phrases: Sequence[str]) -> Tensor:
        """(N,) phrases -> (N, context_length) int64; "biomedclip": as long as the longest, padding changes nothing."""
        if self.config.kind == "clip":
            tokens = self._tokenizer(list(phrases))
            return torch.where(tokens == 0, 0, self.table.cpu()[tokens])
        if self._tokenizer is None:
            raise ValueError("a text tower without a folder has no tokenizer; set TextConfig.folder")
        batch = self._tokenizer(
            list(phrases),
            max_length=self.config.context_length,
            padding="longest",
            truncation=True,
            return_tensors="pt",
        )
        return batch["input_ids"]

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, tokens) -> (N, shared_dim) float32 of unit length."""
        return nn.functional.normalize(self.tower(tokens).float(), dim=-1)

    @torch.no_grad()
    def concept_embeddings(self, bank: ConceptBank) -> Tensor:
        """(K, shared_dim) float32: of each concept the mean over all its phrasings, at unit length."""
        training, device = self.training, next(self.parameters()).device
        self.eval()
        means = [self(self.tokenize(c.all_phrasings).to(device)).mean(0) for c in bank.values()]
        self.train(training)
        return nn.functional.normalize(torch.stack(means), dim=-1)

    @torch.no_grad()
    def spread(self, bank: ConceptBank) -> None:
        """Turn the last projection of a "clip" tower so that concepts lie at right angles, each near where it was.

        A tower from random weights gives all texts nearly the same embedding, and InfoNCE takes long to part them.
        The nearest orthonormal set is Löwdin's (1950), and ridge regression of all phrasings on it the projection.
        """
        tower, training = self.tower, self.training
        self.eval()
        projection, tower.text_projection = tower.text_projection, None
        features = [tower(self.tokenize(c.all_phrasings)).float() for c in bank.values()]
        tower.text_projection = projection
        means = torch.stack([nn.functional.normalize(f @ projection, dim=-1).mean(0) for f in features])
        u, _, v = torch.linalg.svd(means, full_matrices=False)
        goals = torch.cat([row.expand(len(f), -1) for row, f in zip(u @ v, features, strict=True)])
        rows = torch.cat(features)
        gram = rows.T @ rows
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
        projection.copy_(torch.linalg.solve(gram + ridge, rows.T @ goals))
        self.train(training)

    def unknown_words(self, bank: ConceptBank) -> int:
        """How many tokens of all phrasings stand for "unknown", of which a tower of BERT's has one."""
        if self.config.kind == "clip" or self._tokenizer is None:
            return 0
        unknown = self._tokenizer.unk_token_id
        return sum(int((self.tokenize(c.all_phrasings) == unknown).sum()) for c in bank.values())


def bert_tower(bert: Mapping[str, Any], shared_dim: int) -> nn.Module:
    """open_clip's text tower of BiomedCLIP's kind, random weights; `bert` are fields of BertConfig."""
    ensure_torchvision()
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    tower = HFTextEncoder(
        "bert",
        output_dim=shared_dim,
        config=BertConfig.from_dict(dict(bert)),
        proj_type="mlp",
        pooler_type="cls_last_hidden_state_pooler",
        pretrained=False,
    )
    # BERT's own pooling layer is not asked, and BiomedCLIP's published weights are without it.
    tower.transformer.pooler = None
    return tower


def _bert_files(folder: Path) -> tuple[dict[str, Any], Any]:
    """config.json of a BERT and its tokenizer; asks no network."""
    from transformers import AutoTokenizer

    try:
        bert = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        if len(tokenizer) > bert["vocab_size"]:
            raise ValueError(f"{len(tokenizer)} tokens for {bert['vocab_size']} embeddings")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"Expected config.json of a BERT and its tokenizer's files (vocab.txt, tokenizer_config.json) in {folder}, "
            f"got none that can be read ({reason}); restore the folder."
        ) from error
    return bert, tokenizer
