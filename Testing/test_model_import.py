"""Published weights become a model folder: the same numbers, nothing lost unsaid, and training goes on from it."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for _name in ("open_clip", "transformers"):
    if importlib.util.find_spec(_name) is None:  # looks without importing, which needs the torchvision guard first
        pytest.skip(f"the train extra is not installed: {_name}", allow_module_level=True)

from published_weights import OPEN_CLIP_CONFIG, SMALL, biomedclip, sam, sam_weights, served  # noqa: E402

from MedRationaleLib.cli import main  # noqa: E402
from MedRationaleLib.concepts import ConceptBank  # noqa: E402
from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.hub import Repository  # noqa: E402
from MedRationaleLib.model import sam_weights as sam_module  # noqa: E402
from MedRationaleLib.model.biomedclip import read_biomedclip  # noqa: E402
from MedRationaleLib.model.checkpoint import CARD, CONFIG, WEIGHTS, load_checkpoint  # noqa: E402
from MedRationaleLib.model.config import medsam_biomedclip  # noqa: E402
from MedRationaleLib.model.importing import ImportedModel, import_model  # noqa: E402
from MedRationaleLib.model.sam_weights import read_sam  # noqa: E402
from MedRationaleLib.model.verification import verify  # noqa: E402
from MedRationaleLib.model_folders import TEXT, read_settings  # noqa: E402

FULL = medsam_biomedclip()


@pytest.fixture(scope="module")
def medsam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("medsam") / "medsam_vit_b.pth"
    torch.save(sam_weights(SMALL), path)
    return path


@pytest.fixture(scope="module")
def text_network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("published") / "biomedclip"
    return folder, biomedclip(folder)


@pytest.fixture(scope="module")
def imported(
    medsam: Path, text_network: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> ImportedModel:
    return import_model(medsam, text_network[0], tmp_path_factory.mktemp("models") / "imported", config=SMALL)


# ------------------------------------------------------------------ image encoder and mask decoder


def test_the_imported_image_encoder_gives_segment_anythings_numbers(imported: ImportedModel) -> None:
    stock = sam(SMALL).eval()
    stock.load_state_dict(sam_weights(SMALL))
    model = load_checkpoint(imported.folder).model
    images = torch.randn(1, 2, 3, 64, 64)
    with torch.inference_mode():
        expected, got = stock.image_encoder(images[0]), model.f_img(images)
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
        sparse, dense = stock.prompt_encoder(points=None, boxes=None, masks=None)
        masks = [
            stock.mask_decoder.predict_masks(e[None], stock.prompt_encoder.get_dense_pe(), sparse, dense)[0][0]
            for e in expected
        ]
        assert torch.allclose(model(images).mask_logits[0], torch.stack(masks), rtol=1e-4, atol=1e-4)


def test_the_stored_weights_are_the_files_bit_by_bit(imported: ImportedModel) -> None:
    given, model = sam_weights(SMALL), load_checkpoint(imported.folder, with_text=True).model.state_dict()
    assert torch.equal(model["f_img.patch_embed.proj.weight"], given["image_encoder.patch_embed.proj.weight"])
    assert torch.equal(model["f_mask.mask_tokens.weight"], given["mask_decoder.mask_tokens.weight"])
    assert torch.equal(model["f_mask.no_prompt"], given["prompt_encoder.no_mask_embed.weight"][0])


def test_what_is_taken_and_left_out_is_told(imported: ImportedModel) -> None:
    image = imported.image
    assert image.name == "medsam_vit_b.pth" and image.identity is None and image.changed == ()
    assert image.missing == image.unexpected == ()
    assert {name.split(".")[1] for name in image.left_out} == {
        "point_embeddings",
        "not_a_point_embed",
        "mask_downscaling",
    }
    assert image.tensors + len(image.left_out) == len(sam_weights(SMALL))
    assert set(imported.random) == {"projection.fuse.0.weight", "projection.fuse.0.bias"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model": weights, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}},
        lambda weights: {"model": {f"module.{name}": tensor for name, tensor in weights.items()}},
        lambda weights: {name: tensor.half() for name, tensor in weights.items()},
    ],
    ids=["under model, beside an optimiser", "of DataParallel", "float16"],
)
def test_a_training_scripts_ways_of_saving_are_read(wrap: Callable[[dict], Any], tmp_path: Path) -> None:
    torch.save(wrap(sam_weights(SMALL)), tmp_path / "tuned.pth")
    read = read_sam(tmp_path / "tuned.pth", SMALL)
    given = sam_weights(SMALL)["image_encoder.neck.0.weight"]
    assert torch.allclose(read.tensors["f_img.neck.0.weight"], given, atol=1e-3)
    assert read.tensors["f_img.neck.0.weight"].dtype == torch.float32


def test_a_file_from_before_torch_16_is_read(tmp_path: Path) -> None:
    torch.save(sam_weights(SMALL), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_sam(tmp_path / "old.pth", SMALL).taken.tensors > 0


@pytest.mark.parametrize("pixels", [32, 128])
def test_another_input_size_interpolates_positions_as_timm_and_segment_anything_do(
    pixels: int, medsam: Path, tmp_path: Path
) -> None:
    from timm.layers import resample_abs_pos_embed

    config = replace(SMALL, pixels=pixels)
    read = read_sam(medsam, config)
    side, before = pixels // 16, sam_weights(SMALL)
    tokens = before["image_encoder.pos_embed"].flatten(1, 2)
    positions = resample_abs_pos_embed(tokens, [side, side], [4, 4], num_prefix_tokens=0).unflatten(1, (side, side))
    assert torch.allclose(read.tensors["f_img.pos_embed"], positions, atol=1e-6)
    assert read.taken.changed == (
        f"position embeddings, bicubic, from 4 x 4 to {side} x {side} patches",
        f"relative position tables, linear, from 7 to {2 * side - 1} distances (blocks 1)",
    )
    # segment_anything interpolates its tables in each pass: with the file's own, it has to give the same numbers.
    stock = sam(config).image_encoder.eval()
    weights = {k.removeprefix("image_encoder."): v for k, v in before.items() if k.startswith("image_encoder.")}
    tables = {k: weights.pop(k) for k in list(weights) if k.startswith("blocks.1.attn.rel_pos")}
    stock.load_state_dict(weights | {"pos_embed": positions}, strict=False)
    for name, table in tables.items():
        setattr(stock.blocks[1].attn, name.rpartition(".")[2], torch.nn.Parameter(table))
    from MedRationaleLib.model.image_encoder import ImageEncoder

    ours = ImageEncoder(config).eval()
    ours.load_state_dict({k.removeprefix("f_img."): v for k, v in read.tensors.items() if k.startswith("f_img.")})
    images = torch.randn(1, 1, 3, pixels, pixels)
    with torch.inference_mode():
        assert torch.allclose(ours(images), stock(images[0]), rtol=1e-4, atol=1e-4)


def test_tensors_that_the_decoder_lacks_start_at_random_and_are_named(
    text_network: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    weights = {k: v for k, v in sam_weights(SMALL).items() if not k.startswith("mask_decoder.output_hyper")}
    weights["image_encoder.blocks.0.adapter.weight"] = torch.ones(2)
    torch.save(weights, tmp_path / "part.pth")
    made = import_model(tmp_path / "part.pth", text_network[0], tmp_path / "model", config=SMALL)
    assert made.image.unexpected == ("image_encoder.blocks.0.adapter.weight",)
    assert len(made.image.missing) == 4 * 3 * 2 and made.image.missing[0].startswith("f_mask.output_hypernetworks")
    assert set(made.image.missing) < set(made.random)
    card = (made.folder / CARD).read_text(encoding="utf-8")
    assert "f_mask.output_hypernetworks_mlps.0.layers.0.weight" in card
    assert "Not expected in such a file, and left out: image_encoder.blocks.0.adapter.weight" in card


class Code:
    """What pickle would call when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/nonexistent/medrationale",)


def other_size(width: int, depth: int) -> dict[str, torch.Tensor]:
    """What tells segment_anything's variants apart; the rest is some gigabytes."""
    blocks = {f"image_encoder.blocks.{i}.norm1.weight": torch.ones(width) for i in range(depth)}
    return {"image_encoder.patch_embed.proj.weight": torch.ones(width, 3, 16, 16), **blocks}


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda path: None, "got no file"),
    "a folder": (lambda path: path.mkdir(), "got a folder"),
    "empty": (lambda path: path.write_bytes(b""), "damaged, truncated or of another kind"),
    "a web page": (lambda path: path.write_text("<html>Sign in</html>"), "damaged, truncated or of another kind"),
    "pickled code": (
        lambda path: torch.save({"model": sam_weights(SMALL), "hook": Code()}, path),
        f"got a file that also holds Python objects ({os.mkdir.__module__}.mkdir), which are not loaded",
    ),
    "a pickled namespace": (
        lambda path: torch.save({"model": sam_weights(SMALL), "args": argparse.Namespace(lr=1)}, path),
        "Python objects (argparse.Namespace)",
    ),
    "no tensors": (lambda path: torch.save([1, 2], path), "got a file without named tensors"),
    "transformers' names": (
        lambda path: torch.save({"vision_encoder.pos_embed": torch.ones(1)}, path),
        "got others (such as vision_encoder.pos_embed)",
    ),
    "ViT-L": (lambda path: torch.save(other_size(1024, 24), path), "got one of SAM's ViT-L (1024 wide, 24 blocks)"),
    "ViT-H": (lambda path: torch.save(other_size(1280, 32), path), "got one of SAM's ViT-H (1280 wide, 32 blocks)"),
    "an incomplete encoder": (
        lambda path: torch.save({k: v for k, v in sam_weights(SMALL).items() if "blocks.1.mlp" not in k}, path),
        "got a file without 4 of the image encoder's tensors (such as image_encoder.blocks.1.mlp.lin1.bias)",
    ),
    "other windows": (
        lambda path: torch.save(sam_weights(replace(SMALL, window=4)), path),
        "Expected f_img.blocks.0.attn.rel_pos_h of (3, 8)",
    ),
    "values that are not finite": (
        lambda path: torch.save(
            sam_weights(SMALL) | {"mask_decoder.iou_token.weight": torch.full((1, 32), torch.inf)}, path
        ),
        "Expected finite weights",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_vit_b_of_sam_is_refused_in_one_sentence(what: str, tmp_path: Path) -> None:
    write, words = REFUSED[what]
    write(tmp_path / "given.pth")
    with pytest.raises(InputError) as refused:
        read_sam(tmp_path / "given.pth", SMALL)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value) and str(refused.value).startswith("Expected ")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_refused(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save(sam_weights(SMALL), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="damaged, truncated"):
        read_sam(path, SMALL)


# ------------------------------------------------------------------ text tower


def test_the_stored_concepts_are_what_open_clip_itself_says_of_their_phrasings(
    imported: ImportedModel, text_network: tuple[Path, torch.nn.Module]
) -> None:
    from open_clip.tokenizer import HFTokenizer

    folder, network = text_network
    tokenizer = HFTokenizer(str(folder), context_length=SMALL.text.context_length)
    stored = load_checkpoint(imported.folder).model.concept_embeddings
    bank = ConceptBank.load()
    with torch.inference_mode():
        for concept, row in zip(bank.values(), stored, strict=True):
            mean = network.encode_text(tokenizer(list(concept.all_phrasings)), normalize=True).mean(0)
            assert torch.allclose(row, torch.nn.functional.normalize(mean, dim=0), atol=1e-5), concept.id
    assert imported.unknown_words == 0 and not torch.allclose(stored[0], stored[1], atol=1e-3)


def test_what_is_no_text_is_left_out_of_biomedclip(imported: ImportedModel) -> None:
    assert imported.text.name == "open_clip_pytorch_model.bin"
    assert imported.text.unexpected == imported.text.missing == ()
    assert "text.transformer.embeddings.position_ids" in imported.text.left_out
    assert all(name.startswith(("visual.", "logit_scale", "text.tr")) for name in imported.text.left_out)


def test_the_official_names_and_shapes_of_biomedclips_text_tower_are_those_of_ours() -> None:
    """At full size without memory: open_clip's own network of the official configuration against what is expected."""
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    from MedRationaleLib.model.biomedclip import _expected

    text = OPEN_CLIP_CONFIG["model_cfg"]["text_cfg"]
    with torch.device("meta"):
        tower = HFTextEncoder(
            "bert",
            output_dim=OPEN_CLIP_CONFIG["model_cfg"]["embed_dim"],
            config=BertConfig(),
            proj_type=text["hf_proj_type"],
            pooler_type=text["hf_pooler_type"],
        )
    official = {f"tower.{k}": tuple(v.shape) for k, v in tower.state_dict().items() if "pooler" not in k}
    ours = _expected({}, FULL.shared_dim)
    assert ours == official and len(ours) == 199
    assert ours["tower.proj.0.weight"] == (640, 768) and ours["tower.proj.2.weight"] == (512, 640)


def test_the_official_configuration_leads_to_the_papers_text_settings(tmp_path: Path) -> None:
    from MedRationaleLib.model.biomedclip import _text_settings

    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG, indent=4))
    assert _text_settings(tmp_path / "open_clip_config.json") == (FULL.text.context_length, FULL.shared_dim)


def test_a_folder_as_in_the_repository_without_a_bert_config_is_read_by_its_shapes(tmp_path: Path) -> None:
    text = replace(SMALL.text, width=128, heads=2)
    biomedclip(tmp_path / "clip", text)
    (tmp_path / "clip" / "config.json").unlink()
    assert read_biomedclip(tmp_path / "clip").config == text


def test_safetensors_are_read_in_place_of_the_pickle(
    text_network: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    source, network = text_network
    folder = tmp_path / "clip"
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".bin":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "open_clip_model.safetensors")
    assert read_biomedclip(folder).taken.name == "open_clip_model.safetensors"


def set_config(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "open_clip_config.json").read_text())
    data["model_cfg"]["text_cfg"] |= changes
    (folder / "open_clip_config.json").write_text(json.dumps(data))


def set_bert(folder: Path, **changes: object) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | changes))


def set_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, folder / "open_clip_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "vocab.txt").unlink(), "got no vocab.txt; put the files there"),
        (lambda f: (f / "open_clip_config.json").unlink(), "got no open_clip_config.json"),
        (lambda f: (f / "open_clip_pytorch_model.bin").unlink(), "got no open_clip_pytorch_model.bin"),
        (lambda f: (f / "open_clip_config.json").write_text("{"), "cannot be read"),
        (lambda f: set_config(f, hf_pooler_type="mean_pooler"), "with mlp and mean_pooler"),
        (lambda f: set_config(f, context_length=4096), "Expected at most 48 tokens"),
        (lambda f: set_bert(f, hidden_size=32), "Expected hidden_size of 16, as the weights have"),
        (lambda f: set_weights(f, lambda w: w.pop("text.proj.2.weight")), "(such as text.proj.2.weight)"),
        (lambda f: set_weights(f, lambda w: w.update({"text.proj.2.weight": torch.ones(9, 12)})), "got (9, 12)"),
        (lambda f: set_weights(f, lambda w: w["text.proj.2.weight"].fill_(torch.nan)), "Expected finite weights"),
        (lambda f: set_weights(f, lambda w: [w.pop(k) for k in list(w) if k[:5] == "text."]), "(text.transformer.*)"),
        (lambda f: (f / "open_clip_pytorch_model.bin").write_bytes(b"PK"), "damaged, truncated"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_biomedclips_is_refused_in_one_sentence(
    damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    biomedclip(tmp_path / "clip")
    damage(tmp_path / "clip")
    with pytest.raises(InputError) as refused:
        read_biomedclip(tmp_path / "clip")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_missing_is_told_before_a_large_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "medsam.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"got no open_clip_config.json, no open_clip_pytorch_model.bin, no vocab.txt"):
        import_model(tmp_path / "medsam.pth", tmp_path / "nothing", tmp_path / "model")


def test_a_vocabulary_of_more_words_than_there_are_embeddings_is_refused(medsam: Path, tmp_path: Path) -> None:
    biomedclip(tmp_path / "clip")
    with (tmp_path / "clip" / "vocab.txt").open("a") as file:
        file.write("".join(f"word{i}\n" for i in range(50)))
    with pytest.raises(InputError, match="tokens for .* embeddings"):
        import_model(medsam, tmp_path / "clip", tmp_path / "model", config=SMALL)
    assert not (tmp_path / "model").exists()


# ------------------------------------------------------------------ the folder


def test_the_folder_is_like_every_model_folder_with_the_tokenizer_beside(imported: ImportedModel) -> None:
    assert {path.name for path in imported.folder.iterdir()} == {WEIGHTS, CONFIG, CARD, TEXT}
    data = json.loads((imported.folder / CONFIG).read_text(encoding="utf-8"))
    assert data["model"]["text"]["folder"] == TEXT
    assert str(imported.folder.parent) not in (imported.folder / CONFIG).read_text(encoding="utf-8")
    assert [check for check in verify(imported.folder) if check.passed is not True] == []


def test_a_folder_that_was_moved_still_has_its_tokenizer(imported: ImportedModel, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(imported.folder, moved)
    assert load_checkpoint(moved, with_text=True).model.config.text.folder == str(moved / TEXT)


def test_the_same_files_give_the_same_folder(
    imported: ImportedModel, medsam: Path, text_network: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(99)
    again = import_model(medsam, text_network[0], tmp_path / "again", config=SMALL)
    for name in (WEIGHTS, CONFIG, CARD):
        assert (again.folder / name).read_bytes() == (imported.folder / name).read_bytes()


def test_nothing_half_written_stays_and_nothing_is_overwritten(
    medsam: Path, text_network: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(InputError):
        import_model(medsam, tmp_path / "no_folder", tmp_path / "model", config=SMALL)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="which is not empty; choose another name"):
        import_model(medsam, text_network[0], tmp_path / "model", config=SMALL)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]


def test_that_it_is_untrained_stands_in_the_card_in_info_and_in_every_assessment(
    imported: ImportedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_study import adc_map, save, volume

    card = (imported.folder / CARD).read_text(encoding="utf-8")
    assert "imported and not trained" in card.splitlines()[0] and "every reason, heatmap and category" in card
    assert main(["model", "info", str(imported.folder)]) == 0
    assert "was imported and not fine-tuned" in capsys.readouterr().out
    images = {"t2w": volume(), "adc": adc_map(), "dwi": volume(40.0, seed=1)}
    for name, image in images.items():
        save(image, tmp_path / f"{name}.mha")
    files = [word for name in images for word in (f"--{name}", str(tmp_path / f"{name}.mha"))]
    asked = ["predict", *files, "--b-value", "1400", "--model", str(imported.folder), "--device", "cpu"]
    assert main([*asked, "--out", str(tmp_path / "report"), "--quiet"]) == 0
    assert "Warning: The model 'tiny' was imported and not fine-tuned" in capsys.readouterr().err
    assert "was imported and not fine-tuned" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_training_begins_from_the_folder_alone_and_what_it_exports_is_whole(
    imported: ImportedModel, tiny_set: Path, tmp_path: Path
) -> None:
    for name in ("lightning", "monai", "picai_eval"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the train extra is not installed: {name}")
    from MedRationaleTraining.export import export_run
    from MedRationaleTraining.trainer import Trainer
    from training_samples import tiny_run

    model = replace(SMALL, text=replace(SMALL.text, folder=None))
    run = tiny_run(tmp_path / "run", tiny_set, model=model, initial=str(imported.folder), steps=2)
    trainer = Trainer(run)
    start = load_checkpoint(imported.folder, with_text=True).model.state_dict()
    assert all(torch.equal(v, start[k]) for k, v in trainer.model.state_dict().items())
    trainer.fit()
    folder = export_run(tmp_path / "run", tmp_path / "model")
    checkpoint = load_checkpoint(folder, with_text=True)
    assert checkpoint.warning is None and read_settings(folder).state == "trained"
    assert checkpoint.training["initial"]["imported"]["image"]["name"] == "medsam_vit_b.pth"
    moved = checkpoint.model.state_dict()
    for part in ("f_img.", "f_mask.", "projection.", "f_txt."):
        assert any(not torch.allclose(v, start[k]) for k, v in moved.items() if k.startswith(part)), part
    card = (folder / CARD).read_text(encoding="utf-8")
    assert "It began from published weights: medsam_vit_b.pth and open_clip_pytorch_model.bin" in card
    assert "Apache-2.0, as the code" not in card
    failed = [check for check in verify(folder) if check.passed is not True]
    assert failed == []


def test_an_initial_model_of_other_sizes_is_refused(imported: ImportedModel) -> None:
    from MedRationaleTraining.trainer import build_model
    from training_samples import tiny_run

    run = tiny_run(Path("run"), Path("set"), model=replace(SMALL, pixels=128), initial=str(imported.folder))
    with pytest.raises(InputError, match="Expected a model of the configured sizes"):
        build_model(run, ConceptBank.load())


# ------------------------------------------------------------------ command line


def test_full_size_files_become_the_papers_model_which_paper_yaml_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SAM's ViT-B at 1024 pixels, every name and shape; a text tower of one layer beside it, to spare memory."""
    from MedRationaleTraining.commands import fit_config, fit_parser
    from MedRationaleTraining.trainer import build_model

    weights = sam_weights(FULL, dtype=torch.float16)
    torch.save(weights, tmp_path / "medsam_vit_b.pth")
    biomedclip(tmp_path / "clip", replace(FULL.text, width=64, layers=1, heads=1), embed_dim=512)
    asked = ["--medsam", tmp_path / "medsam_vit_b.pth", "--biomedclip", tmp_path / "clip", "--out", tmp_path / "model"]
    assert main(["model", "import", *map(str, asked)]) == 0
    told = capsys.readouterr().out
    assert "taken        299 tensors, 93.7 M parameters" in told and told.count("unexpected   none") == 2
    assert f"Model: {tmp_path / 'model'}" in told and "Warning: The model 'medsam_biomedclip' was imported" in told
    model = load_checkpoint(tmp_path / "model").model
    assert replace(model.config, text=FULL.text) == FULL
    state = model.state_dict()
    assert torch.equal(state["f_img.pos_embed"], weights["image_encoder.pos_embed"].float())
    last = "blocks.11.attn.rel_pos_w"
    assert torch.equal(state[f"f_img.{last}"], weights[f"image_encoder.{last}"].float())
    assert sum(p.numel() for p in model.f_img.parameters()) == 89_670_912
    paper = Path(__file__).resolve().parents[1] / "Training" / "configs" / "paper.yaml"
    smaller = [word for name, n in (("width", 64), ("layers", 1), ("heads", 1)) for word in (f"--model.text.{name}", n)]
    asked = ["--initial", tmp_path / "model", "--config", paper, *smaller]
    config = fit_config(fit_parser().parse_args([*map(str, asked)]))
    assert config.initial == str(tmp_path / "model")
    begun, _, known = build_model(config, ConceptBank.load())
    assert torch.equal(begun.state_dict()["f_img.pos_embed"], state["f_img.pos_embed"]) and "imported" in known


def test_another_size_of_sam_is_refused_by_the_command_before_anything_is_written(
    text_network: tuple[Path, torch.nn.Module], medsam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--medsam", str(medsam), "--biomedclip", str(text_network[0]), "--out", str(tmp_path / "model")]
    assert main(["model", "import", *asked]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "medrationale: Expected an image encoder of SAM's ViT-B (768 wide, 12 blocks), got one of another size "
        f"(16 wide, 2 blocks) in {medsam}; name its file."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pixels", ["0", "1000"])
def test_pixels_that_patches_do_not_divide_are_refused(
    pixels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--medsam", "no.pth", "--biomedclip", "no", "--out", str(tmp_path / "model"), "--pixels", pixels]
    assert main(["model", "import", *asked]) == 2
    assert "Expected --pixels of a multiple of 16" in capsys.readouterr().err


def test_the_hub_is_asked_only_when_named_and_says_its_size_first(
    text_network: tuple[Path, torch.nn.Module],
    medsam: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = (text_network[0] / "open_clip_pytorch_model.bin").read_bytes()
    repository = Repository(
        name="someone/BiomedCLIP",
        revision="1" * 40,
        files=("open_clip_config.json", "vocab.txt", "tokenizer_config.json", "open_clip_pytorch_model.bin"),
        sha256={"open_clip_pytorch_model.bin": hashlib.sha256(weights).hexdigest()},
    )
    monkeypatch.setattr("MedRationaleLib.hub.BIOMEDCLIP", repository)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # The paper's model at full size has a test of its own.
    monkeypatch.setattr("MedRationaleLib.model.config.medsam_biomedclip", lambda: SMALL)
    with served(text_network[0], repository) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        asked = ["--medsam", str(medsam), "--out", str(tmp_path / "model"), "--pixels", "64", "--biomedclip"]
        assert main(["model", "import", *asked, str(tmp_path / "no")]) == 2
        assert main(["model", "import", "--medsam", "no.pth", *asked[2:], "hub"]) == 2
        assert hub.asked == []
        capsys.readouterr()
        assert main(["model", "import", *asked, "hub"]) == 0
        assert {path.rpartition("/")[2] for path, _ in hub.asked[1:]} == set(repository.files)
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if "MB" in line]
    assert lines[0].startswith(f"someone/BiomedCLIP from {hub.url}/someone/BiomedCLIP/tree/{'1' * 40} (MIT licence): ")
    assert any(line.startswith("open_clip_pytorch_model.bin: ") for line in lines[1:])
    record = read_settings(tmp_path / "model").training["imported"]["text"]
    assert (record["repository"], record["revision"]) == (repository.name, repository.revision)
    assert "The files from the hub are kept in" in told.out


def test_an_interrupted_transfer_is_told_as_one(
    text_network: tuple[Path, torch.nn.Module],
    medsam: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repository = Repository(name="someone/BiomedCLIP", revision="1" * 40, files=("vocab.txt",))
    monkeypatch.setattr("MedRationaleLib.hub.BIOMEDCLIP", repository)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    monkeypatch.setattr("MedRationaleLib.model.config.medsam_biomedclip", lambda: SMALL)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("MedRationaleLib.hub._append", interrupt)
    with served(text_network[0], repository) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        asked = ["--medsam", str(medsam), "--biomedclip", "hub", "--out", str(tmp_path / "model"), "--pixels", "64"]
        assert main(["model", "import", *asked]) == 130
    assert "interrupted; what came so far is kept" in capsys.readouterr().err


def test_published_files_are_known_by_their_hash(
    medsam: Path, monkeypatch: pytest.MonkeyPatch, imported: ImportedModel
) -> None:
    monkeypatch.setattr(sam_module, "KNOWN", {imported.image.sha256: "MedSAM ViT-B as published"})
    assert read_sam(medsam, SMALL).taken.identity == "MedSAM ViT-B as published"
