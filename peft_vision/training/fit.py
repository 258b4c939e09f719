"""Train a model on a task: the function under `finetune` and under recovery after compression."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vision.errors import BadSetting, DataError, MissingExtra
from peft_vision.training import checkpoints
from peft_vision.training.lean import leaned
from peft_vision.training.optimizers import is_from_peft, peft_optimizer
from peft_vision.training.processes import joined
from peft_vision.training.settings import TrainSettings, training_arguments

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset
    from transformers import TrainingArguments

    from peft_vision.tasks.task import Task
    from peft_vision.training.trainer import VisionTrainer


def fit(
    model: nn.Module,
    task: Task,
    train_set: Dataset[Any],
    validation_set: Dataset[Any] | None,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    run_dir: Path | None = None,
    log_dir: Path | None = None,
    seed: int = 0,
    keep_better: bool = False,
) -> dict[str, float]:
    """Train `model` in place; it is left in evaluation mode on the device it was trained on.

    Args:
        model: parameters with `requires_grad` are trained.
        task: what is learned.
        train_set: samples that the task can collate; an `EpochDataset` is told each epoch.
        validation_set: evaluated every epoch and at the end; None: no evaluation.
        settings: how to train; `batch_size` is over all processes.
        teacher: a model to learn from beside the labels; it is frozen.
        run_dir: checkpoints are kept here, and a run that was killed goes on from the newest
            complete one. The caller answers for it that the model, the data and the settings are
            the same. None: no checkpoints.
        log_dir: log.jsonl and TensorBoard events; None: `run_dir`/logs, or none without a run_dir.
        seed: of the batch order and of dropout.
        keep_better: validate before, too, and go back to the weights that were there where training
            has not lowered the loss.

    Returns:
        The final validation figures of the task (fractions in [0, 1]), and `seconds` and `steps`;
        with `keep_better`, `kept`: 1.0 where training was of use, else 0.0.

    Raises:
        BadSetting: nothing is trainable, the batch cannot be divided over the processes, or a
            setting does not fit the device.
        DataError: the training set is empty.
        MissingExtra: a logger was asked for that is not installed.
    """
    _check(model, train_set)
    task = task if teacher is None else task.with_teacher(teacher)
    with _folder(run_dir) as folder, _quiet():
        arguments = _arguments(settings, folder, seed, validated=validation_set is not None)
        keep = settings.keep_checkpoints
        trainer = _trainer(model, task, arguments, train_set, validation_set, keep)
        if is_from_peft(settings.optimizer):
            trainer.optimizer = peft_optimizer(model, settings)
        _callbacks(trainer, settings, log_dir or (run_dir / "logs" if run_dir else None), folder)
        if teacher is not None:
            teacher.to(trainer.args.device)
        if run_dir is None:
            trainer.args.save_strategy = "no"
        start = time.perf_counter()
        with leaned(model, settings):
            earlier = _Earlier(trainer) if keep_better else None
            _train(trainer, checkpoints.latest(folder))
            figures = trainer.figures()
            if earlier is not None:
                figures = earlier.or_better(figures)
            trainer.release()
    model.eval()
    steps = float(trainer.state.global_step)
    return {**figures, "seconds": time.perf_counter() - start, "steps": steps}


class _Earlier:
    """A model before it is trained: its figures, and its weights to go back to."""

    def __init__(self, trainer: VisionTrainer) -> None:
        self.model = trainer.model
        self.figures = trainer.figures()
        self.weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def or_better(self, figures: dict[str, float]) -> dict[str, float]:
        """These figures, if they are better; else the earlier ones, with the weights put back."""
        better = figures["loss"] < self.figures["loss"]
        if not better:
            self.model.load_state_dict(self.weights)
        return {**(figures if better else self.figures), "kept": float(better)}


def _check(model: nn.Module, train_set: Dataset[Any]) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadSetting(
            f"{type(model).__name__} has no parameter that may be trained. Wrap it with an "
            "adapter, or call requires_grad_(True)."
        )
    if len(train_set) == 0:  # type: ignore[arg-type]
        raise DataError("The training set is empty. At least one sample is needed.")


def _arguments(
    settings: TrainSettings, folder: Path, seed: int, *, validated: bool
) -> TrainingArguments:
    arguments = training_arguments(settings, folder, joined(settings.device).num_processes, seed)
    if validated:
        arguments.eval_strategy = _strategy("steps" if settings.evaluate_every else "epoch")
        arguments.eval_steps = settings.evaluate_every
    return arguments


def _trainer(
    model: nn.Module,
    task: Task,
    arguments: TrainingArguments,
    train_set: Dataset[Any],
    validation_set: Dataset[Any] | None,
    keep: int,
) -> VisionTrainer:
    from transformers import PrinterCallback

    from peft_vision.training.allocation import allocation_of
    from peft_vision.training.trainer import VisionTrainer

    trainer = VisionTrainer(model, task, arguments, train_set, validation_set, keep)
    trainer.remove_callback(PrinterCallback)
    if (allocation := allocation_of(model)) is not None:
        trainer.add_callback(allocation)
    return trainer


def _strategy(name: str) -> Any:
    from transformers import IntervalStrategy

    return IntervalStrategy(name)


def _callbacks(
    trainer: VisionTrainer, settings: TrainSettings, log_dir: Path | None, run_dir: Path
) -> None:
    from peft_vision.training import logs

    if log_dir is not None:
        last = checkpoints.latest(run_dir)
        if trainer.is_world_process_zero():
            logs.truncate_log(log_dir / logs.LOG_FILE, checkpoints.step_of(last) if last else 0)
        trainer.add_callback(logs.JsonLog(log_dir / logs.LOG_FILE))
        if "tensorboard" in settings.loggers:
            if not logs.TensorBoardLog.available():
                raise MissingExtra(
                    "train.loggers has tensorboard, which is not installed. Install it with "
                    "pip install tensorboard, or set train.loggers=[]."
                )
            trainer.add_callback(logs.TensorBoardLog(log_dir))
    if settings.progress:
        trainer.add_callback(logs.ProgressBar(trainer.task.headline))


def _train(trainer: VisionTrainer, last: Path | None) -> None:
    """Train, or only load where the last checkpoint is the end of the run."""
    total = trainer.args.max_steps
    if total <= 0:
        total = trainer.batches.steps * int(trainer.args.num_train_epochs)
    if last is not None and checkpoints.step_of(last) >= total:
        checkpoints.load_tensors(trainer.model, last)
        trainer.state.global_step = checkpoints.step_of(last)
        return
    trainer.train(resume_from_checkpoint=str(last) if last is not None else None)


@contextmanager
def _folder(run_dir: Path | None) -> Iterator[Path]:
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        yield run_dir
        return
    with tempfile.TemporaryDirectory(prefix="peft-vision-") as name:
        yield Path(name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the chatter of transformers and accelerate out of the user's terminal."""
    chatty = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels = [logger.level for logger in chatty]
    for logger in chatty:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(chatty, levels, strict=True):
            logger.setLevel(level)
