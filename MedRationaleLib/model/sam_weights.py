"""MedSAM's and SAM's ViT-B weights, in segment_anything's names, as starting values of f_img and f_mask."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from MedRationaleLib.errors import InputError
from MedRationaleLib.files import file_sha256
from MedRationaleLib.model.config import ModelConfig
from MedRationaleLib.model.rationale_model import RationaleModel
from MedRationaleLib.model.weight_files import Taken, read_tensors

WHAT = "MedSAM's or SAM's ViT-B weights"
KNOWN = {
    "34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74": "MedSAM ViT-B as published (medsam_vit_b.pth)",
    "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912": "SAM ViT-B as published (sam_vit_b_01ec64.pth)",
}
"""SHA-256 -> which file of bowang-lab/MedSAM or facebookresearch/segment-anything it is, as their copies record it."""
VARIANTS = {(768, 12): "ViT-B", (1024, 24): "ViT-L", (1280, 32): "ViT-H"}
"""(width, blocks) -> segment_anything's name (its build_sam.py)."""
RENAMED = (
    (r"image_encoder\.(.+)", r"f_img.\1"),
    (r"mask_decoder\.(.+)", r"f_mask.\1"),
    (r"prompt_encoder\.pe_layer\.(.+)", r"f_mask.position.\1"),
    (r"prompt_encoder\.no_mask_embed\.weight", "f_mask.no_prompt"),
)
"""SAM's names -> ours. The mask decoder has SAM's very shapes, so that all of it is taken: its four mask tokens, with
their hypernetworks, become those of our four classes in their order. None of them means a class before training; SAM's
are one for a clear prompt and three for an ambiguous one, of which MedSAM tuned the first, here the gland's. The two
tensors of the prompt encoder are what SAM's mask decoder is given where there is no prompt."""
WITHOUT_COUNTERPART = r"prompt_encoder\.(point_embeddings|not_a_point_embed|mask_downscaling)\.|pixel_(mean|std)$"
"""SAM's encoding of points, boxes and masks: nobody prompts this model."""
POSITION = "f_img.pos_embed"


@dataclass(frozen=True, kw_only=True)
class SamWeights:
    """Tensors of a RationaleModel, float32, by its names."""

    tensors: dict[str, Tensor]
    taken: Taken


def read_sam(path: Path, config: ModelConfig) -> SamWeights:
    """Read a .pth (or .safetensors) in segment_anything's names for a model of the given sizes.

    Position embeddings and relative position tables of another input size are interpolated. A file of another
    architecture, and one whose image encoder is incomplete, is refused.
    """
    found = read_tensors(path, WHAT)
    _check_architecture(found, config, path)
    with torch.device("meta"):
        model = RationaleModel(config, ()).state_dict()
    expected = {k: tuple(v.shape) for k, v in model.items() if k.startswith(("f_img.", "f_mask."))}
    tensors: dict[str, Tensor] = {}
    changed: dict[str, list[str]] = {}
    left_out: list[str] = []
    unexpected: list[str] = []
    for name, tensor in found.items():
        ours = _our_name(name)
        if ours not in expected:
            (left_out if re.match(WITHOUT_COUNTERPART, name) else unexpected).append(name)
            continue
        tensors[ours], how = _fitted(ours, tensor, expected[ours], config, path)
        if how:
            changed.setdefault(how, []).append(ours)
    missing = sorted(expected.keys() - tensors.keys())
    if lacking := [name for name in missing if name.startswith("f_img.")]:
        raise InputError(
            f"Expected {WHAT} in {path}, got a file without {len(lacking)} of the image encoder's tensors (such as "
            f"{lacking[0].replace('f_img', 'image_encoder', 1)}); name a complete one."
        )
    sha256 = file_sha256(path)
    taken = Taken(
        name=path.name,
        sha256=sha256,
        identity=KNOWN.get(sha256),
        tensors=len(tensors),
        parameters=sum(t.numel() for t in tensors.values()),
        changed=tuple(_in_words(how, names) for how, names in changed.items()),
        missing=tuple(missing),
        left_out=tuple(left_out),
        unexpected=tuple(unexpected),
    )
    return SamWeights(tensors=tensors, taken=taken)


def _our_name(name: str) -> str:
    for pattern, ours in RENAMED:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return ""


def _check_architecture(found: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """By names and shapes alone; every other difference shows as a missing tensor or one of another shape."""
    patches = found.get("image_encoder.patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        raise InputError(
            f"Expected {WHAT} in segment_anything's names (image_encoder.*, prompt_encoder.*, mask_decoder.*) in "
            f"{path}, got others (such as {next(iter(found))}); name a file of segment_anything or MedSAM."
        )
    blocks = {int(m[1]) for name in found if (m := re.match(r"image_encoder\.blocks\.(\d+)\.", name))}
    got, wanted = (patches.shape[0], len(blocks)), (config.embed_dim, config.depth)
    if got != wanted:
        raise InputError(
            f"Expected an image encoder of {_size(wanted)}, got one of {_size(got)} in {path}; name its file."
        )


def _size(size: tuple[int, int]) -> str:
    """(768, 12) -> "SAM's ViT-B (768 wide, 12 blocks)"."""
    name = f"SAM's {VARIANTS[size]}" if size in VARIANTS else "another size"
    return f"{name} ({size[0]} wide, {size[1]} blocks)"


def _fitted(name: str, tensor: Tensor, shape: tuple[int, ...], config: ModelConfig, path: Path) -> tuple[Tensor, str]:
    """The tensor in float32 and in our shape, and in words what had to be done for it."""
    tensor, how = tensor.float(), ""
    if not torch.isfinite(tensor).all():
        raise InputError(
            f"Expected finite weights in {path}, got others in {name}; the file is damaged, fetch it anew."
        )
    if name == "f_mask.no_prompt":
        tensor = tensor.reshape(-1)
    if name == POSITION and tensor.ndim == 4 and tensor.shape[1:3] != shape[1:3] and tensor.shape[3] == shape[3]:
        before, after = (f"{h} x {w}" for h, w in (tensor.shape[1:3], shape[1:3]))
        how = f"position embeddings, bicubic, from {before} to {after} patches"
        tensor = resized_positions(tensor, shape[1:3])
    elif _global_table(name, config) and tensor.ndim == 2 and tensor.shape[0] != shape[0]:
        how = f"relative position tables, linear, from {tensor.shape[0]} to {shape[0]} distances"
        tensor = resized_distances(tensor, shape[0])
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"Expected {name} of {shape} from {path}, got {tuple(tensor.shape)}; the file is of another architecture."
        )
    return tensor.contiguous(), how


def _global_table(name: str, config: ModelConfig) -> bool:
    """Whether these relative positions span the slice; those of windows do not depend on its size."""
    found = re.fullmatch(r"f_img\.blocks\.(\d+)\.attn\.rel_pos_[hw]", name)
    return found is not None and int(found[1]) in config.global_attention


def resized_positions(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(1, h, w, D) -> (1, *shape, D): bicubic and antialiased, as timm resizes those of vision transformers."""
    x = nn.functional.interpolate(positions.permute(0, 3, 1, 2), shape, mode="bicubic", antialias=True)
    return x.permute(0, 2, 3, 1)


def resized_distances(table: Tensor, length: int) -> Tensor:
    """(2 side - 1, d) -> (length, d): linear, as segment_anything's get_rel_pos does it in each pass."""
    return nn.functional.interpolate(table.T[None], length, mode="linear")[0].T


def _in_words(how: str, names: list[str]) -> str:
    blocks = sorted({int(m[1]) for name in names if (m := re.match(r"f_img\.blocks\.(\d+)\.", name))})
    return f"{how} (blocks {', '.join(map(str, blocks))})" if blocks else how
