"""What is written down of a timm model builds it again, convolutional ones included."""

from __future__ import annotations

from typing import Any

import pytest
import timm

from peft_vision.sources import build, difference, spec_of


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("test_resnet", {"in_chans": 4, "num_classes": 7}),
        ("test_resnet", {"global_pool": "max"}),
        ("test_convnext", {"num_classes": 0}),
        ("test_efficientnet", {}),
        ("test_vit", {"global_pool": "avg", "img_size": 96, "depth": 2}),
    ],
)
def test_the_spec_builds_the_same_architecture(name: str, changes: dict[str, Any]) -> None:
    model = timm.create_model(name, **changes)
    spec = spec_of(model)
    assert spec is not None
    assert set(changes) <= set(spec["kwargs"])
    assert difference(build(spec, device="meta"), model) is None
