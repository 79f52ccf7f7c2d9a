"""Figures in the sentences of pages, which no table renders, are those of docs/results."""

import re
import statistics
from math import sqrt

import pytest

from scripts.figures_trained import closed
from scripts.pages import ROOT
from scripts.results import result

KINDS = ("seen", "unseen")
SHARING = ("broadcast(", "residual(")


def words(page):
    """The text of a page on one line, without the marks of bold type."""
    return " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").replace("**", "").split())


def listed(values):
    return f"{', '.join(values[:-1])} and {values[-1]}"


def percent(value):
    return f"{100 * value:.0f}"


def less(name, than):
    """How much less time attention takes than that of a twin, in percent, at each bound."""
    rows = [row["times"] for row in result(name)["bounds"].values()]
    return [1 - row["tuned"]["attention_seconds"] / row[than]["attention_seconds"] for row in rows]


def places(name):
    """The pattern of each layer in each part of the steps, of all bounds."""
    return [text for row in result(name)["bounds"].values() for layer in row["assignment"] for text in layer]


def kept(row):
    """Least and largest share of blocks that `topk` lists beside means, in percent."""
    texts = [text for layer in row["assignment"] for text in layer if text.startswith("topk(") and "rest=mean" in text]
    shares = [float(re.findall(r"keep=([\d.]+)", text)[0]) for text in texts]
    return [percent(min(shares)), percent(max(shares))]


def tuning():
    """What docs/tuning.md says of its searches."""
    rows = list(result("tuned-emoji-384")["bounds"].values())
    yield f"search takes {listed(list(map(percent, less('tuned-emoji-384', 'dense'))))} % less than dense attention"
    yield f"{listed(list(map(percent, less('tuned-emoji-384', 'single'))))} % less than the best single pattern"
    assert {row["held_in"] for row in rows} == {19}
    yield "each bound held in 19 of 20 held-out samples"
    assert all(layer[0] == "dense" for row in rows for layer in row["assignment"])
    yield "the first eighth dense"
    (low, high), _, (lower, higher) = map(kept, rows)
    yield f"{low} to {high} % of the blocks at 25 dB and {lower} to {higher} % at 35 in each layer as that bears it"
    sparse = [text for text in places("tuned-emoji-384") if text != "dense"]
    yield f"{sum(text.startswith(SHARING) for text in sparse)} of the {len(sparse)} sparse places took one"
    whole = [1 - row["times"]["tuned"]["seconds"] / row["times"]["dense"]["seconds"] for row in rows]
    yield f"Whole samples take {listed(list(map(percent, whole)))} % less"

    yield f"the schedules take {listed(list(map(percent, less('tuned-emoji-256', 'dense'))))} % less than dense"
    first, second, third = less("tuned-emoji-256", "single")
    yield f"{percent(first)} % less, {percent(-second)} % more and {percent(third)} % less than the best single pattern"
    held = [str(row["held_in"]) for row in result("tuned-emoji-256")["bounds"].values()]
    yield f"The bound held in {listed(held)} of 20 held-out samples"
    shared = [text for text in places("tuned-emoji-256") if text != "dense"]
    assert sum(text.startswith(SHARING) for text in shared) > len(shared) / 2
    yield "What takes most of the places is attention that steps share"


def many_tokens():
    """What it says of 16,384 tokens."""
    rows = result("tuned-emoji-512")["bounds"]
    first, last = rows["25"], rows["35"]
    times = first["times"]["dense"]["attention_seconds"] / first["times"]["single"]["attention_seconds"]
    yield f"in {times:.1f} times less than dense attention"
    means = [statistics.mean(first[kind]["psnr"]) for kind in ("tuned", "single")]
    seconds = [sorted(first[kind]["psnr"])[1] for kind in ("tuned", "single")]
    yield f"its schedules have {means[0]:.1f} dB in the mean where the single pattern has {means[1]:.1f}"
    yield f"as their second-worst of 20 samples {seconds[0]:.1f} to {seconds[1]:.1f}"
    yield f"{percent(less('tuned-emoji-512', 'dense')[2])} % below dense attention"
    yield f"the bound held in {last['held_in']} of 20 samples alone"


def clips():
    """What it says of clips."""
    found = result("tuned-animoji")["bounds"]
    saved = less("tuned-animoji", "dense")
    assert max(saved[1:]) < 0.02
    yield f"schedules save {percent(saved[0])} % at 25 dB and nothing to speak of above"
    gaps = []
    for row in found.values():
        psnr = [statistics.mean(row["tuned"]["psnr"][i::5]) for i in range(5)]
        gaps.append((sum(psnr) - min(psnr)) / 4 - min(psnr))
    yield f"One of the five prompts is {min(gaps):.0f} to {max(gaps):.0f} dB worse than the mean of the others"
    yield f"is one of {found['25']['verified']['psnr_mean']:.0f} dB in the mean"
    ranks = [row["rank_correlation"] for row in found.values()]
    lowest = min(each["schedules"] for each in ranks)
    yield f"predictions rank injections ({ranks[0]['injections']:.2f}) and schedules ({lowest:.1f} to 1)"


def cores():
    """What it says of a CPU."""
    row = result("tuned-emoji-192")["bounds"]["25"]
    than = [percent(less("tuned-emoji-192", twin)[0]) for twin in ("dense", "single")]
    yield f"takes {than[0]} % less than dense attention and {than[1]} % less than the best single pattern"
    assert row["held_in"] == row["verified"]["samples"]
    yield "the bound held in all held-out samples"
    tuned, dense = (row["verified"][f"attention_seconds{twin}"] for twin in ("", "_dense"))
    yield f"({tuned:.2f} s, single pattern {row['single']['attention_seconds']:.2f} s, dense {dense:.2f} s)"


def presets():
    """What it says of prompts that a schedule was not tuned with: in how many samples the bounds hold."""
    text = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")

    def held(name, steps):
        cells = [
            re.findall(rf"`{name}-{bound}` \| 64x64, {steps} \|.*\| (\d+) of 20 \| (\d+) of 20", text)[0]
            for bound in (25, 30, 35)
        ]
        return [listed([each[i] for each in cells]) for i in (0, 1)]

    own, others = held("emoji-384", 12)
    yield f"hold in {own} of 20 samples of those prompts, and in {others} of 20 of others"
    as_tuned, fewer = (held("emoji-256", steps)[1] for steps in (24, 12))
    yield f"hold in {as_tuned} of 20 samples of other prompts, with 12 steps in {fewer}"


def shares(name):
    """What each student closed of the gap to dense attention, in percent, for captions that were seen and others."""
    rows = result(name)["rows"].values()
    plain = {row["pattern"]: row for row in rows if row["weights"] == "shipped" and "error" not in row}

    def share(row, kind):
        ends = [each[kind]["top1"] for each in (plain[row["pattern"]], row, plain["dense"])]
        return int(closed(*ends).strip(" (%)") or 0)

    return {row["weights"]: [share(row, kind) for kind in KINDS] for row in rows if row["weights"] != "shipped"}


def students():
    """What docs/distillation.md says of the students of the emoji model."""
    found = shares("emoji-quality")
    local = [value for name in ("clear", "na") for value in found[name]]
    yield f"Local forms close {min(local)} to {max(local)} % of it"
    linear = [value for name in ("agent", "hedgehog", "mala") for value in found[name]]
    yield f"Linear forms close {min(linear)} to {max(linear)} %"
    yield "`agent` {} % for captions that training knew and {} % for others".format(*found["agent"])
    yield "hedgehog {} and {} %, `mala` {} and {} %".format(*found["hedgehog"], *found["mala"])
    large = shares("emoji-quality-512")
    yield "`na` closes {} and {} %".format(*large["na"])
    assert all(a < b for a, b in zip(large["clear"], large["na"], strict=True))
    rows = result("emoji-quality")["rows"].values()
    near = {row["weights"]: sum(row[kind]["frechet"] for kind in KINDS) for row in rows if row["weights"] in found}
    teacher = sum(result("emoji-quality")["rows"]["dense, 256 px, shipped"][kind]["frechet"] for kind in KINDS)
    assert max(near["agent"], near["hedgehog"]) < 1.05 * teacher < near["mala"]
    yield "the first two are as near to real pictures as their teacher"
    trained = result("emoji-students")["students"]
    steps = [f"{trained[name]['steps']:,}" for name in ("agent", "hedgehog", "mala")]
    yield f"`agent` took {steps[0]} steps so, hedgehog {steps[1]}, `mala` {steps[2]}"
    assert [trained[name]["seconds_of_steps"] / 60 for name in ("agent", "hedgehog", "mala")] == [5, 5, 6.5]
    yield "in five minutes with a card each (`mala` in six and a half)"


def steps():
    """What it says of a step."""
    cases = result("h200-distill")["cases"]
    kinds = [cases[f"{name}, 8 samples, {kind}"] for kind in ("launched", "recorded") for name in ("topk", "sla2")]
    yield f"{kinds[0]['kernels_ms']:.0f} ms of kernels with `topk`, {kinds[1]['kernels_ms']:.0f} with `sla2`"
    times = [f"{each['step_ms']:.0f}" for each in kinds]
    yield f"It took {times[0]} and {times[1]} ms launch by launch, and {times[2]} and {times[3]} as a CUDA graph"


def error(share, digits=597):
    """The standard error of a share of digits, in points."""
    return 100 * sqrt(share * (1 - share) / digits)


def classifiers():
    """What it says of the ViT that reads digits."""
    found = result("distill-vit")
    times = [row["seconds"] for row in found["rows"]]
    yield f"({min(times):.0f} to {max(times):.0f} seconds each) and measured on {found['held_out']} others"
    right = [found["teacher"], *(row["after"]["accuracy"] for row in found["rows"])]
    yield f"the standard error is about {statistics.mean(map(error, right)):.0f} point,"
    heads = result("distill-heads")
    lost = {str(row["heads"]): 100 * (heads["teacher"] - row["after"]["accuracy"]) for row in heads["rows"]}
    half = [value for name, value in lost.items() if "'query_heads': 0.5" in name]
    yield f"Half of the query heads cost {min(half):.1f} to {max(half):.1f} points"
    (quarter,) = [value for name, value in lost.items() if "'query_heads': 0.25" in name]
    assert quarter == pytest.approx(20, abs=0.5)
    yield "a quarter of the query heads a fifth of all digits"
    (shared,) = [
        row["after"]["accuracy"]
        for row in heads["rows"]
        if "'kv_heads': 0.5, 'by': 'mean', 'allocation': 'even'" in str(row["heads"])
    ]
    assert heads["teacher"] - shared < error(shared) / 100
    yield f"(a standard error is {error(shared):.1f} points)"


SAID = [("tuning.md", of) for of in (tuning, many_tokens, clips, cores, presets)] + [
    ("distillation.md", of) for of in (students, steps, classifiers)
]


@pytest.mark.parametrize(("page", "of"), SAID, ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_sentence_says_is_what_was_measured(page, of):
    text = words(page)
    assert not [said for said in of() if said not in text]
