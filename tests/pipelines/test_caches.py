"""apply() next to the caches and the offloading of diffusers."""

import warnings

import diffusers
import diffusers.hooks
import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip

import visattn
from tests.support import tiny_models, tiny_pipelines

PATTERNS = {2: "na(window=3x3)", 3: "na(window=3x3x3)"}


def config(name, **options):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    return getattr(diffusers, name)(**options)


def pab(clock):
    return config(
        "PyramidAttentionBroadcastConfig",
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: clock[0],
    )


def faster(clock):
    return config(
        "FasterCacheConfig",
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        is_guidance_distilled=True,
        current_timestep_callback=lambda: clock[0],
        tensor_format="BCFHW",
    )


# The cache, made from where the timestep is read, a model, and how many of its modules run in each of four forwards.
CACHES = {
    "pab": (pab, tiny_models.wan, [2, 0, 2, 0]),
    "faster": (faster, tiny_models.wan, [2, 0, 2, 0]),
    "first block": (lambda _: config("FirstBlockCacheConfig", threshold=1e9), tiny_models.flux, [3, 1, 1, 1]),
    "mag": (
        lambda _: config(
            "MagCacheConfig", threshold=1e9, num_inference_steps=4, retention_ratio=0.0, mag_ratios=[1.0] * 4
        ),
        tiny_models.flux,
        [3, 0, 0, 0],
    ),
    "taylorseer": (
        lambda _: config("TaylorSeerCacheConfig", cache_interval=2, disable_cache_before_step=1),
        tiny_models.flux,
        [3, 0, 3, 0],
    ),
    "text kv": (lambda _: config("TextKVCacheConfig"), tiny_models.qwen, [2, 2, 2, 2]),
    "sea": (lambda _: config("SeaCacheConfig", threshold=1e9, residual_order=0), tiny_models.wan, [2, 0, 0, 2]),
}


def context(model, name, i):
    """What a pipeline tells a model before its forward at step i of four; only SeaCache needs more than a name."""
    return model.cache_context(
        "cond", **({"step_index": i, "sigma": 0.9, "num_inference_steps": 4} if name == "sea" else {})
    )


@pytest.mark.parametrize("after", [True, False], ids=["cache after apply", "cache before apply"])
@pytest.mark.parametrize("name", CACHES)
def test_cache(name, after):
    """The cache decides which modules run, and those that run are sparse."""
    make, build, expected = CACHES[name]
    # The caches that look at the timestep skip nothing at this one.
    clock = [900]
    cache = make(clock)
    model, inputs = build()
    pattern = PATTERNS[3 if build is tiny_models.wan else 2]
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, pattern, strict=True):
        plain = tiny_models.run(model, inputs)
    if not after:
        model.enable_cache(cache)
    calls = []
    with visattn.apply(model, pattern) as handle, warnings.catch_warnings():
        # A forward that is served from a cache altogether says that no module ran its pattern.
        warnings.filterwarnings("ignore", "no attention module")
        if after:
            model.enable_cache(cache)
        for i in range(4):
            before = handle.report().hits
            with context(model, name, i):
                out = tiny_models.run(model, inputs)
            calls.append(handle.report().hits - before)
            assert torch.isfinite(out).all()
            if i == 0:
                torch.testing.assert_close(out, plain)
            clock[0] = 500
        assert not handle.report().fallbacks and not handle.report().dense
        if after:
            model.disable_cache()
            torch.testing.assert_close(tiny_models.run(model, inputs), plain)
    if not after:
        model.disable_cache()
    assert calls == expected
    assert torch.equal(tiny_models.run(model, inputs), stock)


def test_every_cache_of_diffusers_is_tested():
    known = {type(make([900])).__name__ for make, _, _ in CACHES.values()}
    found = {
        name
        for name in dir(diffusers.hooks)
        if name.endswith("CacheConfig") or ("Broadcast" in name and name.endswith("Config"))
    }
    assert found <= known, f"diffusers has caches that no test runs next to apply(): {sorted(found - known)}"


def skip_first_layer(model, **options):
    name = "transformer_blocks" if hasattr(model, "transformer_blocks") else "blocks"
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=name, **options))


SCORES = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True}


# Only what diffusers itself can skip.
@pytest.mark.parametrize(
    ("build", "options", "fallbacks"),
    [
        (tiny_models.wan, {}, 0),
        (tiny_models.dit, {}, 0),
        (tiny_models.dit, {"skip_ff": False}, 0),
        (tiny_models.dit, SCORES, 1),
        (tiny_models.qwen, SCORES, 1),
    ],
    ids=["blocks of wan", "blocks of dit", "attention of dit", "scores of dit", "scores of qwen"],
)
def test_skipped_layers(build, options, fallbacks):
    """Guidance that skips layers skips those of a patched model in the same way."""
    pattern = PATTERNS[3 if build is tiny_models.wan else 2]
    model, inputs = build()
    skip_first_layer(model, **options)
    # The first layer does not attend, so that a pattern there makes no difference.
    with visattn.apply(model, pattern, layers="1-"):
        expected = tiny_models.run(model, inputs)
    model, inputs = build()
    with visattn.apply(model, pattern) as handle:
        whole = tiny_models.run(model, inputs)
        skip_first_layer(model, **options)
        before = handle.report().hits
        assert torch.equal(tiny_models.run(model, inputs), expected)
        report = handle.report()
    assert not torch.allclose(expected, whole)
    assert report.hits - before == len(report.modules) - 1
    assert list(report.fallbacks.values()) == [fallbacks] * bool(fallbacks)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("after", [True, False], ids=["offload after apply", "offload before apply"])
def test_group_offload(kind, after):
    """On a CPU the weights move from it to it: all hooks run, and modules keep working."""
    model, inputs = tiny_models.flux()
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, PATTERNS[2], strict=True):
        sparse = tiny_models.run(model, inputs)

    def offload():
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **blocks)

    if not after:
        offload()
    with visattn.apply(model, PATTERNS[2], strict=True) as handle:
        if after:
            offload()
        assert torch.equal(tiny_models.run(model, inputs), sparse)
        assert handle.report().hits == 3 and not handle.report().fallbacks
    assert torch.equal(tiny_models.run(model, inputs), stock)


@pytest.mark.parametrize("after", [True, False], ids=["offload after apply", "offload before apply"])
def test_cpu_offload_hooks(after):
    """`enable_model_cpu_offload` wants an accelerator; it wraps the forward of each model like this."""
    accelerate = pytest.importorskip("accelerate")
    pipeline, options = tiny_pipelines.flux()
    model = pipeline.transformer
    stock = tiny_pipelines.generate(pipeline, options, steps=1)
    with visattn.apply(pipeline, PATTERNS[2], strict=True):
        sparse = tiny_pipelines.generate(pipeline, options, steps=1)
    if not after:
        accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    with visattn.apply(pipeline, PATTERNS[2], strict=True):
        if after:
            accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
        assert torch.equal(tiny_pipelines.generate(pipeline, options, steps=1), sparse)
    assert torch.equal(tiny_pipelines.generate(pipeline, options, steps=1), stock)
