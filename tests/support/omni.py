"""What tests of the adapter for vLLM-Omni use of it, and a double of that contract."""

import contextlib
import enum
import sys
import types
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn import functional


@dataclass
class VideoTokenSpan:
    start: int
    latent_grid: tuple
    role: str


@dataclass
class VideoTokenLayout:
    prefix_len: int | None = None
    latent_grid: tuple | None = None
    used_len: int | None = None
    video_spans: tuple = ()


@dataclass
class AttentionMetadata:
    attn_mask: Any = None
    extra: dict = field(default_factory=dict)
    full_attn_spans: Any = None
    video_layout: Any = None


class SDPAImpl:
    """Torch's attention, dispatched by platform as in vLLM-Omni; no CPU is among them."""

    def __init__(self, num_heads, head_size, softmax_scale, causal=False, **others):
        self.causal, self.softmax_scale = causal, softmax_scale

    def forward(self, *args):
        raise NotImplementedError("no platform")

    def forward_cuda(self, q, k, v, metadata=None):
        mask = getattr(metadata, "attn_mask", None)
        mask = mask.bool()[:, None, None] if mask is not None and mask.ndim == 2 else mask
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        given = {"is_causal": self.causal, "scale": self.softmax_scale, "enable_gqa": True}
        return functional.scaled_dot_product_attention(q, k, v, mask, **given).transpose(1, 2)


class SDPABackend:
    @staticmethod
    def get_impl_cls():
        return SDPAImpl

    @staticmethod
    def supports_attention_mask(spec=None):
        return True


def _extend_enum(kind, name, value):
    member = object.__new__(kind)
    member._name_, member._value_ = name, value
    kind._member_map_[name] = kind._value2member_map_[value] = member
    kind._member_names_.append(name)


def _resolve(path):
    module, _, name = path.rpartition(".")
    __import__(module)
    return getattr(sys.modules[module], name)


class Platform:
    """The platform of a CPU, which vLLM-Omni has none for."""

    @classmethod
    def get_diffusion_attn_backend_cls(cls, selected_backend, head_size, allow_trtllm_default=False):
        known = sys.modules["vllm_omni.diffusion.attention.backends.registry"].DiffusionAttentionBackendEnum
        name = (selected_backend or "TORCH_SDPA").upper()
        if name not in known.__members__:
            raise ValueError(f"Unknown diffusion attention backend: '{name}'")
        backend = _resolve(known[name].value)
        getattr(backend, "validate_available", lambda: None)()
        return known[name].value


for _name in ("is_cuda", "is_rocm", "is_npu", "is_xpu", "is_musa"):
    setattr(Platform, _name, lambda self: False)


class Omni:
    """The double; `real()` gives the same names of the package."""

    AttentionMetadata, VideoTokenLayout, VideoTokenSpan = AttentionMetadata, VideoTokenLayout, VideoTokenSpan

    def __init__(self):
        self.config = self.context = None
        self.Backends = enum.Enum("Backends", {"TORCH_SDPA": f"{__name__}.SDPABackend"})

    def attention(self, num_heads, head_size, causal=False, softmax_scale=None, num_kv_heads=None, **names):
        """A layer, built for a configuration."""
        roles = self.config.diffusion_attention_config
        name = roles["per_role"].get(names.get("role", "self"), roles["default"])
        backend = _resolve(Platform.get_diffusion_attn_backend_cls(name, head_size))
        given = {"softmax_scale": softmax_scale or head_size**-0.5, "causal": causal, "num_kv_heads": num_kv_heads}
        layer = nn.Module()
        layer.attention = backend.get_impl_cls()(num_heads=num_heads, head_size=head_size, **given, **names)
        layer.forward = lambda q, k, v, metadata=None: layer.attention.forward(q, k, v, metadata)
        return layer

    @contextlib.contextmanager
    def building(self, default, per_role=None, **degrees):
        """Layers are built within."""
        roles = {"default": default, "per_role": per_role or {}}
        parallel = types.SimpleNamespace(**{"ring_degree": 1, "allgather_degree": 1, **degrees})
        config = type("Config", (), {})()
        config.model_class_name, config.parallel_config = "WanPipeline", parallel
        config.diffusion_attention_config = roles
        before, self.config = self.config, config
        try:
            yield config
        finally:
            self.config = before

    @contextlib.contextmanager
    def step(self, index, total):
        """A forward of a denoising step runs within."""
        self.context = types.SimpleNamespace(denoise_step_idx=index, total_denoise_steps=total)
        try:
            yield
        finally:
            self.context = None


def _context(omni):
    assert omni.context is not None
    return omni.context


def double(monkeypatch):
    """Put the double where the adapter imports vLLM-Omni from."""
    omni, base = Omni(), type("Base", (), {})
    rooms = {
        "aenum": {"extend_enum": _extend_enum},
        "vllm.utils.import_utils": {"resolve_obj_by_qualname": _resolve},
        "vllm_omni.platforms": {"current_omni_platform": Platform()},
        "vllm_omni.diffusion.config": {"get_current_diffusion_config_or_none": lambda: omni.config},
        "vllm_omni.diffusion.forward_context": {
            "is_forward_context_available": lambda: omni.context is not None,
            "get_forward_context": lambda: _context(omni),
        },
        "vllm_omni.diffusion.attention.backends.abstract": {"AttentionBackend": base, "AttentionImpl": base},
        "vllm_omni.diffusion.attention.backends.sdpa": {"SDPABackend": SDPABackend},
        "vllm_omni.diffusion.attention.backends.registry": {"DiffusionAttentionBackendEnum": omni.Backends},
    }
    for path, names in rooms.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules or end == len(parts):
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[path]).update(names)
    monkeypatch.delitem(sys.modules, "visattn.clients.vllm_omni.backend", raising=False)
    return omni
