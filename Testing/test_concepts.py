"""The concept bank holds the agreed concepts, with phrasings to train on and codes that DICOM knows."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml

from MedRationaleLib.concepts import ConceptBank
from MedRationaleLib.errors import InputError
from MedRationaleLib.resources import resource_path

EXPECTED = {
    "lesion_presence": "lesion_absent lesion_present",
    "zone": "zone_pz zone_tz",
    "t2w_signal": "t2w_hyperintense t2w_mild_hypointense t2w_moderate_hypointense t2w_marked_hypointense",
    "homogeneity": "homogeneous heterogeneous",
    "margin": "circumscribed non_circumscribed encapsulated mostly_encapsulated obscured",
    "shape": "round_oval lenticular linear_wedge diffuse",
    "adc_signal": "adc_normal adc_mild_hypointense adc_marked_hypointense",
    "dwi_signal": "dwi_normal dwi_mild_hyperintense dwi_marked_hyperintense",
    "diffusion_pattern": "diffusion_focal diffusion_linear_wedge diffusion_diffuse",
    "size": "size_below_15mm size_15mm_or_more",
    "epe": "epe_absent epe_present",
    "dce": "dce_positive dce_negative dce_not_available",
    "pirads": "pirads_1 pirads_2 pirads_3 pirads_4 pirads_5",
}


@pytest.fixture(scope="module")
def bank() -> ConceptBank:
    return ConceptBank.load()


def test_the_bank_holds_exactly_the_agreed_concepts(bank):
    assert {node: [c.id for c in bank.for_node(node)] for node in EXPECTED} == {
        node: ids.split() for node, ids in EXPECTED.items()
    }
    assert len(bank) == sum(len(ids.split()) for ids in EXPECTED.values())


def test_zones_limit_the_margins_and_shapes_that_are_offered(bank):
    assert [c.id for c in bank.for_node("margin", "PZ")] == ["circumscribed", "non_circumscribed"]
    assert len(bank.for_node("margin", "TZ")) == 5
    assert [c.id for c in bank.for_node("shape", "PZ")] == ["round_oval", "lenticular", "linear_wedge", "diffuse"]
    assert [c.id for c in bank.for_node("shape", "TZ")] == ["round_oval", "lenticular", "diffuse"]


def test_every_concept_has_four_phrasings_and_no_phrasing_names_two_concepts(bank):
    texts = [
        text.casefold()
        for c in bank.values()
        for text in (*c.phrasings, *(t for ts in c.phrasings_by_zone.values() for t in ts))
    ]
    assert all(len(c.phrasings) >= 4 for c in bank.values())
    assert len(texts) == len(set(texts))


def test_phrasings_for_a_zone_never_name_the_other_zone(bank):
    others = {"PZ": ("transition zone", "tz"), "TZ": ("peripheral zone", "pz")}
    for concept in bank.values():
        if concept.node == "zone":
            continue
        for zone, words in others.items():
            if concept.zone in (None, zone):
                for text in concept.phrasings_for(zone):
                    assert not any(word in text.casefold() for word in words), (concept.id, zone, text)


def test_codes_are_those_of_dicom(bank):
    """pydicom's tables are the independent source."""
    tables = pytest.importorskip("pydicom.sr._concepts_dict").concepts
    known = {
        (scheme, value, meaning[0])
        for scheme, keywords in tables.items()
        for values in keywords.values()
        for value, meaning in values.items()
    }
    codes = [c.code for c in bank.values() if c.code] + [
        code for rows in bank.assessment_codes.values() for code in rows.values()
    ]
    assert len(codes) > 50
    for code in codes:
        assert (code.scheme, code.value, code.meaning) in known, code


def test_score_codes_are_those_of_their_context_groups(bank):
    groups = pytest.importorskip("pydicom.sr._cid_dict").cid_concepts
    concepts = pytest.importorskip("pydicom.sr._concepts_dict").concepts["RADLEX"]
    for table, cid in {"overall": 6325, "lesion": 6328, "t2w_pz": 6329, "t2w_tz": 6330, "dwi": 6331}.items():
        expected = {value for keyword in groups[cid]["RADLEX"] for value in concepts[keyword]}
        assert {code.value for code in bank.assessment_codes[table].values()} == expected
    for score in "12345":
        assert bank[f"pirads_{score}"].code == bank.assessment_codes["lesion"][score]
        assert f"PI-RADS {score}" in bank.assessment_codes["t2w_tz"][score].meaning


def test_the_schemas_themselves_are_valid():
    for name in ("concepts", "decision_tree"):
        schema = json.loads(resource_path(f"Schemas/{name}.schema.json").read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["concepts"].append(dict(d["concepts"][0])), "twice"),
        (lambda d: d["concepts"][0]["phrasings"].append("a lesion is present"), "for both"),
        (lambda d: d["concepts"][0].update(phrasings=["one", "two two"]), "too short"),
        (lambda d: d["concepts"][0].update(zone="CZ"), "CZ"),
        (lambda d: d["concepts"][0].pop("code"), "code"),
    ],
)
def test_a_faulty_bank_is_refused_with_the_reason(tmp_path, change, words):
    data = yaml.safe_load(resource_path("Concepts/prostate.yaml").read_text(encoding="utf-8"))
    change(data)
    path = tmp_path / "bank.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        ConceptBank.load(path)


def test_a_missing_or_broken_file_is_refused_with_the_reason(tmp_path):
    with pytest.raises(InputError, match="Expected a readable YAML file"):
        ConceptBank.load(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, 2", encoding="utf-8")
    with pytest.raises(InputError, match="expected YAML"):
        ConceptBank.load(tmp_path / "broken.yaml")
    with pytest.raises(InputError, match="Expected the resource"):
        resource_path("Concepts/liver.yaml")


def test_resources_are_found_inside_an_installed_wheel(tmp_path, monkeypatch):
    """In a wheel there is no Resources folder beside the package; the data lie in MedRationaleLib/_resources."""
    from MedRationaleLib import resources

    installed = tmp_path / "MedRationaleLib" / "_resources"
    (installed / "Concepts").mkdir(parents=True)
    (installed / "Concepts" / "prostate.yaml").write_text("id: x", encoding="utf-8")
    monkeypatch.setattr(resources, "_ROOTS", (tmp_path / "Resources", installed))
    assert resources.resource_path("Concepts/prostate.yaml") == installed / "Concepts" / "prostate.yaml"
