"""Gradients of gates: those of finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_vision.backbones import view
from peft_vision.importance._probing import by_head, changing, means_of, reader
from peft_vision.importance.taylor import score
from tests.families import images
from tests.importance.laws import made, site_of


def loss(model: nn.Module, x: torch.Tensor, gate: float, toward: torch.Tensor) -> float:
    """Of one image, with head 2 of block 1 closed to `gate`."""
    site = site_of(model, 1)

    def change(values: torch.Tensor) -> torch.Tensor:
        heads, rest = by_head(values, site.count).clone(), by_head(toward, site.count)
        heads[..., 2, :] = rest[2] + gate * (heads[..., 2, :] - rest[2])
        return heads.flatten(-2)

    with torch.no_grad():
        label = model(x).argmax(-1)
        with changing(reader(site), change):
            return float(nn.functional.cross_entropy(model(x), label))


@pytest.mark.parametrize("toward", ["mean", "zero"])
def test_it_is_the_slope_of_the_loss_of_each_image(toward: str) -> None:
    model = made("timm_vit")
    backbone, x = view(model), images(model, 3)
    means = means_of(backbone, [x])[1]
    target = means if toward == "mean" else torch.zeros_like(means)
    step = 1e-5
    slopes = [
        abs(loss(model, one, 1 + step, target) - loss(model, one, 1 - step, target)) / (2 * step)
        for one in x.split(1)
    ]
    found = score(backbone, [x[:2], x[2:]], toward=toward)
    assert float(found[1, 2]) == pytest.approx(sum(slopes) / 3, rel=1e-6)
    assert not any(p.grad is not None for p in model.parameters())


def test_normalized_blocks_count_the_same() -> None:
    model = made("hf_dinov2")
    backbone, x = view(model), [images(model, 2)]
    plain, found = score(backbone, x), score(backbone, x, normalize=True)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found, plain / plain.norm(dim=1, keepdim=True))
