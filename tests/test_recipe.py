"""A recipe is strict: every mistake is named with its line, and every value has an origin."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_vision.cli import app
from peft_vision.errors import OutputExists, RecipeError
from peft_vision.recipe import copy_recipe, headline, load_recipe, shipped

GOOD = """\
# An example.
model:
  name: vit_tiny_patch16_224
  kwargs: {img_size: 32}
method: {name: lora, r: 4}
data:
  train: images
  augmentation:
    flip: 0
train:
  epochs: 3
  learning_rate: 1e-3
"""


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return file

    return make


def test_a_good_recipe(write):
    recipe = load_recipe(write(GOOD)).recipe
    assert recipe.train.epochs == 3
    assert recipe.train.learning_rate == 1e-3
    assert (recipe.methods[0].name, recipe.methods[0].settings) == ("lora", {"r": 4})
    assert recipe.data.augmentation.flip == 0
    assert recipe.output == "out"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "  epochs: 3",
            "  epoch: 3",
            "line 11: there is no setting train.epoch. Did you mean epochs?",
        ),
        (
            "train:\n  epochs",
            "trian:\n  epochs",
            "line 10: there is no setting trian. Did you mean train?",
        ),
        (
            "  epochs: 3",
            "  epochs: many",
            "line 11: train.epochs is 'many'; it should be a valid integer",
        ),
        (
            "  epochs: 3",
            "  epochs: 0",
            "line 11: train.epochs is 0; it should be greater than or equal to 1",
        ),
        ("  epochs: 3", "  epochs: 2.5", "line 11: train.epochs is 2.5"),
        (
            "  epochs: 3",
            "  schedule: cos",
            "line 11: train.schedule is 'cos'; it should be 'cosine', 'linear'",
        ),
        ("    flip: 0", "    flip: 2", "line 9: data.augmentation.flip is 2"),
        (
            "    flip: 0",
            "    flop: 0",
            "line 9: there is no setting data.augmentation.flop. Did you mean flip?",
        ),
        ("  train: images", "  split: x", "data.train is missing"),
        ("name: lora", "name: lorra", "line 5: There is no method named 'lorra'"),
        ("r: 4", "rang: 4", "line 5: lora has no setting 'rang'"),
        (
            "  epochs: 3",
            "  epochs: 3\n  epochs: 4",
            "line 12: train.epochs was given already on line 11",
        ),
        ("  epochs: 3", "  epochs: [3", "this is not YAML"),
        ("method: {", "methods: [a]\nmethod: {", "both method and methods"),
        (
            "model:\n  name: vit_tiny_patch16_224\n  kwargs: {img_size: 32}",
            "model: 3",
            "line 2: model is 3; it should be a section with name",
        ),
    ],
)
def test_mistakes_are_named_with_line_and_remedy(write, old, new, said):
    assert old in GOOD
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD.replace(old, new)))
    assert said in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_all_mistakes_are_told_at_once(write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD.replace("epochs: 3", "epochs: x").replace("flip: 0", "flip: 7")))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "hello"])
def test_what_is_no_mapping_is_refused(write, text):
    with pytest.raises(RecipeError, match="the sections model, method and data"):
        load_recipe(write(text))


def test_later_wins_and_every_origin_is_known(write):
    words = ["train.epochs=5", "method.r=8", "train.max_steps=null", "output=a", "seed=3"]
    loaded = load_recipe(write(GOOD), words, {"output": "b"})
    rows = {key: (value, origin) for key, value, origin in loaded.rows()}
    assert rows["train.epochs"] == (5, "train.epochs=5")
    assert rows["methods.0.r"] == (8, "method.r=8")
    assert rows["methods.0.name"] == ("lora", "recipe.yaml, line 5")
    assert rows["train.learning_rate"] == (1e-3, "recipe.yaml, line 12")
    assert rows["train.batch_size"] == (64, "default")
    assert rows["output"] == ("b", "--output")
    assert rows["data.augmentation.crop"][1] == "default"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.epochs", "not of the form key=value"),
        ("train.epoch=2", "train.epoch=2: there is no setting train.epoch. Did you mean epochs?"),
        ("train.epochs=two", "train.epochs=two: train.epochs is 'two'"),
        ("train.epochs.more=1", "'more' cannot be set inside 3"),
        ("method.rang=1", "lora has no setting 'rang'"),
        ("train.loggers=[", "cannot be read as YAML"),
    ],
)
def test_wrong_words_are_named(write, word, said):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD), [word])
    assert said in str(caught.value)


def test_methods_may_be_listed_or_replaced(write):
    recipe = load_recipe(write(GOOD), ["method=magnitude"]).recipe
    assert [entry.name for entry in recipe.methods] == ["magnitude"]
    recipe = load_recipe(write(GOOD), [], {"methods": ["magnitude", "lora"]}).recipe
    assert [entry.name for entry in recipe.methods] == ["magnitude", "lora"]


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(RecipeError, match="Nearest: classification/vit_base-lora"):
        load_recipe("classification/vit_bse-lora")


def test_every_shipped_recipe_is_valid_and_says_how_to_run_it():
    assert len(shipped()) >= 4
    for name, path in shipped().items():
        load_recipe(name)
        text = path.read_text()
        assert headline(path), name
        assert f"peft-vision finetune {name}" in text or f"recipes/{name}" in text, name
        if name.startswith("classification/"):
            assert "Expected memory" in text.partition("model:")[0], name


def test_copying_a_recipe(tmp_path):
    target = copy_recipe("classification/vit_base-lora", tmp_path)
    assert load_recipe(target).recipe.model.name
    with pytest.raises(OutputExists):
        copy_recipe("classification/vit_base-lora", tmp_path)
    with pytest.raises(RecipeError, match="There is no recipe 'nope'"):
        copy_recipe("nope", tmp_path)


def test_the_command_line_shows_settings_and_origins(write):
    said = CliRunner().invoke(
        app, ["finetune", str(write(GOOD)), "train.epochs=7", "--output", "o", "--print-config"]
    )
    assert said.exit_code == 0, said.output
    lines = {line.split()[0]: line for line in said.output.splitlines()}
    assert "7" in lines["train.epochs"]
    assert lines["train.epochs"].endswith("# train.epochs=7")
    assert lines["output"].endswith("# --output")
    assert lines["train.batch_size"].endswith("# default")


def test_the_command_line_lists_and_copies_recipes(tmp_path):
    said = CliRunner().invoke(app, ["recipes"])
    assert "classification/vit_base-lora" in said.output
    said = CliRunner().invoke(
        app, ["recipes", "--copy", "classification/vit_base-lora", "--to", str(tmp_path)]
    )
    assert (tmp_path / "vit_base-lora.yaml").exists(), said.output


def test_a_mistake_on_the_command_line_is_one_message_and_exit_code_two(write):
    said = CliRunner().invoke(app, ["finetune", str(write(GOOD)), "train.epoch=2"])
    assert said.exit_code == 2
    assert "Did you mean epochs?" in said.output
    assert "Traceback" not in said.output
