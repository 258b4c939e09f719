"""The command line: a mistake gets one message and exit code 2, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from peft_vision.cli import app

DENSE = ["test_vit", "--no-pretrained"]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def refused(result: Result, says: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert says in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("40", "ratio above 1"),
        ("0", "not above zero"),
        ("-1", "not above zero"),
        ("abc", "not a figure"),
        ("0.01", "smallest that"),
    ],
)
def test_budgets(budget: str, says: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(run("compress", *DENSE, "--target-flops", budget, "-o", str(out)), says)
    assert not out.exists()


def test_no_budget_and_two(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    refused(run("compress", *DENSE, "-o", out), "0 were given")
    two = ["--target-flops", "0.5", "--target-params", "0.5"]
    refused(run("compress", *DENSE, *two, "-o", out), "2 were given")


def test_unknown_names_get_the_nearest(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    model = run("compress", "vit_smal_patch16_224", "--target-flops", "0.5", "-o", out)
    refused(model, "vit_small_patch16_224")
    method = run("compress", *DENSE, "--target-flops", "0.5", "--methods", "magnitud", "-o", out)
    refused(method, "Nearest: magnitude")
    refused(run("show", "resnet51"), "resnet")


def test_a_missing_folder_is_named_before_the_hub_is() -> None:
    for verb in ("show", "export"):
        result = run(verb, "runs/nothing")
        assert result.exit_code in {1, 2}
        assert "There is no folder runs/nothing here" in result.output.replace("\n", " ")


def test_an_output_that_exists_needs_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    words = ["compress", *DENSE, "--target-flops", "0.8", "-o", str(out)]
    refused(run(*words), "--overwrite")
    assert (out / "mine.txt").read_text() == "keep me"
    assert run(*words, "--overwrite").exit_code == 0
    assert (out / "peft_vision.json").is_file()


def test_recovery_needs_images(tmp_path: Path) -> None:
    words = ["compress", *DENSE, "--target-flops", "0.8", "-o", str(tmp_path / "out")]
    refused(run(*words, "--recover-epochs", "1"), "--data")
    refused(run(*words, "--recover-epochs", "1", "--data", "nowhere"), "no such folder")


def test_compress_and_show_speak_json(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run("compress", *DENSE, "--target-flops", "0.8", "-o", out, "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert 0.98 < said["share_of_limit"] <= 1.0
    shown = json.loads(run("show", out, "--json").stdout)
    assert shown["cost"]["flops"] == said["after"]["flops"]
    assert shown["steps"] == ["pooled_last_block", "magnitude", "token_merging"]


def test_methods_and_version() -> None:
    listed = run("methods")
    assert listed.exit_code == 0
    for name in ("lora", "magnitude", "evit"):
        assert name in listed.output
    assert run("--version").output.startswith("peft-vision 0.")
    assert run("nonsense").exit_code == 2


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", "show", "resnet51")
    assert result.exception is not None
    assert type(result.exception).__name__ == "UnknownName"
    run("methods")


RUN = """
model:
  name: vit_tiny_patch16_224
  kwargs: {img_size: 32, patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}
method: {name: lora, r: 4}
data: {train: nowhere}
train: {batch_size: 8}
"""


def test_memory_shows_what_holds_it_and_what_helps(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RUN)
    plain = run("memory", str(recipe), "--json")
    assert plain.exit_code == 0, plain.output
    peak = json.loads(plain.stdout)["peak"]
    tight = run("memory", str(recipe), "--gpu", f"{(peak - 20_000) / 1e6}MB", "--batch", "8")
    assert tight.exit_code == 0, tight.output
    for words in ("weights, fp32", "overhead", "does not fit", "Largest pass", "train.frozen=bf16"):
        assert words in tight.output.replace("\n", " ")
    said = run("memory", str(recipe), "train.frozen=bf16", "--gpu", "24GB", "--json")
    assert json.loads(said.stdout)["fits"]
    assert len(said.stdout.splitlines()) == 1


def test_memory_refuses_in_one_message(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RUN)
    refused(run("memory", str(recipe), "--gpu", "24 apples"), "such as 24GB")
    refused(run("memory", str(recipe), "train.batch_size=auto"), "memory: 24GB")
    refused(run("memory", str(recipe), "methods=[magnitude]"), "magnitude cannot be estimated")
    refused(run("memory", "no/such/recipe"), "There is no recipe")
    away = run("memory", str(recipe), "model={name: transformers/nobody/nothing}")
    refused(away, "cannot be loaded")
