"""WERSA: linear attention of random features of tokens whose wavelet bands are weighed by learned gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visattn.patterns.linear import LinearForm
from visattn.patterns.values import LARGEST, MANY, whole_number

if TYPE_CHECKING:
    import torch


# Boxes of more levels are larger than any grid.
MOST_LEVELS = LARGEST.bit_length()


@dataclass(frozen=True)
class Wersa(LinearForm):
    """Linear attention of relu(R b(q)) and relu(R b(k)), where b weighs the Haar bands of tokens over the grid.

    Source: Dentamaro, "Scaling Attention to Very Long Sequences in Linear Time with Wavelet-Enhanced Random Spectral
    Attention (WERSA)" (2025), for sequences; here for grids of any number of axes.

    b takes the GELU of each channel of a head and cuts it in bands: of level l is what means over boxes of 2^(l - 1)
    tokens per axis add to means over boxes of 2^l, and the last band is the means over the largest boxes. Those are the
    bands of the Haar wavelet, without the padding that it needs where a grid is no power of two: at a border a box has
    the tokens that are there. Each band is multiplied by its scale and by its gate, a sigmoid of a small network of the
    mean query of the head over the grid (in the paper of the mean token of the layer), the same for queries and keys.
    Dense tokens are a grid of one each: all of them is the last band. R are random numbers at first, the same for
    queries and keys, so that weights start near the arc-cosine kernel of order 1. The paper's bandwidth divides all
    features of a head alike and cancels in the weights, so there is none; its norm of the output is the model's.

    Tokens that the key mask hides are in no mean. A query whose features meet no key's gives zeros. The scale of
    `attention` is not used. Sums are float32 at least.

    Attributes:
        levels: Levels of bands below the means.
        features: Random features of a head, at most 65536; more than 256 run without the GPU's own kernels.

    Raises:
        ValueError: If either is no whole number of at least 1, or there are more than 31 levels.
    """

    levels: int = 2
    features: int = 128

    name: ClassVar[str] = "wersa"

    def __post_init__(self) -> None:
        for name, high in (("levels", MOST_LEVELS), ("features", MANY)):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, 1, high=high))

    @property
    def learnable(self) -> bool:
        """It is."""
        return True

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Random features, scales of bands, and the network of the gates.

        `query_map` and `key_map` [H, D, features], `scale` [H, levels + 1] from the finest band on, and the layers
        `hidden_weight` [H, D, G] and `hidden_bias` [H, G], `gate_weight` [H, G, levels + 1] and `gate_bias`
        [H, levels + 1] with G a quarter of D.
        """
        bands, hidden = self.levels + 1, max(1, head_dim // 4)
        return {
            "query_map": (heads, head_dim, self.features),
            "key_map": (heads, head_dim, self.features),
            "scale": (heads, bands),
            "hidden_weight": (heads, head_dim, hidden),
            "hidden_bias": (heads, hidden),
            "gate_weight": (heads, hidden, bands),
            "gate_bias": (heads, bands),
        }

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The same random numbers every time, gates of a half, and scales of 2: at first all bands are as they were."""
        import torch

        made = torch.Generator().manual_seed(0)
        shapes = self.parameter_shapes(heads, head_dim, grid)
        found = {name: torch.zeros(shape, dtype=torch.float32, device="cpu") for name, shape in shapes.items()}
        for name in ("query_map", "hidden_weight"):
            found[name] = torch.randn(shapes[name], generator=made, dtype=torch.float32, device="cpu") * head_dim**-0.5
        return found | {
            "key_map": found["query_map"].clone(),
            "scale": torch.full(shapes["scale"], 2.0, dtype=torch.float32, device="cpu"),
        }
