"""Leaving one head out: the same as by hand, and as removing the head and keeping its mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.errors import UnsupportedSite
from peft_vision.importance._probing import means_of, reader
from peft_vision.importance.leave_one_out import score
from tests.families import DEPTH, HEADS, build, images
from tests.importance.laws import FEW, made, site_of


def divergence(dense: Tensor, given: Tensor) -> float:
    p, q = dense.log_softmax(-1), given.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(1).mean())


def removed(model: nn.Module, block: int, head: int, mean: Tensor) -> nn.Module:
    """The model without one head, whose mean went into the bias of what read it."""
    site = site_of(model, block)
    out = reader(site)
    width = out.in_features // site.count
    columns = slice(head * width, (head + 1) * width)
    with torch.no_grad():
        out.bias += out.weight[:, columns] @ mean[columns]
    site.keep([h for h in range(HEADS) if h != head])
    return model


@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_a_head_removed_with_its_mean_kept(batch: int) -> None:
    """In a block of every depth; blocks behind are computed from where the images wait."""
    model = made("timm_vit")
    x = images(model, 4)
    backbone, given = view(model), list(x.split(batch))
    found, means = score(backbone, given), means_of(backbone, given)
    with torch.no_grad():
        dense = model(x)
        for block in range(DEPTH):
            other = removed(made("timm_vit"), block, 1, means[block])
            wanted = divergence(dense, other(x))
            assert float(found[block, 1]) == pytest.approx(wanted, rel=1e-9)
    assert torch.equal(model(x), dense)


@pytest.mark.parametrize("family", FEW)
def test_waiting_before_a_block_is_running_the_whole_model(family: str) -> None:
    from dataclasses import replace

    model = made(family)
    backbone, x = view(model), [images(model, 2)]
    whole = score(replace(backbone, tokens=None), x)
    torch.testing.assert_close(score(backbone, x), whole, rtol=1e-8, atol=1e-14)


def test_harms() -> None:
    model = made("timm_vit")
    backbone, x = view(model), [images(model, 4)]
    flips, drop = score(backbone, x, harm="flips"), score(backbone, x, harm="drop")
    assert set((4 * flips).flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert float(drop.abs().max()) <= 1.0
    features = build("hf_dinov2")
    with pytest.raises(UnsupportedSite, match="no classes"):
        score(view(features), [images(features, 2)], harm="flips")
