"""f_txt: an open_clip text tower and its tokenizer. Needed for training only; inference reads stored embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

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
            from open_clip.hf_model import HFTextEncoder
            from transformers import BertConfig

            if config.folder is not None:
                from transformers import AutoTokenizer

                bert = BertConfig.from_pretrained(config.folder)
                self._tokenizer = AutoTokenizer.from_pretrained(str(Path(config.folder)), local_files_only=True)
            else:
                bert = BertConfig(
                    hidden_size=config.width,
                    num_hidden_layers=config.layers,
                    num_attention_heads=config.heads,
                    intermediate_size=4 * config.width,
                )
                self._tokenizer = None
            self.tower = HFTextEncoder(
                config.folder or "bert",
                output_dim=shared_dim,
                config=bert,
                proj_type="mlp",
                pooler_type="cls_last_hidden_state_pooler",
                pretrained=False,
            )

    @staticmethod
    def vocabulary_of(phrases: Sequence[str]) -> list[int]:
        """Token ids of open_clip's bundled tokenizer that these phrases use."""
        ensure_torchvision()
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer()
        return sorted({token for phrase in phrases for token in tokenizer.encode(phrase)})

    def tokenize(self, phrases: Sequence[str]) -> Tensor:
        """(N,) phrases -> (N, context_length) int64."""
        if self.config.kind == "clip":
            tokens = self._tokenizer(list(phrases))
            return torch.where(tokens == 0, 0, self.table.cpu()[tokens])
        if self._tokenizer is None:
            raise ValueError("a text tower without a folder has no tokenizer; set TextConfig.folder")
        batch = self._tokenizer(
            list(phrases),
            max_length=self.config.context_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return batch["input_ids"]

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, context_length) -> (N, shared_dim) float32 of unit length."""
        return nn.functional.normalize(self.tower(tokens).float(), dim=-1)
