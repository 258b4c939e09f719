"""transformers' BEiT and data2vec: a bias for every pair of patches, in every block."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = (
    "transformers.models.beit.modeling_beit",
    "transformers.models.data2vec.modeling_data2vec_vision",
)

TOKENS = (
    "its attention has a bias for every pair of places on the grid, which tokens would take along"
)
WIDTH = "its blocks hold scales and biases that are laid out for its whole width"
SHARED = "all blocks share one table of biases with an entry for each head"

IN_BLOCK = AttentionParts(
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj",
    head_dim="attention.head_dim",
    heads=("attention.num_attention_heads",),
    per_head=(("relative_position_bias.relative_position_bias_table", 1),),
)
WITHIN = AttentionParts(
    qkv=("attention.query", "attention.key", "attention.value"),
    out="output.dense",
    head_dim="attention.attention_head_size",
    heads=("attention.num_attention_heads",),
    width=("attention.all_head_size",),
    per_head=(("attention.relative_position_bias.relative_position_bias_table", 1),),
)
MLP = MlpParts(up=("fc1",), down="fc2")
HALVES = MlpParts(up=("intermediate.dense",), down="output.dense")


def _attention(module: nn.Module) -> AttentionParts | None:
    from transformers.models.data2vec.modeling_data2vec_vision import Data2VecVisionAttention

    return WITHIN if type(module) is Data2VecVisionAttention else None


def _own_attention(module: nn.Module) -> AttentionParts | None:
    from transformers.models.beit.modeling_beit import BeitLayer

    return IN_BLOCK if type(module) is BeitLayer else None


def _mlp(module: nn.Module) -> MlpParts | None:
    from transformers.models.beit.modeling_beit import BeitMLP

    return MLP if type(module) is BeitMLP else None


def _own_mlp(module: nn.Module) -> MlpParts | None:
    from transformers.models.data2vec.modeling_data2vec_vision import Data2VecVisionLayer

    return HALVES if type(module) is Data2VecVisionLayer else None


def _shared(module: nn.Module) -> str | None:
    return SHARED if _attention(module) is not None else None


def _own_shared(module: nn.Module) -> str | None:
    return SHARED if _own_attention(module) is not None else None


def _words(model: Any) -> _stages.Words:
    shared = model.config.use_shared_relative_position_bias
    return _stages.Words(
        attention=_shared if shared else _attention,
        own_attention=_own_shared if shared else _own_attention,
        mlp=_mlp,
        own_mlp=_own_mlp,
        tokens=TOKENS,
        width=WIDTH,
    )


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, _words(model))


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "hf_beit", _words(model))
