"""Open a page in headless Chromium, at phone and desktop width, in light and dark mode, and measure it by a script."""

import html
import json
import re
import subprocess

from helpers.capabilities import find_browser
from helpers.launching import limit

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --virtual-time-budget=5000 --window-size=1300,900")  # fmt: skip
WIDTHS = (390, 1280)

MEASURE = """
<script>
addEventListener('load', () => {
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
  const plots = [...document.querySelectorAll('svg.plot')]
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
})
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


def measured(page, folder, dark):
    """Return the results of ``MEASURE`` in the page, by width."""
    copy, frames = folder / "measured.html", folder / "frames.html"
    copy.write_text(page.read_text() + MEASURE)
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
