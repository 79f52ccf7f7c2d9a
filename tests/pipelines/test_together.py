"""apply() lives together with what users combine it with."""

import copy
import pickle
import warnings

import diffusers
import pytest
import torch

import visattn
from tests.support import tiny_models
from visattn.pipelines.patch import calling, clones, dispatch, members

PATTERN = "na(window=3x3)"


def sparse_run(model, inputs, pattern=PATTERN):
    with visattn.apply(model, pattern, strict=True):
        return tiny_models.run(model, inputs)


def lora(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


@pytest.mark.parametrize("build", [tiny_models.flux, tiny_models.sd15])
def test_lora_before_and_after(build):
    torch.manual_seed(0)
    model, inputs = build()
    plain = sparse_run(model, inputs)
    with visattn.apply(model, PATTERN, strict=True):
        lora(model)
        after = tiny_models.run(model, inputs)
    assert not torch.allclose(after, plain)
    assert torch.equal(sparse_run(model, inputs), after)


@pytest.mark.parametrize(("build", "pattern"), [(tiny_models.flux, PATTERN), (tiny_models.sd15, PATTERN)])
def test_fused_projections(build, pattern):
    model, inputs = build()
    expected = sparse_run(model, inputs, pattern)
    with visattn.apply(model, pattern, strict=True) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fuse_qkv_projections()
        torch.testing.assert_close(tiny_models.run(model, inputs), expected)
        assert not handle.report().fallbacks


def test_layerwise_casting():
    model, inputs = tiny_models.flux()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, "dense"):
        assert torch.equal(tiny_models.run(model, inputs), stock)
    assert not torch.allclose(sparse_run(model, inputs), stock)


def test_autocast():
    model, inputs = tiny_models.flux()
    with torch.autocast("cpu", torch.bfloat16):
        stock = tiny_models.run(model, inputs)
        with visattn.apply(model, "dense"):
            assert torch.equal(tiny_models.run(model, inputs), stock)
        with visattn.apply(model, PATTERN, strict=True) as handle:
            sparse = tiny_models.run(model, inputs)
            dtypes = {call.problem.dtype for site in handle.report().sites for call in site.calls}
    assert sparse.dtype == stock.dtype and dtypes == {torch.bfloat16}


def test_save_and_load(tmp_path):
    model, inputs = tiny_models.sd15()
    stock, keys = tiny_models.run(model, inputs), list(model.state_dict())
    with visattn.apply(model, PATTERN):
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(tiny_models.run(loaded, inputs), stock)
    assert not any(clones.is_patched(p) for p in loaded.attn_processors.values())


@pytest.mark.parametrize("build", [tiny_models.flux, tiny_models.sd15, tiny_models.mochi])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_stock_models(build, how):
    model, inputs = build()
    stock = tiny_models.run(model, inputs)
    pattern = "na(window=3)"
    with visattn.apply(model, pattern, strict=True, dense_steps=1) as handle:
        handle.set_step(1)
        sparse = tiny_models.run(model, inputs)
        hits = handle.report().hits
        twin = how(model)
        assert torch.equal(tiny_models.run(twin, inputs), stock)
        assert handle.report().hits == hits
        with visattn.apply(twin, pattern, strict=True):
            assert torch.equal(tiny_models.run(twin, inputs), sparse)
        assert torch.equal(tiny_models.run(model, inputs), sparse)
    assert torch.equal(tiny_models.run(twin, inputs), stock)


def test_backend_set_later_computes_the_dense_calls():
    model, inputs = tiny_models.flux()
    model.set_attention_backend("native")
    sparse = sparse_run(model, inputs)
    with visattn.apply(model, PATTERN, strict=True, dense_steps=1) as handle:
        handle.set_step(1)
        model.set_attention_backend("_native_math")
        with pytest.warns(UserWarning, match="backend of 3 patched modules was set after apply"):
            assert torch.equal(tiny_models.run(model, inputs), sparse)
        processor = model.transformer_blocks[0].attn.processor
        assert clones.is_patched(processor)
        assert calling.stock_of(clones.original_of(processor))
    assert processor._attention_backend.value == "_native_math"
    diffusers.models.attention_dispatch._AttentionBackendRegistry.set_active_backend(
        diffusers.models.attention_dispatch.AttentionBackendName.NATIVE
    )


def test_backend_set_later_on_a_shared_processor():
    """Each module has a copy of it, which holds a backend like any other."""
    model, inputs = tiny_models.flux()
    model.set_attn_processor(type(model.transformer_blocks[0].attn.processor)())
    sparse = sparse_run(model, inputs)
    with visattn.apply(model, PATTERN, strict=True):
        model.set_attention_backend("native")
        with pytest.warns(UserWarning, match="backend of 3 patched modules was set after apply"):
            assert torch.equal(tiny_models.run(model, inputs), sparse)


def test_processors_set_later():
    from diffusers.models.attention_processor import AttnProcessor2_0

    model, inputs = tiny_models.sd15()
    sparse = sparse_run(model, inputs)
    with visattn.apply(model, PATTERN, strict=True):
        with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`"):
            model.set_default_attn_processor()
        theirs = AttnProcessor2_0()
        model.set_attn_processor(theirs)
        with pytest.warns(UserWarning, match="installed again"):
            assert torch.equal(tiny_models.run(model, inputs), sparse)
    assert all(p is theirs for p in model.attn_processors.values())


@pytest.mark.parametrize("build", [tiny_models.flux, tiny_models.sd15])
def test_a_patched_model_is_refused_whatever_was_set_since(build):
    """A second patch would stand on the first one, and either handle would undo only its own."""
    model, inputs = build()
    stock = tiny_models.run(model, inputs)
    theirs = dict(build()[0].attn_processors)
    with visattn.apply(model, PATTERN) as handle:
        model.set_attn_processor(dict(theirs))
        with pytest.raises(ValueError, match="is patched already: call remove"):
            visattn.apply(model, "na(window=1x1)")
        with pytest.warns(UserWarning, match="installed again"):
            sparse = tiny_models.run(model, inputs)
        assert handle.report().sites_hit == len(handle.report().sites)
    assert all(p is theirs[n] for n, p in model.attn_processors.items())
    assert torch.equal(tiny_models.run(model, inputs), stock)
    assert torch.equal(sparse_run(model, inputs), sparse)


def test_a_model_has_one_patch_whatever_its_layers():
    """The hooks of two would meet: the pipeline failed when one of them was removed."""
    model, inputs = tiny_models.flux()
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, PATTERN, layers=0, dense_steps=1) as handle:
        with pytest.raises(ValueError, match="takes patterns by layer in one call"):
            visattn.apply(model, "na(window=1x1)", layers=[1, 2], dense_steps=1)
        handle.set_step(1)
        with model.cache_context("cond"):
            tiny_models.run(model, inputs)
        assert handle.report().hits == 1
    with model.cache_context("cond"):
        assert torch.equal(tiny_models.run(model, inputs), stock)


def test_shared_processor_is_not_touched():
    """One processor object may serve self-attention and cross-attention."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    model, inputs = tiny_models.wan()
    expected = sparse_run(model, inputs, "na(window=3x3x3)")
    one = WanAttnProcessor()
    for block in model.blocks:
        block.attn1.processor = block.attn2.processor = one
    with visattn.apply(model, "na(window=3x3x3)", strict=True) as handle:
        assert torch.equal(tiny_models.run(model, inputs), expected)
        assert one._attention_backend is None and not handle.report().fallbacks
    assert all(b.attn1.processor is one and b.attn2.processor is one for b in model.blocks)


def test_gradient_checkpointing_recomputes_the_same():
    model, inputs = tiny_models.flux()
    weight = model.single_transformer_blocks[1].attn.to_q.weight

    def gradient():
        return torch.autograd.grad(model(**inputs).sample.square().sum(), [weight])[0]

    with visattn.apply(model, PATTERN, strict=True):
        expected = gradient()
        model.enable_gradient_checkpointing()
        model.train()
        torch.testing.assert_close(gradient(), expected)


def test_dropped_handle_leaves_the_patch_and_dropped_model_leaves_nothing():
    import gc

    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    from visattn.pipelines.patch import numbering

    gc.collect()
    size, living = len(registry._backends), len(numbering.living())
    model, inputs = tiny_models.flux()
    sparse = sparse_run(model, inputs)
    visattn.apply(model, PATTERN, strict=True)
    gc.collect()
    assert torch.equal(tiny_models.run(model, inputs), sparse)
    del model
    gc.collect()
    assert len(numbering.living()) == living
    sparse_run(*tiny_models.flux())
    assert len(registry._backends) == size


def test_ip_adapter():
    model, inputs = tiny_models.sd15()
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    torch.manual_seed(0)
    processors = {
        name: AttnProcessor2_0()
        if name.endswith("attn1.processor")
        else IPAdapterAttnProcessor2_0(
            model.get_submodule(name.removesuffix(".processor")).to_q.in_features, 8, num_tokens=(4,)
        )
        for name in model.attn_processors
    }
    model.set_attn_processor(processors)
    texts = (inputs["encoder_hidden_states"], [tiny_models.noise(2, 1, 4, 8, seed=5)])
    stock = tiny_models.run(model, inputs, encoder_hidden_states=texts)
    keys = list(model.state_dict())
    with visattn.apply(model, "dense"):
        assert torch.equal(tiny_models.run(model, inputs, encoder_hidden_states=texts), stock)
    with visattn.apply(model, PATTERN, strict=True) as handle:
        assert list(model.state_dict()) == keys
        assert not torch.allclose(tiny_models.run(model, inputs, encoder_hidden_states=texts), stock)
        assert not handle.report().fallbacks
    assert list(model.state_dict()) == keys


class TestCanaries:
    """These fail when a new diffusers moves what visattn stands on."""

    def test_registry(self):
        from diffusers.models.attention_dispatch import AttentionBackendName
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

        for name in ("_backends", "_constraints", "_supported_arg_names"):
            assert isinstance(getattr(registry, name), dict), f"diffusers moved _AttentionBackendRegistry.{name}"
        assert isinstance(registry._supports_context_parallel, set), "diffusers moved what supports context parallelism"
        member = members.member(0)
        assert isinstance(member, AttentionBackendName), "diffusers' backends are no longer members of one enum"
        assert member.value not in AttentionBackendName.__members__
        assert member not in list(AttentionBackendName)

    def test_dispatch_arguments(self):
        import inspect

        from diffusers.models.attention_dispatch import dispatch_attention_fn

        names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
        assert list(inspect.signature(dispatch_attention_fn).parameters)[:8] == names
        ours = inspect.signature(dispatch.dispatched(0)).parameters
        assert set(names) | {"_parallel_config"} == set(ours), "diffusers passes other arguments to backends"

    @pytest.mark.parametrize("name", tiny_models.FAMILIES)
    def test_processors_are_of_a_known_generation(self, name):
        build, sites, _ = tiny_models.FAMILIES[name]
        model, _ = build()
        family = visattn.pipelines.families.find_family(model)
        found = family.find_sites(model)
        assert len(found) == sites, f"{family.name} has moved its attention modules"
        assert family.bare or all(hasattr(module, "processor") for _, module in found)
        for module in (module for _, module in found if not family.bare):
            assert calling.calling_of(module.processor) is not calling.Calling.UNKNOWN

    def test_hook_registry(self):
        from diffusers.hooks.hooks import HookRegistry

        registry = HookRegistry(torch.nn.Linear(1, 1))
        assert registry.hooks == {} and registry._hook_order == [] and registry._fn_refs == []
