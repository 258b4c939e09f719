"""`peft-vision track`: from a video to boxes, and one message for each thing that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import peft_vision as pv
from peft_vision.cli import app
from peft_vision.tracking import open_frames
from tests.tracking.moving_square import (
    noise,
    painted,
    path,
    tiny_tracker,
    write_folder,
    write_video,
)

BOXES = path(6)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracker, a plain model, a video and a folder of frames."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    pv.merge(tiny_tracker()).save_pretrained(root / "model")
    plain = pv.create_model("timm/test_vit", pretrained=False, img_size=64)
    pv.compress(plain, target_params=0.8, methods=["magnitude"]).save_pretrained(root / "plain")
    write_video(root / "clip.mp4", [painted(box) for box in BOXES])
    write_folder(root / "frames", BOXES)
    return root


@pytest.fixture(autouse=True)
def inside(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(made)
    before = {file.name for file in made.iterdir()}
    yield
    for file in made.iterdir():
        if file.name not in before:
            file.unlink() if file.is_file() else shutil.rmtree(file)


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["track", *words])


def box_of(row: int = 0) -> str:
    return ",".join(f"{value:.3f}" for value in BOXES[row])


def test_a_video_into_lines_a_file_and_a_video(made: Path) -> None:
    words = ["clip.mp4", "--box", box_of(), "--model", "model", "--device", "cpu"]
    printed = run(*words)
    assert printed.exit_code == 0, printed.output
    rows = np.loadtxt(printed.stdout.splitlines())
    assert rows.shape == (6, 6)
    assert rows[:, 0].tolist() == list(range(6))
    np.testing.assert_allclose(rows[0, 1:], [*BOXES[0], 1.0], atol=1e-3)
    assert "6 frames" in printed.stderr
    written = run(*words, "-o", "out.txt", "-o", "out.mp4")
    assert written.exit_code == 0, written.output
    said = " ".join(written.stdout.split())
    assert "6 frames" in said
    assert "mean confidence 0." in said
    assert "saved to out.txt and out.mp4" in said
    np.testing.assert_allclose(np.loadtxt("out.txt", delimiter=","), rows[:, 1:5], atol=2e-3)
    film = open_frames("out.mp4")
    assert len(film) == 6
    assert film.rate == 25


def test_a_folder_that_knows_where_to_start_in_json(made: Path) -> None:
    result = run("frames", "--model", "model", "--device", "cpu", "--json", "--frames", "4")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["frames"], said["output"]) == (4, [])
    np.testing.assert_allclose(said["boxes"][0], BOXES[0], atol=1e-3)
    assert len(said["boxes"]) == len(said["scores"]) == 4
    assert said["fps"] > 0
    assert 0 < said["confidence"] < 1
    one = json.loads(run("frames", "-m", "model", "--json", "--frames", "1").stdout)
    assert (one["fps"], one["confidence"]) == (None, None)


def test_an_output_that_exists_needs_overwrite(made: Path) -> None:
    Path("out.txt").write_text("mine")
    words = ["frames", "--model", "model", "--output", "out.txt"]
    refused(run(*words), "--overwrite")
    assert Path("out.txt").read_text() == "mine"
    assert run(*words, "--overwrite").exit_code == 0
    assert len(np.loadtxt("out.txt", delimiter=",")) == 6


def refused(result: Result, says: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert says in " ".join(result.output.split())
    assert result.output.count("Error:") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ("500,10,20,20", "outside of the frame, which is 160 x 120"),
        ("10,10,0,20", "no area"),
        ("10,10,20,-5", "no area"),
        ("nan,10,20,20", "finite"),
        ("10,10,20", "four numbers"),
        ("10,10,20,20,20", "four numbers"),
        ("a,b,c,d", "--box a,b,c,d: four numbers"),
        ("", "four numbers"),
    ],
)
@pytest.mark.parametrize("source", ["clip.mp4", "frames"])
def test_boxes(source: str, box: str, says: str) -> None:
    """They are refused before any model is loaded."""
    refused(run(source, "--box", box, "--model", "nowhere"), says)


def test_sources(made: Path) -> None:
    words = ["--box", "1,2,3,4", "--model", "nowhere"]
    Path("text.mp4").write_text("no video" * 99)
    Path("empty").mkdir()
    shutil.copytree("frames", "hole")
    Path("hole/0003.png").unlink()
    refused(run("text.mp4", *words), "cannot be decoded as a video")
    refused(run("empty", *words), "no image files")
    refused(run("hole", *words), "no frame 3: 0002.png is followed by 0004.png")
    refused(run("none.mp4", *words), "There is no none.mp4")
    refused(run("99", *words), "no camera 99")
    refused(run("clip.mp4", "--model", "nowhere"), "Where is the object? Pass --box")
    Path("hole/groundtruth.txt").write_text("box\n")
    refused(run("hole", "--model", "nowhere"), "first line of hole/groundtruth.txt, 'box'")


def test_a_frame_that_breaks_in_the_middle(made: Path) -> None:
    shutil.copytree("frames", "torn")
    Path("torn/0004.png").write_bytes(b"\x89PNG and nothing else")
    refused(
        run("torn", "--model", "model", "-o", "out.mp4", "-o", "out.txt"),
        "0004.png cannot be read: it is no image",
    )
    assert not Path("out.mp4").exists()
    assert not Path("out.txt").exists()


def test_models_outputs_and_settings(made: Path) -> None:
    words = ["frames", "--model", "model"]
    refused(run("frames", "--model", "nowhere"), "There is no folder nowhere")
    refused(run("frames", "--model", "plain"), "plain is not a tracker")
    refused(run("frames", "--model", "frames"), "frames")
    refused(run(*words, "-o", "out.gif"), "ends in .mp4 or .txt")
    refused(run(*words, "-o", "no/out.txt"), "no folder no", code=1)
    refused(run(*words, "--rate", "0"), "--rate is 0")
    refused(run(*words, "--precision", "fp8"), "fp32, bf16")
    refused(run(*words, "--device", "warp"), "no device 'warp'")
    assert run("frames").exit_code == 2
    assert run(*words, "--frames", "0").exit_code == 2


def test_a_camera_until_it_is_switched_off(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pictures(source: object) -> Iterator[np.ndarray]:
        assert source == 0
        for seed in range(4):
            yield noise(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_vision.tracking.frames.stream", pictures)
    words = ["0", "--box", "20,20,40,30", "--model", "model"]
    result = run(*words, "-o", "out.txt")
    assert result.exit_code == 0, result.output
    assert len(np.loadtxt("out.txt", delimiter=",")) == 4
    assert json.loads(run(*words, "--frames", "2", "--json").stdout)["frames"] == 2


def test_help_is_there_at_once() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from peft_vision.cli import app; "
        "found = CliRunner().invoke(app, ['track', '--help']); assert '--box' in found.output; "
        "heavy = {'torch', 'cv2', 'numpy', 'timm', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    root = Path(pv.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
