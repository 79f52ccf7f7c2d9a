"""Lists that are kept from denoising step to step: how long, for whom, and never for another run."""

import math
import threading

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
import torch._dynamo
from torch._dynamo.testing import CompileCounter

import visattn
from tests.support import tiny_models
from visattn import Layout, attention, parse
from visattn.patterns import DynamicPattern
from visattn.patterns.choice.memory import Means, Memory

FAR = 1e9
SITES = 2


class Pipe(diffusers.DiffusionPipeline):
    """Calls its denoiser for two halves of guidance, whose inputs differ, once each a step."""

    def __init__(self, transformer, scheduler=None):
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler()
        )

    @torch.no_grad()
    def forward(self, inputs):
        """One step of a run that goes on elsewhere."""
        out = self.transformer(**inputs, return_dict=False)[0]
        self.scheduler.step(out, self.scheduler.timesteps[0], inputs["hidden_states"])

    @torch.no_grad()
    def __call__(self, inputs, steps=4, stop=None, halves=2):
        self.scheduler.set_timesteps(steps)
        x = inputs["hidden_states"]
        for i, t in enumerate(self.scheduler.timesteps):
            for half in range(halves):
                if i == stop:
                    raise KeyboardInterrupt
                out = self.transformer(**{**inputs, "hidden_states": x if half == 0 else -x}, return_dict=False)[0]
            x = self.scheduler.step(out[:, : x.shape[1]], t, x).prev_sample
        return x


def chooses(every, drift=FAR):
    return f"topk(keep=0.3, block=1x2x2, every={every}, drift={drift!r})"


@pytest.fixture
def made(monkeypatch):
    """Every choice that is made rather than kept: queries it saw, and its lists."""
    found, real = [], DynamicPattern._chosen

    def choosing(self, q, *rest):
        lists = real(self, q, *rest)
        found.append((q.clone(), lists.tiles.clone()))
        return lists

    monkeypatch.setattr(DynamicPattern, "_chosen", choosing)
    return found


@pytest.fixture
def told(monkeypatch):
    """Every choice that an engine is given."""
    found, real = [], DynamicPattern.choose

    def choosing(self, *args, **options):
        lists = real(self, *args, **options)
        found.append(lists.tiles)
        return lists

    monkeypatch.setattr(DynamicPattern, "choose", choosing)
    return found


@pytest.mark.parametrize(("every", "times"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_lists_are_kept_for_so_many_steps_for_each_module_and_half(made, told, every, times):
    model, inputs = tiny_models.wan()
    pipe = Pipe(model)
    with visattn.apply(pipe, chooses(every), strict=True, backend="tiles"):
        pipe(inputs)
    assert len(made) == times * 2 * SITES and len(told) == 4 * 2 * SITES
    for i, lists in enumerate(told):
        step, call = divmod(i, 2 * SITES)
        chosen = made[step // every * 2 * SITES + call][1]
        assert torch.equal(lists, chosen), "each half and module has lists of its own"
    # Halves differ, so that to mix them would show.
    assert not torch.equal(told[0], told[SITES])


@pytest.mark.parametrize("name", ["sla", "vsa"])
def test_lists_of_a_softmax_branch_are_kept_too(made, name):
    model, inputs = tiny_models.wan()
    pipe = Pipe(model)
    with visattn.apply(pipe, f"{name}(keep=0.3, block=1x2x2, every=2, drift=inf)", strict=True):
        pipe(inputs)
    assert len(made) == 2 * 2 * SITES


def test_lists_are_chosen_again_where_queries_or_keys_drift(made):
    model, inputs = tiny_models.wan()
    pipe = Pipe(model)
    for drift, times in ((1e-9, 4), (FAR, 1), (math.inf, 1)):
        made.clear()
        with visattn.apply(pipe, chooses(9, drift), strict=True, backend="tiles"):
            pipe(inputs)
        assert len(made) == times * 2 * SITES


def test_an_infinite_drift_is_not_even_looked_at(made, monkeypatch):
    model, inputs = tiny_models.wan()

    def moved(*_):
        raise AssertionError("looked")

    monkeypatch.setattr(Means, "moved", moved)
    with visattn.apply(pipe := Pipe(model), chooses(2, math.inf), strict=True, backend="tiles"):
        pipe(inputs)
    assert len(made) == 2 * 2 * SITES


def test_clusters_go_on_from_those_of_the_last_step_and_are_told(monkeypatch):
    from visattn.patterns import kmeans

    found, real = [], kmeans.k_means

    def clustering(x, centres, iterations, valid):
        found.append(iterations)
        return real(x, centres, iterations, valid)

    monkeypatch.setattr(kmeans, "k_means", clustering)
    model, inputs = tiny_models.wan()
    pipe, each = Pipe(model), 2 * 2 * SITES
    text = "kmeans(queries=4, keys=6, start=3, step=1, p=0.5)"
    with visattn.apply(pipe, text, strict=True) as handle:
        for _ in range(2):
            found.clear()
            pipe(inputs)
            assert found == each * [3] + 3 * each * [1]
        report = handle.report()
    for site in report.modules:
        assert all(call.reached is not None and 0 < call.reached.least < 1 for call in site.calls)
    found.clear()
    # Without steps every call starts anew.
    with visattn.apply(model, text, strict=True):
        tiny_models.run(model, inputs)
        tiny_models.run(model, inputs)
    assert set(found) == {3}
    for other in (
        "best(of=[dense, na(window=3x3x3)], every=2)",
        "perhead(heads={0: dense}, rest=topk(keep=0.5, block=1x2x2))",
    ):
        with visattn.apply(pipe, other, strict=True) as handle:
            pipe(inputs)
            calls = [call for site in handle.report().modules for call in site.calls]
        assert all(0 < call.reached.mean <= 1 for call in calls)


def test_no_run_sees_the_lists_of_another(made):
    """The next run, one after a run that was broken off at any step, and one of another thread."""
    model, inputs = tiny_models.wan()
    pipe, other = Pipe(model), Pipe(model)
    each = 2 * SITES
    with visattn.apply(pipe, chooses(9), strict=True, backend="tiles"):
        pipe(inputs)
        for stop in (0, 1, 3):
            with pytest.raises(KeyboardInterrupt):
                pipe(inputs, stop=stop)
            made.clear()
            pipe(inputs)
            assert len(made) == each
        made.clear()
        for wait in range(2):
            runs = [threading.Thread(target=p, args=(inputs,)) for p in (pipe, other)]
            for run in runs:
                run.start()
                if wait:
                    run.join()
            for run in runs:
                run.join()
        assert len(made) == 4 * each
        made.clear()
        # Runs that take turns in one thread: every forward is another run's than the last.
        for each_pipe in (pipe, other):
            each_pipe.scheduler.set_timesteps(4)
        for _ in range(2):
            for each_pipe in (pipe, other):
                each_pipe.forward(inputs)
        assert len(made) == 4 * SITES


def test_another_grid_or_batch_has_lists_of_its_own(made):
    model, inputs = tiny_models.wan()
    with visattn.apply(model, chooses(9), strict=True, backend="tiles") as handle:
        for step in range(3):
            for sample in (inputs["hidden_states"], inputs["hidden_states"][:, :, :, :8]):
                handle.set_step(step, 3)
                tiny_models.run(model, inputs, hidden_states=sample)
        assert len(made) == 2 * SITES
        handle.set_step(0, 3)
        tiny_models.run(model, inputs)
        assert len(made) == 3 * SITES, "a step that goes back begins another run"


def test_calls_with_gradients_choose_anew(made):
    model, inputs = tiny_models.wan()
    with visattn.apply(model, chooses(9), strict=True, backend="tiles") as handle:
        for step in range(2):
            handle.set_step(step, 2)
            out = model(**inputs, return_dict=False)[0]
        out.square().mean().backward()
    assert len(made) >= 2 * SITES
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads)


def test_compiled_code_keeps_lists_and_chooses_anew_with_gradients(made):
    model, inputs = tiny_models.flux(single=1)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    text = f"topk(keep=0.25, block=2x3, every=2, drift={FAR!r})"
    with visattn.apply(model, text, strict=True, backend="tiles") as handle:
        for step, times in ((0, 1), (1, 1), (2, 2), (3, 2)):
            handle.set_step(step, 4)
            tiny_models.run(compiled, inputs)
            assert len(made) == times * SITES
        made.clear()
        for step in range(2):
            handle.set_step(step, 4)
            compiled(**inputs, return_dict=False)[0].square().mean().backward()
        assert len(made) >= 2 * SITES
    torch._dynamo.reset()


def test_who_tells_no_step_is_refused():
    layout = Layout((4, 6))
    q = torch.randn(1, 24, 2, 8)
    with pytest.raises(ValueError, match=r"every=4.* knows no steps: apply\(\) it to a pipeline, or leave every out"):
        attention(q, q, q, "topk(keep=0.5, every=4, block=2x2)", layout)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"knows no steps"):
        torch.compile(lambda: attention(q, q, q, "topk(keep=0.5, every=4, block=2x2)", layout), backend="eager")()
    # What only shows lists keeps none.
    assert visattn.tile_choice(q, q, "topk(keep=0.5, every=4, block=2x2)", layout).any()
    model, inputs = tiny_models.wan()
    with (
        visattn.apply(model, chooses(4)),
        pytest.raises(ValueError, match=r"every=4.* needs the step, and nothing tells it: apply to the pipeline"),
    ):
        tiny_models.run(model, inputs)
    for text, message in (
        ("topk(every=0)", "every=0 must be one whole number of at least 1"),
        ("topp(every=2x2)", "must be one whole number of at least 1: it counts steps"),
        ("above(drift=0)", "drift=0 must be a number above 0"),
        ("topk(drift=none)", "drift=None must be a number above 0"),
        ("topk(drift=nan)", "drift=nan must be a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(text)


def test_drift_is_that_of_the_worst_head_and_ignores_what_all_keys_share():
    q, k = torch.randn(2, 1, 5, 3, 4).unbind(0)
    means = Means(q, k)
    assert means.moved(Means(q, k + torch.randn(3, 4))) < 1e-6
    moved = q.clone()
    moved[:, :, 1] *= 1.5
    assert means.moved(Means(moved, k)).item() == pytest.approx(0.5)


def test_a_memory_is_emptied_by_another_run_and_counts_halves():
    memory = Memory()
    memory.begin("a", 0, 4)
    memory.put("x", 1)
    first, second = (None, 0), (None, 1)
    assert (memory.half, memory.key("m"), memory.key("m")) == (first, (first, "m", 0), (first, "m", 1))
    memory.begin("a", 0, 4)
    assert (memory.half, memory.get("x"), memory.key("m")) == (second, 1, (second, "m", 0))
    memory.begin("a", 1, 4)
    assert (memory.half, memory.get("x")) == (first, 1)
    for name, half in (("cond", 0), ("skip", 0), ("cond", 1)):
        memory.begin("a", 2, 4, name)
        assert memory.half == (name, half)
    for run, step, total in (("b", 1, 4), ("b", 2, 5), ("b", 0, 5)):
        memory.put("x", 1)
        memory.begin(run, step, total)
        assert not len(memory) and memory.half == first


@pytest.mark.parametrize(
    ("first", "last", "dense"),
    [(0, 1, [3]), (1, 1, [0, 3]), (0, 0.5, [2, 3]), (0.25, 0.25, [0, 3])],
)
def test_dense_last_steps(first, last, dense):
    model, inputs = tiny_models.wan()
    pipe = Pipe(model)
    with visattn.apply(pipe, "na(window=3x3x3)", dense_steps=first, dense_last_steps=last) as handle:
        before = 0
        found = []
        for step in range(4):
            handle.set_step(step, 4)
            tiny_models.run(model, inputs)
            report = handle.report()
            found += [step] if report.dense > before else []
            before = report.dense
    assert found == dense
    assert report.to_dict()["dense_last_steps"] == last


def test_dense_last_steps_that_cannot_be():
    model, inputs = tiny_models.wan()
    for value in (1.0, -1, True, "2"):
        with pytest.raises(ValueError, match=r"dense_last_steps=.* must be a count of steps like 12 or a fraction"):
            visattn.apply(model, "na(window=3x3x3)", dense_last_steps=value)
    with visattn.apply(model, "na(window=3x3x3)", dense_last_steps=2) as handle:
        handle.set_step(0)
        with pytest.raises(ValueError, match=r"dense_last_steps=2 needs the number of steps"):
            tiny_models.run(model, inputs)
    with (
        visattn.apply(Pipe(model), "na(window=3x3x3)", dense_steps=2, dense_last_steps=0.5) as handle,
        pytest.warns(UserWarning, match=r"dense_steps=2 and dense_last_steps=0.5 covers all 4 steps"),
    ):
        handle.set_step(0, 4)
        tiny_models.run(model, inputs)
