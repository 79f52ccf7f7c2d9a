"""How a report prints: modules that did the same are one line, reasons stand once below, what is unusual is marked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from visattn.folded import folded
from visattn.given import counted

Site = Mapping[str, Any]
# Columns of a line; a longer name of a module has a longer one.
WIDTH = 110
# In front of what somebody who applied a pattern may not expect.
MARK = "!"
# Lines of one group of modules for calls of different sizes; `to_dict` has them all.
CALLS = 4


def as_text(report: Mapping[str, Any]) -> str:
    """A report in words.

    Args:
        report: What `Report.to_dict` gives.
    """
    sites = report["sites"]
    lines = _head(report)
    groups = [(names, _facts(group, report)) for names, group in named(sites)]
    # Beside each other where that fits for all of them, else facts below names.
    widest = max((len(", ".join(names)) for names, _ in groups), default=0)
    beside = all(len(facts[0][1]) + widest + 4 <= WIDTH for _, facts in groups)
    for names, facts in groups:
        if beside:
            lines.append(f"  {', '.join(names):<{widest}}  {facts[0][1]}")
        else:
            lines += [f"  {name}" for name in names] + _wrapped(facts[0][1], "      ")
        for mark, fact in facts[1:]:
            lines += _wrapped(fact, f"{mark:<6}")
    return "\n".join(lines + _refused(sites))


def alike(sites: Iterable[Site]) -> list[list[Site]]:
    """Modules by what they did, in the order of the first of each; times and measured shares may differ.

    Args:
        sites: `sites` of a report as a dict.
    """
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(repr(_did(site)), []).append(site)
    return list(found.values())


def named(sites: Sequence[Site]) -> list[tuple[list[str], list[Site]]]:
    """Groups of modules that did the same, with their names: ranges of numbers for those that differ in numbers alone.

    Args:
        sites: `sites` of a report as a dict.
    """
    several, found = len({site["model"] for site in sites}) > 1, []
    for group in alike(sites):
        model = f"{group[0]['model']}: " * several
        names = folded(site["site"] for site in group)
        found.append(([f"{model}{name}" + f" ({count})" * (count > 1) for name, count in names], group))
    return found


def mean_density(sites: Iterable[Site]) -> float | None:
    """Mean density of the calls of modules that ran their pattern."""
    known = [(site["density"], site["hits"]) for site in sites if site["density"] is not None]
    return sum(share * hits for share, hits in known) / sum(hits for _, hits in known) if known else None


def call_text(call: Mapping[str, Any]) -> str:
    """Who ran calls on what, in words.

    Args:
        call: What `CallReport.to_dict` gives.
    """
    precision = "" if call["precision"] is None else f" in {call['precision']}"
    simulated = ", simulated for its errors" if precision and call["backend"] == "tiles" else ""
    share = "" if call["density"] is None else f", density {call['density']:.3f}"
    if call["reached"] is not None:
        share += f" ({call['reached']['least']:.3f} to {call['reached']['most']:.3f} over heads and calls)"
    if call["skipped"] is not None:
        share += f", {call['skipped']:.3f} skipped"
    if call["shared"] is not None:
        refreshed, nbytes = call["shared"]["refreshed"], call["shared"]["nbytes"]
        share += f", {refreshed:.3g} of {call['hits']} computed anew, "
        share += f"{_bytes(nbytes)} kept for later steps" if nbytes else "nothing kept for later steps"
    return f"{call['backend']}{precision}{simulated} on {call['layout']}{share}"


def _did(site: Site) -> Any:
    """What a module did, without what is measured."""
    names = "pattern", "backend", "precision", "layout", "hits", "why"
    calls = []
    for call in site["calls"]:
        measured = call["reached"] is not None or call["skipped"] is not None
        calls.append(([call[name] for name in names], None if measured else call["density"]))
    steps = [stage["steps"] for stage in site["stages"]]
    own = [site[name] for name in ("model", "compiled", "pattern", "dense", "kept", "exact", "fallbacks")]
    return own, calls, steps


def headline(report: Mapping[str, Any]) -> str:
    """The sums of all modules, in a line.

    Args:
        report: What `Report.to_dict` gives.
    """
    return "; ".join(_sums(report))


def _sums(report: Mapping[str, Any]) -> tuple[str, str]:
    """What ran a pattern, and what did not."""
    share = "" if report["density"] is None else f", density {report['density']:.3f}"
    ran = f"{_who(report)}: {counted(report['hits'], 'call')}{share}, {report['sparse_seconds']:.3f} s"
    fallbacks = sum(report["fallbacks"].values())
    return ran, f"{report['dense']} dense and {fallbacks} fallback calls, {report['dense_seconds']:.3f} s"


def _head(report: Mapping[str, Any]) -> list[str]:
    """What is said of all modules together."""
    ran, rest = _sums(report)
    more = [rest]
    if report["first_seconds"]:
        more.append(f"first calls apart: {report['first_seconds']:.3f} s")
        if report["timed"]:
            more.append(f"times estimated from {report['timed']} of {report['called']} calls")
    if report["moved"]:
        more.append(f"{_bytes(report['moved'])} sent to other processes")
    lines = _wrapped(ran, "")
    for text in ("; ".join(more), report["schedule"]):
        lines += _wrapped(text, "  ") if text else []
    return lines


def _who(report: Mapping[str, Any]) -> str:
    """Who ran a pattern, in words."""
    modules = f"{report['sites_hit']} of {report['sites_patched']} attention modules"
    compiled = sum(site["hits"] for site in report["sites"] if site["compiled"])
    if not compiled:
        return f"{modules} ran a pattern"
    patched = report["sites_patched"]
    found = f"compiled code, which does not tell its {patched} modules, ran a pattern {compiled} times"
    return f"{found}, outside of it {modules}" if report["sites_hit"] else found


def _facts(group: Sequence[Site], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What modules that are alike did: marks and lines, the first of them for what most is said of."""
    site, each = group[0], " each" * (len(group) > 1)
    calls = [_joined([other["calls"][i] for other in group]) for i in range(len(site["calls"]))]
    counts = [f"{counted(site['hits'], 'hit')}{each}"] if site["hits"] or not site["dense"] else []
    counts += [f"{site['dense']} dense{each}"] if site["dense"] else []
    first = f"{site['pattern']}: {', '.join(counts)}"
    if len(calls) == 1 and not site["stages"]:
        first += f", {call_text(calls[0])}"
    facts = [("", first), *_calls(site, calls), *(("", text) for text in _measured(group))]
    for how, whys in (
        ("kept dense", site["kept"]),
        ("not computed in 8 bits", site["exact"]),
        ("fell back to dense", site["fallbacks"]),
    ):
        facts += [(MARK, f"{counted(number, 'call')}{each} {how}: {why}") for why, number in whys.items()]
    if any(call["shared"] is not None and not call["shared"]["nbytes"] for call in calls):
        why = "with gradients, inside of a CUDA graph and in the last step none may"
        facts.append((MARK, f"no call kept anything for later steps, so that each computed anew: {why}"))
    idle = not (site["hits"] or site["dense"] or site["fallbacks"] or any(s["compiled"] for s in report["sites"]))
    if idle and (report["hits"] or report["dense"] or report["fallbacks"]):
        facts.append((MARK, "not called, unlike others"))
    return facts


def _calls(site: Site, calls: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Marks and lines of calls, which may be of several kinds."""
    if len(calls) < 2 and not site["stages"]:
        return [(MARK * call["slower"], call["why"]) for call in calls]
    lines = []
    if site["stages"]:
        for stage in site["stages"]:
            own = [calls[site["calls"].index(call)] for call in stage["calls"]]
            lines += [(MARK * c["slower"], f"steps {stage['steps']}: {c['pattern']}, {_counted(c)}") for c in own]
    else:
        lines += [(MARK * call["slower"], _counted(call)) for call in calls]
    hidden = len(lines) - CALLS
    more = MARK * any(mark for mark, _ in lines[CALLS:])
    return lines if hidden < 2 else [*lines[:CALLS], (more, f"and {hidden} more kinds of calls, see to_dict()")]


def _counted(call: Mapping[str, Any]) -> str:
    return f"{counted(call['hits'], 'hit')}, {call_text(call)}; {call['why']}"


def _joined(calls: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The same calls of several modules: means of what was measured, the least and most of all."""
    first = calls[0]
    if first["reached"] is None and first["skipped"] is None and first["shared"] is None:
        return first
    shares = [name for name in ("density", "skipped") if first[name] is not None]
    found: dict[str, Any] = {name: sum(call[name] for call in calls) / len(calls) for name in shares}
    if first["reached"] is not None:
        reached = [call["reached"] for call in calls]
        found["reached"] = {"least": min(r["least"] for r in reached), "most": max(r["most"] for r in reached)}
    if first["shared"] is not None:
        shared = [call["shared"] for call in calls]
        refreshed = sum(each["refreshed"] for each in shared) / len(shared)
        found["shared"] = {"refreshed": refreshed, "nbytes": max(each["nbytes"] for each in shared)}
    return {**first, **found}


def _measured(group: Sequence[Site]) -> list[str]:
    """Lines of what was measured in modules that are alike."""
    lines = []
    sparse, choosing = (sum(site[f"{name}_seconds"] for site in group) for name in ("sparse", "choosing"))
    if choosing and sparse:
        lines.append(f"{choosing / sparse:.0%} of the time is choosing")
    caught = {site["site"]: site["caught"] for site in group if site["caught"] is not None}
    if caught:
        mean, least = sum(c["mean"] for c in caught.values()) / len(caught), min(c["least"] for c in caught.values())
        worst = min(caught, key=lambda name: caught[name]["mean"])
        where = f", least in {worst} with {caught[worst]['mean']:.3f}" if len(caught) > 1 else ""
        lines.append(f"{mean:.3f} of the attention caught ({least:.3f} at least){where}")
    moved = sum(site["moved"] for site in group)
    if moved:
        lines.append(f"sent {_bytes(moved / max(1, sum(site['called'] for site in group)))} a call")
    return lines


def refusals(sites: Iterable[Site]) -> list[str]:
    """Why backends could not run calls, each reason once.

    Args:
        sites: `sites` of a report as a dict.
    """
    pairs = (pair for site in sites for call in site["calls"] for pair in call["refused"].items())
    return [f"{name}: {reason}" for name, reason in dict.fromkeys(pairs)]


def _refused(sites: Sequence[Site]) -> list[str]:
    """Lines on backends that could not run calls."""
    told = refusals(sites)
    lines = ["  backends that could not run them:"] if told else []
    for reason in told:
        lines += _wrapped(reason, "    ")
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    """A text as lines with a hanging indent."""
    rest = " " * len(indent) + "  "
    how = {"initial_indent": indent, "subsequent_indent": rest, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, **how)


def _bytes(number: float) -> str:
    """A number of bytes in the largest unit below it."""
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
