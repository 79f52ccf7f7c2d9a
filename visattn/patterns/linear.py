"""Linear attention: a product of feature maps in place of the softmax's exponential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visattn.given import counted
from visattn.patterns.kinds import ComposedPattern
from visattn.patterns.values import as_text, flags, is_number, real_number

if TYPE_CHECKING:
    import torch

# Feature maps by name, and whether they have parameters.
FEATURES = {"elu": False, "relu": False, "hedgehog": True, "exp": True}


class LinearForm(ComposedPattern):
    """A pattern through sums over all keys: every token reads every other, at a cost linear in the tokens."""

    of_products: ClassVar[bool] = False

    def check(self, grid: tuple[int, ...]) -> None:
        """Any grid is fine: only the number of tokens counts."""

    def instead(self, grid: tuple[int, ...]) -> str:
        """A product."""
        return "a product with sums over all keys"


@dataclass(frozen=True)
class Linear(LinearForm):
    """out_i = f(q_i) . sum_j f(k_j) v_j / (f(q_i) . sum_j f(k_j)), dense tokens and grid alike.

    Sources: Katharopoulos et al., "Transformers are RNNs" (ICML 2020), section 3.2 ("elu": ELU + 1); Zhang et al.,
    "The Hedgehog & the Porcupine" (ICLR 2024), section 4 (learnable maps per head that are trained to mimic softmax).

        elu         f(x) = ELU(x) + 1
        relu        f(x) = max(x, 0)
        hedgehog    f(x) = [softmax(W x), softmax(-W x)], over the channels
        exp         f(x) = [exp(W x), exp(-W x)], shifted by maxima that cancel

    W is a learnable matrix per head, one for queries and one for keys, the identity at first. "exp" is the paper's
    first form, whose weights grow without bound; "hedgehog" its form for stable training. The scale of `attention`
    is not used. A query whose features meet no key's (relu), or with no visible key, gives zeros.

    Sums are float32 at least. Tested in bfloat16 and float16 with queries and keys up to 80 in absolute value, where
    the error stays that of rounding the output.

    With a causal axis (the frames of a video) a token of the grid reads the keys of its own and of earlier positions
    of that axis, those of t positions before with the factor exp(-decay t); "heads" gives head h of H the decay
    2^(-8 (h + 1) / H). Dense tokens read and are read by all, without decay. What fades below the smallest number of
    float32 (t above 87 / decay) counts nothing: where a mask hides all nearer keys, the output is 0. It runs by tiles,
    in time linear in the tokens. Source: Qin et al., "Lightning Attention-2" (2024), section 3, without its norm of the
    output: here weights are divided by their sum.

    Attributes:
        feature: Name of the feature map.
        causal: Whether each axis is causal, one of them at most.
        decay: How fast earlier positions fade, at least 0, or "heads".

    Raises:
        ValueError: If there is no such feature map, several axes are causal, or decay has no axis or is below 0.
    """

    feature: str = "elu"
    causal: bool | tuple[bool, ...] = False
    decay: float | str = 0.0

    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        check_feature(self.feature)
        given = flags(self.causal, "causal")
        # All axes alike are one word; of several only one may be causal.
        causal = given if isinstance(given, tuple) else (given,)
        if sum(causal) > 1:
            raise ValueError(f"causal={self.causal!r} must be true or false for each axis, true for at most one")
        object.__setattr__(self, "causal", causal if any(causal) else False)
        if isinstance(self.decay, str):
            if self.decay != "heads":
                raise ValueError(f"decay={self.decay!r} must be a number of at least 0, or heads")
        elif not is_number(self.decay) or self.decay < 0:
            raise ValueError(f"decay={self.decay!r} must be a number of at least 0, or heads")
        else:
            object.__setattr__(self, "decay", real_number(self.decay))
        if self.decay != 0 and not self.causal:
            raise ValueError(f"decay={self.decay!r} fades what is earlier: give a causal axis too, like causal=1x0x0")

    def __str__(self) -> str:
        more = f", causal={as_text(self.causal)}" if self.causal else ""
        more += f", decay={self.decay}" if self.decay != 0 else ""
        return f"{self.name}(feature={self.feature}{more})"

    @property
    def joins_heads(self) -> bool:
        """Whether heads decay by their number."""
        return self.decay == "heads"

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if `causal` is for another number of axes."""
        if self.causal and len(self.causal) != len(grid):  # type: ignore[arg-type]
            axes = counted(len(self.causal), "axis", "axes")  # type: ignore[arg-type]
            raise ValueError(f"{self} is for grids of {axes}, not {len(grid)}: give causal a value for each axis")

    def causal_axis(self, grid: tuple[int, ...]) -> int | None:
        """The axis whose earlier positions are read, None if all are."""
        return self.causal.index(True) if isinstance(self.causal, tuple) else None

    def instead(self, grid: tuple[int, ...]) -> str:
        """A product."""
        return "a product with sums over keys of earlier positions" if self.causal else super().instead(grid)

    @property
    def learnable(self) -> bool:
        """Whether the feature map is."""
        return FEATURES[self.feature]

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`query_map` and `key_map` [H, D, D] of a learnable feature map; x of a head becomes x @ map."""
        return map_shapes(self.feature, heads, head_dim)

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Identities."""
        return initial_maps(self.feature, heads, head_dim)


def check_feature(feature: object) -> None:
    """Raise a ValueError if a feature map does not exist."""
    if not isinstance(feature, str) or feature not in FEATURES:
        raise ValueError(f"feature={feature!r} must be one of {', '.join(FEATURES)}")


def feature_channels(feature: str, head_dim: int) -> int:
    """Channels of the features of a head."""
    return 2 * head_dim if FEATURES[feature] else head_dim


def map_shapes(feature: str, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices of a feature map."""
    return dict.fromkeys(("query_map", "key_map"), (heads, head_dim, head_dim)) if FEATURES[feature] else {}


def initial_maps(feature: str, heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """An identity per head for each matrix of a feature map."""
    import torch

    return {
        name: torch.eye(d, dtype=torch.float32, device="cpu").repeat(h, 1, 1)
        for name, (h, d, _) in map_shapes(feature, heads, head_dim).items()
    }
