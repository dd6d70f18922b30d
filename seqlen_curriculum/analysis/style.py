"""The page's style sheet: light and dark, from a phone's width up."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --quiet: #57606a; --line: #d5dae0; --panel: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1317; --ink: #e6e9ec; --quiet: #a3adb8; --line: #333b44; --panel: #171c22 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem clamp(0.8rem, 3vw, 2.5rem) 2rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1rem; font-weight: 600; color: var(--quiet); letter-spacing: 0.02em }
h2 { margin: 2.4rem 0 0.8rem; padding-bottom: 0.3rem; font-size: 1.25rem; border-bottom: 1px solid var(--line) }
.outcome { margin: 0.3rem 0 0.8rem; max-width: 62rem; font-size: clamp(1.1rem, 0.95rem + 0.7vw, 1.5rem); line-height: 1.35 }
.note, footer { margin: 0.2rem 0; color: var(--quiet); font-size: 0.9rem }
.legend { position: sticky; top: 0; max-height: 30vh; overflow: auto; z-index: 1; display: flex;
  flex-wrap: wrap; gap: 0.2rem 1.4rem; margin: 1rem 0 0; padding: 0.5rem 0;
  list-style: none; background: var(--page); border-bottom: 1px solid var(--line) }
.legend .line { display: inline-block; width: 1.6rem; margin-right: 0.5rem; vertical-align: middle }
.scrolls { overflow-x: auto; margin: 0 0 1.2rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--panel) }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
caption { text-align: left; font-weight: 600 }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(100%, 100vw - 2rem); padding: 0.6rem 0.8rem }
th, td { padding: 0.35rem 0.8rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line) }
thead th { color: var(--quiet); font-size: 0.85rem; font-weight: 500; vertical-align: bottom;
  white-space: normal; min-width: 5.5rem }
.words :is(td, th) { text-align: left }
th:first-child { text-align: left }
tbody th { min-width: min(11rem, 33vw); max-width: 45vw; font-weight: 500; white-space: normal; overflow-wrap: anywhere }
.ratio { color: var(--quiet) }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1.2rem }
.figures > .note { grid-column: 1 / -1 }
figure { display: flex; flex-direction: column; justify-content: space-between; min-width: 0; margin: 0;
  padding: 0.6rem 0.6rem 0.4rem; border: 1px solid var(--line); border-radius: 6px }
figcaption { padding: 0 0.3rem 0.3rem; font-size: 0.9rem; line-height: 1.3;
  color: var(--quiet) }
figcaption :is(strong, span) { display: block }
figcaption strong { color: var(--ink) }
figcaption span { font-size: 0.82rem }
.plot { display: block; width: 100%; height: auto; stroke-linejoin: round }
details { margin: 0 0 1.2rem }
summary { cursor: pointer; padding: 0.3rem 0; color: var(--quiet) }
footer { margin-top: 2.5rem; padding-top: 0.8rem; border-top: 1px solid var(--line) }
footer p { margin: 0.2rem 0 }
@media print { .legend { position: static } .scrolls, figure { break-inside: avoid } }
"""
