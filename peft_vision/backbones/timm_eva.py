"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary positions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_vision.backbones import _timm_positions, _timm_width
from peft_vision.backbones.assembly import (
    ABSENT,
    Assembly,
    assemble,
    bypasses_in,
    is_bypassed,
    is_linear,
    lacking,
    last_layers,
    layers_in,
    whole_mlp,
)
from peft_vision.backbones.positions import PositionsSite, run
from peft_vision.backbones.sites import Backbone, LayerSite, TokensSite
from peft_vision.backbones.timm_vit import (
    POOLING,
    input_size,
    mlp_parts,
    mlp_parts_of,
    readouts,
    register_rules,
)
from peft_vision.layers.absent import Absent
from peft_vision.layers.attention_parts import AttentionParts, halves
from peft_vision.layers.block import BlockParts, attention_half, attention_of, mlp_half
from peft_vision.layers.trunk import blocks_in, trunk_in

MODULES = ("timm.models.eva",)

SEPARATE = ("q_proj", "k_proj", "v_proj")


def rotate(attention: nn.Module, heads: Tensor, rope: Any) -> Tensor:
    """Rotate the patches of queries or keys (B H N D) by a table of sines and cosines."""
    from timm.layers import apply_rot_embed_cat

    module: Any = attention
    # The table is of the patches: what comes before them may have been left out, or added to.
    prefix = heads.shape[2] - rope.shape[-2]
    turned = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=module.rotate_half)
    return torch.cat([heads[:, :, :prefix], turned], dim=2)


def mates(attention: nn.Module, width: int) -> list[int]:
    """Neighbors turn with each other, or the features of one half with those of the other."""
    module: Any = attention
    return halves(width) if module.rotate_half else [i ^ 1 for i in range(width)]


def why_not(model: Any) -> str:
    """What keeps the model from being understood in full; empty when nothing does."""
    from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm

    if not isinstance(model, Eva):
        return f"{type(model).__name__} is not timm's Eva"
    blocks: list[Any] = [block for _, _, block in blocks_in(model.blocks)]
    for block in blocks:
        if type(block) not in (EvaBlock, EvaBlockPostNorm):
            return f"its blocks are of class {type(block).__name__}"
        if mlp_parts(block.mlp) is None and whole_mlp([block], "mlp") is not None:
            return f"its MLPs are of class {type(block.mlp).__name__}"
    return lacking(model.blocks, _parts(blocks)) if blocks else "it has no blocks"


def _parts(blocks: Sequence[nn.Module]) -> BlockParts:
    # Blocks that normalize after their branches have no scale.
    scaled = getattr(blocks[0], "gamma_1", ABSENT) is not ABSENT
    parts = BlockParts(
        norm1="norm1",
        attention="attn",
        after1=("gamma_1", "drop_path1") if scaled else ("drop_path1",),
        norm2="norm2",
        mlp="mlp",
        after2=("gamma_2", "drop_path2") if scaled else ("drop_path2",),
        attention_parts=AttentionParts(qkv=("qkv",), out="proj"),
        mlp_parts=mlp_parts_of(blocks),
        rope="rope",
    )
    whole = _whole_attention(blocks, parts)
    return parts if whole is None else replace(parts, attention_parts=_attention_parts(whole))


def _whole_attention(blocks: Sequence[nn.Module], parts: BlockParts) -> nn.Module | None:
    """The first attention that was not removed."""
    found = (attention_of(block, parts) for block in blocks)
    return next((module for module in found if not isinstance(module, Absent)), None)


def _attention_parts(attention: Any) -> AttentionParts:
    from timm.layers import AttentionRope

    has_groups = isinstance(attention, AttentionRope)
    fused = attention.qkv is not None
    return AttentionParts(
        qkv=("qkv",) if fused else SEPARATE,
        out="proj",
        biases=("q_bias", "k_bias", "v_bias") if fused and not has_groups else None,
        q_norm="q_norm",
        k_norm="k_norm",
        norm="norm",
        gate="gate",
        heads=("num_heads", "num_kv_heads") if has_groups else ("num_heads",),
        width=("attn_dim", "kv_dim") if has_groups else (),
        dropout="attn_drop",
        out_dropout="proj_drop",
        rotate=rotate,
        mates=mates,
        unrotated="num_prefix_tokens",
    )


def view(model: Any) -> Backbone:
    """See the model as sites."""
    from timm.layers import AttentionRope
    from timm.models.eva import Eva

    register_rules()
    blocks = [block for _, _, block in blocks_in(model.blocks)]
    parts = _parts(blocks)
    # EvaAttention reshapes its heads to the width of the stream: removing one would break it.
    opens = not isinstance(_whole_attention(blocks, parts), AttentionRope)
    missing = _missing(model, parts)
    unplaced = _timm_positions.why_not(model, Eva)
    sites = _without(missing, assemble(model.blocks, parts, opens=opens))
    pool = layers_in(model.attn_pool, is_linear, "pool", "pool") if model.attn_pool else ()
    return Backbone(
        model=model,
        family="timm_eva",
        input_size=input_size(model),
        blocks=sites.blocks,
        linears=(*sites.linears, *pool),
        convs=(LayerSite("patch", model.patch_embed, "proj", "patch"),),
        heads=sites.heads,
        hidden=sites.hidden,
        tokens=None if "tokens" in missing else _tokens(model, parts),
        positions=None if unplaced else _positions(model),
        width=None if "width" in missing else _timm_width.site(model, parts, opens=opens),
        classifier=last_layers(model, "head"),
        readouts=readouts(model, "head"),
        missing={**missing, "positions": unplaced} if unplaced else missing,
        bypasses=bypasses_in(model),
        bypassed=is_bypassed(model),
    )


def _missing(model: Any, parts: BlockParts) -> dict[str, str]:
    """Kind of site -> why this variant has none."""
    from timm.models.eva import EvaBlock

    found = [block for _, _, block in blocks_in(model.blocks)]
    if model.rope_mixed:
        reason = "each block and head has rotary frequencies of its own, kept outside of the blocks"
        return dict.fromkeys(("blocks", "heads", "tokens", "width"), reason)
    if any(getattr(attention_of(b, parts), "num_kv_groups", 1) != 1 for b in found):
        reason = "several query heads share keys and values (grouped-query attention)"
        return dict.fromkeys(("heads", "tokens", "width"), reason)
    if any(type(block) is not EvaBlock for block in found):
        return dict.fromkeys(("tokens", "width"), "its blocks normalize after the branches")
    return {}


def _without(missing: dict[str, str], sites: Assembly) -> Assembly:
    kinds = {kind: () for kind in missing if kind not in ("tokens", "width")}
    return replace(sites, **kinds)


def _tokens(model: Any, parts: BlockParts) -> TokensSite:
    return TokensSite(
        key="tokens",
        owner=model,
        attribute="blocks",
        parts=parts,
        class_tokens=int(model.cls_token is not None),
        register_tokens=int(model.num_prefix_tokens) - int(model.cls_token is not None),
        pooling=POOLING.get(model.global_pool, "other"),
    )


def rope(model: Any, images: Tensor) -> Any:
    """The rotary tables of the images' grid: N D, or one of heads x N x D for each block."""
    from timm.layers import RotaryEmbeddingCat

    rows, columns = model.patch_embed.patch_size
    grid = (images.shape[-2] // rows, images.shape[-1] // columns)
    tables, fixed = model.rope, getattr(model.rope, "feat_shape", None)
    if fixed is not None and grid == tuple(fixed):
        return tables.get_embed()
    if fixed is not None and isinstance(tables, RotaryEmbeddingCat):
        # One that keeps its table never makes another. Clones are numbers that a tracer can follow.
        tables = copy.deepcopy(tables, {id(buffer): buffer.clone() for buffer in tables.buffers()})
        tables.update_feat_shape(grid)
        return tables.get_embed()
    return tables.get_embed(shape=list(grid))


def encode(model: Any, tokens: Tensor, rope: Any) -> Tensor:
    """The tokens behind the final norm, B N D.

    The blocks leave a fixed number of first tokens unrotated. Where there are not as many, the
    blocks are run from their parts.
    """
    x = model.norm_pre(tokens)
    if model.rope_mixed or x.shape[1] - rope.shape[-2] != model.num_prefix_tokens:
        x = _block_by_block(model, x, rope)
    else:
        x = run(model.blocks, x, recompute=model.grad_checkpointing, rope=rope)
    return _timm_positions.final_norm(model, x)


ROTARY = replace(_timm_positions.PARTS, encode=encode, rope=rope)


def _block_by_block(model: Any, x: Tensor, rope: Any) -> Tensor:
    trunk = trunk_in(model.blocks)
    recompute = model.grad_checkpointing or (trunk is not None and trunk.checkpointing)
    opened = x.shape[1] - rope.shape[-2] != model.num_prefix_tokens
    for depth, (_, _, block) in enumerate(blocks_in(model.blocks)):
        table = rope[depth] if model.rope_mixed else rope
        if recompute and torch.is_grad_enabled():
            x = checkpoint(_one_block, block, x, table, opened, use_reentrant=False)
        else:
            x = _one_block(block, x, table, opened)
    return x


def _one_block(block: nn.Module, x: Tensor, rope: Tensor, opened: bool) -> Tensor:
    if not opened:
        done: Tensor = block(x, rope=rope)
        return done
    parts = _parts([block])
    return mlp_half(block, parts, attention_half(block, parts, x, rope).x)[0]


def _positions(model: Any) -> PositionsSite:
    from timm.models.eva import EvaBlock

    if model.rope is None:
        return _timm_positions.site(model, _timm_positions.PARTS)
    found = [block for _, _, block in blocks_in(model.blocks)]
    stays = ""
    if any(type(block) is not EvaBlock for block in found):
        stays = "its blocks, which normalize after the branches, rotate what comes after"
    elif any(getattr(attention_of(b, _parts([b])), "num_kv_groups", 1) != 1 for b in found):
        stays = "its blocks, whose heads share keys and values, rotate what comes after"
    return _timm_positions.site(model, ROTARY, stays)
