"""The prediction against CUDA's own counter. Skipped without a GPU: then it has not been run."""

from __future__ import annotations

import gc

import pytest
import torch

from peft_vision.memory.estimate import estimate_memory
from peft_vision.sources import create_model
from peft_vision.tasks.classification import Classification
from peft_vision.training.lean import leaned
from peft_vision.training.settings import TrainSettings
from peft_vision.wrapping import wrap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("frozen", ["keep", "bf16"])
def test_within_five_percent(frozen, recomputed, quantize):
    plain = create_model("vit_large_patch14_dinov2", pretrained=False, img_size=224, num_classes=10)
    model = wrap(plain, "lora", r=16, quantize=quantize)
    settings = TrainSettings(
        batch_size=16, precision="bf16", frozen=frozen, gradient_checkpointing=recomputed
    )
    predicted = estimate_memory(model, settings=settings).allocated
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with leaned(model, settings):
        measured = _second_step(model.cuda().train(), settings) - before
    assert predicted == pytest.approx(measured, rel=0.05)


def _second_step(model: torch.nn.Module, settings: TrainSettings) -> int:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    batch = {
        "pixel_values": torch.randn(settings.batch_size, 3, 224, 224, device="cuda"),
        "labels": torch.zeros(settings.batch_size, dtype=torch.int64, device="cuda"),
    }
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = Classification().losses(model, batch)["labels"]
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()
