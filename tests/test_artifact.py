"""Saved folders: bit-exact in a fresh process, refused when damaged, never unpickled."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision import artifact
from peft_vision.errors import (
    ArtifactError,
    CannotWrite,
    DamagedArtifact,
    NewerSchema,
    OutputExists,
    WrongBase,
)

Tiny = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3
    )
    folder = tmp_path_factory.mktemp("saved") / "out"
    pv.compress(model.eval(), target_flops=0.6).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "out")
    return tmp_path / "out"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / artifact.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_reload_in_a_fresh_process_is_bit_exact(saved: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    here = pv.load(saved)(x)
    code = (
        "import sys, torch, peft_vision as pv; torch.set_num_threads(1)\n"
        "x = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.save(pv.load(sys.argv[1])(x).detach(), sys.argv[3])"
    )
    there = tmp_path / "y.pt"
    subprocess.run(
        [sys.executable, "-c", code, str(saved), str(tmp_path / "x.pt"), str(there)],
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert torch.equal(torch.load(there, weights_only=True), here)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_outputs_are_bit_exact_at_every_batch_size(
    tiny_timm: Tiny, tmp_path: Path, batch: int
) -> None:
    model = pv.wrap(tiny_timm(), "magnitude", ratio=0.5).eval()
    model.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out")
    for _ in range(5):
        x = torch.randn(batch, 3, 32, 32)
        assert torch.equal(again(x), model(x))


def test_the_folder_holds_no_pickle(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "model.safetensors",
        "peft_vision.json",
    ]


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "it ran"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin"])
def test_a_planted_pickle_is_not_run(saved: Path, tmp_path: Path, name: str) -> None:
    proof = tmp_path / "ran"
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps(Malicious(proof)))
    with pytest.raises(ArtifactError):
        pv.load(saved)
    edit(saved, files={})
    with pytest.raises(ArtifactError):
        pv.load(saved)
    assert not proof.exists()
    pickle.loads((saved / name).read_bytes())
    assert proof.exists(), "the planted pickle would have run"


def test_a_newer_schema_asks_for_an_upgrade(saved: Path) -> None:
    edit(saved, schema=artifact.SCHEMA + 1)
    with pytest.raises(NewerSchema, match="Upgrade"):
        pv.load(saved)


def test_a_truncated_file_is_named(saved: Path) -> None:
    weights = saved / artifact.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedArtifact, match="truncated"):
        pv.load(saved)


def test_an_altered_file_is_named(saved: Path) -> None:
    weights = saved / artifact.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(DamagedArtifact, match="checksum"):
        pv.load(saved)


def test_a_cut_record_is_named(saved: Path) -> None:
    path = saved / artifact.RECORD
    path.write_text(path.read_text()[:-50])
    with pytest.raises(DamagedArtifact, match="not valid JSON"):
        pv.load(saved)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"source": {"source": "nowhere", "name": "x"}}, ArtifactError, "not a known source"),
        ({"plan": {"steps": [{}]}}, DamagedArtifact, "step"),
        (
            {
                "plan": {
                    "steps": [{"method": "none", "settings": {}, "strength": 1, "decisions": {}}]
                }
            },
            ArtifactError,
            "lacks",
        ),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, DamagedArtifact, "lacks"),
        ({"plan": {"steps": []}}, WrongBase, "do not fit"),
    ],
)
def test_an_edited_record_is_refused(
    saved: Path, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    edit(saved, **change)
    with pytest.raises(error, match=says):
        pv.load(saved)


def test_missing_folder_and_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no folder"):
        pv.load(tmp_path / "none")
    with pytest.raises(DamagedArtifact, match=r"peft_vision\.json"):
        pv.load(tmp_path)


def test_an_adapter_refuses_another_base(tiny_timm: Tiny, tmp_path: Path) -> None:
    base = tiny_timm()
    pv.wrap(copy.deepcopy(base), "lora").save_pretrained(tmp_path / "a")
    pv.load(tmp_path / "a", base=base)
    torch.manual_seed(5)
    with pytest.raises(WrongBase, match="not those"):
        pv.load(tmp_path / "a", base=tiny_timm())


def test_an_adapter_folder_loads_in_plain_peft(tiny_timm: Tiny, tmp_path: Path) -> None:
    from peft import PeftModel

    base, x = tiny_timm(), torch.randn(2, 3, 32, 32)
    adapted = pv.wrap(copy.deepcopy(base), "lora", r=4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "a")
    plain = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))
    # PEFT's layer adds two products where ours makes one: the same to rounding, not bit by bit.
    assert (plain.eval()(x) - adapted.eval()(x)).abs().max() < 1e-5


def test_an_existing_output_needs_overwrite(saved: Path) -> None:
    model = pv.load(saved)
    with pytest.raises(OutputExists, match="--overwrite"):
        model.save_pretrained(saved)
    model.save_pretrained(saved, overwrite=True)
    pv.load(saved)


def test_a_full_disk_leaves_the_old_artifact(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pv.load(saved)
    before = (saved / artifact.WEIGHTS).read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_vision.compressed.write_record", full)
    with pytest.raises(CannotWrite, match="intact"):
        model.save_pretrained(saved, overwrite=True)
    monkeypatch.undo()
    assert (saved / artifact.WEIGHTS).read_bytes() == before
    pv.load(saved)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_disk_that_is_really_full(saved: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        with pytest.raises(CannotWrite, match="intact"):
            pv.load(saved).save_pretrained(small / "out")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_base_that_no_source_can_build_is_passed(tmp_path: Path) -> None:
    from tests.families import FAMILIES, images

    model = FAMILIES["generic_cnn"]().eval()
    x = images(model)
    adapted = pv.wrap(copy.deepcopy(model), "lora", targets=["convs", "linears"], image_size=32)
    adapted.save_pretrained(tmp_path / "a")
    with pytest.raises(WrongBase, match="base="):
        pv.load(tmp_path / "a")
    assert torch.equal(pv.load(tmp_path / "a", base=model)(x), adapted.eval()(x))
