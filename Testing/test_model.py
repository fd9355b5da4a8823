"""The model: sizes, checkpoints, and agreement with the networks that it is made of."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import training_samples

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from MedRationaleLib.concepts import ConceptBank  # noqa: E402
from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.model.attention import Block, FoldedAttention  # noqa: E402
from MedRationaleLib.model.checkpoint import CARD, CONFIG, WEIGHTS, load_checkpoint, save_checkpoint  # noqa: E402
from MedRationaleLib.model.config import TextConfig, compact, medsam_biomedclip  # noqa: E402
from MedRationaleLib.model.image_encoder import AxialMixer  # noqa: E402
from MedRationaleLib.model.mask_decoder import ClassMaskDecoder  # noqa: E402
from MedRationaleLib.model.rationale_model import RationaleModel  # noqa: E402
from MedRationaleLib.model.torchvision_guard import sam_modeling  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TINY = replace(training_samples.TINY, pixels=64, window=2)


def needs(*names: str) -> None:
    """Looks without importing: open_clip and lightning import only after the torchvision guard."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"the train extra is not installed: {', '.join(absent)}")


def phrases() -> list[str]:
    return [text for concept in ConceptBank.load().values() for text in concept.phrasings]


def tiny_model(seed: int = 0) -> RationaleModel:
    torch.manual_seed(seed)
    return RationaleModel(TINY, list(ConceptBank.load())).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(
        tiny_model(), tmp_path / "tiny", card="# tiny", vocabulary=[], postprocessing={"lesion_likelihood": 0.4}
    )
    return tmp_path / "tiny"


# ------------------------------------------------------------------ sizes


def test_compact_has_fewer_than_12_million_parameters_with_its_text_tower() -> None:
    needs("open_clip")
    from MedRationaleLib.model.text_encoder import TextEncoder

    model = RationaleModel(compact(), list(ConceptBank.load()))
    model.attach_text(TextEncoder.vocabulary_of(phrases()))
    assert sum(p.numel() for p in model.parameters()) < 12e6


def test_the_papers_model_is_built_by_the_same_code_and_runs_from_random_weights() -> None:
    """At 256 instead of 1024 pixels, which changes nothing but the position embeddings and takes a sixteenth."""
    model = RationaleModel(replace(medsam_biomedclip(), pixels=256), ["a", "b"]).eval()
    with torch.inference_mode():
        output = model(torch.randn(1, 2, 3, 256, 256))
    assert output.mask_logits.shape == (1, 2, 4, 64, 64)
    assert output.embedding.shape == (1, 2, 512, 16, 16)
    assert torch.isfinite(output.mask_logits).all()


def test_the_papers_model_has_the_shapes_of_sam_vit_b_and_biomedclip_at_1024_pixels() -> None:
    needs("open_clip", "transformers")
    with torch.device("meta"):
        model = RationaleModel(medsam_biomedclip(), ["a", "b"])
        model.attach_text()
    assert model.f_img.pos_embed.shape == (1, 64, 64, 768)
    assert sum(p.numel() for p in model.f_img.parameters()) == 89_670_912  # SAM ViT-B's image encoder
    text = {k: v for k, v in model.state_dict().items() if k.startswith("f_txt.")}
    assert text["f_txt.tower.proj.0.weight"].shape == (640, 768)
    assert text["f_txt.tower.proj.2.weight"].shape == (512, 640)
    assert 109e6 < sum(p.numel() for p in model.f_txt.parameters()) < 111e6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 5}, "heads must divide embed_dim"),
        ({"patch": 48}, "patch must divide pixels"),
        ({"global_attention": (7,)}, "global_attention"),
        ({"shared_dim": 9}, "shared_dim"),
        ({"reason_dim": 6}, "reason_dim must be a multiple"),
        ({"detail_dim": 0}, "reason_dim needs a detail_dim"),
    ],
)
def test_sizes_that_cannot_be_built_are_named(change: dict, words: str) -> None:
    assert TINY.problem() is None
    assert words in str(replace(TINY, **change).problem())


# ------------------------------------------------------------------ parts


def test_the_reasons_own_convolutions_begin_as_if_they_were_not_there_and_leave_masks_alone() -> None:
    model, without = tiny_model(), RationaleModel(replace(TINY, reason_dim=0), list(ConceptBank.load())).eval()
    left = without.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys and all(key.startswith("projection.") for key in left.unexpected_keys)
    images = torch.randn(1, 2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, begun = without(images), model(images)
        assert torch.equal(before.embedding, begun.embedding) and torch.equal(before.mask_logits, begun.mask_logits)
        torch.nn.init.normal_(model.projection.join.weight)
        grown = model(images)
    assert torch.equal(before.mask_logits, grown.mask_logits)
    assert not torch.allclose(before.embedding, grown.embedding, atol=1e-2)


def test_the_likeliest_patches_of_a_slice_are_those_that_inference_asks() -> None:
    from MedRationaleLib.evidence import TYPICAL_MM2, asked_of_slices

    torch.manual_seed(0)
    model = RationaleModel(training_samples.TINY, ["a"]).eval()
    images = torch.randn(1, 3, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(images)
    concepts = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    inside = torch.zeros(1, 3, 64, 64, dtype=torch.bool)
    inside[0, 0, 20:40, 20:40] = True
    inside[0, 1, 5:7, 5:7] = True  # fewer patches than a typical lesion has; the third slice has no gland
    count = round(TYPICAL_MM2 / model.patch_mm**2)
    assert count == 14
    found = output.likeliest_means(concepts[1] - concepts[0], inside, count)[0] @ concepts.T
    similarity = output.similarity(0, concepts).numpy()
    expected = asked_of_slices(similarity, inside[0].float().numpy(), present=1, absent=0, patch_mm=model.patch_mm)
    assert torch.allclose(found, torch.from_numpy(expected), atol=1e-5)


def test_a_model_folder_from_before_reasons_had_convolutions_is_read_without_them(folder: Path) -> None:
    old = RationaleModel(replace(TINY, reason_dim=0), list(ConceptBank.load()))
    save_checkpoint(old, folder, card="# tiny", vocabulary=[])
    settings = json.loads((folder / "config.json").read_text())
    del settings["model"]["reason_dim"]
    (folder / "config.json").write_text(json.dumps(settings))
    read = load_checkpoint(folder).model
    assert read.config == old.config and read.projection.own is None


def test_concepts_of_a_text_tower_are_spread_with_their_phrasings_near_them() -> None:
    needs("open_clip")
    from MedRationaleLib.model.text_encoder import TextEncoder

    torch.manual_seed(0)
    bank = ConceptBank.load()
    tower = TextEncoder(TextConfig(width=192, layers=1, heads=2), 96, TextEncoder.vocabulary_of(phrases()))

    def alike() -> torch.Tensor:
        embeddings = tower.concept_embeddings(bank)
        return (embeddings @ embeddings.T)[~torch.eye(len(embeddings), dtype=bool)]

    assert alike().mean() > 0.3
    tower.spread(bank)
    assert alike().abs().mean() < 0.1
    embeddings = tower.concept_embeddings(bank)
    for own, concept in zip(embeddings, bank.values(), strict=True):
        with torch.no_grad():
            assert (tower(tower.tokenize(concept.phrasings)) @ own).mean() > 0.7


def test_a_new_axial_mixer_changes_nothing() -> None:
    x = torch.randn(6, 4, 4, 16)
    assert torch.equal(AxialMixer(16, 4)(x, slices=3), x)


def test_a_trained_axial_mixer_sees_the_neighbouring_slices_of_its_own_stack_only() -> None:
    torch.manual_seed(0)
    mixer = AxialMixer(16, 4)
    torch.nn.init.normal_(mixer.up.weight)
    x = torch.randn(6, 2, 2, 16)
    changed = x.clone()
    changed[0] = torch.randn(2, 2, 16)
    moved = (mixer(changed, slices=3) - mixer(x, slices=3)).abs().amax((1, 2, 3)) > 1e-6
    assert moved.tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("few_tokens", [0, 1024], ids=["fused", "two products"])
@pytest.mark.parametrize("shape", [(5, 5), (4, 6)])
def test_folded_attention_gives_segment_anythings_values_and_gradients(
    shape: tuple[int, int], few_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("MedRationaleLib.model.attention.FEW_TOKENS", few_tokens)
    stock = sam_modeling().image_encoder.Attention(12, 3, use_rel_pos=True, input_size=(6, 6))
    assert_same_values_and_gradients(stock, FoldedAttention(12, 3, use_rel_pos=True, input_size=(6, 6)), shape)


@pytest.mark.parametrize("few_tokens", [0, 1024], ids=["tiled", "in parts"])
@pytest.mark.parametrize(("window", "shape"), [(3, (6, 6)), (4, (6, 6)), (3, (4, 5)), (0, (5, 5))])
def test_a_block_gives_segment_anythings_values_and_gradients(
    window: int, shape: tuple[int, int], few_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole windows, windows that reach beyond the edge, and none; without gradients a few rows at a time."""
    for name, value in (("FEW_TOKENS", few_tokens), ("TILE", 4), ("PART", 100)):
        monkeypatch.setattr(f"MedRationaleLib.model.attention.{name}", value)
    stock = sam_modeling().image_encoder.Block(
        12, 3, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=window, input_size=(5, 5)
    )
    assert_same_values_and_gradients(stock, Block(12, 3, window, 5), shape)


def test_a_compiler_is_told_the_shapes_that_tiled_attention_gives() -> None:
    """Queries that go into no whole number of tiles, and values that are not contiguous."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 400, 8)
    v, by_row, by_column = (
        torch.randn(1, 400, 3, 8).transpose(1, 2),
        torch.randn(1, 3, 400, 20),
        torch.randn(1, 3, 400, 20),
    )
    torch.library.opcheck(
        torch.ops.medrationale.tiled_attention.default,
        (q, k, v, by_row, by_column),
        test_utils=("test_schema", "test_faketensor"),
    )


def assert_same_values_and_gradients(stock: torch.nn.Module, ours: torch.nn.Module, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stock, ours = stock.double(), ours.double()
    for name, parameter in stock.named_parameters():  # relative positions are zero at initialisation
        if "rel_pos" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, *shape, 12, dtype=torch.float64)
    outputs = [layer(x) for layer in (stock, ours)]
    assert torch.allclose(*outputs, atol=1e-12)
    with torch.inference_mode():
        assert torch.allclose(ours(x), outputs[0], atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    for (name, a), b in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-10), name


def test_the_decoder_without_detail_is_segment_anythings_called_image_by_image() -> None:
    torch.manual_seed(1)
    ours = ClassMaskDecoder(replace(TINY, detail_dim=0)).eval()
    torch.nn.init.normal_(ours.no_prompt)
    sam = sam_modeling()
    theirs = sam.MaskDecoder(
        transformer_dim=32,
        transformer=sam.TwoWayTransformer(depth=1, embedding_dim=32, num_heads=2, mlp_dim=16),
        num_multimask_outputs=3,
    ).eval()
    shared = {k: v for k, v in ours.state_dict().items() if k in theirs.state_dict()}
    theirs.load_state_dict(shared)
    embedding = torch.randn(3, 32, 4, 4)
    with torch.inference_mode():
        position = ours.position((4, 4))[None]
        dense = ours.no_prompt.view(1, 32, 1, 1).expand(1, 32, 4, 4)
        expected = [theirs.predict_masks(e[None], position, torch.zeros(1, 0, 32), dense)[0] for e in embedding]
        assert torch.allclose(ours(embedding), torch.cat(expected), atol=1e-5)


def test_the_levels_of_a_new_pyramid_join_without_changing_anything() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    images = torch.randn(1, 2, 3, 64, 64)
    with torch.inference_mode():
        detail = model.detail(images.flatten(0, 1))
        assert [tuple(level.shape[1:]) for level in detail] == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4)]
        assert torch.equal(model.f_img(images, detail), model.f_img(images))
        trained = torch.nn.init.normal_(model.f_img.detail.weight)
        assert trained.abs().sum() > 0 and not torch.equal(model.f_img(images, detail), model.f_img(images))


def test_pooling_is_the_mean_of_unit_embeddings_and_a_whole_slice_is_a_region() -> None:
    model = tiny_model()
    with torch.inference_mode():
        output = model(torch.randn(2, 3, 3, 64, 64))
    unit = torch.nn.functional.normalize(output.embedding, dim=2)
    weights = torch.rand(2, 1, *output.embedding.shape[1:2], *output.embedding.shape[3:])
    expected = (unit * weights[:, 0, :, None]).sum((1, 3, 4)) / weights.sum((2, 3, 4))
    assert torch.allclose(output.pool(weights)[:, 0], expected, atol=1e-4)
    assert torch.allclose(output.slice_means(), unit.mean((3, 4)), atol=1e-4)
    concepts = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    assert torch.allclose(output.similarity(1, concepts), torch.einsum("sdhw,kd->kshw", unit[1], concepts), atol=1e-4)


# ------------------------------------------------------------------ text


def test_the_text_tower_gives_unit_vectors_and_tells_phrases_apart() -> None:
    needs("open_clip")
    from MedRationaleLib.model.text_encoder import TextEncoder

    torch.manual_seed(0)
    tower = TextEncoder(TINY.text, 8, TextEncoder.vocabulary_of(["lenticular", "round or oval"])).eval()
    with torch.inference_mode():
        vectors = tower(tower.tokenize(["lenticular", "round or oval", "zzyzx", "qwfpgj"]))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
    assert not torch.allclose(vectors[0], vectors[1])
    assert tower.tokenize(["zzyzx"]).max() < tower.tower.vocab_size  # unknown words have an entry, too


def test_inference_imports_no_text_stack_and_no_compiler(folder: Path) -> None:
    code = (
        "import sys\n"
        "from MedRationaleLib.model.checkpoint import load_checkpoint\n"
        f"load_checkpoint({str(folder)!r})\n"
        "slow = ('open_clip', 'torchvision', 'transformers', 'monai', 'lightning', 'timm', 'torch._dynamo')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment, timeout=300, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_images_of_another_size_are_resized_to_the_models() -> None:
    model, images = tiny_model(), torch.randn(1, 2, 3, 128, 128)
    small = torch.nn.functional.interpolate(images[0], (64, 64), mode="bilinear")[None]
    with torch.no_grad():
        assert torch.equal(model(images).mask_logits, model(small).mask_logits)


@pytest.mark.parametrize(("form", "heat"), [("sigmoid", None), ("relu", [0.0, 0.3, 1.0]), ("raw", [-0.4, 0.3, 1.0])])
def test_heat_grows_with_the_cosine_and_is_dark_where_it_is_negative(form: str, heat: list[float] | None) -> None:
    model = RationaleModel(replace(TINY, heatmap=form), ["a"])
    cosine = torch.tensor([-0.4, 0.3, 1.0])
    given = model.heat(cosine).detach()
    if heat is None:
        assert given.tolist() == sorted(given.tolist()) and given[0] < 0.01 and 0.5 < given[2] < 1
    else:
        assert given.tolist() == pytest.approx(heat)


# ------------------------------------------------------------------ checkpoints


def test_a_model_comes_back_from_its_folder_as_it_was_up_to_float16(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, CARD}
    assert checkpoint.model.config == TINY
    assert checkpoint.postprocessing == {"lesion_likelihood": 0.4}
    images = torch.randn(1, 2, 3, 64, 64)
    with torch.inference_mode():
        ours, theirs = tiny_model()(images), checkpoint.model(images)
    assert torch.allclose(ours.mask_logits, theirs.mask_logits, atol=0.02)
    assert not checkpoint.model.training


def test_convolutions_lie_channels_last_in_memory_and_say_what_they_say_otherwise(folder: Path) -> None:
    model = load_checkpoint(folder).model
    convolutions = [p for p in model.parameters() if p.ndim == 4]
    assert convolutions and all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    images = torch.randn(1, 2, 3, model.config.pixels, model.config.pixels)
    with torch.inference_mode():
        last = model(images)
        first = model.to(memory_format=torch.contiguous_format)(images)
    torch.testing.assert_close(last.mask_logits, first.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.embedding, first.embedding, rtol=1e-4, atol=1e-4)


def test_the_stored_concept_embeddings_are_those_that_the_stored_text_tower_gives(tmp_path: Path) -> None:
    needs("lightning", "open_clip", "monai", "picai_eval")
    from MedRationaleTraining.trainer import store_concept_embeddings

    from MedRationaleLib.model.text_encoder import TextEncoder

    bank = ConceptBank.load()
    vocabulary = TextEncoder.vocabulary_of(phrases())
    model = tiny_model()
    model.attach_text(vocabulary)
    model.half().float()
    store_concept_embeddings(model, bank)
    save_checkpoint(model, tmp_path / "text", card="# text", vocabulary=vocabulary)
    loaded = load_checkpoint(tmp_path / "text", with_text=True)
    stored = loaded.model.concept_embeddings.clone()
    assert stored.abs().sum() > 0
    store_concept_embeddings(loaded.model, bank)
    assert torch.allclose(stored, loaded.model.concept_embeddings, atol=1e-3)
    assert loaded.vocabulary == vocabulary


def damage_truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def damage_one_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def damage_text_instead(folder: Path) -> None:
    (folder / WEIGHTS).write_text("no weights")


def damage_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def damage_missing_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def damage_broken_config(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def damage_foreign_config(folder: Path) -> None:
    (folder / CONFIG).write_text("[1]")


def damage_other_format(folder: Path) -> None:
    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**data, "format": 99}))


def damage_impossible_sizes(folder: Path) -> None:
    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    data["model"]["heads"] = 5
    (folder / CONFIG).write_text(json.dumps(data))


def damage_wrong_shape(folder: Path) -> None:
    data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    data["model"]["neck_dim"] = 64
    (folder / CONFIG).write_text(json.dumps(data))


def damage_missing_tensor(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["f_img.pos_embed"]
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncated, "damaged file"),
        (damage_one_byte, "another SHA-256"),
        (damage_text_instead, "damaged file"),
        (damage_missing_weights, f"Expected {WEIGHTS} beside"),
        (damage_missing_config, "found neither"),
        (damage_broken_config, "cannot be read"),
        (damage_foreign_config, "cannot be read"),
        (damage_other_format, "format 2 or earlier, got 99"),
        (damage_impossible_sizes, "heads must divide embed_dim"),
        (damage_wrong_shape, "of another shape"),
        (damage_missing_tensor, "1 missing (such as f_img.pos_embed)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_folder_is_refused_with_the_reason(folder: Path, damage, words: str) -> None:
    damage(folder)
    with pytest.raises(InputError) as refused:
        load_checkpoint(folder)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
