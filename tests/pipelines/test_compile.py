"""torch.compile: whole models and repeated blocks in one graph each, and nothing recompiles that need not."""

import pytest
import torch

pytest.importorskip("diffusers")

import torch._dynamo
from torch._dynamo.testing import CompileCounter

import visattn
from tests.support import tiny_models

pytestmark = pytest.mark.early


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BUILDERS = {"flux": lambda: tiny_models.flux(single=1), "wan": tiny_models.wan, "sd15": tiny_models.sd15}
PATTERNS = {"flux": "na(window=3x3)", "wan": "na(window=3x3x3)", "sd15": "na(window=3x3)"}


# What the others have out of place is compiled below.
@pytest.mark.parametrize(("name", "in_place"), [("wan", False), *((name, True) for name in BUILDERS)])
def test_whole_model_in_one_graph(name, in_place):
    model, inputs = BUILDERS[name]()
    with visattn.apply(model, PATTERNS[name], strict=True) as handle:
        eager = tiny_models.run(model, inputs)
        modules = handle.report().hits
        counter = CompileCounter()
        if in_place:
            model.compile(backend=counter, fullgraph=True)
        compiled = model if in_place else torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(tiny_models.run(compiled, inputs), eager)
        report = handle.report()
    assert counter.frame_count == 1
    assert report.hits == 3 * modules and not report.fallbacks
    assert report.sites_hit == len(report.modules) == modules


def test_strict_holds_in_compiled_code():
    model, inputs = tiny_models.flux(single=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with visattn.apply(model, PATTERNS["flux"], strict=True):
        tiny_models.run(compiled, inputs)
        with pytest.raises(ValueError, match="2 of 2 selected attention modules of FluxTransformer2DModel did not"):
            tiny_models.run(compiled, inputs, img_ids=torch.zeros(48, 3))


@pytest.mark.parametrize("name", ["flux", "sd15"])
@pytest.mark.parametrize("strict", [False, True])
def test_programs_of_torch_export_are_refused(name, strict):
    """The number of a patch in one would mean another model's pattern once that has the number."""
    model, inputs = BUILDERS[name]()
    given = {**inputs, "return_dict": False}
    with (
        visattn.apply(model, PATTERNS[name]),
        pytest.raises(Exception, match=r"export the model after handle.remove\(\), or use torch.compile"),
    ):
        torch.export.export(model, (), given, strict=strict)
    program = torch.export.export(model, (), given, strict=strict)
    torch.testing.assert_close(program.module()(**given)[0], tiny_models.run(model, inputs))


def test_step_pattern_and_grid_values_recompile_nothing():
    model, _ = tiny_models.flux(single=1)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    stock = tiny_models.run(model, tiny_models.flux_inputs())
    results = []
    for pattern in ("na(window=3x3)", "na(window=5x3, stride=1x3)"):
        # The same number of tokens on other grids: only the values of img_ids change.
        with visattn.apply(model, pattern, dense_steps=1) as handle:
            for height, width in ((6, 8), (8, 6), (4, 12)):
                for step in range(2):
                    inputs = tiny_models.flux_inputs(height, width)
                    handle.set_step(step, 2)
                    got = tiny_models.run(compiled, inputs)
                    torch.testing.assert_close(got, tiny_models.run(model, inputs))
                    results.append(got)
    assert counter.frame_count == 1
    torch.testing.assert_close(results[0], stock)
    distinct = [a for i, a in enumerate(results) if not any(torch.allclose(a, b) for b in results[:i])]
    assert len(distinct) == 3 + 6  # a dense run of each grid, a sparse run of each grid and pattern
    # The patch is gone: stock code is traced again.
    torch.testing.assert_close(tiny_models.run(compiled, tiny_models.flux_inputs()), stock)


def test_grid_shapes_recompile_no_more_than_stock():
    def graphs(patched):
        torch._dynamo.reset()
        model, _ = tiny_models.wan(layers=1)
        handle = visattn.apply(model, "na(window=3x3x3)") if patched else None
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for frames, height, width in ((3, 12, 8), (4, 8, 14), (4, 14, 8)):
            inputs = tiny_models.wan_inputs(frames, height, width)
            got = tiny_models.run(compiled, inputs)
            torch.testing.assert_close(got, tiny_models.run(model, inputs))
        if handle is not None:
            assert not handle.report().fallbacks
        return counter.frame_count

    assert graphs(patched=True) == graphs(patched=False)


def graphs_of_repeated_blocks(build, pattern, patched):
    """Graphs that a model's repeated blocks compile to, after checking that they compute the same."""
    torch._dynamo.reset()
    model, inputs = build()
    counter = CompileCounter()
    handle = visattn.apply(model, pattern, strict=True) if patched else None
    expected = tiny_models.run(model, inputs)
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(tiny_models.run(model, inputs), expected)
    if handle is not None:
        report = handle.report()
        assert report.hits == 2 * len(report.modules) and not report.fallbacks
    return counter.frame_count


@pytest.mark.parametrize(
    "name",
    [
        "flux",
        "wan",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in [
                *("sd15", "flux2", "chroma", "qwen", "z_image", "wan_vace", "wan_animate", "hunyuan_video"),
                *("hunyuan_video15", "ltx", "ltx2", "kandinsky5", "krea2", "hunyuan_image", "ernie"),
                *("ideogram4", "glm_image"),
            ]
        ),
    ],
)
def test_repeated_blocks_share_graphs(name):
    build, _, pattern = tiny_models.FAMILIES[name]
    build = BUILDERS.get(name, build)
    assert graphs_of_repeated_blocks(build, pattern, True) == graphs_of_repeated_blocks(build, pattern, False) > 0


@pytest.mark.slow
def test_blocks_of_text_and_of_the_image_have_graphs_of_their_own():
    """FLUX.3 has blocks of one class for each: stock shares a graph among them, the pattern is the image's alone."""
    build, _, pattern = tiny_models.FAMILIES["flux3"]
    assert graphs_of_repeated_blocks(build, pattern, True) == graphs_of_repeated_blocks(build, pattern, False) + 1


def test_patching_another_model_recompiles_nothing():
    model, inputs = tiny_models.wan(layers=1)
    other, _ = tiny_models.wan(layers=1)
    counter = CompileCounter()
    with visattn.apply(model, PATTERNS["wan"]):
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        first = tiny_models.run(compiled, inputs)
        with visattn.apply(other, "na(window=1x3x3)"):
            tiny_models.run(other, inputs)
            torch.testing.assert_close(tiny_models.run(compiled, inputs), first)
        torch.testing.assert_close(tiny_models.run(compiled, inputs), first)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_gradients_are_those_of_eager(name):
    model, inputs = BUILDERS[name]()
    parameters = [p for n, p in model.named_parameters() if "to_q.weight" in n or "to_v.weight" in n]
    assert len(parameters) > 2
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with visattn.apply(model, PATTERNS[name], dense_steps=1) as handle:
        for step in range(2):
            handle.set_step(step, 2)
            eager = torch.autograd.grad(model(**inputs).sample.square().sum(), parameters, allow_unused=True)
            loss = compiled(**inputs).sample.square().sum()
            # The backward belongs to its forward, whatever comes next.
            handle.set_step(1 - step, 2)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for a, b in zip(found, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        report = handle.report()
    assert report.hits == report.dense == 2 * len(report.modules)
