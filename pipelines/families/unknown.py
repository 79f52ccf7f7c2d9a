"""Model classes of diffusers that have no record, and why."""

from __future__ import annotations

# The release whose classes these lists are of.
RELEASE = "0.42.1"

_AUDIO = "its tokens are those of sound, along one axis"

# Classes in which no visual self-attention could become sparse.
NOT_SPARSE = {
    "AceStepTransformer1DModel": _AUDIO,
    "DreamLiteTransformer2DModel": "it is a part of another model, which is patched as a whole",
    "Kandinsky6SRTransformer3DModel": "it brings a sparse attention of its own (NABLA with sliding tiles)",
    "LTX2VideoDiffusionDecoderModel": (
        "its attention is neighborhood attention already, which visattn.pipelines.decoders.patch_decoder(model) runs"
    ),
    "LongCatAudioDiTTransformer": _AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": _AUDIO,
    "MiniMaxMusic3Transformer1DModel": _AUDIO,
    "MotionAdapter": "it attends over the frames of one pixel, a few dozen tokens",
    "PriorTransformer": "its sequence of a few dozen tokens is causal and has no grid",
    "RFD4ProteinaTransformer": "its tokens are those of a protein and have no grid",
    "SanaVideoTransformer3DModel": "its self-attention is linear already",
    "StableAudio3DiTModel": _AUDIO,
    "StableAudioDiTModel": _AUDIO,
    "T5FilmDecoder": _AUDIO,
    "TransformerTemporalModel": "it attends over the frames of one pixel, a few dozen tokens",
    "UNet1DModel": _AUDIO,
}

# Classes that could have a record.
NOT_YET = {
    "WanAnimate2Transformer3DModel": "its cached frames come with a mask of blocks for flex attention",
}

# Classes that hold several ControlNets in `nets`; each is patched by its own record.
CONTAINERS = (
    "FluxMultiControlNetModel",
    "HunyuanDiT2DMultiControlNetModel",
    "MultiControlNetModel",
    "MultiControlNetUnionModel",
    "QwenImageMultiControlNetModel",
    "SD3MultiControlNetModel",
)


def reason(name: str) -> str:
    """Why a model class has no record, "" if that is not known."""
    if name in NOT_SPARSE:
        return f"nothing to sparsify: {NOT_SPARSE[name]}"
    return f"not yet: {NOT_YET[name]}" if name in NOT_YET else ""
