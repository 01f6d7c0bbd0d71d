"""Take a screenshot of a demo's report for the README: docs/images/report.png.

    blt demo --out runs/demo                 # on an idle machine, with the default minutes
    python dev/report_picture.py runs/demo

Needs Chromium or Chrome (Debian: `apt-get install chromium`), and the DejaVu fonts.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1000, 2130  # CSS pixels: down to the first lines of patched text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder of a demo, or a report")
    parser.add_argument("--out", type=Path, default=PICTURE)
    given = parser.parse_args()
    report = given.demo / "report.html" if given.demo.is_dir() else given.demo
    if not report.is_file():
        sys.exit(f"'{report}' does not exist; run: blt demo --out {given.demo}")
    take(report, given.out)
    print(given.out)


def take(report: Path, picture: Path) -> None:
    """Write a PNG of the head of a page."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser found; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = f"--window-size={WIDTH},{HEIGHT}"
        where = f"--screenshot={picture.resolve()}"
        command = [browser, *options, size, where, report.resolve().as_uri()]
        subprocess.run(command, check=True, timeout=120, capture_output=True)


if __name__ == "__main__":
    main()
