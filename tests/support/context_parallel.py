"""What every process of the context parallelism test runs."""

import warnings

import torch.distributed as dist

import visattn
from tests.support import tiny_models

# Models that diffusers can split, and patterns whose results depend on the order of the tokens.
CASES = {
    "wan": (tiny_models.wan, "na(window=3x3x3)"),
    "flux": (lambda: tiny_models.flux(text=6), "na(window=3x3)"),
    "reference image": (lambda: tiny_models.flux(text=6, reference=(2, 3)), "na(window=3x3)"),
}
PATTERN = "na(window=3x3x3)"


def outputs(prepare):
    """Each model's output with its pattern, and how many calls ran it."""
    found = {}
    for name, (build, pattern) in CASES.items():
        model, inputs = build()
        prepare(model)
        with visattn.apply(model, pattern, strict=True) as handle:
            out = tiny_models.run(model, inputs)
            found[name] = out, handle.report().hits
    return found


def work(rank):
    """One process: results, and the errors of what is refused."""
    from diffusers import ContextParallelConfig

    warnings.simplefilter("ignore")
    world = dist.get_world_size()
    found = outputs(lambda model: model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world)))
    model, inputs = tiny_models.wan()
    with visattn.apply(model, PATTERN, strict=True) as handle:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
        found["later"] = tiny_models.run(model, inputs), handle.report().hits
    model, inputs = tiny_models.wan()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, PATTERN, dense_steps=1) as handle:
        handle.set_step(0)
        found["dense step"] = tiny_models.run(model, inputs) - stock, handle.report().dense
    refused = {"ring": {"ring_degree": world}, "anything": {"ulysses_degree": world, "ulysses_anything": True}}
    for name, options in refused.items():
        model, inputs = tiny_models.wan()
        model.enable_parallelism(config=ContextParallelConfig(**options))
        with visattn.apply(model, PATTERN):
            try:
                tiny_models.run(model, inputs)
            except ValueError as error:
                found[name] = str(error)
    return found
