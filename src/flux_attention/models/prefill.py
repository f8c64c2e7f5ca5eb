"""Attention of one routable layer at prefill: each sequence on its own side, or both sides blended.

Shapes: `S` sequences packed into `N` new tokens; `q [N, Hq, D]`, `k, v [N, Hk, D]` → `[N, Hq, D]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_attention.cache import FluxCache
from flux_attention.kernels.api import Packing
from flux_attention.models.blend import gated_blend, members_of, soft_blend
from flux_attention.models.layout import Layout
from flux_attention.models.step import Step, host_decisions
from flux_attention.modes import Mode, PrefillInputs
from flux_attention.route import HeadRoute


@dataclass(frozen=True, slots=True)
class LayerPrefill:
    """A layer in a pass.

    Attributes:
        step: of the pass; its route or gates say who is on which side.
        layer: number among the routable ones.
        full, sparse: modes of the two sides.
        scale: of the logits.
        impl: kernel implementation.
    """

    step: Step
    layer: int
    full: Mode
    sparse: Mode
    scale: float
    impl: str

    def blended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z·full + (1 − z)·sparse, the training form."""
        step, layer, layout = self.step, self.layer, self.step.layout
        ends = step.prompt_ends if len(step.prompt_ends) == len(layout.counts) else layout.ends

        def side(mode: Mode, members: list[int]) -> Tensor:
            lengths = tuple(layout.counts[s] for s in members)
            # Kept for the pass: a packing holds its offsets on the device.
            packing = step.packings.setdefault(("packing", *members), Packing(lengths, lengths))
            some_q, some_k, some_v = (members_of(x, members, layout.counts) for x in (q, k, v))
            some_ends = tuple(ends[s] for s in members)
            return mode.prefill(PrefillInputs(some_q, some_k, some_v, packing, some_ends, self.scale, self.impl))

        gate = step.packings.get(("gate", layer)) if step.gates is None else step.gates[layer]
        # A recomputed layer takes its gate as an input of its own, to which the gradient belongs.
        gate = step.packings.get(("input", layer), gate)
        assert gate is not None
        if step.exact is not None:
            exact = step.exact[layer]
        elif step.gates is not None:
            every = list(range(len(layout.counts)))
            return soft_blend(side(self.full, every), side(self.sparse, every), gate, layout.counts)
        else:
            if ("host", layer) not in step.packings:
                step.packings["host", layer] = host_decisions(gate[None])[0]
            exact = step.packings["host", layer]
        return gated_blend(side, self.full, self.sparse, gate, exact, layout.counts)

    def routed(self, q: Tensor, k: Tensor, v: Tensor, decide: Callable[[], list[bool]] | None = None) -> Tensor:
        """Each sequence on its own side; sequences of one side share a launch.

        `decide` gives the sides, True = full, of a pass that routes inline: it waits until the device has decided.
        """
        step, layer = self.step, self.layer
        layout, cache, ends = step.layout, step.cache, step.prompt_ends
        assert step.route is not None
        if isinstance(step.route, HeadRoute):
            return self._by_head(step.route.heads[layer], q, k, v)
        if decide is None:
            out = self._sides(layout, cache, step.route.use_full[layer].tolist(), ends, q, k, v)
        else:
            out = self._decided(decide, q, k, v)
        if cache is not None:
            start = 0
            for s, n in enumerate(layout.counts):
                cache.append(layer, layout.slots[s], k[start : start + n], v[start : start + n])
                start += n
        return out

    def _decided(self, decide: Callable[[], list[bool]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Both sides made ready, as far as they can be, while the decisions of a whole prompt's pass are on their way.

        From their arrival on, the device runs out of work: what is left to do then is one launch.
        """
        layout, ends = self.step.layout, self.step.prompt_ends
        packing = Packing(layout.counts, layout.counts)
        inputs = PrefillInputs(q, k, v, packing, ends, self.scale, self.impl)
        full, sparse = self.full.prepare(inputs), self.sparse.prepare(inputs)
        use_full = decide()
        if all(use_full):
            return full()
        if not any(use_full):
            return sparse()
        # Neither is wanted whole; their results would only take memory.
        del full, sparse
        return self._sides(layout, self.step.cache, use_full, ends, q, k, v)

    def _by_head(self, heads: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """KV heads become sequences of one head each, and then a head is routed as a sequence is; `heads [Hk, S]`."""
        count, tokens = k.shape[1], q.shape[0]
        # [N, Hk·G, D] → [Hk·N, G, D]
        q, k, v = (x.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        counts, ends = self.step.layout.counts * count, self.step.prompt_ends * count
        split = Layout.pack(range(len(counts)), counts, (0,) * len(counts))
        out = self._sides(split, None, heads.flatten().tolist(), ends, q, k, v)
        return out.unflatten(0, (count, tokens)).transpose(0, 1).flatten(1, 2)

    def _sides(
        self,
        layout: Layout,
        cache: FluxCache | None,
        use_full: list[bool],
        ends: tuple[int, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        sides = (
            (self.full, [s for s, f in enumerate(use_full) if f]),
            (self.sparse, [s for s, f in enumerate(use_full) if not f]),
        )
        out: Tensor | None = None
        for mode, members in sides:
            if not members:
                continue
            rows = _Rows(layout, members)
            side_q, new_k, new_v = (rows.take(x) for x in (q, k, v))
            side_k, side_v, packing = self._with_past(cache, layout, members, new_k, new_v)
            side_ends = tuple(ends[s] for s in members)
            side = mode.prefill(PrefillInputs(side_q, side_k, side_v, packing, side_ends, self.scale, self.impl))
            if len(members) == len(use_full):
                out = side
            else:
                out = torch.empty_like(q) if out is None else out
                rows.put(out, side)
        assert out is not None
        return out

    def _with_past(
        self, cache: FluxCache | None, layout: Layout, members: list[int], k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Packing]:
        """Put each sequence's cached keys before its new ones."""
        counts = [layout.counts[s] for s in members]
        if cache is None or not any(layout.past[s] for s in members):
            return k, v, Packing(tuple(counts), tuple(counts))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        k_lens, gaps, start = [], [], 0
        for s, n in zip(members, counts, strict=True):
            row = layout.slots[s]
            old_k, old_v = cache.gather(self.layer, row)
            keys += [old_k, k[start : start + n]]
            values += [old_v, v[start : start + n]]
            k_lens.append(old_k.shape[0] + n)
            gaps.append(cache.gap(self.layer, row))
            start += n
        return torch.cat(keys), torch.cat(values), Packing(tuple(counts), tuple(k_lens), tuple(gaps))


class _Rows:
    """Some of the packed sequences, as one packed tensor of their own."""

    def __init__(self, layout: Layout, members: list[int]) -> None:
        self._whole = len(members) == len(layout.counts)
        offsets = [0]
        for n in layout.counts:
            offsets.append(offsets[-1] + n)
        self._spans = [(offsets[s], offsets[s + 1]) for s in members]

    def take(self, x: Tensor) -> Tensor:
        return x if self._whole else torch.cat([x[a:b] for a, b in self._spans])

    def put(self, out: Tensor, part: Tensor) -> None:
        start = 0
        for a, b in self._spans:
            out[a:b] = part[start : start + b - a]
            start += b - a
