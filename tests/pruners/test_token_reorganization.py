"""What is peculiar to token reorganization: the class row, the counts, the published cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import measure, twin
from peft_vision.errors import BadSetting
from peft_vision.layers.attention import Attended
from peft_vision.layers.trunk import GONE, kept_positions
from peft_vision.method import Evidence, make
from peft_vision.pruners.token_reorganization import ClassAttentionReducer, class_attention

Tiny = Callable[..., nn.Module]
METHOD = "token_reorganization"


def test_the_row_is_the_row_of_the_full_map() -> None:
    q, k = torch.randn(2, 2, 3, 20, 8, dtype=torch.float64).unbind(0)
    full = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    assert (class_attention(q, k) - full[:, :, 0].mean(1)).abs().max() < 1e-12


def reorganized(x: Tensor, scores: Tensor, keep: float, prefix: int) -> list[Tensor]:
    """The paper's rule, one image at a time."""
    out = []
    for tokens, score in zip(x, scores, strict=True):
        patches, values = tokens[prefix:], score[prefix:]
        count = math.ceil(keep * len(patches))
        best = set(values.topk(count).indices.tolist())
        kept = [patches[i] for i in range(len(patches)) if i in best]
        fused = sum(values[i] * patches[i] for i in range(len(patches)) if i not in best)
        out.append(torch.stack([*tokens[:prefix], *kept, fused]))
    return out


def attended(x: Tensor, q: Tensor, k: Tensor) -> Attended:
    return Attended(x, q, k, k)


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_keep_and_fuse_follow_the_paper(prefix: int) -> None:
    x = torch.randn(3, 20 + prefix, 8, dtype=torch.float64)
    q, k = torch.randn(2, 3, 2, 20 + prefix, 4, dtype=torch.float64).unbind(0)
    got, places, *_ = ClassAttentionReducer(0.6, fuse=True)(x, attended(x, q, k), prefix, None)
    expected = torch.stack(reorganized(x, class_attention(q, k), 0.6, prefix))
    assert (got - expected).abs().max() < 1e-12
    assert all(row.tolist() == sorted(row.tolist()) for row in places[:, :-1])


def test_the_order_of_patches_does_not_matter() -> None:
    """Permuting patches permutes what is kept; the set and the fused token stay."""
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    q, k = torch.randn(2, 1, 2, 17, 4, dtype=torch.float64).unbind(0)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16)])
    reducer = ClassAttentionReducer(0.5, fuse=True)
    one = reducer(x, attended(x, q, k), 1, None).x
    two = reducer(x[:, order], attended(x, q[:, :, order], k[:, :, order]), 1, None).x
    key = torch.randn(8, dtype=torch.float64)
    assert (one[:, -1] - two[:, -1]).abs().max() < 1e-12
    assert (
        (one[0, :-1] @ key).sort().values - (two[0, :-1] @ key).sort().values
    ).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("keep_rate", "published"),
    [(0.9, 0.875), (0.8, 0.756), (0.7, 0.659), (0.5, 0.502), (0.3, 0.395)],
)
def test_the_published_cost_of_deit_small(keep_rate: float, published: float) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    dense = measure(model).flops
    technique = make(METHOD, {"keep_rate": keep_rate})
    technique.apply(view(model), technique.decide(view(model), technique.strength, Evidence()))
    assert measure(model).flops / dense == pytest.approx(published, abs=6e-4)


def test_nothing_is_fused_when_nothing_is_saved(tiny_timm: Tiny) -> None:
    model, x = tiny_timm(), torch.randn(2, 3, 32, 32)
    before = model(x)
    wrapped = pv.wrap(model, METHOD, keep_rate=0.99)
    assert torch.equal(wrapped(x), before)


def test_prefix_tokens_are_never_dropped(tiny_timm: Tiny) -> None:
    model = tiny_timm("deit_tiny_distilled_patch16_224")
    wrapped = pv.wrap(model, METHOD, keep_rate=0.05, fuse=False)
    trunk = view(wrapped.plain_model).tokens.trunk()
    seen = []
    trunk.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    wrapped(torch.randn(1, 3, 32, 32))
    assert seen == [2 + 1]


def test_kept_positions_are_positions_of_the_image(tiny_timm: Tiny) -> None:
    wrapped = pv.wrap(tiny_timm(), METHOD, keep_rate=0.5)
    found = kept_positions(wrapped, torch.randn(3, 3, 32, 32))
    assert list(found) == [1, 2, 3]
    before = set(range(16))
    for places in found.values():
        assert all(len(set(row.tolist()) - {GONE}) == (row != GONE).sum() for row in places)
        assert set(places.flatten().tolist()) - {GONE} <= before
    first = found[1]
    assert first.shape == (3, 9)
    assert (first[:, -1] == GONE).all()
    survivors = [set(row.tolist()) - {GONE} for row in found[1]]
    assert all(set(row.tolist()) - {GONE} <= s for row, s in zip(found[3], survivors, strict=True))


def test_depths_are_relative() -> None:
    import timm

    for depth, expected in ((12, {"3", "6", "9"}), (24, {"6", "12", "18"}), (4, {"1", "2", "3"})):
        with torch.device("meta"):
            model = timm.create_model("vit_tiny_patch16_224", depth=depth)
        technique = make(METHOD)
        technique.apply(view(model), technique.decide(view(model), 0.3, Evidence()))
        assert set(view(model).tokens.trunk().reducers) == expected


@pytest.mark.parametrize(
    "settings", [{"keep_rate": 0}, {"keep_rate": 1.5}, {"at": []}, {"at": [1.0]}]
)
def test_settings_have_ranges(settings: dict[str, object]) -> None:
    with pytest.raises(BadSetting):
        make(METHOD, settings)


def test_a_mask_is_refused(tiny_timm: Tiny) -> None:
    from peft_vision.errors import UnsupportedSite

    wrapped = pv.wrap(tiny_timm(), METHOD)
    trunk = view(wrapped.plain_model).tokens.trunk()
    with pytest.raises(UnsupportedSite, match="mask"):
        trunk(torch.randn(1, 17, 48), attn_mask=torch.zeros(17, 17))
    assert twin(wrapped.plain_model) is not None
