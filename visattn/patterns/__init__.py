"""Attention patterns: which keys each query of a grid sees. One file a pattern."""

from __future__ import annotations

from visattn.patterns.above import Above
from visattn.patterns.agent import Agent
from visattn.patterns.agent_sd import AgentSD
from visattn.patterns.base import Pattern
from visattn.patterns.centroids import Centroids
from visattn.patterns.clear import Clear
from visattn.patterns.clipped import Clipped
from visattn.patterns.dense import Dense
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.flow import Flow
from visattn.patterns.gate import Gate
from visattn.patterns.groups import Groups
from visattn.patterns.halo import Halo
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.sla import SLA
from visattn.patterns.hybrid.sla2 import SLA2
from visattn.patterns.hybrid.vsa import VSA
from visattn.patterns.kinds import (
    BiasedPattern,
    ComposedPattern,
    ListedPattern,
    MergingPattern,
    PooledPattern,
    RoutedPattern,
    SpannedPattern,
    StaticPattern,
)
from visattn.patterns.kmeans import KMeans
from visattn.patterns.linear import Linear
from visattn.patterns.lsh import Lsh
from visattn.patterns.mala import Mala
from visattn.patterns.masks import dense_mask, routed_mask
from visattn.patterns.neighborhood import Neighborhood
from visattn.patterns.ordered import OrderedPattern
from visattn.patterns.perhead import Best, HeadsPattern, PerHead
from visattn.patterns.pruned import Pruned
from visattn.patterns.radial import Radial
from visattn.patterns.routes import Routes
from visattn.patterns.routing import Routing
from visattn.patterns.ruled import RuledPattern
from visattn.patterns.sharing import Broadcast, Residual, SharingPattern
from visattn.patterns.sigmoid import Sigmoid
from visattn.patterns.sparse_linear import SparseLinear
from visattn.patterns.text import parse
from visattn.patterns.topk import TopK
from visattn.patterns.topp import TopP
from visattn.patterns.vertical_slash import VerticalSlash
from visattn.patterns.wersa import Wersa
from visattn.patterns.wrapped import Gated, Selective, Wrapped

__all__ = [
    "PATTERNS",
    "SLA",
    "SLA2",
    "VSA",
    "Above",
    "Agent",
    "AgentSD",
    "Best",
    "BiasedPattern",
    "Broadcast",
    "Centroids",
    "Clear",
    "Clipped",
    "ComposedPattern",
    "Dense",
    "DynamicPattern",
    "Flow",
    "Gate",
    "Gated",
    "Groups",
    "Halo",
    "HeadsPattern",
    "HybridPattern",
    "KMeans",
    "Linear",
    "ListedPattern",
    "Lsh",
    "Mala",
    "MergingPattern",
    "Neighborhood",
    "OrderedPattern",
    "Pattern",
    "PerHead",
    "PooledPattern",
    "Pruned",
    "Radial",
    "Residual",
    "RoutedPattern",
    "Routes",
    "Routing",
    "RuledPattern",
    "Selective",
    "SharingPattern",
    "Sigmoid",
    "SpannedPattern",
    "SparseLinear",
    "StaticPattern",
    "TopK",
    "TopP",
    "VerticalSlash",
    "Wersa",
    "Wrapped",
    "dense_mask",
    "parse",
    "routed_mask",
]

PATTERNS: tuple[type[Pattern], ...] = (
    Dense,
    Neighborhood,
    Halo,
    Groups,
    Clear,
    Radial,
    Routing,
    TopK,
    TopP,
    Above,
    VerticalSlash,
    KMeans,
    Lsh,
    Pruned,
    Centroids,
    Gate,
    SLA,
    SLA2,
    VSA,
    Best,
    PerHead,
    Agent,
    AgentSD,
    Linear,
    Flow,
    Mala,
    Wersa,
    SparseLinear,
    Sigmoid,
    Clipped,
    Gated,
    Selective,
    Residual,
    Broadcast,
)
