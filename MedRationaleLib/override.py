"""A reader's override: change answers of a rationale and walk the same tree again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from MedRationaleLib.assessment import Candidate, Finding, RationaleStep, Source
from MedRationaleLib.decision_tree import DCE_CONCEPTS, Answer, DecisionTree, Node, Walk
from MedRationaleLib.errors import InputError

_SOURCES: dict[str, Source] = {"retrieval": "model", "measurement": "measured", "reader": "reader"}


class MissingAnswer(InputError):
    """An override leads to a question that has no answer yet."""

    def __init__(self, node: Node, candidates: tuple[str, ...], got: str | None) -> None:
        super().__init__(
            f"Expected an answer to '{node.id}' ({node.question}), which this override makes necessary, got "
            f"{got or 'none'}; override it as well with one of {', '.join(candidates)}."
        )
        self.node, self.candidates = node, candidates


@dataclass(frozen=True, kw_only=True)
class Rewalk:
    """What an override leads to."""

    rationale: tuple[RationaleStep, ...]
    """The new path; steps that the reader changed have source "reader" and the earlier concept in ``overridden``."""
    walk: Walk
    """The new scores and category."""
    not_asked: tuple[str, ...]
    """Overridden nodes that the new path does not ask for, so that the override has no effect."""


def override(
    tree: DecisionTree,
    rationale: tuple[RationaleStep, ...],
    overrides: Mapping[str, str],
    answer: Answer | None = None,
) -> Rewalk:
    """Walk ``tree`` again with the answers of ``rationale``, changed by ``overrides`` (node id -> concept id).

    A question that the old path did not ask, or whose old answer is impossible on the new one, is answered by the most
    similar remaining candidate of the old step, else by the node's default, else by ``answer``; MissingAnswer is raised
    where nobody answers. To combine or undo
    overrides without losing steps, keep the model's rationale and pass all the overrides that hold.
    """
    for node in overrides:
        if node not in tree.nodes:
            raise InputError(
                f"Expected an override of one of {', '.join(tree.nodes)}, got '{node}'; name a node of {tree.label}."
            )
    before = {step.node: step for step in rationale}
    missing = {sequence for step in rationale for sequence in step.weakened_by}
    steps: list[RationaleStep] = []

    def answer_again(node: Node, candidates: tuple[str, ...], so_far: Mapping[str, str]) -> str:
        step = _kept(before.get(node.id), candidates, tree)
        chosen = overrides.get(node.id)
        if chosen is not None and chosen not in candidates:
            raise InputError(
                f"Expected one of {', '.join(candidates)} as the override of '{node.id}', got '{chosen}'; "
                "choose one of these."
            )
        if step is None:
            concept = chosen or node.default
            if concept is None and answer is not None:
                concept = answer(node, candidates, so_far)
            if concept is None or concept not in candidates:
                raise MissingAnswer(node, candidates, concept)
            step = RationaleStep(
                node=node.id,
                concept=concept,
                text=tree.bank[concept].text,
                source="reader" if chosen else _SOURCES[node.answered_by],
                weakened_by=tuple(sequence for sequence in node.sequences if sequence in missing),
            )
        elif chosen is not None and chosen != step.concept:
            step = _changed(step, chosen, node, tree)
        steps.append(step)
        return step.concept

    walk = tree.walk(answer_again)
    not_asked = tuple(node for node in overrides if node not in walk.answers)
    return Rewalk(rationale=tuple(steps), walk=walk, not_asked=not_asked)


def override_finding(tree: DecisionTree, finding: Finding, overrides: Mapping[str, str]) -> Finding:
    """The finding with its rationale walked again; without overrides it is `finding` itself, so that is how to undo.

    `finding` is the model's; `overrides` are all that hold. A contradiction that the reader has decided is left out.
    """
    if not overrides:
        return finding
    # What the reader saw of enhancement counts wherever the new path asks for it.
    seen = {"dce": DCE_CONCEPTS[finding.dce]} if finding.dce != "not available" and "dce" in tree.nodes else {}
    again = override(tree, finding.rationale, {**seen, **overrides})
    decided = tuple(tree.nodes[step.node].question for step in again.rationale if step.source == "reader")
    return replace(
        finding,
        rationale=again.rationale,
        zone=tree.zone(again.walk.answers) or finding.zone,
        t2w_score=again.walk.t2w_score,
        dwi_score=again.walk.dwi_score,
        dce=again.walk.dce if "dce" in again.walk.answers else finding.dce,
        pirads=again.walk.pirads,
        contradictions=tuple(c for c in finding.contradictions if not c.startswith(decided)),
        model_pirads=finding.pirads if finding.model_pirads is None else finding.model_pirads,
    )


def _kept(step: RationaleStep | None, candidates: tuple[str, ...], tree: DecisionTree) -> RationaleStep | None:
    """The old step if it can stand, else with its most similar candidate that is possible now, else None."""
    if step is None or step.concept in candidates:
        return step
    possible = tuple(c for c in step.runners_up if c.concept in candidates)
    if not possible:
        return None
    best, *others = sorted(possible, key=_similarity, reverse=True)
    return replace(
        step,
        concept=best.concept,
        text=tree.bank[best.concept].text,
        source=_SOURCES[tree.nodes[step.node].answered_by],
        similarity=best.similarity,
        runners_up=tuple(others),
        evidence=None,
        overridden=None,
    )


def _changed(step: RationaleStep, chosen: str, node: Node, tree: DecisionTree) -> RationaleStep:
    """The step with the reader's concept; back to the first concept, it is the model's or the measurement's again."""
    rest = (*step.runners_up, Candidate(concept=step.concept, similarity=step.similarity))
    original = step.overridden or step.concept
    return replace(
        step,
        concept=chosen,
        text=tree.bank[chosen].text,
        source=_SOURCES[node.answered_by] if chosen == original else "reader",
        similarity=next((c.similarity for c in rest if c.concept == chosen), None),
        runners_up=tuple(sorted((c for c in rest if c.concept != chosen), key=_similarity, reverse=True)),
        evidence=None,  # the old heatmap shows another concept
        overridden=None if chosen == original else original,
    )


def _similarity(candidate: Candidate) -> float:
    return -2.0 if candidate.similarity is None else candidate.similarity
