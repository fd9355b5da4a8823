"""PI-RADS decision trees as data, and the one traversal that model, reader, report and synthesiser share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from MedRationaleLib.concepts import ZONES, ConceptBank, Zone, read_yaml
from MedRationaleLib.errors import InputError
from MedRationaleLib.resources import resource_path

END = "category"
"""What follows the last question: the category's table."""
Dce = Literal["positive", "negative", "not available"]
DCE_CONCEPTS: dict[Dce, str] = {
    "positive": "dce_positive",
    "negative": "dce_negative",
    "not available": "dce_not_available",
}
Facts = Mapping[str, "str | int"]
"""What is known so far: node id -> concept id, and "t2w_score" and "dwi_score" -> 1 .. 5."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of an ordered table; the first row that matches counts."""

    when: Mapping[str, tuple[str | int, ...]]
    """Fact -> the values with which this row matches; a fact that is not known matches nothing."""
    value: str | int
    """The score, the category, or the id of the next node."""
    as_printed: bool = False
    """True for a row that cannot match and is kept because its source prints it."""

    def matches(self, facts: Facts) -> bool:
        return all(facts.get(fact) in values for fact, values in self.when.items())


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """How a measured number answers a node: ``below`` when number < value, else ``otherwise``."""

    value: float
    unit: str
    below: str
    otherwise: str


@dataclass(frozen=True, kw_only=True)
class Node:
    """One question of the tree."""

    id: str
    question: str
    answered_by: Literal["retrieval", "measurement", "reader"]
    sequences: tuple[str, ...]
    """Sequences that the answer rests on."""
    answers: Mapping[str, tuple[str, ...]]
    """Zone -> concept ids."""
    next: tuple[Rule, ...]
    """Ordered rules; the value is a node id or END."""
    threshold: Threshold | None = None
    default: str | None = None
    """Answer of a reader's node as long as no reader has answered."""

    def candidates(self, zone: Zone | None = None) -> tuple[str, ...]:
        """Concept ids that may answer here; while the zone is not known, those of both zones."""
        if zone is not None:
            return self.answers[zone]
        return tuple(dict.fromkeys(concept for z in ZONES for concept in self.answers[z]))

    def classify(self, measured: float) -> str:
        """The concept that a measured number (in threshold.unit) stands for."""
        if self.threshold is None:
            raise InputError(f"Expected a node with a threshold, got '{self.id}'; add one to the decision tree's file.")
        return self.threshold.below if measured < self.threshold.value else self.threshold.otherwise


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The three numbers of a finding; t2w and dwi are None where there is no lesion to score."""

    t2w: int | None
    dwi: int | None
    pirads: int


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One path through the tree."""

    steps: tuple[tuple[str, str], ...]
    """(node id, concept id) in the order asked."""
    t2w_score: int | None
    dwi_score: int | None
    dce: Dce
    pirads: int

    @property
    def answers(self) -> dict[str, str]:
        """Node id -> concept id."""
        return dict(self.steps)

    @property
    def category(self) -> str:
        """Concept id of the category, "pirads_1" .. "pirads_5"."""
        return f"pirads_{self.pirads}"


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One possible answer at a step of a path."""

    concept: str
    leads_to: str
    """Node id that it would lead to, or END."""
    taken: bool


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """One step of a path with the branches taken and not taken, for drawing."""

    node: Node
    chosen: str
    branches: tuple[Branch, ...]


Answer = Callable[[Node, tuple[str, ...], Mapping[str, str]], str]
"""(node, candidate concept ids, node id -> concept id so far) -> the chosen concept id."""


class DecisionTree:
    """A PI-RADS decision tree: nodes, score tables and category table, all read from a file."""

    def __init__(self, data: Mapping[str, Any], bank: ConceptBank) -> None:
        self.id: str = data["id"]
        self.label: str = data["label"]
        """The tree in words; says where it departs from PI-RADS v2.1. Show it wherever the tree is used."""
        self.bank = bank
        self.start: str = data["start"]
        self.zones: dict[str, Zone] = {concept: zone for zone, concept in data["zones"].items()}
        """Concept id -> zone."""
        self.absent: str = data["no_lesion"]["concept"]
        self.absent_pirads: int = data["no_lesion"]["pirads"]
        self.nodes: dict[str, Node] = {id: _node(id, entry) for id, entry in data["nodes"].items()}
        self.score_rules: dict[str, dict[Zone, tuple[Rule, ...]]] = {
            sequence: {zone: tuple(_rule(row, "score") for row in rows) for zone, rows in tables.items()}
            for sequence, tables in data["scores"].items()
        }
        """"t2w" and "dwi" -> zone -> ordered rules."""
        self.upgrade: Mapping[str, Any] = data["upgrade"]
        self.category_rules: tuple[Rule, ...] = tuple(_category_rule(row) for row in data["category"])

    @classmethod
    def load(cls, name: str | Path = "pirads_v2_1", bank: ConceptBank | None = None) -> DecisionTree:
        """Read and validate a tree: the name of a shipped one, or the path of a YAML file.

        The shipped trees' every path is walked in the tests; that of a file is walked here (about a second).
        """
        from MedRationaleLib.tree_validation import validate_paths, validate_references

        path = Path(name)
        shipped = path.suffix not in (".yaml", ".yml")
        if shipped:
            names = sorted(file.stem for file in resource_path("DecisionTrees").glob("*.yaml"))
            if str(name) not in names:
                raise InputError(
                    f"Expected one of the trees {', '.join(names)} or a YAML file, got '{name}'; correct the name."
                )
            path = resource_path(f"DecisionTrees/{name}.yaml")
        tree = cls(read_yaml(path, "decision_tree.schema.json"), bank or ConceptBank.load())
        validate_references(tree)
        if not shipped:
            validate_paths(tree)
        return tree

    # ---------------------------------------------------------------- walking

    def walk(self, answer: Answer) -> Walk:
        """Ask ``answer`` node by node until the category is known."""
        facts: dict[str, str] = {}
        node_id = self.start
        while node_id != END:
            node = self.nodes[node_id]
            candidates = node.candidates(self.zone(facts))
            concept = answer(node, candidates, dict(facts))
            if concept not in candidates:
                raise InputError(
                    f"Expected one of {', '.join(candidates)} at '{node_id}', got '{concept}'; choose one of these."
                )
            facts[node_id] = concept
            node_id = self.next_node(node, facts)
        return self.conclude(facts)

    def walk_answers(self, answers: Mapping[str, str]) -> Walk:
        """Walk with answers that are known beforehand; those that the path does not ask for are ignored."""

        def answer(node: Node, candidates: tuple[str, ...], so_far: Mapping[str, str]) -> str:
            concept = answers.get(node.id, node.default)
            if concept is None:
                raise InputError(f"Expected an answer to '{node.id}' ({node.question}), got none; give one.")
            return concept

        return self.walk(answer)

    def scores(self, answers: Mapping[str, str]) -> Scores:
        """T2W score, DWI score and category of a set of answers."""
        walk = self.walk_answers(answers)
        return Scores(t2w=walk.t2w_score, dwi=walk.dwi_score, pirads=walk.pirads)

    def category(self, zone: str, t2w: int, dwi: int, dce: Dce = "not available") -> int:
        """PI-RADS category 1 .. 5 of a lesion; zone "PZ" or "TZ"."""
        facts: Facts = {"zone": zone, "t2w": t2w, "dwi": dwi, "dce": DCE_CONCEPTS.get(dce, dce)}
        rule = first_match(self.category_rules, facts)
        if rule is None:
            raise InputError(
                f"Expected zone PZ or TZ, scores 1 to 5 and DCE {', '.join(DCE_CONCEPTS)}, got {zone}, T2W {t2w}, "
                f"DWI {dwi}, DCE {dce}; correct the value that is none of these."
            )
        return int(rule.value)

    # ---------------------------------------------------------------- the pieces of a walk

    def zone(self, facts: Facts) -> Zone | None:
        """The zone that has been answered, or None."""
        return self.zones.get(str(facts.get("zone")))

    def next_rule(self, node: Node, facts: Facts) -> Rule:
        """The rule that says what follows ``node`` once it is answered."""
        if any("score" in fact for rule in node.next for fact in rule.when):
            scores = {f"{sequence}_score": self.score(sequence, facts) for sequence in self.score_rules}
            facts = {**facts, **{name: score for name, score in scores.items() if score is not None}}
        rule = first_match(node.next, facts)
        if rule is None:
            raise InputError(
                f"{self.id}: expected a rule for what follows '{node.id}', got none for {_words(facts)}; add one."
            )
        return rule

    def next_node(self, node: Node, facts: Facts) -> str:
        """Id of the node that follows ``node`` once it is answered, or END."""
        return str(self.next_rule(node, facts).value)

    def score_rule(self, sequence: str, facts: Facts) -> Rule | None:
        """The rule that scores "t2w" or "dwi", before any upgrade; None while there is no zone."""
        zone = self.zone(facts)
        if zone is None:
            return None
        rule = first_match(self.score_rules[sequence][zone], facts)
        if rule is None:
            raise InputError(
                f"{self.id}: expected a {sequence} score for the {zone}, got no rule for {_words(facts)}; add one."
            )
        return rule

    def score(self, sequence: str, facts: Facts) -> int | None:
        """Score 1 .. 5 of "t2w" or "dwi"; None while there is no zone. Upgraded by size or extension only from 4."""
        rule = self.score_rule(sequence, facts)
        if rule is None:
            return None
        upgraded = rule.value == self.upgrade["from"] and any(
            facts.get(node) in concepts for node, concepts in self.upgrade["when_any"].items()
        )
        return int(self.upgrade["to"] if upgraded else rule.value)

    def conclude(self, facts: Mapping[str, str]) -> Walk:
        """Scores and category of a completed path."""
        t2w, dwi, zone = self.score("t2w", facts), self.score("dwi", facts), self.zone(facts)
        dce: Dce = "not available"
        for word, concept in DCE_CONCEPTS.items():
            if facts.get("dce") == concept:
                dce = word
        if zone is None or t2w is None or dwi is None:
            pirads = self.absent_pirads
        else:
            pirads = self.category(zone, t2w, dwi, dce)
        return Walk(steps=tuple(facts.items()), t2w_score=t2w, dwi_score=dwi, dce=dce, pirads=pirads)

    # ---------------------------------------------------------------- looking at the tree as a whole

    @property
    def present(self) -> str:
        """The other answer to the first question: that there is a lesion."""
        return next(c for c in self.nodes[self.start].candidates() if c != self.absent)

    def trace(self, answers: Mapping[str, str]) -> tuple[TraceStep, ...]:
        """The path that these answers take, each step with the branches taken and not taken."""
        facts: dict[str, str] = {}
        trace = []
        for node_id, chosen in self.walk_answers(answers).steps:
            node = self.nodes[node_id]
            branches = tuple(
                Branch(concept=c, leads_to=self.next_node(node, {**facts, node_id: c}), taken=c == chosen)
                for c in node.candidates(self.zone(facts))
            )
            facts[node_id] = chosen
            trace.append(TraceStep(node=node, chosen=chosen, branches=branches))
        return tuple(trace)

    def paths(self, observe: Callable[[Rule], None] | None = None) -> Iterator[dict[str, str]]:
        """Every path of the tree as node id -> concept id (tens of thousands).

        ``observe`` is told every rule that decided what is asked next.
        """

        def descend(node_id: str, facts: dict[str, str]) -> Iterator[dict[str, str]]:
            if node_id == END:
                yield facts
                return
            if node_id in facts:
                raise InputError(
                    f"{self.id}: expected every question once, got a cycle back to '{node_id}' after "
                    f"{_words(facts)}; lead that path elsewhere."
                )
            node = self.nodes[node_id]
            for concept in node.candidates(self.zone(facts)):
                answered = {**facts, node_id: concept}
                rule = self.next_rule(node, answered)
                if observe:
                    observe(rule)
                yield from descend(str(rule.value), answered)

        return descend(self.start, {})

    def reachable(self) -> frozenset[str]:
        """Ids of all nodes and categories ("pirads_4") that some path reaches."""
        found: set[str] = set()
        for facts in self.paths():
            found.update(facts)
            found.add(self.conclude(facts).category)
        return frozenset(found)


def first_match(rules: tuple[Rule, ...], facts: Facts) -> Rule | None:
    """The first rule that matches, or None."""
    return next((rule for rule in rules if rule.matches(facts)), None)


def _words(facts: Facts) -> str:
    return ", ".join(f"{fact} {value}" for fact, value in facts.items()) or "no answers"


def _rule(row: Mapping[str, Any], value: str) -> Rule:
    when = {fact: tuple(values) for fact, values in row.get("when", {}).items()}
    return Rule(when=when, value=row[value], as_printed=row.get("as_printed", False))


def _category_rule(row: Mapping[str, Any]) -> Rule:
    when = {fact: tuple(row[fact]) for fact in ("t2w", "dwi", "dce") if fact in row}
    return Rule(when={"zone": (row["zone"],), **when}, value=row["pirads"], as_printed=row.get("as_printed", False))


def _node(id: str, entry: Mapping[str, Any]) -> Node:
    answers = entry["answers"]
    return Node(
        id=id,
        question=entry["question"],
        answered_by=entry["answered_by"],
        sequences=tuple(entry["sequences"]),
        answers={zone: tuple(answers[zone] if isinstance(answers, dict) else answers) for zone in ZONES},
        next=(Rule(when={}, value=entry["next"]),)
        if isinstance(entry["next"], str)
        else tuple(_rule(row, "to") for row in entry["next"]),
        threshold=Threshold(**entry["threshold"]) if "threshold" in entry else None,
        default=entry.get("default"),
    )
