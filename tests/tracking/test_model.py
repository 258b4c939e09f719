"""Template and search image through any backbone: outputs, counts, saving, compression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import peft_vision as pv
from peft_vision.cost import count_flops
from peft_vision.errors import BadSetting, DamagedArtifact, UnsupportedSite
from peft_vision.layers.readout import Boxes
from peft_vision.tracking import Geometry, TrackingModel
from peft_vision.tracking.task import Tracking
from tests.families import FAMILIES, build

SETTINGS: dict[str, Any] = {
    "kinds": (2, 1),
    "readout": "boxes",
    "std": 0.02,
    "init": "trunc_normal",
    "r": 2,
}


def tracker(name: str = "timm_dinov2") -> TrackingModel:
    base = build(name)
    site = pv.view(base).positions
    assert site is not None
    side, patch = site.grid[0] * site.patch[0], site.patch[0]
    streams = (max(patch, side // 2 // patch * patch), side)
    model = pv.wrap(base, "lorat", streams=streams, **SETTINGS)
    model.history.task = Geometry(search_area=5.0).to_json()
    return TrackingModel(model)


def pair(model: TrackingModel, count: int = 2) -> tuple[torch.Tensor, ...]:
    template, search = model.sides
    kinds = torch.zeros(count, *model.grids[0], dtype=torch.long)
    kinds[:, 0, 0] = 1
    return torch.randn(count, 3, template, template), torch.randn(count, 3, search, search), kinds


HEADLESS = {name for name in FAMILIES if name.startswith("hf_")} - {
    *("hf_vit", "hf_dinov2_classifier", "hf_clip_classifier", "hf_siglip_classifier")
}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - HEADLESS - {"generic_cnn"}))
def test_every_family_with_a_head_tracks_and_trains(name: str) -> None:
    model = tracker(name).train()
    found = model(*pair(model))
    rows, columns = model.grids[1]
    assert isinstance(found, Boxes)
    assert found.scores.shape == (2, rows, columns)
    assert found.boxes.shape == (2, rows, columns, 4)
    losses = Tracking().losses(
        model,
        {
            **dict(zip(("template", "search", "foreground"), pair(model), strict=True)),
            "box": torch.tensor([[0.1, 0.1, 0.6, 0.9], [0.3, 0.2, 0.6, 0.5]]),
        },
    )
    torch.stack(list(losses.values())).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent


@pytest.mark.parametrize("name", sorted(HEADLESS))
def test_a_backbone_without_a_head_says_what_would_have_one(name: str) -> None:
    with pytest.raises(UnsupportedSite, match="ForImageClassification class, or a timm model"):
        tracker(name)


def test_published_sizes() -> None:
    """B-224: 30 GMACs and 13.0 M trained parameters (LoRAT, table of efficiency)."""
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch14_dinov2", img_size=518, num_classes=0)
        model = pv.wrap(base, "lorat", streams=(112, 224), kinds=(2, 1), readout="boxes")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        cost = pv.measure(pv.merge(model))
    assert trained / 1e6 == pytest.approx(13.0, abs=0.05)
    assert cost.gmacs == pytest.approx(30, rel=0.01)
    assert TrackingModel(model).sides == (112, 224)


def test_the_count_is_that_of_both_images() -> None:
    model = tracker()
    merged = TrackingModel(pv.merge(model.model))
    inner = merged.plain_model
    (t1, t2), (s1, s2) = merged.grids
    linear_part = [m for m in inner.modules() if isinstance(m, torch.nn.Linear)]
    assert linear_part
    one = count_flops(inner, (3, *(2 * [merged.sides[1]])))
    alone = build("timm_dinov2")
    assert one > count_flops(alone, (3, *(2 * [merged.sides[1]]))) * (1 + t1 * t2 / (s1 * s2)) * 0.9


def test_it_survives_saving_merging_and_compression(tmp_path: Path) -> None:
    model = tracker().eval()
    given = pair(model)
    with torch.no_grad():
        expected = model(*given)
    model.model.save_pretrained(tmp_path / "adapter")
    base = build("timm_dinov2")
    again = TrackingModel(pv.load(tmp_path / "adapter", base=base))
    assert again.model.history.task["name"] == "tracking"
    assert again.geometry == Geometry(search_area=5.0)
    with torch.no_grad():
        found = again(*given)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-6)
    result = pv.compress(model.model, target_flops=0.6)
    assert 0.98 * 0.6 < result.ratio <= 0.6
    assert any("left out" in note and "several images" in note for note in result.notes)
    result.save_pretrained(tmp_path / "small")
    small = TrackingModel(pv.load(tmp_path / "small", base=base))
    assert small.geometry == Geometry(search_area=5.0)
    with torch.no_grad():
        assert torch.equal(small(*given).boxes, TrackingModel(result.model).eval()(*given).boxes)


def test_ridge_compensation_sees_the_joint_sequence() -> None:
    """What is fitted again is nearer to the dense tracker on images than what is only cut."""
    torch.manual_seed(0)
    model = tracker().eval()
    side = model.sides[1]
    images = [torch.randn(8, 3, side, side) for _ in range(4)]
    given = pair(model, 8)
    with torch.no_grad():
        expected = model(*given).scores
        far = {}
        for how in ("none", "ridge"):
            small = pv.compress(
                model.model, target_flops=0.7, methods="magnitude", data=images, compensate=how
            )
            found = TrackingModel(small.model).eval()(*given).scores
            far[how] = float((found - expected).square().mean())
    assert far["ridge"] < far["none"]


def test_methods_that_drop_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedSite, match="patches of several images"):
        pv.compress(tracker().model, target_flops=0.7, methods="token_merging")


def test_what_is_no_tracker() -> None:
    base = build("timm_dinov2")
    with pytest.raises(UnsupportedSite, match="no readout of boxes"):
        TrackingModel(pv.wrap(base, "decoupled_position", streams=(16, 32), kinds=(2, 1)))
    with pytest.raises(UnsupportedSite, match="1 streams"):
        TrackingModel(pv.wrap(build("timm_dinov2"), "lorat", readout="boxes", r=2))
    with pytest.raises(DamagedArtifact, match="not the record of a tracker"):
        Geometry.from_json({"name": "counting"})
    with pytest.raises(BadSetting, match=r"window is 1.5; it lies in \[0, 1\)"):
        Geometry(window=1.5)


def test_recovery_is_refused_before_anything_is_read() -> None:
    small = pv.compress(tracker().model, target_flops=0.8, methods="magnitude")
    with pytest.raises(BadSetting, match="made for tracking, and recovery teaches classes"):
        pv.recover(small.model, build("timm_dinov2"), "nowhere")
