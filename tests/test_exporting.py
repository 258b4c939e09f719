"""An exported file computes what the live model computes, and the live model stays as it was."""

from __future__ import annotations

import copy
import importlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

from peft_vision import tracing
from peft_vision.errors import (
    BadSetting,
    CannotWrite,
    ExportMismatch,
    JobFailed,
    MissingExtra,
    OutputExists,
)
from peft_vision.exporting import BATCH_SIZES, export
from peft_vision.history import History

export_module = importlib.import_module("peft_vision.exporting")
SIZE = 32
TIMM = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 8,
}


def timm_model(name: str, **settings) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **{"num_classes": 5, **TIMM, **settings})


def hf_model(model: str, config: str, **settings) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**{**HF, **settings}))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm-dinov2": lambda: timm_model("vit_small_patch14_reg4_dinov2", num_classes=0),
    "timm-eva02": lambda: timm_model("eva02_tiny_patch14_224"),
    "timm-beit": lambda: timm_model("beit_base_patch16_224"),
    "timm-siglip": lambda: timm_model("vit_base_patch16_siglip_224"),
    "hf-vit": lambda: hf_model("ViTForImageClassification", "ViTConfig", num_labels=5),
    "hf-dinov2": lambda: hf_model("Dinov2ForImageClassification", "Dinov2Config", num_labels=5),
    "hf-siglip": lambda: hf_model("SiglipVisionModel", "SiglipVisionConfig"),
}


class Reducing(nn.Module):
    """Keeps a constant number of tokens by score, as token reduction does."""

    def __init__(self, keep: int = 6) -> None:
        super().__init__()
        self.keep = keep
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.score, self.qkv, self.head = nn.Linear(16, 1), nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        kept = self.score(tokens).squeeze(-1).topk(self.keep, dim=1).indices
        tokens = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        qkv = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class FixedBatch(nn.Module):
    """A model whose code names the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.reshape(2, -1))


class Wavering(nn.Module):
    """Computes something else once it has been traced."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, 5)

    def forward(self, images: Tensor) -> Tensor:
        shift = 0.1 if torch.compiler.is_exporting() else 0.0
        return self.head(images.flatten(1)) + shift


def reference(model: nn.Module, images: Tensor) -> Tensor:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return tracing.tensor_of(model(images))[1]


def run_onnx(path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])


@pytest.mark.parametrize("name", MODELS)
def test_onnx_computes_what_the_model_computes(name, tmp_path):
    model = MODELS[name]().eval()
    report = export(model, tmp_path / "m.onnx", image_size=SIZE)
    images = torch.randn(3, 3, SIZE, SIZE)
    expected = reference(model, images)
    torch.testing.assert_close(run_onnx(report.path, images), expected, rtol=1e-4, atol=1e-5)
    assert report.batch_sizes_checked == BATCH_SIZES
    assert report.bytes == report.path.stat().st_size
    assert report.opset >= 18
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("name", ["timm-dinov2", "timm-beit", "hf-vit"])
def test_exported_program_computes_what_the_model_computes(name, tmp_path):
    model = MODELS[name]().eval()
    report = export(model, tmp_path / "m.pt2", format="torch.export", image_size=SIZE)
    images = torch.randn(3, 3, SIZE, SIZE)
    got = torch.export.load(report.path).module()(images)
    torch.testing.assert_close(got, reference(model, images), rtol=1e-4, atol=1e-5)
    assert report.opset is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt2"]


@pytest.mark.parametrize("format", ["onnx", "torch.export"])
def test_token_reduction_by_topk_and_gather(format, tmp_path):
    model = Reducing().eval()
    path = tmp_path / ("m" + export_module.SUFFIXES[format])
    report = export(model, path, format=format, image_size=SIZE)
    assert report.max_difference < 1e-5


def test_exported_program_pickles_nothing_and_names_no_path(tmp_path):
    path = export(Reducing(), tmp_path / "m.pt2", format="torch.export", image_size=SIZE).path
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    # A pickle of protocol 2 or later starts with 0x80; torch.save wraps one into a zip ("PK").
    suspicious = [
        name
        for name, data in contents.items()
        if data.startswith(b"PK") or (data.startswith(b"\x80") and "weight_" not in name)
    ]
    assert suspicious == []
    graph = next(data for name, data in contents.items() if name.endswith("models/model.json"))
    assert __file__.encode() not in graph


def test_onnx_names_no_path_and_carries_labels_and_preprocessing(tmp_path):
    import onnxruntime

    labels, preprocessing = ["cat", "dog", "cow", "hen", "pig"], {"mean": [0.5] * 3, "size": SIZE}
    model = Reducing()
    model.history = History(labels=labels, preprocessing=preprocessing)
    path = export(model, tmp_path / "m.onnx", image_size=SIZE).path
    assert b"test_export.py" not in path.read_bytes()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["labels"]) == labels
    assert json.loads(facts["preprocessing"]) == preprocessing
    assert session.get_inputs()[0].shape == ["batch", 3, SIZE, SIZE]
    assert session.get_outputs()[0].shape == ["batch", 5]


def initializers(path) -> list[str]:
    import onnx

    names = [tensor.name for tensor in onnx.load(path).graph.initializer]
    assert names
    return names


def adapted() -> nn.Module:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], modules_to_save=["head"])
    model = peft.get_peft_model(timm_model("vit_tiny_patch16_224"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def fingerprint(model: nn.Module) -> dict:
    return {
        "modules": [
            (name, type(module), module.training) for name, module in model.named_modules()
        ],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "parameters": [
            (name, p.data_ptr(), p.dtype, p.device, p.requires_grad, p.grad is None)
            for name, p in model.named_parameters()
        ],
    }


@pytest.mark.parametrize("format", ["onnx", "torch.export"])
def test_the_live_model_is_left_alone(format, tmp_path):
    model = adapted()
    model.train()
    model.base_model.model.blocks[0].eval()
    seen = []
    model.base_model.model.norm.register_forward_hook(lambda *_: seen.append(1) and None)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, SIZE, SIZE)
    before, random_state = fingerprint(model), torch.get_rng_state()
    expected = reference(model, images)

    path = tmp_path / ("m" + export_module.SUFFIXES[format])
    report = export(model, path, format=format, image_size=SIZE)

    assert fingerprint(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(reference(model, images), expected)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert report.max_difference < 1e-5
    if format == "onnx":
        assert not [name for name in initializers(path) if "lora" in name]
        torch.testing.assert_close(run_onnx(path, images), expected, rtol=1e-4, atol=1e-5)


def test_a_remembered_activation_does_not_stop_the_copy(tmp_path):
    model = Reducing()
    model.balance = model.score(torch.randn(2, 16)).sum()
    export(model, tmp_path / "m.pt2", format="torch.export", image_size=SIZE)
    assert model.balance.grad_fn is not None


def test_a_bfloat16_model_is_written_in_float32(tmp_path):
    model = Reducing().bfloat16().eval()
    report = export(model, tmp_path / "m.pt2", format="torch.export", image_size=SIZE)
    written = torch.export.load(report.path).state_dict.values()
    assert {value.dtype for value in written} == {torch.float32}
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())


def test_weights_beyond_the_limit_of_protobuf_go_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "EXTERNAL_ABOVE", 0)
    model = Reducing().eval()
    path = export(model, tmp_path / "m.onnx", image_size=SIZE).path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    images = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(run_onnx(path, images), reference(model, images))
    monkeypatch.undo()
    export(model, path, image_size=SIZE, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("format", ["onnx", "torch.export"])
def test_a_mismatch_is_refused_and_leaves_nothing(format, tmp_path):
    path = tmp_path / ("m" + export_module.SUFFIXES[format])
    path.write_bytes(b"older")
    with pytest.raises(ExportMismatch, match=r"differs from the live model by 0\.1"):
        export(Wavering(), path, format=format, image_size=SIZE, overwrite=True)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_larger_tolerance_lets_it_through(tmp_path):
    path = tmp_path / "m.pt2"
    report = export(Wavering(), path, format="torch.export", image_size=SIZE, tolerance=1.0)
    assert report.max_difference == pytest.approx(0.1, rel=1e-3)


def test_a_fixed_batch_size_is_refused_in_words(tmp_path):
    with pytest.raises(JobFailed, match="cannot trace FixedBatch on images of 3x32x32"):
        export(FixedBatch(), tmp_path / "m.onnx", image_size=SIZE)
    assert not list(tmp_path.iterdir())


def test_an_output_without_a_tensor_is_refused_in_words(tmp_path):
    class Odd(FixedBatch):
        def forward(self, images):
            return {"boxes": self.head(images.flatten(1))}

    with pytest.raises(JobFailed, match="returns boxes; export needs one of logits"):
        export(Odd(), tmp_path / "m.onnx", image_size=SIZE)


def test_which_tensor_of_an_output_is_taken():
    logits, hidden = torch.zeros(2, 5), torch.zeros(2, 3, 4)
    assert tracing.tensor_of(logits) == ("output", logits)
    both = {"last_hidden_state": hidden, "logits": logits}
    assert tracing.tensor_of(both) == ("logits", logits)
    pooled = {"last_hidden_state": hidden, "pooler_output": None}
    assert tracing.tensor_of(pooled) == ("last_hidden_state", hidden)


def test_bad_arguments_are_named(tmp_path):
    model = FixedBatch()
    with pytest.raises(BadSetting, match=r"format='tflite'; it is one of onnx, torch\.export"):
        export(model, tmp_path / "m.onnx", format="tflite", image_size=SIZE)
    with pytest.raises(BadSetting, match=r"ends in \.pt2"):
        export(model, tmp_path / "m.onnx", format="torch.export", image_size=SIZE)
    with pytest.raises(BadSetting, match="is a folder"):
        export(model, tmp_path, image_size=SIZE)
    with pytest.raises(BadSetting, match="at least 1 pixel"):
        export(model, tmp_path / "m.onnx", image_size=0)


def test_an_existing_file_is_kept_unless_told(tmp_path):
    path, how = tmp_path / "m.pt2", {"format": "torch.export", "image_size": SIZE}
    path.write_bytes(b"precious")
    with pytest.raises(OutputExists, match="--overwrite"):
        export(Reducing(), path, **how)
    assert path.read_bytes() == b"precious"
    assert export(Reducing(), path, overwrite=True, **how).bytes > 100


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(MissingExtra, match=r'no_such_package.*pip install "peft-vision\[export\]"'):
        export(Reducing(), tmp_path / "m.onnx", image_size=SIZE)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="Could not write"):
        export(Reducing(), tmp_path / "file" / "m.onnx", image_size=SIZE)


@pytest.fixture
def saved(tiny_timm, tmp_path):
    import peft_vision

    folder = tmp_path / "vit-s-0.4"
    peft_vision.wrap(tiny_timm(), "magnitude", ratio=0.3).save_pretrained(folder)
    return folder


def run(*arguments: object):
    from peft_vision.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_writes_beside_the_folder_and_says_what_it_checked(saved):
    done = run("export", saved)
    assert done.exit_code == 0, done.output
    file = saved.with_name("vit-s-0.4.onnx")
    assert file.is_file()
    assert "at batch sizes 1, 2, 5" in done.stdout
    assert sorted(p.name for p in saved.parent.iterdir()) == ["vit-s-0.4", "vit-s-0.4.onnx"]

    again = run("export", saved)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


def test_command_writes_an_exported_program(saved, tmp_path):
    done = run("export", saved, "--format", "torch.export", "-o", tmp_path / "x" / "m.pt2")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x" / "m.pt2").is_file()


def test_command_refuses_bad_arguments_before_loading(tmp_path):
    done = run("export", tmp_path / "nothing", "--format", "tflite")
    assert done.exit_code == 2
    assert "it is one of onnx, torch.export" in " ".join(done.stderr.split())


def test_where_the_command_writes(tmp_path, monkeypatch):
    from peft_vision.cli.export import beside

    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert beside("out/", "onnx") == Path("out.onnx")
    assert beside(".", "torch.export") == tmp_path.with_name(tmp_path.name + ".pt2")
    assert beside("me/vit-0.4@v1", "onnx") == Path("vit-0.4.onnx")
