"""f_mask: SAM's mask decoder with one learned token a class, no prompt, and all slices in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from MedRationaleLib.model.config import CLASSES, ModelConfig
from MedRationaleLib.model.image_encoder import ResidualBlock, zeroed
from MedRationaleLib.model.torchvision_guard import sam_modeling

_sam = sam_modeling()


class ClassMaskDecoder(_sam.MaskDecoder):  # type: ignore[name-defined]
    """segment_anything's MaskDecoder (same state_dict keys); its four mask tokens stand for CLASSES.

    SAM's own forward repeats one image for many prompts; here every slice has the same tokens and none has a prompt,
    so the whole batch runs at once. With detail, the pyramid joins each step of the upscaling, as in SAM 2's decoder,
    and the result is doubled once more before the tokens' masks are taken.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            transformer_dim=config.neck_dim,
            transformer=_sam.TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.neck_dim,
                num_heads=config.decoder_heads,
                mlp_dim=config.decoder_mlp,
            ),
            num_multimask_outputs=len(CLASSES) - 1,
        )
        self.position = _sam.prompt_encoder.PositionEmbeddingRandom(config.neck_dim // 2)
        self.no_prompt = nn.Parameter(torch.zeros(config.neck_dim))
        if config.detail_dim:
            out, dim = config.neck_dim // 8, config.detail_dim
            self.join_eighth = zeroed(nn.Conv2d(4 * dim, 2 * out, 1))
            self.join_fourth = zeroed(nn.Conv2d(2 * dim, out, 1))
            self.refine = ResidualBlock(out)
            self.detail = nn.Conv2d(dim, out, 1)
            self.fuse = nn.Sequential(nn.GELU(), nn.Conv2d(out, out, 3, padding=1), nn.GELU())
        # SAM's mask quality head is not trained here, but its weights stay loadable.
        for parameter in self.iou_prediction_head.parameters():
            parameter.requires_grad_(False)

    def forward(self, embedding: Tensor, detail: Sequence[Tensor] = ()) -> Tensor:
        """(N, neck_dim, h, w) and the pyramid or nothing -> logits (N, classes, 8h, 8w) or (N, classes, 4h, 4w)."""
        count, channels, h, w = embedding.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(count, -1, -1)
        source = embedding + self.no_prompt[:, None, None]
        position = self.position((h, w)).expand(count, -1, -1, -1)
        tokens, source = self.transformer(source, position, tokens)
        upscaled = source.transpose(1, 2).reshape(count, channels, h, w)
        if detail:
            first, norm, activation, second, last = self.output_upscaling
            upscaled = activation(norm(first(upscaled) + self.join_eighth(detail[2])))
            upscaled = self.refine(last(second(upscaled) + self.join_fourth(detail[1])))
            upscaled = nn.functional.interpolate(upscaled, scale_factor=2.0, mode="bilinear", align_corners=False)
            upscaled = upscaled + self.detail(detail[0])
            upscaled = upscaled + self.fuse(upscaled)
        else:
            upscaled = self.output_upscaling(upscaled)
        weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        return torch.einsum("nkc,nchw->nkhw", weights, upscaled)
