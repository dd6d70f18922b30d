"""Open a page in headless Chromium, at phone and desktop width, in light and dark mode, and measure it by a script."""

import fcntl
import html
import json
import os
import re
import subprocess

from helpers.capabilities import find_browser
from helpers.launching import limit, wait_until

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --virtual-time-budget=5000 --window-size=1300,900")  # fmt: skip
WIDTHS = (390, 1280)

MEASURE = """
<script>
addEventListener('load', () => setTimeout(() => {  // when the page's own script has drawn
  document.querySelectorAll('details').forEach(one => { one.open = true })
  const box = one => { const r = one.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] }
  const channels = text => text.match(/[\\d.]+/g).map(Number)
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = channels(getComputedStyle(one).backgroundColor)
      if (colour[3] !== 0) return colour
    }
    return [255, 255, 255]
  }
  const contrast = one => {
    const style = getComputedStyle(one)
    const both = [channels(one.closest('svg') ? style.fill : style.color), behind(one)].map(light).sort((a, b) => a - b)
    return (both[1] + 0.05) / (both[0] + 0.05)
  }
  const texts = [...document.body.querySelectorAll('*:not(script)')]
    .filter(one => [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
    .filter(one => one.tagName !== 'title')
  const plots = [...document.querySelectorAll('.plot')]
  const inside = (inner, outer) => inner[0] >= outer[0] - 1 && inner[1] >= outer[1] - 1 &&
    inner[2] <= outer[2] + 1 && inner[3] <= outer[3] + 1
  parent.postMessage({
    width: innerWidth,
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    scroll_width: document.documentElement.scrollWidth,
    data: [...document.querySelectorAll('data')].map(one => [one.dataset.key, one.value, one.textContent]),
    plots: plots.map(one => [one.id, box(one)]),
    figures: [...document.querySelectorAll('figure')].map(box),
    clipped: plots.flatMap(plot => [...plot.querySelectorAll('text')]
      .filter(text => !inside(box(text), box(plot))).map(text => plot.id + ': ' + text.textContent)),
    unnamed: document.querySelectorAll('svg:not([role=img]), th:not([scope]), figure:not(:has(figcaption))').length,
    texts: texts.length,
    least_contrast: Math.min(...texts.map(contrast)),
    ids: [...document.querySelectorAll('[id]')].map(one => one.id),
    outcome: document.querySelector('.outcome').textContent,
  }, '*')
}, 1000))
</script>
"""
FRAMES = """<!doctype html><meta name="color-scheme" content="light dark"><pre></pre>{frames}
<script>
const found = []
addEventListener('message', event => {{
  found.push(event.data)
  document.querySelector('pre').textContent = JSON.stringify(found)
}})
</script>
{loads}
"""


def measured(page, folder, dark, script=False):
    """Return the results of ``MEASURE`` in the page, by width; without its own script unless ``script``."""
    copy, frames = folder / "measured.html", folder / "frames.html"
    text = page.read_text()
    copy.write_text((text if script else re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)) + MEASURE)
    boxes = "".join(f'<iframe width="{width}" height="900" style="border: 0"></iframe>' for width in WIDTHS)
    load = "<script>document.querySelectorAll('iframe').forEach(one => { one.src = 'measured.html' })</script>"
    frames.write_text(FRAMES.format(frames=boxes, loads=load))  # the frames load once there is a listener
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    profile = folder / f"profile-{dark}"
    command = [find_browser(), *FLAGS.split(), scheme, f"--user-data-dir={profile}", "--dump-dom", frames.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=limit(120))
    found = re.search(r"<pre>(.*?)</pre>", result.stdout, re.DOTALL)
    assert found is not None, result.stderr
    assert found[1], "the page reported nothing"
    return {one["width"]: one for one in json.loads(html.unescape(found[1]))}


class Chromium:
    """Headless Chromium with one tab, driven by the DevTools protocol over two pipes, which need no port."""

    def __init__(self, folder):
        (commands, self._write), (self._read, answers) = os.pipe(), os.pipe()
        # Chromium reads commands from file descriptor 3 and writes answers to 4.
        ours = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (commands, answers)]
        line = f'exec "$@" 3<&{ours[0]} 4>&{ours[1]}'
        flags = [one for one in FLAGS.split() if "virtual-time" not in one]
        command = [
            find_browser(),
            *flags,
            "--remote-debugging-pipe",
            f"--user-data-dir={folder / 'tab'}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", *command], pass_fds=ours, stderr=subprocess.DEVNULL
        )
        for descriptor in (commands, answers, *ours):
            os.close(descriptor)
        self._answers, self._calls, self._session, self.events = os.fdopen(self._read, "rb"), 0, None, []
        (tab,) = (one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """The result of a method of the protocol."""
        self._calls += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._calls, "method": method, "params": parameters, **session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(b"".join(iter(lambda: self._answers.read(1), b"\0")))
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def value(self, script):
        """The JSON-able value of an expression, which may be a promise."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path, ready, width=1280, touch=False):
        """Load a page and wait until the expression ``ready`` is true."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.call("Page.navigate", url=path.as_uri())
        # Asked from outside: a page without scripts has no timers either.
        wait_until(lambda: self.value(f"Boolean({ready})"), f"{path} does not come to {ready}")

    def mouse(self, kind, x, y, clicks=0):
        button = {"button": "left", "clickCount": clicks} if clicks else {}
        buttons = {"buttons": 1} if clicks else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button, **buttons)

    def frame(self):
        """Wait until what has been asked for is drawn."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def problems(self):
        """What the page has written to the console, errors and uncaught exceptions included."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [one for one in self.events if one.get("method") in kinds]

    def close(self):
        self.call("Browser.close")
        self._process.wait(timeout=limit(60))
        self._answers.close()
        os.close(self._write)
