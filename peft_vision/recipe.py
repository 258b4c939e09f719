"""A whole run on one page: YAML, strict, with `key=value` words and flags on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from peft_vision.data.settings import DataSettings
from peft_vision.errors import BadSetting, CannotWrite, OutputExists, RecipeError, UnknownName
from peft_vision.lookup import PACKAGE, nearest
from peft_vision.tracking.geometry import NAME as TRACKING
from peft_vision.tracking.settings import PairSettings, TrackingSettings
from peft_vision.training.settings import TrainSettings
from peft_vision.training.yaml_marks import Path as Keys
from peft_vision.training.yaml_marks import dotted, read
from peft_vision.training.yaml_schema import (
    Document,
    document,
    given,
    leaves,
    origin_of,
    put,
    split_words,
    validate,
)

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
IMAGES_TAG, TRACKING_TAG = "<images>", "<tracking>"
"""Of the sections that a task decides the keys of; no key is written like this."""


class ModelSettings(BaseModel):
    """The backbone: a name that `create_model` takes, and what its constructor takes besides.

    Attributes:
        pretrained: with the source's weights; false gives random ones, drawn by the seed.
    """

    model_config = _STRICT

    name: Annotated[str, Field(min_length=1)]
    pretrained: bool = True
    kwargs: dict[str, Any] = {}

    def arguments(self, classes: int) -> dict[str, Any]:
        """What the constructor takes, with so many outputs unless `kwargs` says otherwise."""
        counted = "num_labels" if self.name.startswith("transformers/") else "num_classes"
        return {counted: classes, **self.kwargs}


class MethodSettings(BaseModel):
    """A method or preset by name; further keys are its settings."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: Annotated[str, Field(min_length=1)]

    @property
    def settings(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


class DistillationSettings(BaseModel):
    """Learn from a teacher's softened logits beside the labels.

    Attributes:
        teacher: a model name or an artifact folder with the same classes.
        weight: of the teacher's term; the labels get the rest.
    """

    model_config = _STRICT

    teacher: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0


class TaskSettings(BaseModel):
    """What is learned."""

    model_config = _STRICT

    name: Literal["classification"] = "classification"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    distillation: DistillationSettings | None = None


def _task_tag(given: Any) -> str:
    name = given.get("name") if isinstance(given, dict) else getattr(given, "name", None)
    return TRACKING_TAG if name == TRACKING else IMAGES_TAG


def _data_tag(given: Any) -> str:
    has = "sources" in given if isinstance(given, dict) else isinstance(given, PairSettings)
    return TRACKING_TAG if has else IMAGES_TAG


Data = Annotated[
    Annotated[DataSettings, Tag(IMAGES_TAG)] | Annotated[PairSettings, Tag(TRACKING_TAG)],
    Discriminator(_data_tag),
]
AnyTask = Annotated[
    Annotated[TaskSettings, Tag(IMAGES_TAG)] | Annotated[TrackingSettings, Tag(TRACKING_TAG)],
    Discriminator(_task_tag),
]


class Recipe(BaseModel):
    """A fine-tuning run. Without `methods` all weights are trained.

    Attributes:
        memory: of the GPU that the run is to fit into, such as `24GB`. What `train` leaves at its
            default is chosen then, exact measures first, and `auto` sizes of batches are resolved;
            what is trained is not changed. None: nothing is chosen.
    """

    model_config = _STRICT

    model: ModelSettings
    methods: list[MethodSettings] = []
    data: Data
    task: AnyTask = TaskSettings()
    train: TrainSettings = TrainSettings()
    memory: str | None = None
    output: Annotated[str, Field(min_length=1)] = "out"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where each of its values came from."""

    recipe: Recipe
    document: Document

    def rows(self) -> list[tuple[str, Any, str]]:
        """(dotted key, value, origin) of every value, defaults included."""
        content = self.recipe.model_dump()
        doc = self.document
        return [
            (dotted(path), value, origin_of(doc, path) if given(doc, path) else "default")
            for path, value in leaves(content)
        ]


def load_recipe(
    source: str | Path, words: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> LoadedRecipe:
    """Read a recipe; what comes later wins: defaults, the file, `key=value` words, flags.

    Args:
        source: a YAML file, or the name of a recipe that ships with the package.
        words: `train.epochs=2`; values are read as YAML.
        flags: option -> value for what the command line set, such as `{"output": "out/"}`.

    Raises:
        RecipeError: no such recipe, or a mistake in it, with the line and the nearest key.
    """
    path = _find(source)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from error
    doc = _long_form(document(read(text, path.name), path.name))
    for key, value, word in split_words(words):
        doc = _long_form(put(doc, _long_key(key), value, word))
    for key, value in (flags or {}).items():
        doc = _long_form(put(doc, key, value, f"--{key}"))
    recipe = validate(Recipe, doc)
    _check_task(recipe, doc)
    _check_methods(recipe, doc)
    return LoadedRecipe(recipe, doc)


def recipe_folder() -> Path:
    """The folder of the recipes that ship: in an installed package, or beside it in a checkout."""
    inside = PACKAGE / "_recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def shipped() -> dict[str, Path]:
    """Name (`classification/vit_base-lora`) -> file of every recipe that ships."""
    root = recipe_folder()
    found = {str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not name.startswith("accelerate/")}


def headline(path: Path) -> str:
    """The first comment line of a recipe: what it is for."""
    first = path.read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def copy_recipe(name: str, target: Path | None = None) -> Path:
    """Copy a recipe that ships, by default into the working folder.

    Raises:
        RecipeError: there is no such recipe.
        OutputExists: a file is there already.
        CannotWrite: the place is not writable.
    """
    source = shipped().get(name.removesuffix(".yaml"))
    if source is None:
        raise _unknown(name)
    target = target or Path.cwd()
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise OutputExists(f"{target} exists already. Remove it or copy to another place.")
    try:
        target.write_bytes(source.read_bytes())
    except OSError as error:
        raise CannotWrite(f"Could not write {target}: {error.strerror or error}.") from error
    return target


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"{path} is a folder. A recipe is one YAML file.")
    known = shipped()
    name = str(source).removesuffix(".yaml").removeprefix("recipes/")
    if name in known:
        return known[name]
    raise _unknown(str(source))


def _unknown(name: str) -> RecipeError:
    known = shipped()
    near = nearest(name, known)
    hint = f"Nearest: {', '.join(near)}." if near else f"Shipped: {', '.join(known)}."
    return RecipeError(
        f"There is no recipe {name!r}: neither a YAML file of that path nor one that ships. {hint}"
    )


def _long_key(key: str) -> str:
    return key if key != "method" and not key.startswith("method.") else f"methods.0{key[6:]}"


def _long_form(doc: Document) -> Document:
    """`method: lora` and `methods: [lora]` as `methods: [{name: lora}]`."""
    content, origins = dict(doc.content), dict(doc.origins)
    if "method" in content:
        if content.get("methods"):
            raise RecipeError(
                f"{origin_of(doc, ('methods',))}: there are both method and methods. Keep one."
            )
        content["methods"] = [content.pop("method")]
        moved = {("methods", 0, *p[1:]): o for p, o in origins.items() if p[0] == "method"}
        origins = {path: o for path, o in origins.items() if path[0] != "method"} | moved
    if isinstance(content.get("methods"), dict):
        content["methods"] = [content["methods"][key] for key in sorted(content["methods"])]
    if isinstance(content.get("methods"), list):
        content["methods"] = [
            {"name": entry} if isinstance(entry, str) else entry for entry in content["methods"]
        ]
    return Document(content, origins, doc.name)


def _check_task(recipe: Recipe, doc: Document) -> None:
    """Refuse data that the task cannot learn from.

    Raises:
        RecipeError: with the line.
    """
    pairs = isinstance(recipe.data, PairSettings)
    if pairs != (recipe.task.name == TRACKING):
        wanted = "data.train" if pairs else "data.sources (folders of sequences)"
        raise RecipeError(
            f"{origin_of(doc, ('data',))}: the task {recipe.task.name} needs {wanted}"
            + (f"; data.sources goes with task: {{name: {TRACKING}}}." if pairs else ".")
        )


def _check_methods(recipe: Recipe, doc: Document) -> None:
    """Refuse a method, or a setting of one, that does not exist, before anything slow happens.

    Raises:
        RecipeError: with the line.
    """
    from peft_vision.method import make
    from peft_vision.presets import expand

    for number, entry in enumerate(recipe.methods):
        place: Keys = ("methods", number)
        try:
            parts = expand(entry.name)
            for name, preset in parts:
                make(name, {**preset, **(entry.settings if len(parts) == 1 else {})})
        except (UnknownName, BadSetting) as error:
            raise RecipeError(f"{origin_of(doc, place)}: {error}") from error
