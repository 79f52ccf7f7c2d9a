"""Undo is exact whoever sets processors between apply() and remove(), and what outlives a patch is stock for ever."""

import copy
import gc
import warnings

import diffusers
import hypothesis.strategies as st
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import visattn
from tests.support import tiny_edits, tiny_models, tiny_pipelines
from visattn.pipelines.patch import numbering

PATTERN = "na(window=3x3)"


def traces(model):
    """What of a patch is left in a model."""
    found = []
    for name, processor in model.attn_processors.items():
        backend = getattr(getattr(processor, "_attention_backend", None), "value", "")
        found += [name] * (
            hasattr(type(processor), "_visattn_group")
            or any(key.startswith("_visattn") for key in vars(processor))
            or str(backend).startswith("visattn")
        )
    return found


class Processors(RuleBasedStateMachine):
    """A client sets, saves and puts back processors at any time; `logical` is what a stock model would hold."""

    build = staticmethod(tiny_models.sd15)
    kinds = (AttnProcessor2_0, AttnProcessor)

    @initialize()
    def begin(self):
        warnings.simplefilter("ignore")
        self.model, self.inputs = self.build()
        self.stock = tiny_models.run(self.model, self.inputs)
        self.logical = dict(self.model.attn_processors)
        self.saved, self.handle, self.epoch = None, None, 0
        self.apply()

    def names(self, data):
        return data.draw(st.lists(st.sampled_from(list(self.logical)), min_size=1, unique=True))

    def put(self, new):
        self.model.set_attn_processor({**self.model.attn_processors, **new})

    @precondition(lambda self: self.handle is None)
    @rule()
    def apply(self):
        try:
            self.handle = visattn.apply(self.model, PATTERN)
        except ValueError as error:
            # Nothing is left to be made sparse.
            assert "computes attention itself" in str(error)
            assert self.is_stock()

    @rule(data=st.data(), kind=st.integers(0, 1), shared=st.booleans())
    def set_new(self, data, kind, shared):
        one = self.kinds[kind]()
        new = {name: one if shared else self.kinds[kind]() for name in self.names(data)}
        self.put(new)
        self.logical |= new

    @rule()
    def save(self):
        self.saved = dict(self.model.attn_processors), dict(self.logical), self.epoch

    @precondition(lambda self: self.saved is not None)
    @rule(data=st.data())
    def put_back(self, data):
        found, logical, epoch = self.saved
        names = self.names(data)
        self.put({name: found[name] for name in names})
        for name in names:
            # What was saved in a patch that is over is stock, but it is not the object that it stood for.
            over = epoch != self.epoch and found[name] is not logical[name]
            self.logical[name] = found[name] if over else logical[name]

    @rule(data=st.data(), looked=st.booleans())
    def for_one_call(self, data, looked):
        """As guidance does."""
        found, names = dict(self.model.attn_processors), self.names(data)
        self.put({name: self.kinds[0]() for name in names})
        tiny_models.run(self.model, self.inputs)
        self.put({name: found[name] for name in names})
        if looked:
            tiny_models.run(self.model, self.inputs)

    @rule()
    def run(self):
        got = tiny_models.run(self.model, self.inputs)
        if self.handle is None:
            torch.testing.assert_close(got, self.stock)

    @precondition(lambda self: self.handle is not None)
    @rule()
    def remove(self):
        self.handle.remove()
        self.handle, self.epoch = None, self.epoch + 1
        assert self.is_stock()
        got = tiny_models.run(self.model, self.inputs)
        twin, _ = self.build()
        twin.set_attn_processor({name: type(each)() for name, each in self.logical.items()})
        assert torch.equal(got, tiny_models.run(twin, self.inputs))

    def is_stock(self):
        assert not traces(self.model)
        found = self.model.attn_processors
        assert [n for n in found if found[n] is not self.logical[n]] == []
        return True

    def teardown(self):
        if getattr(self, "handle", None) is not None:
            self.remove()


class DispatchingProcessors(Processors):
    build = staticmethod(tiny_models.flux)
    kinds = (FluxAttnProcessor, FluxAttnProcessor)

    @rule(data=st.data(), name=st.sampled_from([None, "native"]))
    def set_backend(self, data, name):
        for path in self.names(data):
            processor = self.model.attn_processors[path]
            processor._attention_backend = None if name is None else AttentionBackendName(name)


quick = settings(max_examples=6, stateful_step_count=6, deadline=None, phases=[Phase.generate])
Processors.TestCase.settings = quick
DispatchingProcessors.TestCase.settings = quick
TestProcessors = Processors.TestCase
TestDispatchingProcessors = DispatchingProcessors.TestCase


@pytest.mark.filterwarnings("ignore")
class TestPipelinesThatSetProcessors:
    def pag(self, pipe, layers):
        return diffusers.StableDiffusionPAGPipeline(
            **pipe.components, requires_safety_checker=False, pag_applied_layers=layers
        )

    @pytest.mark.parametrize("layers", [["down"], ["mid", "up"]])
    def test_guidance_puts_back_what_it_found(self, layers):
        pipe, options = tiny_pipelines.stable_diffusion()
        pag = self.pag(pipe, layers)
        options = {**options, "pag_scale": 3.0}
        before = dict(pag.unet.attn_processors)
        stock = tiny_pipelines.generate(pag, options)
        for _ in range(2):
            with visattn.apply(pag, PATTERN) as handle:
                assert not torch.equal(tiny_pipelines.generate(pag, options), stock)
                assert handle.report().hits
            assert not traces(pag.unet)
            assert all(p is before[n] for n, p in pag.unet.attn_processors.items())
            assert torch.equal(tiny_pipelines.generate(pag, options), stock)

    def test_adapter_loaded_and_unloaded(self):
        pipe, options = tiny_pipelines.stable_diffusion()
        unet = pipe.unet
        names = [n for n in unet.attn_processors if "attn2" in n]
        width = [unet.get_submodule(n.removesuffix(".processor")).to_q.in_features for n in names]
        noise = torch.randn
        weights = {f"{2 * i + 1}.to_{x}_ip.weight": noise(w, 8) for i, w in enumerate(width) for x in "kv"}
        proj = {"proj.weight": noise(32, 16), "proj.bias": noise(32), "norm.weight": noise(8), "norm.bias": noise(8)}
        with_image = {**options, "ip_adapter_image_embeds": [noise(2, 1, 16)]}
        stock = tiny_pipelines.generate(pipe, options, steps=1)
        with visattn.apply(pipe, PATTERN) as handle:
            pipe.load_ip_adapter({"image_proj": proj, "ip_adapter": weights}, None, None, None)
            tiny_pipelines.generate(pipe, with_image, steps=1)
            assert handle.report().hits == 4
        assert not traces(unet)
        loaded = tiny_pipelines.generate(pipe, with_image, steps=1)
        with visattn.apply(pipe, PATTERN):
            tiny_pipelines.generate(pipe, with_image, steps=1)
        assert torch.equal(tiny_pipelines.generate(pipe, with_image, steps=1), loaded)
        with visattn.apply(pipe, PATTERN):
            pipe.unload_ip_adapter()
            tiny_pipelines.generate(pipe, options, steps=1)
        assert not traces(unet)
        assert torch.equal(tiny_pipelines.generate(pipe, options, steps=1), stock)

    @pytest.mark.parametrize("unfused", ["while patched", "after remove"])
    def test_fused_and_unfused(self, unfused):
        model, inputs = tiny_models.sd15()
        before, stock = dict(model.attn_processors), tiny_models.run(model, inputs)
        handle = visattn.apply(model, PATTERN)
        model.fuse_qkv_projections()
        tiny_models.run(model, inputs)
        if unfused == "after remove":
            handle.remove()
        model.unfuse_qkv_projections()
        tiny_models.run(model, inputs)
        handle.remove()
        assert all(p is before[n] for n, p in model.attn_processors.items()) and not traces(model)
        assert torch.equal(tiny_models.run(model, inputs), stock)


@pytest.mark.parametrize("build", [tiny_models.sd15, tiny_models.flux])
@pytest.mark.parametrize("end", ["remove", "drop"])
def test_what_outlives_a_patch_meets_nobody_else(build, end):
    """Kept processors, and shallow copies of them, stay stock whoever is patched next."""
    model, inputs = build()
    stock = tiny_models.run(model, inputs)
    patched, _ = build()
    handle = visattn.apply(patched, PATTERN)
    kept = dict(patched.attn_processors)
    copies = {name: copy.copy(processor) for name, processor in kept.items()}
    if end == "remove":
        handle.remove()
    del patched, handle
    gc.collect()
    other, _ = build()
    with visattn.apply(other, PATTERN) as others:
        tiny_models.run(other, inputs)
        hits = others.report().hits
        for processors in (kept, copies):
            model.set_attn_processor(dict(processors))
            assert torch.equal(tiny_models.run(model, inputs), stock)
        assert others.report().hits == hits and not others.report().fallbacks
    with visattn.apply(model, PATTERN, strict=True) as again:
        assert not torch.equal(tiny_models.run(model, inputs), stock)
        assert again.report().hits == hits
    assert torch.equal(tiny_models.run(model, inputs), stock) and not traces(model)


@pytest.mark.parametrize("build", [tiny_models.sd15, tiny_models.flux])
def test_a_processor_that_also_serves_another_model_is_counted_nowhere(build):
    model, inputs = build()
    other, _ = build()
    stock = tiny_models.run(other, inputs)
    with visattn.apply(model, PATTERN) as handle:
        tiny_models.run(model, inputs)
        before = handle.report()
        other.set_attn_processor(dict(model.attn_processors))
        assert torch.equal(tiny_models.run(other, inputs), stock)
        after = handle.report()
        assert (after.hits, after.fallbacks, after.dense) == (before.hits, before.fallbacks, before.dense)
        assert [each.site for each in after.modules] == [each.site for each in before.modules]
        # An own module that is called alone is still counted.
        name = next(iter(model.attn_processors)).removesuffix(".processor")
        seen = {}
        with model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
        ):
            tiny_models.run(model, inputs)
        model.get_submodule(name)(*seen["args"], **seen["kwargs"])
        assert handle.report().fallbacks == {"called outside of the model's forward": 1}
    assert torch.equal(tiny_models.run(other, inputs), stock)


def test_numbers_are_free_again():
    numbers = set()
    for _ in range(3):
        model, _ = tiny_models.flux()
        with visattn.apply(model, PATTERN):
            numbers |= {lease.number for lease in numbering.leases()}
    assert len(numbers) == len(numbering.leases()) + 2


class Own:
    """A client's processor; subclasses say how it calls SDPA."""

    def sdpa(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = hidden_states
        y = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(x), attn.to_k(y), attn.to_v(y))
        )
        return attn.to_out[0](self.sdpa(q, k, v).transpose(1, 2).flatten(2))


class FromImport(Own):
    def sdpa(self, q, k, v):
        from torch.nn.functional import scaled_dot_product_attention as attend

        return attend(q, k, v)


def decorated(function):
    def inside(*args, **kwargs):
        return function(*args, **kwargs)

    return inside


class Decorated(AttnProcessor2_0):
    __call__ = decorated(AttnProcessor2_0.__call__)


class Inherited(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Module(torch.nn.Module):
    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class WrittenOut(Own):
    def sdpa(self, q, k, v):
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def function(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
    return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class DispatchedInherited(FluxAttnProcessor):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestClientProcessors:
    @pytest.mark.parametrize("make", [Own, FromImport, Decorated, Inherited, Module, lambda: function])
    @pytest.mark.parametrize("when", ["before apply", "after apply"])
    def test_sdpa_under_any_name_is_found(self, make, when):
        model, inputs = tiny_models.sd15()
        with visattn.apply(model, PATTERN):
            expected = tiny_models.run(model, inputs)
        theirs = {name: make() for name in model.attn_processors}
        if when == "before apply":
            model.set_attn_processor(dict(theirs))
        with visattn.apply(model, PATTERN, strict=True) as handle:
            if when == "after apply":
                model.set_attn_processor(dict(theirs))
            torch.testing.assert_close(tiny_models.run(model, inputs), expected, rtol=1e-4, atol=1e-5)
            assert handle.report().hits == 4 and not handle.report().fallbacks
        assert all(p is theirs[n] for n, p in model.attn_processors.items())

    def test_a_subclass_of_a_dispatching_processor(self):
        model, inputs = tiny_models.flux()
        with visattn.apply(model, PATTERN):
            expected = tiny_models.run(model, inputs)
        model.set_attn_processor({name: DispatchedInherited() for name in model.attn_processors})
        with visattn.apply(model, PATTERN, strict=True):
            torch.testing.assert_close(tiny_models.run(model, inputs), expected)

    @pytest.mark.parametrize("make", [AttnProcessor, WrittenOut])
    def test_their_own_softmax_runs_and_is_counted(self, make):
        model, inputs = tiny_models.sd15()
        with visattn.apply(model, PATTERN) as handle:
            model.set_attn_processor({**model.attn_processors, next(iter(model.attn_processors)): make()})
            tiny_models.run(model, inputs)
            report = handle.report()
            assert report.hits == 3
            why = f"{make.__name__} computes attention itself instead of calling torch's scaled_dot_product_attention"
            assert report.fallbacks == {why: 1}
            model.set_attn_processor(make())
            twin, _ = tiny_models.sd15()
            twin.set_attn_processor(make())
            assert torch.equal(tiny_models.run(model, inputs), tiny_models.run(twin, inputs))
            assert handle.report().hits == 3

    def test_attention_slicing(self):
        pipe, options = tiny_pipelines.stable_diffusion()
        with visattn.apply(pipe, PATTERN) as handle:
            pipe.enable_attention_slicing()
            tiny_pipelines.generate(pipe, options, steps=1)
            assert sum(handle.report().fallbacks.values()) == 4
        assert {type(p).__name__ for p in pipe.unet.attn_processors.values()} == {"SlicedAttnProcessor"}

    def test_strict_names_them(self):
        model, inputs = tiny_models.sd15()
        model.set_attn_processor({**model.attn_processors, next(iter(model.attn_processors)): AttnProcessor()})
        with (
            visattn.apply(model, PATTERN, strict=True),
            pytest.raises(ValueError, match=r"1 of 4 .* \(AttnProcessor computes attention itself"),
        ):
            tiny_models.run(model, inputs)


def test_a_backend_set_on_a_clone_stays_after_the_patch():
    """Qwen-Image 2.1 also attends without the backend that it holds, so that clones stand for its processors."""
    model, inputs = tiny_edits.qwen21()
    before = [block.attn.processor for block in model.transformer_blocks]
    stock = tiny_models.run(model, inputs)
    with visattn.apply(model, "na(window=3x3)", strict=True) as handle:
        model.set_attention_backend("native")
        tiny_models.run(model, inputs)
        assert handle.report().sites_hit == 2
    assert [block.attn.processor for block in model.transformer_blocks] == before
    assert [p._attention_backend for p in before] == [AttentionBackendName.NATIVE] * 2
    assert torch.equal(tiny_models.run(model, inputs), stock)
