"""What parameters of patterns may be: values that mean nothing are refused by name, whatever pattern it is."""

import dataclasses
import math

import pytest
import torch

from tests.support.cases import qkv
from visattn import Layout, attention, parse
from visattn.patterns import PATTERNS, Wersa
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.scores import Score, block_scores
from visattn.patterns.values import LARGEST, LARGEST_SEED

BASES = {
    "na": "na(window=3)",
    "halo": "halo(block=2, halo=1)",
    "clear": "clear(radius=2)",
    "radial": "radial(block=8)",
    "routing": "routing(regions=2, topk=2)",
    "groups": "groups(3)",
    "agent": "agent(agents=2)",
    "gate": "gate(by=topk(keep=2, block=2))",
    "pruned": "pruned(by=topk(keep=2, block=2))",
    "best": "best(of=[na(window=3), na(window=5)])",
    "perhead": "perhead(heads={0: na(window=3)})",
    "gated": "gated(of=na(window=3))",
    "sparselinear": "sparselinear(sparse=na(window=3))",
    "topk": "topk(keep=2)",
    "residual": "residual(of=na(window=3))",
}
# No parameter of any pattern may be one of these: no numbers, none that engines hold, or of another kind altogether.
NOTHING = (math.nan, -math.inf, 10**400, 1e300, -1e300, b"x", (), [], {}, set(), object(), 1j, (True, 2.5))
FIELDS = [
    (kind, field.name)
    for kind in PATTERNS
    for field in dataclasses.fields(kind)
    if field.name not in ("of", "by", "sparse", "heads", "rest")
]


def base_of(kind):
    return parse(BASES.get(kind.name, kind.name))


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_what_means_nothing_is_refused_by_name(kind, name):
    for value in NOTHING:
        with pytest.raises(ValueError) as caught:
            dataclasses.replace(base_of(kind), **{name: value})
        assert name in str(caught.value), value


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_the_limits_of_numbers(kind, name):
    """Whole numbers reach to what engines count with, a generator's seeds further."""
    most = LARGEST_SEED if name == "seed" else LARGEST
    for value in (most + 1, float(most + 1) * 2):
        try:
            made = dataclasses.replace(base_of(kind), **{name: value})
        except ValueError as error:
            assert name in str(error)
        else:
            # A real number, which is no count.
            assert isinstance(getattr(made, name), float) and parse(str(made)) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("na(window=2147483648)", "window=2147483648 must be a whole number of at most 2147483647"),
        ("lsh(samples=2147483648)", "samples=2147483648 must be one whole number of at most 2147483647"),
        ("kmeans(start=1001)", "start=1001 must be one whole number of at most 1000"),
        ("kmeans(step=2147483647)", "step=2147483647 must be one whole number of at most 1000"),
        ("wersa(features=65537)", "features=65537 must be one whole number of at most 65536"),
        ("gate(by=topk(keep=0.5), dim=65537)", "dim=65537 must be one whole number of at most 65536"),
        ("wersa(levels=32)", "levels=32 must be one whole number of at most 31"),
        ("clipped(zeta=1e39)", "zeta=1e\\+39 must be a finite float32 number, at least 1"),
        ("clipped(gamma=-1e39)", "gamma=-1e\\+39 must be a finite float32 number, at most 0"),
        ("gated(of=dense, init=1e-300)", "init=1e-300 must be a number between 0 and 1, no nearer to them than 1e-06"),
    ],
)
def test_refusals_say_the_limit(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_agents_beyond_counting_are_refused():
    q = torch.randn(1, 16, 2, 8)
    with pytest.raises(
        ValueError, match=r"4.61e\+18 agents are more than the 16 tokens of the grid, and more than 65536: give fewer"
    ):
        attention(q, q, q, f"agent(agents={LARGEST})", Layout((4, 4)))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("lsh(samples=65537)", "samples=65537 random keys"),
        ("centroids(clusters=65537)", "clusters=65537"),
        ("agent(agents=257x256)", "6.58e\\+04 agents"),
        ("clear(radius=2, pool=4097x4096)", "1.68e\\+07 tokens of a cell"),
    ],
)
def test_more_than_a_grid_has_a_use_for_is_refused_before_any_work(text, what):
    q, layout = torch.randn(1, 16, 2, 8), Layout((4, 4))
    with pytest.raises(
        ValueError, match=f"{what} are more than the 16 tokens of the grid, and more than .*: give fewer"
    ):
        attention(q, q, q, text, layout)
    # Where there are as many tokens there is a use for them.
    parse(text).check((4097, 4096))


HUGE = "block=96x96x96"
SCORES = ("mean", "bounds", "parts(4x4)", "diagonal(8)", "lowbit(4)", "tree(2)")
LARGE = (
    *(f"topk(keep=1, {HUGE}, score={score}, rest={rest})" for score in SCORES for rest in ("drop", "mean", "coarse")),
    *(f"topk(keep=1, block=96x2x96, score={score})" for score in SCORES),
    *(f"topk(keep=1, block=1000000, score={score})" for score in SCORES),
    *(f"topk(keep=1, block=64, key_block=1000000, score={score})" for score in SCORES if score != "parts(4x4)"),
    f"topp(p=0.5, {HUGE}, skip=0.1)", f"above({HUGE}, bar=diag)", f"topk(keep=1, {HUGE}, alike=0.5)",
    f"sla(keep=1, {HUGE})", f"sla2(keep=1, {HUGE}, soft=0.3)", f"vsa(keep=1, {HUGE})",
    f"pruned(by=topk(keep=1, {HUGE}))", "halo(block=1000000, halo=1000000)", "clear(radius=2, pool=96x96x96)",
    "radial(block=2147483647)", "routing(regions=96, topk=2)", "groups(1000000)", "verticalslash(block=2147483647)",
    "lsh(block=2147483647)",
)  # fmt: skip


@pytest.mark.parametrize("text", LARGE)
def test_blocks_beyond_the_grid_take_no_memory(text, monkeypatch):
    """Nothing behind the end of an axis is made: without that, some of these would ask for hundreds of gigabytes."""
    layout = Layout((3, 67, 1), prefix=1)
    made = []
    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda *a, **k: made.append(pad(*a, **k)) or made[-1])
    q, k, v = (t.float() for t in qkv(layout, 2, 2, 8, batch=1))
    pattern = parse(text)
    given = {"parameters": pattern.initial_parameters(2, 8, layout.grid)} if pattern.learnable else {}
    out = attention(q, k, v, pattern, layout, **given)
    assert out.isfinite().all()
    assert all(t.numel() < 10**6 for t in made)


@pytest.mark.parametrize("text", ["parts(4x2)", "diagonal(4)", "diagonal(8)", "diagonal(32)"])
@pytest.mark.parametrize("grid", [(3, 5), (2, 9), (4, 4), (1, 30)])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_and_runs_are_those_of_whole_blocks(text, grid, masked):
    """A block that reaches behind an axis has the parts and runs that it has with tokens there that nobody counts."""
    box, full = (8, 8), (8, -(-grid[1] // 8) * 8)
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, *grid, heads, 8, generator=made, dtype=torch.float64) for heads in (4, 2))
    valid = torch.rand(2, *grid, generator=made) < 0.8 if masked else torch.ones(2, *grid, dtype=torch.bool)

    def padded(x):
        wide = x.new_zeros(2, *full, *x.shape[3:])
        wide[:, : grid[0], : grid[1]] = x
        return wide.flatten(1, 2)

    own = Blocks(grid, box, box, (False, False)), q.flatten(1, 2), k.flatten(1, 2), valid.flatten(1, 2)
    whole = Blocks(full, box, box, (False, False)), padded(q), padded(k), padded(valid)
    found = []
    for blocks, queries, keys, there in (own, whole):
        _, some = block_scores(Score.of(text), queries, keys, blocks, there, 0.3)
        found.append(torch.cat([part.scores for part in some], 1))
    assert torch.allclose(*(each.nan_to_num(neginf=-1e9) for each in found), atol=1e-12)


def test_levels_reach_over_any_grid():
    assert Wersa(levels=31).levels == 31
