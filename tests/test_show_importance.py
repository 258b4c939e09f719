"""``peft-vision show --importance``: the map, the table, the picture, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import peft_vision as pv
from peft_vision.cli import app
from peft_vision.errors import BadSetting
from peft_vision.report.heads_map import write_heads_map

CHEAP = "taylor,weight_norm,leave_one_out"


@pytest.fixture
def folder(image_folder: Callable[..., Path]) -> Path:
    """Eight images, in two folders."""
    return image_folder(classes=("blue", "red"), images=4, splits=("train",))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tiny_timm: Callable[..., nn.Module]) -> None:
    """A random model in the place of a pretrained one."""
    import peft_vision.loading as loading

    def opened(name: str, *, pretrained: bool = True) -> nn.Module:
        assert pretrained, "scores are those of the real weights"
        return nn.Sequential(nn.Conv2d(3, 4, 3)) if name == "timm/conv" else tiny_timm()

    monkeypatch.setattr(loading, "open_model", opened)


def shown(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["show", *map(str, words)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.usefixtures("known")
def test_map_table_and_picture(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "heads.png"
    said = shown(
        "timm/vit", "--importance", "heads", "--data", folder, "--scores", CHEAP,
        "--output", picture,
    )  # fmt: skip
    assert "on 8 images" in said
    assert "Kendall's tau" in said
    assert "+1.00" in said
    assert all(name in said for name in CHEAP.split(","))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("known")
def test_json(folder: Path) -> None:
    said = json.loads(
        shown("timm/vit", "--importance", "heads", "--data", folder, "--images", 4, "--json")
    )
    assert said["images"] == 4
    assert len(said["mean_rank"]) == 4
    assert len(said["mean_rank"][0]) == 3
    assert said["kendall"]["leave_one_out"] == pytest.approx(1.0)
    assert not said["notes"]


def test_a_saved_model_is_scored_with_its_own_weights(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = pv.wrap(pv.create_model("timm/test_vit", pretrained=False), "magnitude", ratio=0.3)
    model.save_pretrained(tmp_path / "saved")
    from peft_vision.importance import scores

    found = scores(model, folder, ["taylor", "weight_norm"]).to_json()
    words = ("--importance", "heads", "--data", folder, "--scores", "taylor,weight_norm", "--json")
    said = json.loads(shown(tmp_path / "saved", *words))
    assert said["scores"]["weight_norm"] == found["scores"]["weight_norm"]
    assert said["kendall"] == {}


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("timm/vit", ["--importance", "heads"], "--data DIR"),
        ("timm/vit", ["--importance", "hidden", "--data", "."], "possible: heads"),
        ("timm/vit", ["--importance", "heads", "--data", ".", "--scores", "tailor"], "taylor"),
        ("timm/vit", ["--importance", "heads", "--data", "./nowhere"], "nowhere"),
        ("timm/vit", ["--importance", "heads", "--data", ".", "--output", "a.txt"], "*.png"),
        ("timm/vit", ["--importance", "heads", "--data", ".", "--images", "0"], "1 or more"),
        ("timm/conv", ["--importance", "heads", "--data", "."], "no heads"),
        ("timm/vit", ["--scores", "taylor"], "--importance heads"),
    ],
)
def test_refusals(
    model: str, words: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert message in shown(model, *words, code=2)


def test_a_picture_of_uneven_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rank = [[0.0, 1.0, None], [0.5], [None, None, None]]
    target = write_heads_map(tmp_path / "a.svg", rank, {"taylor": 0.4, "flat": None})
    assert "<svg" in target.read_text(encoding="utf-8")
    with pytest.raises(BadSetting, match=r"\*\.png"):
        write_heads_map(tmp_path / "a.gif", rank, {})
