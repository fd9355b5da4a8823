"""The benchmark on the smallest network that it takes: what it writes, and that the networks are the same."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if any(find_spec(name) is None for name in ("lightning", "monai", "jsonargparse")):
    pytest.skip("the train extra is not installed", allow_module_level=True)

from MedRationaleTraining import benchmark, training_cost  # noqa: E402
from MedRationaleTraining.cli import main  # noqa: E402
from MedRationaleTraining.commands import fit_config, fit_parser  # noqa: E402
from MedRationaleTraining.config import BenchmarkConfig  # noqa: E402
from training_samples import small_networks  # noqa: E402

from MedRationaleLib.phantom import write_phantom  # noqa: E402

SMALL = ("--pixels", "128", "--depth", "3", "--rounds", "1", "--memory", "false")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("benchmarks") / "made"
    with pytest.MonkeyPatch.context() as patch:
        small_networks(patch)
        patch.setattr(benchmark, "bf16_in_hardware", lambda _: True)
        patch.setattr(torch, "compile", lambda module: module)  # takes minutes, and a compiler
        patch.setenv("CXX", sys.executable)
        assert main(["benchmark", "--out", str(out), *SMALL]) == 0
    assert (out / "cpu.svg").read_text(encoding="utf-8").count("<rect") == 1 + 4 + 5
    return json.loads((out / "cpu.json").read_text(encoding="utf-8"))


def test_every_encoder_has_its_ratio_error_and_memory(record: dict) -> None:
    encoder = record["encoder"]
    assert (encoder["pixels"], encoder["layers"], record["rounds"]) == (128, 3, 1)
    stock = encoder["segment_anything"]["seconds"]["median"]
    for name in ("float32", "bf16", "int8"):
        row = encoder[name]
        assert row["ratio"] == pytest.approx(stock / row["seconds"]["median"], rel=0.02)
    assert encoder["float32"]["relative_error"] < 1e-5 < encoder["bf16"]["relative_error"] < 0.05
    assert 1e-5 < encoder["int8"]["relative_error"] < 0.2


def test_bfloat16_that_is_only_emulated_is_left_out_and_said_to_be(
    record: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "left out" not in benchmark.table(record)
    monkeypatch.setattr(benchmark, "bf16_in_hardware", lambda _: False)
    for compiled in (True, False):
        config = BenchmarkConfig(out="", compiled=compiled)
        assert benchmark._encoders(config) == ["segment_anything", "float32", "int8"]
    emulated = record | {"machine": record["machine"] | {"bf16_in_hardware": False}}
    assert "bf16 is left out: this machine would only emulate it." in benchmark.table(emulated)


def test_an_encoders_memory_is_that_of_a_process_of_its_own() -> None:
    with_torch_alone, config = 0.15, BenchmarkConfig(out="", pixels=256, depth=3)
    held = torch.ones(4 * 10**8)  # 1.6 GB here, which are not there
    peak = training_cost.alone(benchmark._peak, "float32", config)
    assert with_torch_alone < peak < 4e-9 * held.numel() + with_torch_alone


def without_memory(bytes_: int) -> float:
    return float(torch.empty(bytes_, dtype=torch.uint8).sum())


def faulty() -> None:
    raise RuntimeError("a fault of another kind")


def test_memory_that_gives_out_in_a_process_is_told_from_a_fault() -> None:
    assert training_cost.alone(without_memory, 1 << 60) is None
    with pytest.raises(RuntimeError, match="another kind"):
        training_cost.alone(faulty)


def test_a_benchmark_that_was_stopped_goes_on_with_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the encoder; what was measured with other settings or code is measured anew."""
    asked: list[str] = []
    encoder = {"segment_anything": {"seconds": {"median": 1.0}}}

    def measured(name: str, result: object) -> Callable[..., object]:
        def make(*_: object) -> object:
            asked.append(name)
            if isinstance(result, BaseException):
                raise result
            return result

        return make

    write_phantom(tmp_path / "case")
    out = tmp_path / "out"
    config = BenchmarkConfig(out=str(out), pixels=256, depth=3, rounds=1, study=False, case=str(tmp_path / "case"))
    monkeypatch.setattr(benchmark, "large_model", lambda _: None)
    monkeypatch.setattr(benchmark, "_encoder", measured("encoder", encoder))
    monkeypatch.setattr(benchmark, "_compact", measured("compact", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        benchmark.measure(config)
    assert [path.name for path in out.iterdir()] == ["cpu.part.json"]
    monkeypatch.setattr(benchmark, "_compact", measured("compact", {"predict_s": 2.0}))
    record = benchmark.measure(config)
    assert asked == ["encoder", "compact", "compact"] and record["encoder"] == encoder
    assert {path.name for path in out.iterdir()} == {"cpu.json", "cpu.svg"}
    for code in (benchmark.commit, lambda: "another"):
        (out / "cpu.json").rename(out / "cpu.part.json")
        del asked[:]
        monkeypatch.setattr(benchmark, "commit", code)
        benchmark.measure(replace(config, rounds=2))
        assert asked == ["encoder", "compact"]


def test_a_process_that_the_memory_gives_out_for_is_no_end_of_the_benchmark() -> None:
    assert training_cost.alone(os._exit, 137) is None


def test_the_papers_training_step_is_measured_by_batch_and_by_what_is_trained() -> None:
    paper = Path(__file__).resolve().parents[1] / "Training" / "configs" / "paper.yaml"
    fit = fit_config(fit_parser().parse_args(["--config", str(paper)]))
    small = replace(fit.model.text, width=48, layers=1, heads=2)
    fit = replace(fit, model=replace(fit.model, text=small))
    config = BenchmarkConfig(out="", pixels=64, depth=1, rounds=1, batches=[2])
    rows = training_cost.training_cost(fit, config)
    assert [(row["tuning"], row["slices"]) for row in rows] == [(name, 2) for name in training_cost.TUNINGS]
    for row in rows:
        assert 0 < row["step"]["seconds"] < 60 and 0.2 < row["step"]["peak_gb"] < 8


def test_a_study_is_measured_with_and_without_the_slices_that_have_no_gland(record: dict) -> None:
    study = record["study"]
    assert 0 < study["slices_near_gland"] < study["slices"] == 24
    stock = study["segment_anything_encoder_s"]["median"]  # of the study's one round
    assert 0.2 < stock / (record["encoder"]["segment_anything"]["seconds"]["median"] * 24 * 2) < 5
    for name in ("ungated", "gated", "gated_compiled", "unet", "swin_unetr"):
        assert study[name]["ratio"] == pytest.approx(stock / study[name]["seconds"]["median"], rel=0.02)
    assert 0 < record["compact"]["model_s"] < record["compact"]["predict_s"]


def test_the_encoder_to_compare_with_is_segment_anythings_own_on_the_same_weights() -> None:
    model = benchmark.large_model(BenchmarkConfig(out="", pixels=256, depth=3))
    stock = benchmark.stock_encoder(model)
    assert type(stock).__module__.endswith("modeling.image_encoder") and type(stock).__name__ == "ImageEncoderViT"
    assert any(parameter.abs().max() > 0 for name, parameter in stock.named_parameters() if "rel_pos" in name)
    image = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        assert torch.allclose(stock(image), model.f_img(image[None]), atol=1e-5)


def test_the_readmes_tables_have_every_ratio_and_say_where_memory_gave_out(record: dict) -> None:
    trained = [
        {"tuning": "full", "batch": 1, "slices": 1, "step": {"seconds": 2.04, "min": 2, "max": 3, "peak_gb": 4.0}},
        {"tuning": "full", "batch": 4, "slices": 4, "step": None},
    ]
    told = benchmark.table({**record, "training": trained})
    for name, ratio, _ in benchmark.rows(record):
        assert f"| {name} | {ratio:.2f} |" in told
    assert "| full | 1 | 2.0 | 4.0 GB |" in told and "| full | 4 | out of memory, or killed |" in told


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["benchmark", "--out", str(tmp_path), "--pixels", "250"]) == 2
    assert "pixels that are a multiple of 16" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["benchmark", "--out", str(tmp_path / "gpu"), "--device", "cuda"]) == 2
        assert "Expected a device that is here, got 'cuda'" in capsys.readouterr().err
    assert main(["benchmark", "--out", str(tmp_path / "gpu"), "--device", "nothing"]) == 2
    assert "got 'nothing'" in capsys.readouterr().err and not (tmp_path / "gpu").exists()
    assert main(["benchmark", "--out", str(tmp_path / "gpu"), "--case", str(tmp_path)]) == 2
    assert "expected a folder with image files" in capsys.readouterr().err and not (tmp_path / "gpu").exists()
    assert main(["benchmark", "--out", str(tmp_path), "--pixels", "0"]) == 2
