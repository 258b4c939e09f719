"""What is peculiar to the bottleneck: gates that start open, settle exactly, and meet a budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import count_flops, measure, twin, unwrap
from peft_vision.errors import BadSetting, BudgetUnreachable, DataError, UnsupportedSite
from peft_vision.layers.absent import Absent
from peft_vision.layers.gate_control import Controller, controller_in
from peft_vision.layers.gates import Gated
from peft_vision.layers.traits import Temporary, penalties
from peft_vision.mask_training import prepare, settle
from peft_vision.method import Evidence, make
from peft_vision.plan import unpack_indices
from tests.families import SIZE, build, features, images, run

SOME = (
    *("timm_vit", "timm_vit_normed", "timm_deit_distilled", "timm_dinov2_registers"),
    *("timm_siglip", "timm_eva_inner_norm", "hf_vit", "hf_dinov2_swiglu", "hf_dinov3", "hf_clip"),
)
FEW = ("timm_vit", "timm_eva02_small")
KINDS = ("width", "heads", "hidden", "branches")
ABSENT = ("blocks.1.attention", "blocks.2.mlp")


def gated(family: str, **settings: Any) -> tuple[nn.Module, Any, Controller]:
    """A model with gates, in float64, in evaluation mode."""
    model, method = build(family, dtype=torch.float64), make("vib", {"multiple": 1, **settings})
    method.attach(view(model), 0.5)
    control = controller_in(model)
    assert control is not None
    return model, method, control


def learn(control: Controller, seed: int = 3) -> None:
    """As if training had closed about a third of all gates, and moved the means of the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, gate in control.gates.items():
            gate.mean_offset.normal_(0, 0.002, generator=generator)
            noise = torch.rand(gate.units, generator=generator, dtype=torch.float64)
            closed = noise < 0.35
            if gate.units == 1:
                closed = torch.tensor([key in ABSENT])
            elif closed.all():
                closed[0] = False
            gate.logvar_offset.copy_(torch.where(closed, 0.1 + 0.01 * noise, 0.03 * noise))


def training_output(model: nn.Module, x: Tensor) -> Tensor:
    output = model.train()(x)
    return features(output[0] if isinstance(output, tuple) else output)


@pytest.mark.parametrize("family", SOME)
def test_gates_start_open_and_settle_exactly(family: str) -> None:
    dense = build(family, dtype=torch.float64)
    model, method, control = gated(family)
    x = images(model)
    assert (run(model, x) - run(dense, x)).abs().max() < 1e-10
    loss = training_output(model, x).square().sum() + penalties(model)[0]
    loss.backward()
    assert all(
        p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "_offset" in n
    )
    learn(control)
    masked, foretold = run(model, x), control.settled()
    learned = method.settle(view(model))
    assert not any(isinstance(module, Temporary | Controller) for module in model.modules())
    decisions = method.decide(view(model), learned["strength"], Evidence(learned=learned))
    method.apply(view(model), decisions)
    cut = run(model, x)
    if cut.shape != masked.shape:  # features that leave a model have lost what was cut
        masked = masked[..., unpack_indices(decisions["width"])]
    assert (cut - masked).abs().max() < 1e-10
    counted = measure(model).flops / measure(dense).flops
    assert abs(foretold - counted) < 0.01 * counted, "the expected cost is that of the cut model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FEW)
def test_each_kind_settles_exactly_alone(family: str, kind: str) -> None:
    model, method, control = gated(family, **{one: one == kind for one in KINDS})
    assert {key.rpartition(".")[2] for key in control.gates} == (
        {"attention", "mlp"} if kind == "branches" else {kind}
    )
    learn(control)
    x = images(model)
    masked = run(model, x)
    learned = method.settle(view(model))
    decisions = method.decide(view(model), learned["strength"], Evidence(learned=learned))
    method.apply(view(model), decisions)
    cut = run(model, x)
    if cut.shape != masked.shape:
        masked = masked[..., unpack_indices(decisions["width"])]
    assert (cut - masked).abs().max() < 1e-10
    gone = [type(m) for m in model.modules() if isinstance(m, Absent)]
    assert len(gone) == (2 if kind == "branches" else 0)


def learned_of(family: str, **settings: Any) -> tuple[nn.Module, Any, dict[str, Any]]:
    model, method, control = gated(family, **settings)
    learn(control)
    return model, method, method.settle(view(model))


@pytest.mark.parametrize("family", FEW)
def test_cost_never_rises_with_strength(family: str) -> None:
    model, method, learned = learned_of(family, multiple=4)
    evidence, costs = Evidence(learned=learned), []
    for strength in (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 0.9, 1.0):
        decisions = method.decide(view(model), strength, evidence)
        smaller = twin(model)
        method.apply(view(smaller), decisions)
        costs.append(count_flops(smaller, (3, SIZE, SIZE)))
        assert strength > 0 or decisions == {}
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.2 * costs[0]


def test_a_model_is_not_left_without_attention_or_mlp() -> None:
    model, method, learned = learned_of("timm_vit")
    method.apply(view(model), method.decide(view(model), 1.0, Evidence(learned=learned)))
    assert (len(view(model).heads), len(view(model).hidden)) == (1, 1)


def test_widths_stay_multiples() -> None:
    model, method, learned = learned_of("timm_vit", multiple=8)
    decisions = method.decide(view(model), 0.4, Evidence(learned=learned))
    kept = {key: len(unpack_indices(d)) for key, d in decisions.items() if d != "absent"}
    assert any(key.endswith("hidden") for key in kept)
    assert all(count % 8 == 0 for key, count in kept.items() if not key.endswith("heads"))


def test_what_was_learned_on_another_structure_is_refused() -> None:
    model, method, learned = learned_of("timm_vit")
    view(model).hidden[0].keep(range(100))
    with pytest.raises(UnsupportedSite, match=r"blocks.0.hidden"):
        method.decide(view(model), 0.5, Evidence(learned=learned))


def test_gates_alone_are_trained_unless_told() -> None:
    masks, *_ = gated("timm_vit")
    names = {n.rpartition(".")[2] for n, p in masks.named_parameters() if p.requires_grad}
    assert names == {"mean_offset", "logvar_offset", "linear", "quadratic"}
    full, method, _ = gated("timm_vit", train="full")
    assert all(p.requires_grad for p in full.parameters())
    frozen = build("timm_vit")
    frozen.cls_token.requires_grad_(False)
    make("vib").attach(view(frozen), 0.5)
    make("vib").settle(view(frozen))
    assert [n for n, p in frozen.named_parameters() if not p.requires_grad] == ["cls_token"]
    assert method.data_share == 1.0
    assert make("vib", {"train": "fast", "share": 0.1}).data_share == 0.1


def test_no_gate_decays_in_the_trainer() -> None:
    from peft_vision.training.trainer import _decays

    model, *_ = gated("timm_vit")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name, p in trained if _decays(name, p)]


def test_gating_costs_nothing_in_the_count() -> None:
    model, *_ = gated("timm_vit")
    assert measure(model).flops == measure(build("timm_vit")).flops


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target": 0.0}, "target"),
        ({"train": "half"}, "masks, fast, full"),
        ({"kl": -1.0}, "kl"),
        ({"speed": 0.5}, "speed"),
        (dict.fromkeys(KINDS, False), "Nothing is gated"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(BadSetting, match=match):
        make("vib", settings)


def test_what_cannot_be_gated_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedSite, match=r"no width to gate.*width=False"):
        pv.wrap(build("timm_vit_post_norm"), "vib")
    partly = pv.wrap(build("timm_vit_post_norm"), "vib", width=False)
    assert not [n for n, m in partly.named_modules() if n.endswith("branch") and m is not None]
    with pytest.raises(UnsupportedSite, match="packed weight"):
        pv.wrap(pv.wrap(build("timm_vit"), "int8"), "vib")
    with pytest.raises(UnsupportedSite, match="bottleneck"):
        pv.wrap(pv.wrap(build("timm_vit"), "bottleneck_adapter"), "vib")


def step(model: nn.Module, x: Tensor, rate: float = 1e-3) -> None:
    """One step of a user's own loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    (training_output(model, x).square().mean() + sum(penalties(model))).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def test_a_model_with_gates_reloads_in_the_middle_of_training(tmp_path: Path) -> None:
    model = pv.wrap(build("timm_vit"), "vib", target=0.6, steps=10)
    x = images(model)
    for _ in range(3):
        step(model, x)
    model.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=build("timm_vit", seed=1))
    assert torch.equal(run(again, x), run(model, x))
    one, other = controller_in(model), controller_in(again)
    assert one is not None
    assert other is not None
    assert int(other.steps) == 3
    assert other.target == 0.6
    assert other.aim().item() == one.aim().item()
    for trained in (model, again):
        torch.manual_seed(5)
        step(trained, x)
    assert torch.equal(run(again, x), run(model, x))


def test_settle_carries_out_what_was_learned(tmp_path: Path) -> None:
    model = pv.wrap(build("timm_vit"), "vib", multiple=1).double()
    control, x = controller_in(model), images(model)
    assert control is not None
    learn(control)
    masked = run(model, x)
    done = settle(model)
    assert (run(done, x) - masked).abs().max() < 1e-10
    assert torch.equal(run(model, x), masked), "the model given is not changed"
    steps = done.history.plan.steps
    assert [one.method for one in steps] == ["vib"]
    assert "gates" not in steps[0].decisions
    assert steps[0].decisions["blocks.2.mlp"] == "absent"
    done.float().save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=build("timm_vit", seed=1))
    assert torch.equal(run(again, x.float()), run(done, x.float()))
    assert all(p.requires_grad for p in done.parameters())


def test_settle_meets_a_budget() -> None:
    target = 0.5
    model = pv.wrap(build("timm_vit"), "vib", multiple=2)
    control = controller_in(model)
    assert control is not None
    learn(control)
    done = settle(model, target_flops=target)
    ratio = measure(done).flops / measure(model).flops
    assert 0.98 * target < ratio <= target
    with pytest.raises(BudgetUnreachable, match="smallest"):
        settle(model, target_flops=1e-3)


def test_there_has_to_be_something_to_settle() -> None:
    model = pv.wrap(build("timm_vit"), "vib")
    for other in (build("timm_vit"), settle(model), pv.wrap(build("timm_vit"), "magnitude")):
        with pytest.raises(BadSetting, match="nothing to settle"):
            settle(other)


@pytest.mark.parametrize("first", ["lora", "vib"])
def test_it_composes_with_low_rank_updates(first: str) -> None:
    second = {"lora": "vib", "vib": "lora"}[first]
    settings: dict[str, Any] = {
        "lora": {"targets": ("qkv", "out", "up", "down")},
        "vib": {"multiple": 1},
    }
    model = pv.wrap(build("timm_vit"), first, **settings[first])
    model = pv.wrap(model, second, **settings[second]).double()
    control, x = controller_in(model), images(model)
    assert control is not None
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    learn(control)
    masked = run(model, x)
    done = settle(model)
    assert not any(isinstance(m, Gated) for m in done.modules())
    assert not any("lora" in name for name, _ in done.named_parameters())
    assert (run(done, x) - masked).abs().max() < 1e-10
    again = pv.wrap(done.float(), "lora")  # structure first, then updates: the usual way
    assert run(again, x.float()).shape == masked.shape


def test_later_cuts_reach_the_gates() -> None:
    model = pv.wrap(build("timm_vit"), "vib")
    backbone = view(unwrap(model))
    backbone.heads[0].keep([0, 2])
    backbone.hidden[1].keep(range(40))
    assert backbone.width is not None
    backbone.width.keep(range(16))
    control = controller_in(model)
    assert control is not None
    sizes = {key: gate.units for key, gate in control.gates.items()}
    assert (sizes["blocks.0.heads"], sizes["blocks.1.hidden"], sizes["width"]) == (2, 40, 16)
    assert control.expected().item() == pytest.approx(
        measure(model).flops / measure(build("timm_vit")).flops, rel=0.01
    )
    assert run(model, images(model)).shape == (2, 5)


def test_checkpointing_draws_the_same_noise() -> None:
    model, *_ = gated("timm_vit")
    x, found = images(model), []
    for on in (False, True):
        view(model).set_checkpointing(on)
        torch.manual_seed(4)
        model.zero_grad()
        training_output(model, x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*found, strict=True))


def test_a_controlled_model_trains_in_bfloat16_autocast() -> None:
    model = pv.wrap(build("timm_vit"), "vib")
    with torch.autocast("cpu", torch.bfloat16):
        loss = training_output(model, images(model)).float().square().mean()
    (loss + penalties(model)[0]).backward()
    offsets = [p for n, p in model.named_parameters() if n.endswith("_offset")]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in offsets)


@pytest.mark.parametrize("labeled", [False, True])
def test_preparing_trains_gates_and_leaves_a_plain_model(labeled: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, SIZE, SIZE), torch.randint(0, 5, (16,))
    model, before = (
        build("timm_vit"),
        {n: t.clone() for n, t in build("timm_vit").state_dict().items()},
    )
    method = make("vib", {"multiple": 2})
    batches = [(a, b) if labeled else a for a, b in zip(x.split(8), y.split(8), strict=True)]
    learned = prepare(model, method, batches, 0.6, epochs=2, batch_size=8)
    assert list(model.state_dict()) == list(before)
    moved = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert all("norm" in n or "proj" in n or "fc2" in n for n in moved), "means are folded there"
    assert learned["target"] == 0.6
    assert learned["notes"], "four steps cannot get near"
    assert all(p.requires_grad for p in model.parameters())
    assert len(learned["log_alpha"]) == 1 + 4 * 4


def test_weights_are_trained_too_on_a_share_of_the_images() -> None:
    model, whole = build("timm_vit"), build("timm_vit")
    method = make("vib", {"train": "fast", "share": 0.5})
    prepare(
        model,
        method,
        [(torch.randn(8, 3, SIZE, SIZE), torch.arange(8) % 5)],
        0.6,
        epochs=1,
        batch_size=4,
    )
    assert not torch.equal(model.blocks[0].attn.qkv.weight, whole.blocks[0].attn.qkv.weight)
    features_only = build("hf_dinov3")
    learned = prepare(features_only, make("vib"), [torch.randn(4, 3, SIZE, SIZE)], 0.6, epochs=1)
    assert "width" in learned["log_alpha"]


def test_preparing_needs_images() -> None:
    with pytest.raises(DataError, match="Images are needed"):
        prepare(build("timm_vit"), make("vib"), None, 0.5)
    with pytest.raises(DataError, match="no batch"):
        prepare(build("timm_vit"), make("vib"), [], 0.5)


def test_a_copy_has_gates_of_its_own() -> None:
    model, *_ = gated("timm_vit")
    twin_model = copy.deepcopy(model)
    one, other = controller_in(model), controller_in(twin_model)
    assert one is not None
    assert other is not None
    inside = {id(m) for m in twin_model.modules()}
    assert all(id(gate) in inside for gate in other.gates.values())
    assert not any(one.gates[key] is gate for key, gate in other.gates.items())
