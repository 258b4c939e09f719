"""What ``peft-vision show --importance`` prints: a map of blocks by heads, and who agrees."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from peft_vision.importance import Importance


@dataclass(frozen=True)
class Asked:
    """The options of ``show`` that are about importance.

    Attributes:
        kind: of the members to score; None: nothing was asked. `scores`: names between commas.
        data: images to score on, at most `images` of them. `output`: a file to draw into.
    """

    kind: str | None
    data: str | None
    images: int
    scores: str | None
    output: Path | None

    @property
    def names(self) -> list[str] | None:
        """Names of the scores; None for all."""
        if self.scores is None:
            return None
        return [name.strip() for name in self.scores.split(",") if name.strip()]

    def check(self) -> None:
        """Refuse what cannot work before a model is loaded.

        Raises:
            BadSetting: the kind of member is not known, no data was named, or an option has no use.
            UnknownName: there is no such score.
        """
        from peft_vision.errors import BadSetting

        if self.kind is None:
            given = {"--data": self.data, "--scores": self.scores, "--output": self.output}
            idle = [option for option, value in given.items() if value is not None]
            if idle:
                raise BadSetting(f"{idle[0]} is read with --importance heads only.")
            return
        from peft_vision.importance import find
        from peft_vision.report.heads_map import require_format

        if self.kind != "heads":
            raise BadSetting(f"importance is {self.kind!r}; possible: heads.")
        if self.data is None:
            raise BadSetting("Importance is measured on images. Name a folder of them: --data DIR.")
        for name in self.names or ():
            find(name)
        if self.output is not None:
            require_format(self.output)


def show_importance(model: nn.Module, asked: Asked, *, as_json: bool) -> None:
    """Score, draw where asked to, and print.

    Raises:
        UnsupportedSite: the model has no heads, or a score named cannot be computed for it.
        DataError: there are no images.
    """
    from rich.console import Console

    from peft_vision.importance import scores
    from peft_vision.report.heads_map import write_heads_map

    found = scores(model, str(asked.data), asked.names, images=asked.images)
    content = found.to_json()
    if asked.output is not None:
        write_heads_map(asked.output, content["mean_rank"], content["kendall"])
    if as_json:
        typer.echo(json.dumps(content))
        return
    console = Console()
    mean = f"Mean rank of {', '.join(found.scores)} on {found.images} images; 99 is kept first:"
    console.print(mean, highlight=False)
    console.print(_map(found))
    console.print(_table(found))
    for note in found.notes:
        console.print(note, highlight=False)
    if asked.output is not None:
        console.print(f"Drawn to {asked.output}", highlight=False)


def _map(found: Importance) -> Table:
    """A cell for each head, dark where it should be kept."""
    from rich.table import Table
    from rich.text import Text

    rank = found.rank.tolist()
    table = Table("block ", *(f"{head:2} " for head in range(len(rank[0]))), box=None, padding=0)
    for block, row in enumerate(rank):
        cells = [Text(" ") if math.isnan(v) else Text(f"{99 * v:2.0f} ", _shade(v)) for v in row]
        table.add_row(str(block), *cells)
    return table


def _shade(value: float) -> str:
    """White to blue; the text stays readable on both."""
    red, green, blue = (round(255 + value * (end - 255)) for end in (8, 69, 148))
    return f"{'white' if value > 0.5 else 'black'} on rgb({red},{green},{blue})"


def _table(found: Importance) -> Table:
    """Agreement of each score with leaving heads out, and the heads that it ranks lowest."""
    from rich.table import Table

    from peft_vision.importance import Importance

    agreement = found.agreement()
    table = Table("score", "Kendall's tau", "lowest heads (block.head)")
    every = {name: Importance({name: s}, found.images) for name, s in found.scores.items()}
    for name, one in {**every, "mean rank": found}.items():
        tau = agreement.get(name)
        said = "-" if tau is None or math.isnan(tau) else f"{tau:+.2f}"
        lowest = " ".join(f"{block}.{head}" for block, head in one.lowest(5))
        table.add_row(name, said, lowest)
    return table
