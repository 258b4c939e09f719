"""`transformers.Trainer` for a task on images, made to resume bit-exactly.

Whatever is random is a function of the seed and of *where* the run is, never of what ran before:
the batch order of (seed, epoch), the augmentation of (seed, epoch, index), dropout of (seed, step,
rank). So no state of a random number generator is saved, and a resumed run cannot drift.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

from peft_vision.data.epoch_dataset import EpochDataset
from peft_vision.files import writing
from peft_vision.layers.traits import penalties
from peft_vision.tasks.task import Task
from peft_vision.training import checkpoints
from peft_vision.training.batches import GlobalBatches

_SPEEDS = ("_runtime", "_per_second", "_preparation_time")


class VisionTrainer(Trainer):
    """Minimizes a task's losses plus the penalties that the model's own layers declare.

    Args:
        model: called by the task.
        task: losses, predictions and metrics.
        arguments: of `transformers`.
        train_set, validation_set: samples that the task can collate.
        keep: how many checkpoints stay.
    """

    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        arguments: TrainingArguments,
        train_set: Dataset[Any],
        validation_set: Dataset[Any] | None,
        keep: int,
    ) -> None:
        self.task, self.keep = task, keep
        self.parts: dict[str, Tensor] = {}
        self.evaluated: tuple[int, dict[str, float]] | None = None
        super().__init__(
            model=model,
            args=arguments,
            data_collator=task.collate,
            train_dataset=train_set,
            eval_dataset=validation_set,
            compute_metrics=self._figures,
        )
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.batches = GlobalBatches(
            len(train_set),  # type: ignore[arg-type]
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
            arguments.process_index,
            arguments.world_size,
            arguments.seed,
        )
        self.add_callback(_Placed(self.batches, train_set, arguments.seed, arguments.process_index))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process; the share is cut by `GlobalBatches` and not by accelerate."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of all losses and penalties of a batch; each is noted for the log."""
        losses = self.task.losses(model, inputs)
        declared = penalties(self.model)
        if declared:
            losses = {**losses, "penalty": torch.stack([term.float() for term in declared]).sum()}
        for name, value in losses.items():
            scaled = value.detach() / self.args.gradient_accumulation_steps
            self.parts[name] = self.parts.get(name, torch.zeros_like(scaled)) + scaled
        total = torch.stack([value.float() for value in losses.values()]).sum()
        return (total, None) if return_outputs else total

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Outputs and targets of a batch, as the task has them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs, targets = self.task.predict(model, inputs)
        return None, outputs.detach(), targets.detach()

    def figures(self) -> dict[str, float]:
        """The validation figures at the step where the run is, evaluated at most once.

        The names are the task's own; empty without a validation set.
        """
        if self.eval_dataset is None:
            return {}
        if self.evaluated is None or self.evaluated[0] != self.state.global_step:
            self.evaluate()
        return {} if self.evaluated is None else self.evaluated[1]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate and note the figures together with the step."""
        found: dict[str, float] = super().evaluate(*args, **kwargs)
        named = {name.removeprefix("eval_"): float(value) for name, value in found.items()}
        kept = {k: v for k, v in named.items() if k != "epoch" and not f"_{k}".endswith(_SPEEDS)}
        self.evaluated = (self.state.global_step, kept)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand figures to the callbacks; the log file keeps them, not every checkpoint."""
        if "train_runtime" in logs:
            return
        if "loss" in logs and len(self.parts) > 1:
            logs |= {f"loss_{name}": value.item() for name, value in self.parts.items()}
        self.parts = {}
        logs = {name: value for name, value in logs.items() if not name.endswith(_SPEEDS)}
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and kernels decay; biases, norms, scales, tokens and position tables do not."""
        return [name for name, parameter in model.named_parameters() if _decays(name, parameter)]

    def _figures(self, prediction: EvalPrediction) -> dict[str, float]:
        outputs, targets = prediction.predictions, prediction.label_ids
        return self.task.metrics(torch.as_tensor(outputs), torch.as_tensor(targets))

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self.args.should_save:
            plain = self.accelerator.unwrap_model(self.model)
            checkpoints.save_tensors(plain, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        plain = self.accelerator.unwrap_model(model or self.model)
        checkpoints.load_tensors(plain, Path(resume_from_checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing to save: see the head of this file."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: see the head of this file."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with writing(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run_dir = Path(self.args.output_dir)
            checkpoints.seal(run_dir / f"{checkpoints.PREFIX}{self.state.global_step}")
            checkpoints.rotate(run_dir, self.keep)


class _Placed(TrainerCallback):
    """Tells order, augmentation and dropout where the run is."""

    def __init__(
        self, batches: GlobalBatches, train_set: Dataset[Any], seed: int, rank: int
    ) -> None:
        self.batches, self.train_set, self.seed, self.rank = batches, train_set, seed, rank

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the epoch of the batch order and of the augmentation."""
        epoch = state.global_step // self.batches.steps
        self.batches.set_epoch(epoch)
        if isinstance(self.train_set, EpochDataset):
            self.train_set.set_epoch(epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed dropout and its like for one optimizer step."""
        place = random.Random(f"{self.seed}/{state.global_step}/{self.rank}").getrandbits(63)
        torch.manual_seed(place)
        random.seed(place)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    table = parameter.ndim == 3 and parameter.shape[0] == 1
    return parameter.ndim >= 2 and not table and not name.endswith("bias")
