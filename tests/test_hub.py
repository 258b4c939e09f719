"""Push and download through the real client, against a small Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from peft_vision.errors import (
    ArtifactError,
    BadSetting,
    DamagedArtifact,
    JobFailed,
    UnknownName,
    UploadFailed,
)
from peft_vision.hub import (
    complete_files,
    download,
    is_repo_id,
    push_folder,
    push_model,
    split_repo_id,
)
from tests.hub_server import Fault, LocalHub, serving

CARD = "---\nlibrary_name: peft_vision\ntags:\n- timm\n---\n\n# A model\n"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[LocalHub]:
    from huggingface_hub import constants

    # The client reads these once, when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    with serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def impatient(monkeypatch) -> None:
    """The client waits up to 23 s between its tries; a test does not."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    return artifact(tmp_path / "vit-s-0.4")


def artifact(folder: Path, size: int = 4000) -> Path:
    """An artifact folder, with things beside it that must stay at home."""
    folder.mkdir()
    save_file({"weight": torch.randn(size)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "README.md").write_text(CARD)
    files = {
        name: {
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            "bytes": (folder / name).stat().st_size,
        }
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    (folder / "peft_vision.json").write_text(json.dumps({"schema": 1, "files": files}))
    for stray in ("checkpoint-10/optimizer.pt", "runs/events.log", ".hidden", "training_args.bin"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_bytes(b"stays here")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


SENT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "peft_vision.json"}


def test_what_is_pushed_comes_back_byte_for_byte(hub, folder):
    url = push_folder(folder, "me/vit-s-0.4")
    assert url == f"{hub.endpoint}/me/vit-s-0.4"
    assert set(hub.files("me/vit-s-0.4")) == SENT
    assert hub.repositories["me/vit-s-0.4"].lfs == {"adapter_model.safetensors"}
    assert hub.called("PUT /lfs/") == 1
    assert hub.called("POST /lfs/verify") == 1

    fetched = contents(download("me/vit-s-0.4"))
    assert fetched == {name: (folder / name).read_bytes() for name in SENT}


def test_nothing_that_could_be_unpickled_is_fetched(hub, folder):
    push_folder(folder, "me/vit")
    files = hub.files("me/vit")
    for name in ("pytorch_model.bin", "model.pt", "data.pkl", "code.py"):
        files[name] = b"\x80"
    assert set(contents(download("me/vit"))) == SENT
    assert hub.called(r"resolve/.*\.(bin|pt|pkl|py)$") == 0


def test_a_second_download_fetches_no_file_again(hub, folder):
    push_folder(folder, "me/vit")
    first = download("me/vit")
    fetched = hub.called("GET .*/resolve/")
    assert fetched == len(SENT)
    assert download("me/vit") == first
    assert hub.called("GET .*/resolve/") == fetched


def test_a_revision_has_its_own_files(hub, folder, tmp_path):
    push_folder(folder, "me/vit")
    other = artifact(tmp_path / "other", size=10)
    assert push_folder(other, "me/vit@small").endswith("/me/vit/tree/small")
    weights = "adapter_model.safetensors"
    assert (download("me/vit@small") / weights).stat().st_size == (other / weights).stat().st_size
    assert (download("me/vit") / weights).stat().st_size == (folder / weights).stat().st_size


def test_private_is_private(hub, folder, monkeypatch):
    push_folder(folder, "me/secret", private=True)
    assert hub.repositories["me/secret"].private
    assert set(contents(download("me/secret"))) == SENT
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "elsewhere"))
    with pytest.raises(UnknownName, match=r"me/secret is not at .*, or it is private .* \(401\)"):
        download("me/secret")


BREAKS = {
    "creation-500": Fault("POST /api/repos/create", 500),
    "upload-500": Fault("PUT /lfs/", 500),
    "upload-dropped": Fault("PUT /lfs/", None),
    "commit-500": Fault("POST .*/commit/", 500),
    "commit-dropped": Fault("POST .*/commit/", None),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_upload_leaves_the_folder_and_can_be_repeated(name, hub, folder):
    before = contents(folder)
    fault = BREAKS[name]
    hub.faults = [Fault(fault.route, fault.status)]
    with pytest.raises(UploadFailed) as caught:
        push_folder(folder, "me/vit", private=True)
    message = str(caught.value)
    command = f"peft-vision push {shlex.quote(str(folder))} me/vit --private"
    assert message.endswith(f"{folder} is intact. To go on: {command}")
    assert ("in trouble (500)" in message) is (fault.status == 500)
    assert ("connection" in message) is (fault.status is None)
    assert "hf_me" not in message
    assert contents(folder) == before
    assert "me/vit" not in hub.repositories or not hub.files("me/vit")

    hub.faults = []
    push_folder(folder, "me/vit", private=True)
    assert contents(download("me/vit")) == {file: before[file] for file in SENT}


@pytest.mark.usefixtures("impatient")
def test_the_client_rides_out_a_short_failure(hub, folder):
    hub.faults = [Fault("PUT /lfs/", 503, times=2)]
    push_folder(folder, "me/vit")
    assert hub.called("PUT /lfs/") == 3


def test_each_refusal_has_its_own_sentence(hub, folder):
    with pytest.raises(UploadFailed, match=r"does not accept the token .* \(401\).*hf auth login"):
        push_folder(folder, "me/vit", token="hf_unknown")
    with pytest.raises(UploadFailed, match=r"may not write to you/vit \(403\).*access to you"):
        push_folder(folder, "you/vit")
    hub.faults = [Fault("preupload", 404)]
    with pytest.raises(UploadFailed, match=r"There is no me/vit at .* \(404\)"):
        push_folder(folder, "me/vit")
    hub.faults = [Fault("commit", 413)]
    with pytest.raises(UploadFailed, match=r"refused \(413"):
        push_folder(folder, "me/vit")


def test_a_hub_without_xet_storage_is_said_in_words(hub, folder, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(UploadFailed, match=r"set HF_HUB_DISABLE_XET=1\. .* is intact"):
        push_folder(folder, "me/vit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    push_folder(folder, "me/vit")


def test_a_bad_card_is_refused_before_the_weights_are_sent(hub, folder):
    (folder / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(UploadFailed, match="README"):
        push_folder(folder, "me/vit")
    assert hub.called("PUT /lfs/") == 0


@pytest.mark.usefixtures("impatient")
def test_no_server_at_all(hub, folder):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(UploadFailed, match=f"The connection to {nowhere} failed"):
        push_folder(folder, "me/vit", endpoint=nowhere)
    with pytest.raises(JobFailed, match=f"The connection to {nowhere} failed"):
        download("me/vit", endpoint=nowhere)


def test_offline_is_said_in_words(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UploadFailed, match="HF_HUB_OFFLINE is set"):
        push_folder(folder, "me/vit")
    with pytest.raises(JobFailed, match="HF_HUB_OFFLINE is set"):
        download("me/vit")
    assert hub.calls == []


def test_offline_still_finds_what_was_fetched(hub, folder, monkeypatch):
    push_folder(folder, "me/vit")
    fetched = download("me/vit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download("me/vit") == fetched


def test_what_is_not_there_is_said(hub, folder):
    with pytest.raises(UnknownName, match=r"There is no me/nothing at .* \(404\)"):
        download("me/nothing")
    push_folder(folder, "me/vit")
    with pytest.raises(UnknownName, match="has no such revision"):
        download("me/vit@v9")
    del hub.files("me/vit")["peft_vision.json"]
    with pytest.raises(ArtifactError, match=r"has no peft_vision\.json"):
        download("me/vit")


def damage(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    if how == "missing":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(data[:-1])
    elif how == "altered":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "garbled":
        (folder / "peft_vision.json").write_text("{")
    else:
        stray = b"stays here"
        entry = {"sha256": hashlib.sha256(stray).hexdigest(), "bytes": len(stray)}
        files = {} if how == "empty" else {how: entry}
        (folder.parent / "secret.json").write_bytes(stray)
        (folder / "peft_vision.json").write_text(json.dumps({"schema": 1, "files": files}))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "lacks adapter_model.safetensors"),
        ("truncated", "it was truncated"),
        ("altered", "it was altered"),
        ("garbled", "not valid JSON"),
        ("empty", "lists no files"),
        ("../secret.json", "lacks ../secret.json"),
        ("/etc/secret.json", "lacks /etc/secret.json"),
        ("training_args.bin", "lists training_args.bin"),
    ],
)
def test_an_incomplete_folder_is_refused_before_anything_is_sent(how, words, hub, folder):
    damage(folder, how)
    with pytest.raises(DamagedArtifact, match=words):
        push_folder(folder, "me/vit")
    assert hub.calls == []


def test_a_folder_that_is_no_artifact(hub, tmp_path):
    with pytest.raises(DamagedArtifact, match=r"has no peft_vision\.json"):
        push_folder(tmp_path / "nowhere", "me/vit")
    assert hub.calls == []


class Model:
    """Writes the folder of the other tests."""

    def save_pretrained(self, save_directory):
        artifact(Path(save_directory))


def test_a_model_is_saved_sent_and_cleared_away(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert push_model(Model(), "me/vit@v1") == f"{hub.endpoint}/me/vit/tree/v1"
    assert set(contents(download("me/vit@v1"))) == SENT
    assert not list(tmp_path.glob("peft-vision-*"))


def test_a_model_that_could_not_be_sent_is_kept(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hub.faults = [Fault("POST .*/commit/", 500)]
    with pytest.raises(UploadFailed, match="To go on: peft-vision push") as caught:
        push_model(Model(), "me/vit")
    (folder,) = tmp_path.glob("peft-vision-*/vit")
    assert f"{folder} is intact" in str(caught.value)
    hub.faults = []
    push_folder(folder, "me/vit")
    assert set(contents(download("me/vit"))) == SENT


def test_a_folder_without_a_card_is_pushed_without_one(folder):
    (folder / "README.md").unlink()
    assert "README.md" not in complete_files(folder)


@pytest.mark.parametrize(
    "name", ["vit", "me/vit/deep", "me/", "/vit", "m e/vit", "me/vit--x", "me/vit.git", "me/a..b"]
)
def test_a_bad_repository_name(name, folder):
    with pytest.raises(BadSetting, match="is not a repository on the Hub"):
        push_folder(folder, name)


def test_repository_names():
    assert split_repo_id("me/vit-s-0.4") == ("me/vit-s-0.4", None)
    assert split_repo_id("me/vit@refs/pr/1") == ("me/vit", "refs/pr/1")
    assert split_repo_id("me/vit", "v1") == ("me/vit", "v1")
    assert is_repo_id("me/vit")
    assert not is_repo_id("vit_small_patch16_224")
    with pytest.raises(BadSetting, match="names revision 'a'"):
        split_repo_id("me/vit@a", "b")


def test_a_pushed_model_is_loaded_by_its_repository_name(hub, tiny_timm):
    import peft_vision

    model = peft_vision.wrap(tiny_timm(), "magnitude", ratio=0.3).eval()
    model.push_to_hub("me/vit-small")
    loaded = peft_vision.load("me/vit-small")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert b"## Cost" in hub.files("me/vit-small")["README.md"]


def run(*arguments: object):
    from peft_vision.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_prints_the_address(hub, folder):
    done = run("push", folder, "me/vit", "--private", "-m", "First")
    assert done.exit_code == 0, done.output
    assert f"{hub.endpoint}/me/vit" in done.stdout
    assert hub.repositories["me/vit"].private


@pytest.mark.usefixtures("impatient")
def test_command_that_fails_says_which_command_goes_on(hub, folder):
    hub.faults = [Fault("POST .*/commit/", 500)]
    done = run("push", folder, "me/vit", "--revision", "v1", "--token", "hf_me")
    assert done.exit_code == 1
    said = " ".join(done.stderr.split())
    command = f"peft-vision push {folder} me/vit --revision v1"
    assert said.endswith(f"is intact. To go on: {command}")
    hub.faults = []
    assert run(*shlex.split(command)[1:]).exit_code == 0
    assert set(hub.files("me/vit", "v1")) == SENT


def test_command_with_a_bad_name_or_folder(hub, folder, tmp_path):
    assert run("push", folder, "vit").exit_code == 2
    assert run("push", tmp_path / "nothing", "me/vit").exit_code == 2
    assert hub.calls == []
