"""One step of a pipeline, run again: the same call, and maps of it."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import visattn
from tests.support import tiny_pipelines
from visattn import maps
from visattn.maps.look import details, query_token
from visattn.pipelines.at_step import at_step


def check_pruned(found, call, pruned, plain):
    """A head's output that is zeroed before the projection, by a hook on the projection."""
    width = call.v.shape[3]

    def zero(module, args):
        x = args[0].clone()
        x[..., -width:] = 0
        return x, *args[1:]

    hook = found.model.get_submodule(call.site).to_out[0].register_forward_pre_hook(zero)
    with torch.no_grad():
        other = found.forward()[0]
    hook.remove()
    change = (other - plain).double().flatten(1).norm(dim=1) / plain.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(pruned.change[-1], change.mean(), rtol=1e-3, atol=1e-6)


def check_details(calls):
    """Maps of every head, on the grids of all levels; the query is at one place of them."""
    found = details(calls, None, "na(window=3)", -1)
    for call in calls:
        here = found[call.site]
        assert len(here.dense) == len(here.sparse) == len(here.offsets) == call.q.shape[2]
        wide = [2 * n - 1 for n in call.layout.grid[-2:]]
        assert list(here.offsets[0].shape) == wide
        token = query_token(None, call.layout, max(each.layout.grid for each in calls))
        at = np.unravel_index(token - call.layout.prefix, call.layout.grid)
        assert all(abs(i - n / 2) <= 1 for i, n in zip(at, call.layout.grid, strict=True))
    with pytest.raises(ValueError, match="is not on grid"):
        query_token((99,) * len(calls[0].layout.grid), calls[0].layout, calls[0].layout.grid)


@pytest.mark.parametrize("name", ["wan", "stable_diffusion"])
def test_a_step_is_run_again(name):
    pipeline, options = getattr(tiny_pipelines, name)()
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "latent", **options}
    times = []
    model = getattr(pipeline, "transformer", None) or pipeline.unet
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: times.append(
            float(torch.as_tensor(kwargs.get("timestep", args[1:2] or 0)).flatten()[0])
        ),
        with_kwargs=True,
    )
    found = at_step(pipeline, arguments | {"generator": torch.Generator().manual_seed(0)}, 1)
    assert found.model is model and found.made is not None
    steps = list(dict.fromkeys(times))
    times.clear()
    with torch.no_grad():
        out = found.forward()
    hook.remove()
    assert len(steps) == 3 and times == [steps[1]]
    calls = maps.calls(found.model, found.forward)
    assert calls and all(call.layout.tokens > 1 for call in calls)
    schedule = maps.overview(calls, ["na(window=3)"], hops=False).schedule(0.2)
    with visattn.apply(pipeline, schedule, always=True) as handle:
        pipeline(**arguments | {"generator": torch.Generator().manual_seed(0)})
        assert {site.site for site in handle.report().sites} == {call.site for call in calls}
    pruned = maps.pruning(found.model, found.forward, layers="0")
    check_pruned(found, calls[0], pruned[calls[0].site], out[0])
    check_details(calls)
    learned = maps.gradient(found.model, found.forward, layers="0", probes=1)
    assert learned.keys() == pruned.keys() and all((each > 0).all() for each in learned.values())
    assert torch.equal(torch.as_tensor(out[0]), torch.as_tensor(found.forward()[0].detach()))
    with pytest.raises(ValueError, match="step 9 did not run: those that did were 0 to 2"):
        at_step(pipeline, arguments | {"generator": torch.Generator().manual_seed(0)}, 9)
    with pytest.raises(ValueError, match="step=-1"):
        at_step(pipeline, arguments, -1)
