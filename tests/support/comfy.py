"""A double of what ComfyUI promises to nodes: wrapped attention, executors of wrappers, model patchers, V3 schemas."""

import copy
import functools
import sys
import types

import torch
from torch import nn
from torch.nn import functional


def wrap_attn(func):
    """Attention that an override among the transformer options may replace, once per call."""

    @functools.wraps(func)
    def wrapped(*args, **kwargs):
        inside = kwargs.pop("_inside_attn_wrapper", False)
        options = kwargs.get("transformer_options") or {}
        if not inside and "optimized_attention_override" in options:
            override = options["optimized_attention_override"]
            return override(wrapped, *args, _inside_attn_wrapper=True, **kwargs)
        return func(*args, **kwargs)

    return wrapped


@wrap_attn
def optimized_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        b = len(q)
        q, k, v = (t.reshape(b, t.shape[1], -1, head_dim).transpose(1, 2) for t in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    out = functional.scaled_dot_product_attention(
        q, k, v, mask, scale=kwargs.get("scale"), enable_gqa=kwargs.get("enable_gqa", False)
    )
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Executor:
    """Calls wrappers from the outside in, then the forward."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class Sampling:
    @staticmethod
    def percent_to_sigma(percent):
        return 1e9 if percent <= 0 else 0.0 if percent >= 1 else 1 - percent


class ModelPatcher:
    """A model with options; clones share the model and copy the options."""

    def __init__(self, model):
        self.model, self.model_options, self.callbacks = model, {"transformer_options": {}}, {}

    def clone(self):
        made = ModelPatcher(self.model)
        made.model_options = copy.deepcopy(self.model_options)
        made.callbacks = {name: dict(found) for name, found in self.callbacks.items()}
        return made

    def get_model_object(self, name):
        return {"diffusion_model": self.model, "model_sampling": Sampling}[name]

    def add_wrapper_with_key(self, kind, key, wrapper):
        options = self.model_options["transformer_options"]
        options.setdefault("wrappers", {}).setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def add_callback_with_key(self, kind, key, callback):
        self.callbacks.setdefault(kind, {})[key] = callback

    def sample(self, x, context, steps=3, **kwargs):
        """Latents after some steps, as a sampler calls the model."""
        sigmas = torch.linspace(1, 0, steps + 1)
        for callback in self.callbacks.get("on_prepare_state", {}).values():
            callback(self, None, self.model_options)
        for sigma in sigmas[:-1]:
            options = {**self.model_options["transformer_options"], "sample_sigmas": sigmas, "sigmas": sigma[None]}
            x = x - 0.3 * self._applied(x, sigma, context, options, kwargs)
        for callback in self.callbacks.get("on_cleanup", {}).values():
            callback(self)
        return x

    def _applied(self, x, sigma, context, options, kwargs):
        """One evaluation: wrappers around what holds the model, and around the model if its class calls any."""

        def wrappers(kind):
            return [each for found in options.get("wrappers", {}).get(kind, {}).values() for each in found]

        def apply(x, sigma, concat, context, control, options):
            inner = wrappers("diffusion_model") if self.model.calls_wrappers else []
            run = Executor(self.model._forward, self.model, inner)
            return run(x, sigma, context, transformer_options=options, **kwargs)

        holder = types.SimpleNamespace(diffusion_model=self.model)
        return Executor(apply, holder, wrappers("apply_model"))(x, sigma, None, context, None, options)


class Block(nn.Module):
    def __init__(self, width, heads, crossed=False):
        super().__init__()
        self.heads, self.crossed = heads, crossed
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, context, options, mask=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(optimized_attention(q, k, v, self.heads, mask=mask, transformer_options=options))
        if self.crossed:
            _, k, v = self.qkv(context).chunk(3, -1)
            x = x + optimized_attention(q, k, v, heads=self.heads, transformer_options=options)
        return x


class WanModel(nn.Module):
    """Video tokens alone, with cross-attention to the text."""

    calls_wrappers = True
    patch_size = (1, 2, 2)

    def __init__(self, width=32, heads=2, layers=2):
        super().__init__()
        self.embed, self.head = nn.Linear(16, width), nn.Linear(width, 16)
        self.blocks = nn.ModuleList([Block(width, heads, True) for _ in range(layers)])

    def _forward(self, x, timestep, context, transformer_options=None, **kwargs):
        b, c, t, h, w = x.shape
        tokens = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, c * 4)
        tokens = self.embed(tokens)
        for block in self.blocks:
            tokens = block(tokens, context, transformer_options)
        out = self.head(tokens).reshape(b, t, h // 2, w // 2, c, 2, 2)
        return out.permute(0, 4, 1, 2, 5, 3, 6).reshape(x.shape)


class HunyuanVideo(nn.Module):
    """Text that refines itself, then a frame to start from, video tokens and the text; or an image."""

    calls_wrappers = True

    def __init__(self, width=32, heads=2, layers=2, patch_size=(1, 2, 2)):
        super().__init__()
        self.patch_size = patch_size
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.refiner = Block(width, heads)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])

    def _forward(self, x, timestep, context, ref_latent=None, transformer_options=None, **kwargs):
        def tokens_of(latents):
            kept = tuple(slice(None, None, step) for step in self.patch_size)
            return self.embed(latents[:, :, *kept].flatten(2).transpose(1, 2))

        text = self.refiner(context, None, transformer_options)
        before = [] if ref_latent is None else [tokens_of(ref_latent)]
        first = before[0].shape[1] if before else 0
        tokens = tokens_of(x)
        joint = torch.cat([*before, tokens, text], 1)
        for block in self.blocks:
            joint = block(joint, None, transformer_options)
        out = self.head(joint[:, first : first + tokens.shape[1]]).transpose(1, 2)
        return x + out.mean(2).reshape(*out.shape[:2], *[1] * len(self.patch_size)) + out.std()


class Flux(nn.Module):
    """Text, then image tokens, then references, in [B, heads, S, D]."""

    calls_wrappers = True
    patch_size = 2

    def __init__(self, width=32, heads=2, layers=2):
        super().__init__()
        self.heads = heads
        self.embed, self.head = nn.Linear(16, width), nn.Linear(width, 16)
        self.qkvs = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(layers)])

    def _forward(self, x, timestep, context, transformer_options=None, ref_latents=None, attn_mask=None, **kwargs):
        b, c, h, w = x.shape

        def tokens_of(image):
            rows, columns = image.shape[2] // 2, image.shape[3] // 2
            found = image.reshape(b, c, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
            return self.embed(found.reshape(b, rows * columns, c * 4))

        tokens = torch.cat([context, tokens_of(x), *map(tokens_of, ref_latents or [])], 1)
        for qkv in self.qkvs:
            tokens = tokens + self._attend(qkv(tokens).chunk(3, -1), attn_mask, transformer_options)
        start = context.shape[1]
        out = self.head(tokens[:, start : start + h * w // 4]).reshape(b, h // 2, w // 2, c, 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    def _attend(self, qkv, mask, options):
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in qkv)
        given = {"skip_reshape": True, "mask": mask, "transformer_options": options}
        return optimized_attention(q, k, v, heads=self.heads, **given)


class MMDiT(Flux):
    """Text, then image tokens; the heads of v alone are split, and no wrapper is called around its forward."""

    calls_wrappers = False

    def _attend(self, qkv, mask, options):
        q, k, v = qkv
        return optimized_attention(
            q, k, v.unflatten(2, (self.heads, -1)), heads=self.heads, transformer_options=options
        )


class UNetModel(nn.Module):
    """Two levels, the second of half the sides rounded up."""

    calls_wrappers = True

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.outer, self.inner = Block(width, heads, True), Block(width, heads, True)

    def _forward(self, x, timestep, context, transformer_options=None, **kwargs):
        h, w = x.shape[2:]
        tokens = self.outer(self.embed(x.flatten(2).transpose(1, 2)), context, transformer_options)
        small = functional.avg_pool2d(tokens.transpose(1, 2).unflatten(2, (h, w)), 2, ceil_mode=True)
        inner = self.inner(small.flatten(2).transpose(1, 2), context, transformer_options)
        grown = functional.interpolate(inner.transpose(1, 2).unflatten(2, small.shape[2:]), (h, w))
        return self.head(tokens + grown.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (h, w))


def install_api(monkeypatch):
    """Put a double of `comfy_api.latest` where nodes import it from."""

    class Field:
        def __init__(self, *args, **options):
            self.name, self.options = (args or [""])[0], options

    def kind():
        return types.SimpleNamespace(Input=type("Input", (Field,), {}), Output=type("Output", (Field,), {}))

    class Schema:
        def __init__(self, **options):
            self.__dict__.update(options)

    class NodeOutput:
        def __init__(self, *args, ui=None):
            self.args, self.ui = args, ui

    io = types.SimpleNamespace(ComfyNode=object, Schema=Schema, NodeOutput=NodeOutput)
    for name in ("Model", "String", "Float", "Int", "Combo", "Boolean", "Latent", "Image"):
        setattr(io, name, kind())
    latest = types.ModuleType("comfy_api.latest")
    latest.io, latest.ComfyExtension = io, object
    latest.ui = types.SimpleNamespace(PreviewText=lambda text: ("text", text))
    package = types.ModuleType("comfy_api")
    package.latest = latest
    monkeypatch.setitem(sys.modules, "comfy_api", package)
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    monkeypatch.delitem(sys.modules, "visattn.clients.comfy.nodes", raising=False)
