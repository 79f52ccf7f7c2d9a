"""vLLM-Omni itself under the names of `tests.support.omni.Omni`, in a process of its own: it patches torch."""

import contextlib
import importlib
import sys
import tempfile
import types
from pathlib import Path

import torch

from tests.support import omni


class Real:
    """What tests use of the package."""

    def __init__(self):
        import vllm_omni.platforms as platforms
        from vllm_omni.diffusion.attention.backends import abstract, registry
        from vllm_omni.platforms.interface import OmniPlatformEnum, UnspecifiedOmniPlatform

        class Cpu(UnspecifiedOmniPlatform):
            """A platform of a CPU, which the package has none for."""

            _omni_enum = OmniPlatformEnum.UNSPECIFIED
            get_diffusion_attn_backend_cls = omni.Platform.get_diffusion_attn_backend_cls
            get_device_count = classmethod(lambda cls: 1)
            get_torch_device = classmethod(lambda cls, index=None: torch.device("cpu"))
            set_device = classmethod(lambda cls, device: None)

        platforms._current_omni_platform = Cpu()
        self.Backends = registry.DiffusionAttentionBackendEnum
        self.AttentionMetadata = abstract.AttentionMetadata
        self.VideoTokenLayout, self.VideoTokenSpan = abstract.VideoTokenLayout, abstract.VideoTokenSpan

    def attention(self, num_heads, head_size, causal=False, softmax_scale=None, num_kv_heads=None, **names):
        """See `Omni.attention`."""
        from vllm_omni.diffusion.attention.layer import Attention

        return Attention(num_heads, head_size, causal, softmax_scale or head_size**-0.5, num_kv_heads, **names)

    @contextlib.contextmanager
    def building(self, default, per_role=None, **degrees):
        """See `Omni.building`."""
        from vllm_omni.diffusion.config import set_current_diffusion_config
        from vllm_omni.diffusion.data import AttentionConfig

        parallel = types.SimpleNamespace(
            **{"ring_degree": 1, "allgather_degree": 1, "sequence_parallel_size": 1, **degrees}
        )
        config = type("Config", (), {})()
        config.model_class_name, config.parallel_config = "WanPipeline", parallel
        config.diffusion_attention_config = AttentionConfig(default=default, per_role=per_role or {})
        self.config = config
        with set_current_diffusion_config(config):
            yield config

    @contextlib.contextmanager
    def step(self, index, total):
        """See `Omni.step`."""
        from vllm_omni.diffusion import forward_context

        with forward_context.set_forward_context(omni_diffusion_config=self.config, denoise_step_idx=index):
            forward_context.set_forward_context_denoise_total_steps(total)
            yield


def main():
    """Run every case of a module, the last argument, that takes a client, and print their names."""
    from _pytest.monkeypatch import MonkeyPatch

    client = Real()
    for name, case in vars(importlib.import_module(sys.argv[-1])).items():
        wanted = case.__code__.co_varnames[: case.__code__.co_argcount] if name.startswith("test_") else ()
        if "omni" not in wanted:
            continue
        with MonkeyPatch.context() as patches, tempfile.TemporaryDirectory() as folder:
            given = {"omni": client, "monkeypatch": patches, "tmp_path": Path(folder)}
            case(**{key: given[key] for key in wanted})
        print("ran", name)


if __name__ == "__main__":
    main()
