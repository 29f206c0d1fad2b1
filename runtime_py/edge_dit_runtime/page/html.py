"""Style and frame of edge-dit's pages: light and dark, for narrow and wide screens, and for print.

A page has no scripts and loads nothing: pictures are data: URIs, charts inline SVG, coloured by CSS
variables so that they follow the reader's setting.
"""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
from PIL import Image

STYLE = """\
:root {
  color-scheme: light;
  --page: #ffffff; --ink: #1b1f24; --soft: #545c66; --line: #cfd5dc; --panel: #f4f6f8;
  --trained: #1f6f54; --on-trained: #ffffff; --skipped: #e6e9ed; --hatch: #b9c0c9;
  --heat: #3f1f7a; --on-low: #000000; --on-high: #ffffff; --own: #c2410c;
  --role-0: #3d5f9e; --role-1: #a8540a; --role-2: #1f7a58; --role-3: #92407f; --role-4: #5f6873;
  --on-role: #ffffff;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --page: #14171b; --ink: #e7eaee; --soft: #a4adb8; --line: #3a424c; --panel: #1d2227;
    --trained: #6fd0ab; --on-trained: #0c1f18; --skipped: #2a3037; --hatch: #48515c;
    --heat: #b39bf2; --on-low: #ffffff; --on-high: #000000; --own: #ff9d5c;
    --role-0: #8fb1f0; --role-1: #f0a860; --role-2: #6fd0ab; --role-3: #e29ad0; --role-4: #aab3bd;
    --on-role: #14171b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 70rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.3rem; line-height: 1.3; margin: 2.75rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; overflow-wrap: anywhere; }
p, ul, figcaption { max-width: 44rem; }
p, ul { margin: .5rem 0; }
ul { padding-left: 1.25rem; }
.lead { font-size: 1.1rem; }
.note { color: var(--soft); font-size: .9rem; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: .75rem 2rem; margin: 1.25rem 0; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
dl .wide { grid-column: 1 / -1; }
figure { margin: 0; }
svg { display: block; max-width: 100%; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }

.scroll { overflow: auto; margin: 1rem 0; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--own); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
thead th.group { text-align: center; }
tbody th { font-weight: 400; }
tbody tr.own th, tbody tr.own td, tfoot th, tfoot td { font-weight: 700; }
tfoot th, tfoot td { border-bottom: 0; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; }

.legend { display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; list-style: none; padding: 0;
  margin: .75rem 0; font-size: .9rem; max-width: none; }
.legend li { display: flex; align-items: center; gap: .5rem; }
.swatch { flex: none; width: 1.35rem; height: 1.35rem; border-radius: 3px; display: grid;
  place-items: center; font-size: .8rem; font-weight: 700; }
@media (max-width: 40rem) {
  h1 { font-size: 1.6rem; }
  table { font-size: .85rem; }
  th, td { padding: .3rem .45rem; }
}
"""
"""What all pages share. `--role-0` to `--role-4` are colours that can be told apart."""
_FRAME = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">{reload}
<link rel="icon" href="data:,">
<title>{title} – edge-dit</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{lead}
</header>
<main>
{body}
</main>
</body>
</html>
"""


def document(title: str, lead: str, body: str, style: str = "", reload: int = 0) -> str:
    """A page.

    Args:
        title: plain text.
        lead, body: HTML.
        style: CSS besides `STYLE`.
        reload: seconds after which a browser reads the page again; 0 for never.
    """
    again = f'\n<meta http-equiv="refresh" content="{reload}">' if reload else ""
    return _FRAME.format(
        title=escape(title), lead=lead, body=body, style=STYLE + style, reload=again
    )


def facts(pairs: dict[str, str]) -> str:
    """Names and values, both plain text, as a list."""
    rows = (f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in pairs.items())
    return "<dl>\n" + "\n".join(rows) + "\n</dl>"


def table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """A table of plain text, which scrolls sideways where it is wider than the screen."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = [
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    ]
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f"<table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n"
        f"<tbody>\n{chr(10).join(lines)}\n</tbody>\n</table>\n</div>"
    )


def data_uri(image: Image.Image | np.ndarray, longest: int) -> str:
    """A JPEG within the page.

    Args:
        image: or its pixels, [H, W, 3] uint8, RGB.
        longest: pixels that its longer side has at most.
    """
    made = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    made.thumbnail((longest, longest))
    buffer = io.BytesIO()
    made.save(buffer, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
