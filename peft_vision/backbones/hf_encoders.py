"""transformers' encoders made like ViT: DeiT, MAE, MSN, I-JEPA, Pixio, YOLOS, DPT."""

from __future__ import annotations

from torch import nn

from peft_vision.backbones import _stages
from peft_vision.backbones.sites import Backbone
from peft_vision.layers.attention_parts import AttentionParts
from peft_vision.layers.mlp import MlpParts

MODULES = tuple(
    f"transformers.models.{name}.modeling_{name}"
    for name in ("deit", "vit_mae", "vit_msn", "ijepa", "pixio", "yolos", "dpt")
)

TOKENS = "how its tokens are ordered, masked and read behind the blocks is not known"
WIDTH = "where else its stream is read is not known"
POSITIONS = "where its positions are added is not known"

PROJECTIONS = AttentionParts(
    qkv=("q_proj", "k_proj", "v_proj"), out="o_proj", heads=("num_attention_heads",)
)
HALVES = AttentionParts(
    qkv=("attention.query", "attention.key", "attention.value"),
    out="output.dense",
    head_dim="attention.attention_head_size",
    heads=("attention.num_attention_heads",),
    width=("attention.all_head_size",),
)
ATTENTIONS = {
    **dict.fromkeys(
        ("DeiTAttention", "ViTMAEAttention", "ViTMSNAttention", "IJepaAttention", "PixioAttention"),
        PROJECTIONS,
    ),
    **dict.fromkeys(("YolosAttention", "DPTViTAttention"), HALVES),
}
MLPS = ("DeiTMLP", "ViTMAEMLP", "ViTMSNMLP", "IJepaMLP", "PixioMLP")
LAYERS = ("YolosLayer", "DPTViTLayer")


def _attention(module: nn.Module) -> AttentionParts | None:
    return ATTENTIONS.get(_name(module))


def _mlp(module: nn.Module) -> MlpParts | None:
    return MlpParts(up=("fc1",), down="fc2") if _name(module) in MLPS else None


def _own_mlp(module: nn.Module) -> MlpParts | None:
    halves = MlpParts(up=("intermediate.dense",), down="output.dense")
    return halves if _name(module) in LAYERS else None


def _name(module: nn.Module) -> str:
    """The name of a class of these files; their imports, which are slow, are left to the models."""
    cls = type(module)
    return cls.__name__ if cls.__module__ in MODULES else ""


WORDS = _stages.Words(
    attention=_attention,
    mlp=_mlp,
    own_mlp=_own_mlp,
    tokens=TOKENS,
    width=WIDTH,
    positions=POSITIONS,
)


def why_not(model: nn.Module) -> str:
    """What keeps the model from being understood; empty when nothing does."""
    return _stages.why_not(model, WORDS)


def view(model: nn.Module) -> Backbone:
    """See the model as sites."""
    return _stages.see(model, "hf_encoders", WORDS)
