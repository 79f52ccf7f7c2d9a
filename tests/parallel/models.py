"""What every rank runs in the tests of `apply(..., parallel=...)`."""

import warnings

import torch
import torch.distributed as dist

import visattn
from tests.support import tiny_models
from visattn.outside import Around

# Builder, pattern and what apply gets besides.
MODELS = {
    "wan": (tiny_models.wan, "na(window=3x3x3)", {}),
    "wan, a layer and a step dense": (tiny_models.wan, "na(window=3x3x3)", {"dense_layers": 1}),
    "wan, one layer selected": (tiny_models.wan, "radial(block=4)", {"layers": 1}),
    "wan, states": (tiny_models.wan, "linear(causal=1x0x0, decay=0.5)", {}),
    "flux": (lambda: tiny_models.flux(text=5), "na(window=3x3, dilation=1x2)", {}),
    "flux, reference image": (lambda: tiny_models.flux(text=5, reference=(2, 3)), "clear(radius=2)", {}),
    "flux2": (tiny_models.flux2, "halo(block=2x2, halo=1)", {}),
    "qwen": (tiny_models.qwen, "na(window=3x3)", {}),
    "qwen, padded prompts and a reference image": (
        lambda: tiny_models.qwen(references=[(1, 4, 3)], padded=True),
        "na(window=5x3)",
        {},
    ),
    "ltx": (tiny_models.ltx, "na(window=3x3x3, causal=1x0x0)", {}),
    "chronoedit": (tiny_models.chronoedit, "na(window=3x3x3)", {}),
}


def output(name, how=None, dense_steps=0):
    """A model's output with its pattern, and what the report says."""
    build, pattern, options = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with visattn.apply(
            model, pattern, strict=not dense_steps, parallel=how, dense_steps=dense_steps, **options
        ) as handle:
            if dense_steps:
                handle.set_step(0)
            out = tiny_models.run(model, inputs)
            report = handle.report()
            return out, (report.hits, report.dense, report.moved, "sent to other processes" in str(report))


def steps(rank, text, how):
    """Outputs of a model in four steps of a run, and how many calls computed anew."""
    torch.manual_seed(0)
    model, inputs = tiny_models.wan()
    outs = []
    with visattn.apply(model, text, strict=True, parallel=how) as handle:
        for step in range(4):
            handle.set_step(step, 4)
            given = {**inputs, "hidden_states": inputs["hidden_states"] * (1 + 0.05 * step)}
            outs.append(tiny_models.run(model, given))
        calls = [call for site in handle.report().modules for call in site.calls]
    return outs, sum(call.shared.refreshed for call in calls)


def compiled(rank, name, how):
    """The same of a model that is compiled as a whole, twice, and what is counted."""
    build, pattern, options = MODELS[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = build()
    running = torch.compile(model, backend="eager")
    with visattn.apply(model, pattern, strict=True, parallel=how, **options) as handle:
        outs = [tiny_models.run(running, inputs) for _ in range(2)]
        report = handle.report()
    torch._dynamo.reset()
    return outs, report.hits, report.moved


def gradients(rank, name, how, compiled=False):
    """The gradients of a model's weights, by DDP's mean over the ranks, each of which has the whole loss.

    Its blocks may be compiled, each in one graph.
    """
    build, pattern, options = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build()
    if compiled:
        torch._dynamo.reset()
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with visattn.apply(model, pattern, parallel=how, **options):
        out = model(**inputs, return_dict=False)[0]
        out.square().mean().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for grad in found.values() if how else ():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    left = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Around)]
    assert not left
    return found | {"out": out.detach()}


def on_rank(rank, name, how, dense_steps=0):
    return output(name, how, dense_steps)


def refused(rank, build, pattern, how):
    model, _ = getattr(tiny_models, build)()
    try:
        visattn.apply(model, pattern, parallel=how).remove()
    except ValueError as error:
        return str(error)
    return ""


def on_a_mesh(rank, name, how):
    """The same on the ranks of a mesh, and what is said of a mesh of two axes."""
    from torch.distributed.device_mesh import init_device_mesh

    build, pattern, options = MODELS[name]
    model, inputs = build()
    with visattn.apply(model, pattern, parallel=how, mesh=init_device_mesh("cpu", (2,)), **options):
        out = tiny_models.run(model, inputs)
    try:
        visattn.apply(model, pattern, parallel=how, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b")))
    except ValueError as error:
        return out, str(error)
    return out, ""


def with_hooks(rank, name, how):
    """A model with diffusers' own hooks: its output with a pattern, and without one afterwards, when they work."""
    from diffusers import ContextParallelConfig

    build, pattern, options = MODELS[name]
    model, inputs = build()
    world = dist.get_world_size()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world, ulysses_anything=how == "ulysses"))
    with visattn.apply(model, pattern, parallel=how, strict=True, **options):
        inside = tiny_models.run(model, inputs)
    # diffusers' ulysses_anything itself runs on GPUs alone.
    return inside, tiny_models.run(model, inputs) if how == "halo" else None
