"""What is peculiar to magnitude pruning: the smallest go first, over the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.method import Evidence, make
from peft_vision.plan import unpack_indices
from peft_vision.pruners._refit_scores import refit_scores
from tests.families import timm_vit

Tiny = Callable[..., nn.Module]


def shrink_unit(model: nn.Module, block: int, unit: int) -> None:
    mlp = view(model).hidden[block].mlp
    with torch.no_grad():
        mlp.fc1.weight[unit] *= 1e-3
        mlp.fc2.weight[:, unit] *= 1e-3


def shrink_head(model: nn.Module, block: int, head: int) -> None:
    attention, width = view(model).heads[block].attention, 16
    rows = slice(head * width, (head + 1) * width)
    with torch.no_grad():
        for third in range(3):
            attention.qkv.weight[third * 48 + head * width : third * 48 + (head + 1) * width] *= (
                1e-3
            )
        attention.proj.weight[:, rows] *= 1e-3


def test_the_smallest_go_first(tiny_timm: Tiny) -> None:
    model = tiny_timm()
    shrink_unit(model, 2, 77)
    shrink_head(model, 1, 2)
    backbone = view(model)
    units = 4 * 191
    single = make("magnitude", {"multiple": 1})
    decisions = single.decide(backbone, 1.0001 / units, Evidence())
    assert set(decisions) == {"blocks.2.hidden"}
    assert 77 not in unpack_indices(decisions["blocks.2.hidden"])
    decisions = make("magnitude", {"hidden": False}).decide(backbone, 0.13 ** (1 / 3), Evidence())
    assert set(decisions) == {"blocks.1.heads"}
    assert unpack_indices(decisions["blocks.1.heads"]) == [0, 1]


def test_a_block_with_small_weights_is_not_emptied_for_that(tiny_timm: Tiny) -> None:
    model = tiny_timm()
    with torch.no_grad():
        for parameter in view(model).hidden[0].mlp.parameters():
            parameter.mul_(1e-3)
    decisions = make("magnitude").decide(view(model), 0.5, Evidence())
    kept = [len(unpack_indices(decisions[f"blocks.{i}.hidden"])) for i in range(4)]
    assert min(kept) > 192 * 0.3


@pytest.mark.parametrize("multiple", [1, 8, 64, 256])
def test_units_stay_in_multiples(tiny_timm: Tiny, multiple: int) -> None:
    model = pv.wrap(tiny_timm(), "magnitude", ratio=0.37, multiple=multiple)
    counts = [site.count for site in view(model.plain_model).hidden]
    assert all(count % multiple == 0 or count == 192 for count in counts)
    assert all(count > 0 for count in counts)


@pytest.mark.parametrize("multiple", [8, 64])
def test_what_stays_is_a_multiple_where_the_count_was_none(multiple: int) -> None:
    """LLaMA's two thirds of four times the width, for instance."""
    model = timm_vit(mlp_ratio=2730 / 32, depth=2)
    for ratio in (0.05, 0.5, 1.0):
        method = make("magnitude", {"multiple": multiple, "heads": False, "score": "weights"})
        decisions = method.decide(view(model), ratio, Evidence())
        counts = [len(unpack_indices(d)) for d in decisions.values()]
        assert counts
        assert all(count % multiple == 0 for count in counts)
    assert counts == [multiple, multiple]
    few = make("magnitude", {"multiple": 256, "heads": False})
    assert few.decide(view(timm_vit()), 1.0, Evidence()) == {}, "128 units, fewer than one group"


@pytest.mark.parametrize(
    ("device", "width", "multiple"), [("cpu", 512, 8), ("cuda", 512, 32), ("cuda", 192, 16)]
)
def test_the_device_decides_what_units_stay_a_multiple_of(
    monkeypatch: pytest.MonkeyPatch, device: str, width: int, multiple: int
) -> None:
    """Where it is left to it; and replay does not ask again."""
    model, where = timm_vit(mlp_ratio=width / 32), torch.device(device)
    monkeypatch.setattr("peft_vision.pruners.magnitude.device_of", lambda _: where)
    method = make("magnitude", {"heads": False})
    tried = [method.decide(view(model), ratio / 10, Evidence()) for ratio in range(2, 9)]
    counts = [{key: len(unpack_indices(d)) for key, d in decided.items()} for decided in tried]
    assert math.gcd(width, *(count for found in counts for count in found.values())) == multiple
    monkeypatch.undo()
    method.apply(view(model), tried[3])
    assert {site.key: site.count for site in view(model).hidden} == counts[3]


@pytest.mark.parametrize("multiple", ["fast", 0, 257, True])
def test_the_multiple_has_a_range(multiple: object) -> None:
    with pytest.raises(BadSetting, match="multiple is"):
        make("magnitude", {"multiple": multiple})


def test_one_of_each_stays_at_full_strength(tiny_timm: Tiny) -> None:
    model = pv.wrap(tiny_timm(), "magnitude", ratio=1.0, multiple=1)
    backbone = view(model.plain_model)
    assert [site.count for site in backbone.heads] == [1] * 4
    assert [site.count for site in backbone.hidden] == [1] * 4
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(("exponent", "left"), [(1.0, 12 - 4), (3.0, 12 - 1)])
def test_heads_go_at_their_own_pace(tiny_timm: Tiny, exponent: float, left: int) -> None:
    model = pv.wrap(tiny_timm(), "magnitude", ratio=0.5, head_exponent=exponent)
    assert sum(site.count for site in view(model.plain_model).heads) == left


def test_axes_can_be_switched_off(tiny_timm: Tiny) -> None:
    model = pv.wrap(tiny_timm(), "magnitude", ratio=0.5, heads=False)
    backbone = view(model.plain_model)
    assert [site.count for site in backbone.heads] == [3] * 4
    assert sum(site.count for site in backbone.hidden) == 4 * 192 - 8 * (4 * 23 // 2)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, "half", True])
def test_the_ratio_has_a_range(ratio: object) -> None:
    with pytest.raises(BadSetting, match="ratio"):
        make("magnitude", {"ratio": ratio})


def test_a_packed_weight_is_refused(tiny_timm: Tiny) -> None:
    model = tiny_timm()
    view(model).hidden[0].mlp.fc1.weight = nn.Parameter(
        torch.zeros(10, 1, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(UnsupportedSite, match="quantize afterwards"):
        pv.wrap(model, "magnitude")


def test_of_two_units_that_say_the_same_one_is_worth_keeping(tiny_timm: Tiny) -> None:
    model = tiny_timm().double()
    backbone = view(model)
    mlp = backbone.hidden[1].mlp
    with torch.no_grad():
        mlp.fc1.weight[7] = mlp.fc1.weight[3]
        mlp.fc1.bias[7] = mlp.fc1.bias[3]
        mlp.fc2.weight[:, [3, 7]] *= 5
    batches = [torch.randn(64, 3, 32, 32, dtype=torch.float64)]
    decisions = make("magnitude", {"heads": False, "multiple": 1}).decide(
        backbone, 0.5, Evidence(batches)
    )
    kept = unpack_indices(decisions["blocks.1.hidden"])
    assert len({3, 7} & set(kept)) == 1


def test_scores_of_a_branch_add_up_to_all_that_it_says(tiny_timm: Tiny) -> None:
    torch.manual_seed(0)
    backbone = view(tiny_timm().double())
    batches = [torch.randn(64, 3, 32, 32, dtype=torch.float64)]
    for sites in (backbone.heads, backbone.hidden):
        for score in refit_scores(backbone, sites, batches):
            assert float(score.sum()) == pytest.approx(1.0)
            assert bool((score >= 0).all())


def test_a_plain_transformer_is_not_run_for_its_channels(tiny_timm: Tiny) -> None:
    evidence = Evidence()
    decisions = make("magnitude").decide(view(tiny_timm()), 0.5, evidence)
    assert {key.rpartition(".")[2] for key in decisions} == {"heads", "hidden"}
    assert all(key[1] != "channels" for key in evidence.memory)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def test_the_smallest_channels_go_first() -> None:
    model = convolutions()
    with torch.no_grad():
        model[0].weight[5] *= 1e-3
        model[2].weight[:, 5] *= 1e-3
    method = make("magnitude", {"multiple": 1})
    decisions = method.decide(view(model), 1.0001 / 30, Evidence())
    assert set(decisions) == {"0.channels"}
    assert 5 not in unpack_indices(decisions["0.channels"]["kept"])


def test_on_images_a_channel_that_says_nothing_goes_first() -> None:
    torch.manual_seed(0)
    model = convolutions()
    with torch.no_grad():
        model[0].weight[5] *= 1e-4
        model[0].bias[5] = 1e3  # always on: behind a norm, or a bias, that is no information
        model[0].weight[6] *= 9
        model[0].bias[6] = -1e4  # never on
    batches = [torch.randn(4, 3, 12, 12)]
    settings = {"multiple": 1, "heads": False}
    method = make("magnitude", settings)
    decisions = method.decide(view(model), 2.0001 / 30, Evidence(batches))
    assert set(decisions) == {"0.channels"}
    assert {5, 6}.isdisjoint(unpack_indices(decisions["0.channels"]["kept"]))
    by_weights = make("magnitude", {**settings, "score": "weights"})
    decisions = by_weights.decide(view(model), 0.3, Evidence(batches))
    assert 6 in unpack_indices(decisions["0.channels"]["kept"])
    with pytest.raises(BadSetting, match="no images were given"):
        make("magnitude", {"score": "images"}).decide(view(model), 0.5, Evidence())


def test_a_model_without_anything_to_remove_is_refused_for_each_kind(tiny_timm: Tiny) -> None:
    with pytest.raises(UnsupportedSite, match=r"heads: .*; hidden: .*; channels: channels is off"):
        make("magnitude", {"channels": False}).decide(view(convolutions()), 0.5, Evidence())
    only = make("magnitude", {"heads": False, "hidden": False})
    with pytest.raises(UnsupportedSite, match="channels: it has no convolution beyond its patches"):
        only.decide(view(tiny_timm()), 0.5, Evidence())
    with pytest.raises(UnsupportedSite, match="channels: Sequential has no channels that could be"):
        only.decide(view(nn.Sequential(nn.Linear(4, 3))), 0.5, Evidence())
