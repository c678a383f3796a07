"""A picture of a report: `python benchmarks/screenshot.py report.html out.png`, drawn by headless Chromium without a network."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--proxy-server=127.0.0.1:9",
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The path of an installed Chromium, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def browse(page: Path, *options: str) -> str:
    """Chromium's standard output after opening `page` in a fresh profile.

    Raises:
        CalledProcessError, TimeoutExpired: it failed.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(find_browser()), *FLAGS, f"--user-data-dir={profile}", *options, page.resolve().as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=90).stdout


def screenshot(page: Path, out: Path, *, size: tuple[int, int] = (1200, 1500), scale: float = 1, dark: bool = False) -> None:
    """Writes `size` (width, height) pixels of `page` from its top to the PNG `out`."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    window = f"--window-size={size[0]},{size[1]}"
    browse(page, f"--screenshot={out.resolve()}", window, f"--force-device-scale-factor={scale}", *scheme)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=1500)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    if find_browser() is None:
        print(f"no browser found: install one of {', '.join(BROWSERS)}", file=sys.stderr)
        return 1
    if not options.report.is_file():
        print(f"{options.report}: no such report", file=sys.stderr)
        return 2
    size = (options.width, options.height)
    screenshot(options.report, options.out, size=size, scale=options.scale, dark=options.dark)
    return 0


if __name__ == "__main__":
    sys.exit(main())
