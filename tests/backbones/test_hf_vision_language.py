"""Adapters and budgets on towers of models that take more than images: text, or a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_vision as pv
from peft_vision.backbones import view
from peft_vision.backbones.hf_vision_language import image_features
from peft_vision.cost import unwrap
from peft_vision.errors import GradientMissing, UnsupportedSite

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE = 98


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {**TEXT, "projection_dim": 16}
    return CLIPModel(CLIPConfig(vision_config=TOWER, text_config=text, projection_dim=16))


def siglip() -> Any:
    from transformers import SiglipConfig, SiglipModel

    text = {**TEXT, "projection_size": 32}
    return SiglipModel(SiglipConfig(vision_config=TOWER, text_config=text))


def llava() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**TEXT, num_key_value_heads=4),
        image_token_index=IMAGE,
    )
    return LlavaForConditionalGeneration(config)


def paligemma() -> Any:
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=GemmaConfig(**TEXT, num_key_value_heads=4, head_dim=8),
        projection_dim=32,
        image_token_index=IMAGE,
    )
    return PaliGemmaForConditionalGeneration(config)


MODELS = {"clip": clip, "siglip": siglip, "llava": llava, "paligemma": paligemma}
each_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def arguments(name: str) -> dict[str, Tensor]:
    """What the whole model is called with in training: text and an image."""
    text = torch.randint(3, 90, (2, 7))
    if name in ("llava", "paligemma"):
        text = torch.cat([torch.full((2, 16), IMAGE), text], 1)
    return {"input_ids": text, "pixel_values": torch.randn(2, 3, 32, 32)}


def logits_of(output: Any) -> Tensor:
    return output.logits_per_image if "logits_per_image" in output else output.logits


@each_model
def test_the_tower_is_seen_and_text_is_not(name: str) -> None:
    model = built(name)
    seen = view(model)
    assert seen.family in ("hf_clip", "hf_siglip")
    paths = {id(module): path for path, module in model.named_modules()}
    owners = [paths[id(site.owner)] for site in (*seen.linears, *seen.convs)]
    assert not [path for path in owners if "text" in path or "language" in path]
    projecting = [site.key for site in seen.linears if "proj" in site.key and site.block is None]
    wanted = {"clip": 1, "siglip": 0, "llava": 2, "paligemma": 1}
    assert len(projecting) == wanted[name]


def test_blocks_that_a_language_model_is_not_given_are_no_sites() -> None:
    seen = view(built("llava"))
    assert len(seen.blocks) == len(seen.heads) == 2, "it reads the last hidden state but one"


@each_model
def test_lora_is_trained_by_text_and_images_saved_loaded_and_merged(
    name: str, tmp_path: Path
) -> None:
    base = built(name)
    dense, given = copy.deepcopy(base), arguments(name)
    model: Any = pv.wrap(base, "lora", r=4)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([p for _, p in trained], lr=1e-2)
    torch.autograd.backward(logits_of(model(**given)).square().mean())
    assert all(p.grad is not None for _, p in trained)
    assert all("text" not in n and "language" not in n for n, _ in trained)
    optimizer.step()
    model.eval()
    with torch.no_grad():
        now = logits_of(model(**given))
        assert not torch.equal(now, logits_of(dense(**given)))
        model.save_pretrained(tmp_path / "adapter")
        again = pv.load(tmp_path / "adapter", base=dense)
        assert torch.equal(logits_of(again(**given)), now)
        plain = pv.merge(model)
        assert type(plain) is type(dense)
        torch.testing.assert_close(logits_of(plain(**given)), now, atol=1e-5, rtol=1e-4)


@each_model
def test_a_budget_concerns_what_images_cost(name: str, tmp_path: Path) -> None:
    base = built(name)
    result = pv.compress(base, target_flops=0.6)
    assert 0.588 < result.ratio <= 0.6
    result.save_pretrained(tmp_path / "small")
    again, images = pv.load(tmp_path / "small"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, other = (image_features(unwrap(m).eval(), images) for m in (again, result.model))
    assert torch.equal(one, other)
    text = {n: p for n, p in base.named_parameters() if "text" in n or "language" in n}
    kept = dict(unwrap(result.model).named_parameters())
    assert text, "the model has a text part"
    assert all(torch.equal(kept[n], p) for n, p in text.items())


def test_patches_that_a_language_model_counts_stay() -> None:
    with pytest.raises(UnsupportedSite, match="every patch"):
        pv.compress(built("llava"), target_flops=0.6, methods="token_merging")


def test_weights_in_two_places_are_shared_again_after_loading(tmp_path: Path) -> None:
    base = built("paligemma")
    result = pv.compress(base, target_flops=0.8, methods="magnitude")
    result.save_pretrained(tmp_path / "small")
    again = unwrap(pv.load(tmp_path / "small"))
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight


class Diffusion(nn.Module):
    """A small diffusion transformer: noisy images, a time and a class each (Peebles, Xie, 2023)."""

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.time, self.label = nn.Linear(1, width), nn.Embedding(5, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(4))
        self.attention = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.modulation = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(depth))
        self.out = nn.Linear(width, 48)

    def forward(self, images: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        condition = self.time(times[:, None]) + self.label(labels)
        for i, (qkv, mlp, modulation) in enumerate(
            zip(self.attention, self.mlp, self.modulation, strict=True)
        ):
            parts = modulation(nn.functional.silu(condition)).unsqueeze(1).chunk(6, -1)
            q, k, v = qkv(self.norms[2 * i](x) * (1 + parts[0]) + parts[1]).chunk(3, -1)
            x = x + parts[2] * nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + parts[5] * mlp(self.norms[2 * i + 1](x) * (1 + parts[3]) + parts[4])
        return self.out(x)


def test_an_adapter_on_a_diffusion_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Diffusion()
    dense = copy.deepcopy(base)
    inputs = (torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 4]))
    with pytest.raises(GradientMissing, match="inputs="):
        pv.wrap(copy.deepcopy(base), "lora", r=2, image_size=16)
    model: Any = pv.wrap(base, "lora", r=2, inputs=inputs)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.autograd.backward(model(*inputs).square().mean())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        now = model(*inputs)
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(pv.load(tmp_path / "adapter", base=dense)(*inputs), now)
        torch.testing.assert_close(pv.merge(model)(*inputs), now, atol=1e-5, rtol=1e-4)
