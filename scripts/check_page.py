#!/usr/bin/env python3
"""Tries the server's page in a headless Chromium: models, live plots, the heat map, and that its own policy breaks nothing.

    cargo build --features serve
    scripts/check_page.py --binary target/debug/trt-embed --model tests/fixtures/bert [--screenshot page.png]

Needs Debian's packages chromium and chromium-driver, or others under these names; speaks WebDriver to it by itself.
"""

import argparse
import base64
import contextlib
import json
import re
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

PATIENCE = 60.0  # far above what any step takes
TEXTS = ["the cat sat", "the dog sat", "stocks fell"]
# Nothing is looked for outside this machine.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1100,1100",
]  # fmt: skip


def line_with(stream, pattern: str) -> re.Match:
    for line in stream:
        if found := re.search(pattern, line):
            return found
    raise SystemExit(f"check_page.py: a program ended without saying {pattern}")


@contextlib.contextmanager
def running(*command, said: str, stream: str):
    pipes = {stream: subprocess.PIPE, "stdout" if stream == "stderr" else "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([str(part) for part in command], text=True, **pipes)
    try:
        yield line_with(getattr(child, stream), said), getattr(child, stream)
    finally:
        child.kill()
        child.wait()


class Browser:
    def __init__(self, port: str, profile: str):
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.call("", {"capabilities": {"alwaysMatch": capabilities}})
        self.url += f"/{session['sessionId']}"

    def call(self, path: str, body: dict | None = None, method: str | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["value"]

    def run(self, script: str, *arguments):
        return self.call("/execute/sync", {"script": script, "args": list(arguments)})

    def until(self, script: str, what: str):
        end = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise SystemExit(f"check_page.py: {what}: it never came to that; the page says {self.run('return document.body.innerText')!r}")
            time.sleep(0.1)
        return value


def check(browser: Browser, page: str, model: str, screenshot: Path | None):
    browser.call("/url", {"url": page})
    browser.until("return document.getElementById('ready').textContent === 'ready'", "the server is ready")
    row = browser.until("return document.querySelector('#models tr td:nth-child(4)')?.textContent && document.querySelector('#models tr').innerText", "the model is listed")
    assert model in row and "cpu" in row, row

    # An error of the server is said.
    button = browser.call("/element", {"using": "css selector", "value": "#try button"})
    browser.run("document.getElementById('texts').value = ''")
    browser.call(f"/element/{next(iter(button.values()))}/click", {})
    browser.until("return document.getElementById('said').textContent.includes('empty')", "an error is shown")

    # Texts that look like markup stay texts.
    texts = [*TEXTS, "<img src=x onerror=alert(1)>"]
    browser.run("document.getElementById('texts').value = arguments[0]", "\n".join(texts))
    browser.call(f"/element/{next(iter(button.values()))}/click", {})
    cells = browser.until("return document.querySelector('#heat table') && [...document.querySelectorAll('#heat tr')].map((row) => [...row.children].map((cell) => [cell.textContent, cell.style.background]))", "the heat map")
    assert [row[0][0] for row in cells] == texts, cells
    values = [[float(cell[0]) for cell in row[1:]] for row in cells]
    assert all(len(row) == len(texts) for row in values), values
    assert all(abs(values[i][i] - 1) < 1e-3 and abs(values[i][j] - values[j][i]) < 1e-3 for i in range(len(texts)) for j in range(len(texts))), values
    assert len({cell[1] for row in cells for cell in row[1:]}) > 1, "every cell has one colour"
    assert browser.run("return document.querySelectorAll('#heat img').length") == 0

    # The plots have drawn the request that was made: points of both colours and the scale's number.
    browser.until("return kept.rate[0].some((value) => value > 0) && kept.latency[0].some((value) => value > 0)", "the plots know of a request")
    for plot in ("queue", "latency", "rate"):
        drawn = browser.run("const c = document.getElementById(arguments[0]); return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v > 0).length", plot)
        assert drawn > 50, (plot, drawn)

    if screenshot:
        screenshot.write_bytes(base64.b64decode(browser.call("/screenshot")))
    # 400 is the error that was asked for; anything else, such as a part that the policy refuses, is a fault.
    said = [entry["message"] for entry in browser.call("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]
    faults = [message for message in said if " 400 " not in message]
    assert not faults, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--screenshot", type=Path)
    arguments = parser.parse_args()
    server = [arguments.binary.resolve(), "serve", "-m", f"tried={arguments.model}", "--backend", "cpu", "--hostname", "127.0.0.1", "--port", "0"]
    with running(*server, said=r"listening on (http://127\.0\.0\.1:\d+)", stream="stderr") as (server, log):
        page = server.group(1)
        line_with(log, r"\bready$")
        with tempfile.TemporaryDirectory() as profile, running("chromedriver", "--port=0", said=r"successfully on port (\d+)", stream="stdout") as (driver, _):
            browser = Browser(driver.group(1), profile)
            try:
                check(browser, page, "tried", arguments.screenshot)
            finally:
                browser.call("", method="DELETE")
    print("the page works")


if __name__ == "__main__":
    main()
