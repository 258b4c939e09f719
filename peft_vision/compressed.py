"""A model whose structure was changed, with the record of how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from peft_vision.artifact import WEIGHTS, write_record, write_weights
from peft_vision.backbones import view
from peft_vision.cost import measure
from peft_vision.files import staged_folder
from peft_vision.history import History
from peft_vision.hub import push_model


class CompressedModel(nn.Module):
    """A backbone after pruners or decomposers; calls like the model that went in.

    Attributes:
        plain_model: the plain module inside.
        history: where it came from and what was done.
    """

    def __init__(self, model: nn.Module, history: History) -> None:
        super().__init__()
        self.plain_model = model
        self.history = history

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the plain model returns."""
        return self.plain_model(*args, **kwargs)

    def print_trainable_parameters(self) -> None:
        """Say how many parameters are trained, of how many."""
        total = sum(p.numel() for p in self.parameters())
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        print(  # noqa: T201
            f"trainable params: {trained:,} || all params: {total:,} || "
            f"trainable%: {100 * trained / max(total, 1):.4f}"
        )

    def save_pretrained(self, save_directory: str | Path, *, overwrite: bool = False) -> None:
        """Save structure and weights; `peft_vision.load` rebuilds them from the folder alone.

        Raises:
            OutputExists: the folder holds something and `overwrite` is off.
            CannotWrite: the disk is full; an older folder is intact.
        """
        with staged_folder(Path(save_directory), overwrite=overwrite) as stage:
            write_weights(stage / WEIGHTS, self.plain_model.state_dict())
            sized = view(self.plain_model).input_size is not None
            after = measure(self.plain_model).to_json() if sized else None
            write_record(stage, "compressed", self.history, after, self.plain_model)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save and upload; see `peft_vision.hub.push_model`."""
        return push_model(self, repo_id, **kwargs)
