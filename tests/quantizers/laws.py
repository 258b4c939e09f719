"""The laws that every quantizer of linear layers keeps; the tests of each call them by its name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import measure, twin, unwrap
from peft_vision.errors import UnsupportedSite
from peft_vision.layers.quantized import Quantized, dequantize, quantized_layers
from peft_vision.method import Evidence, make
from peft_vision.proof import prove_gradient
from tests.families import build, features, images

COMPOSED = (
    "timm_vit",
    "timm_eva02_small",  # reads the weight of its linears unless told to call them
    "hf_vit",
    "hf_dinov3",
    "hf_siglip",
    "generic_cnn",
)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return features(model.eval()(x))


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def deviation(changed: Tensor, exact: Tensor) -> float:
    return float((changed - exact).norm() / exact.norm())


def wide(seed: int = 0) -> nn.Module:
    """A timm ViT of ordinary widths: 2 blocks of 192, Gaussian weights."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=5
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def check_it_packs_the_linears_of_the_blocks_and_nothing_else(name: str) -> None:
    dense = wide()
    packed = pv.wrap(copy.deepcopy(dense), name)
    backbone = view(packed.plain_model)
    assert all(isinstance(site.layer, Quantized) for site in backbone.linears)
    assert len(list(quantized_layers(packed.plain_model))) == len(backbone.linears) == 8
    assert type(packed.plain_model.head) is nn.Linear
    for kept in ("head.weight", "patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight"):
        assert torch.equal(packed.plain_model.state_dict()[kept], dense.state_dict()[kept])
    assert all(p.dtype.is_floating_point for p in packed.parameters() if p.requires_grad)


def check_errors(name: str, low: float, high: float) -> None:
    """Of Gaussian weights; what was decided is what was done."""
    dense = wide()
    packed = pv.wrap(copy.deepcopy(dense), name)
    decisions = packed.history.plan.steps[0].decisions
    assert low < min(d["error"] for d in decisions.values())
    assert max(d["error"] for d in decisions.values()) < high
    for before, after in zip(view(dense).linears, view(packed.plain_model).linears, strict=True):
        exact = before.layer.weight.detach()
        got = deviation(after.layer.dequantized(), exact)
        assert got == pytest.approx(decisions[before.key]["error"], abs=1e-6)


def check_output_stays_close(name: str, share: float) -> None:
    """Of every layer, as far as the error of its weight says."""
    dense = wide()
    packed = pv.wrap(copy.deepcopy(dense), name).plain_model.eval()
    for before, after in zip(view(dense).linears, view(packed).linears, strict=True):
        x = torch.randn(2, 50, before.layer.in_features)
        with torch.no_grad():
            exact = before.layer(x) - before.layer.bias
            assert deviation(after.layer(x) - after.layer.bias, exact) < share


def check_cost(name: str, below: float) -> None:
    """FLOPs and parameters count as those of the dense layers; bytes as they are stored."""
    dense = wide()
    packed = pv.wrap(copy.deepcopy(dense), name)
    before, after = measure(dense), measure(packed)
    assert (after.flops, after.params) == (before.flops, before.params)
    linears = sum(site.layer.weight.numel() for site in view(dense).linears)
    assert (after.bytes - (before.bytes - 4 * linears)) / (4 * linears) < below
    assert not any(isinstance(module, Quantized) for module in twin(packed.plain_model).modules())
    adapted = pv.wrap(copy.deepcopy(dense), "lora", quantize=name, r=2)
    beside = pv.wrap(copy.deepcopy(dense), "lora", r=2)
    assert measure(adapted).to_json() | {"bytes": 0} == measure(beside).to_json() | {"bytes": 0}


def check_applying_is_deterministic(name: str) -> None:
    one, other = pv.wrap(wide(), name), pv.wrap(wide(), name)
    assert same_state(one, other)
    assert one.history.plan == other.history.plan


def check_a_twin_gets_the_same_structure(name: str) -> None:
    dense = build("timm_vit")
    empty = twin(dense)
    packed = pv.wrap(dense, name)
    step = packed.history.plan.steps[0]
    make(name, dict(step.settings)).apply(view(empty), step.decisions)
    state = packed.plain_model.state_dict()
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in packed.plain_model.named_parameters()
    }
    empty.load_state_dict(state, strict=True, assign=True)
    assert same_state(empty, packed.plain_model)
    assert torch.equal(run(empty, images()), run(packed, images()))
    incomplete = {n: t for n, t in state.items() if not n.startswith("blocks.0.attn.qkv.weight.")}
    incomplete.pop("blocks.0.attn.qkv.SCB", None)
    with pytest.raises(RuntimeError, match="Missing key"):
        twin_of_structure(name).load_state_dict(incomplete, strict=True, assign=True)


def twin_of_structure(name: str) -> nn.Module:
    dense = build("timm_vit")
    decisions = make(name).decide(view(dense), 1.0, Evidence())
    empty = twin(dense)
    make(name).apply(view(empty), decisions)
    return empty


def check_weights_of_meta_layers_are_not_asked_for(name: str) -> None:
    decisions = make(name).decide(view(twin(build("timm_vit"))), 1.0, Evidence())
    assert set(map(str, decisions.values())) == {"{}"}
    assert make(name).decide(view(build("timm_vit")), 0.0, Evidence()) == {}


def check_saved_weights_come_back_bit_by_bit(name: str, folder: Path, **settings: Any) -> None:
    """Of a model whose structure was changed before, so that its folder holds packed weights."""
    dense, x = build("timm_vit"), images()
    packed = pv.wrap(pv.wrap(copy.deepcopy(dense), "magnitude", ratio=0.5), name, **settings)
    expected = run(packed, x)
    packed.save_pretrained(folder)
    again = pv.load(folder, base=dense)
    assert same_state(again.plain_model, packed.plain_model)
    assert torch.equal(run(again, x), expected)
    assert [step.method for step in again.history.plan.steps] == ["magnitude", name]


def check_it_trains_saves_and_reloads(name: str, family: str, folder: Path) -> None:
    dense = build(family)
    x = images(dense, batch=4)
    model = pv.wrap(copy.deepcopy(dense), "lora", quantize=name, r=4, image_size=32)
    packed = {n: t.clone() for n, t in model.state_dict().items() if "base_layer" in n}
    target = torch.randn(run(model, x).shape)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(6):
        keep_statistics(model.train())
        loss = (features(model(x)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in packed.items())
    expected = run(model, x)
    model.save_pretrained(folder)
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(run(pv.load(folder, base=dense), x), expected)


def keep_statistics(model: nn.Module) -> None:
    """Running statistics are no part of an adapter."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def check_peft_takes_its_own_class(name: str, kind: str) -> None:
    """Its plain class would train beside a packed weight and fail to merge."""
    model = pv.wrap(build("hf_vit"), "lora", quantize=name, r=2)
    found = {type(m).__name__ for n, m in model.named_modules() if n.endswith("q_proj")}
    assert found == {kind}
    assert prove_gradient(model) == 24 * 2 + 2


def check_copies_share_nothing(name: str) -> None:
    packed, x = pv.wrap(build("timm_vit"), name), images()
    expected = run(packed, x)
    other = copy.deepcopy(packed)
    assert same_state(other, packed)
    before = {n: t.clone() for n, t in packed.state_dict().items()}
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(t, before[n]) for n, t in packed.state_dict().items())
    assert torch.equal(run(packed, x), expected)


def check_a_forward_pass_changes_no_number(name: str) -> None:
    """Neither evaluation nor autocast may round scales or biases for good."""
    packed = pv.wrap(wide(), name)
    before = {n: t.clone() for n, t in packed.state_dict().items()}
    expected = run(packed, images())
    for training in (False, True):
        packed.train(training)(images())
        x = images().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = packed(x)
        out.sum().backward()
        assert x.grad is not None
    assert all(torch.equal(t, before[n]) for n, t in packed.state_dict().items())
    assert packed.state_dict().keys() == before.keys()
    assert torch.equal(run(packed, images()), expected)


def check_casts_of_the_model_leave_the_codes(name: str) -> None:
    packed = pv.wrap(wide(), name)
    before = {n: layer.dequantized() for n, layer in quantized_layers(packed)}
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        packed.to(dtype)
        assert run(packed, images(dtype=dtype)).dtype is dtype
        for layer_name, layer in quantized_layers(packed):
            assert torch.equal(layer.dequantized(), before[layer_name])
            assert layer.dense().weight.dtype is dtype


def check_recomputed_activations_give_the_same_gradients(name: str) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = pv.wrap(build("timm_vit"), "lora", quantize=name, r=2)
        view(unwrap(model)).set_checkpointing(recompute)
        model.train()(images()).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def check_refusals_change_nothing(name: str) -> None:
    packed = pv.wrap(build("timm_vit"), name)
    before = copy.deepcopy(packed)
    with pytest.raises(UnsupportedSite, match=r"[Cc]ut first, quantize afterwards"):
        pv.wrap(packed, "magnitude", ratio=0.5)
    for site in (view(packed.plain_model).heads[0], view(packed.plain_model).hidden[0]):
        with pytest.raises(UnsupportedSite, match=r"[Cc]ut first, quantize afterwards"):
            site.keep([0])
    with pytest.raises(UnsupportedSite, match="fewer bits already"):
        pv.wrap(packed, name)
    assert same_state(packed, before)
    adapted = pv.wrap(build("timm_vit"), "lora", r=2)
    with pytest.raises(UnsupportedSite, match=rf"Quantize first.*quantize='{name}'.*merge"):
        pv.wrap(adapted, name)
    assert not list(quantized_layers(adapted))


def check_dequantizing(name: str, share: float) -> None:
    dense, x = wide(), images()
    packed = pv.wrap(copy.deepcopy(dense), name).plain_model
    expected = run(packed, x)
    weights = {n: layer.dequantized() for n, layer in quantized_layers(packed)}
    plain = dequantize(packed)
    assert plain is packed
    assert not list(quantized_layers(plain))
    assert not {"is_loaded_in_4bit", "is_loaded_in_8bit"} & vars(plain).keys()
    assert plain.state_dict().keys() == dense.state_dict().keys()
    for layer_name, weight in weights.items():
        assert torch.equal(plain.get_submodule(layer_name).weight, weight)
    assert deviation(run(plain, x), expected) < share


def check_merging(name: str, share: float) -> None:
    """By default into the full weights, so that the base's rounding goes; else into the rounded."""
    dense, x = build("timm_vit"), images()
    model = pv.wrap(copy.deepcopy(dense), "lora", quantize=name, r=2)
    beside = pv.wrap(copy.deepcopy(dense), "lora", r=2)
    with torch.no_grad():
        for one, other in zip(
            [p for p in model.parameters() if p.requires_grad],
            [p for p in beside.parameters() if p.requires_grad],
            strict=True,
        ):
            other.copy_(one.add_(0.05 * torch.randn_like(one)))
    merged = pv.merge(model, base=dense)
    assert deviation(run(merged, x), run(beside, x)) < 1e-5
    rounded = pv.merge(model, base=dense, dequantize=True)
    assert deviation(run(rounded, x), run(model, x)) < share
    for plain in (merged, rounded):
        assert not list(quantized_layers(plain))
        assert all("lora" not in n for n, _ in plain.named_modules())
