"""Where a model comes from: a folder, the hub, or the hub's cache when the network is away."""

import errno
import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dopsd_jax import families
from dopsd_jax.common.errors import UserError
from dopsd_jax.weights import hub

COMMIT = "f332072aa78be7aecdf3ee76d5c247082da564a6"
NAME = "owner/some-model"


def _cache(root: Path, name: str = NAME, commit: str = COMMIT) -> Path:
    """A repository in the hub's cache, as the client lays it out."""
    repo = root / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def _client(monkeypatch, answer):
    """Puts a stand-in for the hub's client; returns the list of its calls."""
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return calls


def test_a_folder_is_itself(tmp_path, monkeypatch):
    calls = _client(monkeypatch, AssertionError("the hub was asked"))
    assert hub.resolve(str(tmp_path)) == (tmp_path, None)
    (tmp_path / hub.MODEL_MANIFEST).write_text('{"revision": "abc"}')
    assert hub.resolve(str(tmp_path)).revision == "abc"
    assert not calls


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    _client(monkeypatch, AssertionError("the hub was asked"))
    (tmp_path / "owner" / "some-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(NAME).path == Path(NAME)


def test_a_hub_id_is_downloaded_and_its_commit_recorded(tmp_path, monkeypatch):
    snapshot = _cache(tmp_path)
    calls = _client(monkeypatch, snapshot)
    assert hub.resolve(NAME) == (snapshot, COMMIT)
    assert hub.resolve(f"{NAME}@v1") == (snapshot, COMMIT)
    assert hub.resolve(NAME, revision="v2", patterns=["*.json"]) == (snapshot, COMMIT)
    assert [call[:2] for call in calls] == [(NAME, None), (NAME, "v1"), (NAME, "v2")]
    assert calls[0][2] == list(hub.PIPELINE) and calls[2][2] == ["*.json"]


def test_only_what_a_pipeline_needs_is_asked_for():
    wanted = lambda file: any(Path(file).match(pattern) for pattern in hub.PIPELINE)
    for file in (
        "model_index.json",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "text_encoder/model.safetensors.index.json",
        "vae/config.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
    ):
        assert wanted(file), file
    for file in ("assets/showcase.jpg", "transformer/model.bin", "all-in-one.safetensors"):
        assert not wanted(file), file


def test_a_cached_model_is_found_offline(offline):
    snapshot = _cache(offline)
    for model in (NAME, f"{NAME}@main", f"{NAME}@{COMMIT}"):
        assert hub.resolve(model) == (snapshot, COMMIT)


def test_what_is_not_cached_is_told_offline(offline):
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub.resolve(NAME)
    _cache(offline)
    with pytest.raises(UserError, match="cache"):
        hub.resolve(f"{NAME}@other")


@pytest.mark.parametrize(
    "model", ["", "model", "a/b/c", "/no/where", "./x/y", "~/x", "a/b@", "ä/b"]
)
def test_what_is_neither_folder_nor_id_is_told(model, monkeypatch):
    calls = _client(monkeypatch, AssertionError("the hub was asked"))
    with pytest.raises(UserError) as caught:
        hub.resolve(model)
    assert "no such folder, and not a hub id" in str(caught.value)
    assert not calls


def test_a_file_is_told(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file"):
        hub.resolve(str(tmp_path / "x.safetensors"))


def test_an_id_that_the_client_refuses_is_told(monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", huggingface_hub.snapshot_download)
    with pytest.raises(UserError, match="is not a hub id"):
        hub.resolve("owner/two--dashes")


def test_two_revisions_are_told(monkeypatch):
    _client(monkeypatch, AssertionError("the hub was asked"))
    with pytest.raises(UserError, match="both given"):
        hub.resolve(f"{NAME}@v1", revision="v2")


def _http(error, message="server said so"):
    """An error of the client, without a server's answer to make it from."""
    made = error.__new__(error)
    OSError.__init__(made, message)
    return made


@pytest.mark.parametrize(
    "error, message",
    [
        (_http(GatedRepoError), "is gated; accept its terms"),
        (_http(RepositoryNotFoundError), "no such model on the hub"),
        (_http(RevisionNotFoundError), "has no revision 'v1'"),
        (LocalEntryNotFoundError("x"), "not (wholly) in the hub's cache"),
        (_http(HfHubHTTPError, "503 Server Error"), "download failed (503 Server Error)"),
        (ConnectionError("connection reset"), "download failed (connection reset)"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full while downloading"),
    ],
)
def test_the_hubs_errors_become_one_line(monkeypatch, error, message):
    _client(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        hub.resolve(f"{NAME}@v1")
    (problem,) = caught.value.problems
    assert message in problem and NAME in problem


def test_a_repository_without_a_model_is_told(tmp_path, monkeypatch):
    (tmp_path / "snapshots" / COMMIT).mkdir(parents=True)
    _client(monkeypatch, tmp_path / "snapshots" / COMMIT)
    with pytest.raises(UserError, match="none of the files needed"):
        hub.resolve(NAME)


def test_a_path_that_is_no_folder_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        hub.resolve(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model_index.json", hub.MODEL_MANIFEST])
@pytest.mark.parametrize("value", [[], {}, None, 3])
def test_a_family_that_is_no_name_is_told(tmp_path, name, value):
    (tmp_path / name).write_text(json.dumps({"_class_name": value, "family": value}))
    with pytest.raises(UserError, match=f"{name}: field "):
        families.of_folder(tmp_path)
