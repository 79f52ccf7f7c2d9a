"""The hook and the class against fakes of the registry, torch's attention, the forward's context and the arguments."""

import importlib
import sys
import types

import pytest
import torch
from torch.nn import functional

import visattn
from visattn import Layout
from visattn.clients.sglang import plugin

ROOM = "sglang.multimodal_gen.runtime"
GRID, PATTERN = (3, 6, 8), "na(window=3)"


class SDPAImpl:
    def __init__(self, num_heads, head_size, causal, softmax_scale, num_kv_heads=None, prefix="", **others):
        self.causal, self.softmax_scale, self.dropout = causal, softmax_scale, others.get("dropout_p", 0.0)

    def forward(self, query, key, value, attn_metadata):
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        given = {"is_causal": self.causal, "scale": self.softmax_scale, "enable_gqa": True}
        return functional.scaled_dot_product_attention(q, k, v, **given).transpose(1, 2)


@pytest.fixture
def server(monkeypatch):
    """Fakes; the context is of step 0 of 4 with latents of the grid."""
    batch = types.SimpleNamespace(raw_latent_shape=(2, 4, 3, 12, 16), num_inference_steps=4)
    found = types.SimpleNamespace(hooks={}, component="transformer")
    found.context = types.SimpleNamespace(current_timestep=0, forward_batch=batch)
    dit = types.SimpleNamespace(patch_size=(1, 2, 2))
    config = types.SimpleNamespace(pipeline_config=types.SimpleNamespace(dit_config=dit))
    rooms = {
        "platforms.plugins": {
            "HookType": types.SimpleNamespace(AROUND="around"),
            "plugin_hook": lambda target, kind: lambda hook: found.hooks.update({target: (kind, hook)}),
        },
        "layers.attention.backends.sdpa": {"SDPABackend": type("SDPABackend", (), {}), "SDPAImpl": SDPAImpl},
        "layers.attention.selector": {"get_component_attn_backend_name": lambda: found.component},
        "managers.forward_context": {"get_forward_context_or_none": lambda: found.context},
        "server_args": {"get_global_server_args": lambda: config},
    }
    for path, names in rooms.items():
        parts = f"{ROOM}.{path}".split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        vars(sys.modules[f"{ROOM}.{path}"]).update(names)
    monkeypatch.delitem(sys.modules, "visattn.clients.sglang.backend", raising=False)
    monkeypatch.setenv("VISATTN_PATTERN", PATTERN)
    monkeypatch.setenv("VISATTN_BACKEND", "tiles")
    torch.manual_seed(0)
    return found


def _impl(**options):
    backend = importlib.import_module("visattn.clients.sglang.backend")
    return backend.VisattnBackend.get_impl_cls()(2, 16, False, 0.25, prefix=".impl", **options)


def _tensors(length=144):
    return [torch.randn(2, length, 2, 16) for _ in range(3)]


def test_the_hook_takes_the_place_of_torch_attention_alone(server, monkeypatch):
    plugin.register()
    assert set(server.hooks) == set(plugin.TARGETS)
    kind, hook = server.hooks[plugin.TARGETS[0]]
    asked = [types.SimpleNamespace(name=name) for name in ("TORCH_SDPA", "SLIDING_TILE_ATTN")]
    answers = [hook(lambda *args, **kwargs: "theirs", "platform", each, 64, None) for each in (None, *asked)]
    assert kind == "around" and answers == [plugin.BACKEND, plugin.BACKEND, "theirs"]
    assert hook(lambda **kwargs: "theirs", selected_backend=asked[1]) == "theirs"
    assert f"{_impl().__class__.__module__}.VisattnBackend" == plugin.BACKEND
    monkeypatch.setenv("VISATTN_PATTERN", "na(window=3x3)")
    with pytest.raises(ValueError, match="2 axes but the tokens of SGLang"):
        hook(None, "platform", None, 64, None)
    server.hooks.clear()
    monkeypatch.delenv("VISATTN_PATTERN")
    plugin.register()
    assert not server.hooks


def test_layers_equal_masked_dense_and_follow_the_steps(server, monkeypatch):
    monkeypatch.setenv("VISATTN_DENSE_STEPS", "1")
    layers, tensors = [_impl(), _impl()], _tensors()
    mask = visattn.dense_mask(visattn.parse(PATTERN), Layout(GRID))
    wanted = [functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors), m) for m in (None, mask)]
    for step in range(2):
        server.context.current_timestep = step
        for layer in layers:
            assert (layer.forward(*tensors, None) - wanted[step].transpose(1, 2)).abs().max() <= 1e-5
    report = layers[0].layer.run.report()
    assert [(site.site, site.hits, site.dense) for site in report.sites] == [
        ("attention.0", 1, 1),
        ("attention.1", 1, 1),
    ]


def test_what_stays_dense(server):
    layer, long = _impl(), _tensors(150)
    with pytest.warns(UserWarning, match="150 tokens is not grid 3x6x8"):
        layer.forward(*long, None)
    cross = _impl(is_cross_attention=True)
    assert cross.layer is None and cross.forward(long[0], *_tensors(7)[1:], None).shape == long[0].shape
    server.context.forward_batch.raw_latent_shape = (2, 144, 64)
    with pytest.warns(UserWarning, match=r"no latents \[B, C, T, H, W\]"):
        layer.forward(*_tensors(), None)
    server.component = "text_encoder"
    assert _impl().layer is None
