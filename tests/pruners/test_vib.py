"""What is peculiar to the bottleneck: gates that start open, settle exactly, and meet a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision import mask_training
from peft_vision.backbones import view
from peft_vision.cost import count_flops, measure, twin, unwrap
from peft_vision.data.settings import DataSettings
from peft_vision.data.source import open_split
from peft_vision.errors import BadSetting, BudgetUnreachable, DataError, UnsupportedSite
from peft_vision.exporting import export
from peft_vision.history import History
from peft_vision.layers.absent import Absent
from peft_vision.layers.gate_control import Controller, controller_in
from peft_vision.layers.gates import Gated
from peft_vision.layers.traits import Temporary, penalties
from peft_vision.mask_training import prepare, settle
from peft_vision.method import Evidence, make
from peft_vision.plan import unpack_indices
from peft_vision.result import Result
from tests.families import FAMILIES, NO_TOKENS, SIZE, build, features, images, run

SOME = (
    *("timm_vit", "timm_vit_normed", "timm_deit_distilled", "timm_dinov2_registers"),
    *("timm_siglip", "timm_eva_inner_norm", "hf_vit", "hf_dinov2_swiglu", "hf_dinov3", "hf_clip"),
)
FEW = ("timm_vit", "timm_eva02_small")
KINDS = ("width", "heads", "hidden", "branches")
ABSENT = ("blocks.1.attention", "blocks.2.mlp")
EVERY = [name for name in (*FAMILIES, *NO_TOKENS) if name != "generic_cnn"]  # which has no heads
STREAM_IS_READ = ("hf_clip_classifier", "timm_vit_post_norm", "timm_eva_post_norm")


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


def unused(model: nn.Module) -> set[str]:
    """Trained parameters that no loss reaches."""
    training_output(model, images(model)).square().sum().backward()
    left = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return {name.replace(".inner.", ".") for name in left}


@pytest.mark.parametrize("family", EVERY)
def test_sliced_equals_masked_and_nothing_dead_stays(family: str) -> None:
    assert len(EVERY) >= 31
    model, method, control = gated(family, width=family not in STREAM_IS_READ)
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
    absent = [key for key, decision in decisions.items() if decision == "absent"]
    assert absent == ([] if family in NO_TOKENS else list(ABSENT))
    names = [name.removesuffix(".weight") for name, _ in model.named_parameters()]
    gone = {f"{number}.{part}" for number, part in ((1, "norm1"), (2, "norm2"))}
    assert not [n for n in names if absent and n.split("blocks.")[-1] in gone], "norms go, too"
    assert unused(model) <= unused(build(family, dtype=torch.float64))


@pytest.mark.parametrize("family", ["timm_vit", "timm_deit_distilled", "timm_eva_dinov3", "hf_vit"])
def test_what_a_pooled_last_block_costs_is_foretold(family: str) -> None:
    model, exact = build(family, dtype=torch.float64), make("pooled_last_block")
    exact.apply(view(model), exact.decide(view(model), 1.0, Evidence()))
    whole, method = measure(model).flops, make("vib", {"multiple": 1})
    method.attach(view(model), 0.5)
    control = controller_in(model)
    assert control is not None
    assert 2 * sum(term.macs for term in control.terms) == pytest.approx(whole, rel=1e-6)
    learn(control)
    foretold = control.settled()
    learned = method.settle(view(model))
    decisions = method.decide(view(model), learned["strength"], Evidence(learned=learned))
    method.apply(view(model), decisions)
    assert foretold == pytest.approx(measure(model).flops / whole, abs=1e-6)


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
    assert make("vib").data_share is None, "gates alone take what their steps take"
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
        ({"weight_rate": 0.0}, "weight_rate"),
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


def test_gates_get_to_the_target() -> None:
    torch.manual_seed(0)
    model, method = build("timm_vit"), make("vib", {"steps": 100, "multiple": 1})
    batches = list(torch.randn(16, 3, SIZE, SIZE).split(8))
    learned = prepare(model, method, batches, 0.6, batch_size=8)
    assert learned["expected"] == pytest.approx(0.6, abs=0.02)
    assert learned["notes"] == []
    decisions = method.decide(view(model), learned["strength"], Evidence(learned=learned))
    method.apply(view(model), decisions)
    assert measure(model).flops / measure(build("timm_vit")).flops == pytest.approx(0.6, abs=0.05)


def test_gates_learn_as_fast_whatever_the_weights_do() -> None:
    x, y = torch.randn(8, 3, SIZE, SIZE), torch.arange(8) % 5
    moved = {}
    for train in ("masks", "full"):
        model = build("timm_vit")
        prepare(model, make("vib", {"train": train, "kl": 0.0}), [(x, y)], 0.5, epochs=4)
        weight = model.blocks[0].attn.qkv.weight
        moved[train] = (weight - build("timm_vit").blocks[0].attn.qkv.weight).abs().max().item()
    assert moved["masks"] == 0
    assert 0 < moved["full"] <= 4 * 5e-5 * 1.5, "weights have their own rate"
    control = gated("timm_vit")[2]
    control.hasten(20.0)
    assert {control.speed, *(gate.speed for gate in control.gates.values())} == {2000.0}


Fitted = list[tuple[int, int, float, float]]


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Fitted:
    """(images, epochs, learning rate, weight of the teacher) of each training; it is not run."""
    seen: Fitted = []

    def note(model: Any, task: Any, data: Any, validation: Any, settings: Any, **_: Any) -> None:
        assert set(data[0]) == {"pixel_values", "labels"}
        seen.append((len(data), settings.epochs, settings.learning_rate, task.weight))

    monkeypatch.setattr(mask_training, "fit", note)
    return seen


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train": "masks", "steps": 2}, (64, 1, 1e-3, 1.0)),
        ({"train": "masks", "steps": 400}, (600, 22, 1e-3, 1.0)),
        ({"train": "fast"}, (18, 400, 5e-5, 0.5)),
        ({"train": "full"}, (600, 22, 5e-5, 0.5)),
    ],
)
def test_a_folder_is_used_as_the_card_says(
    image_folder: Callable[..., Path],
    fitted: Fitted,
    settings: dict[str, Any],
    expected: tuple[int, int, float, float],
) -> None:
    folder = image_folder(classes=("a", "b", "c", "d", "e"), images=120, size=8)
    method = make("vib", {"multiple": 1, "branches": False, **settings})
    pv.compress(build("timm_vit"), target_flops=0.6, methods=method, data=folder)
    assert fitted == [expected]


def test_labels_that_are_not_the_models_are_not_used(
    image_folder: Callable[..., Path], fitted: Fitted
) -> None:
    folder, full = (
        image_folder(classes=("a", "b"), splits=("train",)),
        make("vib", {"train": "full"}),
    )
    said = prepare(build("timm_vit"), full, folder, 0.6)["notes"]
    assert "2 classes, and the model 5" in said[0]
    split = open_split(DataSettings(train=str(folder)), 0)
    two = build("timm_vit")
    two.reset_classifier(2)
    assert "not used" not in prepare(two, full, split, 0.6)["notes"][0]
    known = History(labels=["x", "y"])
    other = copy.deepcopy(build("timm_vit"))
    other.reset_classifier(2)
    said = prepare(other, full, split, 0.6, history=known)["notes"]
    assert "that the model was not trained on" in said[0]
    loose = prepare(build("timm_vit"), full, folder / "train" / "a", 0.6)["notes"]
    assert "no class folders" in loose[0]
    strange = [(torch.randn(4, 3, SIZE, SIZE), torch.full((4,), 7))]
    assert "not classes 0 to 4" in prepare(build("timm_vit"), full, strange, 0.6)["notes"][0]
    assert [(count, weight) for count, *_, weight in fitted] == [
        (12, 1.0), (10, 0.5), (10, 1.0), (6, 1.0), (4, 1.0)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compressed() -> Result:
    torch.manual_seed(0)
    batches = list(torch.randn(16, 3, SIZE, SIZE).split(8))
    method = make("vib", {"multiple": 2, "steps": 12, "speed": 400.0, "branches": False})
    return pv.compress(build("timm_vit"), target_flops=0.6, methods=method, data=batches)


def test_a_budget_is_met_behind_the_exact_steps(compressed: Result, tmp_path: Path) -> None:
    model = build("timm_vit")
    assert 0.98 * 0.6 < measure(compressed.model).flops / measure(model).flops <= 0.6
    steps = compressed.plan.steps
    assert [step.method for step in steps] == ["pooled_last_block", "vib"]
    exact = build("timm_vit")
    make("pooled_last_block").apply(view(exact), steps[0].decisions)
    left = 0.6 * measure(model).flops / measure(exact).flops
    assert any(f"{left:.3f} was aimed at" in note for note in compressed.notes)
    compressed.save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=build("timm_vit", seed=1))
    x = images(model)
    assert torch.equal(run(again, x), run(compressed.model, x))


def test_exact_steps_that_save_too_much_are_not_taken() -> None:
    model, batches = build("timm_vit"), [torch.randn(4, 3, SIZE, SIZE)]
    method = make("vib", {"multiple": 1, "steps": 4})
    result = pv.compress(model, target_flops=0.95, methods=method, data=batches)
    assert [step.method for step in result.plan.steps] == ["vib"]
    assert any("0.950 was aimed at" in note for note in result.notes)
    assert 0.98 * 0.95 < result.ratio <= 0.95


@pytest.mark.parametrize("format", ["onnx", "torch.export"])
def test_what_is_left_exports_with_a_dynamic_batch(
    compressed: Result, tmp_path: Path, format: str
) -> None:
    path = tmp_path / {"onnx": "m.onnx", "torch.export": "m.pt2"}[format]
    assert export(compressed.model, path, format=format).batch_sizes_checked == (1, 2, 5)


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
