"""The report: complete in one file, safe with any text, and looked at in a real browser."""

from __future__ import annotations

import dataclasses
import html.parser
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from peft_vision.errors import BadSetting, CannotWrite, MissingExtra
from peft_vision.report import (
    Block,
    Command,
    Kept,
    Overlay,
    Ranking,
    Reading,
    ReportContent,
    Speed,
    Stage,
    write_report,
)

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NETWORK = re.compile(r"""(?:src|href|action|data)\s*=\s*["']?(?:https?:)?//|@import|url\((?!#)""")


@pytest.fixture
def content() -> ReportContent:
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    stages = (Stage("after block 1", tuple(range(16))), Stage("after block 2", (0, 7, 23)))
    blocks = (
        Block(Kept(3, (0, 2)), Kept(192, tuple(range(100))), 16),
        Block(Kept(3, (1,)), Kept(192, tuple(range(7))), 3),
    )
    return ReportContent(
        title="Tulips & <roses>",
        summary="A sentence.",
        readings=(
            Reading("dense", 0.9, 400, 2_000_000, 5_000_000, Speed(10, 9, 11), 20_000_000),
            Reading("compressed", 0.5, 400, 800_000, 3_000_000),
            Reading("after recovery", 0.85, 400, 800_000, 3_000_000, Speed(21, 20, 23), 12_000_000),
        ),
        baselines={"majority": 0.5, "raw pixels": 0.7},
        budget=0.4,
        patches=24,
        blocks=blocks,
        ranking=Ranking(
            "dense <b>",
            32,
            [[0.125, 1.0, 0.5], [0.25, 0.75, None]],
            {"leave_one_out": 1.0, "taylor": -0.256, "flat": None},
            ("slow_one was left out.",),
        ),
        overlays=(Overlay('a "rose"', image, (4, 6), stages),),
        settings={"seed": 0},
        versions={"torch": "2.6"},
        notes=("one seed",),
        commands=(Command("Try", "peft-vision show <MODEL>"),),
    )


class Page(html.parser.HTMLParser):
    """Collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attributes.get(name) for found, attributes in self.tags if found == tag]


@pytest.fixture
def page(content: ReportContent, tmp_path: Path) -> str:
    return write_report(tmp_path / "report.html", content).read_text()


def test_everything_is_inside(page: str) -> None:
    assert not NETWORK.search(page)
    assert "<script" not in page
    sources = Page(page).attributes("img", "src")
    assert len(sources) == 3
    assert all(source and source.startswith("data:image/") for source in sources)


def test_figures_are_in_the_table(page: str) -> None:
    table = page[page.index('<table id="results">') :]
    table = re.sub(r"<[^>]+>|\s+", " ", table[: table.index("</table>")])
    for figure in (
        "90.0",
        "± 1.5",
        "0.001",
        "0.400",
        "5.00",
        "10.0",
        "9.0\N{EN DASH}11.0",
        "20.0 MB",
    ):
        assert figure in table
    assert re.search(r"majority \(baseline\)\s+50\.0", table)


def test_text_is_escaped(page: str) -> None:
    assert "Tulips &amp; &lt;roses&gt;" in page
    assert "peft-vision show &lt;MODEL&gt;" in page
    assert "<roses>" not in page


def test_ids_are_unique_and_references_are_met(page: str) -> None:
    ids = [value for _, attributes in Page(page).tags if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {one or other for one, other in used} <= set(ids)


def test_pictures_have_alternative_texts(page: str) -> None:
    found = Page(page)
    assert all(found.attributes("img", "alt"))
    assert "3 of 24 patches kept" in page
    labels = [a.get("aria-label") for tag, a in found.tags if a.get("role") == "img"]
    assert len(labels) == 5
    assert all(labels)


def test_colors_follow_the_page(page: str) -> None:
    """No chart has a fixed dark or light color: each is one of the page's variables."""
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    literal = {color.lower() for color in re.findall(r"(?:fill|stroke): (#\w+)", charts)}
    assert not literal
    assert "var(--ink)" in charts


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("text", ["ink", "muted", "accent", "second"])
def test_contrast_is_readable(page: str, theme: int, text: str) -> None:
    """WCAG AA: 4.5 for text, on the page and on a card."""
    colors = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in page.split("@media")[:2]][
        theme
    ]
    for ground in ("page", "card"):
        one, other = sorted((_luminance(colors[text]), _luminance(colors[ground])))
        assert (other + 0.05) / (one + 0.05) >= 4.5


def test_a_single_reading_is_enough(tmp_path: Path) -> None:
    small = ReportContent("t", "s", (Reading("dense", 1.0, 10, 2_000_000, 5),))
    page = write_report(tmp_path / "a" / "report.html", small).read_text()
    assert "What is left" not in page
    assert "What each attention head is worth" not in page
    assert "<h2" in page


def test_other_architectures(tmp_path: Path, content: ReportContent) -> None:
    """Blocks without heads or hidden units, and many of them."""
    blocks = tuple(Block(None, None, 9) if n % 2 else Block(Kept(16, (3,))) for n in range(40))
    deep = dataclasses.replace(content, blocks=blocks, overlays=())
    assert 'id="blocks"' in write_report(tmp_path / "report.html", deep).read_text()


def text_of(table: str) -> list[str]:
    """The cells of a table, in order."""
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", table)
    return [re.sub(r"<[^>]+>", "", cell) for cell in cells]


def test_heads_and_the_agreement_of_their_scores_are_shown(page: str) -> None:
    dash = "\N{EN DASH}"
    agreement, ranks = (
        text_of(page[page.index(f'<table id="{name}">') :].partition("</table>")[0])
        for name in ("agreement", "ranks")
    )
    assert agreement[2:] == ["leave_one_out", "+1.00", "taylor", "-0.26", "flat", dash]
    assert ranks[:4] == ["block", "head 1", "head 2", "head 3"]
    assert ranks[4:] == ["1", "12", "100", "50", "2", "25", "75", dash]
    assert "dense &lt;b&gt;" in page
    assert "on 32 images" in page
    assert "slow_one was left out." in page


def test_a_head_is_as_full_as_its_rank(content: ReportContent) -> None:
    from peft_vision.report import figures

    assert content.ranking is not None
    drawn = figures.rank_of_heads(content.ranking.rank)
    assert sorted(re.findall(r"fill-opacity: ([\d.]+)", drawn)) == ["0.125", "0.25", "0.5", "0.75"]


def test_a_ranking_needs_no_blocks(content: ReportContent, tmp_path: Path) -> None:
    alone = dataclasses.replace(content, blocks=(), patches=None)
    page = write_report(tmp_path / "report.html", alone).read_text()
    assert "What is left of each block" not in page
    assert 'id="agreement"' in page


def test_same_content_same_page(content: ReportContent, tmp_path: Path) -> None:
    first = write_report(tmp_path / "one.html", content).read_bytes()
    assert write_report(tmp_path / "two.html", content).read_bytes() == first


def test_standard_error_is_binomial() -> None:
    assert Reading("x", 0.5, 100, 1, 1).standard_error == pytest.approx(0.05)


def test_dropped_patches_are_dimmed_and_kept_ones_are_not(content: ReportContent) -> None:
    from peft_vision.report import overlays

    image = np.full((8, 8, 3), 200, dtype=np.uint8)
    scaled = overlays._scale(image, (2 * overlays._PATCH, 2 * overlays._PATCH))
    picture = overlays._dim(scaled, np.array([[True, False], [False, False]]))
    middle = overlays._PATCH // 2
    assert picture[middle, middle].tolist() == [200, 200, 200]
    assert picture[-middle, -middle].max() < 80


def test_contents_are_checked(content: ReportContent) -> None:
    with pytest.raises(BadSetting, match="at least one reading"):
        dataclasses.replace(content, readings=())
    stray = dataclasses.replace(content.overlays[0], stages=(Stage("x", (24,)),))
    with pytest.raises(BadSetting, match="patch 24"):
        dataclasses.replace(content, overlays=(stray,))


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_package_names_the_extra(monkeypatch, content, tmp_path, package) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else real(n))
    with pytest.raises(MissingExtra, match=r"peft-vision\[report\]"):
        write_report(tmp_path / "report.html", content)


def test_a_failed_write_keeps_the_old_report(content: ReportContent, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CannotWrite):
        write_report(tmp_path / "file" / "report.html", content)
    assert (tmp_path / "file").read_text() == "not a folder"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def browse(file: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a file in a headless browser that may not use the network."""
    assert CHROMIUM is not None
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
        f"--user-data-dir={profile}",
    ]
    command = [CHROMIUM, *quiet, *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    original = tmp_path / "report.html"
    shown = browse(original, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in shown.stderr
    assert 'id="results"' in shown.stdout
    # The page forbids scripts: a copy without that line reports what the browser made of it.
    probe = """<script>addEventListener("load", () => {
      const images = [...document.images], root = document.documentElement;
      root.dataset.decoded = images.filter(i => i.complete && i.naturalWidth > 0).length;
      root.dataset.charts = [...document.querySelectorAll("svg")].filter(
        s => s.getBoundingClientRect().height > 50).length;
      root.dataset.overflow = root.scrollWidth > root.clientWidth;
      root.dataset.requests = performance.getEntriesByType("resource").filter(
        e => !e.name.startsWith("data:")).length;
    })</script></body>"""
    copy = tmp_path / "copy.html"
    copy.write_text(re.sub(r"<meta http-equiv=[^>]+>", "", page).replace("</body>", probe))
    for width in (1200, 500):
        size = f"--window-size={width},900"
        seen = browse(copy, tmp_path / f"profile{width}", "--dump-dom", size).stdout
        root = dict(re.findall(r'data-(\w+)="(\w+)"', seen[: seen.index("<head>")]))
        assert root == {"decoded": "3", "charts": "5", "overflow": "false", "requests": "0"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_light_and_dark_are_drawn(page: str, tmp_path: Path) -> None:
    from PIL import Image

    corners = []
    for theme in (1, 0):  # light, dark
        picture = tmp_path / f"{theme}.png"
        browse(
            tmp_path / "report.html",
            tmp_path / f"profile{theme}",
            f"--screenshot={picture}",
            "--window-size=900,900",
            f"--blink-settings=preferredColorScheme={theme}",
        )
        with Image.open(picture) as image:
            corners.append(sum(image.convert("RGB").getpixel((2, 2))))
    assert corners[0] > 600
    assert corners[1] < 150
