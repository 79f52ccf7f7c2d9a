"""Maps of a model as one self-contained HTML page, which reads without scripts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visattn.canvas import Picture
from visattn.maps import heat, svg
from visattn.maps.overview import Overview, Site, of_heads
from visattn.maps.shown import Details, Shown, rollout_picture
from visattn.maps.style import SCRIPT, STYLE

# Tokens a side of the maps on the page: finer ones are averaged.
FINEST = 64


def page(shown: Shown) -> str:
    """The page."""
    overview = shown.overview
    parts = [
        f"<h1>{_text(shown.title)}</h1>",
        f'<p class="soft">{_text(shown.about)}</p>',
        *(f"<p>{_text(note)}</p>" for note in shown.notes),
        _pictures(shown),
        "<h2>Every head</h2>",
        _legend(shown),
        '<div class="columns four">',
        f"<figure><h4>Locality, importance and entropy</h4>{svg.heads(overview)}</figure>",
        _similarity(overview),
        f"<figure><h4>{_scatter_name(shown)}</h4>{svg.scatter(overview)}</figure>",
        f"<figure><h4>Over the depth</h4>{_trend(overview)}</figure>",
        "</div>",
        _caught(shown),
        "<h2>Layers</h2>",
        *(_layer(i, site, shown) for i, site in enumerate(overview.sites)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(shown.title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _image(picture: Picture, name: str, kind: str = "") -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    source = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{_text(name)}"{kind} src="data:image/png;base64,{source}">'


def _pictures(shown: Shown) -> str:
    found = []
    if shown.picture is not None:
        found.append((heat.enlarged(shown.picture[0]), shown.picture[1]))
    if shown.rollout[0] is not None:
        found.append((rollout_picture(shown), shown.rollout[1]))
    figures = "".join(
        f"<figure>{_image(each, name, ' class=picture')}<figcaption>{_text(name)}</figcaption></figure>"
        for each, name in found
    )
    why = f'<p class="soft">{_text(shown.rollout[1])}</p>' if shown.rollout[0] is None and shown.rollout[1] else ""
    return f'<div class="columns">{figures}</div>{why}' if figures else why


def _legend(shown: Shown) -> str:
    steps = ",".join(f"rgb({','.join(map(str, heat.color(i / 6)))})" for i in range(7))
    scale = f'<span class="scale" style="background:linear-gradient(90deg,{steps})"></span>'
    size = f"Size: {shown.importance}, relative to the largest head." if shown.importance else "All sizes are equal."
    return (
        f'<p class="soft">Colour: how near a query the keys are that it reads, far {scale} near (root mean squared '
        f"distance of 0.6 of the grid's diagonal to 0). {_text(size)} Opacity: 1 - entropy. Each row is a module, each "
        "column a head; a click opens the module below.</p>"
    )


def _scatter_name(shown: Shown) -> str:
    what = "Importance" if shown.importance else "Entropy"
    return f"{what} over distance (dark: first layers, light: last)"


def _trend(overview: Overview) -> str:
    lines = {
        "distance": [float(site.distance.mean()) for site in overview.sites],
        "entropy": [float(site.entropy.mean()) for site in overview.sites],
        "on the grid": [float(site.mass.mean()) for site in overview.sites],
    }
    ticks = [str(i) for i in range(len(overview.sites))]
    return svg.curves(lines, ticks, "module, means over its heads")


def _similarity(overview: Overview) -> str:
    if overview.similarity is None:
        why = "Modules attend over different sequences: heads are not compared."
        return f"<figure><h4>Alike heads</h4><p>{why}</p></figure>"
    shades = heat.colors(overview.similarity.numpy(), 0, 1)
    image = _image(heat.picture(shades, 420), "similarity of heads", " class=picture")
    note = "Cosine of the Gram matrices of two heads' outputs (centred), heads in the order of the modules."
    return f"<figure><h4>Alike heads</h4>{image}<figcaption>{note}</figcaption></figure>"


def _caught(shown: Shown) -> str:
    overview = shown.overview
    if not overview.patterns:
        return ""
    names = "".join(
        f"<th><code>{_text(name)}</code><br>{density:.1%} of pairs</th>" for name, density in overview.patterns.items()
    )
    rows, table = [], overview.table(shown.mass)
    for i, site in enumerate(overview.sites):
        cells = "".join(f"<td>{_cell(site, name)}</td>" for name in overview.patterns)
        bears = _text(of_heads(table[site.site]))
        link = f'<a href="#layer-{i}">{i} {_text(svg.shortened(site.site))}</a>'
        rows.append(f'<tr><td>{link}</td><td class="bears"><code>{bears}</code></td>{cells}</tr>')
    head = f"<tr><th>module</th><th>bears at {shown.mass:.0%}</th>{names}</tr>"
    note = (
        "Share of dense attention that each pattern catches, a square a head (dark 0, light 1), and the heads' mean. "
        "The second column has the sparsest pattern that catches enough, head by head: schedule.json is that for "
        "visattn.apply, candidates.txt for visattn tune --candidates."
    )
    return (
        f'<h2>Which heads bear which pattern</h2><p class="soft">{_text(note)}</p><div class="scroll"><table>'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(site: Site, name: str) -> str:
    values = site.caught.get(name)
    if values is None:
        return "another grid"
    squares = []
    for head, value in enumerate(values):
        rgb = ",".join(map(str, heat.color(float(value))))
        said = f"head {head}: {float(value):.3f}, 95 % of the queries at least {float(site.least[name][head]):.3f}"
        squares.append(f'<rect x="{head * 10}" width="9" height="9" fill="rgb({rgb})"><title>{said}</title></rect>')
    wide = 10 * len(values)
    return svg.svg(squares, wide, 9, f"{name} in {site.site}", 1.6 * wide) + f"{float(values.mean()):.2f}"


def _layer(i: int, site: Site, shown: Shown) -> str:
    found = shown.details.get(site.site, Details())
    parts = [_heads(f"Row of {shown.query} (colours: roots of the weights)", [heat.rooted(p) for p in found.dense])]
    if found.sparse:
        most = max(float(np.nanmax(np.abs(s - d))) for s, d in zip(found.sparse, found.dense, strict=True))
        apart = [heat.signed(s - d, most) for s, d in zip(found.sparse, found.dense, strict=True)]
        parts.append(_heads(f"The same under {shown.pattern}", [heat.rooted(p) for p in found.sparse]))
        parts.append(_heads("The difference: red more, blue less", apart))
    parts.append(_heads("Who is read, by the mean of all queries", [heat.rooted(p) for p in found.read]))
    parts.append(_heads("Key position minus query position, the middle is 0", [heat.rooted(p) for p in found.offsets]))
    if site.hops:
        lines = {f"head {h}": [float(values[h]) for values in site.hops.values()] for h in range(site.heads)}
        drawn = svg.curves(lines, [str(k) for k in site.hops], "k of a window of 2k + 1 tokens an axis")
        parts.append(f"<figure><h4>Caught within k tokens</h4>{drawn}</figure>")
    return (
        f'<details open class="layer" id="layer-{i}"><summary><b>{i}</b> <code>{_text(site.site)}</code>, '
        f"{site.heads} heads on {_text(site.layout)}</summary>"
        f'<div class="columns">{"".join(filter(None, parts))}</div></details>'
    )


def _heads(name: str, maps: Sequence[NDArray[np.uint8]]) -> str:
    if not maps:
        return ""
    cells = "".join(
        f'<figure data-head="{i}">{_image(Image.fromarray(_finest(each)), f"{name}, head {i}")}'
        f"<figcaption>{i}</figcaption></figure>"
        for i, each in enumerate(maps)
    )
    return f'<div><h4>{_text(name)}</h4><div class="heads">{cells}</div></div>'


def _finest(colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colours of maps that are not too large for a page."""
    longest = max(colors.shape[:2])
    if longest <= 2 * FINEST:
        return colors
    size = (max(1, colors.shape[1] * FINEST // longest), max(1, colors.shape[0] * FINEST // longest))
    return np.asarray(Image.fromarray(colors).resize(size, Image.Resampling.BOX))
