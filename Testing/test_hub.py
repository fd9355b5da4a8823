"""Fetching published files over HTTP, from a hub on this machine that cuts, lies and listens."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from published_weights import Hub, served  # noqa: E402

from MedRationaleLib import hub as hub_module  # noqa: E402
from MedRationaleLib.errors import InputError  # noqa: E402
from MedRationaleLib.hub import BIOMEDCLIP, Download, Repository, look_up  # noqa: E402

WEIGHTS = bytes(range(256)) * 16384  # 4 MiB
REVISION = "0" * 40


def no_wait(seconds: float) -> None:
    pass


@pytest.fixture
def repository() -> Repository:
    return Repository(
        name="someone/model",
        revision=REVISION,
        files=("config.json", "model.bin"),
        sha256={"model.bin": hashlib.sha256(WEIGHTS).hexdigest()},
    )


@pytest.fixture
def hub(tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"embed_dim": 512}')
    (source / "model.bin").write_bytes(WEIGHTS)
    with served(source, repository) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield running


def fetched(download: Download) -> list[tuple[str, int, int]]:
    told: list[tuple[str, int, int]] = []
    download.run(lambda *step: told.append(step), wait=no_wait)
    return told


def test_the_size_is_known_before_anything_is_fetched(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    download = look_up(repository, tmp_path / "cache")
    assert download.size == len(WEIGHTS) + len('{"embed_dim": 512}') and download.present == 0
    assert not (tmp_path / "cache").exists()
    assert [path for path, _ in hub.asked] == [f"/api/models/someone/model/tree/{REVISION}"]


def test_files_arrive_whole_with_their_progress(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    told = fetched(look_up(repository, tmp_path / "cache"))
    assert (tmp_path / "cache" / "model.bin").read_bytes() == WEIGHTS
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"config.json", "model.bin"}
    steps = [done for name, done, total in told if name == "model.bin" and total == len(WEIGHTS)]
    assert steps[0] == 0 and steps[-1] == len(WEIGHTS) and steps == sorted(steps) and len(steps) > 3


def test_what_is_there_and_right_is_not_fetched_again(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    fetched(look_up(repository, tmp_path / "cache"))
    hub.asked.clear()
    download = look_up(repository, tmp_path / "cache")
    assert download.present == download.size
    fetched(download)
    assert [path for path, _ in hub.asked] == [f"/api/models/someone/model/tree/{REVISION}"]


def test_a_file_that_was_changed_since_is_fetched_again(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    fetched(look_up(repository, tmp_path / "cache"))
    (tmp_path / "cache" / "model.bin").write_bytes(WEIGHTS[:-1] + b"x")
    fetched(look_up(repository, tmp_path / "cache"))
    assert (tmp_path / "cache" / "model.bin").read_bytes() == WEIGHTS


def test_a_cut_connection_goes_on_where_it_was_cut(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    hub.cut_after = [10**9, 1_000_000, 1_500_000]
    fetched(look_up(repository, tmp_path / "cache"))
    assert (tmp_path / "cache" / "model.bin").read_bytes() == WEIGHTS
    ranges = [asked for path, asked in hub.asked if path == "/elsewhere/model.bin"]
    assert ranges == [None, "bytes=1000000-", "bytes=2500000-"]


def test_a_server_without_ranges_sends_the_file_from_its_beginning(
    hub: Hub, repository: Repository, tmp_path: Path
) -> None:
    hub.ranges, hub.cut_after = False, [10**9, 1_000_000]
    fetched(look_up(repository, tmp_path / "cache"))
    assert (tmp_path / "cache" / "model.bin").read_bytes() == WEIGHTS


def test_a_transfer_that_was_given_up_goes_on_in_the_next_run(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    hub.cut_after = [10**9, 3_000_000, *[0] * 5]
    with pytest.raises(InputError, match="what was fetched so far is kept: repeat the command"):
        fetched(look_up(repository, tmp_path / "cache"))
    part = tmp_path / "cache" / "model.bin.part"
    assert part.stat().st_size == 3_000_000 and not (tmp_path / "cache" / "model.bin").exists()
    download = look_up(repository, tmp_path / "cache")
    assert download.present == 3_000_000 + len('{"embed_dim": 512}')
    hub.asked.clear()
    fetched(download)
    assert ("/elsewhere/model.bin", "bytes=3000000-") in hub.asked
    assert (tmp_path / "cache" / "model.bin").read_bytes() == WEIGHTS and not part.exists()


def test_an_interrupt_keeps_what_came_so_far(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if done > 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look_up(repository, tmp_path / "cache").run(interrupt, wait=no_wait)
    assert (tmp_path / "cache" / "model.bin.part").stat().st_size > 2_000_000
    fetched(look_up(repository, tmp_path / "cache"))
    assert (tmp_path / "cache" / "model.bin").read_bytes() == WEIGHTS


def test_a_part_of_another_file_is_not_built_upon(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model.bin.part").write_bytes(b"x" * (len(WEIGHTS) + 1))
    fetched(look_up(repository, tmp_path / "cache"))
    assert (tmp_path / "cache" / "model.bin").read_bytes() == WEIGHTS


def test_content_with_another_sha256_is_removed_and_named(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    download = look_up(repository, tmp_path / "cache")
    hub.files["model.bin"] = WEIGHTS[:-1] + b"x"
    with pytest.raises(InputError) as refused:
        fetched(download)
    assert f"SHA-256 {hashlib.sha256(WEIGHTS).hexdigest()}, got " in str(refused.value)
    assert "has been removed" in str(refused.value) and "\n" not in str(refused.value)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"config.json"}


def test_a_small_file_is_held_to_gits_hash_as_the_hub_tells_no_other(
    hub: Hub, repository: Repository, tmp_path: Path
) -> None:
    download = look_up(repository, tmp_path / "cache")
    hub.files["config.json"] = b'{"embed_dim": 513}'
    with pytest.raises(InputError, match="git's hash"):
        fetched(download)


def test_a_hub_whose_list_has_other_weights_is_refused_before_anything_is_fetched(
    hub: Hub, repository: Repository, tmp_path: Path
) -> None:
    hub.files["model.bin"] = b"other weights"
    with pytest.raises(InputError, match="in the hub's list; nothing was fetched"):
        look_up(repository, tmp_path / "cache")
    assert len(hub.asked) == 1


def test_a_repository_that_lacks_a_file_is_refused(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    del hub.files["config.json"]
    with pytest.raises(InputError, match=r"Expected the list of files of someone/model .* 'config.json'"):
        look_up(repository, tmp_path / "cache")


@pytest.mark.parametrize("offline", ["unreachable", "switched off"])
def test_offline_one_sentence_says_which_files_to_put_where(
    offline: str, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if offline == "unreachable":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as refused:
        look_up(repository, tmp_path / "cache")
    assert "put config.json, model.bin from " in str(refused.value)
    assert "into a folder and name it with --biomedclip FOLDER" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_full_disk_is_told_as_one(
    hub: Hub, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = look_up(repository, tmp_path / "cache")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module, "_append", full)
    with pytest.raises(InputError, match=r"Expected room for 0 MB in .*No space left on device"):
        fetched(download)


def test_biomedclip_is_pinned_to_a_commit_and_its_weights_to_a_hash() -> None:
    assert len(BIOMEDCLIP.revision) == 40 and set(BIOMEDCLIP.sha256) == {"open_clip_pytorch_model.bin"}
    assert {"open_clip_config.json", "vocab.txt", "tokenizer_config.json"} < set(BIOMEDCLIP.files)
