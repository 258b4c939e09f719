"""Gates: what they start as, what they cost, what they learn, and what they leave behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_vision.errors import UnsupportedSite
from peft_vision.layers.gate_control import Controller, Term, controller_in, cost_share
from peft_vision.layers.gates import Gate, GatedLinear
from peft_vision.layers.masked_norm import GatedNorm, can_be_gated, masked_norm
from peft_vision.layers.spread import Spread, spread
from peft_vision.layers.surgery import keep_features, keep_inputs, weight_of
from peft_vision.layers.traits import penalties

UNITS, FEATURES = 4, 8


def gate(units: int = UNITS, speed: float = 100.0) -> Gate:
    return Gate(units, speed, dtype=torch.float64)


def close(one: Gate, units: list[int]) -> None:
    """Make units worth nothing."""
    with torch.no_grad():
        one.logvar_offset[units] = 10.0 / one.speed


def test_a_gate_starts_open_and_exact_in_evaluation() -> None:
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    assert torch.equal(gate().eval().multiply(x), x)


def test_one_draw_for_an_example_and_a_unit() -> None:
    one = gate()
    close(one, [])
    with torch.no_grad():
        one.logvar_offset.fill_(0.08)  # log variance -1
    factors = one.multiply(torch.ones(5, 3, FEATURES, dtype=torch.float64))
    assert torch.equal(factors[:, :1].expand_as(factors), factors), "the same for all tokens"
    assert torch.equal(factors[..., 0::2], factors[..., 1::2]), "the same for a unit's features"
    assert len(factors[:, 0, ::2].unique()) == 5 * UNITS


def test_noise_has_the_variance_it_says() -> None:
    one = gate()
    with torch.no_grad():
        one.logvar_offset.fill_(0.07)  # log variance -2
    drawn = one.factors(20_000, FEATURES).detach()
    assert abs(drawn.var().item() - math.exp(-2.0)) < 0.01
    assert abs(drawn.mean().item() - 1.0) < 0.01


def test_kl_is_the_divergence_from_the_best_prior() -> None:
    """Numerically: min over xi of KL(N(mu, s2) || N(0, xi)), on a fine grid of xi."""
    mean, variance = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    one = gate(1)
    with torch.no_grad():
        one.mean_offset.fill_((mean - 1.0) / 100)
        one.logvar_offset.fill_((variance.log() + 9.0) / 100)
    prior = torch.linspace(0.05, 5.0, 200_001, dtype=torch.float64)
    grid = 0.5 * (prior.log() - variance.log() + (variance + mean**2) / prior - 1)
    assert abs(one.kl().item() - grid.min().item()) < 1e-7


def test_log_variance_stays_in_bounds_and_can_come_back() -> None:
    one = gate()
    with torch.no_grad():
        one.logvar_offset.copy_(torch.tensor([1.0, -1.0, 0.0, 0.05]))
    value = one.log_variance()
    assert torch.allclose(value, torch.tensor([4.0, -14.0, -9.0, -4.0], dtype=torch.float64))
    value.sum().backward()  # descent lowers all: the one at its lower bound must not go on
    assert one.logvar_offset.grad.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_the_gradient_is_not_multiplied_by_the_speed() -> None:
    one = gate(speed=1000.0)
    one.mean().sum().backward()
    assert torch.equal(one.mean_offset.grad, torch.ones_like(one.mean_offset))


def test_a_closed_unit_gives_nothing_and_still_has_a_gradient() -> None:
    one = gate()
    close(one, [1])
    for mode in (True, False):
        y = one.train(mode).multiply(torch.ones(2, 3, FEATURES, dtype=torch.float64))
        assert not y[..., 2:4].any()
        assert y[..., :2].all()
    one.train().multiply(torch.ones(2, 3, FEATURES, dtype=torch.float64)).sum().backward()
    assert one.mean_offset.grad.all()
    assert one.logvar_offset.grad.all()


def test_gates_are_float32_under_autocast_and_in_bfloat16() -> None:
    one = Gate(UNITS, 100.0).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert one.factors(2, FEATURES).dtype == torch.float32
        assert (
            one.multiply(torch.ones(2, 3, FEATURES, dtype=torch.bfloat16)).dtype == torch.bfloat16
        )


def test_checkpointing_draws_the_same_noise_again() -> None:
    layer = GatedLinear(nn.Linear(FEATURES, 5).double(), gate(), gate(1)).train()
    with torch.no_grad():
        layer.units.logvar_offset.fill_(0.08)
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64, requires_grad=True)
    found = []
    for recompute in (False, True):
        torch.manual_seed(7)
        layer.zero_grad()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(FEATURES), nn.RMSNorm(FEATURES), nn.RMSNorm(FEATURES, 1e-3)]
)
def test_a_masked_norm_is_the_norm_of_what_is_kept(norm: nn.Module) -> None:
    kept = [0, 1, 4, 5, 6]
    norm = norm.double()
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    mask = torch.zeros(FEATURES, dtype=torch.float64)
    mask[kept] = 1
    cut = copy.deepcopy(norm)
    keep_features(cut, kept)
    assert (masked_norm(norm, x, mask)[..., kept] - cut(x[..., kept])).abs().max() < 1e-12
    assert (masked_norm(norm, x, torch.ones_like(mask)) - norm(x)).abs().max() < 1e-12


def test_settled_layers_compute_the_mean() -> None:
    units, branch, features = gate(), gate(1), gate(FEATURES)
    norm, linear = nn.LayerNorm(FEATURES).double(), nn.Linear(FEATURES, 5).double()
    layer = GatedLinear(linear, units, branch).eval()
    normed = GatedNorm(norm, features, shared=False).eval()
    with torch.no_grad():
        for one in (units, branch, features):
            one.mean_offset.normal_(0, 0.003)
    x = torch.randn(2, 3, FEATURES, dtype=torch.float64)
    before = layer(normed(x))
    settled = nn.Sequential(normed.settle(), layer.settle())
    assert type(settled[1]) is nn.Linear
    assert (settled(x) - before).abs().max() < 1e-12


def test_surgery_reaches_through_gates() -> None:
    layer = GatedLinear(nn.Linear(FEATURES, 5), gate(), None)
    keep_inputs(layer, [0, 1, 6, 7])
    assert layer.in_features == 4
    assert layer.units.units == 2
    assert weight_of(layer).shape == (5, 4)
    shared = gate(FEATURES)
    norms = [GatedNorm(nn.LayerNorm(FEATURES), shared, shared=True) for _ in range(2)]
    for norm in norms:
        keep_features(norm, [1, 2, 3])
    assert shared.units == 3
    assert norms[1].inner.normalized_shape == (3,)


def test_what_cannot_be_gated_or_settled_is_named() -> None:
    assert "GroupNorm" in can_be_gated(nn.GroupNorm(2, 4))
    assert "no weight" in can_be_gated(nn.LayerNorm(4, elementwise_affine=False))

    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(FEATURES, 5)
            self.extra = nn.Parameter(torch.zeros(1))

    with pytest.raises(UnsupportedSite, match="Packed"):
        GatedLinear(Packed(), gate(), None).settle()
    with pytest.raises(UnsupportedSite, match="GroupNorm"):
        masked_norm(nn.GroupNorm(2, 4), torch.zeros(1, 4), torch.ones(4))


def test_spread_puts_features_back() -> None:
    layer = spread(nn.Identity(), 6, [1, 3, 4])
    x = torch.randn(2, 5, 3)
    whole = layer(x)
    assert torch.equal(whole[..., [1, 3, 4]], x)
    assert not whole[..., [0, 2, 5]].any()
    again = spread(layer, 3, [0, 2])
    assert isinstance(again.inner, nn.Identity)
    assert isinstance(again, Spread)
    assert again.places.tolist() == [1, 4]


def controlled(target: float, speed: float = 100.0) -> tuple[Controller, dict[str, Gate]]:
    gates = {"width": Gate(16, speed), "a.hidden": Gate(32, speed), "a.mlp": Gate(1, speed)}
    terms = [Term(8.0, ("width", "a.hidden", "a.mlp")), Term(1.0, ("width",)), Term(1.0)]
    weights = {"width": 3e-5, "a.hidden": 1e-6, "a.mlp": 2.56e-4}
    return Controller(gates, gates["width"], weights, terms, target, speed), gates


def test_the_cost_is_that_of_what_is_left() -> None:
    control, gates = controlled(0.5)
    assert control.settled() == pytest.approx(1.0)
    assert control.expected().item() == pytest.approx(1.0)
    close(gates["width"], [0, 1, 2, 3])
    close(gates["a.hidden"], list(range(16)))
    assert control.settled() == pytest.approx((8 * 0.75 * 0.5 + 0.75 + 1) / 10)
    close(gates["a.mlp"], [0])
    assert control.settled() == pytest.approx((0.75 + 1) / 10)
    whole = {key: torch.ones(()) for key in gates}
    assert cost_share(control.terms, whole).item() == pytest.approx(1.0)


def test_the_target_is_lowered_step_by_step_while_training() -> None:
    control, _ = controlled(0.5)
    control.ramp_share = 0.5
    control.plan(8)
    aims = []
    for _ in range(6):
        control.penalty()
        aims.append(control.aim().item())
    assert aims == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    control.eval().penalty()
    assert int(control.steps) == 6


def test_multipliers_ascend_under_an_optimizer_that_descends() -> None:
    control, _ = controlled(0.5)
    control.plan(1)
    control.penalty().backward()  # nothing has gone and a half is to go: the gap is -0.5
    assert control.linear.grad.item() == pytest.approx(0.5), "descending makes it more negative"
    assert control.quadratic.grad.item() == pytest.approx(-0.25), "descending makes it larger"


def test_the_lagrangian_meets_the_target() -> None:
    """Units have known worths: what a quadratic loss loses by the noise on each."""
    target, speed, steps = 0.5, 100.0, 300
    gates = {"width": Gate(16, speed), "a.hidden": Gate(64, speed)}
    terms = [Term(8.0, ("width", "a.hidden"))]
    terms += [Term(1.0, ("width",)), Term(1.0)]
    weights = dict.fromkeys(gates, 1e-6)
    control = Controller(gates, gates["width"], weights, terms, target, speed)
    control.ramp_share = 0.2
    control.plan(steps)
    worths = {key: torch.linspace(0.001, 0.1, one.units) for key, one in gates.items()}
    trained = [control, gates["a.hidden"]]
    optimizer = torch.optim.AdamW([p for m in trained for p in m.parameters()], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        lost = [
            (w * gates[key].log_variance().exp().clamp(max=1)).sum() for key, w in worths.items()
        ]
        (control.penalty() + torch.stack(lost).sum()).backward()
        optimizer.step()
    assert abs(control.expected().item() - target) < 0.02
    assert abs(control.settled() - target) < 0.05
    for one in gates.values():
        kept = one.kept()
        assert kept[-8:].sum() >= kept[:8].sum(), "what is worth least goes first"


def test_a_penalty_is_found_once_and_survives_a_copy() -> None:
    control, gates = controlled(0.5)
    layer = GatedLinear(nn.Linear(32, 16), gates["a.hidden"], gates["a.mlp"])
    norm = GatedNorm(nn.LayerNorm(16), gates["width"], shared=True)
    norm.host = control
    model = nn.Sequential(layer, norm, GatedNorm(nn.LayerNorm(16), gates["width"], shared=True))
    twin = copy.deepcopy(model)
    assert len(penalties(twin)) == 1
    own = controller_in(twin)
    assert own is not None
    assert own.gates["width"] is twin[1].gate is twin[2].gate
    assert own.gates["a.hidden"] is twin[0].units
    assert own.gates["width"] is not gates["width"]
    assert sum("mean_offset" in name for name in twin.state_dict()) == 3, (
        "a shared gate is saved once"
    )
    x: Tensor = torch.randn(2, 4, 32)
    (twin(x).square().sum() + penalties(twin)[0]).backward()
    assert all(p.grad is not None for p in twin.parameters())
