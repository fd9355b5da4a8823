"""A model on a device: a crop in, masks and similarities out, in as many pieces as the memory allows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import SimpleITK as sitk

from MedRationaleLib.failures import is_out_of_memory
from MedRationaleLib.postprocessing import DIFFUSION, Masks, PostprocessingConfig, clean_masks
from MedRationaleLib.preprocessing import Grid, ModelInput
from MedRationaleLib.study import Study

if TYPE_CHECKING:
    from torch import Tensor

    from MedRationaleLib.model.rationale_model import RationaleModel

Precision = Literal["auto", "float32", "bfloat16", "int8"]
"""What the network computes in: bfloat16 where the device has it, float32, bfloat16 anyhow, or float32 with the image
encoder's matrices in int8 (dynamic quantisation; CPU, for those without bfloat16)."""
CLASSES = ("gland", "pz", "tz", "lesion")
SLICES_AT_ONCE = {"cpu": 1, "cuda": 8, "mps": 4}
"""Of a model that looks at slices one by one; fewer where the memory of a GPU does not suffice."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one crop."""

    grid: Grid
    probabilities: np.ndarray
    """(4, S, h, w) float32 in [0, 1]: gland, PZ, TZ, lesion."""
    similarity: np.ndarray
    """(K, S, h', w') float32 cosine similarity of every patch and concept."""
    slice_similarity: np.ndarray
    """(S, K) the same for every slice's mean embedding."""
    seen: np.ndarray
    """(S,) bool: slices that the network was shown; of the others all is 0."""

    def masks(self, config: PostprocessingConfig, study: Study) -> Masks:
        """Clean masks on the grid of the study's T2W, as that is stored.

        They are decided on the coarser of its lattice and the crop's: on the crop's for every T2W that is stored at
        least as finely, and then copied by nearest neighbour, so that finer storage changes no outline.
        """
        grid = self.grid.coarsened(Grid.of(study.t2w))
        images = (grid.image(grid.from_reference(self.grid.image(p))) for p in self.probabilities)
        sequences = {
            name: (
                grid.image(grid.from_reference(getattr(study, name))),
                grid.image(grid.from_reference(study.valid[name], nearest=True)),
            )
            for name in DIFFUSION
            if name not in study.missing
        }
        return clean_masks(dict(zip(CLASSES, images, strict=True)), config, sequences).on(study.t2w)

    def gland_centre(self) -> tuple[np.ndarray | None, float]:
        """Centroid (LPS mm) and volume (ml) of the raw gland mask; None where there is none."""
        image = self.grid.image((self.probabilities[0] > 0.5).astype(np.uint8))
        shape = sitk.LabelShapeStatisticsImageFilter()
        shape.Execute(sitk.RelabelComponent(sitk.ConnectedComponent(image), sortByObjectSize=True))
        if not shape.HasLabel(1):
            return None, 0.0
        return np.array(shape.GetCentroid(1)), shape.GetPhysicalSize(1) / 1000


class Network:
    """Runs a model.

    Args:
        model: in evaluation mode, on `device`.
        device: of torch.
        precision: see Precision.
        compiled: let torch.compile make the image encoder; the first crop then takes up to a minute, and a compiler.
    """

    def __init__(
        self, model: RationaleModel, device: str, *, precision: Precision = "auto", compiled: bool = False
    ) -> None:
        from MedRationaleLib.model.precision import faster

        self.device, self.precision = device, precision
        self._loaded = model
        self.model = faster(model, device, precision, compiled=compiled)

    @property
    def computes_in(self) -> str:
        """The precision that "auto" is on its device."""
        from MedRationaleLib.model.precision import uses_bf16

        if uses_bf16(self.device, self.precision):
            return "bfloat16"
        return "float32" if self.precision == "auto" else self.precision

    @property
    def by_slice(self) -> bool:
        """Whether each slice is looked at by itself, without its neighbours."""
        return not self.model.config.axial_every

    def __call__(
        self, given: ModelInput, seen: np.ndarray | None = None, progress: Callable[[float], None] | None = None
    ) -> Prediction:
        """One crop, together with its mirror image (left-right), whose answer is averaged in.

        Args:
            given: S slices.
            seen: (S,) bool, the slices to look at, of a model that looks at them one by one; None for all.
            progress: told the fraction done.
        """
        import torch

        images = torch.from_numpy(given.images)
        if seen is None:
            seen = np.ones(len(images), bool)
        shown = images if seen.all() else images[torch.from_numpy(seen)]
        pair = torch.stack([shown, shown.flip(-1)])
        if self.by_slice:
            pair = pair.flatten(0, 1).unsqueeze(1)
        done, answers = 0, []
        for part in self._answers(pair):
            answers.extend(part)
            done += len(part)
            if progress:
                progress(done / len(pair))
        half = len(answers) // 2
        join = torch.cat if self.by_slice else _only
        probabilities, similarity = (
            (join([a[i] for a in answers[:half]], axis) + join([a[i] for a in answers[half:]], axis).flip(-1)) / 2
            for i, axis in ((0, 0), (1, 1))
        )
        return Prediction(
            grid=given.grid,
            probabilities=_spread(probabilities.permute(1, 0, 2, 3).numpy(), seen),
            similarity=_spread(similarity.numpy(), seen),
            slice_similarity=_spread(similarity.mean((2, 3)).numpy(), seen).T,
            seen=seen,
        )

    def _answers(self, stacks: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Of all stacks, some at once: half as many where a GPU's memory does not suffice, and last on the CPU."""
        import torch

        kind = torch.device(self.device).type
        size = min(SLICES_AT_ONCE.get(kind, 1) if self.by_slice else 2, len(stacks))
        while len(stacks):
            try:
                part = self._ask(stacks[:size])
            except RuntimeError as error:  # torch.OutOfMemoryError is one; Apple's GPUs raise no class of their own
                if not is_out_of_memory(error):
                    raise
                if size == 1 and self.device == "cpu":
                    raise
                torch.cuda.empty_cache()
                logger.warning("the memory of %s does not suffice for %d %s at once", self.device, size, self._unit)
                if size > 1:
                    size = (size + 1) // 2
                else:
                    logger.warning("the model goes on on the CPU, which takes longer")
                    self._go_on_on_the_cpu()
                    size = 1 if self.by_slice else min(2, len(stacks))
                continue
            stacks = stacks[size:]
            yield part

    def _go_on_on_the_cpu(self) -> None:
        from MedRationaleLib.model.precision import faster

        self.device = "cpu"
        self.model = faster(self._loaded.to(self.device), self.device, self.precision)

    @property
    def _unit(self) -> str:
        return "slice(s)" if self.by_slice else "stack(s)"

    def _ask(self, stacks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, S, 3, H, W) -> of each stack probabilities (S, 4, h, w) and similarities (K, S, h', w') on the CPU."""
        import torch

        from MedRationaleLib.model.precision import autocast

        with torch.inference_mode(), autocast(self.device, self.precision):
            output = self.model(stacks.to(self.device))
        concepts = self.model.concept_embeddings
        return [
            (logits.float().sigmoid().cpu(), output.similarity(index, concepts).float().cpu())
            for index, logits in enumerate(output.mask_logits)
        ]


def _only(parts: list[Any], axis: int) -> Any:
    (part,) = parts
    return part


def _spread(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(A, seen slices, ...) -> (A, S, ...) with 0 where nothing was seen."""
    if seen.all():
        return values
    whole = np.zeros((len(values), len(seen), *values.shape[2:]), values.dtype)
    whole[:, seen] = values
    return whole
