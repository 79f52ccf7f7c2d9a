"""Prepared calls: each kernel gets the addresses of its own tensors, call after call."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from tests.support.fake_driver import fake_driver
from visattn import Layout, attention, clear_caches

LAYOUT = Layout((16, 16), 7)


def tensors(seed, dtype=torch.float16, heads=2, kv_heads=2, head_dim=64, learns=False):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(2, LAYOUT.length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=draw).to(dtype).requires_grad_(learns) for s in shapes]


@pytest.fixture
def driver():
    clear_caches()
    with fake_driver() as seen:
        yield seen
    clear_caches()


def given_by_name(kernel, found, given):
    """The tensors among the operands that a kernel has arguments for, and descriptors of."""
    maps = {"k_grid": "k", "k_runs": "k", "v_grid": "v", "v_runs": "v"}
    maps |= {"q_grid": "q", "q_runs": "q", "grad_grid": "grad_out", "grad_runs": "grad_out"}
    for name, value in found.items():
        role = maps.get(name, name)
        if role in given:
            t = given[role]
            first = t[:, LAYOUT.prefix :] if name.endswith("_grid") else t
            assert value == (t if isinstance(t, int) else first.data_ptr()), f"{name} of {kernel.fn.__qualname__}"
    return set(found)


CASES = {
    "hopper": {},
    "general": {"dtype": torch.float32, "head_dim": 40},
    "mask": {"mask": True},
    "rpb": {"rpb": True},
    "grouped": {"kv_heads": 1},
    "routed": {"pattern": "routing(4x4,topk=2)"},
}


def case(name):
    options = dict(CASES[name])
    return options.pop("pattern", "na(window=7x7)"), options.pop("mask", False), options.pop("rpb", False), options


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_forward_gets_its_addresses(driver, name, lse):
    pattern, mask, rpb, options = case(name)
    for seed in range(3):
        q, k, v = tensors(seed, **options)
        more = {"key_mask": torch.ones(q.shape[:2], dtype=torch.bool)} if mask else {}
        more |= {"rpb": torch.randn(q.shape[2], 13, 13)} if rpb else {}
        found = attention(q, k, v, pattern, LAYOUT, backend="triton", return_lse=lse, **more)
        out = found[0] if lse else found
        given = {"q": q, "k": k, "v": v, "out": out, **more} | ({"lse": found[1]} if lse else {})
        assert out.shape == q.shape and out.is_contiguous()
        if seed:
            kernel, values = driver[-1]
            names = given_by_name(kernel, values, given)
            assert {"q", "out"} <= names and {"bounds", "bases"} <= names
    kernels = 4 if name == "routed" else 1
    assert len(driver.first) == kernels and len(driver) == 2 * kernels


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name != "rpb"])
def test_a_backward_gets_its_addresses(driver, name, lse, expanded):
    pattern, mask, _, options = case(name)
    for seed in range(3):
        q, k, v = tensors(seed, learns=True, **options)
        more = {"key_mask": torch.ones(q.shape[:2], dtype=torch.bool)} if mask else {}
        found = attention(q, k, v, pattern, LAYOUT, backend="triton", return_lse=lse, **more)
        out, grad_lse = (found[0], torch.randn(found[1].shape)) if lse else (found, None)
        # A gradient that the copies of the Hopper kernel cannot address: samples share their memory.
        grad_out = torch.randn(out.shape).to(out.dtype)
        grad_out = grad_out[:1].expand_as(out) if expanded else grad_out
        results = (out, found[1]) if lse else (out,)
        grads = torch.autograd.grad(results, (q, k, v), (grad_out, grad_lse)[: len(results)])
        given = {"q": q, "k": k, "v": v, "out": out, "grad_out": grad_out, **more}
        given |= dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
        given |= {"grad_lse": grad_lse} if lse else {}
        if seed:
            delta, keys, queries = (
                next(each for each in reversed(driver) if each[0].fn.__name__ == kernel)
                for kernel in ("deltas", "key_gradients", "query_gradients")
            )
            sums = {name: queries[1][name] for name in ("lse", "delta")}
            for i, (kernel, values) in enumerate((delta, keys, queries)):
                addresses = given | sums
                if i == 1 and expanded and name in ("hopper", "mask"):
                    # It reads contiguous copies of both.
                    del addresses["q"], addresses["grad_out"]
                given_by_name(kernel, values, addresses)
            assert sums["lse"] != sums["delta"]
    # Routed ones choose in three more kernels, and write lists for the gradients of keys.
    kernels = 8 if name == "routed" else 4
    assert len(driver.first) == kernels and len(driver) == 2 * kernels


def test_many_samples_are_programs_of_the_first_axis(driver):
    # Windows of time at every place of an image: the other axes of a launch have room for 65535.
    layout = Layout(3)
    q, k, v = torch.zeros(3, 2**16, 3, 1, 8, dtype=torch.float16).requires_grad_()
    rpb = torch.zeros(1, 5, requires_grad=True)
    attention(q, k, v, "na(window=3)", layout, backend="triton", rpb=rpb).sum().backward()
    names = {kernel.fn.__name__ for kernel, _ in driver.first}
    assert names == {"attend", "deltas", "key_gradients", "query_gradients", "bias_gradients"}
    assert all(max(grid[1:], default=0) < 2**16 for grid in driver.grids)


@pytest.mark.parametrize("options", [{"pattern": "topk(keep=2, block=4)"}, {"pattern": "na(3)", "precision": "int8"}])
def test_more_heads_than_the_second_axis_has_room_for_are_refused(driver, options):
    with torch.no_grad():
        for batch in (2**14 - 1, 2**14):
            x = torch.zeros(1, 16, 4, 32, dtype=torch.float16).expand(batch, -1, -1, -1)
            refused = batch > 2**14 - 1
            with pytest.raises(ValueError, match=r"over 65535 .*: cut the batch") if refused else nullcontext():
                attention(x, x, x, layout=Layout(16), backend="triton", **options)
    assert all(max(grid[1:], default=0) < 2**16 for grid in driver.grids)


def test_what_is_kept_is_counted_and_emptied(driver):
    from visattn.keep import STORE

    q, k, v = tensors(0)
    before = STORE.bytes
    attention(q, k, v, "na(window=7x7)", LAYOUT, backend="triton")
    assert STORE.bytes >= before + 16 * 2**10
    held = sum(sum(entry.leaves.values()) for entry in STORE.entries() if hasattr(entry.value, "kernels"))
    (start,) = next(e.value for e in STORE.entries() if hasattr(e.value, "kernels")).kernels.starts.ready.values()
    tables = {t.data_ptr(): t.nbytes for t in start.kept if isinstance(t, torch.Tensor)}
    assert held >= sum(tables.values()) > 0
    clear_caches()
    assert STORE.bytes == 0
    attention(q, k, v, "na(window=7x7)", LAYOUT, backend="triton")
    assert len(driver.first) == 2 and not driver


@pytest.fixture
def quick(driver, monkeypatch):
    """Kernels choose, as they do for tensors on a GPU."""
    from visattn.kernels.triton.backend import backend

    monkeypatch.setattr("visattn.patterns.dynamic.by_kernels", backend.choose)
    return driver


@pytest.mark.parametrize("text", ["topk(keep=0.3,block=8x16,key_block=8x8)", "topp(p=0.5,block=8x8,always=near(1))"])
def test_a_choice_is_started_again_with_its_addresses(quick, text, monkeypatch):
    # Scores of one head at a time: two launches of the kernels that read them.
    monkeypatch.setattr("visattn.kernels.triton.choosing.choose.SCORES", 1)
    seen = []
    for seed in range(3):
        q, k, v = tensors(seed)
        with torch.no_grad():
            out = attention(q, k, v, text, LAYOUT, backend="triton")
        seen.append([(kernel.fn.__name__, found) for kernel, found in quick[len(quick) - 8 :]])
        held = [weakref.ref(t) for t in (q, k, v, out)]
    assert len(quick.first) == 8 and len(quick) == 16
    choice = seen[-1]
    names = [name for name, _ in choice]
    assert names == ["part_means", "part_means", *["pair_scores", "select"] * 2, "write_lists", "attend"]
    means, keys, scores, first, _, second, lists, run = (found for _, found in choice)
    assert (means["x"], keys["x"]) == tuple(t[:, LAYOUT.prefix :].data_ptr() for t in (q, k))
    assert (scores["mean_q"], scores["mean_k"]) == (means["out"], keys["out"])
    assert (scores["count_q"], first["count_k"]) == (means["counts"], keys["counts"])
    assert first["scores"] == scores["scores"] and (first["first_head"], second["first_head"]) == (0, 1)
    assert lists["choice"] == first["tiles"] == second["tiles"]
    assert text.startswith("topk") or lists["counts"] == first["counts"]
    assert (run["bounds"], run["bases"]) == (lists["bounds"], lists["bases"]) and run["out"] == out.data_ptr()
    assert (run["mask_ids"], lists["row_blocks"]) == (lists["mask_ids"], seen[-2][6][1]["row_blocks"])
    # Tables stay where they are.
    assert means["tokens"] == seen[-2][0][1]["tokens"]
    quick.first.clear()
    quick.wanted.clear()
    del q, k, v, out
    gc.collect()
    assert [ref() is None for ref in held] == [True] * 4


EIGHT = {
    "hopper": ("na(window=7x7)", "fp8", {}),
    "general": ("na(window=7x7)", "int8", {"head_dim": 40}),
    "mask": ("na(window=7x7)", "int8", {"mask": True}),
    "chosen": ("topk(keep=0.3,block=8x16,key_block=8x8)", "fp8", {}),
    "routed": ("routing(4x4,topk=2)", "int8", {}),
}


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("name", EIGHT)
def test_calls_in_8_bits_are_started_again(quick, name, lse):
    text, precision, options = EIGHT[name]
    options = dict(options)
    more = {"key_mask": torch.ones(2, LAYOUT.length, dtype=torch.bool)} if options.pop("mask", False) else {}
    kernels = 0
    for seed in range(3):
        q, k, v = tensors(seed, **options)
        with torch.no_grad():
            found = attention(
                q, k, v, text, LAYOUT, backend="triton", precision=precision, return_lse=lse, **more
            )  # fmt: skip
        out, sums = found if lse else (found, None)
        kernels = kernels or len(quick.first)
        held = [weakref.ref(t) for t in (q, k, v, out)]
    assert len(quick.first) == kernels and len(quick) == 2 * kernels
    seen = {kernel.fn.__name__: values for kernel, values in quick[kernels:]}
    statistics, scales, columns, rows, run = (
        seen[each]
        for each in ("column_statistics", "column_scales", "quantise_columns", "quantise_rows", "attend_8bit")
    )
    given = {"k": k, "v": v} if not more else {}
    assert all(columns[each] == statistics[each] == t.data_ptr() for each, t in given.items())
    assert rows["q"] == q.data_ptr() and run["out"] == out.data_ptr()
    assert scales["found"] == statistics["found"] and rows["k_shift"] == columns["k_shift"] == scales["k_shift"]
    assert (run["q8"], run["k8"], run["v8"]) == (rows["q8"], columns["k8"], columns["v8"])
    assert (run["q_scale"], run["k_scale"]) == (rows["q_scale"], columns["k_scale"])
    assert (run["v_scale"], run["v_shift"]) == (scales["v_scale"], scales["v_shift"])
    assert not lse or run["lse"] == sums.data_ptr()
    assert len({run[each] for each in ("q8", "k8", "v8", "out", "q_scale", "k_scale", "bases")}) == 7
    if name == "mask":
        assert run["key_mask"] == more["key_mask"].data_ptr()
    if name == "chosen":
        assert (run["bounds"], run["bases"]) == tuple(seen["write_lists"][each] for each in ("bounds", "bases"))
    if name == "routed":
        assert [run[each] for each in ("bases", "mask_ids")] == [
            seen["choose_regions"][each] for each in ("bases", "mask_ids")
        ]
    # Tables stay where they are.
    assert run["tokens"] == next(v for kernel, v in quick if kernel.fn.__name__ == "attend_8bit")["tokens"]
    quick.first.clear()
    quick.wanted.clear()
    del q, k, v, out, sums, found, given
    gc.collect()
    assert [ref() is None for ref in held] == [True] * 4


@pytest.mark.parametrize("pattern", ["na(window=7x7)", "topk(keep=0.3,block=8x16,key_block=8x8)"])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_one_tensor_in_three_places_says_nothing_of_the_next_call(quick, pattern, precision):
    one, others = tensors(0)[0], tensors(1)
    for q, k, v in ((one, one, one), others, others):
        with torch.no_grad():
            attention(q, k, v, pattern, LAYOUT, backend="triton", precision=precision)
    q, k, v = (t.data_ptr() for t in others)
    seen = [(kernel.fn.__name__, found) for kernel, found in quick[len(quick) // 2 :]]
    grid = [t[:, LAYOUT.prefix :].data_ptr() for t in others[:2]]
    if pattern.startswith("topk"):
        assert [found["x"] for name, found in seen if name == "part_means"] == grid
    run = dict(seen)["attend_8bit" if precision else "attend"]
    if precision:
        assert [dict(seen)[name][role] for name, role in (("quantise_rows", "q"), ("quantise_columns", "k"))] == [q, k]
        assert dict(seen)["quantise_columns"]["v"] == dict(seen)["column_statistics"]["v"] == v
    else:
        assert (run["q"], run["k_runs"], run["v_runs"]) == (q, k, v)


def test_lists_that_are_written_again_are_tensors_for_who_asks(quick):
    """Gradients read the lists of the forward where their tiles are the same, and so does a first launch."""
    q, k, v = tensors(0, learns=True)
    for _ in range(2):
        out = attention(q, k, v, "topk(keep=0.3,block=8x16,key_block=8x8)", LAYOUT, backend="triton")
    written = next(found for kernel, found in reversed(quick) if kernel.fn.__name__ == "write_lists")
    lists = out.grad_fn.rest[-1]
    run = lists.program("forward")
    assert [t.data_ptr() for t in run.own_lists] == lists.addresses("forward")
    assert lists.addresses("forward") == [written[name] for name in ("bounds", "bases", "mask_ids")]
    assert run.bounds.shape == (4, run.row_tiles, 4) and run.bounds.dtype == run.bases.dtype == torch.int32
    assert run.bases.shape == run.mask_ids.shape and run.full and run.groups == 2


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_of_a_call_is_kept(driver, name):
    pattern, mask, _, options = case(name)
    q, k, v = tensors(0, learns=True, **options)
    more = {"key_mask": torch.ones(q.shape[:2], dtype=torch.bool)} if mask else {}
    out = attention(q, k, v, pattern, LAYOUT, backend="triton", **more)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    held = [weakref.ref(t) for t in (q, k, v, out, *grads, *more.values())]
    # The stand-in for a driver holds what it was given.
    driver.first.clear()
    driver.wanted.clear()
    del q, k, v, out, grads, more
    gc.collect()
    assert [ref() is None for ref in held] == [True] * len(held)


def test_addresses_of_less_alignment_go_through_triton(driver):
    q, k, v = tensors(0)
    for _ in range(2):
        attention(q, k, v, "na(window=7x7)", LAYOUT, backend="triton")
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    attention(odd, k, v, "na(window=7x7)", LAYOUT, backend="triton")
    attention(q, k, v, "na(window=7x7)", LAYOUT, backend="triton")
    assert len(driver.first) == 2 and driver.first[1][1]["q"] is odd and len(driver) == 2


def test_a_first_call_of_less_alignment_decides_nothing_for_others(driver):
    q, k, v = tensors(0)
    odd = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    attention(odd, odd, odd, "na(window=7x7)", LAYOUT, backend="triton")
    attention(q, k, v, "na(window=7x7)", LAYOUT, backend="triton")
    (first, _), (second, _) = driver.first
    assert "hopper" not in first.fn.__module__ and "hopper" in second.fn.__module__


@pytest.mark.parametrize("learns", [False, True])
def test_linear_attention_starts_directly(driver, learns):
    from visattn.kernels.triton.linear.attention import linear_attention

    for seed in range(3):
        q, k, v = tensors(seed, learns=learns)
        out = linear_attention(q, k, v)
        if learns:
            grads = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape).to(out.dtype))
        if seed:
            *_, (kernel, values) = (each for each in driver if each[0].fn.__name__ == "read" and "q" in each[1])
            # The last one reads what the gradient of v is made of.
            wanted = {"q": k, "out": grads[2]} if learns else {"q": q, "out": out}
            assert {"q", "out"} <= given_by_name(kernel, values, wanted)
    assert len(driver) == 2 * len(driver.first) > 0


def test_agent_attention_starts_directly(driver):
    from visattn.kernels.triton.agent.attention import agent_attention

    for seed in range(3):
        q, k, v = tensors(seed)
        out = agent_attention(q, q[:, :9], k, v, None, None, 0.125, torch.empty_like)
        if seed:
            given_by_name(*driver[-1], {"q": q, "out": out})
    assert len(driver.first) == 3 and len(driver) == 6
