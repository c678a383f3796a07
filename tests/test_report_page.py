"""The report's page in a real browser with the network cut off: its pictures are seen, and nothing in it runs."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from report_run import colours, make_run

from components.report import report


def _load_script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "screenshot.py"
    spec = importlib.util.spec_from_file_location("screenshot", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["screenshot"] = module
    spec.loader.exec_module(module)
    return module


script = _load_script()
pytestmark = pytest.mark.skipif(script.find_browser() is None, reason="no Chromium on this machine: apt-get install chromium")
ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on 48 suspicious images of 48 different colours, one class of which is named by an attacker."""
    run = tmp_path_factory.mktemp("page") / "run-1"
    report(make_run(run, class_names=("zero", ATTACK)), run / "report.html")
    return run / "report.html"


def _count_pixels(picture: Path) -> dict[tuple[int, int, int], int]:
    """How many pixels of each colour a picture holds."""
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(map(int, colour)): int(n) for colour, n in zip(found, counts, strict=True)}


@pytest.mark.slow
def test_all_suspicious_images_are_seen_without_a_network(page: Path, tmp_path: Path) -> None:
    script.screenshot(page, tmp_path / "page.png", size=(1200, 9000), scale=0.5)
    seen = _count_pixels(tmp_path / "page.png")
    assert [colour for colour in colours(48) if seen.get(colour, 0) < 1500] == []
    assert seen.get((1, 2, 255), 0) == 0


@pytest.mark.slow
def test_the_pixel_count_notices_a_lost_picture(page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    before, gallery, after = page.read_text().partition('<section id="images">')
    broken.write_text(before + gallery + after.replace("data:image/png;base64,", "https://example.invalid/", 1))
    script.screenshot(broken, tmp_path / "page.png", size=(1200, 9000), scale=0.5)
    seen = _count_pixels(tmp_path / "page.png")
    assert [i for i, colour in enumerate(colours(48)) if seen.get(colour, 0) < 1500] == [0]


def test_nothing_in_the_page_runs(page: Path) -> None:
    dom = script.browse(page, "--dump-dom")
    assert "<title>PASS · run-1 · CBD report</title>" in dom and "<script" not in dom
    assert dom.count("<img ") == 48 + 1 + 1  # the gallery, a pattern and the triggers
