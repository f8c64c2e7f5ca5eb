"""Routes, and the policies that make them.

A `Route` says, for every routable layer and every sequence, whether full attention runs. The trained router is one
way to get one; the policies here are the others: baselines, ablations and hand-made splits. All of them produce the
same object, so everything below (kernels, cache, metrics) cannot tell them apart.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Which layers run full attention, per sequence.

    Attributes:
        use_full: bool `[L, S]` on the CPU; True = full attention.
        p_full: float32 `[L, S]` on the CPU, the router's probability of full; None when nothing scored the layers.
    """

    use_full: Tensor
    p_full: Tensor | None = None

    def __post_init__(self) -> None:
        if self.use_full.dtype != torch.bool or self.use_full.ndim != 2:
            raise ValueError(
                f"use_full must be a bool tensor [layers, sequences], got {self.use_full.dtype} "
                f"{tuple(self.use_full.shape)}"
            )
        if self.p_full is not None and self.p_full.shape != self.use_full.shape:
            raise ValueError(
                f"p_full must have the shape of use_full {tuple(self.use_full.shape)}, got {tuple(self.p_full.shape)}"
            )

    @classmethod
    def from_scores(cls, p_full: Tensor) -> Route:
        """The route of the router's argmax. `p_full`: `[L, S]`, any device."""
        p_full = p_full.detach().float().cpu()
        return cls(p_full > 0.5, p_full)

    @classmethod
    def full(cls, layers: int, sequences: int) -> Route:
        return cls(torch.ones(layers, sequences, dtype=torch.bool))

    @property
    def num_layers(self) -> int:
        return self.use_full.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.use_full.shape[1]

    @property
    def sparsity(self) -> Tensor:
        """Ω per sequence: share of routable layers running sparse, float32 `[S]`."""
        return 1 - self.use_full.float().mean(0)

    def select(self, sequences: Sequence[int] | Tensor) -> Route:
        """The route of some of the sequences, in the order given (repeats allowed)."""
        index = torch.as_tensor(sequences, dtype=torch.long)
        return Route(self.use_full[:, index], None if self.p_full is None else self.p_full[:, index])

    def column(self, sequence: int) -> str:
        """One sequence's route in characters, a layer each, "1" = full."""
        return "".join("1" if full else "0" for full in self.use_full[:, sequence].tolist())

    def with_dial(self, dial: Dial) -> Route:
        """This route moved into the sparsity range of `dial`, by the ranking of `p_full`.

        Layers move in the order of their scores, least certain first, so the routes of one prompt under different
        dials are nested. Raises ValueError when the route carries no scores to rank by.
        """
        if dial.is_open:
            return self
        if self.p_full is None:
            raise ValueError("a sparsity dial ranks layers by p_full, and this route has none (it is not a router's)")
        layers = self.num_layers
        use_full = self.use_full.clone()
        for s in range(self.num_sequences):
            sparse = layers - int(use_full[:, s].sum())
            low, high = dial.bounds(layers)
            wanted = min(max(sparse, low), high)
            if wanted != sparse:
                order = torch.argsort(self.p_full[:, s], stable=True)
                use_full[order, s] = torch.arange(layers) >= wanted
        return Route(use_full, self.p_full)

    def where(self, keep: Sequence[bool], otherwise: Route) -> Route:
        """This route for the sequences that `keep` marks, `otherwise` for the rest."""
        mask = torch.as_tensor(keep, dtype=torch.bool)
        p_full = self.p_full
        if p_full is not None:
            p_full = torch.where(mask, p_full, otherwise.use_full.float())
        return Route(torch.where(mask, self.use_full, otherwise.use_full), p_full)


@dataclass(frozen=True)
class HeadRoute(Route):
    """A route whose layers are split by KV head, as DuoAttention and Elastic Attention do.

    Quality of prompts read at once can be measured with it; there is no cache for such layers. A layer counts as full
    in `use_full` when any of its heads is; Ω counts heads.

    Attributes:
        heads: bool `[L, Hk, S]` on the CPU; True = full attention.
    """

    heads: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads.dtype != torch.bool or self.heads.ndim != 3:
            raise ValueError(
                f"heads must be a bool tensor [layers, KV heads, sequences], got {self.heads.dtype} "
                f"{tuple(self.heads.shape)}"
            )

    @classmethod
    def of(cls, heads: Tensor) -> HeadRoute:
        return cls(heads.any(1), heads=heads)

    @property
    def sparsity(self) -> Tensor:
        """Ω per sequence: share of KV heads running sparse, float32 `[S]`."""
        return 1 - self.heads.float().mean((0, 1))

    def select(self, sequences: Sequence[int] | Tensor) -> HeadRoute:
        return HeadRoute.of(self.heads[..., torch.as_tensor(sequences, dtype=torch.long)])

    def column(self, sequence: int) -> str:
        """One sequence's route in characters, a KV head each, layer by layer."""
        return "".join("1" if full else "0" for full in self.heads[..., sequence].flatten().tolist())


def parse_columns(columns: Sequence[str], layers: int) -> Route:
    """The route that `Route.column` wrote, one text a sequence; longer texts than `layers` are of KV heads."""
    if len({len(column) for column in columns}) != 1 or not columns[0] or len(columns[0]) % layers:
        raise ValueError(f"routes need the same number of characters, a multiple of {layers}, got {columns!r}")
    bits = torch.tensor([[c == "1" for c in column] for column in columns]).T
    return Route(bits) if len(bits) == layers else HeadRoute.of(bits.unflatten(0, (layers, -1)))


@dataclass(frozen=True)
class Dial:
    """The range a request's sparsity Ω is held in, whatever the router says: `min_sparsity ≤ Ω ≤ max_sparsity`."""

    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_sparsity", "max_sparsity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
        if self.min_sparsity > self.max_sparsity:
            raise ValueError(f"min_sparsity {self.min_sparsity} is above max_sparsity {self.max_sparsity}")

    @property
    def is_open(self) -> bool:
        return self.min_sparsity == 0.0 and self.max_sparsity == 1.0

    def bounds(self, layers: int) -> tuple[int, int]:
        """The allowed numbers of sparse layers. A range narrower than one layer keeps its lower end."""
        low = math.ceil(self.min_sparsity * layers - 1e-9)
        return low, max(low, math.floor(self.max_sparsity * layers + 1e-9))


@dataclass(frozen=True)
class PolicyContext:
    """What a policy may look at: the number of routable layers and each sequence's prompt ids (CPU)."""

    layers: int
    prompts: tuple[Tensor, ...]


Policy = Callable[[PolicyContext], Route]
"""Makes the route of a batch. Nothing else than the sequence itself may influence its column."""


def _same_for_all(context: PolicyContext, use_full: Tensor) -> Route:
    return Route(use_full[:, None].expand(-1, len(context.prompts)).contiguous())


def _digest(prompt: Tensor) -> int:
    return zlib.crc32(prompt.to(torch.int64).contiguous().numpy().tobytes())


def _sparse_count(sparsity: float, layers: int) -> int:
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity!r}")
    return round(sparsity * layers)


@dataclass(frozen=True)
class Dense:
    """Every layer full: the model itself."""

    def __call__(self, context: PolicyContext) -> Route:
        return Route.full(context.layers, len(context.prompts))


@dataclass(frozen=True)
class AllSparse:
    """Every layer sparse."""

    def __call__(self, context: PolicyContext) -> Route:
        return _same_for_all(context, torch.zeros(context.layers, dtype=torch.bool))


@dataclass(frozen=True)
class Static:
    """The same sparse layers (indices among the routable ones) for every prompt."""

    sparse_layers: tuple[int, ...]

    @classmethod
    def from_ranking(cls, ranking: Iterable[int], sparsity: float) -> Static:
        """The first layers of `ranking` (least needed first) sparse, up to the share `sparsity`."""
        order = list(ranking)
        return cls(tuple(order[: _sparse_count(sparsity, len(order))]))

    def __call__(self, context: PolicyContext) -> Route:
        use_full = torch.ones(context.layers, dtype=torch.bool)
        for layer in self.sparse_layers:
            if not 0 <= layer < context.layers:
                raise ValueError(f"static policy names layer {layer}; routable layers are 0 … {context.layers - 1}")
            use_full[layer] = False
        return _same_for_all(context, use_full)


@dataclass(frozen=True)
class Interleaved:
    """Sparse layers spread evenly over the depth."""

    sparsity: float

    def __call__(self, context: PolicyContext) -> Route:
        full = context.layers - _sparse_count(self.sparsity, context.layers)
        use_full = torch.zeros(context.layers, dtype=torch.bool)
        if full:
            use_full[[int((i + 0.5) * context.layers / full) for i in range(full)]] = True
        return _same_for_all(context, use_full)


@dataclass(frozen=True)
class StaticHeads:
    """The same sparse KV heads for every prompt, numbered layer by layer (head h of layer l is l·Hk + h)."""

    sparse_heads: tuple[int, ...]
    heads: int
    """KV heads of a layer, Hk."""

    def __call__(self, context: PolicyContext) -> HeadRoute:
        full = torch.ones(context.layers * self.heads, dtype=torch.bool)
        if self.sparse_heads and not 0 <= min(self.sparse_heads) <= max(self.sparse_heads) < len(full):
            raise ValueError(f"static heads are numbered 0 … {len(full) - 1}, got {self.sparse_heads}")
        full[list(self.sparse_heads)] = False
        shape = (context.layers, self.heads, len(context.prompts))
        return HeadRoute.of(full.view(context.layers, self.heads, 1).expand(shape).contiguous())


@dataclass(frozen=True)
class Random:
    """A random choice of layers per prompt; the same prompt and seed always give the same one."""

    sparsity: float
    seed: int = 0

    def __call__(self, context: PolicyContext) -> Route:
        count = _sparse_count(self.sparsity, context.layers)
        use_full = torch.ones(context.layers, len(context.prompts), dtype=torch.bool)
        for s, prompt in enumerate(context.prompts):
            # Seeded by the prompt itself, not by its place in the batch: a neighbour must not change a route.
            chosen = random.Random(f"{self.seed}/{_digest(prompt)}").sample(range(context.layers), count)
            use_full[chosen, s] = False
        return Route(use_full)


@dataclass(frozen=True)
class Fixed:
    """A route made beforehand, one column per sequence of the batch (a single column serves every sequence)."""

    route: Route

    def __call__(self, context: PolicyContext) -> Route:
        route, sequences = self.route, len(context.prompts)
        if route.num_layers != context.layers:
            raise ValueError(f"the route has {route.num_layers} layers, the model {context.layers} routable ones")
        if route.num_sequences == 1 and sequences > 1:
            route = route.select([0] * sequences)
        if route.num_sequences != sequences:
            raise ValueError(f"the route has {route.num_sequences} sequences, the batch {sequences}")
        return route


POLICIES = ("router", "dense", "sparse", "interleaved:SPARSITY", "random:SPARSITY[:SEED]", "static:LAYER,LAYER,…")


def parse_policy(text: str) -> Policy | None:
    """A policy from its name on a command line; None stands for the trained router.

    Raises:
        ValueError: an unknown name or a malformed argument; the message lists the forms.
    """
    name, *arguments = text.split(":")
    try:
        match name, arguments:
            case "router", []:
                return None
            case "dense", []:
                return Dense()
            case "sparse", []:
                return AllSparse()
            case "interleaved", [share]:
                policy: Policy = Interleaved(float(share))
                _sparse_count(float(share), 1)
                return policy
            case "random", [share, *seed] if len(seed) < 2:
                _sparse_count(float(share), 1)
                return Random(float(share), *map(int, seed))
            case "static", [layers]:
                return Static(tuple(int(layer) for layer in layers.split(",") if layer))
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}; the forms are {', '.join(POLICIES)}") from None
    raise ValueError(f"unknown policy {text!r}; the forms are {', '.join(POLICIES)}")
