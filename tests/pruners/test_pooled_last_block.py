"""The last block for the tokens that are read: the same logits, and the cost that follows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.cost import unwrap
from peft_vision.errors import UnsupportedSite
from peft_vision.exporting import export
from peft_vision.method import make
from tests.families import DEPTH, FAMILIES, SIZE, images, moved, run

METHOD = "pooled_last_block"
READ = [
    "hf_vit",
    "timm_clip",
    "timm_deit3",
    "timm_deit_distilled",
    "timm_dinov2_registers",
    "timm_eva02_small_class",
    "timm_eva_dinov3_qkv_bias",
    "timm_vit",
    "timm_vit_glu",
    "timm_vit_normed",
]


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().double().eval()


LAST = DEPTH - 1
GONE = {
    "the last attention": [(LAST, "attention")],
    "the last two": [(LAST, "attention"), (LAST - 1, "attention")],
    "and an MLP before it": [(LAST, "attention"), (LAST - 1, "mlp")],
    "the last block": [(LAST, "attention"), (LAST, "mlp")],
    "one in the middle": [(1, "attention")],
    "every attention": [(index, "attention") for index in range(DEPTH)],
}
LEAVING = {
    "dropped": [("token_reorganization", {"keep_rate": 0.6, "at": (0.25, 0.5, 0.75)})],
    "merged": [("token_merging", {"ratio": 0.2})],
    "merged, then dropped": [
        ("token_merging", {"ratio": 0.1}),
        ("token_reorganization", {"keep_rate": 0.6, "at": (0.25, 0.5, 0.75)}),
    ],
}


def without(
    model: nn.Module, branches: list[tuple[int, str]], *, offset: bool = False, votes: bool = False
) -> nn.Module:
    """The model without these branches, or without their votes; constants in their place."""
    one: dict[str, Any] = {"vote": False} if votes else {"absent": True, "offset": offset}
    decisions: dict[str, Any] = {f"blocks.{index}.{half}": one for index, half in branches}
    if votes:
        rows = view(model).tokens.class_tokens + view(model).tokens.distillation_tokens  # type: ignore[union-attr]
        decisions["tokens.votes"] = {"rows": rows}
    make("path_pruning").apply(view(model), decisions)
    return model


def pooled(model: nn.Module) -> nn.Module:
    return unwrap(pv.wrap(copy.deepcopy(model), METHOD))


def logits(output: Any) -> Tensor:
    return (
        output if isinstance(output, Tensor) else output.logits if "logits" in output else output[0]
    )


@pytest.mark.parametrize("family", READ)
def test_the_logits_stay_and_the_cost_falls(family: str) -> None:
    model = model_of(family)
    x, before = images(model).double(), pv.measure(model).flops
    expected = logits(model(x))
    wrapped = pv.wrap(model, METHOD)
    assert (logits(wrapped(x)) - expected).abs().max() < 1e-12
    assert pv.measure(wrapped).flops < before


def test_the_share_is_that_of_the_closed_form() -> None:
    """Of DeiT-S: keys and values of all tokens, everything else of one."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    n, d, before = 197, 384, pv.measure(model).flops
    saved = (4 * n * d**2 + 2 * n**2 * d + 8 * n * d**2) - (2 * n * d**2 + 10 * d**2 + 2 * n * d)
    share = pv.measure(pv.wrap(model, METHOD)).flops / before
    assert abs(share - (1 - 2 * saved / before)) < 1e-6
    assert round(share, 3) == 0.931


@pytest.mark.parametrize("order", ["adapter first", "block first"])
def test_adapters_before_and_after(order: str) -> None:
    model = model_of("timm_vit")
    x = images(model).double()
    methods = ("lora", METHOD) if order == "adapter first" else (METHOD, "lora")
    plain = pv.wrap(copy.deepcopy(model), "lora", r=2)
    changed: Any = model
    for method in methods:
        changed = pv.wrap(changed, method, **({"r": 2} if method == "lora" else {}))
    with torch.no_grad():
        tensors = (m.plain_model.named_parameters() for m in (plain, changed))
        for (_, one), (_, other) in zip(*tensors, strict=True):
            if one.requires_grad:
                one.normal_()
                other.copy_(one)
    assert (plain.eval()(x) - changed.eval()(x)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("keep_rate", "dense", "both"),
    [(0.9, 0.875, 0.824), (0.8, 0.756, 0.721), (0.7, 0.659, 0.635), (0.5, 0.502, 0.493)],
)
def test_what_is_left_of_it_where_tokens_leave(keep_rate: float, dense: float, both: float) -> None:
    """Of DeiT-S: the fewer tokens the last block has, the less there is to save."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    before = pv.measure(model).flops
    reduced = pv.wrap(copy.deepcopy(model), "token_reorganization", keep_rate=keep_rate)
    assert round(pv.measure(reduced).flops / before, 3) == dense
    one = pv.measure(pv.wrap(reduced, METHOD)).flops
    other = pv.wrap(pv.wrap(model, METHOD), "token_reorganization", keep_rate=keep_rate)
    assert round(one / before, 3) == both
    assert pv.measure(other).flops == one


@pytest.mark.parametrize("branches", GONE)
@pytest.mark.parametrize("family", READ)
def test_the_last_attention_that_is_left_is_what_counts(family: str, branches: str) -> None:
    """Behind it nobody reads a patch, however many blocks follow."""
    model = without(model_of(family), GONE[branches], offset=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("offset", "first")):
                parameter.normal_()
    x, smaller = images(model).double(), pooled(model)
    assert (logits(smaller(x)) - logits(model(x))).abs().max() < 1e-12
    assert pv.measure(smaller).flops < pv.measure(model).flops
    trunk = view(smaller).tokens.trunk_if_any()  # type: ignore[union-attr]
    left = [index for index in range(DEPTH) if (index, "attention") not in GONE[branches]]
    rows = [trunk.rows_of(index) for index in range(DEPTH)]  # type: ignore[union-attr]
    assert [row is not None for row in rows] == [i >= max(left, default=0) for i in range(DEPTH)]


def test_the_share_behind_the_last_attention_is_that_of_the_closed_form() -> None:
    """Of DeiT-S without its last attention: block 10 keys and values, block 11 one token's MLP."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    n, d = 197, 384
    without(model, [(11, "attention")])
    block = 4 * n * d**2 + 2 * n**2 * d + 8 * n * d**2
    saved = block + 8 * n * d**2 - (2 * n * d**2 + 10 * d**2 + 2 * n * d + 8 * d**2)
    before = pv.measure(model).flops
    assert before - pv.measure(pooled(model)).flops == 2 * saved


@pytest.mark.parametrize("leaving", LEAVING)
@pytest.mark.parametrize("branches", ["the last attention", "the last two", "one in the middle"])
@pytest.mark.parametrize("family", ["timm_deit_distilled", "timm_dinov2_registers"])
def test_tokens_that_leave_where_nobody_reads_them(
    family: str, branches: str, leaving: str
) -> None:
    """Reducers in, and behind, the last block that has attention: the same logits, for less."""
    model: Any = model_of(family)
    for method, settings in LEAVING[leaving]:
        model = pv.wrap(model, method, **settings)
    model = without(unwrap(model), GONE[branches])
    x, smaller = images(model).double(), pooled(model)
    assert (logits(smaller(x)) - logits(model(x))).abs().max() < 1e-12
    assert pv.measure(smaller).flops < pv.measure(model).flops


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("branches", ["the last attention", "the last two"])
def test_prompts_where_nobody_reads_them(branches: str, deep: bool) -> None:
    plain = without(model_of("timm_vit"), GONE[branches])
    prompted: Any = moved(pv.wrap(copy.deepcopy(plain), "vpt", tokens=3, deep=deep))
    x = images(plain).double()
    expected = run(prompted, x)
    assert (run(pv.wrap(prompted, METHOD), x) - expected).abs().max() < 1e-12
    first: Any = pv.wrap(pooled(plain), "vpt", tokens=3, deep=deep)
    assert run(moved(first), x).shape == expected.shape


@pytest.mark.parametrize("family", READ)
def test_dead_ends_behind_the_last_vote(family: str) -> None:
    """Votes that go at the end take their branches with them, and patches before those."""
    going = [(LAST, "mlp"), (LAST, "attention"), (1, "mlp")]
    model = without(model_of(family), going, votes=True)
    x, smaller = images(model).double(), pooled(model)
    assert (logits(smaller(x)) - logits(model(x))).abs().max() < 1e-12
    assert pv.measure(smaller).flops < 0.8 * pv.measure(model).flops


@pytest.mark.parametrize(
    ("family", "gone"),
    [
        ("timm_vit", 0),
        ("timm_vit", 1),
        ("timm_vit", 2),
        ("hf_vit", 1),
        ("timm_eva02_small_class", 1),
    ],
)
def test_a_folder_and_an_exported_file_say_the_same(family: str, gone: int, tmp_path: Path) -> None:
    """With and without the last attentions, which add constants here, for which means stand in."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for site in view(model).linears:
            if site.role == "out" and (site.block or 0) >= DEPTH - gone:
                site.layer.weight.zero_()
    base, x = copy.deepcopy(model), images(model)
    expected, wrapped = logits(run(model, x)), pv.wrap(model, METHOD)
    settings = {"branches": "attention", "share": gone / (DEPTH - 1), "rank": "taylor"}
    wrapped = pv.wrap(wrapped, "path_pruning", **settings, data=[x])  # type: ignore[arg-type]
    trunk = view(unwrap(wrapped)).tokens.trunk_if_any()  # type: ignore[union-attr]
    assert trunk.rows_of(LAST - gone) == 1  # type: ignore[union-attr]
    assert (logits(run(wrapped, x)) - expected).abs().max() < 1e-5
    moved(wrapped).save_pretrained(tmp_path / "out")
    again = pv.load(tmp_path / "out", base=base)
    assert torch.equal(logits(run(again, x)), logits(run(wrapped, x)))
    assert pv.measure(again).flops == pv.measure(wrapped).flops
    report = export(again, tmp_path / "m.pt2", format="torch.export", image_size=SIZE)
    assert report.max_difference < 1e-5


def test_gradients_are_those_of_the_whole_block() -> None:
    model = model_of("timm_vit")
    x, cheap = images(model).double(), copy.deepcopy(model)
    model(x).square().sum().backward()
    pv.wrap(cheap, METHOD)(x).square().sum().backward()
    pairs = zip(model.parameters(), cheap.parameters(), strict=True)
    assert all((a.grad - b.grad).abs().max() < 1e-10 for a, b in pairs)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("timm_vit_average", "pooling: average"),
        ("timm_siglip", "pooling: attention"),
        ("hf_dinov2_classifier", r"class\+average"),
        ("hf_dinov3", "hands over all its tokens"),
        ("generic_cnn", "no tokens"),
    ],
)
def test_what_reads_more_is_refused(family: str, why: str) -> None:
    with pytest.raises(UnsupportedSite, match=why):
        pv.wrap(model_of(family), METHOD)


def test_a_second_time_changes_nothing() -> None:
    model = pv.wrap(model_of("timm_vit"), METHOD)
    again = pv.wrap(model, METHOD)
    assert again.history.plan.steps[-1].decisions == {}
    assert view(again.plain_model).tokens.trunk_if_any().pooled == 1  # type: ignore[union-attr]


def test_a_dense_head_is_refused_behind_it() -> None:
    model = pv.wrap(model_of("timm_vit"), METHOD)
    with pytest.raises(UnsupportedSite, match="every patch"):
        pv.wrap(model, "mlp_head", readout="boxes")
