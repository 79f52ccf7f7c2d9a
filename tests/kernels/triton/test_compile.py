"""The Triton kernels compiled ahead of time: no GPU is needed for that."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from visattn import Layout, parse
from visattn.kernels.triton import ahead, resources
from visattn.kernels.triton.arguments import Operands, Work, forward_arguments, gradient_arguments, plan_of
from visattn.kernels.triton.choosing import choose, listed, moment, pooled, skipped
from visattn.kernels.triton.choosing.tables import tables
from visattn.kernels.triton.config import (
    BLOCK_DIMS,
    DIRECTIONS,
    HALF,
    HOPPER,
    SHARED_MEMORY,
    SHARING,
    Config,
    block_dim,
    config,
    family,
    shorter,
)
from visattn.kernels.triton.hybrid import coarse, linear, sizes
from visattn.kernels.triton.hybrid import router as hybrid_router
from visattn.kernels.triton.hybrid import run as hybrid_run
from visattn.kernels.triton.hybrid.join import join_states
from visattn.kernels.triton.hybrid.states import group_states
from visattn.kernels.triton.lists.forward import attend
from visattn.kernels.triton.lists.key_grad import key_gradients
from visattn.kernels.triton.lists.query_grad import query_gradients
from visattn.kernels.triton.products import CHUNKS
from visattn.kernels.triton.routes import MergedLists
from visattn.kernels.triton.start import Starts
from visattn.patterns import Routes
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.merging import BITS
from visattn.patterns.shared_tiles import sharing_tiles


@pytest.mark.parametrize(("arch", "direction"), [(80, "query_grad"), (90, "forward"), (100, "key_grad")])
def test_compiles_without_spills(arch, direction):
    launch = config(arch, torch.bfloat16, 64, direction)
    used = resources.compiled(arch, direction, torch.bfloat16, 64, launch)
    assert used.fits(SHARED_MEMORY[arch]), used
    assert used.registers > 0 and used.shared > 0


@pytest.mark.parametrize(
    ("arch", "kernel"),
    [
        (90, "chunk_read"),
        (80, "chunk_keys"),
        *(
            pytest.param(arch, kernel, marks=pytest.mark.slow)
            for arch in (80, 90)
            for kernel in CHUNKS
            if (arch, kernel) not in {(90, "chunk_read"), (80, "chunk_keys")}
        ),
    ],
)
def test_causal_kernels_compile_without_spills(arch, kernel):
    launch = resources.launch_of(arch, torch.bfloat16, 64, kernel)
    used = resources.compiled(arch, kernel, torch.bfloat16, 64, launch, bias=True)
    assert used.fits(SHARED_MEMORY[arch]) and used.registers > 0, used


@pytest.mark.parametrize(("direction", "dim"), [(d, n) for d, configs in HOPPER.items() for n in configs])
def test_the_hopper_kernels_compile(direction, dim):
    used = resources.compiled(90, direction, torch.bfloat16, dim, HOPPER[direction][dim])
    assert used.fits(SHARED_MEMORY[90], resources.HOPPER_SPILLS), used


HALVES = [(direction, dim, launch) for (_, direction, _), own in HALF.items() for dim, launch in own.items()]


@pytest.mark.parametrize(("direction", "dim", "launch"), HALVES)
def test_launches_for_half_as_many_rows_compile(direction, dim, launch):
    assert config(90, torch.bfloat16, dim, direction, launch.rows) == launch
    assert config(90, torch.bfloat16, dim, direction, 2 * launch.rows) == config(90, torch.bfloat16, dim, direction)
    used = resources.compiled(90, direction, torch.bfloat16, dim, launch)
    assert used.fits(SHARED_MEMORY[90]), used


def compiling_instead(monkeypatch, *modules):
    """What every kernel needs that modules launch from here on, by its name: each is compiled and not run."""
    found = {}

    def compile_only(kernel, grid, given, warps, stages):
        options = {"num_warps": warps, "enable_fp_fusion": True} | ({} if stages is None else {"num_stages": stages})
        made = triton.compile(ahead.source(kernel, given), target=GPUTarget("cuda", 90, 32), options=options)
        found[kernel.fn.__name__] = ahead._used(made, True)

    for module in modules:
        monkeypatch.setattr(module, "launch_like", compile_only)
    return found


def compiled_launches(monkeypatch, text, dtype, dim):
    """What every kernel needs that chooses for a pattern, writes its lists and adds its pooled keys."""
    found = compiling_instead(monkeypatch, choose, listed, pooled, moment)
    pattern, layout = parse(text), Layout((64, 64), 16)
    blocks, x = pattern.blocks(layout.grid), torch.empty(1, layout.length, 2, dim, dtype=dtype)
    own = x[:, inner(layout)]
    routes = choose.chosen(pattern, own, own, blocks, None, 0.1)
    plan = plan_of(pattern, layout, "forward", HOPPER["forward"][128])
    listed.listed_program(tables(plan, blocks, 2, torch.device("cpu")), routes)
    if pattern.pools_rest:
        rest = pooled.rest_of(pattern, routes, x, x, layout, None, False, 2)
        rest.add(x, torch.empty_like(x), torch.empty(1, 2, layout.length), 0.1)
    return found


@pytest.mark.parametrize(
    ("text", "dtype", "dim", "kernels"),
    [
        ("topk(keep=0.2,block=8x16,key_block=8x8,rest=mean)", torch.bfloat16, 128, 6),
        pytest.param("topp(p=0.5,block=8x16,most=0.5,rest=mean)", torch.float32, 128, 6, marks=pytest.mark.slow),
        pytest.param("topk(keep=0.2,block=1x64,causal=1x0)", torch.bfloat16, 128, 4, marks=pytest.mark.slow),
        pytest.param("above(score=parts(4x4),block=8x8,rest=mean)", torch.float16, 256, 6, marks=pytest.mark.slow),
        ("topk(keep=0.2,block=8x8,key_block=2x4,rest=slope)", torch.bfloat16, 128, 7),
        pytest.param("topk(keep=0.2,block=4x4,rest=slope)", torch.bfloat16, 256, 7, marks=pytest.mark.slow),
        pytest.param("topk(keep=0.2,block=4x4,rest=slope)", torch.float32, 128, 7, marks=pytest.mark.slow),
    ],
)
def test_kernels_of_dynamic_patterns_compile(monkeypatch, text, dtype, dim, kernels):
    found = compiled_launches(monkeypatch, text, dtype, dim)
    assert len(found) == kernels
    for name, used in found.items():
        assert used.fits(SHARED_MEMORY[90]), (name, used)


@pytest.mark.parametrize(
    ("direction", "dim"),
    [
        ("forward", 64),
        pytest.param("forward", 128, marks=pytest.mark.slow),
        pytest.param("key_grad", 128, marks=pytest.mark.slow),
        pytest.param("query_grad", 64, marks=pytest.mark.slow),
    ],
)
def test_kernels_along_tiles_of_several_blocks_compile(direction, dim):
    pattern, layout = parse("topk(keep=0.1,block=1x1,key_block=8x8)"), Layout((32, 32), 16)
    x, sums = torch.empty(1, layout.length, 2, dim, dtype=torch.bfloat16), torch.empty(1, 2, layout.length)
    launch = shorter(config(90, x.dtype, dim, direction, 64), BITS)
    shared = sharing_tiles(pattern, layout, SHARING)
    work = Work(shared, layout, 0.1, False, {direction: launch}, Starts(x.device))
    choice = Routes(torch.zeros(1, 2, layout.tokens, 2, dtype=torch.int32))
    routed = MergedLists(choice, pattern.blocks(layout.grid), work)
    given = Operands(x, x, x, out=x, lse=sums, grad_out=x, delta=sums, grad_q=x, grad_k=x, grad_v=x, routed=routed)
    kernel, arguments = _along_lists(direction, given, work)
    assert arguments["MERGED"]
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    made = triton.compile(ahead.source(kernel, arguments), target=GPUTarget("cuda", 90, 32), options=options)
    used = ahead._used(made, True)
    assert used.fits(SHARED_MEMORY[90]), used


def _along_lists(direction, given, work):
    """A general kernel and its arguments."""
    if direction == "forward":
        return attend, forward_arguments(given, work)
    return key_gradients if direction == "key_grad" else query_gradients, gradient_arguments(direction, given, work)


def test_the_kernel_that_passes_over_blocks_compiles(monkeypatch):
    found = []

    def compile_only(kernel, grid, given, warps, stages):
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        found.append(triton.compile(ahead.source(kernel, given), target=GPUTarget("cuda", 90, 32), options=options))

    monkeypatch.setattr(skipped, "launch_like", compile_only)
    pattern, layout = parse("topp(block=8x8,skip=0.1)"), Layout((64, 64), 16)
    x = torch.empty(1, layout.length, 2, 128, dtype=torch.bfloat16)
    routes = Routes(torch.zeros(1, 2, 64, 64, dtype=torch.int32), torch.zeros(1, 2, 64, dtype=torch.int32))
    skipped.SkippingLists(pattern, routes, layout, False).run(x, x, x, None, torch.empty_like(x), None, 0.1)
    (made,) = found
    used = ahead._used(made, True)
    assert used.fits(SHARED_MEMORY[90]), used
    # Branches of the loop run for the step behind its end too, as Triton reads ahead: of loads only that of the values,
    # which is not read ahead, may be in one.
    loop = made.asm["ttgir"].split("scf.for")[1].splitlines()
    inside = [line for line in loop if "tt.load" in line and line.startswith(" " * 8)]
    assert len(inside) == 1 and "bf16" in inside[0]


def test_amd_compiles():
    used = resources.compiled("gfx942", "forward", torch.float16, 64, Config(64, 32, 4, 2))
    assert not used.error and used.registers > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_shipped_configuration_fits(arch, capsys):
    dims = ["--head-dim", "64", "128", "256"]
    status = resources.main(["--arch", str(arch), "--dtype", "bfloat16", "float32", *dims])
    assert status == 0, capsys.readouterr().out


def test_says_why_a_kernel_does_not_compile():
    used = resources.compiled(90, "forward", torch.bfloat16, 64, Config(64, 64, 3, 2))
    assert used.error and not used.fits(10**6)


def fake(monkeypatch, **used):
    monkeypatch.setattr(resources, "compiled", lambda *_: resources.Resources(**used))


@pytest.mark.parametrize(
    ("used", "status"),
    [
        ({"registers": 255, "shared": 1000}, 0),
        ({"registers": 255, "shared": 1000, "spills": ahead.stray()}, 0),
        ({"registers": 255, "shared": 1000, "spills": ahead.stray() + 8}, 1),
        ({"registers": 255, "shared": 10**6}, 1),
        ({"error": "CompilationError"}, 1),
    ],
)
def test_exit_status(monkeypatch, capsys, used, status):
    fake(monkeypatch, **used)
    assert resources.main(["--arch", "90", "--dtype", "bfloat16", "--head-dim", "64", "--hip"]) == status
    rows = capsys.readouterr().out.splitlines()
    kernels = len(resources.kernel_names())
    assert len(rows) == 1 + (kernels + len(HOPPER)) + kernels + 1
    assert rows[1].startswith("sm_90") and " forward, TMA " in rows[2] and rows[-2].startswith("gfx942")


TABLE = ["--arch", "80", "90", "--dtype", "bfloat16", "--head-dim", "64", "128"]


def test_shards_are_the_table(monkeypatch, capsys):
    fake(monkeypatch, registers=10)

    def printed(*more):
        assert resources.main([*TABLE, *more]) == 0
        return capsys.readouterr().out.splitlines()[1:-1]

    parts = [printed("--shard", f"{i}/3") for i in (1, 2, 3)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sorted([*parts[0], *parts[1], *parts[2]]) == sorted(printed())
    with pytest.raises(SystemExit):
        resources.main(["--shard", "4/3"])
    assert "'4/3' is no part like 1/4" in capsys.readouterr().err


def test_says_how_far_it_is(monkeypatch, capsys):
    fake(monkeypatch, registers=10, kept=True)
    resources.main(TABLE)
    told = capsys.readouterr().err.splitlines()
    rows = len(list(resources.rows([80, 90], ["bfloat16"], [64, 128], resources.kernel_names(), False)))
    assert told[0].startswith(f"20 of {rows} rows, 20 of them kept") and told[0].endswith(" s to go")
    assert told[-1].startswith(f"{rows} of {rows} rows, {rows} of them kept from before")


def test_results_are_kept_until_something_changes(monkeypatch, tmp_path):
    launch = config(80, torch.float16, 16, "forward")

    def used(launch=launch, target=80):
        return ahead.compiled(target, "forward", torch.float16, 16, launch, False, tmp_path)

    first = used()
    assert first.registers > 0 and not first.kept
    compiled = []
    monkeypatch.setattr("triton.compile", lambda *_, **__: compiled.append(1) or 1 / 0)
    assert replace(used(), kept=False) == first and used().kept and not compiled
    # Whatever the compilation depends on makes another one of it; failures are not kept.
    for other in ({"launch": launch._replace(stages=2)}, {"target": 86}):
        assert used(**other).error.startswith("ZeroDivisionError") and used(**other).error
    monkeypatch.setattr("triton.__version__", "0")
    assert used().error
    assert len(compiled) == 5 and len(list(tmp_path.iterdir())) == 1
    for file in tmp_path.iterdir():
        file.write_text("[1, 2")
    monkeypatch.undo()
    assert used() == first


def test_needs_the_compiler(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resources.main([]) == 2
    assert "unset it" in capsys.readouterr().err


def test_every_architecture_dtype_and_head_dim_has_a_configuration():
    for arch in (0, 75, 87, *SHARED_MEMORY, 121):
        for dtype, largest in ((torch.float16, 256), (torch.bfloat16, 256), (torch.float32, 128)):
            for dim in range(8, largest + 1, 8):
                for direction in DIRECTIONS:
                    launch = config(arch, dtype, dim, direction)
                    assert launch.columns % launch.per_step == 0
                    assert launch.per_step == 1 or launch.tile % 32 == 0
    assert family(90) == "large" and family(87) == "small"
    assert [block_dim(d) for d in (8, 16, 40, 72, 256)] == [16, 16, 64, 128, 256]
    assert max(BLOCK_DIMS) == 256


@pytest.mark.parametrize(
    ("text", "dtype", "names"),
    [
        ("sla", torch.bfloat16, {"group_states", "join_states"}),
        pytest.param(
            "sla2", torch.bfloat16, {"part_means", "pair_scores", "select", "row_odds"}, marks=pytest.mark.slow
        ),
        pytest.param(
            "sla(marginal=0.5)",
            torch.float16,
            {"part_means", "pair_scores", "select", "group_states", "join_states"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "vsa", torch.bfloat16, {"part_means", "pair_scores", "select", "add_gated"}, marks=pytest.mark.slow
        ),
    ],
)
def test_second_branches_compile(monkeypatch, text, dtype, names):
    found = compiling_instead(monkeypatch, choose, coarse, linear, hybrid_router)
    pattern, layout = parse(text), Layout((32, 32), 16)
    q = torch.randn(1, layout.length, 2, 128).to(dtype)
    parameters = pattern.initial_parameters(2, 128, layout.grid)
    choice = pattern.choose(q, q, layout, None, 0.1, parameters) if pattern.needs_choice else None
    listing = None if text == "sla" else hybrid_router.routed(pattern, q, q, q, layout, None, 0.1, parameters)
    if text != "sla2":
        hybrid_run.join(pattern, q.clone(), q, q, q, layout, None, 0.1, choice, parameters, listing)
    assert set(found) == names
    for name, used in found.items():
        assert used.fits(SHARED_MEMORY[90]), (name, used)


@pytest.mark.parametrize("number", [86, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_second_branches_have_room(dtype, number):
    """A state for all keys of 128 channels and the tokens of a step, on GPUs with the least shared memory too."""
    q = torch.zeros(1, 1024, 2, 128, dtype=dtype)
    states = linear.states_arguments(q, q, None, (2, 512), None, "softmax")
    state = torch.zeros(1, 2, 1, 128, 128, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
    join = linear.join_arguments(q, q, state, torch.ones(1, 2, 1, 128), None, torch.zeros(128), None, "softmax")
    launches = (
        (group_states, states, sizes.warps(states), linear.STATES_STAGES[dtype.itemsize]),
        (join_states, join, linear.join_warps(join), join["STAGES"]),
    )
    for kernel, given, warps, stages in launches:
        options = {"num_warps": warps, "num_stages": stages}
        made = triton.compile(ahead.source(kernel, given), target=GPUTarget("cuda", number, 32), options=options)
        used = ahead._used(made, True)
        assert used.fits(SHARED_MEMORY[number]), (kernel.fn.__name__, used)


@pytest.mark.parametrize(("version", "bytes_"), [("3.6.0", 64), ("3.7.1", 64), ("3.8.0", 0), ("3.10.0+git1", 0)])
def test_older_compilers_may_spill_a_little(monkeypatch, version, bytes_):
    monkeypatch.setattr("triton.__version__", version)
    assert resources.Resources(255, bytes_, 1000).fits(1000)
    assert not resources.Resources(255, bytes_ + 8, 1000).fits(1000)
