"""Steps follow whatever drives the model: new schedulers, other pipelines, second order, the tail of the timesteps."""

import copy
import warnings

import diffusers
import PIL.Image
import pytest
import torch

import visattn
from tests.support import tiny_models, tiny_pipelines
from tests.support.tiny import seeded
from visattn.patterns import Dense
from visattn.pipelines.patch.counting import COUNT, position

PATTERN = "na(window=3x3)"
SITES = 4


def forwards(handle):
    """Dense and sparse forwards of a UNet so far."""
    report = handle.report()
    assert not report.fallbacks
    return report.dense // SITES, report.hits // SITES


def run(pipe, options, steps=4, **more):
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **options, **more)


@pytest.fixture(scope="module")
def components():
    """Undo is exact, so that tests may share them."""
    return tiny_pipelines.stable_diffusion()[0].components


@pytest.fixture
def pipe(components):
    return diffusers.StableDiffusionPipeline(
        **{**components, "scheduler": diffusers.DDIMScheduler()}, requires_safety_checker=False
    )


OPTIONS = {"height": 24, "width": 16}


class TestSchedulers:
    @pytest.mark.parametrize(
        ("kind", "dense", "sparse"),
        [
            (diffusers.EulerDiscreteScheduler, 2, 2),
            (diffusers.HeunDiscreteScheduler, 4, 3),
            (diffusers.KDPM2DiscreteScheduler, 4, 3),
            # Its first step takes two evaluations.
            (diffusers.PNDMScheduler, 3, 2),
        ],
    )
    @pytest.mark.parametrize("share", [2, 0.5])
    def test_evaluations_are_not_steps(self, pipe, kind, dense, sparse, share):
        pipe.scheduler = kind(**({"skip_prk_steps": True} if kind is diffusers.PNDMScheduler else {}))
        with visattn.apply(pipe, PATTERN, dense_steps=share) as handle:
            run(pipe, OPTIONS)
        assert forwards(handle) == (dense, sparse)

    @pytest.mark.parametrize("kind", [diffusers.UniPCMultistepScheduler, diffusers.DDIMScheduler])
    def test_a_new_one_is_followed_at_once(self, pipe, kind):
        old = pipe.scheduler
        with visattn.apply(pipe, PATTERN, dense_steps=2) as handle:
            pipe.scheduler = new = kind.from_config(old.config)
            for done in (1, 2):
                run(pipe, OPTIONS)
                assert forwards(handle) == (2 * done, 2 * done)
        for each in (old, new):
            assert type(each) in (kind, diffusers.DDIMScheduler) and COUNT not in vars(each)

    def test_copies_and_states_put_back(self, pipe):
        with visattn.apply(pipe, PATTERN, dense_steps=2) as handle:
            pipe.scheduler = copy.deepcopy(pipe.scheduler)
            run(pipe, OPTIONS)
            assert forwards(handle) == (2, 2)
            scheduler, latents = pipe.scheduler, torch.zeros(1, 4, 4, 4)
            scheduler.set_timesteps(4)
            saved = copy.deepcopy(scheduler.__dict__)
            for t in scheduler.timesteps[:3]:
                scheduler.step(latents, t, latents)
            # Tried out only: the run begins at its first step all the same.
            scheduler.__dict__.update(saved)
            tiny_models.run(pipe.unet, tiny_models.sd15()[1])
            assert forwards(handle) == (3, 2)

    def test_two_handles_count_on_one_scheduler(self, pipe):
        other = diffusers.StableDiffusionPipeline(
            **{**pipe.components, "unet": tiny_models.sd15()[0]}, requires_safety_checker=False
        )
        first = visattn.apply(pipe, PATTERN, dense_steps=2)
        with visattn.apply(other, PATTERN, dense_steps=2) as second:
            first.remove()
            run(other, OPTIONS)
        assert forwards(second) == (2, 2)
        assert type(pipe.scheduler) is diffusers.DDIMScheduler

    def test_another_pipeline_on_the_same_model(self, pipe):
        other = diffusers.StableDiffusionPipeline(
            **{**pipe.components, "scheduler": diffusers.EulerDiscreteScheduler()}, requires_safety_checker=False
        )
        with visattn.apply(pipe, PATTERN, dense_steps=1) as handle:
            run(pipe, OPTIONS)
            run(other, OPTIONS)
            run(pipe, OPTIONS)
        assert forwards(handle) == (3, 9)
        assert type(other.scheduler) is diffusers.EulerDiscreteScheduler

    def test_a_bare_model_asks_the_pipeline_that_runs_it(self, pipe):
        with visattn.apply(pipe.unet, PATTERN, dense_steps=1) as handle:
            run(pipe, OPTIONS)
        assert forwards(handle) == (1, 3)


class TestTail:
    @pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler])
    @pytest.mark.parametrize("when", ["before apply", "after apply"])
    def test_image_to_image(self, pipe, scheduler, when):
        pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        if when == "before apply":
            pipe.scheduler = scheduler()
        with visattn.apply(pipe, PATTERN, dense_steps=0.5) as handle:
            if when == "after apply":
                pipe.scheduler = scheduler()
            run(pipe, {}, steps=8, image=PIL.Image.new("RGB", (16, 24)), strength=0.5)
        assert forwards(handle) == (2, 2)

    def test_inpainting(self, pipe):
        pipe = diffusers.StableDiffusionInpaintPipeline.from_pipe(pipe)
        picture, mask = PIL.Image.new("RGB", (16, 24)), PIL.Image.new("L", (16, 24), 255)
        with visattn.apply(pipe, PATTERN, dense_steps=0.5) as handle:
            run(pipe, OPTIONS, steps=8, image=picture, mask_image=mask, strength=0.5)
        assert forwards(handle) == (2, 2)

    @pytest.mark.parametrize("ask", [True, False], ids=["scaled input", "first step"])
    def test_a_loop_of_ones_own(self, pipe, ask):
        """The place of the first timestep in the list tells how many run, without reading it."""
        with visattn.apply(pipe, PATTERN, dense_steps=0.5) as handle:
            scheduler, (_, inputs) = pipe.scheduler, tiny_models.sd15()
            scheduler.set_timesteps(8)
            x = inputs["sample"]
            for t in scheduler.timesteps[4:]:
                scaled = scheduler.scale_model_input(x, t) if ask else x
                out = tiny_models.run(pipe.unet, inputs, sample=scaled)
                x = scheduler.step(out, t, x).prev_sample
        # Without being asked before, the first forward is taken for the first of eight; it is dense either way.
        assert forwards(handle) == (2, 2)

    def test_position(self):
        listed = torch.arange(6.0)
        assert [position(t, listed) for t in listed[2:]] == [2, 3, 4, 5]
        assert position(listed[3].expand(2), listed) == 3
        assert position(torch.tensor(3.0), listed) is None and position(3, listed) is None
        assert position(listed[3].to(torch.int64), listed) is None


class TestFrames:
    """Diffusion forcing: copies of the scheduler step, each for a frame, and the pipeline's own never does."""

    @pytest.fixture(scope="class")
    def pipe(self):
        base, _ = tiny_pipelines.wan()
        model, _ = tiny_models.skyreels()
        options = {name: value for name, value in base.transformer.config.items() if not name.startswith("_")}
        pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(
            tokenizer=base.tokenizer,
            text_encoder=base.text_encoder,
            transformer=seeded(type(model), **options, inject_sample_info=True),
            vae=base.vae,
            scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @pytest.mark.parametrize("forcing", [{}, {"ar_step": 2, "causal_block_size": 1}], ids=["together", "one by one"])
    @pytest.mark.parametrize(("schedule", "at"), [({"dense_steps": 1}, 0), ({"dense_last_steps": 1}, -1)])
    def test_steps_are_those_of_the_matrix(self, pipe, forcing, schedule, at):
        size = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 3}
        dense = {}
        with visattn.apply(pipe, "na(window=1x3x3)", **schedule) as handle:
            handle.watch(lambda watched: dense.update({watched.step: isinstance(watched.pattern, Dense)}))
            text = tiny_models.noise(1, 8, 32)
            pipe(None, prompt_embeds=text, guidance_scale=1.0, output_type="latent", **size, **forcing)
        steps = list(dense)
        assert steps == list(range(7 if forcing else 3))
        assert [step for step in steps if dense[step]] == [steps[at]]


class TestWarnings:
    @pytest.mark.parametrize("share", [4, 9, 0.9])
    def test_a_run_without_a_sparse_step(self, pipe, share):
        with (
            visattn.apply(pipe, PATTERN, dense_steps=share) as handle,
            pytest.warns(
                UserWarning, match=r"no step of this run of unet is sparse: dense_steps=.* covers all 4 steps"
            ),
        ):
            run(pipe, OPTIONS)
        assert forwards(handle) == (4, 0)

    @pytest.mark.parametrize("steps", ["9-", "0-9"])
    def test_steps_that_a_run_does_not_have(self, pipe, steps):
        said = rf"this run of unet has 4 steps, and steps {steps} of its schedule count more: give steps that it has"
        with visattn.apply(pipe, {"0-": {steps: PATTERN}}), pytest.warns(UserWarning, match=said):
            run(pipe, OPTIONS)

    def test_none_where_some_are(self, pipe):
        with visattn.apply(pipe, PATTERN, dense_steps=3), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run(pipe, OPTIONS)

    @pytest.mark.parametrize("dense_steps", [0, 1])
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda model: tiny_models.sd15()[0]])
    def test_a_replaced_model(self, pipe, dense_steps, how):
        model = pipe.unet
        with visattn.apply(pipe, PATTERN, dense_steps=dense_steps) as handle:
            pipe.unet = how(model)
            with pytest.warns(UserWarning, match="unet of StableDiffusionPipeline was replaced after apply"):
                run(pipe, OPTIONS, steps=1)
            assert not handle.report().hits
            pipe.unet = torch.compile(model, backend="eager", disable=True)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                pipe.scheduler.set_timesteps(4)
        pipe.unet = model
        with visattn.apply(pipe, PATTERN, strict=True):
            pipe.unet = how(model)
            with pytest.raises(ValueError, match="strict: unet of StableDiffusionPipeline was replaced"):
                run(pipe, OPTIONS)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
def test_apply_in_the_middle_of_a_run(kind):
    """A scheduler that tells where it is is followed from there; one that does not is no reason to count from 0."""
    pipe, options = tiny_pipelines.stable_diffusion()
    pipe.scheduler = getattr(diffusers, kind)()
    handles, at = [], 3 if kind.startswith("Heun") else 1

    def begin(pipe, evaluation, timestep, given):
        if evaluation == at:
            handles.append(visattn.apply(pipe, "na(window=3x3)", dense_steps=3))
        return given

    options = {**options, "callback_on_step_end": begin}
    if kind == "DDIMScheduler":
        with pytest.raises(ValueError, match="apply to the pipeline instead of the model, before it runs"):
            tiny_pipelines.generate(pipe, options, steps=5)
        handles[0].remove()
        return
    tiny_pipelines.generate(pipe, options, steps=5)
    report = handles[0].report()
    # Of five steps two came before, and the last one of a second-order scheduler has one evaluation.
    assert (report.dense, report.hits) == ((2 * 4, 3 * 4) if at == 3 else (1 * 4, 2 * 4))
    handles[0].remove()
    assert type(pipe.scheduler) is getattr(diffusers, kind)
