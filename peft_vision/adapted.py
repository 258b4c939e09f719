"""A model with adapters: a PeftModel that proves that every adapter trains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from peft_vision.artifact import ADAPTER, WEIGHTS, read_weights, write_record, write_weights
from peft_vision.backbones import view
from peft_vision.cost import example_input_of, input_size, measure, twin
from peft_vision.errors import DamagedArtifact, GradientMissing
from peft_vision.files import staged_folder, writing
from peft_vision.history import History
from peft_vision.hub import push_model


class AdaptedModel(peft.PeftModel):
    """A backbone with PEFT adapters; calls like the model that went in.

    Attributes:
        history: where it came from and what was done.
    """

    def __init__(
        self, model: nn.Module, config: peft.PeftConfig, history: History, **kwargs: Any
    ) -> None:
        with warnings.catch_warnings():
            # PEFT still asks transformers models by the old name of their checkpointing switch.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            super().__init__(model, config, **kwargs)
        self.history = history

    @property
    def plain_model(self) -> nn.Module:
        """The module inside, with its adapters in place."""
        inner: nn.Module = self.base_model.model
        return inner

    def save_pretrained(
        self, save_directory: str | Path, *, overwrite: bool = False, **kwargs: Any
    ) -> None:
        """Save the adapter as a plain PEFT folder, with `peft_vision.json` and a model card.

        Where the base's structure was changed too, its weights are saved beside the adapter.

        Args:
            save_directory: the folder.
            overwrite: replace a folder that is there already.
            kwargs: what PEFT takes; with any of them (as a Trainer passes for its checkpoints) the
                files are put into the folder as it is.

        Raises:
            OutputExists: the folder holds something and `overwrite` is off.
            CannotWrite: the disk is full; an older folder is intact.
        """
        folder = Path(save_directory)
        if kwargs:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._write(folder, **kwargs)
            return
        with staged_folder(folder, overwrite=overwrite) as stage:
            self._write(stage)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save and upload; see `peft_vision.hub.push_model`."""
        return push_model(self, repo_id, **kwargs)

    def _write(self, folder: Path, **kwargs: Any) -> None:
        if not kwargs.get("is_main_process", True):
            return
        # "auto" would ask the Hub for the base's vocabulary.
        super().save_pretrained(str(folder), save_embedding_layers=False, **kwargs)
        if self.history.changed_structure:
            write_weights(folder / WEIGHTS, self.plain_model.state_dict())
        kind = "compressed" if self.history.changed_structure else "adapter"
        write_record(folder, kind, self.history, self._cost(), self.plain_model)

    def _cost(self) -> dict[str, Any] | None:
        return measure(self.plain_model).to_json() if view(self.plain_model).input_size else None


def load_adapter_weights(model: AdaptedModel, folder: Path) -> None:
    """Put the adapter's tensors of a folder into `model`; every one has to find its place."""
    result = set_peft_model_state_dict(model, read_weights(folder / ADAPTER))
    if result.unexpected_keys:
        raise DamagedArtifact(f"{folder} holds adapter tensors without a place: {result}.")


USUAL_SIZE = 224


def prove_gradient(model: AdaptedModel, image_size: tuple[int, int] | int | None = None) -> int:
    """Prove that every adapter receives gradient, by a forward and backward pass on `meta`.

    No memory is used and no number is read: what is shown is that each trainable tensor is part of
    the computation. Some families read a linear's weight instead of calling it, and adapters on
    them would be silent; trained parts beside them (a head) would still learn.

    Args:
        image_size: for models that do not say theirs; 224 is tried then.

    Returns:
        How many trainable tensors were proven.

    Raises:
        GradientMissing: some are not reached, by name; or the proof cannot be made.
    """
    meta = twin(model.plain_model)
    said = view(meta).input_size
    size = input_size(meta, image_size or (None if said else USUAL_SIZE))
    try:
        with torch.enable_grad():
            torch.autograd.backward(_total(meta.train()(example_input_of(meta, size))))
    except (RuntimeError, ValueError, TypeError) as error:
        raise GradientMissing(
            f"Whether the adapters train could not be shown: one image of {size} fails in "
            f"{type(model.plain_model).__name__} ({error}). Pass image_size=(H, W)."
        ) from error
    wanted = [(n, p) for n, p in meta.named_parameters() if p.requires_grad]
    silent = [name for name, p in wanted if p.grad is None]
    if silent or not wanted:
        raise GradientMissing(
            f"{len(silent)} of {len(wanted)} trainable tensors would receive no gradient, first "
            f"{', '.join(silent[:3]) or 'none'}. {type(model.plain_model).__name__} does not call "
            "these layers in its forward pass; choose other targets."
        )
    return len(wanted)


def _total(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output.sum()
    tensors = output.values() if isinstance(output, Mapping) else output
    parts = [t.sum() for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack(parts).sum()
