"""Entropy and confidence: of the attention that the fused kernel computes."""

from __future__ import annotations

import math

import pytest
import torch

from peft_vision.backbones import view
from peft_vision.importance import attention_entropy
from peft_vision.importance.attention_entropy import score
from tests.families import images
from tests.importance.laws import made, site_of


def test_probabilities_times_values_are_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every family with something of its own between projection and product."""
    from peft_vision.calibration import Walk
    from peft_vision.importance._ahead import opened
    from peft_vision.importance._probing import reader
    from peft_vision.layers.attention import project

    for family in ("timm_vit", "timm_eva_dinov3", "hf_dinov3", "hf_siglip"):
        model = made(family)
        backbone = view(model)
        site = backbone.heads[2]
        with torch.no_grad(), opened(backbone) as trunk:
            walk = Walk(backbone, [images(model, 2)])
            walk.advance()
            walk.advance()
            seen: dict[str, torch.Tensor] = {}
            norm = getattr(walk.block, trunk.parts.norm1)
            walk.watch([norm], lambda _, x, y, into=seen: into.update(normed=y))
            walk.watch([reader(site)], lambda _, x, y, into=seen: into.update(heads=x))
            stream = walk.streams[0]
            p = attention_entropy.probabilities(site, seen["normed"], stream, trunk.prefix)
            v = project(site.attention, site.parts, seen["normed"], stream.rope)[2]
        torch.testing.assert_close((p @ v).transpose(1, 2).flatten(2), seen["heads"])


def test_a_head_that_looks_everywhere_scores_nothing() -> None:
    model = made("hf_vit")
    site = site_of(model, 1)
    keys = getattr(site.attention, site.parts.qkv[1])
    with torch.no_grad():
        keys.weight[:8] = 0.0
        keys.bias[:8] = 0.0
    backbone, x = view(model), [images(model, 2)]
    found, sure = score(backbone, x), score(backbone, x, measure="confidence")
    tokens = 17
    assert float(found[1, 0]) == pytest.approx(0.0, abs=1e-12)
    assert float(sure[1, 0]) == pytest.approx(1 / tokens)
    assert 0 < float(found[1, 1]) < 1
    assert math.log(tokens) > 0


def test_a_head_that_looks_at_one_token_scores_one() -> None:
    model = made("hf_vit")
    site = site_of(model, 1)
    with torch.no_grad():
        getattr(site.attention, site.parts.qkv[0]).weight[:8] *= 1e6
    assert float(score(view(model), [images(model, 2)])[1, 0]) == pytest.approx(1.0, abs=1e-3)
