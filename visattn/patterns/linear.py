"""Linear attention: a product of feature maps in place of the softmax's exponential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visattn.patterns.kinds import ComposedPattern

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

    Attributes:
        feature: Name of the feature map.

    Raises:
        ValueError: If there is no such feature map.
    """

    feature: str = "elu"

    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        check_feature(self.feature)

    def __str__(self) -> str:
        return f"{self.name}(feature={self.feature})"

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
    if feature not in FEATURES:
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

    return {name: torch.eye(d).repeat(h, 1, 1) for name, (h, d, _) in map_shapes(feature, heads, head_dim).items()}
