"""Low-rank updates, frozen towers, layer-wise rates and gradient checkpointing."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if find_spec("lightning") is None or find_spec("open_clip") is None:
    pytest.skip("the train extra is not installed", allow_module_level=True)

from MedRationaleTraining.config import ConstraintConfig, FitConfig, TuningConfig, check  # noqa: E402
from MedRationaleTraining.export import export_run  # noqa: E402
from MedRationaleTraining.fine_tuning import HEAT_FASTER, merge, optimizer_of, prepare  # noqa: E402
from MedRationaleTraining.trainer import STATE, Trainer, read_state  # noqa: E402
from training_samples import TINY, tiny_run  # noqa: E402

from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.model.checkpoint import load_checkpoint  # noqa: E402
from MedRationaleLib.model.rationale_model import RationaleModel  # noqa: E402


def tiny_model() -> RationaleModel:
    torch.manual_seed(0)
    return RationaleModel(TINY, ["a", "b"])


def output(model: RationaleModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(1, 2, 3, 256, 256, generator=torch.Generator().manual_seed(1))).mask_logits


@pytest.fixture(scope="module")
def lora(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    """A run that trains low-rank updates alone in the image encoder; the text tower is frozen."""
    tuning = TuningConfig(image_encoder="lora", lora_rank=2, text="frozen", checkpointing=True)
    config = tiny_run(tmp_path_factory.mktemp("runs") / "lora", tiny_set, tuning=tuning)
    Trainer(config).fit()
    return config


def test_low_rank_updates_begin_at_nothing_and_are_merged_without_a_trace() -> None:
    tuning = TuningConfig(image_encoder="lora", lora_rank=2)
    model = tiny_model()
    names, before = set(model.state_dict()), output(model)
    prepare(model, tuning)
    assert torch.equal(output(model), before)
    for block in model.f_img.blocks:
        update = block.attn.qkv.parametrizations.weight[0]
        torch.nn.init.normal_(update.up)
        change = (block.attn.qkv.weight - block.attn.qkv.parametrizations.weight.original).detach()
        dim = TINY.embed_dim
        assert torch.equal(change[dim : 2 * dim], torch.zeros(dim, dim)), "keys are left as they are"
        assert torch.linalg.matrix_rank(change[:dim]) == torch.linalg.matrix_rank(change[2 * dim :]) == 2
    changed = output(model)
    assert not torch.allclose(changed, before)
    merge(model, tuning)
    assert set(model.state_dict()) == names
    assert torch.allclose(output(model), changed, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "frozen"])
def test_what_sam_brought_is_left_as_it_was_and_what_was_added_is_trained(kind: str) -> None:
    model = prepare(tiny_model(), TuningConfig(image_encoder=kind))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    encoder = {name for name in trained if name.startswith("f_img.")}
    assert {name.split(".")[1] for name in encoder if "parametrizations" not in name} == {"axial", "detail"}
    assert any("parametrizations.weight.0" in name for name in encoder) == (kind == "lora")
    assert any(name.startswith("f_mask.") for name in trained)
    assert any(name.startswith("projection.") for name in trained)


def test_a_run_changes_what_it_trains_and_nothing_else(lora: FitConfig, tmp_path: Path) -> None:
    trainer = Trainer(replace(lora, out=str(tmp_path / "new")))
    begun = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    ended = read_state(Path(lora.out) / STATE)["model"]
    changed = {name for name, value in ended.items() if not torch.equal(value, begun[name])}
    assert not [name for name in changed if name.startswith("f_txt.") or name.endswith("weight.original")]
    assert "f_img.blocks.0.attn.qkv.parametrizations.weight.0.up" in changed
    assert "f_img.patch_embed.proj.weight" not in changed
    assert {name for name in changed if name.startswith("f_mask.")}


def test_the_exported_model_has_the_updates_in_its_weights(lora: FitConfig, tmp_path: Path) -> None:
    exported = load_checkpoint(export_run(Path(lora.out), tmp_path / "model")).model
    averaged = {
        name.removeprefix("module."): value
        for name, value in read_state(Path(lora.out) / STATE)["ema"].items()
        if name.startswith("module.")
    }
    part = "f_img.blocks.1.attn.qkv.parametrizations.weight."
    query, value = averaged[part + "0.up"] @ averaged[part + "0.down"]
    expected = averaged[part + "original"] + torch.cat([query, torch.zeros_like(query), value])
    assert torch.allclose(exported.f_img.blocks[1].attn.qkv.weight, expected, atol=1e-3)
    assert not torch.equal(expected, averaged[part + "original"])


def test_a_stopped_run_with_low_rank_updates_goes_on_to_the_same_weights(lora: FitConfig, tmp_path: Path) -> None:
    class Stopped(Trainer):
        def train_step(self, batch):
            if self.step == 3:
                raise KeyboardInterrupt
            return super().train_step(batch)

    again = replace(lora, out=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        Stopped(again).fit()
    Trainer(again).fit()
    first, second = (read_state(Path(config.out) / STATE)["ema"] for config in (lora, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointing_changes_no_gradient(tiny_set: Path, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        config = tiny_run(tmp_path / str(checkpointing), tiny_set, tuning=TuningConfig(checkpointing=checkpointing))
        trainer = Trainer(config)
        assert trainer.model.f_img.checkpointing is checkpointing
        kept: list[int] = []

        def keep(saved, kept=kept):
            kept.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            encoded = trainer.model.f_img(
                torch.ones(1, 2, 3, 256, 256), trainer.model.detail(torch.ones(2, 3, 256, 256))
            )
        encoded.square().sum().backward()
        gradients.append((trainer.model.f_img.patch_embed.proj.weight.grad, sum(kept)))
    assert torch.allclose(gradients[0][0], gradients[1][0], rtol=1e-4)
    assert gradients[1][1] < gradients[0][1]


def test_a_frozen_text_tower_embeds_a_phrasing_once(
    lora: FitConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(replace(lora, out=str(tmp_path / "run"), constraints=ConstraintConfig(disentangle=False)))
    asked: list[str] = []
    encoder = trainer.model.f_txt
    tokenize = encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda texts: (asked.extend(texts), tokenize(texts))[1])
    objective = trainer.objective.module
    found = [objective._remembered(["bright", "dark", "bright"]) for _ in range(2)]
    assert asked == ["bright", "dark"]
    assert torch.equal(*found) and torch.equal(found[0][0], found[0][2])
    assert not found[0].requires_grad and not encoder.training


def test_lower_layers_take_smaller_steps_and_the_projection_its_own(tiny_set: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", tiny_set, tuning=TuningConfig(layer_decay=0.5, projection=4.0))
    model = tiny_model()
    rates = {}
    for group in optimizer_of(model, config).param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["faster"]
    assert rates.keys() == {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert rates[model.f_img.patch_embed.proj.weight] == rates[model.f_img.pos_embed] == 0.25
    assert rates[model.f_img.blocks[0].attn.qkv.weight] == rates[model.f_img.blocks[0].norm1.bias] == 0.5
    assert rates[model.f_img.blocks[1].attn.qkv.weight] == rates[model.f_img.neck[0].weight] == 1.0
    assert {rates[parameter] for parameter in model.projection.parameters()} == {4.0}
    assert rates[model.heat_scale] == HEAT_FASTER


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        (TuningConfig(lora_rank=0), "lora_rank of at least 1"),
        (TuningConfig(layer_decay=1.5), "layer_decay above 0"),
        (TuningConfig(projection=0.0), "a positive tuning.projection"),
    ],
)
def test_a_tuning_that_cannot_be_is_refused(tuning: TuningConfig, expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=expected):
        check(tiny_run(tmp_path, tmp_path, tuning=tuning))
