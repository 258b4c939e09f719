"""What a run holds less of, and that its gradients stay what they were."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.data.image_set import TensorSet
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.memory.rehearsal import Rehearsal
from peft_vision.memory.tracker import PeakTracker
from peft_vision.tasks.classification import Classification
from peft_vision.training.fit import fit
from peft_vision.training.lean import holding, leaned
from peft_vision.training.settings import TrainSettings
from tests.backbones.test_trunk import reduce_tokens
from tests.families import DEPTH, HEADS, PATCHES, WIDTH, build, features, images, moved, timm_vit

BATCH, RANK = 8, 2
Tensors = dict[str, Tensor]
GATED = (
    *("timm_vit_glu", "timm_vit_swiglu", "timm_vit_normed", "timm_eva02_small", "timm_eva02_base"),
    "hf_dinov3_gated",
)
PLAIN = ("timm_vit", "timm_clip", "hf_vit", "hf_clip")
# torch says on CPUs that a norm of its own takes the long way.
quiet = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


def adapted(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return moved(pv.wrap(build(family, dtype=dtype), "lora", r=RANK, **settings)).train()


def said(**settings: Any) -> TrainSettings:
    return TrainSettings(**{"precision": "bf16", **settings})


def autocast(low: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if low else nullcontext()


def step(
    model: nn.Module, x: Tensor, *, low: bool = True, **settings: Any
) -> tuple[Tensor, Tensors]:
    """The output and the gradients of a step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with leaned(model, said(**settings)):
        with autocast(low):
            y = features(model(x))
            loss = y.double().square().sum()
        loss.backward()
    named = model.named_parameters()
    return y.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def held(model: nn.Module, x: Tensor, *, low: bool = True, **settings: Any) -> int:
    """Bytes alive between forward and backward that are not there without it."""
    with leaned(model, said(**settings)), PeakTracker(model) as tracker:
        gc.collect()
        before = tracker.live
        with autocast(low):
            loss = features(model(x)).double().square().sum()
        gc.collect()
        after = tracker.live
    assert loss.requires_grad
    return after - before


def assert_equal(ours: tuple[Tensor, Tensors], theirs: tuple[Tensor, Tensors]) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(gradient, theirs[1][name]) for name, gradient in ours[1].items())


@quiet
@pytest.mark.parametrize("family", [*GATED, *PLAIN])
def test_computing_activations_again_changes_no_bit(family: str) -> None:
    low = family != "timm_vit_swiglu"
    model = adapted(family)
    x = images(model, BATCH)
    stock = {"low": low, "recompute": "nothing"}
    assert_equal(step(model, x, low=low), step(model, x, **stock))
    assert held(model, x, low=low) < 0.95 * held(model, x, **stock)


@quiet
@pytest.mark.parametrize("family", [*GATED, "timm_clip"])
def test_no_gate_product_is_held(family: str) -> None:
    """Nothing as wide as the hidden units but what the linears before the activation gave."""
    model = adapted(family)
    backbone = view(unwrap(model))
    mlp, parts = backbone.hidden[0].mlp, backbone.hidden[0].parts
    units = (len(parts.up) * parts.packed) * backbone.hidden[0].count
    tokens = BATCH * (PATCHES + backbone.tokens.prefix)  # type: ignore[union-attr]
    x = torch.randn(BATCH, PATCHES + backbone.tokens.prefix, WIDTH, requires_grad=True)  # type: ignore[union-attr]
    thin = len(parts.up) * RANK + RANK
    with leaned(model, said()), PeakTracker(model) as tracker:
        with autocast(True):
            y = mlp(x * 1.0)
            del x
        # The output, the input in fp32 and cast, and what is a number a row.
        rest = tracker.live - sum(p.numel() * 4 for p in model.parameters())
    rest -= 2 * y.numel() + 4 * y.numel() * 2 + 2 * y.numel()
    norm = parts.norm is not None and not isinstance(getattr(mlp, parts.norm), nn.Identity)
    if norm and family == "timm_vit_normed":  # by the root mean square: not seen through
        return
    assert rest - sum(b.numel() * b.itemsize for b in model.buffers()) <= tokens * (
        2 * units + 2 * thin + 16
    )


@pytest.mark.parametrize("family", ["timm_vit", "timm_eva02_small", "timm_eva_dinov3", "hf_clip"])
def test_frozen_weights_in_bf16_are_what_autocast_makes_of_them(family: str) -> None:
    model = adapted(family)
    x = images(model, BATCH)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    assert_equal(step(model, x, frozen="bf16"), step(model, x))
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_frozen_weights_are_stored_in_bf16_meanwhile() -> None:
    model = adapted("hf_dinov2_classifier")
    with leaned(model, said(frozen="bf16")):
        for name, parameter in model.named_parameters():
            matrix = parameter.dim() >= 2 and name.endswith("weight")
            low = matrix and not parameter.requires_grad
            assert parameter.dtype == (torch.bfloat16 if low else torch.float32), name
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_frozen_weights_come_back_after_a_failure() -> None:
    model = adapted("timm_vit")
    with pytest.raises(ZeroDivisionError), leaned(model, said(frozen="bf16", norms="low")):
        raise ZeroDivisionError
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def relative(found: Tensors, truth: Tensors) -> Tensor:
    parts = [(found[n] - g).norm() / g.norm() for n, g in truth.items() if g.norm() > 0]
    return torch.stack(parts).mean()


@quiet
@pytest.mark.parametrize(
    "family",
    ["timm_vit", "timm_vit_normed", "timm_eva_dinov3", "hf_dinov2", "hf_siglip_classifier"],
)
def test_low_norms_round_gradients_as_bf16_does_anyway(family: str) -> None:
    model = adapted(family)
    x = images(model, BATCH)
    y, found = step(model, x, norms="low")
    same, full = step(model, x)
    truth = step(model.double(), x.double(), low=False)[1]
    assert torch.equal(y, same)
    assert any(not torch.equal(found[name], gradient) for name, gradient in full.items())
    assert relative(found, truth) < 1.25 * relative(full, truth)


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_low_norms_change_nothing_in_full_precision(low: bool) -> None:
    model = adapted("timm_vit")
    x = images(model, BATCH)
    same = step(model, x, low=low, norms="low"), step(model, x, low=low)
    if not low:
        assert_equal(*same)
    assert (held(model, x, low=low, norms="low") < held(model, x, low=low)) is low


def test_what_is_held_is_what_paper_says() -> None:
    """Per token and block: two normalized values, q, k, v, heads' outputs, and units before GELU.

    Nothing for the frozen embedding, positions, LayerScale, biases, or copies of weights.
    """
    x, everything = images(batch=BATCH), {"frozen": "bf16", "norms": "low"}
    sizes = []
    for depth in (2, 3):
        torch.manual_seed(0)
        model = pv.wrap(timm_vit(init_values=0.5, depth=depth), "lora", r=RANK).train()
        sizes.append(held(model, x, **everything))
    norms, heads, units = 2 * (2 * WIDTH + 4), 2 * 4 * WIDTH + 4 * HEADS, 2 * 4 * WIDTH
    assert sizes[1] - sizes[0] == BATCH * (PATCHES + 1) * (norms + heads + units + 4 * 2 * RANK)


def test_separate_queries_keys_and_values_hold_no_more() -> None:
    """But their thin products, and casts of what enters the first block, which has no history."""
    everything = {"frozen": "bf16", "norms": "low"}
    fused, apart = (
        held(adapted("timm_dinov2", split_qkv=split), images(batch=BATCH), **everything)
        for split in (False, True)
    )
    assert apart - fused == 2 * BATCH * (PATCHES + 1) * (DEPTH * 2 * RANK + 2 * WIDTH)


def runs(model: nn.Module, x: Tensor, **settings: Any) -> list[int]:
    """How often each block's MLP runs in a step."""
    counts = [0] * DEPTH
    hooks = []
    for site in view(unwrap(model)).hidden:

        def count(*_: Any, i: int = site.block) -> None:
            counts[i] += 1

        hooks.append(site.mlp.register_forward_pre_hook(count))
    step(model, x, low=False, **settings)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize(
    ("family", "blocks", "expected"),
    [
        ("timm_vit", 1, [2]),
        ("timm_eva_rope", 2, [1, 3]),
        ("hf_vit", 3, [0, 2, 3]),
        ("hf_siglip", 4, [0, 1, 2, 3]),
    ],
)
def test_some_blocks_are_recomputed(family: str, blocks: int, expected: list[int]) -> None:
    model = adapted(family, torch.float64)
    x = images(model)
    settings = {"gradient_checkpointing": blocks}
    assert runs(model, x, **settings) == [2 if i in expected else 1 for i in range(DEPTH)]
    assert_equal(step(model, x, low=False, **settings), step(model, x, low=False))
    assert runs(model, x) == [1] * DEPTH


@pytest.mark.parametrize("through", ["trunk", "reduction"])
def test_some_blocks_of_a_trunk_are_recomputed(through: str) -> None:
    model = adapted("timm_vit", torch.float64)
    view(unwrap(model)).tokens.trunk()  # type: ignore[union-attr]
    if through == "reduction":
        reduce_tokens(unwrap(model), 0.5)
    x = images(model)
    expected = step(model, x, low=False)
    assert runs(model, x, gradient_checkpointing=2) == [1, 2, 1, 2]
    assert_equal(step(model, x, low=False, gradient_checkpointing=2), expected)


def test_recomputed_blocks_are_among_those_that_hold_something() -> None:
    model = adapted("timm_vit", last=2)
    assert holding(view(unwrap(model))) == [2, 3]
    assert runs(model, images(), gradient_checkpointing=1) == [1, 1, 1, 2]
    assert holding(view(unwrap(adapted("hf_vit")))) == [0, 1, 2, 3]
    only_head = build("timm_vit").requires_grad_(False)
    only_head.head.requires_grad_(True)
    assert holding(view(only_head)) == []


def test_what_comes_before_the_blocks_is_held_by_all_of_them() -> None:
    model = pv.wrap(build("timm_dinov2"), "decoupled_position")
    assert holding(view(unwrap(model))) == [0, 1, 2, 3]
    prompts = pv.wrap(build("timm_vit"), "vpt")
    assert holding(view(unwrap(prompts))) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", ["timm_vit", "hf_siglip_classifier"])
def test_the_gradient_goes_no_deeper_than_the_first_trained_block(family: str) -> None:
    model = adapted(family, last=1)
    seen = []
    for site in view(unwrap(model)).blocks:
        site.block.register_forward_hook(lambda m, a, out: seen.append(out))
    x = images(model, BATCH)
    features(model(x))
    needed = [(out if isinstance(out, Tensor) else out[0]).requires_grad for out in seen]
    assert needed == [False, False, False, True]
    assert held(model, x) < 0.55 * held(adapted(family), x)


SUBSETS = ["timm_vit", "timm_dinov2", "timm_eva02_small", "timm_siglip", "hf_vit", "hf_dinov2"]


def masked(model: nn.Module, x: Tensor, share: float) -> tuple[Tensor, Tensors]:
    """A step in which every branch is computed for all samples, and multiplied by a mask."""

    def mask(module: nn.Module, args: Any, output: Any) -> Any:
        count = max(1, int(BATCH * (1 - share)))
        factor = torch.zeros(BATCH, dtype=torch.float64)
        factor[torch.randperm(BATCH)[:count]] = BATCH / count
        if isinstance(output, tuple):
            return (output[0] * factor[:, None, None], *output[1:])
        return output * factor[:, None, None]

    backbone = view(unwrap(model))
    names = [backbone.tokens.parts.attention, backbone.tokens.parts.mlp]  # type: ignore[union-attr]
    places = [getattr(site.block, name) for site in backbone.blocks for name in names]
    hooks = [module.register_forward_hook(mask) for module in places]
    found = step(model, x, low=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", SUBSETS)
def test_a_subset_is_a_mask(family: str) -> None:
    recomputed = 2 if family in ("timm_dinov2", "hf_vit") else 0
    model = adapted(family, torch.float64)
    x = images(model, BATCH)
    y, ours = step(model, x, low=False, drop_path=0.4, gradient_checkpointing=recomputed)
    expected, theirs = masked(model, x, 0.4)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-10, rtol=1e-8)


def test_a_subset_holds_its_share_only() -> None:
    model = adapted("timm_dinov2")
    x = images(model, 16)
    assert held(model, x, drop_path=0.4) < 0.7 * held(model, x)


def test_no_sample_is_left_out_in_evaluation_or_of_a_batch_of_one() -> None:
    model = adapted("timm_vit")
    x = images(model, BATCH)
    with leaned(model, said(drop_path=0.5)):
        assert torch.equal(model.eval()(x), model(x))
        alone = model.train()(x[:1])
    torch.testing.assert_close(alone, model(x[:1]))


EVERYTHING: dict[str, Any] = {
    "frozen": "bf16",
    "norms": "low",
    "drop_path": 0.25,
    "gradient_checkpointing": 1,
}


def trained(**settings: Any) -> tuple[Any, dict[str, float]]:
    """A short run."""
    model = adapted("timm_vit_glu")
    x = images(batch=BATCH)
    data = TensorSet(x, torch.arange(BATCH) % 3)
    plain = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-2, "loggers": []}
    plain |= {"device": "cpu", "progress": False}
    found = fit(model, Classification(), data, data, said(**plain, **settings))
    return model, found


def test_a_run_with_everything_leaves_nothing_behind() -> None:
    model, figures = trained(**EVERYTHING)
    plain, expected = trained()
    assert figures.keys() == expected.keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, dict(plain.named_parameters())[name])
        assert same is not parameter.requires_grad, name
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert len(module._forward_hooks) == len(other._forward_hooks)
        assert not module._forward_pre_hooks
        assert ("forward" in vars(module)) == ("forward" in vars(other))  # accelerate leaves one


def test_frozen_and_recomputed_runs_are_the_same_run() -> None:
    model, figures = trained(frozen="bf16", gradient_checkpointing=True)
    plain, expected = trained(recompute="nothing")
    assert {**figures, "seconds": 0.0} == {**expected, "seconds": 0.0}
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_fake_tensors_hold_less_by_every_measure() -> None:
    model, size = adapted("timm_vit_glu"), (3, 32, 32)
    run = Rehearsal(model, size).run
    steps: list[dict[str, Any]] = [
        {"recompute": "nothing"},
        {},
        {"frozen": "bf16"},
        {"frozen": "bf16", "norms": "low"},
        {"frozen": "bf16", "norms": "low", "drop_path": 0.4},
        {**EVERYTHING, "drop_path": 0.4, "gradient_checkpointing": True},
    ]
    sizes = [run(said(batch_size=64, **settings)).allocated for settings in steps]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


Refusal = tuple[dict[str, Any], Callable[[], nn.Module], type[Exception], str]
REFUSALS: dict[str, Refusal] = {
    "bf16 in fp32": (
        {"frozen": "bf16", "precision": "fp32"},
        lambda: adapted("timm_vit"),
        BadSetting,
        "train.precision=bf16 or train.frozen=keep",
    ),
    "too many blocks": (
        {"gradient_checkpointing": 5},
        lambda: adapted("timm_vit"),
        BadSetting,
        "has 4 blocks",
    ),
    "tokens leave": (
        {"drop_path": 0.1},
        lambda: reduce_tokens(build("timm_vit"), 0.5).model,
        UnsupportedSite,
        "tokens leave on the way",
    ),
    "no blocks": (
        {"drop_path": 0.1},
        lambda: build("generic_cnn"),
        UnsupportedSite,
        "no tokens",
    ),
    "no blocks to recompute": (
        {"gradient_checkpointing": 2},
        lambda: build("generic_cnn"),
        UnsupportedSite,
        "no blocks",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    settings, model, error, words = REFUSALS[case]
    with pytest.raises(error, match=words), leaned(model(), said(**settings)):
        pass


def test_automatic_sizes_need_somebody_who_chose_them() -> None:
    from peft_vision.training.settings import share_of

    for settings in (said(batch_size="auto"), said(micro_batch="auto")):
        with pytest.raises(BadSetting, match="memory: 24GB"):
            share_of(settings, 1)


def test_bf16_weights_are_refused_where_the_run_is_in_fp32() -> None:
    """`auto` means fp32 on a CPU, which is known when the run begins."""
    if torch.cuda.is_available():
        pytest.skip("auto may mean bf16 here")
    with pytest.raises(BadSetting, match="computes in fp32 here"):
        trained(frozen="bf16", precision="auto")
