"""Schedulers with an exact inverse: what the originals give, and the way back to the same noise."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import visattn
from tests.support import tiny_pipelines
from tests.support.places import GOLDEN
from tests.support.tiny_pixel_flux import SIDE, tiny_pixel_flux
from visattn.pipelines.control.trajectory import plain_scheduler
from visattn.pipelines.schedulers import BDIAInverseScheduler, BDIAScheduler, EDICTInverseScheduler, EDICTScheduler
from visattn.pipelines.schedulers.wide import Wide

GOLD = torch.load(GOLDEN / "inversion.pt", weights_only=True)
DDIM = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
)
FLOW = FlowMatchEulerDiscreteScheduler()
KINDS = {
    "edict": (EDICTScheduler, EDICTInverseScheduler, "mixing"),
    "bdia": (BDIAScheduler, BDIAInverseScheduler, "gamma"),
}
CASES = [("edict", "0.93"), ("edict", "1.0"), ("bdia", "1.0"), ("bdia", "0.92")]


def golden(name):
    """Two states; those of BDIA are there with the later one first."""
    return GOLD[name].flip(0) if "bdia" in name else GOLD[name]


# Of the largest value of a state, after 50 steps.
EXACT = 5e-12


def noise_of(z, t):
    return torch.tanh(z.double() @ GOLD["W"] + 0.3 * torch.sin(t.double() / 100))


def velocity_of(z, t):
    return torch.tanh(z.double() @ GOLD["W"] + t.double() / 1000)


def loop(scheduler, z, model):
    for t in scheduler.timesteps:
        z = scheduler.step(model(z, t), t, z).prev_sample
    return z


def way(kind, value, source=DDIM, inverse=False):
    forward, back, name = KINDS[kind]
    return (back if inverse else forward).from_config(source.config, **{name: float(value)})


@pytest.mark.parametrize("kind, value", [*CASES, ("bdia", "0.5")])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.filterwarnings("ignore:.*enlarges")
def test_ddim_steps_give_what_the_originals_give(kind, value, steps):
    made = way(kind, value)
    made.set_timesteps(steps)
    out = loop(made, GOLD["z_start"], noise_of)
    # diffusers keeps the noise levels in float32.
    torch.testing.assert_close(torch.stack(made.state()), golden(f"{kind}_{steps}_{value}"), atol=1e-5, rtol=1e-5)
    assert torch.equal(out, made.state()[0 if kind == "edict" else 1])


@pytest.mark.parametrize("kind, value", [*CASES, ("bdia", "0.5")])
def test_flow_steps_give_what_the_formula_gives(kind, value):
    made = way(kind, value, FLOW)
    made.set_timesteps(sigmas=GOLD["flow_sigmas"][:-1].tolist())
    loop(made, GOLD["z_start"], velocity_of)
    torch.testing.assert_close(torch.stack(made.state()), golden(f"flow_{kind}_28_{value}"), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("steps", [10, 50])
def test_plain_steps_give_what_the_originals_give(steps):
    """Those of style injection, and of BDIA's first step."""
    scheduler = plain_scheduler(DDIM.config)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(loop(scheduler, GOLD["z_start"], noise_of), GOLD[f"ddim_{steps}"], rtol=1e-5, atol=1e-5)
    flow = plain_scheduler(FLOW.config)
    flow.set_timesteps(sigmas=GOLD["flow_sigmas"][:-1].tolist())
    found = loop(flow, GOLD["z_start"], velocity_of)
    torch.testing.assert_close(found, GOLD["flow_euler"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, value", CASES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("source, model", [(DDIM, noise_of), (FLOW, velocity_of)])
def test_there_and_back_again(kind, value, steps, source, model):
    there, back = way(kind, value, source), way(kind, value, source, inverse=True)
    there.set_timesteps(steps)
    end = loop(there, GOLD["z_start"].float(), lambda z, t: model(z, t).float())
    assert end.dtype == torch.float32
    start = back.set_state(there.state(), steps)
    back.set_timesteps(steps)
    z = loop(back, start.float(), lambda z, t: model(z, t).float())
    found = back.state()[0]
    assert (found - GOLD["z_start"].float()).abs().max() < EXACT * end.abs().max()
    if steps > 1 or kind == "edict":
        assert torch.equal(z, found.float())


@pytest.mark.parametrize("kind, value", [("edict", "0.8"), ("bdia", "0.7")])
@pytest.mark.parametrize("source, model", [(DDIM, noise_of), (FLOW, velocity_of)])
def test_no_float_input_rounds_another_way_back(kind, value, source, model):
    """So many values that in float64 states of some come out on the other side of the middle of two floats."""
    there, back = way(kind, value, source), way(kind, value, source, inverse=True)
    start = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0))
    seen = {False: [], True: []}

    def run(scheduler, z):
        scheduler.set_timesteps(12)

        def says(z, t):
            seen[scheduler.inverse].append(z)
            return model(z, t).float()

        return loop(scheduler, z, says)

    run(there, start)
    state = there.state()
    run(back, back.set_state(state, 12).float())
    assert (back.state()[0] - start).abs().max() <= 1e-16
    # BDIA's way back has no need of the first one.
    pairs = zip(seen[False][-len(seen[True]) :], reversed(seen[True]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    # Two plain tensors are float64, and the same way back is only as exact as that.
    run(back, back.set_state((state[0], state[1]), 12).float())
    assert 1e-16 < (back.state()[0] - start).abs().max() < 1e-4


def test_wide_numbers_have_twice_the_precision():
    made = torch.Generator().manual_seed(0)
    hi = torch.randn(2, 50, generator=made, dtype=torch.float64)
    lo = 1e-17 * hi.abs() * (torch.rand(2, 50, generator=made, dtype=torch.float64) - 0.5)
    x, y, f = Wide(hi[0], lo[0]), Wide(hi[1], lo[1]), 0.93

    def exact(wide):
        return [Fraction(a) + Fraction(b) for a, b in zip(wide.hi.tolist(), wide.lo.tolist(), strict=True)]

    pairs = list(zip(exact(x), exact(y), strict=True))
    cases = [
        (x + y, [a + b for a, b in pairs]),
        (x - y, [a - b for a, b in pairs]),
        (x + y.hi, [a + Fraction(b) for (a, _), b in zip(pairs, y.hi.tolist(), strict=True)]),
        (x * f, [a * Fraction(f) for a, _ in pairs]),
        (x / f, [a / Fraction(f) for a, _ in pairs]),
    ]
    for found, expected in cases:
        assert all(abs(a - b) < 1e-31 for a, b in zip(exact(found), expected, strict=True))


@pytest.mark.parametrize("kind, value", CASES)
def test_a_picture_goes_to_noise_and_back(kind, value):
    picture = GOLD["z_start"] / 3
    back, there = way(kind, value, FLOW, inverse=True), way(kind, value, FLOW)
    back.set_timesteps(20)
    loop(back, picture, velocity_of)
    start = there.set_state(back.state(), 20)
    there.set_timesteps(20)
    assert (loop(there, start, velocity_of) - picture).abs().max() < EXACT
    plain = FlowMatchEulerDiscreteScheduler()
    plain.set_timesteps(20)
    assert len(back.timesteps) == len(plain.timesteps) * back.order


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("kind, value", [("edict", "0.93"), ("bdia", "1.0")])
def test_other_predictions_are_the_same_steps(kind, value, prediction):
    alphas = DDIM.alphas_cumprod.double()

    def said(z, t):
        signal, noise, e = alphas[t].sqrt(), (1 - alphas[t]).sqrt(), noise_of(z, t)
        clean = (z - noise * e) / signal
        return clean if prediction == "sample" else signal * e - noise * clean

    forward, _, name = KINDS[kind]
    other = forward.from_config(DDIM.config, prediction_type=prediction, **{name: float(value)})
    other.set_timesteps(10)
    loop(other, GOLD["z_start"], said)
    torch.testing.assert_close(torch.stack(other.state()), golden(f"{kind}_10_{value}"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance, pattern", [(1.0, "dense"), (3.0, "na(window=3x3)")])
@pytest.mark.parametrize("kind, value", [("edict", "0.93"), ("bdia", "0.92")])
def test_a_pipeline_finds_its_noise_again(kind, value, pattern, guidance):
    pipeline: DiffusionPipeline = tiny_pixel_flux()
    forward, back, name = KINDS[kind]
    noise = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    there = pipeline.scheduler = forward.from_config(pipeline.scheduler.config, **{name: float(value)})

    def run(latents):
        options = {"num_inference_steps": 3, "guidance_scale": guidance, "output_type": "np"}
        return pipeline("a red apple, 3d", latents=latents, **options).images

    with visattn.apply(pipeline, pattern, backend="tiles" if pattern != "dense" else "auto"):
        picture = run(noise)
        pipeline.scheduler = back.from_config(pipeline.scheduler.config)
        run(pipeline.scheduler.set_state(there.state(), 3).float())
        found = pipeline.scheduler.state()
        assert (found[0] - noise).abs().max() < 1e-11
        # And once more to the picture.
        pipeline.scheduler = forward.from_config(pipeline.scheduler.config)
        latents = pipeline.scheduler.set_state(found, 3).float()
        np.testing.assert_allclose(run(latents), picture, atol=1e-6)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_edict_is_a_scheduler_of_order_2_in_stock_pipelines(name):
    """Every timestep twice: the pipeline's own loop runs both evaluations of a step, and back again."""
    pipe, options = tiny_pipelines.PIPELINES[name][0]()
    pipe.set_progress_bar_config(disable=True)
    latents = (1, 4, 12, 8) if name == "stable_diffusion" else (1, 48, 4)
    noise = torch.randn(latents, generator=torch.Generator().manual_seed(0))
    config = {**pipe.scheduler.config, **({"clip_sample": False} if name == "stable_diffusion" else {})}
    steps = []

    def run(scheduler, latents):
        pipe.scheduler, given = scheduler, {**options, "num_inference_steps": 3, "output_type": "latent"}
        keep = lambda pipe, i, t, tensors: steps.append(i) or {}  # noqa: E731
        return pipe("a cat", latents=latents, callback_on_step_end=keep, **given)[0]

    there, back = EDICTScheduler.from_config(config), EDICTInverseScheduler.from_config(config)
    end = run(there, noise)
    assert steps == list(range(6)) and there.order == 2
    assert torch.equal(end.flatten(), there.state()[0].float().flatten())
    run(back, back.set_state(there.state(), 3).float())
    assert (back.state()[0] - noise).abs().max() < EXACT * end.abs().max()


def test_half_of_a_run_begins_where_it_is_told():
    for kind, value in CASES:
        made, clean, noise = way(kind, value), GOLD["z_start"] / 2, GOLD["z_start"].flip(0)
        made.set_timesteps(10)
        half = made.timesteps[5 * made.order :]
        noisy = made.add_noise(clean, noise, half[:1])
        made.set_begin_index(5 * made.order)
        z = noisy
        for t in half:
            z = made.step(noise_of(z, t), t, z, return_dict=False)[0]
        # Without being told it finds the place by the timestep.
        again = way(kind, value)
        again.set_timesteps(10)
        w = noisy
        for t in half:
            w = again.step(noise_of(w, t), t, w).prev_sample
        assert torch.equal(z, w) and torch.isfinite(z).all()


def test_settings_are_saved_and_loaded(tmp_path):
    made = EDICTScheduler.from_config(FLOW.config, mixing=0.9, shift=3.0)
    made.save_pretrained(tmp_path)
    loaded = EDICTScheduler.from_pretrained(tmp_path)
    assert loaded.mixing == 0.9 and loaded.config.shift == 3.0
    assert FlowMatchEulerDiscreteScheduler.from_config(made.config).config.shift == 3.0
    assert EDICTInverseScheduler.from_config(made.config).mixing == 0.9


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"mixing": 0.0}, "mixing=0.0 must be above 0 and at most 1"),
        ({"clip_sample": True}, "clip_sample=True has no exact inverse"),
        ({"thresholding": True}, "thresholding=True has no exact inverse"),
        ({"shift": 1.0, "stochastic_sampling": True}, "stochastic_sampling=True has no exact inverse"),
    ],
)
def test_bad_settings_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        EDICTScheduler(**settings)


@pytest.mark.parametrize("source, name", [(DDIM, "shfit"), (FLOW, "beta_start")])
def test_unknown_options_are_refused(source, name):
    for make in (BDIAScheduler, EDICTInverseScheduler):
        with pytest.raises(ValueError, match=rf"{make.__name__} does not know {name}: its options are .*num_train"):
            make.from_config(source.config, **{name: 3.0})
        plain = {"shift": 1.0} if source is FLOW else {}
        with pytest.raises(ValueError, match=f"{make.__name__} does not know {name}"):
            make(**plain, **{name: 3.0})
    made, unused = BDIAScheduler.from_config(source.config, return_unused_kwargs=True, gamma=0.9, **{name: 3.0})
    assert made.gamma == 0.9 and unused == {name: 3.0}


def test_names_of_no_scheduler_in_a_configuration_are_warned_of():
    with pytest.warns(UserWarning, match="EDICTScheduler does not know mixng of the configuration"):
        EDICTScheduler.from_config({**DDIM.config, "mixng": 0.9})


@pytest.mark.parametrize("name", ["PNDM", "EulerDiscrete", "DPMSolverMultistep", "FlowMatchHeunDiscrete"])
def test_what_only_another_scheduler_has_is_left_out(name):
    source = getattr(diffusers, f"{name}Scheduler")()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = BDIAScheduler.from_config(EDICTScheduler.from_config(source.config).config)
    assert made.config.num_train_timesteps == 1000 and ("shift" in made.config) == ("shift" in source.config)


def test_flow_matching_of_other_solvers_is_flow_matching():
    """Wan's UniPC says that its model predicts a velocity, and calls the shift otherwise."""
    source = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    made, plain = EDICTScheduler.from_config(source.config), FlowMatchEulerDiscreteScheduler(shift=3.0)
    made.set_timesteps(5)
    plain.set_timesteps(5)
    assert torch.equal(made.timesteps[::2], plain.timesteps)
    with pytest.raises(ValueError, match="prediction_type='flow_prediction' must be one of epsilon"):
        EDICTScheduler(prediction_type="flow_prediction")


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match=r"gamma=1.5 must be above 0"):
        BDIAScheduler(gamma=1.5)
    made = way("bdia", 1.0)
    z = GOLD["z_start"]
    for state in (None, 3, ["a", "b"]):
        with pytest.raises(ValueError, match="a state is two tensors of one shape, as state"):
            made.set_state(state, 4)
    with pytest.raises(ValueError, match="call set_timesteps before"):
        made.step(z, 0, z)
    with pytest.raises(ValueError, match="no states yet"):
        made.state()
    with pytest.warns(UserWarning, match="enlarges what float64 rounds to 2e-01.* gamma nearer to 1 than 0.5"):
        way("bdia", 0.5).set_timesteps(50)
    made.set_timesteps(4)
    out = made.step(z, made.timesteps[0], z).prev_sample
    with pytest.raises(ValueError, match="not what the last step returned"):
        made.step(z, made.timesteps[1], out + 1)
    with pytest.raises(ValueError, match="two tensors of one shape"):
        made.set_state((z, z[:1]), 4)
    made.set_state((z, z), 4)
    with pytest.raises(ValueError, match="told 4 steps, and this run has 5"):
        made.set_timesteps(5)
    other = way("bdia", 1.0)
    other.set_timesteps(3)
    with pytest.raises(ValueError, match="none of the 3 of this run"):
        other.step(z, 17, z)
