"""Paged KV cache that follows the route.

All routable layers of a device share one `PagePool`. A layer that keeps its whole history (full, triangle, XAttention)
holds a page per `page_tokens` tokens; a streaming layer holds the sinks and the window and gives every other page back,
while prefilling and while generating. Cached keys carry their absolute rotary positions and softmax ignores key order,
so the pages of a streaming row can stand side by side: its page table is *compacted*, and stock paged kernels serve it.

Shapes: `L` routable layers, `B` rows, `page` tokens of a page (= `block_tokens`), `Hk` key/value heads, `D` head dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from flux_attention.config import FluxConfig
from flux_attention.kernels.transfer import upload
from flux_attention.modes import REGISTRY
from flux_attention.route import Route


class PoolExhaustedError(RuntimeError):
    """The page pool cannot hold a request. Nothing was written; other requests are unharmed."""


class PagePool:
    """Pages of keys and values, shared by every row and by every layer of its device.

    Args:
        page_tokens: tokens of a page.
        num_kv_heads, head_dim, dtype, device: of the keys and values.
        max_pages: fixed capacity, allocated at once; None grows on demand.
    """

    def __init__(
        self,
        page_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_pages: int | None = None,
    ) -> None:
        self.page_tokens = page_tokens
        self.max_pages = max_pages
        shape = (max_pages or 0, page_tokens, num_kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._free = list(range(shape[0] - 1, -1, -1))

    @property
    def num_pages(self) -> int:
        return self.keys.shape[0]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values."""
        return 2 * self.page_tokens * self.keys.shape[2] * self.keys.shape[3] * self.keys.element_size()

    def require(self, pages: int) -> None:
        """Make `pages` pages free, or raise `PoolExhaustedError` with the bytes needed and had."""
        short = pages - len(self._free)
        if short <= 0:
            return
        if self.max_pages is not None:
            raise PoolExhaustedError(
                f"the KV page pool needs {pages * self.page_bytes:,} bytes ({pages} pages of {self.page_tokens} "
                f"tokens) and has {len(self._free) * self.page_bytes:,} free of {self.num_pages * self.page_bytes:,}; "
                "use fewer or shorter prompts, a higher sparsity or a larger pool"
            )
        # A quarter beyond the need keeps regrowth rare without doubling what a long prompt holds.
        old, grown = self.num_pages, self.num_pages + max(short, self.num_pages // 4)
        for name in ("keys", "values"):
            tensor = getattr(self, name)
            bigger = tensor.new_empty(grown, *tensor.shape[1:])
            bigger[:old] = tensor
            setattr(self, name, bigger)
        self._free[:0] = range(grown - 1, old - 1, -1)

    def check(
        self, page_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raise ValueError unless the pages are of this kind: kernels would read others without a sign."""
        names = "page_tokens", "num_kv_heads", "head_dim", "dtype", "device"
        has = *self.keys.shape[1:], self.keys.dtype, self.keys.device
        # "cuda" and "cuda:0" may be the same device: compare what tensors there call it.
        needs = page_tokens, num_kv_heads, head_dim, dtype, torch.empty(0, device=device).device
        wrong = [
            f"{name} {found} where the model's cache has {wanted}"
            for name, found, wanted in zip(names, has, needs, strict=True)
            if found != wanted
        ]
        if wrong:
            raise ValueError(f"the page pool does not fit the cache: {'; '.join(wrong)}")

    def allocate(self, pages: int) -> list[int]:
        self.require(pages)
        return [self._free.pop() for _ in range(pages)]

    def release(self, pages: Sequence[int]) -> None:
        self._free.extend(reversed(pages))


@dataclass(frozen=True)
class MemoryReport:
    """What a cache holds, in bytes of keys and values over its routable layers.

    Attributes:
        held: bytes of the pages in use.
        dense: bytes that a cache keeping every page of every layer would hold.
        free_pages, total_pages: of the pool.
    """

    held: int
    dense: int
    free_pages: int
    total_pages: int

    @property
    def share(self) -> float:
        return self.held / self.dense if self.dense else 1.0


@dataclass
class Tables:
    """What decode kernels read, on one device.

    Attributes:
        pages: int32 `[L, B, max_pages]`, each layer's compacted page table.
        counts: int32 `[L, B]`, keys each layer holds, in the order of its table.
    """

    pages: Tensor
    counts: Tensor


def append_token(
    k_pages: Tensor, v_pages: Tensor, page_table: Tensor, counts: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Put one token a row, `keys, values [B, Hk, D]`, behind its `counts[b]` keys; device work only."""
    page, counts = k_pages.shape[1], counts.long()
    slots = page_table.gather(1, (counts // page)[:, None])[:, 0].long() * page + counts % page
    # Detached: a page outlives the pass that filled it, and must not keep that pass's graph alive.
    k_pages.flatten(0, 1)[slots] = keys.detach()
    v_pages.flatten(0, 1)[slots] = values.detach()


def streaming_pages(config: FluxConfig) -> int:
    """Most pages a streaming row holds: sinks, window, and the page being written."""
    return (config.sink_tokens + config.window_tokens) // config.block_tokens + 1


@dataclass
class _Progress:
    """Columns fed to a cache. Shared with its layers, which thus need no reference to the cache: that cycle would keep
    a dropped cache's pages until the garbage collector's next pass."""

    columns: int = 0


class _RoutedLayer(CacheLayerMixin):
    """A routable layer's place in the cache, as transformers sees it.

    It stores nothing: the attention function writes to the pages, because only there the route is known. `update`
    hands the new keys through.
    """

    is_sliding = False
    is_croppable = False
    # No `lazy_initialization` of ours allocates by itself: the pool is shared and sized by the route.
    supports_early_init = False

    def __init__(self, progress: _Progress) -> None:
        super().__init__()
        self._progress = progress

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # An int in current transformers, a position tensor in earlier releases of 5.
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self._progress.columns + length, 0

    def get_seq_length(self) -> int:
        return self._progress.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    # transformers resets and reorders layer by layer, and rows here share one table: FluxCache does all layers at once.

    def reset(self) -> None:
        raise NotImplementedError("reset the whole FluxCache, not one of its layers")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("reorder the whole FluxCache, not one of its layers")


#: What a model calls its cache, argument and output alike: from transformers 5.24 on, and before.
CACHE_KEYWORDS = ("cache", "past_key_values")


def cache_argument(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as the keyword argument that this model or decoder takes it by."""
    return {_keyword(type(module).forward): cache}


@functools.cache
def _keyword(forward: Callable[..., Any]) -> str:
    return CACHE_KEYWORDS[0 if CACHE_KEYWORDS[0] in inspect.signature(forward).parameters else 1]


class FluxCache(Cache):
    """Cache for an attached model; pass it as the model's `cache` argument, or let the model make one.

    Before transformers 5.24 the argument is called `past_key_values`, which later versions take, too.

    The route of each row is decided at its prefill and stays with the cache: a second turn on the same cache keeps
    it. To route a longer conversation anew, start from a new cache.

    Args:
        config: the adapter's configuration (sinks, window, block, modes).
        routable_layers: the model's layer indices that are routed, in order.
        num_layers: all attention layers of the model.
        layer_types: transformers' layer types, for the layers that are not routed.
        sliding_window: of those sliding layers.
        pool: pages to live in; None makes one that grows.
        max_row_tokens: longest row the page tables are made for; None grows them.
        devices: of each routable layer, where a model lies on several; None = one device.

    Raises:
        ValueError: a `pool` for layers on several devices: it lies on one.
    """

    def __init__(
        self,
        config: FluxConfig,
        routable_layers: Sequence[int],
        num_layers: int,
        *,
        layer_types: Sequence[str] | None = None,
        sliding_window: int | None = None,
        pool: PagePool | None = None,
        max_row_tokens: int | None = None,
        devices: Sequence[torch.device] | None = None,
    ) -> None:
        self._progress = _Progress()
        layers: list[CacheLayerMixin] = []
        for index in range(num_layers):
            if index in routable_layers:
                layers.append(_RoutedLayer(self._progress))
            elif layer_types is not None and layer_types[index] == "sliding_attention":
                layers.append(DynamicSlidingWindowLayer(sliding_window=sliding_window))
            else:
                layers.append(DynamicLayer())
        super().__init__(layers=layers)
        self.flux_config = config
        self.num_routable = len(routable_layers)
        self._devices = tuple(devices) if devices is not None and len(set(devices)) > 1 else None
        self._device = devices[0] if devices else None
        if self._devices is not None and pool is not None:
            raise ValueError("the layers lie on several devices: a pool lies on one, so pass none")
        self.pool = pool
        """Of the first routable layer's device."""
        self._pools: dict[torch.device, PagePool] = {}
        """By device, where there are several."""
        self.page_tokens = config.block_tokens
        self._max_row_tokens = max_row_tokens
        self.headroom = 0
        """Tokens a row to make sure of together with the prompt, so that they cannot run out half way."""
        self.is_broken = False
        """Whether a pass failed half way and took the rows with it (`fail`)."""
        self._forget()

    def _forget(self) -> None:
        self.route: Route | None = None
        self.seen_tokens = 0
        self.lengths: list[int] = []
        """Real tokens per row."""
        self._pages: list[list[list[int]]] = []
        self._published: list[list[list[int]]] = []
        """The pages of each layer and row as the device's table has them."""
        self._dropped: list[list[int]] = []
        self._tables: dict[torch.device, Tables] = {}
        """By device: all layers' on each, they are small."""

    # ---------------------------------------------------------------- life of a row

    @property
    def seen_tokens(self) -> int:
        """Columns fed so far, padding included: what transformers calls the sequence length."""
        return self._progress.columns

    @seen_tokens.setter
    def seen_tokens(self, columns: int) -> None:
        self._progress.columns = columns

    @property
    def is_empty(self) -> bool:
        return self.seen_tokens == 0

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def page_table(self) -> Tensor:
        """The first device's `Tables.pages`."""
        return next(iter(self._tables.values())).pages

    @property
    def key_counts(self) -> Tensor:
        """The first device's `Tables.counts`."""
        return next(iter(self._tables.values())).counts

    def pool_of(self, layer: int) -> PagePool:
        """The pages of a routable layer."""
        pool = self.pool if self._devices is None else self._pools[self._devices[layer]]
        assert pool is not None
        return pool

    def tables_of(self, layer: int) -> Tables:
        """The tables on a routable layer's device."""
        return next(iter(self._tables.values())) if self._devices is None else self._tables[self._devices[layer]]

    def use_pools(self, pools: dict[torch.device, PagePool]) -> None:
        """Live in these pools, one for each device that a routable layer lies on."""
        if self._devices is not None:
            self._pools = pools
        self.pool = next(iter(pools.values())) if self._devices is None else pools[self._devices[0]]

    @property
    def _every_pool(self) -> list[PagePool]:
        return list(self._pools.values()) if self._pools else [] if self.pool is None else [self.pool]

    def begin(self, rows: int, route: Route, num_kv_heads: int, head_dim: int, like: Tensor) -> None:
        """Set up `rows` empty rows under `route`; `like` gives the dtype of the keys, and their device where the cache
        was not told.

        Raises:
            RuntimeError: the cache holds rows, or lost them in a pass that failed.
            ValueError: a pool of other pages, heads, dtype or device than the cache's.
        """
        self.check_usable()
        if not self.is_empty or self.lengths:
            raise RuntimeError("this cache already holds rows; make a new one or clear() it")
        every = dict.fromkeys(self._devices or (self._device or like.device,))
        shape = self.page_tokens, num_kv_heads, head_dim
        if self.pool is None:
            self.use_pools({device: PagePool(*shape, like.dtype, device) for device in every})
        assert self.pool is not None
        for device, pool in zip(every, [self._pools[d] for d in every] if self._pools else [self.pool], strict=True):
            pool.check(*shape, like.dtype, device)
        self.set_route(route)
        self.lengths = [0] * rows
        self._pages = [[[] for _ in range(rows)] for _ in range(self.num_routable)]
        self._published = [[[] for _ in range(rows)] for _ in range(self.num_routable)]
        self._dropped = [[0] * rows for _ in range(self.num_routable)]
        width = 1 if self._max_row_tokens is None else -(-self._max_row_tokens // self.page_tokens)
        for device in dict.fromkeys(self._devices or (self.pool.keys.device,)):
            pages = torch.zeros(self.num_routable, rows, width, dtype=torch.int32, device=device)
            self._tables[device] = Tables(pages, torch.zeros_like(pages[..., 0]))

    def set_route(self, route: Route) -> None:
        self.route = route

    def drops_keys(self, layer: int, row: int) -> bool:
        """Whether this layer of this row keeps sinks and window only."""
        assert self.route is not None
        return REGISTRY[self.flux_config.sparse_mode].drops_keys and not bool(self.route.use_full[layer, row])

    def clear(self) -> None:
        """Give every page back and forget the rows and their route."""
        if self.pool is not None:
            for layer_index, rows in enumerate(self._pages):
                for pages in rows:
                    self.pool_of(layer_index).release(pages)
        for layer in self.layers:
            if not isinstance(layer, _RoutedLayer):
                layer.reset()
        self.is_broken = False
        self._forget()

    reset = clear

    def fail(self) -> None:
        """A pass stored its tokens in some layers only: give the pages back, and refuse to go on until `clear`.

        Rows that held nothing before that pass have lost nothing, so their cache is merely empty again.
        """
        lost = any(self.lengths)
        self.clear()
        self.is_broken = lost

    def check_usable(self) -> None:
        """Raise RuntimeError after `fail`: going on would answer without what the cache held."""
        if self.is_broken:
            raise RuntimeError(
                "a pass on this cache failed half way, and what it held is lost; clear() it or start from "
                "controller.new_cache(), and feed the conversation from its beginning"
            )

    # ---------------------------------------------------------------- what is kept

    def _kept_from(self, length: int) -> int:
        """First position after the sinks that a streaming row of `length` tokens still needs for its next query."""
        config = self.flux_config
        block = config.block_tokens
        return max(config.sink_tokens, length // block * block - config.window_tokens)

    def gap(self, layer: int, row: int) -> int:
        """Positions missing between the sinks and the rest of this row's keys."""
        return self._dropped[layer][row] * self.page_tokens

    def keys_held(self, layer: int, row: int) -> int:
        return self.lengths[row] - self.gap(layer, row)

    def pages_needed(self, layer: int, row: int, tokens: int) -> int:
        """Most pages this layer of this row holds on its way to `tokens` more tokens.

        A streaming row that ends with a page holds one page less than just before, so its end alone is no measure.
        """
        total = -(-(self.lengths[row] + tokens) // self.page_tokens)
        return min(total, streaming_pages(self.flux_config)) if self.drops_keys(layer, row) else total

    def reserve(self, tokens: Sequence[int]) -> None:
        """Check that `tokens[row]` more tokens fit, before any work; else `PoolExhaustedError`, and nothing changed."""
        for pool in self._every_pool:
            if pool.max_pages is None:
                continue
            need = sum(
                max(0, self.pages_needed(layer, row, n) - len(self._pages[layer][row]))
                for layer in range(self.num_routable)
                if self.pool_of(layer) is pool
                for row, n in enumerate(tokens)
            )
            pool.require(need)

    # ---------------------------------------------------------------- prefill

    def gather(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """This row's cached keys and values in table order, `[n, Hk, D]` each."""
        held, pool = self.keys_held(layer, row), self.pool_of(layer)
        pages = _upload(self._pages[layer][row], torch.long, pool.keys.device)
        keys, values = pool.keys[pages], pool.values[pages]
        return keys.flatten(0, 1)[:held], values.flatten(0, 1)[:held]

    def append(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Store a row's next tokens, `[n, Hk, D]`, and drop what the route no longer needs.

        `lengths` moves on in `advance`, after all layers; a layer written twice before that is overwritten.
        """
        pool, page, start = self.pool_of(layer), self.page_tokens, self.lengths[row]
        end = start + keys.shape[0]
        pages = self._pages[layer][row]
        dropped = self._dropped[layer][row]
        sinks = self.flux_config.sink_tokens
        if self.drops_keys(layer, row):
            kept_from = self._kept_from(end)
            dropped = self._drop_before(layer, row, kept_from)
            # Of the new tokens, those between the sinks and the window are never stored.
            spans = [(start, min(end, sinks)), (max(start, kept_from), end)]
        else:
            spans = [(start, end)]
        total = -(-end // page) - dropped
        if total > len(pages):
            pages.extend(pool.allocate(total - len(pages)))
        for first, last in spans:
            if first >= last:
                continue
            slots = self._slots(pages, first, last, sinks, dropped, pool.keys.device)
            # Detached, as in `append_token`.
            pool.keys.flatten(0, 1)[slots] = keys[first - start : last - start].detach()
            pool.values.flatten(0, 1)[slots] = values[first - start : last - start].detach()
        lengths = self.lengths.copy()
        lengths[row] = end
        self._publish([(layer, row)], lengths)

    def _drop_before(self, layer: int, row: int, kept_from: int) -> int:
        """Give back the pages between the sinks and position `kept_from`; returns the pages this row has dropped."""
        pages, first = self._pages[layer][row], self.flux_config.sink_tokens // self.page_tokens
        drop_to = (kept_from - self.flux_config.sink_tokens) // self.page_tokens
        # A chunk longer than the window drops positions that were never stored: fewer pages go than positions.
        gone = pages[first : first + drop_to - self._dropped[layer][row]]
        del pages[first : first + len(gone)]
        self.pool_of(layer).release(gone)
        self._dropped[layer][row] = drop_to
        return drop_to

    def _slots(self, pages: list[int], first: int, last: int, sinks: int, dropped: int, device: torch.device) -> Tensor:
        """Flat slots of positions `first … last` (all on one side of the gap)."""
        page = self.page_tokens
        shift = dropped * page if first >= sinks else 0
        ids = _upload(pages, torch.long, device)
        position = torch.arange(first - shift, last - shift, device=device)
        return ids[position // page] * page + position % page

    def _publish(self, changed: Sequence[tuple[int, int]], lengths: Sequence[int]) -> None:
        """Bring the device's page tables and key counts in line with the host's, for (layer, row) pairs.

        `lengths[row]` tokens, dropped ones included. A few copies to the device whatever the number of pairs.
        """
        widest = max(len(self._pages[layer][row]) for layer, row in changed)
        if widest > self.page_table.shape[2]:
            for tables in self._tables.values():
                wider = tables.pages.new_zeros(*tables.pages.shape[:2], widest + widest // 4 + 1)
                wider[..., : tables.pages.shape[2]] = tables.pages
                tables.pages = wider
        rows, width = self.page_table.shape[1:]
        slots: list[int] = []
        pages: list[int] = []
        counts: list[int] = []
        for layer, row in changed:
            held, known = self._pages[layer][row], self._published[layer][row]
            # A row that keeps everything only gains pages: what the device has stays as it is.
            same = len(known) if held[: len(known)] == known else 0
            first = (layer * rows + row) * width
            slots += range(first + same, first + len(held))
            pages += held[same:]
            counts.append(lengths[row] - self._dropped[layer][row] * self.page_tokens)
            self._published[layer][row] = held.copy()
        at = [layer * rows + row for layer, row in changed]
        for device, tables in self._tables.items():
            if slots:
                tables.pages.view(-1)[_upload(slots, torch.long, device)] = _upload(pages, torch.int32, device)
            tables.counts.view(-1)[_upload(at, torch.long, device)] = _upload(counts, torch.int32, device)

    # ---------------------------------------------------------------- decode

    def plan_decode(self) -> None:
        """Host side of a decode step: every row gets room for one more token, pages that fell out are given back.

        Touches the device only for the rows that begin a page, so most steps cost nothing.
        """
        page = self.page_tokens
        starting = [row for row, length in enumerate(self.lengths) if length % page == 0]
        if not starting:
            return
        self.reserve([1] * self.num_rows)
        for layer in range(self.num_routable):
            for row in starting:
                length, pages = self.lengths[row], self._pages[layer][row]
                if self.drops_keys(layer, row):
                    self._drop_before(layer, row, self._kept_from(length))
                if len(pages) * page <= length - self._dropped[layer][row] * page:
                    pages.extend(self.pool_of(layer).allocate(1))
        self._publish([(layer, row) for layer in range(self.num_routable) for row in starting], self.lengths)

    def decode_table(self, layer: int) -> Tensor:
        """This layer's page table, int32 `[B, pages]`, as wide as its longest row can need."""
        return self.tables_of(layer).pages[layer][:, : self._width(layer)]

    def _width(self, layer: int) -> int:
        """Pages that the longest row of this layer can hold: a layer that is sparse in every row needs few."""
        if not all(self.drops_keys(layer, row) for row in range(self.num_rows)):
            return self.page_table.shape[2]
        return min(self.page_table.shape[2], streaming_pages(self.flux_config))

    def advance(self, columns: int, tokens: Sequence[int], *, decoded: bool) -> None:
        """All layers have stored `tokens[row]` tokens out of `columns` columns."""
        self.seen_tokens += columns
        self.lengths = [length + n for length, n in zip(self.lengths, tokens, strict=True)]
        if decoded:
            for tables in self._tables.values():
                tables.counts += 1

    def retract(self) -> None:
        """Take the last decoded token of every row back. Exact for one token: the next one, at its position, needs no
        page that was given back for it. Raises ValueError where layers are not routed: they have dropped keys.
        """
        if any(not isinstance(layer, _RoutedLayer) for layer in self.layers):
            raise ValueError("layers that are not routed cannot take a token back")
        self.seen_tokens -= 1
        self.lengths = [length - 1 for length in self.lengths]
        for tables in self._tables.values():
            tables.counts -= 1

    # ---------------------------------------------------------------- what transformers asks for

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become the rows `beam_idx` of before; a row chosen twice gets pages of its own."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        source = [int(i) for i in indices.tolist()]
        for layer in self.layers:
            if not isinstance(layer, _RoutedLayer):
                layer.batch_select_indices(indices) if hasattr(layer, "batch_select_indices") else None
        if self.pool is None or self.route is None:
            return
        again = [s for i, s in enumerate(source) if s in source[:i]]
        for pool in self._every_pool:
            of_pool = [rows for layer, rows in enumerate(self._pages) if self.pool_of(layer) is pool]
            pool.require(sum(len(rows[s]) for rows in of_pool for s in again))
        lengths = [self.lengths[s] for s in source]
        for layer_index, (rows, dropped) in enumerate(zip(self._pages, self._dropped, strict=True)):
            pool = self.pool_of(layer_index)
            taken: set[int] = set()
            new_rows: list[list[int]] = []
            for s in source:
                if s in taken:
                    copy = pool.allocate(len(rows[s]))
                    pool.keys[copy] = pool.keys[rows[s]]
                    pool.values[copy] = pool.values[rows[s]]
                    new_rows.append(copy)
                else:
                    taken.add(s)
                    new_rows.append(rows[s])
            for s, pages in enumerate(rows):
                if s not in taken:
                    pool.release(pages)
            rows[:] = new_rows
            dropped[:] = [dropped[s] for s in source]
        self.lengths = lengths
        self.route = self.route.select(source)
        shape = (self.num_routable, len(source), self.page_table.shape[2])
        for tables in self._tables.values():
            tables.pages, tables.counts = tables.pages.new_zeros(shape), tables.counts.new_zeros(shape[:2])
        self._published = [[[] for _ in source] for _ in range(self.num_routable)]
        every = [(layer, row) for layer in range(self.num_routable) for row in range(len(source))]
        if every:
            self._publish(every, lengths)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.num_rows).repeat_interleave(repeats))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "FluxCache cannot be cropped: sparse layers have given the pages before the window back. Assisted "
            "decoding needs a croppable cache; detach() the model for it."
        )

    # ---------------------------------------------------------------- report

    def memory(self) -> MemoryReport:
        """Bytes held by the routable layers, against a dense cache in the same pages."""
        if self.pool is None:
            return MemoryReport(0, 0, 0, 0)
        held = sum(len(pages) for rows in self._pages for pages in rows)
        dense = self.num_routable * sum(-(-length // self.page_tokens) for length in self.lengths)
        size, every = self.pool.page_bytes, self._every_pool
        free, total = sum(pool.free_pages for pool in every), sum(pool.num_pages for pool in every)
        return MemoryReport(held * size, dense * size, free, total)


def _upload(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return upload(torch.tensor(values, dtype=dtype), device)
