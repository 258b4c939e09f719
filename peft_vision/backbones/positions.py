"""Where a backbone keeps the positions of its patches, and how its sequence is made and encoded.

A family says once, by names and module-level functions, what takes part; methods that act on
positions and the joint forward pass of several images stand on that.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_vision.layers.positions import Grid, TypeRows, resized, without_rows
from peft_vision.layers.trunk import Trunk, trunk_in

RELATIVE = re.compile("rel_pos|relative_position|position_bias|cpb_mlp")
"""What timm and transformers call positions that are biases between pairs of patches."""


@dataclass(frozen=True)
class PositionParts:
    """How a family makes its sequence: functions of the site's model.

    Attributes:
        patches: images B 3 H W of any size -> embedded patches B N D, without positions.
        prefix: the tokens before the patches, with their positions: 1 P D; None: there are none.
        encode: (tokens B N D, rotary tables) -> what the final norm gives, B N D.
        resize: tell the model its new grid; the table of positions is resized already.
        rope: images -> the rotary tables of their grid, as the blocks take them: ... N D.
    """

    patches: Callable[[Any, Tensor], Tensor]
    prefix: Callable[[Any], Tensor | None]
    encode: Callable[[Any, Tensor, Any], Tensor]
    resize: Callable[[Any, Grid], None]
    rope: Callable[[Any, Tensor], Any] | None = None


@dataclass(frozen=True)
class PositionsSite:
    """The positions of the patches.

    Attributes:
        model: what the functions of `parts` take.
        owner: holds, under `attribute`, the module after which a row can be added to the patches:
            what it gives holds the embedded sequence, the table, or a map of patches.
        container: (owner, attribute) of the list of blocks.
        grid: rows and columns of the patches of the model's own images.
        patch: height and width of a patch in pixels.
        prefix: how many tokens come before the patches.
        width: of the stream.
        table: (owner, attribute) of the table of positions; None where they are rotary only.
        leading: how many rows of the table belong to tokens before the patches.
        bias: (owner, attribute) of a convolution whose bias reaches the patches unchanged.
        channels_first: the module gives a map B D H W.
        stays: why the family cannot leave the tokens before the patches out; empty when it can.
    """

    key: str
    model: nn.Module
    parts: PositionParts
    owner: nn.Module
    attribute: str
    container: tuple[nn.Module, str]
    grid: Grid
    patch: Grid
    prefix: int
    width: int
    table: tuple[nn.Module, str] | None = None
    leading: int = 0
    bias: tuple[nn.Module, str] | None = None
    channels_first: bool = False
    stays: str = ""

    @property
    def types(self) -> TypeRows | None:
        """The type rows that are in place, if any are."""
        module = getattr(self.owner, self.attribute)
        return module if isinstance(module, TypeRows) else None

    @property
    def joint(self) -> bool:
        """Whether the sequence holds the patches of several images."""
        return self.types is not None and len(self.types.grids) > 1

    @property
    def reduces(self) -> bool:
        """Whether tokens leave on the way through the blocks."""
        trunk = self._trunk()
        return trunk is not None and not trunk.plain

    @property
    def kept(self) -> str:
        """Why the tokens before the patches cannot be left out as things are; empty if they can."""
        trunk = self._trunk()
        if self.parts.rope is not None and self.prefix and trunk is not None and trunk.prompts:
            return "learned prompts stand behind them, and its blocks rotate what comes after"
        return self.stays

    def rows(self) -> Tensor | None:
        """The table's rows of the patches, N D; None where there is no table."""
        whole = self._whole()
        return None if whole is None else whole.flatten(0, -2)[self.leading :]

    def resize(self, grid: Grid) -> None:
        """Have the model take images of another grid, in place; the table is resized bicubically.

        The site itself is of the old grid: view the model again.
        """
        whole = self._whole()
        if whole is not None:
            flat = whole.detach().flatten(0, -2)
            patches = resized(flat[self.leading :], self.grid, grid)
            table = torch.cat([flat[: self.leading], patches])
            self._put(table.reshape(*whole.shape[:-2], -1, whole.shape[-1]))
        self.parts.resize(self.model, grid)

    def add(self, row: Tensor) -> bool:
        """Add a row D to every patch for good: to the table, else to a bias.

        Returns:
            Whether there was a place for it.
        """
        with torch.no_grad():
            rows = self.rows()
            if rows is not None:
                rows.add_(row.to(rows))
                return True
            bias = None if self.bias is None else getattr(getattr(*self.bias), "bias", None)
            if bias is not None:
                bias.add_(row.to(bias))
        return bias is not None

    def _trunk(self) -> Trunk | None:
        owner, attribute = self.container
        return trunk_in(getattr(owner, attribute))

    def _whole(self) -> Tensor | None:
        return None if self.table is None else getattr(*self.table)

    def _put(self, table: Tensor) -> None:
        if self.table is None:
            return
        owner, name = self.table
        old = getattr(owner, name)
        if isinstance(old, nn.Parameter):
            setattr(owner, name, nn.Parameter(table, requires_grad=old.requires_grad))
        else:
            setattr(owner, name, table)


def run(blocks: nn.Module, x: Tensor, *, recompute: bool = False, **kwargs: Any) -> Tensor:
    """The stream B N C through the blocks of a container, each called as the model calls it.

    Args:
        recompute: keep each block's input only, for blocks that do not do so themselves.
    """
    for block in blocks.children():
        if recompute and torch.is_grad_enabled() and not isinstance(block, Trunk):
            x = checkpoint(block, x, use_reentrant=False, **kwargs)
        else:
            x = block(x, **kwargs)
    return x


def set_config_size(model: nn.Module, side: int) -> None:
    """Tell a transformers model the side of its images, in pixels.

    Its configuration is copied first: models that were made from one configuration share it.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None:
            module.config = copy.deepcopy(config, memo)
    config = vars(model)["config"]
    getattr(config, "vision_config", config).image_size = side


def plain(owner: nn.Module, attribute: str) -> tuple[nn.Module, str]:
    """Where the module is whose place type rows may have taken."""
    module = getattr(owner, attribute)
    return (owner, attribute) if without_rows(module) is module else (module, "inner")


def relative(model: nn.Module) -> str:
    """Which positions of `model` are biases between pairs of patches, in words; empty if none."""
    for owner in model.modules():
        held = {**dict(owner.named_children()), **dict(owner.named_parameters(recurse=False))}
        found = next((name for name in held if RELATIVE.search(name)), None)
        if found is not None:
            return (
                f"its positions are biases between pairs of patches ({found} of "
                f"{type(owner).__name__}), which belong to one grid and to one image"
            )
    return ""
