"""The constraints on heatmaps against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from MedRationaleTraining.config import ConstraintConfig  # noqa: E402
from MedRationaleTraining.constraints import (  # noqa: E402
    CROP_MM,
    FAINT,
    TYPICAL_MM2,
    RationaleConstraints,
    at_full_shares,
    held_at,
    violation,
)
from MedRationaleTraining.data.stacks import Stack  # noqa: E402
from MedRationaleTraining.evidence_metrics import relevance_mass  # noqa: E402
from training_samples import TINY  # noqa: E402

from MedRationaleLib.concepts import ConceptBank  # noqa: E402
from MedRationaleLib.decision_tree import DecisionTree  # noqa: E402
from MedRationaleLib.model.rationale_model import ModelOutput, RationaleModel  # noqa: E402

BANK = ConceptBank.load()
CONCEPTS = list(BANK)
ANSWERS = {"lesion_presence": "lesion_present", "zone": "zone_pz", "adc_signal": "adc_marked_hypointense",
           "dwi_signal": "dwi_marked_hyperintense"}  # fmt: skip
SIZE = 64
LESION = np.s_[20:30, 20:28]
"""80 of 64 x 64 patches."""


def constraints(**changes) -> RationaleConstraints:
    return RationaleConstraints(ConstraintConfig(**changes), DecisionTree.load(), CONCEPTS)


def stack(*, lesions: int = 1) -> Stack:
    """One slice with a gland, split into PZ above and TZ below, and up to two lesions side by side."""
    masks = torch.zeros(1, 4, SIZE, SIZE)
    masks[0, 0, 16:40, 16:40] = 1
    masks[0, 1, 16:28, 16:40] = 1
    masks[0, 2, 28:40, 16:40] = 1
    regions = torch.zeros(lesions, 1, SIZE, SIZE)
    for i in range(lesions):
        regions[i, 0, LESION[0], slice(20 + 10 * i, 28 + 10 * i)] = 1
    masks[0, 3] = regions.sum((0, 1)) if lesions else 0
    return Stack(
        images=torch.zeros(1, 3, SIZE, SIZE),
        masks=masks,
        regions=regions,
        answers=(ANSWERS,) * lesions,
        is_lesion=(True,) * lesions,
    )


class Drawn:
    """Stands for a model whose heatmaps are given: concept id -> (1, h, w); all others are dark."""

    def __init__(self, **maps: torch.Tensor) -> None:
        self._maps = maps

    def heat(self, cosine):
        return cosine

    def similarity(self, index, concepts):
        dark = torch.zeros(1, SIZE, SIZE)
        return torch.stack([self._maps.get(c, dark) for c in CONCEPTS])


def g(given: RationaleConstraints, drawn: Drawn, of: Stack) -> dict[str, float]:
    found = given(drawn, drawn, [of], torch.zeros(1), np.random.default_rng(0))
    return {name: float(value) for name, value in found.items()}


def halves() -> Drawn:
    """ADC on the left half of the lesion, DWI on the right one; each zone on its own."""
    adc, dwi, pz, tz, present = (torch.zeros(1, SIZE, SIZE) for _ in range(5))
    adc[0, LESION[0], 20:24] = 1
    dwi[0, LESION[0], 24:28] = 1
    pz[0, 16:28, 16:40] = 1
    tz[0, 28:40, 16:40] = 1
    present[0, LESION[0], LESION[1]] = 1
    return Drawn(
        adc_marked_hypointense=adc, dwi_marked_hyperintense=dwi, zone_pz=pz, zone_tz=tz, lesion_present=present
    )


def test_maps_that_share_the_lesion_between_them_attain_all() -> None:
    found = g(constraints(disentangle_share=0.5, localise_share=0.25), halves(), stack())
    assert found.pop("disentangle.adc_signal.dwi_signal") == pytest.approx(1 - 1 / 0.5)
    assert found.pop("disentangle.zone") == pytest.approx(1 - 1 / 0.5)
    contained = found.pop("contain.adc_signal"), found.pop("contain.dwi_signal")
    assert contained == pytest.approx((FAINT * 80 / (40 + FAINT * 80) / 0.5 - 1,) * 2)
    assert found == pytest.approx({f"localise.{n}": -1.0 for n in ("lesion", "presence", "pz", "tz", "gland")})


def test_equal_maps_are_not_apart_and_dark_ones_not_localised() -> None:
    half = torch.zeros(1, SIZE, SIZE)
    half[0, LESION[0], LESION[1]] = 0.5
    found = g(
        constraints(localise_share=0.25), Drawn(adc_marked_hypointense=half, dwi_marked_hyperintense=half), stack()
    )
    assert found["disentangle.adc_signal.dwi_signal"] == pytest.approx(1.0)
    assert found["localise.lesion"] == pytest.approx(-1.0)
    assert g(constraints(localise_share=0.25), Drawn(), stack())["localise.lesion"] == pytest.approx(1 / 0.25 - 1)


def test_light_beyond_the_lesion_counts_by_the_area_that_it_covers() -> None:
    adc = torch.zeros(1, SIZE, SIZE)
    adc[0, LESION[0], LESION[1]] = 1
    adc[0, 50:58, 50:60] = 1  # as large as the lesion
    found = g(constraints(localise_share=0.25), Drawn(adc_marked_hypointense=adc), stack())
    assert found["localise.lesion"] == pytest.approx(1 / 0.25 - 1)


def test_light_beyond_the_end_of_a_lesion_counts_by_the_area_of_a_typical_one() -> None:
    end, adc = stack(), torch.zeros(1, SIZE, SIZE)
    end.regions[:] = 0
    end.regions[0, 0, 20:22, 20:22] = 1
    adc[0, 20:22, 20:22] = adc[0, 50:53, 50] = 1
    typical = TYPICAL_MM2 / (CROP_MM / SIZE) ** 2
    found = g(constraints(localise_share=0.25), Drawn(adc_marked_hypointense=adc), end)
    assert typical > 4 and found["localise.lesion"] == pytest.approx(3 / typical / 0.25 - 1)


def test_another_findings_place_is_left_out() -> None:
    adc = torch.zeros(1, SIZE, SIZE)
    adc[0, LESION[0], 20:28] = adc[0, LESION[0], 30:38] = 1
    found = g(constraints(localise_share=0.25), Drawn(adc_marked_hypointense=adc), stack(lesions=2))
    assert found["localise.lesion"] == pytest.approx(-1.0)


def test_a_map_is_contained_by_the_share_of_its_mass_which_the_sum_of_all_does_not_see() -> None:
    adc, dwi = torch.zeros(1, SIZE, SIZE), torch.zeros(1, SIZE, SIZE)
    adc[0, LESION[0], LESION[1]] = 0.1
    adc[0, 50:58, 50:60] = 0.3  # as large as the lesion
    dwi[0, LESION[0], LESION[1]] = 1
    maps = Drawn(adc_marked_hypointense=adc, dwi_marked_hyperintense=dwi)
    found = g(constraints(contain_share=0.5), maps, stack())
    (rma,), mass = relevance_mass(adc.numpy(), stack().regions[0].numpy()), 8 + 24
    assert rma == pytest.approx(0.25)
    assert found["contain.adc_signal"] == pytest.approx((1 - rma * mass / (mass + FAINT * 80)) / 0.5 - 1)
    assert found["contain.dwi_signal"] < 0
    assert found["localise.lesion"] < 0


def test_a_dark_map_is_not_contained() -> None:
    found = g(constraints(contain_share=0.5), Drawn(), stack())
    assert found["contain.adc_signal"] == pytest.approx(1 / 0.5 - 1)


def test_maps_may_all_be_bright_in_the_lesion_but_not_beside_it() -> None:
    bright = torch.zeros(1, SIZE, SIZE)
    bright[0, LESION[0], LESION[1]] = 0.9
    maps = Drawn(adc_marked_hypointense=bright, dwi_marked_hyperintense=bright)
    assert g(constraints(localise_share=0.25), maps, stack())["localise.lesion"] == pytest.approx(-1.0)
    beside = bright.roll(30, 2)
    maps = Drawn(adc_marked_hypointense=beside, dwi_marked_hyperintense=beside)
    assert g(constraints(localise_share=0.25), maps, stack())["localise.lesion"] == pytest.approx(
        (1 + 1.8**2) / 0.25 - 1
    )


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("adc_marked_hypointense", lambda area, faint: faint / (area + faint)),
        # Half of the first's heat is elsewhere, and the second's own map is dark.
        ("adc_mild_hypointense", lambda area, faint: ((area + faint) / (2 * area + faint) + 1) / 2),
    ],
)
def test_heat_on_another_finding_is_in_place_where_the_answer_is_the_same(other, expected) -> None:
    adc = torch.zeros(1, SIZE, SIZE)
    adc[0, LESION[0], 20:28] = adc[0, LESION[0], 30:38] = 1
    two = replace(stack(lesions=2), answers=(ANSWERS, ANSWERS | {"adc_signal": other}))
    found = g(constraints(contain_share=0.5), Drawn(adc_marked_hypointense=adc), two)
    assert found["contain.adc_signal"] == pytest.approx(expected(80.0, FAINT * 80) / 0.5 - 1)


def test_where_there_is_nothing_nothing_may_light_up() -> None:
    bright = {c: torch.full((1, SIZE, SIZE), 0.01) for c in CONCEPTS}
    given = constraints(localise_share=0.5)
    nodes = len(given.nodes)
    typical = TYPICAL_MM2 / 9  # patches of 3 mm
    found = g(given, Drawn(**bright), stack(lesions=0))
    assert found["localise.nothing"] == pytest.approx((0.01 * nodes) ** 2 * SIZE**2 / typical / 0.5 - 1, rel=1e-4)
    assert "localise.lesion" not in found and "localise.nothing" not in g(given, Drawn(**bright), stack())


@pytest.mark.parametrize(("distance", "apart"), [("cosine", 1.0), ("iou", 1.0)])
def test_other_distances(distance, apart) -> None:
    found = g(constraints(distance=distance, disentangle_share=0.5), halves(), stack())
    assert found["disentangle.adc_signal.dwi_signal"] == pytest.approx(1 - apart / 0.5, abs=1e-4)
    assert found["localise.lesion"] == pytest.approx(-1.0, abs=1e-4)


def test_half_of_the_problem_has_half_of_the_names() -> None:
    only = constraints(localise=False)
    assert only.names and all(n.startswith("disentangle") for n in only.names)
    assert all(n.startswith(("localise", "contain")) for n in constraints(disentangle=False).names)
    assert not constraints(disentangle=False, localise=False).names


@pytest.mark.parametrize("form", ["sigmoid", "relu", "raw"])
@pytest.mark.parametrize("distance", ["l2", "cosine", "iou"])
def test_every_constraint_reaches_the_image_encoder_the_concepts_and_the_heat(form, distance) -> None:
    torch.manual_seed(0)
    model = RationaleModel(replace(TINY, heatmap=form), CONCEPTS)
    images = torch.randn(1, 1, 3, 256, 256)
    output: ModelOutput = model(images)
    concepts = torch.nn.functional.normalize(torch.randn(len(CONCEPTS), TINY.shared_dim), dim=1).requires_grad_()
    given = constraints(distance=distance)
    found = given(model, output, [stack()], concepts, np.random.default_rng(0))
    found |= given(model, output, [stack(lesions=0)], concepts, np.random.default_rng(0))
    encoder = model.f_img.patch_embed.proj.weight
    assert {
        "disentangle.adc_signal.dwi_signal",
        "localise.lesion",
        "localise.nothing",
        "localise.gland",
        "contain.adc_signal",
    } <= found.keys()
    for name, value in found.items():
        asked = [encoder, concepts] + ([model.heat_scale, model.heat_bias] if form == "sigmoid" else [])
        for gradient in torch.autograd.grad(value, asked, retain_graph=True):
            assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("distance", ["l2", "cosine", "iou"])
def test_gradients_of_the_distances_are_finite_differences(distance) -> None:
    torch.manual_seed(0)
    given = constraints(distance=distance)
    mask = (torch.rand(4, 4, dtype=torch.float64) > 0.5).double()
    weight = torch.rand(4, 4, dtype=torch.float64)
    total = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: given._localised(t, mask, weight, mask.sum()), (total,))


@pytest.mark.parametrize("distance", ["l2", "cosine", "iou"])
def test_the_share_that_is_just_held_tells_the_violation_of_every_other(distance) -> None:
    config = ConstraintConfig(distance=distance, disentangle_share=0.3, localise_share=0.2, contain_share=0.1)
    drawn = Drawn(**{c: torch.full((1, SIZE, SIZE), 0.3 - 0.05 * i) for i, c in enumerate(ANSWERS.values())})
    full = RationaleConstraints(at_full_shares(distance), DecisionTree.load(), CONCEPTS)
    held = {name: held_at(name, value) for name, value in g(full, drawn, stack()).items()}
    asked = g(RationaleConstraints(config, DecisionTree.load(), CONCEPTS), drawn, stack())
    assert max(asked.values()) > 0
    assert {n: violation(n, share, config) for n, share in held.items()} == pytest.approx(
        {n: max(value, 0.0) for n, value in asked.items()}, abs=1e-5
    )
    just = ConstraintConfig(distance=distance, contain_share=min(held["contain.adc_signal"], 1.0))
    again = RationaleConstraints(just, DecisionTree.load(), CONCEPTS)
    assert g(again, drawn, stack())["contain.adc_signal"] == pytest.approx(0, abs=1e-5)
