"""How long the page takes in a browser with a pasted text of 200 kB: to paint, to scroll, to move the threshold.

    blt serve tiny --port 8000
    python benchmarks/page.py http://127.0.0.1:8000

Needs playwright and Chromium, see dev/page_screenshots.py. Numbers are milliseconds: the median, 9 of 10, the most.
"""

import argparse
import json
import shutil
from typing import Any

from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

LINE = "Each line of a long text has words, 数字 and signs: 12345.\n"
PAINTED = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"  # the frame is drawn
MEASURES = {
    # A short text has been read: from the answer's last byte to the frame that shows it.
    "answer to paint": f"""async () => {{
      const times = [];
      const original = Response.prototype.json;
      let arrived = 0;
      Response.prototype.json = async function () {{
        const found = await original.call(this); arrived = performance.now(); return found; }};
      const field = document.querySelector("#view-patches textarea");
      for (let i = 0; i < 12; i++) {{
        arrived = 0;
        field.value = "{LINE.strip()} ".repeat(20) + i;
        field.dispatchEvent(new Event("input"));
        while (!arrived) await new Promise((done) => setTimeout(done, 0));
        await {PAINTED};
        times.push(performance.now() - arrived);
      }}
      Response.prototype.json = original;
      return times; }}""",
    "frame while scrolling": """async () => {
      const host = document.querySelector("#view-patches .patched");
      const times = [];
      let last = performance.now();
      for (let i = 0; i < 200; i++) {
        host.scrollTop += 60;
        await new Promise(requestAnimationFrame);
        times.push(performance.now() - last);
        last = performance.now();
      }
      return times; }""",
    "threshold to paint": f"""async () => {{
      const slider = document.querySelector(".histogram input");
      const times = [];
      for (let i = 0; i < 60; i++) {{
        const began = performance.now();
        slider.value = String(i / 15);
        slider.dispatchEvent(new Event("input"));
        await {PAINTED};
        times.push(performance.now() - began);
      }}
      return times; }}""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="of a server")
    parser.add_argument("--size", type=int, default=200_000, help="bytes of the long text")
    parser.add_argument("--browser", default=shutil.which("chromium"))
    given = parser.parse_args()
    found: dict[str, Any] = {"bytes": given.size}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.browser, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(600_000)
        page.goto(given.address)
        page.wait_for_function("() => document.querySelector('.facts dd')")
        found["answer to paint"] = summary(page.evaluate(MEASURES["answer to paint"]))
        text = LINE * (given.size // len(LINE.encode()))
        found["paste to all read"] = page.evaluate(
            """async (text) => {
              const began = performance.now();
              const field = document.querySelector("#view-patches textarea");
              field.value = text;
              field.dispatchEvent(new Event("input"));
              const bytes = new TextEncoder().encode(text).length.toLocaleString("en");
              const status = document.querySelector("#view-patches .status");
              const facts = () => document.querySelector(".facts").textContent;
              while (status.textContent || !facts().includes(bytes)) await new Promise((done) => setTimeout(done, 20));
              return performance.now() - began; }""",
            text,
        )
        for name in ("frame while scrolling", "threshold to paint"):
            found[name] = summary(page.evaluate(MEASURES[name]))
        browser.close()
    print(json.dumps(found, indent=2))


def summary(times: list[float]) -> list[float]:
    times = sorted(times)
    return [round(times[int(share * (len(times) - 1))], 1) for share in (0.5, 0.9, 1.0)]


if __name__ == "__main__":
    main()
