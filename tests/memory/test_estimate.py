"""Estimates against real steps, and every way in which one cannot be had."""

from __future__ import annotations

import gc

import pytest
import torch

from peft_vision.errors import ArtifactError, BadSetting
from peft_vision.memory.estimate import estimate_memory
from peft_vision.memory.tracker import CUDA_BLOCK, PeakTracker
from peft_vision.recipe import Recipe
from peft_vision.sources import create_model
from peft_vision.tasks.classification import Classification
from peft_vision.training.lean import leaned
from peft_vision.training.settings import TrainSettings
from peft_vision.wrapping import wrap

TINY = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 64, "num_heads": 4}


def recipe(*methods: str, train: dict | None = None, **changes) -> Recipe:
    content = {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": TINY},
        "methods": [{"name": name} for name in methods],
        "data": {"train": "nowhere"},
        "train": {"batch_size": 8, **(train or {})},
    }
    return Recipe.model_validate({**content, **changes})


def second_step(model, settings: TrainSettings, size: int = 32) -> int:
    """Bytes at the peak of a real second step, as the allocator of CUDA would round them."""
    model.train()
    micro = settings.micro_batch or settings.batch_size
    passes = settings.batch_size // micro
    batches = [
        {"pixel_values": torch.zeros(micro, 3, size, size), "labels": torch.zeros(micro).long()}
        for _ in range(passes)
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    with PeakTracker(model, block=CUDA_BLOCK) as tracker, leaned(model, settings):
        tracker.hold("inputs", [tensor for batch in batches for tensor in batch.values()])
        for _ in range(2):
            gc.collect()
            tracker.reset_peak()
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                    loss = Classification().losses(model, batch)["labels"]
                loss.backward()
                del loss
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return tracker.peak


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "bf16", "gradient_checkpointing": True},
        {"precision": "fp32", "micro_batch": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [None, "lora"])
def test_it_is_what_a_real_second_step_takes(tiny_timm, method, changes):
    model = tiny_timm()
    if method is not None:
        model = wrap(model, method, r=4)
    settings = TrainSettings(batch_size=8, **changes)
    found = estimate_memory(model, settings=settings)
    assert found.allocated == pytest.approx(second_step(model, settings), rel=0.01)


def test_packed_weights_count_as_packed():
    dense, packed = estimate_memory(recipe("lora")), estimate_memory(recipe("nf4", "lora"))
    linears = 3 * 12 * 64 * 64  # blocks x (4 of attention + 8 of the MLP) x width squared
    assert packed.parts["weights, packed"] == pytest.approx(linears * (0.5 + 4 / 64), rel=0.12)
    saved = dense.parts["weights, fp32"] - packed.parts["weights, fp32"]
    assert saved == pytest.approx(linears * 4, rel=0.05)
    eight = estimate_memory(recipe("int8", "lora"))
    assert eight.parts["weights, packed"] == pytest.approx(linears, rel=0.05)


def test_what_each_setting_takes_away():
    def peak(*methods: str, **train) -> int:
        return estimate_memory(recipe(*methods, train=train)).allocated

    plain = peak("lora")
    assert (
        peak("lora", gradient_checkpointing=True) < peak("lora", gradient_checkpointing=2) < plain
    )
    assert peak("lora", frozen="bf16") < plain
    assert peak("lora", norms="low") < plain < peak("lora", recompute="nothing")
    assert peak("lora", batch_size=64, micro_batch=8) < peak("lora", batch_size=64)
    assert peak(optimizer="adamw_8bit") < peak(optimizer="adamw")
    assert peak(optimizer="sgd") < peak(optimizer="adafactor") < peak(optimizer="adamw")


def test_the_model_itself_is_left_alone(tiny_timm):
    model = wrap(tiny_timm(), "lora", r=4).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    estimate_memory(model, settings=TrainSettings(batch_size=4, precision="bf16", frozen="bf16"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_a_teacher_is_counted():
    taught = recipe(
        task={"distillation": {"teacher": "test_vit"}},
        data={"train": "nowhere", "image_size": 160},
        model={"name": "test_vit", "kwargs": {}},
    )
    found = estimate_memory(taught, batch_size=1)
    teacher = create_model("test_vit", pretrained=False, num_classes=1000)
    size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    assert found.parts["teacher's weights, fp32"] == pytest.approx(size, rel=0.02)
    assert found.image_size == (160, 160)


def test_another_loss_and_batch(tiny_timm):
    model = tiny_timm()
    settings = TrainSettings(precision="fp32")
    twice = estimate_memory(
        model,
        batch_size=2,
        settings=settings,
        loss=lambda model, count: model(torch.zeros(2 * count, 3, 32, 32)).sum(),
    )
    plain = estimate_memory(model, batch_size=4, settings=settings)
    assert (twice.micro_batch, plain.micro_batch) == (2, 4)
    assert twice.allocated == pytest.approx(plain.allocated, rel=0.02)


def test_methods_that_look_at_numbers_are_refused_by_name():
    with pytest.raises(BadSetting, match=r"magnitude cannot be estimated .*estimate_memory\(model"):
        estimate_memory(recipe("magnitude"))


def test_a_configuration_that_cannot_be_had_is_named():
    away = recipe(model={"name": "transformers/nobody/nothing"})
    with pytest.raises(ArtifactError, match="nobody/nothing cannot be loaded"):
        estimate_memory(away)


def test_it_says_what_is_unverified():
    found = estimate_memory(recipe("lora", train={"optimizer": "paged_adamw_8bit"}))
    assert "not measured on a GPU" in str(found)
    assert "pages" in str(found)
    assert found.peak == found.allocated + found.overhead
    assert found.fits(found.peak)
    assert not found.fits(found.peak - 1)
    assert sum(size for _, size in found.rows()) == found.peak
    assert found.to_json()["parts"] == dict(found.parts)
    assert found.table().row_count == len(found.parts) + 2
