"""Fine-tuning end to end on tiny random backbones, and every way in which it says no."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from peft_vision.cli import app
from peft_vision.data.image_set import TensorSet
from peft_vision.errors import BadSetting, DataError, OutputExists
from peft_vision.evaluation import evaluate
from peft_vision.finetuning import finetune
from peft_vision.layers.traits import Penalised
from peft_vision.recipe import load_recipe
from peft_vision.tasks.classification import Classification
from peft_vision.training.fit import fit
from peft_vision.training.settings import TrainSettings

RECIPE = """
model:
  name: vit_tiny_patch16_224
  pretrained: false
  kwargs: {{img_size: 32, patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}}
data: {{train: {data}}}
train: {{epochs: 4, batch_size: 9, learning_rate: 3e-3, loggers: [], device: cpu}}
output: {output}
"""
QUIET = {"loggers": [], "device": "cpu", "progress": False}


@pytest.fixture
def recipe(tmp_path, image_folder) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(data=image_folder(), output=tmp_path / "out"))
    return file


class Small(nn.Module):
    """A model with all kinds of parameters."""

    def __init__(self, classes=3):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.position = nn.Parameter(torch.zeros(1, 16, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, pixels):
        tokens = self.patch(pixels).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(tokens).mean(1))


def colors(count=24):
    labels = torch.arange(count) % 3
    pixels = 0.3 * torch.randn(count, 3, 32, 32)
    pixels[torch.arange(count), labels] += 1
    return TensorSet(pixels, labels)


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "logs" / "log.jsonl").read_text().splitlines()]


def test_all_weights_from_recipe_to_evaluation(recipe, tmp_path):
    done = finetune(recipe, ["train.loggers=[tensorboard]"])
    out = tmp_path / "out"
    assert done.metrics["top1"] > 0.9
    assert done.metrics["steps"] == 8
    assert done.model.history.labels == ["blue", "green", "red"]
    assert list(out.glob("logs/events.out.tfevents.*"))
    logged = lines(out)
    assert [line["step"] for line in logged if "loss" in line] == list(range(1, 9))
    assert sum("eval_top1" in line for line in logged) == 4
    assert not (out / ".run").exists()
    again = load_recipe(out / "recipe.yaml").recipe
    assert again == load_recipe(recipe, ["train.loggers=[tensorboard]"]).recipe

    found = evaluate(out, tmp_path / "images")
    assert found.top1 == pytest.approx(done.metrics["top1"])
    assert found.loss == pytest.approx(done.metrics["loss"], abs=1e-5)
    assert (found.n, found.top5, found.majority) == (18, None, pytest.approx(1 / 3))
    assert evaluate(done.model, tmp_path / "images", split="train", batch_size=5).n == 18

    said = CliRunner().invoke(
        app, ["evaluate", str(out), "--data", str(tmp_path / "images"), "--json"]
    )
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["top1"] == found.top1


def test_evaluation_matches_labels_by_name_and_refuses_others(recipe, tmp_path):
    finetune(recipe, ["train.epochs=1"])
    out, images = tmp_path / "out", tmp_path / "images"
    whole = evaluate(out, images / "val")
    for name in ("blue", "red"):
        (images / "val" / name).rename(tmp_path / name)
    only = evaluate(out, images / "val")
    assert (only.n, only.majority) == (6, 1.0)
    (images / "val" / "zebra").mkdir()
    (tmp_path / "red" / "0.png").rename(images / "val" / "zebra" / "0.png")
    with pytest.raises(DataError, match=r"zebra.* not trained on. Known: blue, green, red"):
        evaluate(out, images / "val")
    assert whole.n == 18
    said = CliRunner().invoke(app, ["evaluate", str(out), "--data", str(tmp_path / "nowhere")])
    assert said.exit_code == 2
    assert "There is no data folder" in said.output


def test_what_is_in_the_output_folder_decides(recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match="--overwrite"):
        finetune(recipe, ["train.epochs=1"])
    finetune(recipe, ["train.epochs=1"], overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(OutputExists, match="--overwrite"):
        finetune(recipe, ["train.epochs=1"])
    assert len(lines(out)) == 3
    finetune(recipe, ["train.epochs=2"], overwrite=True)
    assert len(lines(out)) == 6


class Stop(Exception):
    """As if the process had been killed."""


def test_an_unfinished_run_resumes_or_names_what_differs(recipe, tmp_path, monkeypatch):
    from peft_vision.training.trainer import VisionTrainer

    out, said = tmp_path / "out", []
    save = VisionTrainer._save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        if self.state.global_step == 4:
            raise Stop

    monkeypatch.setattr(VisionTrainer, "_save_checkpoint", save_and_die)
    with pytest.raises(Stop):
        finetune(recipe)
    monkeypatch.undo()
    with pytest.raises(OutputExists) as caught:
        finetune(recipe, ["train.epochs=5", "model.kwargs.depth=1"])
    assert "train.epochs: 4, now 5" in str(caught.value)
    assert "model.kwargs.depth: 2, now 1" in str(caught.value)
    (tmp_path / "images" / "train" / "red" / "0.png").rename(tmp_path / "one.png")
    with pytest.raises(OutputExists, match=r"images.train: .18 images"):
        finetune(recipe)
    (tmp_path / "one.png").rename(tmp_path / "images" / "train" / "red" / "0.png")
    done = finetune(recipe, ["train.progress=false"], say=said.append)
    assert done.resumed == 4
    assert said == [f"Resuming the unfinished run in {out} from step 4."]
    other = finetune(recipe, output=tmp_path / "other")
    for ours, theirs in zip(done.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert lines(out) == lines(tmp_path / "other")


def test_a_run_killed_while_it_saved_its_result_is_finished(recipe, tmp_path, monkeypatch):
    import peft_vision.finetuning as module

    def die(*_):
        raise Stop

    monkeypatch.setattr(module, "_save", die)
    with pytest.raises(Stop):
        finetune(recipe)
    monkeypatch.undo()
    done = finetune(recipe)
    assert done.resumed == 8
    assert done.metrics["top1"] > 0.9
    assert (tmp_path / "out" / "peft_vision.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.kwargs.num_classes=7"], "7 outputs and the data 3 classes"),
        (["data.image_size=40"], "does not take images of 40 x 40"),
        (["train.batch_size=9", "train.micro_batch=2"], "These do: 1, 3, 9"),
        (["model.kwargs.depht=3"], "depht"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(recipe, tmp_path, words, said):
    with pytest.raises(BadSetting, match=said):
        finetune(recipe, words)
    assert not (tmp_path / "out" / "peft_vision.json").exists()


def test_wrong_input_on_the_command_line_is_one_message(recipe, tmp_path):
    for words, said in [
        (["data.train=nowhere"], "There is no data folder nowhere"),
        (["model.name=vit_tinny_patch16_224"], "vit_tiny_patch16_224"),
        (["method=lorra"], "no method named 'lorra'"),
        (["train.learning_rate=-1"], "train.learning_rate is -1"),
    ]:
        found = CliRunner().invoke(app, ["finetune", str(recipe), *words])
        assert found.exit_code == 2, found.output
        assert said in found.output
        assert "Traceback" not in found.output
    found = CliRunner().invoke(app, ["finetune", str(tmp_path / "no.yaml")])
    assert (found.exit_code, "There is no recipe" in found.output) == (2, True)


def test_accumulation_equals_one_large_batch():
    data, states = colors(), []
    for micro in (None, 4, 2):
        torch.manual_seed(1)
        model = Small()
        fit(
            model,
            Classification(),
            data,
            None,
            TrainSettings(epochs=2, batch_size=8, micro_batch=micro, learning_rate=0.01, **QUIET),
        )
        states.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.allclose(states[0], states[1], atol=1e-5)
    assert torch.allclose(states[0], states[2], atol=1e-5)


def test_only_matrices_decay():
    model, data = Small(), colors(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    class Still(Classification):
        def losses(self, model, batch):
            return {"none": 0 * super().losses(model, batch)["labels"]}

    settings = TrainSettings(
        epochs=1, batch_size=6, learning_rate=0.1, weight_decay=0.5, warmup=0, **QUIET
    )
    fit(model, Still(), data, None, settings)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"patch.weight", "head.weight"}


class Taxed(nn.Linear, Penalised):
    def penalty(self):
        return 10 * self.weight.square().sum()


def test_penalties_that_layers_declare_are_part_of_the_loss(tmp_path):
    model = Small()
    model.head = Taxed(8, 3)
    before = model.head.weight.square().sum().item()
    settings = TrainSettings(
        epochs=2, batch_size=8, learning_rate=0.05, weight_decay=0, schedule="constant", **QUIET
    )
    fit(model, Classification(), colors(), None, settings, log_dir=tmp_path / "logs")
    assert model.head.weight.square().sum().item() < before
    first = lines(tmp_path)[0]
    assert first["loss_penalty"] == pytest.approx(10 * before, rel=1e-4)
    assert first["loss"] == pytest.approx(first["loss_penalty"] + first["loss_labels"], rel=1e-5)


def test_a_student_learns_from_its_teacher_alone():
    from peft_vision.tasks.classification import Distillation

    data = colors()
    teacher, student = Small(), Small()
    fit(
        teacher, Classification(), data, None, TrainSettings(epochs=20, learning_rate=0.02, **QUIET)
    )
    wrong = TensorSet(data.pixels, (data.labels + 1) % 3)
    fit(
        student,
        Classification(distillation=Distillation(weight=1)),
        wrong,
        None,
        TrainSettings(epochs=20, learning_rate=0.02, **QUIET),
        teacher=teacher,
    )
    agree = student(data.pixels).argmax(-1) == teacher(data.pixels).argmax(-1)
    assert agree.float().mean() > 0.9


def test_bfloat16_leaves_weights_and_forward_as_they_were():
    model = Small()
    forward = model.forward
    settings = TrainSettings(epochs=3, batch_size=8, learning_rate=0.02, precision="bf16", **QUIET)
    figures = fit(model, Classification(), colors(), colors(), settings)
    assert figures["top1"] > 0.8
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    assert model.forward == forward
    assert model(torch.zeros(1, 3, 32, 32)).dtype is torch.float32
    assert not model.training


def test_checkpointing_changes_memory_and_not_the_result(tiny_timm):
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        model = tiny_timm(num_classes=3, drop_rate=0.1, proj_drop_rate=0.1)
        settings = TrainSettings(epochs=1, batch_size=8, gradient_checkpointing=on, **QUIET)
        fit(model, Classification(), colors(), None, settings)
        assert not model.grad_checkpointing
        found.append(model.head.weight.detach().clone())
    assert torch.allclose(*found, atol=1e-6)


def test_transformers_models_train_alike(tiny_transformers):
    model = tiny_transformers(num_labels=3)
    settings = TrainSettings(epochs=6, batch_size=8, learning_rate=0.01, **QUIET)
    assert fit(model, Classification(), colors(), colors(), settings)["top1"] > 0.8


def test_nothing_to_train_is_refused():
    settings = TrainSettings(**QUIET)
    with pytest.raises(BadSetting, match="no parameter that may be trained"):
        fit(Small().requires_grad_(False), Classification(), colors(), None, settings)
    with pytest.raises(DataError, match="training set is empty"):
        fit(Small(), Classification(), colors(0), None, settings)


def test_a_run_writes_no_pickle_but_the_optimizer(tmp_path):
    fit(
        Small(),
        Classification(),
        colors(),
        None,
        TrainSettings(epochs=1, batch_size=8, **QUIET),
        run_dir=tmp_path,
    )
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        *("model.safetensors", "optimizer.pt", "scheduler.pt"),
        *("trainer_state.json", "complete.json"),
    }
    assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
