"""The report of `generate --compare` as one self-contained HTML page: nothing is loaded from elsewhere.

Its one script adds a slider that compares by dragging; without scripts all pictures are there beside each other.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from visattn.pipelines.report.assets import SCRIPT, STYLE
from visattn.pipelines.report.chart import line_chart
from visattn.report_text import mean_density, named, refusals
from visattn.timing import gain

# Longer videos stay files beside the page: a data URI of this many bytes makes a page that opens slowly.
LARGEST_VIDEO = 8_000_000
# What a setting is that was not given, where that is not the model's own.
NOT_GIVEN = {
    **dict.fromkeys(("prompts", "labels", "precise_layers"), "none"),
    "layers": "all",
    "parallel": "one process",
}
MIME = {".png": "image/png", ".mp4": "video/mp4"}


def page(summary: dict[str, Any], folder: Path) -> str:
    """The page for a report whose pictures or videos lie in a folder.

    Args:
        summary: The report of a comparison, as `compare.summarize` makes it.
        folder: Where dense-000.png, sparse-000.png and so on are, or .mp4 and sheet-000.png.
    """
    found = summary[f"{summary['settings']['output']}s"]
    title = f"{summary['model']}: {summary['pattern']} against dense attention"
    parts = [
        f"<h1>{_text(summary['model'])}: <code>{_text(summary['pattern'])}</code> against dense attention</h1>",
        f'<p class="soft">{_text(_where(summary))}</p>',
        f'<p class="bad">{_text(summary["busy"])}</p>' if summary["busy"] else "",
        _cards(summary),
        f"<h2>{summary['settings']['output'].title()}s</h2>",
        *(_shown(one, folder, summary) for one in found),
        _divergence(found),
        _times(summary),
        _sites(summary["attention"]),
        _settings(summary),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _where(summary: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items() if version)
    return f"{summary['pipeline']} in {summary['dtype']} on {summary['device_name']}; {versions}"


def _cards(summary: dict[str, Any]) -> str:
    mean, speedup = summary["mean"], summary["speedup"]
    cards = [
        (gain(speedup["attention_seconds"]), "attention"),
        (gain(speedup["seconds"]), f"whole {summary['settings']['output']}"),
        (_number(summary["density"], ".1%"), "density of the attention"),
        ("equal" if mean["psnr"] is None else f"{mean['psnr']:.1f} dB", "PSNR to dense, mean"),
        (_number(mean["ssim"], ".3f"), "SSIM to dense, mean"),
    ]
    if mean["lpips"] is not None:
        cards.append((_number(mean["lpips"], ".3f"), "LPIPS to dense, mean"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for value, name in cards)
        + "</div>"
    )


def _shown(one: dict[str, Any], folder: Path, summary: dict[str, Any]) -> str:
    index = f"{one['index']:03}"
    what = f"label {one['label']}" if "label" in one else one["prompt"]
    quality = "equal to dense" if one["equal"] else f"PSNR {one['psnr']:.1f} dB"
    quality += "" if one["ssim"] is None else f", SSIM {one['ssim']:.3f}"
    quality += "" if one["lpips"] is None else f", LPIPS {one['lpips']:.3f}"
    head = f"<h3>{_text(what)}, seed {one['seed']}: {quality}</h3>"
    suffix = ".mp4" if summary["settings"]["output"] == "video" else ".png"
    dense, sparse = (folder / f"{kind}-{index}{suffix}" for kind in ("dense", "sparse"))
    figures = "".join(
        _figure(_embedded(path, f"{kind}, {what}"), kind) for kind, path in (("dense", dense), ("sparse", sparse))
    )
    if suffix == ".png":
        figures += _figure(_difference(dense, sparse, f"difference, {what}"), "difference (black: none)")
    sheet = folder / f"sheet-{index}.png"
    wide = f'<img class="wide" alt="frames, {_text(what)}" src="{_data(sheet)}">' if sheet.is_file() else ""
    return f'{head}<div class="row">{figures}</div>{wide}'


def _figure(shown: str, caption: str) -> str:
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _difference(dense: Path, sparse: Path, name: str) -> str:
    """The distance of two picture files, pixel by pixel."""
    file = io.BytesIO()
    with Image.open(dense) as one, Image.open(sparse) as other:
        ImageChops.difference(one, other).save(file, "PNG", optimize=True)
    return f'<img alt="{_text(name)}" src="{_uri(file.getvalue(), ".png")}">'


def _embedded(path: Path, name: str) -> str:
    if path.suffix == ".png":
        return f'<img alt="{_text(name)}" src="{_data(path)}">'
    source = _data(path) if path.stat().st_size <= LARGEST_VIDEO else _text(path.name)
    return f'<video aria-label="{_text(name)}" src="{source}" autoplay loop muted playsinline controls></video>'


def _data(path: Path) -> str:
    return _uri(path.read_bytes(), path.suffix)


def _uri(content: bytes, suffix: str) -> str:
    return f"data:{MIME[suffix]};base64,{base64.b64encode(content).decode()}"


def _divergence(found: Sequence[dict[str, Any]]) -> str:
    lines = {f"{_condition(one)}, seed {one['seed']}": one["divergence"] for one in found if one["divergence"]}
    head = "<h2>Divergence from the dense run</h2>"
    if not lines:
        return f'{head}<p class="soft">This pipeline does not show its latents step by step.</p>'
    note = "Distance of the latents from the dense run's after each step, as a share of their norm (L2)."
    return f'{head}<p class="soft">{note}</p>{line_chart(lines, "denoising step", "relative distance")}'


def _condition(one: dict[str, Any]) -> str:
    return f"label {one['label']}" if "label" in one else one["prompt"][:40]


def _times(summary: dict[str, Any]) -> str:
    what = summary["settings"]["output"]
    rows = [
        [kind, _seconds(times["seconds"]), _seconds(times["attention_seconds"]), str(len(times["runs"]))]
        for kind, times in summary["times"].items()
    ]
    table = _table(["", f"time per {what}", "of it in attention", "runs"], rows, numbers={1, 2, 3})
    return f'<h2>Time</h2>{table}<p class="soft">Medians. {_text(summary["measured"]["order"])}.</p>'


def _sites(attention: dict[str, Any]) -> str:
    rows = []
    for modules, alike in named(attention["sites"]):
        site, each = alike[0], " each" * (len(alike) > 1)
        why = [
            ("kept dense", site["kept"]),
            ("not computed in 8 bits", site["exact"]),
            ("fell back", site["fallbacks"]),
        ]
        unusual = "; ".join(f"{count} x {how}{each}: {text}" for how, found in why for text, count in found.items())
        rows.append(
            [
                ", ".join(modules),
                site["pattern"],
                " ".join(filter(None, (site["backend"] or "stock", site["precision"]))),
                _number(mean_density(alike), ".3f"),
                f"{site['hits']}{each}",
                f"{site['dense']}{each}",
                unusual or "none",
                _seconds(sum(s["sparse_seconds"] + s["dense_seconds"] for s in alike)),
            ]
        )
    names = ["modules", "pattern", "backend", "density", "hits", "dense", "fallbacks", "time"]
    reasons = dict.fromkeys(f"Backend: {c['backend']}, {c['why']}" for s in attention["sites"] for c in s["calls"])
    lines = [*reasons, *(f"Not taken: {reason}" for reason in refusals(attention["sites"]))]
    why = "".join(f'<p class="soft">{_text(line)}</p>' for line in lines)
    head = f"{attention['sites_hit']} of {attention['sites_patched']} attention modules ran a pattern"
    return f"<h2>Attention modules</h2><p>{head}.</p>{_table(names, rows, numbers={3, 4, 5, 7})}{why}"


def _settings(summary: dict[str, Any]) -> str:
    rows = [[name.replace("_", " "), _value(name, value)] for name, value in summary["settings"].items()]
    measured = [[name.replace("_", " "), text] for name, text in summary["measured"].items()]
    measured.append(["lpips", summary["lpips"]])
    return (
        f"<h2>Settings</h2>{_table(['', ''], rows)}<details><summary>How it was measured</summary>"
        f"{_table(['', ''], measured)}</details>"
    )


def _value(name: str, value: Any) -> str:
    if value is None or value == () or value == []:
        return NOT_GIVEN.get(name, "the model's own")
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{tag} class={'n' if i in right else 't'}>{_text(text)}</{tag}>" for i, text in enumerate(texts)
        )

    head = f"<thead><tr>{cells('th', names)}</tr></thead>" if any(names) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
