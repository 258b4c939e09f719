"""One optimizer step of a run on fake tensors, as often as asked, under whatever settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peft_vision.errors import BadSetting
from peft_vision.layers.traits import penalties
from peft_vision.memory.autocast import as_on_cuda, go_back
from peft_vision.memory.fake import fake_copy, fake_tensors, scales_of
from peft_vision.memory.figures import NOT_ON_A_GPU, MemoryEstimate
from peft_vision.memory.optimizer import UNVERIFIED_OPTIMIZERS, step_of
from peft_vision.memory.tracker import CUDA_BLOCK, GRADIENTS, INPUTS, PACKED, PeakTracker
from peft_vision.tasks.classification import Classification
from peft_vision.tasks.task import Task
from peft_vision.training.lean import leaned
from peft_vision.training.settings import TrainSettings, share_of

Loss = Callable[[nn.Module, int], Tensor]
"""(model, how many images) -> the loss to go back from; called on fake tensors."""


@dataclass
class Rehearsal:
    """A run that is ready to be rehearsed; the model itself is never touched.

    Attributes:
        model: with numbers, or on `meta`.
        image_size: channels, height and width of the images.
        task: what is learned, without a teacher. `teacher`: a model to learn from.
        processes: how many share the batch.
        loss: in place of the task's, for models that take something else than images.
        classes: outputs of the classifier, where a recipe's model is built again.
        known: settings -> what was found; a step is run once.
    """

    model: nn.Module
    image_size: tuple[int, int, int]
    task: Task = field(default_factory=Classification)
    teacher: nn.Module | None = None
    processes: int = 1
    loss: Loss | None = None
    classes: int = 0
    known: dict[str, MemoryEstimate] = field(default_factory=dict)

    @property
    def has_frozen(self) -> bool:
        """Whether there are weights that are not trained and could be stored in fewer bits."""
        return any(not p.requires_grad and p.is_floating_point() for p in self.model.parameters())

    def run(self, settings: TrainSettings) -> MemoryEstimate:
        """What a step under `settings` takes, optimizer state being there.

        Raises:
            BadSetting: the batch cannot be divided, nothing is trained, or the model computes
                something that depends on numbers.
        """
        micro, passes = share_of(settings, self.processes)
        low = settings.precision != "fp32"
        settings = settings.model_copy(update={"precision": "bf16" if low else "fp32"})
        key = settings.model_copy(update={"batch_size": micro * passes, "micro_batch": micro})
        known = self.known.get(key.model_dump_json())
        if known is not None:
            return known
        try:
            with fake_tensors():
                parts = self._step(fake_copy(self.model), settings, micro, passes, low)
        except (NotImplementedError, RuntimeError) as error:
            raise BadSetting(
                f"The memory of {type(self.model).__name__} cannot be estimated: a step fails on "
                f"tensors without numbers ({str(error).splitlines()[0]})."
            ) from error
        unverified = (NOT_ON_A_GPU, *UNVERIFIED_OPTIMIZERS.get(settings.optimizer, ()))
        if self.processes > 1:
            unverified = (*unverified, "what processes hold to talk to each other is not counted")
        size = self.image_size[1:]
        found = MemoryEstimate(parts, micro, passes, settings.precision, size, unverified)
        self.known[key.model_dump_json()] = found
        return found

    def _step(
        self, model: nn.Module, settings: TrainSettings, micro: int, passes: int, low: bool
    ) -> dict[str, int]:
        teacher = None if self.teacher is None else fake_copy(self.teacher)
        task = self.task if teacher is None else self.task.with_teacher(teacher)
        model.train()
        with leaned(model, settings):
            trained = [p for p in model.parameters() if p.requires_grad]
            if not trained:
                raise BadSetting(f"{type(model).__name__} has no parameter that may be trained.")
            with PeakTracker(model, block=CUDA_BLOCK) as tracker:
                tracker.hold(PACKED, scales_of(model))
                if teacher is not None:
                    tracker.hold_weights(teacher, "teacher's ")
                update = step_of(model, settings, tracker)
                batches = [self._batch(model, micro, tracker) for _ in range(passes)]
                tracker.reset_peak()
                if passes > 1:  # from the second pass on the gradients of the first are there
                    _fill_gradients(trained, tracker)
                self._pass(model, task, batches[-1], micro, low)
                update()
        return dict(tracker.at_peak)

    def _batch(self, model: nn.Module, micro: int, tracker: PeakTracker) -> dict[str, Tensor]:
        batch = self.task.example(model, micro, self.image_size)
        tracker.hold(INPUTS, batch.values())
        return batch

    def _pass(
        self, model: nn.Module, task: Task, batch: dict[str, Tensor], micro: int, low: bool
    ) -> None:
        with as_on_cuda(low):
            if self.loss is not None:
                losses = [self.loss(model, micro)]
            else:
                losses = list(task.losses(model, batch).values())
            total = torch.stack([v.float() for v in (*losses, *penalties(model))]).sum()
            del losses
        # Autocast is left before the backward pass, as in training; a GPU's rules are not.
        with as_on_cuda(False):
            go_back(total)


def _fill_gradients(parameters: list[nn.Parameter], tracker: PeakTracker) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        tracker.hold(GRADIENTS, [parameter.grad])
