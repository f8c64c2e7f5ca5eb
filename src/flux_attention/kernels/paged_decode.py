"""Decode attention over paged keys: one query token per row, each row with its own page table and length.

Shapes as in `flux_attention.kernels.api.paged_decode`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_attention.kernels.capture import capture


@dataclass(frozen=True)
class DecodeConfig:
    """Launch configuration of the triton decode kernel.

    `split` tokens a program (a multiple of `block`), `block` tokens a tile, `warps` and pipeline `stages`.
    """

    split: int
    block: int
    warps: int
    stages: int


#: A short row of a mixed batch, where `tune` makes one up, has at most this fraction of the longest: sinks and window.
_SHORT = 16

#: Tuned configurations by `_key` of a call; `tune` fills it.
_TUNED: dict[tuple[object, ...], DecodeConfig] = {}


def paged_decode_sdpa(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """`api.paged_decode` in plain torch. On CUDA it gathers `max_pages` for every row rather than synchronise."""
    if out is None:
        out = torch.empty_like(q)
    if q.device.type != "cpu":
        return _gathered(q, k_pages, v_pages, page_table, lengths, scale, out)
    _, hq, dim = q.shape
    page, hk = k_pages.shape[1:3]
    for s, n in enumerate(lengths.tolist()):
        if n == 0:
            out[s] = 0
            continue
        index = page_table[s, : -(-n // page)]
        k, v = _rows(k_pages, index, n), _rows(v_pages, index, n)
        # The heads of a group as queries of one head: keys are read once a group, which `enable_gqa` does not do.
        grouped = q[s].view(1, hk, hq // hk, dim)
        found = F.scaled_dot_product_attention(grouped, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scale)
        out[s] = found.reshape(hq, dim)
    return out


def _rows(pages: Tensor, index: Tensor, n: int) -> Tensor:
    """The first n tokens `[n, Hk, D]` of the pages in `index`; a view when the pages lie side by side."""
    ids = index.tolist()
    if ids == list(range(ids[0], ids[0] + len(ids))):
        return pages[ids[0] : ids[0] + len(ids)].flatten(0, 1)[:n]
    return pages.index_select(0, index).flatten(0, 1)[:n]


def _gathered(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, scale: float, out: Tensor
) -> Tensor:
    rows, hq, dim = q.shape
    page, hk = k_pages.shape[1:3]
    max_tokens = page_table.shape[1] * page
    token = torch.arange(max_tokens, device=q.device)
    seen = token < lengths[:, None]
    # Entries past a row's length may hold anything; page 0 is as good as another once masked.
    table = page_table.where(seen[:, ::page], 0).long()
    hidden = ~seen[:, :, None, None]
    # Masked scores do not hide NaN in unused memory, so the memory itself is blanked.
    k = k_pages[table].view(rows, max_tokens, hk, dim).masked_fill(hidden, 0)
    v = v_pages[table].view(rows, max_tokens, hk, dim).masked_fill(hidden, 0)
    scores = torch.einsum("shgd,sthd->shgt", q.view(rows, hk, -1, dim), k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    # A row of length 0 has nothing to normalise: its NaN weights become zeros.
    weights = scores.softmax(-1).nan_to_num(0.0).to(q.dtype) if max_tokens else scores.to(q.dtype)
    out.copy_(torch.einsum("shgt,sthd->shgd", weights, v).reshape(rows, hq, dim))
    return out


def paged_decode_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """`api.paged_decode` by split-KV triton kernels: no host sync, capturable in a CUDA graph.

    `config` defaults to what `tune` found for these shapes, else to a heuristic. Raises ValueError when the head dim
    of a tensor is not contiguous.
    """
    import triton

    from flux_attention.kernels import paged_decode_triton as kernels

    for name, t in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages), ("page_table", page_table), ("out", out)):
        if t is not None and t.numel() and t.stride(-1) != 1:
            raise ValueError(f"paged_decode: {name}'s last dimension must be contiguous, got strides {t.stride()}")
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows, hq, dim = q.shape
    page, hk = k_pages.shape[1:3]
    group = hq // hk
    max_tokens = page_table.shape[1] * page
    if rows == 0:
        return out
    if config is None:
        config = _TUNED.get(_key(q, k_pages, page_table)) or heuristic(q, k_pages, page_table)
    n_splits = max(1, triton.cdiv(max_tokens, config.split))
    part = torch.empty(rows, hk, n_splits, group, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(rows, hk, n_splits, group, dtype=torch.float32, device=q.device)
    kernels.decode_kernel[(n_splits, hk, rows)](
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        part,
        lse,
        scale,
        q.stride(0),
        q.stride(1),
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        page_table.stride(0),
        n_splits,
        config.split,
        GROUP=group,
        # The tensor cores' smallest tile has 16 rows.
        ROWS=max(16, triton.next_power_of_2(group)),
        D=dim,
        PAGE=page,
        BLOCK=config.block,
        STAGES=config.stages,
        PRECISION="ieee",
        num_warps=config.warps,
    )
    kernels.combine_kernel[(rows, hq, max(1, dim // 64))](
        part,
        lse,
        lengths,
        out,
        n_splits,
        config.split,
        out.stride(0),
        out.stride(1),
        GROUP=group,
        D=dim,
        BLOCK=32,
        BLOCK_D=min(64, dim),
        num_warps=4,
    )
    return out


def _key(q: Tensor, k_pages: Tensor, page_table: Tensor) -> tuple[object, ...]:
    """Rows and widths up to the next power of two: requests of about one size share a configuration."""
    rows, width = (1 << (n - 1).bit_length() for n in page_table.shape)
    return (q.device, q.dtype, *q.shape[1:], *k_pages.shape[1:], rows, width)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def heuristic(q: Tensor, k_pages: Tensor, page_table: Tensor) -> DecodeConfig:
    """Configuration from the shapes alone: about eight programs a multiprocessor, of 256 to 1,024 tokens each."""
    page, hk, dim = k_pages.shape[1:]
    tokens = q.shape[0] * hk * page_table.shape[1] * page
    split = 256
    while split < 1024 and tokens > split * 8 * _processors(q.device):
        split *= 2
    block = 64 if dim <= 128 and q.element_size() <= 2 else 32
    return DecodeConfig(split, block, warps=4, stages=3)


def candidates(q: Tensor) -> list[DecodeConfig]:
    """The configurations that `tune` tries. Splits cost no compilation, the rest about a second each."""
    wide = q.shape[-1] > 128 or q.element_size() > 2
    kernels = ((32, 4, 2), (32, 4, 3)) if wide else ((64, 4, 3), (64, 8, 3), (128, 4, 2), (128, 8, 3))
    return [DecodeConfig(split, *kernel) for split in (256, 512, 1024, 2048, 4096) for kernel in kernels]


def tune(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    configs: Iterable[DecodeConfig] | None = None,
    repeats: int = 10,
) -> DecodeConfig:
    """Time the candidates on these tensors and keep the best for every later call of about the same shapes.

    Rows of different routes share a launch, so candidates are judged on the lengths given and on the same with every
    other row short: programs that take long stretches suit equal rows and leave a mixed batch waiting for its last.
    CUDA only, and not while a graph is being captured. Lengths should be those of real use; the result is kept for
    heads, head dim, page and dtype, and for rows and `max_pages` up to the next power of two. Shapes that were tuned
    before are not timed again, unless `configs` are given. Raises RuntimeError when no candidate runs.
    """
    from triton.runtime.errors import OutOfResources

    key = _key(q, k_pages, page_table)
    if configs is None and key in _TUNED:
        return _TUNED[key]
    out = torch.empty_like(q)
    mixes = [lengths]
    if q.shape[0] > 1:
        mixes.append(lengths.clone())
        mixes[1][1::2].clamp_(max=page_table.shape[1] * k_pages.shape[1] // _SHORT)
    decode = functools.partial(paged_decode_triton, q, k_pages, v_pages, page_table, scale=scale, out=out)
    found: dict[DecodeConfig, list[float]] = {}
    for config in configs if configs is not None else candidates(q):
        try:
            runs = [functools.partial(decode, some, config=config) for some in mixes]
            found[config] = [_elapsed(run, q.device, repeats) for run in runs]
        except OutOfResources:
            continue
    if not found:
        raise RuntimeError(f"paged_decode: no launch configuration fits the device for shapes {key}")
    best = [min(times) for times in zip(*found.values(), strict=True)]
    _TUNED[key] = min(found, key=lambda config: sum(t / b for t, b in zip(found[config], best, strict=True)))
    return _TUNED[key]


def _elapsed(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Milliseconds of a run on the device."""
    for _ in range(2):
        run()
    # A graph, as in use: the host's launch cost would otherwise hide the differences.
    graph = capture(lambda: [run() for _ in range(repeats)], device)
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats
