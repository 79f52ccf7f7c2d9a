"""Charts of a page of maps as inline SVG."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from visattn.maps.heat import color
from visattn.maps.overview import Overview, Site

# Colours that people with any colour vision can tell apart (Okabe and Ito).
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 260, 46, 38, 14, 12
# Side of a head's cell, and room for the names of modules.
CELL, NAMES = 30, 260


def shades(site: Site, overview: Overview) -> list[tuple[float, float, float]]:
    """Locality, size and opacity of each head of a module, from 0 to 1.

    The size is the importance relative to the largest of all heads, where importance is known.
    """
    most = max((float(s.importance.max()) for s in overview.sites if s.importance is not None), default=0.0)
    found = []
    for head in range(site.heads):
        size = 1.0 if site.importance is None or not most else (float(site.importance[head]) / most) ** 0.5
        local = 1 - min(1.0, float(site.distance[head]) / 0.6)
        found.append((local, 0.25 + 0.75 * size, max(0.15, 1 - float(site.entropy[head]))))
    return found


def head_name(site: Site, head: int) -> str:
    """What a head's tooltip says."""
    parts = [f"{site.site}, head {head}: distance {float(site.distance[head]):.2f} of the diagonal"]
    parts.append(f"entropy {float(site.entropy[head]):.2f}, {float(site.mass[head]):.0%} on the grid")
    if site.importance is not None:
        parts.append(f"importance {float(site.importance[head]):.3g}")
    return ", ".join(parts)


def heads(overview: Overview) -> str:
    """Layers x heads: colour locality, size importance, opacity 1 - entropy."""
    most = max(site.heads for site in overview.sites)
    wide, high = NAMES + most * CELL + 8, 24 + len(overview.sites) * CELL
    parts = [_text(NAMES + (h + 0.5) * CELL, 14, str(h), "middle") for h in range(most)]
    for i, site in enumerate(overview.sites):
        y = 24 + (i + 0.5) * CELL
        parts.append(_text(NAMES - 8, y + 4, f"{i}  {shortened(site.site)}", "end"))
        for head, (local, size, opaque) in enumerate(shades(site, overview)):
            x, name = NAMES + (head + 0.5) * CELL, html.escape(head_name(site, head))
            rgb = ",".join(map(str, color(local)))
            parts.append(
                f'<a href="#layer-{i}" data-head="{head}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{size * 13:.1f}" '
                f'fill="rgb({rgb})" fill-opacity="{opaque:.2f}" stroke="rgb({rgb})"><title>{name}</title></circle></a>'
            )
    return svg(parts, wide, high, "locality, importance and entropy of every head", 1.2 * wide)


def scatter(overview: Overview) -> str:
    """Distance against importance, a dot a head; entropy where importance is unknown."""
    known = any(site.importance is not None for site in overview.sites)
    points = []
    for i, site in enumerate(overview.sites):
        values = site.importance if known and site.importance is not None else site.entropy
        for head in range(site.heads):
            points.append((float(site.distance[head]), float(values[head]), i, head_name(site, head)))
    most_x, most_y = max(p[0] for p in points) or 1, max(p[1] for p in points) or 1
    parts = _frame(most_x, most_y, "distance of query and keys, shares of the diagonal")
    last = max(1, len(overview.sites) - 1)
    for a, b, i, name in points:
        rgb = ",".join(map(str, color(i / last)))
        parts.append(
            f'<circle cx="{_x(a / most_x):.1f}" cy="{_y(b / most_y):.1f}" r="4" fill="rgb({rgb})" '
            f'stroke="currentColor" stroke-opacity="0.3"><title>{html.escape(name)}</title></circle>'
        )
    return svg(parts, WIDTH, HEIGHT, f"{'importance' if known else 'entropy'} over distance")


def curves(lines: Mapping[str, Sequence[float]], ticks: Sequence[str], name: str) -> str:
    """Lines from 0 to 1 over equal steps, with their names above them."""
    columns = 4
    top = 16 * -(-len(lines) // columns)
    parts = _frame(1, 1, name, ticks)
    count = max(1, len(ticks) - 1)
    named = []
    for i, (label, values) in enumerate(lines.items()):
        path = " ".join(f"{_x(n / count):.1f},{_y(min(1.0, v)):.1f}" for n, v in enumerate(values))
        look = f'fill="none" stroke="{LINES[i % len(LINES)]}" stroke-width="2" stroke-dasharray="{DASHES[i // 6 % 4]}"'
        parts.append(f'<polyline points="{path}" {look}><title>{html.escape(label)}</title></polyline>')
        line, column = divmod(i, columns)
        x, y = LEFT + column * 100, 12 + line * 16
        named.append(
            f'<line x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}" {look}/>' + _text(x + 25, y, label, "start")
        )
    whole = [*named, f'<g transform="translate(0 {top})">', *parts, "</g>"]
    return svg(whole, WIDTH, HEIGHT + top, name)


def shortened(site: str, length: int = 36) -> str:
    """A path that fits: its end."""
    return site if len(site) <= length else "..." + site[3 - length :]


def svg(parts: Sequence[str], width: float, height: float, label: str, most: float | None = None) -> str:
    """A drawing as wide as its column, but not wider than `most` pixels."""
    style = "" if most is None else f' style="max-width:{most:.0f}px"'
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="100%"{style} role="img" aria-label="{html.escape(label)}" '
        f'font-size="12" fill="currentColor">{"".join(parts)}</svg>'
    )


def _x(share: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * share


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def _frame(most_x: float, most_y: float, name: str, ticks: Sequence[str] = ()) -> list[str]:
    parts = []
    for i in range(5):
        y = _y(i / 4)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity="0.15"/>'
        )
        parts.append(_text(LEFT - 6, y + 4, f"{most_y * i / 4:.2g}", "end"))
    marks = ticks or [f"{most_x * i / 4:.2g}" for i in range(5)]
    every = max(1, -(-len(marks) // 10))
    parts += [
        _text(_x(i / max(1, len(marks) - 1)), HEIGHT - BOTTOM + 16, mark, "middle")
        for i, mark in enumerate(marks)
        if i % every == 0
    ]
    return [*parts, _text((LEFT + WIDTH) / 2, HEIGHT - 5, name, "middle")]


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
