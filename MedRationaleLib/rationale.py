"""From a lesion's similarities and measurements to the steps of its rationale."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from MedRationaleLib.assessment import Candidate, RationaleStep, Source
from MedRationaleLib.decision_tree import DCE_CONCEPTS, Dce, DecisionTree, Node
from MedRationaleLib.evidence import rank
from MedRationaleLib.findings import LesionMeasurement


class LesionAnswers:
    """Answers the tree's questions for one lesion (an Answer for DecisionTree.walk) and keeps each step.

    Signal, shape, margin and the like are retrieved; zone, size and extension are measured on the mask. Where
    a question is answered both ways and the two disagree, the mask's answer stands and the contradiction is kept
    (paper, Appendix E).
    """

    def __init__(
        self,
        lesion: LesionMeasurement,
        similarity: Mapping[str, float],
        tree: DecisionTree,
        *,
        missing: Collection[str] = (),
        dce: Dce = "not available",
    ) -> None:
        """`similarity`: concept id -> cosine similarity with the lesion; `missing`: sequences that do not show
        it; `dce`: what a reader saw of contrast enhancement."""
        self.steps: list[RationaleStep] = []
        self.contradictions: list[str] = []
        self._lesion, self._similarity, self._tree = lesion, similarity, tree
        self._bank, self._missing, self._reader = tree.bank, set(missing), {"dce": DCE_CONCEPTS[dce]}

    def __call__(self, node: Node, candidates: tuple[str, ...], so_far: Mapping[str, str]) -> str:
        lesion, ranked = self._lesion, rank(candidates, self._similarity)
        retrieved: str | None = ranked[0]
        source: Source = "model"
        measurement = None
        if node.answered_by == "reader":
            retrieved, concept, source = None, self._reader.get(node.id, node.default or candidates[-1]), "reader"
        elif node.id == "zone":
            concept = next(c for c, zone in self._tree.zones.items() if zone == lesion.zone)
            source, measurement = "measured", f"{100 * lesion.zone_fraction:.0f} % of the lesion in the {lesion.zone}"
        elif node.id == "size":
            retrieved, concept = None, node.classify(lesion.size_mm)
            source, measurement = "measured", f"{lesion.size_mm:.1f} mm"
        elif node.id == "epe":
            retrieved, concept = None, "epe_present" if lesion.extension.present else "epe_absent"
            source = "measured"
            beyond = lesion.extension
            measurement = f"{beyond.extent_mm:.1f} mm and {beyond.volume_ml:.2f} ml beyond the gland's contour"
        elif node.id == "lesion_presence" and ranked[0] == self._tree.absent:
            # The mask found it; that the embedding does not see it is a contradiction to be shown, not hidden.
            concept = next(c for c in candidates if c != self._tree.absent)
            source, measurement = "measured", f"likelihood {lesion.likelihood:.2f}"
        else:
            concept = ranked[0]
        if retrieved is not None and retrieved != concept:
            self.contradictions.append(
                f'{node.question} The mask says "{self._bank[concept].text}", the image\'s similarity to the concepts '
                f'says "{self._bank[retrieved].text}".'
            )
        asked = retrieved is not None
        # What was never imaged cannot be shown: such an answer is inferred from the other sequences, and says so.
        unseen = asked and node.id != "zone" and set(node.sequences) <= self._missing
        self.steps.append(
            RationaleStep(
                node=node.id,
                concept=concept,
                text=self._bank[concept].text + (" (inferred, not imaged)" if unseen else ""),
                source=source,
                similarity=round(self._similarity[concept], 4) if asked else None,
                runners_up=tuple(
                    Candidate(concept=c, similarity=round(self._similarity[c], 4) if asked else None)
                    for c in ranked
                    if c != concept
                ),
                measurement=measurement,
                evidence=concept if asked and not unseen else None,
                weakened_by=tuple(s for s in node.sequences if s in self._missing),
            )
        )
        return concept


def signal_contradictions(
    steps: Sequence[RationaleStep], tree: DecisionTree, signal: Mapping[str, tuple[float, float]]
) -> list[str]:
    """Sentences where an answer on signal is not what the image shows.

    Args:
        steps: of one lesion.
        tree: which says on which sequence a question is answered.
        signal: sequence -> mean over the lesion, median over the rest of its zone.
    """
    found = []
    for step in steps:
        node = tree.nodes.get(step.node)
        bright, dark = step.concept.endswith("hyperintense"), step.concept.endswith("hypointense")
        sequence = next((s for s in node.sequences if s in signal), None) if node and (bright or dark) else None
        if node is None or sequence is None or step.source != "model":
            continue
        lesion, rest = signal[sequence]
        if (bright and lesion < rest) or (dark and lesion > rest):
            found.append(
                f'{node.question} The rationale says "{step.text}", but there the lesion is '
                f"{'darker' if bright else 'brighter'} than the rest of its zone "
                f"(mean {lesion:.0f}, median {rest:.0f})."
            )
    return found
