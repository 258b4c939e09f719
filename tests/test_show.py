"""``peft-vision show``: what rounding did to the weights of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import peft_vision as pv
from peft_vision.cli import app

pytest.importorskip("bitsandbytes")


def shown(*words: str) -> str:
    result = CliRunner().invoke(app, ["show", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_saved_model_says_what_rounding_did(tmp_path: Path) -> None:
    model = pv.wrap(pv.create_model("timm/test_vit", pretrained=False), "nf4")
    model.save_pretrained(tmp_path / "a")
    said = json.loads(shown(str(tmp_path / "a"), "--json"))
    decided = model.history.plan.steps[0].decisions
    assert said["weight_errors"] == {key: found["error"] for key, found in decided.items()}
    assert list(said["weight_errors"].values()) == sorted(
        said["weight_errors"].values(), reverse=True
    )
    table = shown(str(tmp_path / "a"))
    worst = next(iter(said["weight_errors"]))
    assert table.index(worst) < table.index("mean")
    assert f"{said['weight_errors'][worst]:.4f}" in table


def test_a_model_by_name_as_a_quantizer_would_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft_vision.loading as loading

    asked = []

    def unloaded(name: str, *, pretrained: bool = True) -> object:
        asked.append(pretrained)
        return pv.create_model(name, pretrained=False)

    monkeypatch.setattr(loading, "open_model", unloaded)
    rounded = json.loads(shown("timm/test_vit", "--quantize", "int8", "--json"))
    plain = json.loads(shown("timm/test_vit", "--json"))
    assert asked == [True, False], "errors are those of the real weights"
    assert len(rounded["weight_errors"]) == rounded["sites"]["linears"]
    assert not plain["weight_errors"]
    assert rounded["cost"]["bytes"] < plain["cost"]["bytes"]
    assert rounded["cost"]["flops"] == plain["cost"]["flops"]


def test_what_is_no_quantizer_is_refused_by_name() -> None:
    result = CliRunner().invoke(app, ["show", "timm/test_vit", "--quantize", "magnitude"])
    assert result.exit_code == 2
    assert "possible: int8, nf4" in result.output.replace("\n", " ")
