"""Recomputing activations changes no gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.errors import UnsupportedSite
from tests.backbones.test_trunk import reduce_tokens
from tests.families import CLASS_POOLED, TRANSFORMERS, build, features, images


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of one training step; the seed fixes rotary augmentations."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(3)
    features(model(images(model))).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def recomputed(model: nn.Module) -> int:
    """How often the first block's MLP runs in one step: twice when it is recomputed."""
    calls: list[int] = []
    mlp = view(model).hidden[0].mlp
    hook = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model)
    hook.remove()
    return len(calls)


def check(model: nn.Module) -> None:
    expected = gradients(model)
    view(model).set_checkpointing(True)
    assert recomputed(model) == 2
    found = gradients(model)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-10, msg=name)
    view(model).set_checkpointing(False)
    assert recomputed(model) == 1


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_as_the_model_does_it(name: str) -> None:
    check(build(name, dtype=torch.float64))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_through_an_empty_trunk(name: str) -> None:
    model = build(name, dtype=torch.float64)
    tokens = view(model).tokens
    assert tokens is not None
    tokens.trunk()
    check(model)


@pytest.mark.parametrize("name", CLASS_POOLED)
def test_where_tokens_leave(name: str) -> None:
    model = build(name, dtype=torch.float64)
    view(model).heads[1].keep([0, 2])
    reduce_tokens(model, 0.5)
    check(model)


@pytest.mark.parametrize("name", ["timm_vit", "hf_vit"])
def test_switched_on_before_the_trunk_and_off_after(name: str) -> None:
    model = build(name, dtype=torch.float64)
    view(model).set_checkpointing(True)
    reduce_tokens(model, 0.5)
    view(model).set_checkpointing(False)
    assert recomputed(model) == 1


def test_a_plain_network_has_none() -> None:
    with pytest.raises(UnsupportedSite, match="TinyCnn offers no gradient checkpointing"):
        view(build("generic_cnn")).set_checkpointing(True)
