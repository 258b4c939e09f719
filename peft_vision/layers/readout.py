"""What reads a backbone's features: it stands where a classifier does, and is seen as one.

Plain modules, usable on their own: a pooled readout takes B D, a dense one tokens B N D and the
grid that they form. They compute in their own dtype (float32 where the backbone's is narrower),
and what dense ones return is float32 or wider.

Boxes and their parametrization: Lin et al., "Tracking Meets LoRA" (LoRAT, ECCV 2024); projection
heads that are dropped after training: Chen et al., "SimCLR" (ICML 2020).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.ownership import matched

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation_of(name: str) -> nn.Module:
    """An activation by name.

    Raises:
        BadSetting: there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise BadSetting(f"activation is {name!r}; possible: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()


def perceptron(
    inputs: int, outputs: int, *, layers: int = 3, hidden: int | None = None, activation: str
) -> nn.Sequential:
    """Linear layers with activations between them: inputs -> hidden -> ... -> outputs.

    Args:
        hidden: width between the layers; None: `inputs`.
    """
    widths = [inputs, *[hidden or inputs] * (layers - 1), outputs]
    parts: list[nn.Module] = []
    for place, (before, after) in enumerate(itertools.pairwise(widths)):
        parts += [activation_of(activation)] if place else []
        parts.append(nn.Linear(before, after))
    return nn.Sequential(*parts)


class Readout(nn.Module, ABC):
    """A head of ours. Views see it as one classifier and never look for sites inside.

    Attributes:
        inputs: width of the features that it reads, D.
        outputs: how many numbers it makes of one image, or of one place of it.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs

    @property
    def leaves(self) -> bool:
        """Whether a part of it serves training alone, and goes when training is over."""
        return False

    def settle(self) -> None:
        """Drop what serves training alone, in place."""

    def draw(self, std: float) -> None:
        """First values: truncated normal weights of this deviation, zero biases."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def is_readout(layer: nn.Module) -> bool:
    """A readout, or PEFT's wrapper around one."""
    inner = getattr(layer, "original_module", None)
    return isinstance(layer, Readout) or isinstance(inner, Readout)


class LinearReadout(Readout):
    """A norm and a linear layer: B D -> B outputs."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs)
        self.norm = nn.LayerNorm(inputs)
        self.linear = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of pooled features."""
        result: Tensor = self.linear(self.norm(matched(x, self.linear.weight)))
        return result


class PooledReadout(Readout):
    """An MLP on pooled features: B D -> B outputs.

    With a projection, what is returned while training is the projection of the outputs (B P); in
    evaluation mode it is the outputs themselves.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        layers: int = 3,
        hidden: int | None = None,
        activation: str = "gelu",
        projection: int | None = None,
    ) -> None:
        super().__init__(inputs, outputs)
        self.layers = perceptron(
            inputs, outputs, layers=layers, hidden=hidden, activation=activation
        )
        self.projection = (
            perceptron(outputs, projection, layers=2, activation=activation) if projection else None
        )
        self.register_load_state_dict_pre_hook(_without_projection)  # type: ignore[no-untyped-call]

    @property
    def leaves(self) -> bool:
        """Whether there is a projection."""
        return self.projection is not None

    def settle(self) -> None:
        """Drop the projection."""
        self.projection = None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of pooled features."""
        result: Tensor = self.layers(matched(x, _first(self.layers)))
        if self.projection is not None and self.training:
            result = self.projection(result)
        return result


def _without_projection(
    module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """A projection that the stored weights do not hold was dropped when they were stored."""
    own = {name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)}
    if isinstance(module, PooledReadout) and "layers" in own and "projection" not in own:
        module.settle()


class DenseReadout(Readout):
    """A readout of every patch.

    Attributes:
        grid: rows and columns of the patches, where the caller does not say.
        prefix: how many tokens may come before the patches; they are not read.
    """

    def __init__(
        self, inputs: int, outputs: int, *, grid: tuple[int, int] | None = None, prefix: int = 0
    ) -> None:
        super().__init__(inputs, outputs)
        self.grid = grid
        self.prefix = prefix

    @abstractmethod
    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Any:
        """Read tokens B N D that form `grid` (rows, columns), row by row from the top left."""

    def patches(
        self, tokens: Tensor, grid: tuple[int, int] | None
    ) -> tuple[Tensor, tuple[int, int]]:
        """The patches among the tokens, and their grid.

        Raises:
            UnsupportedSite: the number of tokens does not fit the grid.
        """
        rows, columns = grid or self.grid or _square(tokens.shape[1] - self.prefix)
        before = tokens.shape[1] - rows * columns
        if before not in (0, self.prefix):
            raise UnsupportedSite(
                f"{tokens.shape[1]} tokens do not form a grid of {rows} x {columns} patches behind "
                f"{self.prefix} others. Pass the grid (rows, columns) that they form."
            )
        return tokens[:, before:], (rows, columns)


def _square(count: int) -> tuple[int, int]:
    side = math.isqrt(max(count, 0))
    return side, side


class Boxes(NamedTuple):
    """What a box readout returns.

    Attributes:
        scores: logits, B H W.
        boxes: x1, y1, x2, y2 as shares of the image's width and height, B H W 4; they may leave
            [0, 1].
    """

    scores: Tensor
    boxes: Tensor


class BoxReadout(DenseReadout):
    """A score and a box at every patch, by two independent MLPs: B N D -> B H W and B H W 4.

    The box MLP's four outputs v give the distances (l, t, r, b) = sigmoid(v) of the sides from the
    middle of the patch, in units of the whole image.
    """

    def __init__(
        self,
        inputs: int,
        *,
        layers: int = 3,
        hidden: int | None = None,
        activation: str = "gelu",
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
    ) -> None:
        super().__init__(inputs, 5, grid=grid, prefix=prefix)
        self.score, self.box = (
            perceptron(inputs, width, layers=layers, hidden=hidden, activation=activation)
            for width in (1, 4)
        )

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Boxes:
        """Scores and boxes, float32 or wider."""
        patches, (rows, columns) = self.patches(tokens, grid)
        patches = matched(patches, _first(self.score))
        scores, sides = _wide(self.score(patches)), _wide(self.box(patches)).sigmoid()
        boxes = around_centers(sides.reshape(-1, rows, columns, 4))
        return Boxes(scores.reshape(-1, rows, columns), boxes)


def around_centers(sides: Tensor) -> Tensor:
    """Boxes x1 y1 x2 y2 from the distances left, top, right, bottom of the middle of each cell.

    Args:
        sides: B H W 4, in units of the whole image.
    """
    rows, columns = sides.shape[1:3]
    y = (torch.arange(rows, device=sides.device, dtype=sides.dtype) + 0.5) / rows
    x = (torch.arange(columns, device=sides.device, dtype=sides.dtype) + 0.5) / columns
    left, top, right, bottom = sides.unbind(-1)
    return torch.stack((x - left, y[:, None] - top, x + right, y[:, None] + bottom), dim=-1)


class MaskReadout(DenseReadout):
    """Logits of every class at every patch: B N D -> B C H W.

    Attributes:
        size: height and width to interpolate the logits to, bilinearly; None: the grid of patches.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        layers: int = 3,
        hidden: int | None = None,
        activation: str = "gelu",
        grid: tuple[int, int] | None = None,
        prefix: int = 0,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(inputs, outputs, grid=grid, prefix=prefix)
        self.layers = perceptron(
            inputs, outputs, layers=layers, hidden=hidden, activation=activation
        )
        self.size = size

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Logits, float32 or wider."""
        patches, (rows, columns) = self.patches(tokens, grid)
        logits = _wide(self.layers(matched(patches, _first(self.layers))))
        maps = logits.transpose(1, 2).reshape(-1, self.outputs, rows, columns)
        if self.size is not None:
            maps = functional.interpolate(maps, self.size, mode="bilinear", align_corners=False)
        return maps


def _first(layers: nn.Sequential) -> Tensor:
    weight: Tensor = layers[0].weight  # type: ignore[assignment]
    return weight


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
