"""Every method of the installed PEFT, found in PEFT itself: it works, or it says why it cannot."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.adapters import _catalog
from peft_vision.adapters._targets import exactly
from peft_vision.adapters._variants import switches
from peft_vision.backbones import view
from peft_vision.errors import BadSetting, UnknownName, UnsupportedSite
from peft_vision.method import CATALOG, filed, find, make, name_of, offered
from tests.families import build, features, images, timm_vit

NAMES = sorted(set(offered()) - set(filed()))
OTHERS = ("hf_vit", "timm_eva02_small", "generic_cnn")
SAMPLE = [(family, name) for n, family in enumerate(OTHERS) for name in NAMES[3 * n + 2 :: 19]]
# What a plain vision model on a machine without accelerator cannot feed, and a word of the reason.
REFUSED = {
    **dict.fromkeys(("cartridge", "cpt", "multitask_prompt_tuning", "p_tuning"), "words"),
    **dict.fromkeys(("prefix_tuning", "prompt_tuning", "adaption_prompt", "alora"), "words|prompt"),
    **dict.fromkeys(("arrow", "xlora"), "trained before"),
    **dict.fromkeys(("corda", "lora_ga"), "could not redo"),
    "loftq": "NVIDIA|CUDA",
    "monteclora": "neither copied nor merged",
    "poly": "task",
    "qalora": "GPTQ",
    "shadow": "decoder",
    "trainable_tokens": "embedding",
}
UNMERGED = {"lily"}
QUICK = {"adamss": {"r": 8, "num_subspaces": 2}}


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm_vit(depth=1)


def wrapped(model: nn.Module, name: str, **settings: Any) -> Any:
    return pv.wrap(model, name, data=[(images(model, 8), torch.zeros(8))], **settings)


def three_steps(model: Any, x: Tensor) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    target = torch.randn(features(model(x)).shape)
    losses = []
    model.train()
    for _ in range(4):
        optimizer.zero_grad()
        loss = (features(model(x)) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        losses.append(loss.item())
        if len(losses) < 4:
            optimizer.step()
    model.eval()
    return losses


@torch.no_grad()
def check_whole_life(model: nn.Module, name: str, folder: Path) -> None:
    """Trains, reloads bit for bit, loads in plain PEFT or fails loudly there, merges."""
    dense, x = copy.deepcopy(model), images(model)
    adapted = wrapped(model, name, **QUICK.get(name, {}))
    with torch.enable_grad():
        losses = three_steps(adapted, x)
    assert losses[-1] < losses[0]
    now = features(adapted(x))
    adapted.save_pretrained(folder)
    torch.manual_seed(1)
    again = pv.load(folder, base=dense)
    assert torch.equal(features(again(x)), now)
    assert again.history.plan == adapted.history.plan
    check_plain_peft(adapted, dense, folder, x, now)
    if name in UNMERGED:
        with pytest.raises(UnsupportedSite, match="cannot be merged"):
            pv.merge(adapted)
    else:
        torch.testing.assert_close(features(pv.merge(adapted)(x)), now, rtol=1e-4, atol=1e-4)
    assert torch.equal(features(adapted(x)), now), "merging leaves the model that was given"


def check_plain_peft(adapted: Any, dense: nn.Module, folder: Path, x: Tensor, now: Tensor) -> None:
    if adapted.foreign():
        with pytest.raises(KeyError, match="open this folder with peft_vision"):
            peft.PeftModel.from_pretrained(copy.deepcopy(dense), str(folder))
        return
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(dense), str(folder)).eval()
    torch.testing.assert_close(features(plain(x)), now, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about defaults of its own
@pytest.mark.parametrize("name", NAMES)
def test_every_method_works_or_says_why_not(name: str, tmp_path: Path) -> None:
    if name not in REFUSED:
        check_whole_life(tiny(), name, tmp_path / "out")
        return
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedSite, match=REFUSED[name]) as refused:
        wrapped(model, name)
    assert str(refused.value).startswith(name)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name"), SAMPLE)
def test_other_families(family: str, name: str, tmp_path: Path) -> None:
    try:
        check_whole_life(build(family), name, tmp_path / "out")
    except (UnsupportedSite, BadSetting) as refused:
        assert name in REFUSED or family == "generic_cnn"
        assert len(str(refused)) > 40  # noqa: PT017


def test_the_names_are_those_that_peft_registers() -> None:
    registered = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert registered | switches().keys() == set(offered())
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(switches().values()) <= fields
    assert {"dora", "rslora", "pissa", "olora", "eva", "loftq", "corda"} <= switches().keys()
    assert set(REFUSED) <= set(NAMES)


def test_names_are_known_without_importing_peft() -> None:
    code = "import sys, peft_vision.method as m; assert m.names(); print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_class_of_the_catalogue_is_like_any_other() -> None:
    assert find("vera") is find("vera")
    assert find("vera").__module__ == CATALOG
    assert name_of(make("vera", {"r": 4})) == "vera"
    assert make("vera", {"r": 4}).settings()["r"] == 4
    with pytest.raises(UnknownName):
        _catalog.find("no_such_method")


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("vera", {"rank": 4}, "no setting 'rank'"),
        ("vera", {"d_initail": 0.1}, "Did you mean 'd_initial'"),
        ("vera", {"target_modules": ["qkv"]}, "no setting"),
        ("dora", {"use_dora": False}, "no setting"),
        ("vera", {"targets": ["query"]}, "possible"),
        ("velora", {"num_groups": 0}, "velora: `num_groups` should be positive"),
        ("velora", {"init_type": "zeros"}, "possible: 'batch_average'"),
        ("eva", {"rho": 0.5}, "`rho` must be >= 1.0"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadSetting, match=says):
        wrapped(tiny(), name, **settings)


def test_numbers_that_do_not_fit_are_made_smaller_and_are_in_the_plan() -> None:
    adapted = wrapped(tiny(), "c3a")
    (step,) = adapted.history.plan.steps
    assert step.decisions["blocks.0.qkv"] == {"block_size": 32}
    assert step.settings["block_size"] is None
    assert adapted.peft_config["default"].block_size == 32


def test_a_number_that_was_asked_for_is_never_changed() -> None:
    assert wrapped(tiny(), "c3a", block_size=16).peft_config["default"].block_size == 16
    with pytest.raises(UnsupportedSite, match="factor of the input size"):
        wrapped(tiny(), "c3a", block_size=256)


def test_activations_are_scaled_at_the_input_of_layers_that_end_a_branch() -> None:
    config = wrapped(tiny(), "ia3").peft_config["default"]
    assert set(config.feedforward_modules) == {"blocks.0.attn.proj", "blocks.0.mlp.fc2"}


def test_norms_are_found_for_the_method_that_trains_them() -> None:
    adapted = wrapped(tiny(), "ln_tuning", train_head=False)
    trained = {name.split(".ln_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.removeprefix("base_model.model.") for name in trained} == {
        "blocks.0.norm1", "blocks.0.norm2", "norm",
    }  # fmt: skip
    with pytest.raises(UnsupportedSite, match="TinyCnn has no normalization"):
        wrapped(build("generic_cnn"), "ln_tuning")


def test_a_name_that_ends_others_is_spelled_out() -> None:
    backbone = view(tiny())
    assert exactly(backbone, ["blocks.0.norm1"]) == ["blocks.0.norm1"]
    assert exactly(backbone, ["norm"]) == "norm"


def test_first_values_by_data() -> None:
    model = tiny()
    with pytest.raises(BadSetting, match="pass data="):
        pv.wrap(model, "eva")
    with pytest.raises(BadSetting, match="larger batches"):
        pv.wrap(build("timm_vit"), "eva", r=16, rho=2.0, data=[(images(None, 1), None)])
    adapted = wrapped(model, "eva", r=4)
    decided = adapted.history.plan.steps[0].decisions
    ranks = {key: value["rank"] for key, value in decided.items() if value != "train"}
    assert sum(ranks.values()) == 4 * len(view(tiny()).linears)
    for site in view(adapted.plain_model).linears:
        if site.key in ranks:
            rows = site.layer.lora_A["default"].weight
            torch.testing.assert_close(rows @ rows.T, torch.eye(ranks[site.key]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_start_that_moves_weights_into_the_update_keeps_the_function(name: str) -> None:
    model = tiny()
    x = images(model)
    before = model(x)
    adapted = wrapped(model, name)
    torch.testing.assert_close(adapted(x), before, atol=1e-5, rtol=1e-5)
    qkv = adapted.plain_model.blocks[0].attn.qkv
    assert not torch.equal(qkv.base_layer.weight, tiny().blocks[0].attn.qkv.weight)


def test_running_figures_of_the_base_stay() -> None:
    model = build("generic_cnn")
    before = model.stem[1].running_mean.clone()
    adapted = wrapped(model, "vera")
    three_steps(adapted, images(model))
    assert torch.equal(adapted.plain_model.stem[1].running_mean, before)
