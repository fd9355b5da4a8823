"""One self-contained HTML page from an Assessment: pictures inline, no request to anywhere, nothing clinical computed.

The page's text and looks are in Resources/Report; this module says what goes into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import jinja2
from markupsafe import Markup

from MedRationaleLib.assessment import Assessment, Finding, RationaleStep, UnshownCandidate
from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.decision_tree import END, DecisionTree
from MedRationaleLib.errors import InputError
from MedRationaleLib.report_images import HEAT_STOPS, ReportPictures
from MedRationaleLib.resources import resource_path
from MedRationaleLib.segmentation_io import segment_color
from MedRationaleLib.serialization import plain

SEQUENCE_NAMES = {"t2w": "T2W", "adc": "ADC", "dwi": "DWI", "dce": "DCE"}
STEP_COLORS = (
    "#0072b2",
    "#c14a00",
    "#007a55",
    "#a83279",
    "#6a4fb3",
    "#8a6500",
    "#00818a",
    "#b3123f",
    "#4d6b00",
    "#8c4a2f",
    "#3f51b5",
    "#5d6d7e",
)
"""Frame and phrase colours in the order of the steps; each has at least 4.5 : 1 contrast on white."""
NEUTRAL = "#5b6470"
"""Colour of a step without a heatmap."""
SUSPICION = {
    1: "clinically significant cancer is highly unlikely",
    2: "clinically significant cancer is unlikely",
    3: "the presence of clinically significant cancer is equivocal",
    4: "clinically significant cancer is likely",
    5: "clinically significant cancer is highly likely",
}
"""PI-RADS v2.1's wording of its categories."""
PSA_LABELS = {"psa_ng_ml": "PSA (ng/ml)", "psa_density_ng_ml2": "PSA density (ng/ml²)"}
ZONE_NAMES = {"PZ": "peripheral zone", "TZ": "transition zone"}
CLOSE = 0.05
"""A lead in cosine similarity below which an answer is called nearly a tie."""
LESION_ZOOM_MM = 40.0


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One candidate answer as it is drawn."""

    text: str
    taken: bool
    similarity: float | None
    leads_to: str | None
    """What it would have led to, in words, where that is not what the path led to."""

    @property
    def bar(self) -> tuple[float, float]:
        """Left end and width in percent of a bar from 0 to the similarity on an axis from -1 to 1."""
        value = max(-1.0, min(1.0, self.similarity or 0.0))
        return 50 + 50 * min(0.0, value), 50 * abs(value)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the rationale as it is drawn."""

    number: int
    question: str
    step: RationaleStep
    color: str
    """Of the phrase and of the heatmap's frame."""
    branches: tuple[Branch, ...]
    lead: float | None
    """By how much the chosen answer is more similar than the next; None where a reader has answered."""
    sequence: str | None
    """Which sequence its heatmap is drawn over."""
    heat: int | None
    """Number of its heatmap on the page."""
    slice: int
    """Where the heatmap is hottest in the lesion; the key slice without a heatmap."""
    hottest: tuple[float, float] | None
    """Highest heat within the lesion, and on all slices."""
    before: str | None
    """The answer that a reader changed, in words."""
    unanswered: bool
    """It is for a reader, and nobody has answered: the tree's default stands."""


@dataclass(frozen=True, kw_only=True)
class FindingView:
    """One finding as it is drawn."""

    finding: Finding
    slice: int
    """Key slice."""
    zoom: tuple[float, float, float, float]
    """SVG viewBox around the lesion."""
    steps: tuple[Step, ...]
    skipped: tuple[str, ...]
    """Questions of the tree that this path did not ask."""


def build_report(assessment: Assessment) -> str:
    """The whole page. Raises InputError where Assessment.study has no voxels (see serialization.load_assessment)."""
    bank = ConceptBank.load()
    tree = DecisionTree.load(assessment.decision_tree, bank)
    pictures = ReportPictures(assessment)
    heat_numbers = {key: number for number, key in enumerate(assessment.evidence)}
    facts = study_facts(assessment.study.patient)
    views = [_finding_view(finding, tree, pictures, heat_numbers) for finding in assessment.findings]
    loader = jinja2.FileSystemLoader(resource_path("Report"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"label": _label, "number": _number}
    return environment.get_template("report.html.j2").render(
        a=assessment,
        study=assessment.study,
        tree=tree,
        views=views,
        pictures=pictures,
        key_slice=views[0].slice if views else pictures.key_slice(None),
        heats=[pictures.heat(key) for key in assessment.evidence],
        colors={name: segment_color(name) for name in ("gland", "tz", "lesion")},
        heat_gradient=", ".join(f"rgb{color} {100 * stop:.0f}%" for stop, color in HEAT_STOPS),
        names=SEQUENCE_NAMES,
        zone_names=ZONE_NAMES,
        suspicion=SUSPICION,
        close=CLOSE,
        synthetic=is_synthetic(assessment),
        not_shown=not_shown(assessment.not_shown, assessment.manifest),
        patient=[(_label(key), value) for key, value in facts if not key.endswith("_uid")],
        model=_one_line(assessment.manifest.get("model")) or "not recorded",
        manifest=[(_label(key), value) for key, value in facts if key.endswith("_uid")]
        + list(_flat(plain(assessment.manifest))),
        warnings=tuple(dict.fromkeys((*assessment.study.warnings, *assessment.warnings))),
        viewer_data=Markup(_viewer_data(assessment, bank, pictures)),
        style=Markup(resource_path("Report/report.css").read_text(encoding="utf-8")),
        script=Markup(resource_path("Report/report.js").read_text(encoding="utf-8")),
    )


def is_synthetic(assessment: Assessment) -> bool:
    """Whether the study says of itself that it is a phantom ("synthetic" in its patient record or in the manifest)."""
    return bool(assessment.study.patient.get("synthetic") or assessment.manifest.get("synthetic"))


def not_shown(candidates: Sequence[UnshownCandidate], manifest: Mapping[str, Any]) -> str:
    """What was seen and not marked, in a sentence; "" where there was nothing."""
    if not candidates:
        return ""
    model = manifest.get("model")
    settings = model.get("postprocessing") if isinstance(model, Mapping) else None
    limit = f" of {settings['lesion_likelihood']:.2f}" if settings else ""
    told = ", ".join(
        f"{c.zone} {c.volume_ml:.2f} ml at ({', '.join(f'{x:.0f}' for x in c.center_mm)}) mm LPS "
        f"(likelihood {floor(100 * c.likelihood) / 100:.2f})"
        for c in candidates
    )
    return f"Below the likelihood{limit} from which findings are shown: {told}."


def study_facts(patient: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What is known of patient and study, without what the banner says already; dates as ISO 8601 writes them."""
    told = [(key, value) for key, value in patient.items() if value not in (None, "") and key != "synthetic"]
    return [(key, re.sub(r"^(\d{4})(\d\d)(\d\d)$", r"\1-\2-\3", v) if key.endswith("_date") else v) for key, v in told]


def _finding_view(
    finding: Finding, tree: DecisionTree, pictures: ReportPictures, heat_numbers: Mapping[str, int]
) -> FindingView:
    index = pictures.key_slice(finding)
    questions = [step for step in finding.rationale if step.node in tree.nodes]
    answers = {step.node: step.concept for step in questions}
    try:
        leads_to = {
            (trace.node.id, branch.concept): branch.leads_to
            for trace in tree.trace(answers)
            for branch in trace.branches
        }
    except InputError:  # an answer that the tree does not know: the path is drawn without what lies beside it
        leads_to = {}
    colors = iter(STEP_COLORS * (1 + len(questions) // len(STEP_COLORS)))
    steps = []
    for number, step in enumerate(questions, start=1):
        heat = heat_numbers.get(step.evidence or "")
        similar = [c.similarity for c in step.runners_up if c.similarity is not None]
        shown = step.evidence if heat is not None else None
        asked = step.source != "reader"
        at, hottest = pictures.hottest(finding, shown, index) if shown is not None else (index, None)
        steps.append(
            Step(
                number=number,
                question=tree.nodes[step.node].question,
                step=step,
                color=next(colors) if heat is not None else NEUTRAL,
                branches=tuple(_branches(step, finding, tree, leads_to)),
                lead=step.similarity - max(similar) if asked and step.similarity is not None and similar else None,
                sequence=_shown_over(step, tree, pictures.sequences) if heat is not None else None,
                heat=heat,
                slice=at,
                hottest=hottest,
                before=_words(step.overridden, tree.bank) if step.overridden else None,
                unanswered=not asked and not step.overridden and step.concept == tree.nodes[step.node].default,
            )
        )
    return FindingView(
        finding=finding,
        slice=index,
        zoom=pictures.lesion_box(finding, index, LESION_ZOOM_MM),
        steps=tuple(steps),
        skipped=tuple(node.question for node in tree.nodes.values() if node.id not in answers),
    )


def _branches(
    step: RationaleStep, finding: Finding, tree: DecisionTree, leads_to: Mapping[tuple[str, str], str]
) -> Iterable[Branch]:
    """The candidates of a step in the tree's own order, so that every finding is read the same way."""
    similarity = {c.concept: c.similarity for c in step.runners_up} | {step.concept: step.similarity}
    candidates = tree.nodes[step.node].candidates(None if step.node == "zone" else finding.zone)
    taken_to = leads_to.get((step.node, step.concept))
    for concept in dict.fromkeys((*(c for c in candidates if c in similarity or c in tree.bank), *similarity)):
        target = leads_to.get((step.node, concept))
        other = target if target not in (None, taken_to) else None
        taken = concept == step.concept
        yield Branch(
            text=step.text if taken else _words(concept, tree.bank),
            taken=taken,
            similarity=similarity.get(concept),
            leads_to=None
            if other is None
            else "would end the questions"
            if other == END
            else f"would lead to: {tree.nodes[other].question}",
        )


def _shown_over(step: RationaleStep, tree: DecisionTree, available: tuple[str, ...]) -> str:
    """The sequence that the concept describes, else the first that its question rests on, else T2W."""
    concept = tree.bank.get(step.concept)
    wanted = (concept.sequence if concept else None, *tree.nodes[step.node].sequences)
    return next((name for name in wanted if name in available), "t2w")


def _words(concept: str, bank: ConceptBank) -> str:
    return bank[concept].text if concept in bank else concept.replace("_", " ")


def _viewer_data(assessment: Assessment, bank: ConceptBank, pictures: ReportPictures) -> str:
    """JSON for the slice viewer's script: of each slice its position and what the model says of it by itself."""
    said = {
        item.slice_index: [_words(answer.concept, bank) for answer in item.answers.values()]
        for item in assessment.slices
    }
    if len({tuple(a.concept for a in item.answers.values()) for item in assessment.slices}) < 2:
        said = {}  # the same of every slice says nothing of any
    absent = {
        item.slice_index for item in assessment.slices if "lesion_absent" in {a.concept for a in item.answers.values()}
    }
    slices = []
    for index in range(pictures.count):
        here = [f.id for f in assessment.findings if pictures.masks[f.id][index].any()]
        note = f", which contradicts {' and '.join(here)} marked here" if here and index in absent else ""
        slices.append({"s": round(pictures.slice_position(index)[2], 1), "said": said.get(index, []), "note": note})
    return json.dumps({"slices": slices}).replace("<", "\\u003c")


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested mappings as rows "a · b", value."""
    for key, item in value.items():
        name = f"{prefix}{_label(key)}"
        if isinstance(item, Mapping):
            yield from _flat(item, f"{name} · ")
        else:
            yield name, ", ".join(map(str, item)) if isinstance(item, list) else item


def _one_line(value: Any) -> str:
    """A mapping's short values in one line; a hash is cut, the manifest table has it whole."""
    if not isinstance(value, Mapping):
        return str(value or "")
    texts = [f"{key} {str(item)[:12]}" if len(str(item)) == 64 else str(item) for key, item in value.items()]
    return ", ".join(text for text in texts if text and len(text) < 80)


def _label(key: str) -> str:
    """ "study_date" -> "Study date", with units and abbreviations as people write them."""
    if key in PSA_LABELS:
        return PSA_LABELS[key]
    words = [
        {"uid": "UID", "id": "ID", "psa": "PSA", "ml": "(ml)", "mm": "(mm)", "s": "(s)", "t": "(T)"}.get(word, word)
        for word in str(key).split("_")
    ]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def _number(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "–" if value is None else f"{value:.{digits}f}{unit}".replace("-", "−")
