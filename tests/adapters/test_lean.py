"""The lean step against PEFT's own layer: same function, same gradients, less held."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear as StockLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_vision as pv
from peft_vision.adapters._lean import LeanLinear, lean
from peft_vision.layers.low_rank import low_rank_linear
from peft_vision.layers.recomputed import origin_of, unwatch, watch
from tests.families import FAMILIES, build, features, images

Tiny = Callable[..., nn.Module]
WIDE, NARROW, RANK = 20, 12, 3


def stock(model: nn.Module) -> Any:
    """A copy that computes with PEFT's own layers, on the same numbers."""
    plain = copy.deepcopy(model)
    unwatch(plain)
    for module in plain.modules():
        if type(module) is LeanLinear:
            module.__class__ = StockLinear
    return plain


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1)
    return model


def injected(model: nn.Module, *targets: str, **settings: Any) -> Any:
    config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=list(targets), **settings)
    config._register_custom_module({nn.Linear: lean})
    return shaken(peft.get_peft_model(model, config))


def one_layer(*, bias: bool = True, **settings: Any) -> Any:
    return injected(nn.Sequential(nn.Linear(NARROW, WIDE, bias=bias)).double(), "0", **settings)


def layer_of(model: Any) -> LeanLinear:
    return next(m for m in model.modules() if isinstance(m, LeanLinear))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(
    model: nn.Module, x: Tensor, *, wrt_x: bool = True, cotangent: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of x and of all that trains."""
    model.zero_grad()
    x = x.detach().requires_grad_(wrt_x)
    y = features(model(x))
    if cotangent is None:
        generator = torch.Generator().manual_seed(3)
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    y.backward(cotangent)
    found = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    return y.detach(), {**found, **({"x": x.grad} if x.grad is not None else {})}


def assert_same(model: nn.Module, x: Tensor, **options: Any) -> None:
    """Against PEFT's layer, in float64."""
    y, ours = gradients(model, x, **options)
    expected, theirs = gradients(stock(model), x, **options)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-10, rtol=0)


SHAPES = ((NARROW,), (2, NARROW), (40, NARROW), (2, 25, NARROW), (2, 3, 4, NARROW), (0, NARROW))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("wrt_x", [True, False], ids=["x", "frozen x"])
def test_output_and_gradients_are_those_of_peft(
    shape: tuple[int, ...], bias: bool, wrt_x: bool
) -> None:
    model = one_layer(bias=bias)
    assert type(layer_of(model)) is LeanLinear
    assert_same(model, torch.randn(shape, dtype=torch.float64), wrt_x=wrt_x)


@pytest.mark.parametrize("tokens", [2, 50], ids=["few", "many"])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "both"])
def test_a_frozen_factor(tokens: int, frozen: str) -> None:
    model = one_layer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            name.count("lora_") > 0 and frozen not in (*name.split("."), "both")
        )
    assert_same(model, torch.randn(tokens, NARROW, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [2, 50], ids=["few", "many"])
def test_a_trained_bias_and_a_scale(tokens: int) -> None:
    model = one_layer()
    layer_of(model).base_layer.bias.requires_grad_(True)
    layer_of(model).set_scale("default", 0.3)
    assert_same(model, torch.randn(tokens, NARROW, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [3, 50], ids=["few", "many"])
def test_strange_strides(tokens: int) -> None:
    """Of the input, and of the gradient that arrives (expanded, or transposed)."""
    model = one_layer()
    x = torch.randn(NARROW, tokens, 2, dtype=torch.float64).permute(2, 1, 0)
    assert_same(model, x)
    assert_same(model, x, cotangent=torch.ones(1, dtype=torch.float64).expand(2, tokens, WIDE))
    assert_same(
        model, x, cotangent=torch.randn(WIDE, tokens, 2, dtype=torch.float64).permute(2, 1, 0)
    )


def test_the_output_may_be_changed_in_place() -> None:
    """Some attention adds its biases so."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(NARROW, WIDE)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            y += 1.0
            return y

    assert_same(injected(Shifted().double(), "fc"), torch.randn(50, NARROW, dtype=torch.float64))


SOME = (
    *("timm_vit", "timm_clip", "timm_vit_swiglu", "timm_vit_normed", "timm_eva02_small"),
    *("timm_deit3", "hf_vit", "hf_siglip_classifier", "hf_dinov3_gated", "generic_cnn"),
)


@pytest.mark.parametrize("family", SOME)
def test_whole_backbones(family: str) -> None:
    model = shaken(pv.wrap(build(family, dtype=torch.float64), "lora", r=2)).eval()
    assert sum(type(m) is LeanLinear for m in model.modules()) >= 2
    assert_same(model, images(model, batch=8))


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["timm_vit", "timm_clip", "timm_vit_swiglu", "hf_vit"])
def test_computing_again_changes_no_bit(family: str, low: bool) -> None:
    model = shaken(pv.wrap(build(family), "lora", r=2)).train()
    keeping = copy.deepcopy(model)
    unwatch(keeping)
    x = images(model, batch=8)
    with torch.autocast("cpu", enabled=low):
        y, ours = gradients(model, x)
        expected, theirs = gradients(keeping, x)
    assert torch.equal(y, expected)
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())
    assert held(model, x, low) < held(keeping, x, low)


def held(model: nn.Module, x: Tensor, low: bool) -> int:
    """Bytes of the distinct storages that autograd holds, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        return tensor if place in own else kept.setdefault(place, tensor)

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, torch.autocast("cpu", enabled=low):
        y = features(model(x))
    assert y.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(("family", "share"), [("timm_vit", 0.6), ("hf_vit", 0.6)])
def test_what_is_held_for_backward(family: str, share: float) -> None:
    """Mixed precision; the copies of weights that PEFT's layer holds are counted with the rest."""
    model = pv.wrap(build(family), "lora", r=2).train()
    x = images(model, batch=8)
    assert held(model, x, low=True) < share * held(stock(model), x, low=True)


def test_queries_keys_and_values_hold_one_copy_of_their_input() -> None:
    model = injected(nn.ModuleDict({n: nn.Linear(NARROW, NARROW) for n in "qkv"}), *"qkv")
    linears = [model.base_model.model[name] for name in "qkv"]
    x = torch.randn(64, NARROW, requires_grad=True) * 1.0
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.update({tensor.data_ptr()} if tensor.shape == x.shape else ())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu"):
        outputs = [linear(x) for linear in linears]
    assert len(outputs) == 3
    assert len(kept) == 1


def test_low_precision_keeps_an_update_below_the_weights_rounding() -> None:
    """0.001 beside 1 is lost in bfloat16; the base's own part cancels here."""
    layer = nn.Linear(64, 64, bias=False)
    nn.init.ones_(layer.weight)
    model = injected(nn.Sequential(layer), "0")
    sign = torch.tensor([1.0, -1.0]).repeat(32)
    with torch.no_grad():
        layer_of(model).lora_A["default"].weight.copy_(sign * 1e-3)
        layer_of(model).lora_B["default"].weight.fill_(1.0)
    with torch.autocast("cpu"):
        y = model(sign.expand(128, 64))
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), torch.tensor(64 * 1e-3 * RANK * 5 / RANK), rtol=0.01)


@pytest.mark.parametrize("family", ["timm_vit", "hf_vit"])
def test_low_precision_is_no_further_from_the_truth(family: str) -> None:
    model = shaken(pv.wrap(build(family), "lora", r=2)).eval()
    x = images(model, batch=8)
    truth = gradients(stock(model).double(), x.double())
    with torch.autocast("cpu"):
        ours, theirs = gradients(model, x), gradients(stock(model), x)

    def error(found: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        parts = [(found[1][n] - g).norm() / g.norm() for n, g in truth[1].items()]
        return (found[0] - truth[0]).norm() / truth[0].norm(), torch.stack(parts).mean()

    for mine, other in zip(error(ours), error(theirs), strict=True):
        assert mine < 1.5 * other


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_checkpointing(low: bool) -> None:
    model = shaken(pv.wrap(build("timm_vit"), "lora", r=2)).train()
    x = images(model, batch=8)
    with torch.autocast("cpu", enabled=low):
        _, expected = gradients(model, x)
        model.plain_model.set_grad_checkpointing(True)
        _, found = gradients(model, x)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_a_second_backward_through_a_kept_graph() -> None:
    model = shaken(pv.wrap(build("hf_vit", dtype=torch.float64), "lora", r=2)).train()
    wanted = list(trained(model).values())
    y = features(model(images(model, batch=8))).square().sum()
    first = torch.autograd.grad(y, wanted, retain_graph=True)
    some = torch.autograd.grad(y, wanted[:3], retain_graph=True)
    again = torch.autograd.grad(y, wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, some, strict=False))


def test_a_second_derivative_is_refused() -> None:
    model = one_layer()
    x = torch.randn(50, NARROW, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_the_graph_may_run_backward_inside_autocast() -> None:
    model = shaken(pv.wrap(build("timm_vit"), "lora", r=2)).train()
    x = images(model, batch=8)
    expected = gradients(model, x)[1]
    model.zero_grad()
    y = model(x)
    generator = torch.Generator().manual_seed(3)
    with torch.autocast("cpu"):
        layer = next(m for m in model.modules() if isinstance(m, LeanLinear))
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y))
    assert layer.lora_B["default"].weight.grad.dtype == torch.float32
    assert all(p.grad.shape == expected[n].shape for n, p in trained(model).items())


def test_compiled_without_a_break() -> None:
    model = injected(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), "0", "2")
    watch(model)
    x = torch.randn(40, 8)
    expected, theirs = gradients(model, x)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    y, ours = gradients(compiled, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours["x"], theirs["x"])
    assert len(ours) == len(theirs) == 5
    for name, gradient in ours.items():
        other = name.replace("_orig_mod.", "base_model.model.")
        torch.testing.assert_close(gradient, theirs[other])


class TestWhereInputsComeFrom:
    """A tensor is computed again only where it is certain how; otherwise it is kept."""

    @staticmethod
    def run(act: nn.Module, between: Callable[[Tensor], Tensor] = lambda t: t) -> bool:
        """Whether fc2's input was computed again; its gradients are checked in any case."""
        seen = []

        class Mlp(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc1, self.act, self.fc2 = nn.Linear(8, 16), act, nn.Linear(16, 8)

            def forward(self, x: Tensor) -> Tensor:
                hidden = between(self.act(self.fc1(x)))
                seen.append(origin_of(hidden) is not None)
                return self.fc2(hidden)

        model = injected(Mlp().double(), "fc1", "fc2")
        watch(model)
        torch.manual_seed(5)
        x = torch.randn(40, 8, dtype=torch.float64)
        torch.manual_seed(6)
        y, ours = gradients(model, x)
        torch.manual_seed(6)
        expected, theirs = gradients(stock(model), x)
        assert (y - expected).abs().max() < 1e-12
        assert all((g - theirs[n]).abs().max() < 1e-10 for n, g in ours.items())
        return seen[0]

    @pytest.mark.parametrize(
        "act",
        [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.LayerNorm(16)],
        ids=lambda act: repr(act)[:20],
    )
    def test_certain(self, act: nn.Module) -> None:
        assert self.run(act)

    def test_quick_gelu_of_both_libraries(self) -> None:
        from timm.layers import get_act_layer
        from transformers.activations import QuickGELUActivation

        assert self.run(get_act_layer("quick_gelu")())
        assert self.run(QuickGELUActivation())

    @pytest.mark.parametrize(
        "between",
        [
            lambda t: t * 2,
            lambda t: t.mul_(2),
            lambda t: t + t.mean(),
            lambda t: nn.functional.dropout(t, 0.3),
            lambda t: t.clone(),
            lambda t: t.reshape(5, 8, 16).flatten(0, 1),
        ],
        ids=["product", "in place", "sum", "dropout", "copy", "view"],
    )
    def test_something_between(self, between: Callable[[Tensor], Tensor]) -> None:
        assert not self.run(nn.GELU(), between)

    @pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True)])
    def test_what_does_not_keep_its_input(self, act: nn.Module) -> None:
        assert not self.run(act)

    def test_somebodys_hook(self) -> None:
        for prepend in (False, True):
            act = nn.GELU()
            act.register_forward_hook(lambda m, a, out: out * 3, prepend=prepend)
            assert not self.run(act)

    def test_a_random_gelu_of_somebodys(self) -> None:
        class NoisyGELU(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * torch.rand_like(x)

        assert not self.run(NoisyGELU())

    def test_a_source_changed_in_place_is_noticed(self) -> None:
        model = injected(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), "0", "2")
        watch(model)
        first, act, second = model.base_model.model
        hidden = first(torch.randn(40, 8))
        y = second(act(hidden))
        hidden.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_watching_leaves_no_trace_but_the_hook(self, tiny_timm: Tiny) -> None:
        plain = tiny_timm()
        adapted = pv.wrap(copy.deepcopy(plain), "lora", r=2)
        again = copy.deepcopy(adapted)
        watch(again)
        counts = [sum(len(m._forward_hooks) for m in model.modules()) for model in (adapted, again)]
        assert counts == [4 * 3 + 1] * 2
        merged = pv.merge(adapted)
        assert not any(m._forward_hooks for m in merged.modules())
        assert merged.state_dict().keys() == plain.state_dict().keys()


class TestWhatIsLeftToPeft:
    """Its own forward, wherever more than one plain adapter is asked for."""

    x = torch.randn(40, NARROW, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def test_dropout_in_training_only(self) -> None:
        model = one_layer(lora_dropout=0.5).train()
        torch.manual_seed(1)
        y = model(self.x)
        torch.manual_seed(1)
        assert torch.equal(y, stock(model)(self.x))
        assert "_LowRankLinear" not in type(y.grad_fn).__name__
        assert "_LowRankLinear" in type(model.eval()(self.x).grad_fn).__name__

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
    def test_variants(self, options: dict[str, Any]) -> None:
        assert_same(one_layer(**options), self.x)

    def test_several_adapters(self) -> None:
        model = one_layer()
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"]))
        shaken(model)
        for name in ("other", "default"):
            model.set_adapter(name)
            shaken(model)
            assert_same(model, self.x)
        model.base_model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "mix", "cat")
        model.set_adapter("mix")
        assert_same(model, self.x)
        model.base_model.set_adapter(["default", "other"])
        assert_same(model, self.x)
        mixed = ["default", "__base__"] * 20
        model.eval()
        assert torch.equal(
            model(self.x, adapter_names=mixed), stock(model)(self.x, adapter_names=mixed)
        )

    def test_disabled_and_merged(self) -> None:
        model = one_layer()
        y, base = model(self.x), layer_of(model).base_layer
        with model.disable_adapter():
            assert torch.equal(model(self.x), base(self.x))
        model.merge_adapter()
        assert torch.allclose(model(self.x), y, atol=1e-12)
        model.unmerge_adapter()
        assert torch.allclose(model(self.x), y, atol=1e-12)

    def test_a_trained_weight_gets_its_gradient(self) -> None:
        model = one_layer()
        layer_of(model).base_layer.weight.requires_grad_(True)
        assert_same(model, self.x)

    @pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
    def test_somebodys_hooks_are_called(self, part: str) -> None:
        model, calls = one_layer(), []
        owner = getattr(layer_of(model), part)
        target = owner if part == "base_layer" else owner["default"]
        target.register_forward_hook(lambda *_: calls.append(1))
        assert_same(model, self.x)
        assert len(calls) == 2

    def test_packed_weights_keep_pefts_classes(self) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        packed = bitsandbytes.nn.Linear4bit(8, 8)
        assert isinstance(packed, nn.Linear)
        config = peft.LoraConfig(r=2)
        assert lean(packed, "default", config=config, r=2) is None
        assert lean(nn.Conv2d(3, 3, 1), "default", config=config, r=2) is None

    def test_a_plain_peft_model_of_the_folder_computes_the_same(
        self, tiny_timm: Tiny, tmp_path: Path
    ) -> None:
        base = tiny_timm().double()
        model = shaken(pv.wrap(copy.deepcopy(base), "lora", r=2)).eval()
        model.save_pretrained(tmp_path / "out")
        plain = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        assert not any(isinstance(m, LeanLinear) for m in plain.modules())
        x = images(model, batch=8)
        assert (plain(x) - model(x)).abs().max() < 1e-12


def test_without_gradients_nothing_is_noted(tiny_timm: Tiny) -> None:
    model = shaken(pv.wrap(tiny_timm(), "lora", r=2)).eval()
    x = images(model, batch=8)
    expected = model(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        with torch.autocast("cpu"):
            assert model(x).isfinite().all()


def test_half_precision_bases_and_adapters_of_full_precision(tiny_timm: Tiny) -> None:
    model = shaken(pv.wrap(tiny_timm().bfloat16(), "lora", r=2)).train()
    layer = layer_of(model)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    model(images(model, batch=8)).float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    assert layer.lora_B["default"].weight.grad.abs().sum() > 0


def test_distributed_data_parallel(tiny_timm: Tiny, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = shaken(pv.wrap(tiny_timm(), "lora", r=2)).train()
    x = images(model, batch=8)
    _, expected = gradients(model, x, wrt_x=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        _, found = gradients(DistributedDataParallel(model), x, wrt_x=False)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(g, expected[n.removeprefix("module.")]) for n, g in found.items())


def test_reentrant_checkpointing_of_one_layer() -> None:
    model = one_layer()
    x = torch.randn(50, NARROW, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, x)[1]
    model.zero_grad()
    y = checkpoint(model, x, use_reentrant=True)
    y.backward(torch.ones_like(y))
    assert expected.keys() >= {n for n, p in trained(model).items() if p.grad is not None}


def test_the_function_alone() -> None:
    """Against the formula, by finite differences."""
    torch.manual_seed(0)
    sizes = ((60, 5), (4, 5), (4,), (2, 5), (4, 2))
    x, weight, bias, down, up = (torch.randn(s, dtype=torch.float64) for s in sizes)
    wanted = [t.requires_grad_() for t in (x, bias, down, up)]
    assert torch.autograd.gradcheck(
        lambda x, b, d, u: low_rank_linear(x, weight, b, d, u, 0.7), wanted
    )
    assert torch.autograd.gradcheck(
        lambda x, b, d, u: low_rank_linear(x, weight, b, d, u, 0.7),
        [x[:2].detach().requires_grad_(), *wanted[1:]],
    )


def test_every_family_has_lean_layers_where_it_has_linears() -> None:
    assert set(SOME) <= set(FAMILIES)
