"""The two figures of an evaluation as SVG: heatmaps of a few lesions, and the share of each concept's heat in place."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from skimage.measure import find_contours

from MedRationaleLib.decision_tree import DecisionTree
from MedRationaleLib.report_images import HEAT_OPACITY, HEAT_STOPS
from MedRationaleTraining.constraints import NOT_DESCRIBED, PRESENT
from MedRationaleTraining.evidence_metrics import TrueRegion, relevance_mass

if TYPE_CHECKING:
    from MedRationaleTraining.evaluation import Prediction

TILE = 128
"""Pixels of a tile: 96 mm around the lesion."""
COLOURS = {"heatmap": "#c0392b", "similarity": "#7f8c8d", "gradcam": "#2c5aa0"}
_STYLE = "<style>text{font:11px sans-serif;fill:#222}.t{font-weight:bold;font-size:13px}.s{fill:#666}</style>"


@dataclass(frozen=True, kw_only=True)
class Example:
    """The largest lesion of an examination in its largest slice, cut to TILE x TILE pixels."""

    t2w: np.ndarray
    """(TILE, TILE) float32, z-scored."""
    region: np.ndarray
    """(TILE, TILE) bool: the lesion."""
    maps: dict[str, np.ndarray]
    """Concept in words, then "Grad-CAM" -> (TILE, TILE) heat."""
    rma: dict[str, float]
    """The same -> relevance mass accuracy in the whole slice, of Grad-CAM against all lesions; nan: an empty map."""


def example_of(
    prediction: Prediction, places: Mapping[str, TrueRegion], tree: DecisionTree, concepts: Sequence[str]
) -> Example | None:
    """None where the examination has no lesion, or no maps were made; `places` as `true_regions` gives them."""
    stack = prediction.stack
    sizes = stack.regions.sum((2, 3)).numpy() * np.array(stack.is_lesion)[:, None]
    if not prediction.maps or not sizes.any():
        return None
    index = int(sizes.sum(1).argmax())
    at = int(sizes[index].argmax())
    region = stack.regions[index, at].numpy()
    chosen = [c for n, c in stack.answers[index].items() if _described(tree, n)]
    maps = {tree.bank[c].text: prediction.maps["heatmap"][concepts.index(c), at] for c in chosen}
    true = [places[c].region[at] for c in chosen]
    if "gradcam" in prediction.maps:
        maps["Grad-CAM"] = prediction.maps["gradcam"][0, at]
        true.append(places[PRESENT].region[at])
    t2w = stack.images[at, 0].numpy()
    scale = t2w.shape[0] // region.shape[0]
    centre = np.argwhere(region > 0).mean(0) * scale
    top, left = (int(np.clip(round(c - TILE / 2), 0, t2w.shape[0] - TILE)) for c in centre)
    cut = np.s_[top : top + TILE, left : left + TILE]
    return Example(
        t2w=t2w[cut],
        region=_enlarged(region, t2w.shape[0])[cut] > 0.5,
        maps={name: _enlarged(heat, t2w.shape[0])[cut] for name, heat in maps.items()},
        rma={n: float(relevance_mass(h[None], t[None])[0]) for (n, h), t in zip(maps.items(), true, strict=True)},
    )


def example_panel(examples: Sequence[Example]) -> str:
    """A row a lesion: T2W with its outline, then the heatmap of each concept of its rationale, then Grad-CAM."""
    step, head = TILE + 6, 30
    columns = 1 + max((len(e.maps) for e in examples), default=0)
    parts = [
        _text(
            4,
            16,
            "One lesion a row (outlined) and the heatmaps of its true concepts, from 0 (clear) to 1 (yellow)",
            "t",
        )
    ]
    for r, example in enumerate(examples):
        y = head + r * (step + 32)
        grey = np.clip((example.t2w + 2) / 5, 0, 1)
        outline = "".join(
            '<polygon points="{}" fill="none" stroke="#3ddc84"/>'.format(
                " ".join(f"{x + 0.5:.1f},{y + 0.5:.1f}" for y, x in line)
            )
            for line in find_contours(np.pad(example.region.astype(float), 1), 0.5)
            for line in [line - 1]
        )
        tiles = [("T2W", "", grey[..., None].repeat(3, -1))]
        for name, heat in example.maps.items():
            accuracy = example.rma[name]
            words = "no heat" if np.isnan(accuracy) else f"RMA {accuracy:.2f}"
            tiles.append((name, words, _overlaid(grey, heat)))
        for c, (name, words, rgb) in enumerate(tiles):
            x = 4 + c * step
            short = name if len(name) <= 21 else name[:20] + "…"
            parts.append(
                f'<g transform="translate({x} {y})"><image width="{TILE}" height="{TILE}" href="{_jpeg(rgb)}"/>'
                f"{outline}</g>{_text(x, y + TILE + 12, short)}{_text(x, y + TILE + 24, words, 's')}"
            )
    if not examples:
        parts.append(_text(4, head + 12, "No examination of this set has a lesion."))
    return _svg(max(560, 8 + columns * step), head + max(1, len(examples)) * (step + 32), parts)


def evidence_chart(evidence: Mapping[str, Any], tree: DecisionTree) -> str:
    """RMA of each concept's heatmap as a bar with its interval; marks for the other maps and an even one.

    Args:
        evidence: as `summarise_evidence` gives it.
        tree: whose concept bank names the concepts.
    """
    left, width, step = 230, 360, 17
    parts = [
        _text(4, 16, "Relevance mass accuracy: share of the heat in the concept's true place", "t"),
        _text(4, 32, "bar: heatmap, with its 95 % interval; ticks: plain similarity (grey), Grad-CAM (blue), "
              "an even map (dotted)", "s"),
    ]  # fmt: skip
    y = 44
    rows: list[tuple[str, str | None, dict[str, Any]]] = []
    previous = None
    for concept, row in evidence["heatmap"]["concepts"].items():
        node = tree.bank[concept].node
        if node != previous:
            rows.append((node.replace("_", " "), None, {}))
        previous = node
        rows.append((tree.bank[concept].text, concept, row))
    for label, concept, row in rows:
        y += step
        parts.append(_text(4 if concept is None else 14, y, label if len(label) <= 38 else label[:37] + "…",
                           "t" if concept is None else ""))  # fmt: skip
        if concept is None or row["rma"]["value"] is None:
            parts += [_text(left, y, "not defined", "s")] if concept else []
            continue
        estimate = row["rma"]
        end = left + estimate["value"] * width
        parts.append(_box(left, y - 10, end - left, 11, COLOURS["heatmap"], 0.75))
        if estimate["ci95"]:
            low, high = (left + v * width for v in estimate["ci95"])
            parts.append(f'<path d="M{low:.1f} {y - 4.5}H{high:.1f}" stroke="#222" stroke-width="1.5"/>')
        for source in ("similarity", "gradcam"):
            other = evidence[source]["concepts"].get(concept)
            if other and other["rma"]["value"] is not None:
                parts.append(_tick(left + other["rma"]["value"] * width, y, COLOURS[source]))
        parts.append(_tick(left + row["uniform"] * width, y, "#222", ' stroke-dasharray="1 2"'))
        parts.append(_text(left + width + 8, y, f"{estimate['value']:.2f} ({estimate['n']})"))
    axis = [(left + share * width, f"{share:g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    lines = [f'<path d="M{x:.1f} 50V{y + 6}" stroke="#ddd"/>{_text(x - 8, y + 20, share, "s")}' for x, share in axis]
    return _svg(left + width + 90, y + 28, [*lines, *parts])


def _described(tree: DecisionTree, node: str) -> bool:
    return node not in NOT_DESCRIBED and tree.nodes[node].answered_by == "retrieval"


def _enlarged(values: np.ndarray, pixels: int) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((pixels, pixels), Image.Resampling.BILINEAR))


def _overlaid(grey: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """(h, w) grey and heat in [0, 1] -> (h, w, 3), coloured as in the report."""
    heat = np.clip(heat, 0, 1)
    stops = [stop for stop, _ in HEAT_STOPS]
    rgb = np.stack([np.interp(heat, stops, [c[i] / 255 for _, c in HEAT_STOPS]) for i in range(3)], -1)
    opacity = HEAT_OPACITY * heat[..., None]
    return (1 - opacity) * grey[..., None] + opacity * rgb


def _jpeg(rgb: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray((rgb * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>' if words else ""


def _box(x: float, y: float, width: float, height: float, colour: str, opacity: float) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}" opacity="{opacity}"/>'


def _tick(x: float, y: float, colour: str, more: str = "") -> str:
    return f'<path d="M{x:.1f} {y - 12}V{y + 3}" stroke="{colour}" stroke-width="2"{more}/>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{_STYLE}<rect width="100%" height="100%" fill="#fff"/>' + (
        "\n".join(parts) + "</svg>\n"
    )
