"""Patterns of published methods by one name: what each expands to, and whose defaults those are."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """A pattern with a name of its own.

    Attributes:
        pattern: The pattern as text.
        source: The paper or release whose defaults it has.
        differs: What the original does besides or otherwise, empty if nothing in the choice.
    """

    pattern: str
    source: str
    differs: str = ""


# Only methods whose rule for the choice is built. `parse` takes these names as they are, without parameters.
PRESETS = {
    "sparge": Preset(
        "topk(keep=0.5, always=none, block=128, key_block=64)",
        "SpargeAttn (Zhang et al., ICML 2025), the recommended call with topk=0.5",
        "the original multiplies in int8 and skips further products inside the loop",
    ),
    "sparge_cdf": Preset(
        "topp(p=0.98, rule=under, always=none, alike=0.6, block=128, key_block=64)",
        "SpargeAttn (Zhang et al., ICML 2025), the call with cdfthreshd=0.98 and simthreshd1=0.6",
        "the original multiplies in int8, skips further products inside the loop and tunes both numbers per head",
    ),
    "xattention": Preset(
        "topp(p=0.9, score=diagonal(8), always=first(1), block=128)",
        "XAttention (Xu et al., ICML 2025), HunyuanVideo",
        "for language models the original tunes p per head, and adds always=self+first(1), counted=true, causal=true",
    ),
    "nabla": Preset(
        "topp(p=0.9, always=window(11x3x3), block=1x8x8)",
        "NABLA (Mikhailov et al., 2025), Kandinsky 5 Lite; its Pro model takes p=0.7",
    ),
    "longcat": Preset(
        "topk(keep=0.125, always=none, block=4x4x8)",
        "LongCat-Video (2025), block sparse attention at sparsity 0.875",
    ),
    "jenga": Preset(
        "topp(p=0.3, least=0.25, always=near(1), block=4x4x8)",
        "Jenga (Zhang et al., 2025), HunyuanVideo at a drop of 0.75; Wan takes p=0.9",
        "the original's blocks of 128 tokens follow a space-filling curve, and its drop grows over the steps",
    ),
    "bsa": Preset(
        "pruned(by=topp(p=0.9, least=4, always=none, block=64))",
        "BSA of FastVideo (2025), half of the queries of a block pruned",
    ),
    "draft": Preset(
        "topk(keep=0.1, always=none, per=head, block=1x8x16)",
        "DraftAttention (Shen et al., 2025), sparsity 0.9",
        "the original keeps the pair of blocks at its bar too, one more per head",
    ),
    "pisa": Preset(
        "topk(keep=0.15, always=none, rest=slope, block=64)",
        "PISA (2025), density 0.15",
    ),
    "svg1": Preset(
        "best(of=[na(window=5x-1x-1), na(window=-1x9x9)])",
        "Sparse VideoGen (Xi et al., ICML 2025): each head has a pattern of space or one of time, whichever is nearer",
        "the original's windows are runs of 128 tokens, as wide as a budget says, and both list the first frame",
    ),
    "svg2": Preset(
        "kmeans(queries=300, keys=1000, p=0.9, floor=0.1, start=50, step=2)",
        "Sparse VideoGen2 (Yang et al., 2025), Wan 14B; HunyuanVideo takes 400 and 1000 clusters",
        "the original starts from random tokens and stops early where centres rest",
    ),
    "blasst": Preset(
        "topk(keep=1.0, always=none, block=64, skip=0.01)",
        "BLASST (2025) and skip-softmax of TensorRT-LLM: dense attention with the test in its loop",
        "the originals divide the threshold by the number of tokens",
    ),
    "vmoba": Preset(
        "topp(p=0.25, of=height, block=1x1x1, key_block=4x6x4)",
        "VMoBA (Wu et al., 2025), threshold 0.25, each token by itself",
        "the original takes whole frames, columns of 3x4 and boxes of 4x6x4 in turns, layer by layer",
    ),
    "moba": Preset(
        "topk(keep=3, block=1, key_block=512)",
        "MoBA (Lu et al., 2025), blocks of 512 tokens, each token by itself",
        "the original adds causal=true",
    ),
    "seer": Preset(
        "gate(by=above(tau=0.005, bar=share, always=none, block=64))",
        "SeerAttention (Gao et al., 2024), the threshold 0.005 on shares that trained weights give",
        "the original pools before the rotary embedding, adds causal=true and keeps the last rows dense",
    ),
    "combiner": Preset(
        "topk(keep=1, rest=mean, block=64)",
        "Combiner (Ren et al., NeurIPS 2021), its fixed form with regions of 64 tokens and means as summaries",
        "the original weighs the values of a region by the region's own query, does not count a region's tokens, and "
        "its regions have the square root of the tokens",
    ),
    "flexprefill": Preset(
        "verticalslash(p=0.9, tau=0.1, least=8, block=128)",
        "FlexPrefill (Lai et al., ICLR 2025), at least 1024 tokens",
    ),
    "minference": Preset(
        "verticalslash(columns=1000, slashes=6096, block=64)",
        "MInference (Jiang et al., NeurIPS 2024), 1000 columns and 6096 distances",
        "the original sees those tokens alone, here their blocks are seen; some heads have other patterns there",
    ),
    "hyper": Preset(
        "lsh(planes=7, block=256, samples=256)",
        "HyperAttention (Han et al., 2023)",
        "the original is exact below 4096 keys",
    ),
    "subblock": Preset(
        "topk(keep=0.25, score=parts(4x4), always=none, block=64)",
        "SubBlock attention of MiniMax-H3 (2025), sparsity 0.75",
        "the original rounds the number of blocks up to a multiple of 8",
    ),
    "sol": Preset(
        "above(tau=1.0, always=near(1), rest=mean, block=64)",
        "Sol-Attn (2025), the exact form of its bar",
    ),
    "sol_diag": Preset(
        "above(tau=1.0, always=near(1), bar=diag, rest=mean, block=64)",
        "Sol-Attn (2025), the form of its bar that takes the variance channel by channel",
    ),
}
