"""`transformers.Trainer` for a task on images, made to resume bit-exactly.

Whatever is random is a function of the seed and of *where* the run is, never of what ran before:
the batch order of (seed, epoch), the augmentation of (seed, epoch, index), dropout of (seed, step,
rank). So no state of a random number generator is saved, and a resumed run cannot drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerControl,
    TrainingArguments,
)

from peft_vision.files import writing
from peft_vision.layers.traits import penalties
from peft_vision.tasks.task import Task
from peft_vision.training import checkpoints, sharding
from peft_vision.training.accumulation import Accumulation
from peft_vision.training.batches import GlobalBatches
from peft_vision.training.out_of_memory import Batch, Fitting
from peft_vision.training.place import Placed
from peft_vision.training.processes import smallest

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
    is_fsdp_enabled: bool

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
        self.held: list[Batch] | None = None
        folder = Path(arguments.output_dir)
        self.fitting = Fitting("micro_batch", arguments.per_device_train_batch_size, folder)
        evaluated_at_once = arguments.per_device_eval_batch_size
        self.evaluation_fitting = Fitting("evaluation_batch", evaluated_at_once, folder)
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
        self.placed = Placed(self.batches, train_set, arguments.seed, arguments.process_index)
        self.add_callback(self.placed)

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
            scaled = value.detach() / self.current_gradient_accumulation_steps
            self.parts[name] = self.parts.get(name, torch.zeros_like(scaled)) + scaled
        total = torch.stack([value.float() for value in losses.values()]).sum()
        return (total, None) if return_outputs else total

    def training_step(
        self,
        model: nn.Module,
        inputs: Batch,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Hold micro-batches back until the last of an optimizer step, then do them all.

        So the step can be done again in smaller pieces where memory runs out in the middle of it.

        Raises:
            JobFailed: one image at a time does not fit, or processes cannot agree on less.
        """
        if self.held is None:
            self.held = []
            self._agree()
        self.held.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self.held = self.held, []
        noted, before = dict(self.parts), self.fitting.size

        def again() -> None:
            self.parts = dict(noted)
            self.placed.seed_at(self.state.global_step)

        sharded = self.is_fsdp_enabled
        how = Accumulation(self.fitting, self.accelerator, sharded, self._one_pass, again)
        loss = how.step(model, batches)
        if self.fitting.size < before:
            self._say(self.fitting, before)
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Outputs and targets of a batch, as the task has them.

        Raises:
            JobFailed: one image at a time does not fit.
        """
        before = self.evaluation_fitting.size
        apart = not self.is_fsdp_enabled
        found = self.evaluation_fitting.run([inputs], lambda b: self._predicted(model, b), apart)
        if self.evaluation_fitting.size < before:
            self._say(self.evaluation_fitting, before)
        outputs, targets = (torch.cat(parts) for parts in zip(*found, strict=True))
        return None, outputs, targets

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
        if self.is_fsdp_enabled and not sharding.is_cut(self.model):  # nothing was trained
            self.accelerator.prepare(self.model, self.create_optimizer())
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

    def _one_pass(self, model: nn.Module, piece: Batch, count: int) -> Tensor:
        self.current_gradient_accumulation_steps = count
        loss: Tensor = super().training_step(model, piece)
        return loss

    def _predicted(self, model: nn.Module, piece: Batch) -> tuple[Tensor, Tensor]:
        piece = self._prepare_inputs(piece)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs, targets = self.task.predict(model, piece)
        return outputs.detach(), targets.detach()

    def _agree(self) -> None:
        """Take the smallest of what processes found in their records, before the first step."""
        both = (self.fitting, self.evaluation_fitting)
        if self.args.world_size > 1:
            found = smallest([fitting.size for fitting in both], self.args.device)
            for fitting, size in zip(both, found, strict=True):
                fitting.limit(size)
        for fitting in both:
            if fitting.size < fitting.asked:
                self._log_size(fitting)

    def _say(self, fitting: Fitting, before: int) -> None:
        self._log_size(fitting)
        if self.is_world_process_zero():
            fitting.say(before, self.state.global_step)

    def _log_size(self, fitting: Fitting) -> None:
        logs = {fitting.setting: fitting.size}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _figures(self, prediction: EvalPrediction) -> dict[str, float]:
        outputs, targets = prediction.predictions, prediction.label_ids
        return self.task.metrics(torch.as_tensor(outputs), torch.as_tensor(targets))

    def create_accelerator_and_postprocess(self) -> None:
        """Join the other processes; parameters are cut over them where accelerate was told to."""
        sharding.allow_without_gpu()
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            sharding.prepare(self.accelerator, self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the settings, or the one that was put in place."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            sharding.require_optimizer(optimizer)
        return optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Have autocast around the pass: accelerate puts it into no forward that is cut."""
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def release(self) -> None:
        """Leave a plain model behind, without what training wrapped it with."""
        plain = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
        if self.is_fsdp_enabled:
            sharding.put_together(plain)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what training changes; parameters that were cut are gathered."""
        plain = self.accelerator.unwrap_model(self.model)
        checkpoints.save_tensors(
            plain, Path(output_dir or self.args.output_dir), write=self.args.should_save
        )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        plain = self.accelerator.unwrap_model(model or self.model)
        checkpoints.load_tensors(plain, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._in_one_piece():
            if not self.args.should_save:
                self.optimizer.state_dict()  # takes part in the gathering
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._in_one_piece():
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _in_one_piece(self) -> Iterator[None]:
        """Have the optimizer's file be the one that a single process writes."""
        if not self.is_fsdp_enabled:
            yield
            return
        self.is_fsdp_enabled = False
        try:
            with sharding.whole_states(self.optimizer.optimizer):
                yield
        finally:
            self.is_fsdp_enabled = True

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


def _decays(name: str, parameter: nn.Parameter) -> bool:
    table = parameter.ndim == 3 and parameter.shape[0] == 1
    table = table or "embed" in name.rpartition(".")[2]
    return parameter.ndim >= 2 and not table and not name.endswith("bias")
