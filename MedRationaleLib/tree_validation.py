"""Checks of a decision tree that its schema cannot express; each failure is an InputError of one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from MedRationaleLib.concepts import ZONES, Zone
from MedRationaleLib.decision_tree import DCE_CONCEPTS, END, DecisionTree, Node, Rule, first_match
from MedRationaleLib.errors import InputError

SCORES = (1, 2, 3, 4, 5)


def validate_references(tree: DecisionTree) -> None:
    """Every node and concept that the tree names exists, and answers where it is named."""
    if END in tree.nodes:
        raise InputError(f"{tree.id}: expected nodes of other names, got '{END}', which ends a walk; rename it.")
    _known_nodes(tree, [tree.start], "start")
    for node in tree.nodes.values():
        _known_nodes(tree, [str(rule.value) for rule in node.next if rule.value != END], f"next of '{node.id}'")
        for zone in ZONES:
            _known_answers(tree, node, zone)
        extra = [node.threshold.below, node.threshold.otherwise] if node.threshold else []
        extra += [node.default] if node.default else []
        _among(tree, extra, node.candidates(), f"threshold or default of '{node.id}'")
        for rule in node.next:
            _conditions(tree, rule, f"next of '{node.id}'", scores=True)
    for sequence, tables in tree.score_rules.items():
        for zone, rules in tables.items():
            for rule in rules:
                _conditions(tree, rule, f"the {sequence} scores of the {zone}", zone=zone)
    _conditions(tree, Rule(when=tree.upgrade["when_any"], value=0), "upgrade")
    _known_nodes(tree, ["zone"], "zones")
    _among(tree, tree.zones, tree.nodes["zone"].candidates(), "zones")
    for rule in tree.category_rules:
        _among(tree, map(str, rule.when.get("dce", ())), DCE_CONCEPTS.values(), "the category table")
    _known_concepts(tree, [tree.absent, *(f"pirads_{score}" for score in SCORES)], "the category table")


def validate_paths(tree: DecisionTree) -> None:
    """Walk every path: no cycle, no dead end, no combination without a rule, no node or rule that is never used."""
    fired: set[int] = set()
    asked: set[str] = set()
    for facts in tree.paths(lambda rule: fired.add(id(rule))):
        asked.update(facts)
        if tree.absent in facts.values() and tree.zone(facts) is None:
            continue
        if tree.zone(facts) is None:
            raise InputError(
                f"{tree.id}: expected every path with a lesion to ask for the zone, got one that does not "
                f"({', '.join(facts.values())}); lead it through 'zone'."
            )
        fired.update(id(tree.score_rule(sequence, facts)) for sequence in tree.score_rules)
    for zone, t2w, dwi, dce in product(ZONES, SCORES, SCORES, DCE_CONCEPTS.values()):
        rule = first_match(tree.category_rules, {"zone": zone, "t2w": t2w, "dwi": dwi, "dce": dce})
        if rule is None:
            raise InputError(
                f"{tree.id}: expected a category for every combination, got none for {zone}, T2W {t2w}, DWI {dwi}, "
                f"{dce}; add a row to the category table."
            )
        fired.add(id(rule))
    unasked = [node for node in tree.nodes if node not in asked]
    if unasked:
        raise InputError(
            f"{tree.id}: expected every node on some path, got '{unasked[0]}', which is unreachable; "
            "lead a path there or remove it."
        )
    for where, rules in _tables(tree):
        for number, rule in enumerate(rules, start=1):
            if (id(rule) in fired) == rule.as_printed:
                raise InputError(
                    f"{tree.id}: expected rule {number} of {where} to "
                    + (
                        "never match, as it is marked as_printed, got a match; "
                        if rule.as_printed
                        else "match something, got one that never can; "
                    )
                    + "correct, move or remove it."
                )


def _tables(tree: DecisionTree) -> Iterable[tuple[str, tuple[Rule, ...]]]:
    for node in tree.nodes.values():
        yield f"next of '{node.id}'", node.next
    for sequence, tables in tree.score_rules.items():
        for zone, rules in tables.items():
            yield f"the {sequence} scores of the {zone}", rules
    yield "the category table", tree.category_rules


def _known_nodes(tree: DecisionTree, nodes: Iterable[str], where: str) -> None:
    for node in nodes:
        if node not in tree.nodes:
            raise InputError(
                f"{tree.id}: expected in {where} one of the nodes {', '.join(tree.nodes)}, got the unknown node "
                f"'{node}'; correct the name or add the node."
            )


def _known_concepts(tree: DecisionTree, concepts: Iterable[str], where: str) -> None:
    for concept in concepts:
        if concept not in tree.bank:
            raise InputError(
                f"{tree.id}: expected in {where} a concept of the bank '{tree.bank.id}', got the unknown concept "
                f"'{concept}'; correct the name or add the concept."
            )


def _known_answers(tree: DecisionTree, node: Node, zone: Zone) -> None:
    _known_concepts(tree, node.candidates(zone), f"answers of '{node.id}'")
    allowed = tuple(concept.id for concept in tree.bank.for_node(node.id, zone))
    _among(tree, node.candidates(zone), allowed, f"answers of '{node.id}' in the {zone}")


def _among(tree: DecisionTree, values: Iterable[str], allowed: Iterable[str], where: str) -> None:
    allowed = tuple(allowed)
    for value in values:
        if value not in allowed:
            raise InputError(
                f"{tree.id}: expected in {where} one of {', '.join(allowed) or 'no concepts'}, got '{value}'; "
                "correct it or add it there."
            )


def _conditions(tree: DecisionTree, rule: Rule, where: str, zone: Zone | None = None, scores: bool = False) -> None:
    """A rule's facts are nodes (or scores, where they may be looked at) and its values are possible answers."""
    for fact, values in rule.when.items():
        if scores and fact in ("t2w_score", "dwi_score"):
            allowed = tuple(str(score) for score in SCORES)
        else:
            _known_nodes(tree, [fact], where)
            _known_concepts(tree, map(str, values), where)
            allowed = tree.nodes[fact].candidates(zone)
        _among(tree, map(str, values), allowed, f"{where} for '{fact}'")
