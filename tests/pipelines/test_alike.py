"""First steps that are dense in a sparse run and in its twin are drawn once, and counted in both."""

import functools
import time
from dataclasses import replace

import numpy as np
import pytest

from visattn.pipelines import generate
from visattn.pipelines.generate import DENSE, SPARSE, Settings, run_all, steps_alike, warm_up_steps

pytest.importorskip("diffusers")

from tests.support.tiny_pixel_dit import tiny_pixel_dit

STEPS, LAYERS, DELAY = 5, 2, 0.02


@pytest.fixture
def pipe(monkeypatch):
    """A tiny random pipeline, which notes the evaluations of its model and takes a while for each."""
    made = tiny_pixel_dit(LAYERS)
    transformer = made.transformer
    original, made.evaluations = type(transformer).forward, 0

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        made.evaluations += 1
        time.sleep(DELAY)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(transformer), "forward", forward)
    return made


def settings(pattern, **given):
    return Settings(pattern=pattern, labels=(3, 5), count=2, steps=STEPS, compare=True, seed=1, **given)


def drawn(pipe, settings):
    """The runs by kind and image, and how often the model was evaluated for them."""
    pipe.evaluations = 0
    runs = {(run.kind, run.image): run for run in run_all(pipe, settings, progress=False)}
    return runs, pipe.evaluations - 2 * warm_up_steps(pipe) * getattr(pipe.scheduler, "order", 1)


@pytest.mark.parametrize("dense_steps, alike", [(2, 2), (0.4, 2), (0, 0)])
def test_each_pair_draws_them_once(pipe, dense_steps, alike):
    some = settings("na(window=3x3)", dense_steps=dense_steps)
    runs, evaluations = drawn(pipe, some)
    assert steps_alike(pipe, some) == alike
    assert evaluations == 2 * (2 * STEPS - alike)
    assert [runs[kind, image].shared_steps for image in (0, 1) for kind in (SPARSE, DENSE)] == [0, alike, alike, 0]


@pytest.mark.parametrize("pattern", ["na(window=3x3)", "broadcast(every=2)", "topk(keep=0.5, every=2, block=2x2)"])
def test_nothing_else_changes(pipe, monkeypatch, pattern):
    some = settings(pattern, dense_steps=2, dense_last_steps=1)
    shared, _ = drawn(pipe, some)
    monkeypatch.setattr(generate, "steps_alike", lambda *_: 0)
    alone, evaluations = drawn(pipe, some)
    assert evaluations == 2 * 2 * STEPS
    for key, run in shared.items():
        assert np.array_equal(run.pixels, alone[key].pixels) and run.divergence == alone[key].divergence
        for mine, other in zip(run.report.sites, alone[key].report.sites, strict=True):
            assert (mine.hits, mine.dense, mine.called) == (other.hits, other.dense, other.called)
            assert mine.dense_seconds > 0


def test_their_time_counts_in_both(pipe):
    runs, _ = drawn(pipe, settings("na(window=3x3)", dense_steps=4))
    assert all(run.seconds > STEPS * DELAY for run in runs.values())


def test_steps_of_several_evaluations_are_shared_whole_or_not_at_all(pipe):
    from visattn.pipelines.schedulers import EDICTScheduler

    pipe.scheduler = EDICTScheduler.from_config(pipe.scheduler.config)
    some = settings("na(window=3x3)", dense_steps=2)
    runs, evaluations = drawn(pipe, some)
    assert evaluations == 2 * 2 * 2 * STEPS and not any(run.shared_steps for run in runs.values())


@pytest.mark.parametrize("given", [{"weights": "student.safetensors"}, {"parallel": "halo"}, {"compare": False}])
def test_runs_that_differ_from_the_first_step_on_share_nothing(pipe, given):
    assert steps_alike(pipe, replace(settings("na(window=3x3)", dense_steps=2), **given)) == 0
