"""Generation with the route decided first: packed, chunked prefill and CUDA-graph decode.

`transformers`' own `generate` works on an attached model too; this is the fast path. What it adds: the route (and so
the KV memory) is known before the first key is computed, prompts of different lengths are packed without padding,
long prompts are prefilled in chunks, and a decode step on a GPU is one graph replay without a host round trip.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flux_attention.cache import FluxCache, MemoryReport, PagePool, cache_argument, streaming_pages
from flux_attention.kernels import paged_decode
from flux_attention.kernels.capture import capture
from flux_attention.models.attach import attached
from flux_attention.models.controller import FluxAttention
from flux_attention.models.layout import Layout
from flux_attention.modes import REGISTRY
from flux_attention.route import Fixed, PolicyContext, Route

TokenCallback = Callable[[int, int], None]
"""Called with (row, token id) for every token as it becomes known."""


@dataclass
class Generation:
    """What `generate` returns.

    Attributes:
        tokens: the new token ids of each row, its end-of-sequence token included.
        route: of the rows.
        memory: of the cache at the end of prefill.
        route_seconds, prefill_seconds, decode_seconds: wall clock of the three phases.
        cache: holds prompts and answers; `clear()` it to give a `pool`'s pages back. Of one sequence, on a model whose
            attention layers are all routed, it can be passed on for a second turn: it holds the first
            `cache.lengths[0]` tokens of prompt and answer, so that turn begins with the rest, if any (the answer's last
            token, from which nothing was predicted). Of a batch, rows that ended before others hold more than their
            answers.
    """

    tokens: list[list[int]]
    route: Route
    memory: MemoryReport
    route_seconds: float
    prefill_seconds: float
    decode_seconds: float
    cache: FluxCache = field(repr=False)


def _chunks(lengths: Sequence[int], budget: int, block: int) -> Iterator[list[tuple[int, int, int]]]:
    """Pack prompts into passes of at most `budget` tokens: lists of (row, first token, tokens).

    A prompt is cut at block boundaries only: there a chunk's sparse attention equals the whole prompt's.
    """
    budget = max(block, budget // block * block)
    batch: list[tuple[int, int, int]] = []
    room = budget
    for row, length in enumerate(lengths):
        done = 0
        while done < length:
            take = min(length - done, room)
            if take < length - done:
                take = take // block * block
            if take == 0:
                yield batch
                batch, room = [], budget
                continue
            batch.append((row, done, take))
            done, room = done + take, room - take
            if room == 0:
                yield batch
                batch, room = [], budget
    if batch:
        yield batch


def _processors(config: GenerationConfig) -> LogitsProcessorList:
    """The warpers that a GenerationConfig asks for, in transformers' order."""
    found = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.do_sample:
        if config.temperature not in (None, 1.0):
            found.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k not in (None, 0):
            found.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            found.append(TopPLogitsWarper(config.top_p))
        if getattr(config, "min_p", None) is not None:
            found.append(MinPLogitsWarper(config.min_p))
    return found


#: transformers' default where neither the request nor the model sets it.
_TOP_K = 50
_NEW_TOKENS = 20

#: Options that `generate` reads.
_READ = {
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "eos_token_id",
}
#: Options that change no token: names of padding, what transformers returns and how it computes, and parameters of
#: strategies that are off unless an option that is refused turns them on.
_MOOT = {
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "return_dict_in_generate",
    "renormalize_logits",
    "use_cache",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "low_memory",
    "continuous_batching_config",
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "num_beam_groups",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "transformers_version",
}
#: Options that transformers reads only where it samples.
_SAMPLING = {"typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
#: What options that are not supported may be set to, because it is to leave them off; None is so everywhere.
_OFF: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    # What some models name for their own generate: a FluxCache takes the place of either.
    "cache_implementation": ("dynamic", "hybrid"),
}


def _merged(model: PreTrainedModel, given: GenerationConfig | None) -> GenerationConfig:
    """The request's options, those it leaves unset (None) filled from the model's, as transformers' generate does."""
    config = copy.deepcopy(given) if given is not None else GenerationConfig()
    for name, value in vars(model.generation_config).items():
        if not name.startswith("_") and getattr(config, name, None) is None:
            setattr(config, name, value)
    if config.top_k is None:
        config.top_k = _TOP_K
    return config


def _check_config(config: GenerationConfig) -> None:
    """Raise ValueError for an option that would change the answer and is not supported."""
    for name, default in vars(GenerationConfig()).items():
        value = getattr(config, name, None)
        if name.startswith("_") or name in _READ or name in _MOOT or value is None or value is False:
            continue
        if name in _SAMPLING and not config.do_sample:
            continue
        is_empty = isinstance(value, (list, tuple, dict, set, str)) and not value
        if is_empty or value == default or value in _OFF.get(name, ()):
            continue
        instead = "pass chunk_tokens" if name == "prefill_chunk_size" else "use the attached model's own generate()"
        raise ValueError(f"{name}={value!r} is not supported here; {instead} for it")


def _limit(config: GenerationConfig, max_new_tokens: int | None, longest: int) -> int:
    """New tokens a row: the argument, else the config's max_new_tokens, else what max_length leaves."""
    limit = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    if limit is None:
        # Of 20, transformers cannot tell whether it was set, and takes it for its own default: 20 new tokens.
        unset = config.max_length is None or config.max_length == _NEW_TOKENS
        limit = _NEW_TOKENS if unset else config.max_length - longest
        if limit < 1:
            raise ValueError(f"max_length={config.max_length} leaves no new token after a prompt of {longest} tokens")
    if limit < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {limit}")
    return limit


#: Answers this long pay for timing launch configurations, once for each size of request.
_TUNED_FROM = 64


@torch.no_grad()
def tune(controller: FluxAttention, cache: FluxCache) -> None:
    """Find the fastest launch configurations for decoding the rows of a filled cache; CUDA only.

    Results are kept for the process, by sizes up to the next power of two: a second request of about the same size
    costs nothing here.
    """
    assert cache.pool is not None
    backbone = controller.config.backbone
    assert backbone is not None
    pool, dim, widths = cache.pool, backbone.head_dim, set()
    q = torch.randn(cache.num_rows, backbone.num_attention_heads, dim, dtype=pool.keys.dtype, device=controller.device)
    for layer in range(len(controller.layers)):
        table = cache.decode_table(layer)
        if table.shape[1] not in widths:
            widths.add(table.shape[1])
            paged_decode.tune(q, pool.keys, pool.values, table, cache.key_counts[layer], scale=dim**-0.5)
    if controller.fusion is not None and cache.num_rows == 1:
        controller.fusion.tune()


class _Decoder:
    """One decode step for all rows; on CUDA a graph replay."""

    def __init__(self, controller: FluxAttention, cache: FluxCache, use_graph: bool) -> None:
        self.controller, self.cache = controller, cache
        rows, device = cache.num_rows, controller.device
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.tensor(cache.lengths, dtype=torch.long, device=device)[:, None]
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.use_graph = use_graph

    def _forward(self) -> Tensor:
        model = self.controller.model
        with self.controller.stepping(self.cache, Layout.decode(self.cache.lengths)):
            kept = cache_argument(model, self.cache)
            logits: Tensor = model(input_ids=self.ids, position_ids=self.positions, use_cache=True, **kept).logits
        return logits[:, -1]

    def _capture(self) -> None:
        def run() -> None:
            self.logits = self._forward()

        # A warm-up writes the token it is about to decode, which the first replay writes again.
        self.graph = capture(run, self.controller.device, warm_up=2)

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token per row, `[B]`; returns logits `[B, V]` of the next."""
        self.ids.copy_(tokens[:, None])
        self.cache.plan_decode()
        if not self.use_graph:
            self.logits = self._forward()
        else:
            if self.graph is None:
                self._capture()
            assert self.graph is not None
            self.graph.replay()
        self.positions += 1
        self.cache.advance(1, [1] * self.cache.num_rows, decoded=True)
        assert self.logits is not None
        return self.logits


def _prompts(input_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None) -> list[Tensor]:
    if isinstance(input_ids, Tensor):
        if input_ids.ndim == 1:
            input_ids = input_ids[None]
        if attention_mask is None:
            rows = list(input_ids)
        else:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask {list(attention_mask.shape)} does not match input_ids {list(input_ids.shape)}"
                )
            rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask goes with a padded tensor; a list of prompts has no padding")
        rows = [row.reshape(-1) for row in input_ids]
    if not rows:
        raise ValueError("there is no prompt")
    for i, row in enumerate(rows):
        if row.numel() == 0:
            raise ValueError(f"prompt {i} is empty")
    return rows


@torch.no_grad()
def prefill(
    controller: FluxAttention,
    prompts: Sequence[Tensor],
    cache: FluxCache,
    *,
    chunk_tokens: int,
    max_new_tokens: int = 0,
) -> Tensor:
    """Fill an empty cache, whose route is set, with prompts; returns the logits after each, `[B, V]`.

    `max_new_tokens` pages are accounted for as well, so that generation cannot run out half way.

    Raises:
        PoolExhaustedError: before any work, when the pool cannot hold the prompts and what is generated after them.
    """
    backbone = controller.config.backbone
    assert backbone is not None and cache.route is not None
    device = controller.device
    lengths = [prompt.numel() for prompt in prompts]
    like = next(controller.decoder.parameters())
    cache.begin(len(prompts), cache.route, controller.kv_heads, backbone.head_dim, like)
    last: list[Tensor | None] = [None] * len(prompts)
    try:
        cache.reserve([n + max_new_tokens for n in lengths])
        with controller.prompt_lengths(lengths):
            for batch in _chunks(lengths, chunk_tokens, controller.config.block_tokens):
                rows, firsts, counts = zip(*batch, strict=True)
                spans = [(f, f + n) for f, n in zip(firsts, counts, strict=True)]
                ids = torch.cat([prompts[r][a:b] for r, (a, b) in zip(rows, spans, strict=True)]).to(device)[None]
                positions = torch.cat([torch.arange(a, b) for a, b in spans]).to(device)[None]
                layout = Layout.pack(rows, counts, [cache.lengths[r] for r in rows])
                with controller.stepping(cache, layout):
                    kept = cache_argument(controller.decoder, cache)
                    hidden = controller.decoder(
                        input_ids=ids, position_ids=positions, use_cache=True, **kept
                    ).last_hidden_state[0]
                end = 0
                new = [0] * len(prompts)
                for r, (_, b), n in zip(rows, spans, counts, strict=True):
                    end += n
                    new[r] += n
                    if b == lengths[r]:
                        last[r] = hidden[end - 1]
                cache.advance(0, new, decoded=False)
        cache.seen_tokens = max(lengths)
    except BaseException:
        cache.clear()
        raise
    controller.last_route = cache.route
    states = torch.stack([state for state in last if state is not None])
    logits: Tensor = controller.model.get_output_embeddings()(states)
    # Of a model on several devices, the head may lie on the last one.
    return logits.to(device)


def _check_lengths(controller: FluxAttention, lengths: Sequence[int], max_new_tokens: int) -> None:
    limit = getattr(controller.decoder.config, "max_position_embeddings", None)
    for i, n in enumerate(lengths):
        if limit is not None and n + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {n} tokens, with {max_new_tokens} new ones over the model's context of {limit}"
            )


_P = ParamSpec("_P")


def _on_the_models_device(run: Callable[_P, Generation]) -> Callable[_P, Generation]:
    """Kernels are launched on the current device and events recorded there, wherever their tensors lie."""

    @functools.wraps(run)
    def on_device(*args: _P.args, **kwargs: _P.kwargs) -> Generation:
        model = args[0] if args else kwargs["model"]
        assert isinstance(model, torch.nn.Module)
        controller = attached(model)
        with controller.on(controller.device):
            return run(*args, **kwargs)

    return on_device


@_on_the_models_device
@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    max_new_tokens: int | None = None,
    route: Route | None = None,
    pool: PagePool | None = None,
    chunk_tokens: int = 32768,
    cuda_graph: bool | None = None,
    tuned: bool | None = None,
    on_token: TokenCallback | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Answer prompts with routed attention.

    Args:
        model: an attached causal LM (`attach`).
        input_ids: int64 `[B, T]` with `attention_mask` for padding, or a list of unpadded prompts.
        generation_config: sampling and stopping. Options it leaves unset (None) are the model's, then transformers'
            defaults, as in transformers' generate; `eos_token_id=[]` never stops.
        max_new_tokens: overrides the config's.
        route: of the rows; None asks the controller's policy (the router).
        pool: KV pages to live in, given back if this raises; None allocates exactly what the request needs.
        chunk_tokens: tokens of one prefill pass; bounds the activations, not the result.
        cuda_graph: replay decode steps as a graph; None = on CUDA, where the model lies on one device as a whole.
        tuned: time launch configurations before decoding a new size of request (`tune`); None = where decode steps
            are replayed and at least 64 tokens may come.
        on_token: called with (row, token) as tokens become known (on CUDA one step late, so nothing waits).
        generator: of the sampling noise.

    A model may be spread over devices by a device map, or have its heads split over ranks by a `tp_plan`. All ranks
    then call this with the same prompts and get the same routes and tokens, drawn ones being the first rank's.

    Raises:
        ValueError: empty prompts, prompts over the model's context, options set to what is not supported, an inline
            router with a prompt longer than `chunk_tokens`, a pool made for another model.
        PoolExhaustedError: the pool cannot hold the request; nothing was computed.
    """
    controller = attached(model)
    config = _merged(model, generation_config)
    _check_config(config)
    if isinstance(input_ids, Tensor) and input_ids.ndim == 2 and input_ids.numel() and attention_mask is None:
        controller.check_padding(input_ids)
    prompts = _prompts(input_ids, attention_mask)
    lengths = [prompt.numel() for prompt in prompts]
    limit = _limit(config, max_new_tokens, max(lengths))
    _check_lengths(controller, lengths, limit)
    graph = _use_graph(controller, cuda_graph)
    if tuned and not graph:
        raise ValueError("tuned=True needs decode steps that are replayed as a CUDA graph")
    sync = torch.cuda.synchronize if controller.device.type == "cuda" else (lambda: None)

    started = time.perf_counter()
    inline = route is None and controller.policy is None and controller.config.router_input == "inline"
    hybrid = len(controller.layers) < controller.decoder.config.num_hidden_layers
    if inline and max(lengths) > chunk_tokens:
        raise ValueError(
            f"an inline router sees a prompt whole: {max(lengths)} tokens do not fit chunk_tokens={chunk_tokens}. "
            'Raise chunk_tokens, or route with router_input="probe"'
        )
    if route is None and not inline:
        route = controller.route(prompts)
    elif route is not None:
        route = Fixed(route)(PolicyContext(len(controller.layers), tuple(prompts)))
    sync()
    routed = time.perf_counter()

    cache = controller.new_cache(pool=pool, max_row_tokens=max(lengths) + limit)
    try:
        exact: dict[torch.device, PagePool] = {}
        if inline or hybrid:
            # Sliding layers keep transformers' own batched cache, and inline routing needs whole prompts: both take
            # one left-padded pass.
            logits = _padded_prefill(controller, prompts, cache, route, limit)
        else:
            assert route is not None
            cache.set_route(route)
            if pool is None:
                exact = _exact_pools(controller, route, [n + limit for n in lengths])
                cache.use_pools(exact)
            logits = prefill(controller, prompts, cache, chunk_tokens=chunk_tokens, max_new_tokens=limit)
        sync()
        prefilled = time.perf_counter()
        assert cache.route is not None
        memory, route = cache.memory(), cache.route

        if graph and (limit >= _TUNED_FROM if tuned is None else tuned):
            tune(controller, cache)
        tokens = _decode(controller, cache, prompts, logits, config, limit, graph, on_token, generator)
        sync()
    except BaseException:
        # The caller gets no cache to clear, and would lose these pages of their pool for good.
        cache.clear()
        raise
    for own in exact.values():
        # A second turn may need more than this request did; graphs that knew the pages' place are gone by now.
        own.max_pages = None
    return Generation(
        tokens,
        route,
        memory,
        route_seconds=routed - started,
        prefill_seconds=prefilled - routed,
        decode_seconds=time.perf_counter() - prefilled,
        cache=cache,
    )


def _exact_pools(controller: FluxAttention, route: Route, tokens: Sequence[int]) -> dict[torch.device, PagePool]:
    """Pools of just the pages that rows of `tokens` tokens hold under `route`: one a device, allocated once."""
    backbone, config = controller.config.backbone, controller.config
    assert backbone is not None
    page = config.block_tokens
    pages = dict.fromkeys(controller.layer_devices, 0)
    for row, n in enumerate(tokens):
        whole = -(-n // page)
        streaming = min(whole, streaming_pages(config))
        for layer, device in enumerate(controller.layer_devices):
            drops = REGISTRY[config.sparse_mode].drops_keys and not bool(route.use_full[layer, row])
            pages[device] += streaming if drops else whole
    dtype = next(controller.decoder.parameters()).dtype
    return {
        device: PagePool(page, controller.kv_heads, backbone.head_dim, dtype, device, max_pages=count)
        for device, count in pages.items()
    }


def _padded_prefill(
    controller: FluxAttention, prompts: Sequence[Tensor], cache: FluxCache, route: Route | None, max_new_tokens: int = 0
) -> Tensor:
    device = controller.device
    columns = max(p.numel() for p in prompts)
    ids = torch.zeros(len(prompts), columns, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, columns - prompt.numel() :] = prompt
        mask[row, columns - prompt.numel() :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    policy = controller.policy if route is None else Fixed(route)
    cache.headroom = max_new_tokens
    with controller.using(policy, controller.dial):
        kept = cache_argument(controller.decoder, cache)
        hidden = controller.decoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **kept
        ).last_hidden_state
    cache.headroom = 0
    logits: Tensor = controller.model.get_output_embeddings()(hidden[:, -1])
    return logits.to(device)


def _use_graph(controller: FluxAttention, wanted: bool | None) -> bool:
    routable = len(controller.layers) == controller.decoder.config.num_hidden_layers
    able = controller.device.type == "cuda" and routable and not controller.is_split
    if wanted and not able:
        raise ValueError(
            "cuda_graph=True needs a CUDA model whose attention layers are all routable, on one device as a whole"
        )
    return able if wanted is None else wanted


def _decode(
    controller: FluxAttention,
    cache: FluxCache,
    prompts: Sequence[Tensor],
    logits: Tensor,
    config: GenerationConfig,
    limit: int,
    cuda_graph: bool,
    on_token: TokenCallback | None,
    generator: torch.Generator | None,
) -> list[list[int]]:
    rows, device = len(prompts), controller.device
    on_cuda = device.type == "cuda"
    decoder = _Decoder(controller, cache, cuda_graph)
    processors = _processors(config)
    stop = config.eos_token_id
    stops = set() if stop is None else set(stop if isinstance(stop, list) else [stop])
    history = _left_pad(prompts, device) if processors else None
    found: list[list[int]] = [[] for _ in range(rows)]
    done = [False] * rows
    late = _late(device)
    pending: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def take(item: tuple[Tensor, torch.cuda.Event | None]) -> None:
        host, event = item
        if event is not None:
            event.synchronize()
        for row, token in enumerate(host.tolist()):
            if done[row]:
                continue
            found[row].append(token)
            if on_token is not None:
                on_token(row, token)
            done[row] = token in stops

    for step in range(limit):
        scores = processors(history, logits.float()) if processors else logits
        if config.do_sample:
            probabilities = scores.float().softmax(-1)
            # Ranks have generators of their own, and may draw differently.
            token = controller.ranks.from_first(torch.multinomial(probabilities, 1, generator=generator)[:, 0].clone())
        else:
            token = scores.argmax(-1)
        if history is not None:
            history = torch.cat((history, token[:, None]), 1)
        event: torch.cuda.Event | None = None
        host = token
        if on_cuda:
            host = torch.empty(rows, dtype=token.dtype, pin_memory=True)
            host.copy_(token, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        pending.append((host, event))
        # The last token is never fed: nothing is predicted from it.
        if step + 1 < limit:
            if not late:
                take(pending.pop())
            if all(done):
                break
            logits = decoder.step(token)
        # While the step runs: the device never waits for the host.
        while len(pending) > late:
            take(pending.pop(0))
        if all(done):
            break
    for item in pending:
        take(item)
    routable = len(controller.layers) == controller.decoder.config.num_hidden_layers
    if rows == 1 and routable and cache.lengths[0] > prompts[0].numel() + len(found[0]):
        # Looked at a step late, an answer's end has been followed by one token more.
        cache.retract()
    return found


def _late(device: torch.device) -> int:
    """How many steps after it was made a token is looked at: on CUDA one, so that the next step is under way."""
    return int(device.type == "cuda")


def _left_pad(prompts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Prompts as one tensor for logits processors; a short prompt repeats its first token on the left."""
    columns = max(p.numel() for p in prompts)
    return torch.stack([torch.cat((p[:1].expand(columns - p.numel()), p)).to(device) for p in prompts])
