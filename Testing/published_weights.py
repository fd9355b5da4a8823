"""Files of the published layout, out of random weights: SAM's .pth, BiomedCLIP's folder, and a hub that serves them.

The networks are segment_anything's and open_clip's own, so that names and shapes are not ours to choose.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import training_samples

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.hub import Repository
from MedRationaleLib.model.config import ModelConfig, TextConfig
from MedRationaleLib.model.torchvision_guard import ensure_torchvision, sam_modeling

SMALL = replace(
    training_samples.TINY,
    pixels=64,
    window=2,
    axial_every=0,
    detail_dim=0,
    reason_dim=0,
    text=TextConfig(kind="biomedclip", width=16, layers=2, heads=2, context_length=24),
)
"""Of the paper's model's kind: no mixing of slices, no pyramid, a BERT."""

OPEN_CLIP_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}
"""open_clip_config.json of BiomedCLIP, as microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 has it."""


def sam(config: ModelConfig) -> torch.nn.Module:
    """segment_anything's whole network, as its build_sam.py puts it together, in these sizes."""
    modeling, side = sam_modeling(), config.pixels // config.patch
    return modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            depth=config.depth,
            embed_dim=config.embed_dim,
            img_size=config.pixels,
            mlp_ratio=4,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=config.heads,
            patch_size=config.patch,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=config.global_attention,
            window_size=config.window,
            out_chans=config.neck_dim,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=config.neck_dim,
            image_embedding_size=(side, side),
            input_image_size=(config.pixels, config.pixels),
            mask_in_chans=16,
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.neck_dim,
                mlp_dim=config.decoder_mlp,
                num_heads=config.decoder_heads,
            ),
            transformer_dim=config.neck_dim,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )


def sam_weights(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random values for every tensor of SAM's state_dict; none is zero, as many are at initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in sam(config).state_dict().items()}
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}


def vocabulary() -> list[str]:
    """BERT's special tokens and the words of the concepts' phrasings, "hypointense" as two pieces."""
    words = {w for c in ConceptBank.load().values() for text in c.all_phrasings for w in text.lower().split()}
    letters = sorted({letter for word in words for letter in word})
    pieces = ["hypo", "##intense", *letters, *(f"##{letter}" for letter in letters)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *sorted(words - {*letters, "hypointense"})]


def biomedclip(folder: Path, text: TextConfig = SMALL.text, embed_dim: int = 8, seed: int = 0) -> torch.nn.Module:
    """Write a folder as BiomedCLIP's repository has it, and return open_clip's network of these weights."""
    ensure_torchvision()
    from open_clip.model import CustomTextCLIP
    from transformers import BertConfig

    folder.mkdir(parents=True)
    words = vocabulary()
    bert = BertConfig(
        vocab_size=len(words) + 3,  # as BiomedCLIP's, more rows than words
        hidden_size=text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        intermediate_size=3 * text.width,
        max_position_embeddings=2 * text.context_length,
    )
    bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": "[UNK]", "pad_token": "[PAD]"}))
    config = json.loads(json.dumps(OPEN_CLIP_CONFIG))
    config["model_cfg"]["embed_dim"] = embed_dim
    config["model_cfg"]["text_cfg"]["context_length"] = text.context_length
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    network = CustomTextCLIP(
        embed_dim=embed_dim,
        vision_cfg={"layers": 1, "width": 16, "head_width": 8, "image_size": 32, "patch_size": 16},
        text_cfg=config["model_cfg"]["text_cfg"] | {"hf_model_name": str(folder), "hf_model_pretrained": False},
    ).eval()
    with torch.no_grad():  # at initialisation a BERT says nearly the same of every phrase
        for parameter in network.text.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else None
    weights = dict(network.state_dict())
    # An index that the published file has from the transformers of its day.
    weights["text.transformer.embeddings.position_ids"] = torch.arange(2 * text.context_length)[None]
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    return network


# ------------------------------------------------------------------ hub


@dataclass
class Hub:
    """What the server does and has seen."""

    files: dict[str, bytes]
    repository: Repository
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the next answers with content end, one entry an answer."""
    ranges: bool = True
    """Whether it honours Range."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """(path, Range) of every request."""
    url: str = ""

    def listing(self) -> list[dict[str, Any]]:
        """As the hub's API gives it: big files by SHA-256, small ones by git's hash."""
        rows = []
        for name, content in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git}
            if name.endswith(".bin"):
                row |= {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
            rows.append(row)
        return rows


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.hub
        hub.asked.append((self.path, self.headers.get("Range")))
        name = self.path.rpartition("/")[2]
        if self.path == f"/api/models/{hub.repository.name}/tree/{hub.repository.revision}":
            self._send(200, json.dumps(hub.listing()).encode())
        elif self.path.startswith(f"/{hub.repository.name}/resolve/{hub.repository.revision}/") and name in hub.files:
            self.send_response(302)  # the content lies elsewhere, as on the hub
            self.send_header("Location", f"{hub.url}/elsewhere/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/elsewhere/"):
            content, asked = hub.files[name], self.headers.get("Range")
            if asked and hub.ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                given = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
                self._send(206, content[start:], given)
            else:
                self._send(200, content)
        else:
            self._send(404, b"not found")

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        cut = self.hub.cut_after.pop(0) if self.path.startswith("/elsewhere/") and self.hub.cut_after else len(content)
        self.wfile.write(content[:cut])
        if cut < len(content):
            self.close_connection = True


@contextmanager
def served(folder: Path, repository: Repository) -> Iterator[Hub]:
    """A hub on this machine that has the files of a folder."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    hub = Hub(files=files, repository=repository)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
