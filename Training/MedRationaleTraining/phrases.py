"""Texts that f_txt is trained on: phrasings of single concepts and whole rationales."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from MedRationaleLib.concepts import ConceptBank


def all_phrases(bank: ConceptBank) -> dict[str, list[str]]:
    """Concept id -> every phrasing, those of one zone only included."""
    return {id: list(concept.all_phrasings) for id, concept in bank.items()}


def draw_phrases(phrases: Mapping[str, list[str]], rng: np.random.Generator) -> list[str]:
    """One phrasing of every concept, in the order of the bank."""
    return [texts[rng.integers(len(texts))] for texts in phrases.values()]


def draw_rationale(answers: Mapping[str, str], phrases: Mapping[str, list[str]], rng: np.random.Generator) -> str:
    """A rationale in a sentence: up to three of its concepts in a random order, as reports vary."""
    nodes = [n for n in answers if answers[n] in phrases and n not in ("dce", "size", "epe")]
    chosen = rng.permutation(nodes)[:3]
    return "; ".join(phrases[answers[n]][rng.integers(len(phrases[answers[n]]))] for n in chosen)
