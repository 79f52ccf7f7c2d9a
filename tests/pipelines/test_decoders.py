"""The video decoder of LTX-2.5, whose own neighborhood attention our kernels run."""

import pytest
import torch

pytest.importorskip("diffusers")

import visattn
from tests.support.tiny import noise, released, seeded
from visattn.pipelines.decoders import patch_decoder


@pytest.fixture(scope="module")
def decoder():
    return seeded(
        released("LTX2VideoDiffusionDecoderModel"),
        latent_channels=4,
        patch_size=2,
        decoder_head_dim=8,
        decoder_stage_channels=(16, 16, 16),
        decoder_stage_depths=(1, 1, 2),
        decoder_stage_kernels=((3, 3, 3), (3, 5, 3)),
        decoder_upsample_strides=((1, 2, 1), (2, 1, 1)),
        decoder_upsample_channel_reductions=(1, 1),
        decoder_stage5_kernel=(5, 5, 3),
        decoder_t_emb_dim=8,
        spatial_compression_ratio=2,
        temporal_compression_ratio=2,
    )


def decoded(decoder):
    latents, generator = noise(1, 4, 3, 4, 4), torch.Generator().manual_seed(0)
    with torch.no_grad():
        return decoder(latents, generator=generator, num_inference_steps=2, return_dict=False)[0]


@pytest.fixture(scope="module")
def stock(decoder):
    return decoded(decoder)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_decoder_is_the_same_by_our_engine(decoder, stock, backend, monkeypatch):
    before = [m.processor for m in decoder.modules() if hasattr(m, "processor")]
    with patch_decoder(decoder, backend) as patch:
        assert len(patch.modules) == len(before) == 4
        # The mask of blocks is never made.
        from torch.nn.attention import flex_attention

        monkeypatch.setattr(flex_attention, "create_block_mask", None)
        torch.testing.assert_close(decoded(decoder), stock, rtol=2e-4, atol=2e-5)
    after = [m.processor for m in decoder.modules() if hasattr(m, "processor")]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_another_window_is_another_picture(decoder, stock):
    with patch_decoder(decoder) as patch:
        module = decoder.get_submodule(patch.modules[-1])
        module.kernel_size, own = (3, 3, 3), module.kernel_size
        changed = decoded(decoder)
        module.kernel_size = own
    assert not torch.allclose(changed, stock, rtol=2e-4, atol=2e-5)


def test_a_processor_set_since_stays(decoder):
    patch = patch_decoder(decoder)
    module = decoder.get_submodule(patch.modules[0])
    before, mine = module.processor, type(decoder.get_submodule(patch.modules[0]))._default_processor_cls()
    module.processor = mine
    patch.remove()
    assert module.processor is mine and before is not mine


def test_what_is_no_such_decoder_is_named(decoder):
    with pytest.raises(ValueError, match="Linear has no LTX2VideoVaeNeighborhoodAttention: pass the decoder"):
        patch_decoder(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="unknown backend 'natt'"):
        patch_decoder(decoder, "natt")
    with pytest.raises(ValueError, match="patch_decoder"):
        visattn.apply(decoder, "na(window=3x3x3)")
