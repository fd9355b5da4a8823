"""A network's crops: in parts that fit into the memory, in other precisions, and of some slices alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from training_samples import TINY  # noqa: E402

from MedRationaleLib import inference  # noqa: E402
from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.model.rationale_model import RationaleModel  # noqa: E402
from MedRationaleLib.network import SLICES_AT_ONCE, Network, Prediction  # noqa: E402
from MedRationaleLib.postprocessing import PostprocessingConfig  # noqa: E402
from MedRationaleLib.preprocessing import Grid, ModelInput  # noqa: E402

SLICES = 6


@pytest.fixture(scope="module")
def by_slice() -> RationaleModel:
    """A model without context across slices, as the paper's."""
    torch.manual_seed(0)
    model = RationaleModel(replace(TINY, axial_every=0), ["a", "b", "c"]).eval()
    model.concept_embeddings.copy_(torch.nn.functional.normalize(torch.randn(3, TINY.shared_dim), dim=1))
    return model


@pytest.fixture(scope="module")
def given() -> ModelInput:
    images = np.random.default_rng(0).standard_normal((SLICES, 3, 256, 256)).astype(np.float32)
    grid = Grid(
        origin=(0.0, 0.0, 0.0),
        spacing=(0.75, 0.75, 3.0),
        direction=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        size=(256, 256, SLICES),
    )
    return ModelInput(images=images, valid=np.ones(images.shape, bool), present=np.ones(3, bool), grid=grid)


def float32(model: RationaleModel, **options) -> Network:
    return Network(model, "cpu", precision="float32", **options)


def same(first: Prediction, second: Prediction, slices=slice(None), tolerance: float = 1e-5) -> bool:
    return np.allclose(first.probabilities[:, slices], second.probabilities[:, slices], atol=tolerance) and np.allclose(
        first.similarity[:, slices], second.similarity[:, slices], atol=tolerance
    )


def test_slices_one_by_one_say_what_all_at_once_say(by_slice, given, monkeypatch) -> None:
    network, told = float32(by_slice), []
    alone = network(given, progress=told.append)
    assert told == [pytest.approx((i + 1) / (2 * SLICES)) for i in range(2 * SLICES)]
    monkeypatch.setitem(SLICES_AT_ONCE, "cpu", 2 * SLICES)
    assert same(alone, network(given))
    images = torch.from_numpy(given.images)
    with torch.no_grad():
        both = [by_slice(view[None]).mask_logits[0].sigmoid() for view in (images, images.flip(-1))]
    expected = ((both[0] + both[1].flip(-1)) / 2).permute(1, 0, 2, 3).numpy()
    assert np.allclose(alone.probabilities, expected, atol=1e-5)


def test_a_memory_that_does_not_suffice_is_asked_for_half(by_slice, given, monkeypatch, caplog) -> None:
    network, sizes = float32(by_slice), []
    whole, real = network(given), network._ask
    monkeypatch.setitem(SLICES_AT_ONCE, "cpu", 8)

    def ask(stacks):
        sizes.append(len(stacks))
        if len(stacks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(stacks)

    monkeypatch.setattr(network, "_ask", ask)
    assert same(whole, network(given))
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    assert "does not suffice for 4 slice(s) at once" in caplog.text


def test_slices_that_are_left_out_are_dark_and_the_others_as_before(by_slice, given) -> None:
    network = float32(by_slice)
    seen = np.array([False, True, True, False, True, False])
    whole, part = network(given), network(given, seen)
    assert same(whole, part, seen)
    assert not part.probabilities[:, ~seen].any() and not part.similarity[:, ~seen].any()
    assert not part.slice_similarity[~seen].any() and part.slice_similarity.shape == (SLICES, 3)
    assert part.seen.tolist() == seen.tolist() and whole.seen.all()


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.1), ("int8", 0.1)])
def test_other_precisions_are_near_and_not_the_same(by_slice, given, precision: str, tolerance: float) -> None:
    before = {name: value.clone() for name, value in by_slice.state_dict().items()}
    exact, near = float32(by_slice)(given), Network(by_slice, "cpu", precision=precision)(given)
    assert same(exact, near, tolerance=tolerance)
    assert not np.array_equal(exact.similarity, near.similarity)
    assert all(torch.equal(value, before[name]) for name, value in by_slice.state_dict().items())


def test_matrices_stored_in_bfloat16_say_what_autocast_says(by_slice, given) -> None:
    network = Network(by_slice, "cpu", precision="bfloat16")
    assert network.model.f_img.blocks[0].attn.qkv.weight.dtype is torch.bfloat16
    assert by_slice.f_img.blocks[0].attn.qkv.weight.dtype is torch.float32
    stored = network(given)
    network.model = by_slice
    by_autocast = network(given)
    assert np.array_equal(stored.probabilities, by_autocast.probabilities)
    assert np.array_equal(stored.similarity, by_autocast.similarity)


def test_on_the_cpu_the_matrices_are_those_for_the_cpu(by_slice, given, monkeypatch) -> None:
    network = Network(by_slice, "cpu", precision="auto")
    network.device, real = "cuda", network._ask

    def ask(stacks):
        if network.device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(stacks)

    monkeypatch.setattr(network, "_ask", ask)
    monkeypatch.setattr("MedRationaleLib.model.precision.bf16_in_hardware", lambda device: False)
    prediction = network(given)
    assert network.model.f_img.blocks[0].attn.qkv.weight.dtype is torch.float32
    assert same(prediction, float32(by_slice)(given))


def test_without_a_compiler_nothing_is_left_to_fail_later(by_slice, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"Expected a C\+\+ compiler .* found none of g\+\+"):
        float32(by_slice, compiled=True)


def test_a_compiled_encoder_is_asked_in_place_of_the_models(by_slice, given, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    monkeypatch.setenv("CXX", sys.executable)  # any program will do, for nothing is compiled
    network = float32(by_slice, compiled=True)
    assert len(compiled) == 1 and type(compiled[0]) is type(by_slice.f_img)
    assert same(float32(by_slice)(given), network(given))


@pytest.mark.parametrize(
    ("gland", "beside", "expected"),
    [
        ([0, 0, 0, 0, 0, 1], 2, [False, False, False, True, True, True]),
        ([0, 1, 0, 0, 0, 0], 1, [True, True, True, False, False, False]),
        ([1, 0, 0, 0, 1, 1], 1, [False, False, False, True, True, True]),  # what lies apart from the gland is none
        ([0, 0, 0, 0, 0, 0], 2, None),
    ],
)
def test_slices_near_the_gland_are_those_that_the_shipped_model_finds_it_in(
    by_slice, given, monkeypatch, gland, beside, expected
) -> None:
    found = np.zeros((4, SLICES, 8, 8), np.float32)
    found[0, :, 2:5, 2:5] = np.array(gland)[:, None, None]
    network = SimpleNamespace(probabilities=found)
    coarse = SimpleNamespace(network=lambda crop: network, postprocessing=PostprocessingConfig())
    monkeypatch.setattr(inference, "BESIDE", beside)
    predictor = SimpleNamespace(all_slices=False, network=float32(by_slice), _coarse=coarse)
    near = inference.Predictor.near_gland(predictor, given)
    assert (near is None) if expected is None else near.tolist() == expected
    monkeypatch.setattr(inference, "FOUND_ML", 100.0)
    assert inference.Predictor.near_gland(predictor, given) is None, "so little is not taken for the gland"
    monkeypatch.undo()
    predictor.all_slices = True
    assert inference.Predictor.near_gland(predictor, given) is None


def test_a_model_with_context_across_slices_looks_at_all_of_them(given) -> None:
    predictor = SimpleNamespace(all_slices=False, network=float32(RationaleModel(TINY, ["a"]).eval()), _coarse=None)
    assert inference.Predictor.near_gland(predictor, given) is None
