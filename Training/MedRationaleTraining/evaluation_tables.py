"""evaluation.json as tables in Markdown, for evaluation.md, the terminal and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from MedRationaleTraining.evidence_metrics import SOURCES
from MedRationaleTraining.rationale_metrics import LEVELS, METHODS

UNITS = {"regions": "the true regions", "slices": "the mean of whole slices, the paper's unit"}
LABELS = {
    "dice_gland": "gland Dice",
    "dice_pz": "peripheral zone Dice",
    "dice_tz": "transition zone Dice",
    "dice_lesion": "lesion Dice (examinations with a lesion)",
    "dice_lesion_smoothed": "lesion Dice as in the paper (epsilon 1, slices with a lesion)",
    "lesion_ap": "lesion average precision (picai_eval)",
    "case_auroc": "examination AUROC (picai_eval)",
    "lesion_sensitivity": "lesions found at the model's threshold",
    "false_candidates_per_case": "false candidates an examination, there",
    "lesion_sensitivity_at_1_fp": "lesions found where there is one false candidate an examination",
    "dice_lesion_at_1_fp": "lesion Dice, there",
}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as tables; one that was made before a figure existed goes without it."""
    data = report["data"]
    lines = [
        f"# {report['model']} on {data['examinations']} synthetic examinations ({data['split'] or 'unknown'} split)",
        "",
        "Synthetic images; 95 % bootstrap intervals over examinations in brackets.",
        "",
        "| figure | value | n |",
        "|---|---|---|",
        *(f"| {LABELS[k]} | {_cell(row)} | {row['n']} |" for k, row in report["metrics"].items()),
    ]
    for unit, words in UNITS.items() if "retrieval" in report else ():
        lines += [
            "",
            f"Concept retrieval on {words}; the baseline always gives the zone's commonest answer.",
            "",
            "| node | accuracy | baseline | n |",
            "|---|---|---|---|",
            *(f"| {n} | {_cell(r)} | {r['majority']:.3f} | {r['n']} |" for n, r in report["retrieval"][unit].items()),
        ]
    if "evidence" in report:
        lines += _evidence_tables(report["evidence"])
        lines += _constraint_table(report["constraints"]) if report.get("constraints") else []
        lines += _rationale_tables(report)
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "not defined"
    interval = f" ({row['ci95'][0]:.3f} to {row['ci95'][1]:.3f})" if row["ci95"] else ""
    return f"{row['value']:.3f}{interval}"


def _evidence_tables(evidence: Mapping[str, Any]) -> list[str]:
    def cells(row: Mapping[str, Any]) -> str:
        uniform = "not defined" if row["uniform"] is None else f"{row['uniform']:.3f}"
        figures = " | ".join(_cell(row[name]) for name in ("rma", "pointing", "iou_50", "iou_best"))
        return f"{figures} | {uniform} | {row['rma']['n']} | {row['empty']}"

    columns = "| RMA (Eq. 5) | pointing game | IoU at 0.5 | IoU, best threshold | even map's RMA | n | empty |"
    rule = "|---|---|---|---|---|---|---|---|"
    return [
        "",
        "Evidence: concept maps against the concept's true place, slice by slice; the best thresholds, one a concept, "
        "were chosen on these examinations. All concepts that describe a lesion, on its slices:",
        "",
        f"| map {columns}",
        rule,
        *(f"| {source} | {cells(evidence[source]['lesion'])} |" for source in SOURCES),
        "",
        "The heatmaps by node and by concept, on lesions and mimics:",
        "",
        f"| concept {columns}",
        rule,
        *(f"| all of {n} | {cells(row)} |" for n, row in evidence["heatmap"]["nodes"].items()),
        *(f"| {c} | {cells(row)} |" for c, row in evidence["heatmap"]["concepts"].items()),
    ]


CONSTRAINTS = {
    "disentangle": ("concepts of one finding stay apart", "at most", min),
    "localise": ("together they cover what they describe, and nothing else", "at least", max),
    "contain": ("of each concept's heat, what lies elsewhere", "at least", max),
}
"""Kind of constraint -> what it asks for, which shares it is held at, and how to find the one that decides."""


def _constraint_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        "Constraints (Eq. 3): the share of what is attainable at which all of a kind would just be held, as a mean "
        "over examinations; a `constraints.*_share` that is no stricter is held.",
        "",
        "| constraint | held at a share of | decided by | n |",
        "|---|---|---|---|",
    ]
    for kind, (meaning, words, first) in CONSTRAINTS.items():
        of_kind = {n: row for n, row in rows.items() if n.startswith(f"{kind}.") and row["value"] is not None}
        if of_kind:
            name, row = first(of_kind.items(), key=lambda item: item[1]["value"])
            what = name.removeprefix(f"{kind}.").replace(".", ", ")
            lines.append(f"| {kind}: {meaning} | {words} {_cell(row)} | {what} | {row['n']} |")
    return lines


ANSWERED_BY = {
    "retrieval": "rationale (retrieval where the slice looks most like a lesion)",
    "whole": "the same by the whole slice's mean embedding (the paper's unit)",
    "mask": "mask (the predicted mask and the embedding under it)",
    "logits": "logits (linear discriminant on the mask logits)",
}
CONSISTENCY = {
    "slices": "slices on which mask and rationale contradict each other",
    "slices_mask_only": "... the mask has a lesion, the rationale none",
    "slices_rationale_only": "... the rationale has a lesion, the mask none",
    "slices_zone": "... both have one, in different zones",
    "slices_whole": "slices that contradict the mask when asked as a whole (the paper's unit)",
    "findings": "findings whose own embedding denies the lesion or its zone",
}
OF_FINDINGS = {
    "zone": "zone of findings that hit a lesion",
    "pirads": "PI-RADS category of findings that hit a lesion",
    "pirads_within_one": "... within one category",
}


def _rationale_tables(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "",
        "Rationale accuracy (Table 3): the questions of the true rationale, answered in four ways.",
        "",
        "| of | answered by | answers right | rationales right in full | n |",
        "|---|---|---|---|---|",
    ]
    for level in LEVELS:
        for method in METHODS:
            row = report["rationale"][level][method]
            figures = f"{_cell(row['overall'])} | {_cell(row['complete'])} | {row['complete']['n']}"
            lines.append(f"| {level} | {ANSWERED_BY[method]} | {figures} |")
    lines += ["", "| figure | value | n |", "|---|---|---|"]
    for table, labels in (("findings", OF_FINDINGS), ("inconsistency", CONSISTENCY)):
        lines += [f"| {words} | {_cell(report[table][k])} | {report[table][k]['n']} |" for k, words in labels.items()]
    return lines
