"""Several images through one backbone in one sequence, where every token sees every other.

The positions have to be decoupled: each image takes its part of one frozen table, and a trained
row says of which kind a token is (LoRAT; Lin et al., ECCV 2024). A tracker reads its template and
its search image this way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peft_vision.backbones import view
from peft_vision.backbones.joint import together
from peft_vision.backbones.positions import PositionsSite
from peft_vision.cost import unwrap
from peft_vision.errors import BadSetting, UnsupportedSite
from peft_vision.layers.positions import Grid, TypeRows


class Streams(nn.Module):
    """The joint forward pass of several image streams.

    Attributes:
        model: the model given; its modules are called, not its own forward.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare the joint pass.

        Args:
            model: an adapted, merged, compressed or plain model whose positions are decoupled.

        Raises:
            UnsupportedSite: they are not, or the backbone has none.
        """
        super().__init__()
        backbone = view(unwrap(model))
        backbone.require("positions")
        if backbone.positions is None or backbone.positions.types is None:
            raise UnsupportedSite(
                f"{type(backbone.core).__name__} takes one image: its positions are not decoupled. "
                "Wrap it first with the adapter that decouples them, and name the sides of the "
                "streams."
            )
        self.model = model
        self._site: PositionsSite = backbone.positions

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of the patches of each stream."""
        return self._types.grids

    @property
    def kinds(self) -> tuple[int, ...]:
        """How many kinds of tokens each stream has."""
        return self._types.kinds

    @property
    def patch(self) -> Grid:
        """Height and width of a patch in pixels."""
        return self._site.patch

    @property
    def _types(self) -> TypeRows:
        types = self._site.types
        if types is None:
            raise UnsupportedSite("The positions of this model are not decoupled any more.")
        return types

    def forward(
        self,
        images: Sequence[Tensor],
        kinds: Sequence[Tensor | None] | None = None,
        prefix: bool = False,
    ) -> list[Tensor]:
        """The tokens of each stream behind the final norm.

        Args:
            images: one batch per stream, B 3 H W of that stream's size.
            kinds: per stream, which kind each patch is of, whole numbers B h w on the grid of the
                patches; None: all of the first kind.
            prefix: have the model's class and register tokens in the sequence, too.

        Returns:
            B N D per stream, rows of patches from the top left; with `prefix` the tokens before
            the patches first (B P D).

        Raises:
            BadSetting: the images or kinds do not fit the streams.
            UnsupportedSite: tokens leave on the way, or those before the patches have to stay.
        """
        maps = list(kinds) if kinds is not None else [None] * len(images)
        self._check(images, maps)
        self._check_prefix(prefix)
        return together(self._site, self._types, images, maps, prefix=prefix)

    def _check(self, images: Sequence[Tensor], kinds: Sequence[Tensor | None]) -> None:
        grids, patch = self.grids, self.patch
        sizes = [(rows * patch[0], columns * patch[1]) for rows, columns in grids]
        found = [tuple(image.shape[-2:]) for image in images]
        if found != sizes or len({image.shape[0] for image in images}) != 1:
            raise BadSetting(
                f"The images are {[tuple(image.shape) for image in images]}; this model takes "
                f"{len(sizes)} of height and width {sizes}, all of one batch size."
            )
        if len(kinds) != len(grids):
            raise BadSetting(f"kinds has {len(kinds)} maps for {len(grids)} streams.")
        for stream, (given, grid) in enumerate(zip(kinds, grids, strict=True)):
            if given is not None:
                self._check_kinds(stream, given, (images[stream].shape[0], *grid))

    def _check_kinds(self, stream: int, given: Tensor, shape: tuple[int, ...]) -> None:
        count = self._types.kinds[stream]
        whole = not given.is_floating_point() and not given.is_complex()
        if tuple(given.shape) != shape or not whole:
            raise BadSetting(
                f"kinds of stream {stream} is {given.dtype} of {tuple(given.shape)}; it has to be "
                f"whole numbers below {count}, of {shape}."
            )
        # On an accelerator, and in a graph, to look at the numbers would mean to wait for them;
        # tensors of a kind of their own may have none.
        seen = given.device.type == "cpu" and not torch.compiler.is_compiling()
        seen = seen and type(given) is Tensor
        if seen and not 0 <= int(given.min()) <= int(given.max()) < count:
            raise BadSetting(
                f"kinds of stream {stream} goes from {int(given.min())} to {int(given.max())}; "
                f"the stream has {count} kinds, counted from 0."
            )

    def _check_prefix(self, prefix: bool) -> None:
        site, name = self._site, type(self._site.model).__name__
        if site.reduces:
            raise UnsupportedSite(
                f"{name} drops tokens on the way, and where those of several images stand would be "
                "lost. Use a model without token reduction."
            )
        if site.kept and not prefix:
            raise UnsupportedSite(
                f"{name} needs the tokens before the patches: {site.kept}. Call with prefix=True."
            )
