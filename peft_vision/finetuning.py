"""Carry out a recipe: data, model, methods, training, and the saved result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vision.backbones import view
from peft_vision.compressed import CompressedModel
from peft_vision.data import preprocessing
from peft_vision.data.image_set import ImageSet, batches_of
from peft_vision.data.source import open_split
from peft_vision.errors import BadSetting, DataError, GradientMissing, UnsupportedSite
from peft_vision.history import History
from peft_vision.loading import load
from peft_vision.memory import settling
from peft_vision.memory.estimate import rehearsal_of
from peft_vision.memory.rehearsal import Rehearsal
from peft_vision.recipe import LoadedRecipe, ModelSettings, Recipe, load_recipe
from peft_vision.sources import create_model
from peft_vision.tasks.classification import Classification, Distillation, check_outputs
from peft_vision.training import identity
from peft_vision.training.fit import fit
from peft_vision.training.processes import joined
from peft_vision.training.run_folder import RunFolder, open_run
from peft_vision.wrapping import wrap

if TYPE_CHECKING:
    from torch import nn

    from peft_vision.data.images import LabeledImages
    from peft_vision.data.source import Split

Say = Callable[[str], None]


@dataclass(frozen=True)
class Finetuned:
    """What came of a run.

    Attributes:
        model: the wrapped model in evaluation mode.
        metrics: validation figures; accuracies are fractions in [0, 1].
        output: the folder it was saved in.
        resumed: the step that an earlier run had reached, or None.
    """

    model: Any
    metrics: dict[str, float]
    output: Path
    resumed: int | None


def finetune(
    recipe: Recipe | LoadedRecipe | str | Path,
    words: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    force: bool = False,
    say: Say | None = None,
) -> Finetuned:
    """Fine-tune as a recipe says and save the result.

    A run that was killed goes on from its newest complete checkpoint when it is called again with
    the same recipe and output, and ends with the same weights. Under `accelerate launch` every
    process calls this function; the main one saves.

    Where it is to run on a CUDA GPU, or the recipe has `memory`, one step is rehearsed without
    numbers first, and a run that cannot fit is refused before anything is downloaded.

    Args:
        recipe: a recipe, a YAML file, or the name of one that ships.
        words: `train.epochs=2` and the like, where `recipe` is a file or name.
        output: in place of the recipe's.
        overwrite: replace a finished result, or an unfinished run of another recipe.
        resume: False starts an unfinished run anew.
        force: train even if the memory is predicted not to be enough.
        say: is told, in one line each, what the user should know; by default it is logged.

    Raises:
        RecipeError: a mistake in the recipe.
        DataError: the data cannot be trained on.
        OutputExists: the output folder is in the way.
        UnknownName, BadSetting, UnsupportedSite, GradientMissing: model or method does not fit.
        BadSetting: the memory is not enough.
        CannotWrite: the result cannot be written.
    """
    plan = _recipe_of(recipe, words, output)
    say = say or logging.getLogger("peft_vision").info
    state = joined(plan.train.device)
    say = say if state.is_main_process else _silent
    folder = Path(plan.output).expanduser()
    wanted = identity.of_settings(plan.model_dump())
    run = open_run(folder, wanted, overwrite=overwrite, resume=resume)
    fitting = _Fitting(plan, run, force, say, state.num_processes)
    chosen = fitting.before_anything()
    data = _open_data(plan, say)
    run = open_run(folder, wanted | identity.of_data(data), overwrite=overwrite, resume=resume)
    model = build(plan, data.names, data.train)
    if chosen is None:
        chosen = fitting.with_model(model)
    plan = plan.model_copy(update={"train": plan.train.model_copy(update=chosen)})
    state.wait_for_everyone()
    if state.is_main_process:
        run.begin(wanted | identity.of_data(data))
        if plan.memory is not None:
            settling.record(run.run_dir, chosen)
    state.wait_for_everyone()
    if state.num_processes > 1:
        say(f"Training with {state.num_processes} processes ({state.backend}).")
    if run.resumed is not None:
        say(f"Resuming the unfinished run in {folder} from step {run.resumed}.")
    metrics = _fit(model, plan, data, run)
    model.history.metrics = _records(metrics, data)
    if state.is_main_process:
        _save(model, run, plan)
    state.wait_for_everyone()
    return Finetuned(model, metrics, folder, run.resumed)


@dataclass(frozen=True)
class _Fitting:
    """Chooses the settings with which a run fits, once: a resumed run goes on with the same."""

    recipe: Recipe
    run: RunFolder
    force: bool
    say: Say
    processes: int

    def before_anything(self) -> dict[str, Any] | None:
        """Settings of `train` by their names; None where the wrapped model is needed."""
        if not settling.is_asked(self.recipe, self.processes):
            return {}
        found = settling.recorded(self.run.run_dir) if self.run.resumed is not None else None
        if found is not None:
            return found
        try:
            rehearsal = rehearsal_of(self.recipe, processes=self.processes)
        except (BadSetting, UnsupportedSite, GradientMissing):
            return None  # it needs numbers; or else it is the same when the model is built
        return self._settled(rehearsal)

    def with_model(self, model: Any) -> dict[str, Any]:
        """The same, of the model at hand."""
        size = model.history.preprocessing["size"]
        task, teacher = _task(self.recipe, model.history.labels)
        return self._settled(
            Rehearsal(model, (3, size, size), task, teacher, processes=self.processes)
        )

    def _settled(self, rehearsal: Rehearsal) -> dict[str, Any]:
        return settling.settle(self.recipe, rehearsal, force=self.force, say=self.say)


def build(recipe: Recipe, labels: Sequence[str], data: LabeledImages | None = None) -> Any:
    """The recipe's model with its methods, its labels and its preprocessing, untrained.

    Args:
        recipe: a recipe.
        labels: class names; the head gets as many outputs.
        data: training images, for methods that decide by data.

    Raises:
        UnknownName, BadSetting, UnsupportedSite, GradientMissing: model or method does not fit.
    """
    import torch

    torch.manual_seed(recipe.seed)
    plain = create_model(
        recipe.model.name,
        pretrained=recipe.model.pretrained,
        **recipe.model.arguments(len(labels)),
    )
    size = view(plain).input_size
    described = preprocessing.of_model(plain, recipe.model.name, size[-1] if size else None)
    if recipe.data.image_size is not None:
        described = {**described, "size": recipe.data.image_size}
    batches = (
        None if data is None else batches_of(data, preprocessing.evaluation_transform(described))
    )
    model = _wrapped(plain, recipe, batches)
    model.history.labels = list(labels)
    model.history.preprocessing = described
    check_outputs(model, described["size"], len(labels))
    return model


def _recipe_of(
    recipe: Recipe | LoadedRecipe | str | Path, words: Sequence[str], output: str | Path | None
) -> Recipe:
    if isinstance(recipe, (str, Path)):
        flags = {} if output is None else {"output": str(output)}
        return load_recipe(recipe, words, flags).recipe
    found = recipe.recipe if isinstance(recipe, LoadedRecipe) else recipe
    if words:
        raise BadSetting(
            "key=value words go with a recipe file or name. A Recipe object is changed with "
            "recipe.model_copy(update=...)."
        )
    return found if output is None else found.model_copy(update={"output": str(output)})


def _open_data(recipe: Recipe, say: Say) -> Split:

    with joined(recipe.train.device).main_process_first():
        data = open_split(recipe.data, recipe.seed)
    for note in data.notes:
        say(note)
    return data


def _fit(model: Any, recipe: Recipe, data: Split, run: RunFolder) -> dict[str, float]:

    described = model.history.preprocessing
    augmented = preprocessing.training_transform(described, recipe.data.augmentation)
    plain = preprocessing.evaluation_transform(described)
    task, teacher = _task(recipe, data.names)
    return fit(
        model,
        task,
        ImageSet(data.train, augmented, recipe.seed),
        ImageSet(data.validation, plain),
        recipe.train,
        teacher=teacher,
        run_dir=run.run_dir,
        log_dir=run.log_dir,
        seed=recipe.seed,
    )


def _records(metrics: Mapping[str, float], data: Split) -> dict[str, Any]:
    """Figures as they are stored: with the count and the data behind them."""
    behind = {"n": len(data.validation), "data": data.validation.origin}
    kept = {name: value for name, value in metrics.items() if name in ("top1", "top5", "loss")}
    return {name: {"value": value, **behind} for name, value in kept.items()}


def _task(recipe: Recipe, labels: Sequence[str]) -> tuple[Classification, nn.Module | None]:

    wanted = recipe.task.distillation
    if wanted is None:
        return Classification(recipe.task.label_smoothing), None
    how = Distillation(wanted.weight, wanted.temperature)
    return Classification(recipe.task.label_smoothing, how), _teacher(wanted.teacher, labels)


def _teacher(name: str, labels: Sequence[str]) -> nn.Module:
    """A saved folder with the same classes in the same order, or a model by name.

    Raises:
        DataError: the teacher knows other classes.
    """
    if not Path(name).exists():
        return create_model(name, **ModelSettings(name=name).arguments(len(labels)))
    loaded: nn.Module = load(name)
    known: list[str] | None = History.of(loaded).labels
    if known is not None and list(known) != list(labels):
        raise DataError(
            f"The teacher {name} knows the classes {', '.join(known[:10])}, the data have "
            f"{', '.join(list(labels)[:10])}. A teacher with the same classes in order works."
        )
    return loaded


def _wrapped(plain: nn.Module, recipe: Recipe, batches: list[Any] | None) -> Any:

    if not recipe.methods:
        return CompressedModel(plain, History.of(plain)).requires_grad_(True)
    model: Any = plain
    for entry in recipe.methods:
        model = wrap(model, entry.name, data=batches, **entry.settings)
    return model


def _save(model: Any, run: RunFolder, recipe: Recipe) -> None:
    import shutil

    import yaml

    stage = run.run_dir / "result"
    shutil.rmtree(stage, ignore_errors=True)
    model.save_pretrained(stage)
    (stage / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    run.finish(stage)


def _silent(_: str) -> None:
    """What processes other than the main one say."""
