"""What every process of the context parallelism test runs."""

import warnings

import torch
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


def work(rank, world, folder):
    """One process: results go to a file, as do the errors of what is refused."""
    from diffusers import ContextParallelConfig

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    # diffusers divides by the number of accelerators.
    torch.accelerator.device_count = lambda: 1
    found = outputs(lambda model: model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world)))
    model, inputs = tiny_models.wan()
    with visattn.apply(model, PATTERN) as handle:
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
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
