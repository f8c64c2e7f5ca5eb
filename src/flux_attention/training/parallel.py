"""Several ranks: one row's tokens shared among them (Ulysses), and the frozen backbone sharded over them.

The ranks `0 … W−1` form groups of P consecutive ranks that share each row; the W/P groups see different rows. Source of
the exchange: DeepSpeed Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flux_attention.models.controller import FluxAttention
from flux_attention.router import PoolPlan


@dataclass(frozen=True)
class Ranks:
    """This rank's place.

    Attributes:
        world, rank: of the whole run; 1 and 0 without torch.distributed.
        shared: P, ranks that share a row.
        group: the process group of this rank's row; None for P = 1.
    """

    world: int = 1
    rank: int = 0
    shared: int = 1
    group: Any = None

    @classmethod
    def of(cls, shared: int = 1) -> Ranks:
        """Read from torch.distributed. Every rank must call it, in the same order as other collectives.

        Raises ValueError when `shared` does not divide the number of ranks.
        """
        started = _started()
        world, rank = (dist.get_world_size(), dist.get_rank()) if started else (1, 0)
        if shared < 1 or world % shared:
            raise ValueError(
                f"sequence_parallel={shared} must divide the number of ranks, {world}"
                + ("" if started else " (start with torchrun or accelerate launch)")
            )
        group = None
        if shared > 1:
            # All ranks make all groups.
            for first in range(0, world, shared):
                made = dist.new_group(list(range(first, first + shared)))
                group = made if first <= rank < first + shared else group
        return cls(world, rank, shared, group)

    @property
    def rows(self) -> int:
        """Groups of ranks, which see different rows."""
        return self.world // self.shared

    @property
    def row(self) -> int:
        return self.rank // self.shared

    @property
    def place(self) -> int:
        """Which of the P shares of its row this rank holds."""
        return self.rank % self.shared

    @property
    def first(self) -> int:
        """Global rank of the first share of this row."""
        return self.row * self.shared


class Ulysses:
    """The `Exchange` of ranks that share a row: attention sees all tokens of H/P heads.

    Args:
        ranks: with P > 1.
        controller: its layers must all be routed, and its heads divide by P.
    """

    def __init__(self, ranks: Ranks, controller: FluxAttention) -> None:
        backbone = controller.config.backbone
        assert backbone is not None and ranks.shared > 1
        if backbone.num_key_value_heads % ranks.shared:
            raise ValueError(
                f"sequence_parallel={ranks.shared} must divide the key/value heads of {backbone.name}, "
                f"{backbone.num_key_value_heads}"
            )
        if len(backbone.routable_layers) != backbone.num_hidden_layers:
            raise ValueError(
                f"sequence_parallel needs every layer routed, but {backbone.name} has "
                f"{backbone.num_hidden_layers - len(backbone.routable_layers)} layers that stay as they are"
            )
        self.ranks = ranks

    def share(self, tokens: int) -> slice:
        """This rank's tokens of a row. Raises ValueError when they do not divide evenly."""
        shares = self.ranks.shared
        if tokens % shares:
            raise ValueError(f"a row of {tokens} tokens does not divide over sequence_parallel={shares} ranks")
        step = tokens // shares
        return slice(self.ranks.place * step, (self.ranks.place + 1) * step)

    def to_heads(self, x: Tensor) -> Tensor:
        """`[1, H, T/P, D]` → `[1, H/P, T, D]`, in memory token by token: attention packs them without a copy."""
        # [P, T/P, H/P, D]: the first axis is the head group, and the stretch of tokens after the exchange.
        parts = x[0].transpose(0, 1).unflatten(1, (self.ranks.shared, -1)).transpose(0, 1)
        return _swapped(parts, self.ranks.group).flatten(0, 1)[None].transpose(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """`[1, T, H/P, D]` → `[1, T/P, H, D]`."""
        tokens, dim = x.shape[1], x.shape[3]
        parts = x.reshape(self.ranks.shared, tokens // self.ranks.shared, -1, dim)
        return _swapped(parts, self.ranks.group).transpose(0, 1).reshape(1, tokens // self.ranks.shared, -1, dim)

    def pooled(self, hidden: Tensor, plan: PoolPlan, queries: Callable[[Tensor], Tensor]) -> Tensor:
        """Each rank pools the tokens it holds; the parts are added in rank order, so that all get the same bits."""
        flat = hidden.flatten(0, 1)
        first = self.ranks.place * flat.shape[0]
        here = (plan.index >= first) & (plan.index < first + flat.shape[0])
        local = PoolPlan((plan.index - first).where(here, 0), plan.weight.where(here, 0.0))
        part = local.mean(queries(local.gather(flat)))
        parts = [torch.empty_like(part) for _ in range(self.ranks.shared)]
        dist.all_gather(parts, part.contiguous(), group=self.ranks.group)
        return torch.stack(parts).sum(0)

    def agreed(self, x: Tensor) -> Tensor:
        """The first rank's values on every rank of the row."""
        x = x.contiguous()
        dist.broadcast(x, self.ranks.first, group=self.ranks.group)
        return x

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks of the row; no gradient."""
        x = x.detach().clone()
        dist.all_reduce(x, group=self.ranks.group)
        return x


def _swapped(x: Tensor, group: Any) -> Tensor:
    found: Tensor = _AllToAll.apply(x, group)
    return found


class _AllToAll(torch.autograd.Function):
    """Part i of the first axis goes to rank i; with equal parts the exchange is its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradients[0], ctx.group), None


def _exchanged(x: Tensor, group: Any) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


@torch.no_grad()
def same_everywhere(module: nn.Module) -> None:
    """Give every rank the first rank's parameters and buffers."""
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor, 0)


def first_ranks(choose: Callable[[], str]) -> str:
    """What the first rank chooses, on every rank: a shared folder need not look the same to all at the same moment."""
    if not _started():
        return choose()
    chosen = [choose() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(chosen)
    return chosen[0]


@contextmanager
def end_together() -> Iterator[None]:
    """Around all that one of several ranks does with the others: none of them waits for another in vain at its end.

    Process groups that were made inside end with the process, in order. A process that had an error exits with code 1
    and leaves them: tearing a group down waits for collectives that the other ranks never join, and the launcher, which
    stops those, for the exit.
    """
    outside = _started()
    try:
        yield
    except BaseException:
        if _started():
            atexit.register(_exit)
        raise
    if _started() and not outside:
        atexit.register(_leave)


#: A collective is freed by whoever lets go of it last. A thread of gloo needs the interpreter for that, which may be
#: waiting for the thread to end, as it does where a group is destroyed right after a barrier. So the last one is kept.
_last: list[Any] = []


def _leave() -> None:
    if _started():
        last = dist.barrier(async_op=True)
        last.wait()
        _last.append(last)
        dist.destroy_process_group()


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def shard_backbone(controller: FluxAttention) -> None:
    """Shard the frozen decoder layers over all ranks (FSDP2): each gathers a layer's weights while it runs.

    Embedding and output layer stay whole, and so do norms and biases. For good: a sharded model trains and is then
    thrown away.

    Raises:
        RuntimeError: torch.distributed is not started.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not _started():
        raise RuntimeError("shard_backbone needs torch.distributed: start with torchrun or accelerate launch")
    # A layer's weights go back once its own stream is done with them: no other stream may still read them.
    controller.pooling.beside = False
    mesh = init_device_mesh(controller.device.type, (dist.get_world_size(),))
    decoder = controller.decoder
    for layer in decoder.layers:
        # Vectors are nothing beside the matrices, and fused layers hold the norms' weights as they are now.
        vectors = {p for p in layer.parameters() if p.ndim == 1}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=vectors)
    # Layers under one root share their streams: a layer is gathered while the one before it runs, and never more than
    # two at a time. Each a root of its own would wait for that one, and keep memory for its streams alone.
    whole = set(decoder.parameters()).difference(decoder.layers.parameters())
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
