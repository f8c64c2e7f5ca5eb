"""Routed attention on one model: what its hooks and its attention function do in a forward pass.

A pass runs under a `Step`, made before the decoder runs and dropped after it: where the sequences are (padding and
packing), the cache, and the route. Everything the attention function needs is in it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from flux_attention.cache import (
    CACHE_KEYWORDS,
    FluxCache,
    PagePool,
    PoolExhaustedError,
    append_token,
    cache_argument,
)
from flux_attention.config import FluxConfig
from flux_attention.kernels.api import paged_decode
from flux_attention.models.delta import AppliedDelta
from flux_attention.models.families import family_of, layer_devices, layer_types
from flux_attention.models.fuse import Fusion
from flux_attention.models.layout import Layout
from flux_attention.models.pooling import LayerPooling
from flux_attention.models.prefill import LayerPrefill
from flux_attention.models.probe import ProbeGraphs, pooled_ends, pooled_prompts
from flux_attention.models.ranks import HeadRanks
from flux_attention.models.step import SoftRouting, Step, host_decisions
from flux_attention.modes import Mode, make_mode
from flux_attention.route import Dial, HeadRoute, Policy, PolicyContext, Route
from flux_attention.router import LayerRouter, PoolPlan, gumbel_noise, straight_through_gate


class FluxAttention:
    """Routed attention on one model. Made by `attach`, ended by `detach`.

    A request is routed once, at the first pass on its cache, by the tokens of that pass. transformers'
    `generate(use_cache=False)` has no cache, so each of its steps is routed anew, and `generate(prefill_chunk_size=n)`
    routes on the first n tokens alone: nothing in that pass says that more follow. `flux_attention.generation` routes
    on the whole prompt whatever its `chunk_tokens`.

    Attributes:
        model: the attached transformers model.
        config: the adapter's configuration, its backbone filled in.
        router: the `LayerRouter`, float32, on the model's device.
        policy: what makes a request's route; None = the router.
        dial: range that a routed request's sparsity is held in.
        impl: kernel implementation of prefill attention, "auto" or a name of `kernels.api`.
        last_route: route of the last prefill.
        delta: weights of the backbone that the adapter replaced until `detach`; None where it replaced none.
        ranks: that share the model's heads, where it is split by a `tp_plan`.
        layer_devices: where each routable layer lies: several devices where a device map has spread them.

    Raises:
        ValueError: heads that do not divide among the ranks, layers that are offloaded.
    """

    def __init__(self, model: PreTrainedModel, config: FluxConfig, router: LayerRouter) -> None:
        self.model = model
        # transformers types a module's attributes as Tensor | Module; a decoder also has its config and layers.
        self.decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.family = family_of(self.decoder.config.model_type)
        self.config = config
        assert config.backbone is not None
        self.layers = config.backbone.routable_layers
        first = getattr(self.decoder.layers[self.layers[0]], self.family.attention)
        self.ranks = HeadRanks.of(first, self.family.query, config.backbone.num_key_value_heads)
        devices = layer_devices(self.decoder.layers)
        self.layer_devices = tuple(devices[index] for index in self.layers)
        self._on_several = len({*devices, self.device}) > 1
        self.router = router
        self.policy: Policy | None = None
        self.dial = Dial()
        self.impl = "auto"
        self.decode_impl = "auto"
        self.last_route: Route | None = None
        self.delta: AppliedDelta | None = None
        self.full_mode: Mode = make_mode(config.retrieval_mode, config)
        self.sparse_mode: Mode = make_mode(config.sparse_mode, config)
        self._step: Step | None = None
        self._soft: SoftRouting | None = None
        self._prompt_tokens: Sequence[int] | None = None
        self._preset: Step | None = None
        self.fusion: Fusion | None = None
        self.pooling = LayerPooling(self)
        self._probes = ProbeGraphs(self)
        self._handles: list[Any] = []
        self._modules: list[nn.Module] = []
        self._implementation: str = model.config._attn_implementation or "sdpa"
        self._parameters = list(inspect.signature(type(self.decoder).forward).parameters)[1:]

    # ------------------------------------------------------------------ what users call

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @property
    def kv_heads(self) -> int:
        """Key/value heads on this rank."""
        assert self.config.backbone is not None
        return self.config.backbone.num_key_value_heads // self.ranks.size

    @property
    def is_split(self) -> bool:
        """Whether the model lies on several devices, layer by layer or head by head."""
        return self._on_several or self.ranks.size > 1

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make a GPU the current one, on which kernels are launched, where it is not: of a model on another GPU, or of
        a layer, where they lie on several."""
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(device)

    def new_cache(self, *, pool: PagePool | None = None, max_row_tokens: int | None = None) -> FluxCache:
        """An empty cache for this model. Raises ValueError for a `pool` where layers lie on several devices."""
        config = self.decoder.config
        return FluxCache(
            self.config,
            self.layers,
            config.num_hidden_layers,
            layer_types=layer_types(config),
            sliding_window=getattr(config, "sliding_window", None),
            pool=pool,
            max_row_tokens=max_row_tokens,
            devices=self.layer_devices,
        )

    @contextmanager
    def using(self, policy: Policy | None = None, dial: Dial | None = None) -> Iterator[FluxAttention]:
        """Another policy (None = the router) and dial, for the requests that start inside the block."""
        before = self.policy, self.dial
        self.policy, self.dial = policy, dial or Dial()
        try:
            yield self
        finally:
            self.policy, self.dial = before

    @contextmanager
    def prompt_lengths(self, tokens: Sequence[int]) -> Iterator[None]:
        """Say how long the prompts are that the passes inside the block prefill in chunks.

        Triangle's dense queries are the *prompt's* last; without this, each pass counts as a whole prompt.
        """
        before, self._prompt_tokens = self._prompt_tokens, tokens
        try:
            yield
        finally:
            self._prompt_tokens = before

    @contextmanager
    def soft_routing(self, soft: SoftRouting) -> Iterator[SoftRouting]:
        """Training passes: both sides of every layer run, blended by differentiable gates. Needs `use_cache=False`."""
        before, self._soft = self._soft, soft
        try:
            yield soft
        finally:
            self._soft = before

    @torch.no_grad()
    def route(self, prompts: Sequence[Tensor]) -> Route:
        """Routes of prompts (int64 `[n]` each) by the current policy and dial, without prefilling them.

        Raises ValueError for an empty prompt, one over the model's context, and with an inline router, which needs the
        prefill itself.
        """
        prompts = [prompt.reshape(-1) for prompt in prompts]
        for i, prompt in enumerate(prompts):
            if prompt.numel() == 0:
                raise ValueError(f"prompt {i} is empty")
            self._check_context(prompt.numel())
        if self.policy is not None:
            return self.policy(PolicyContext(len(self.layers), tuple(p.cpu() for p in prompts)))
        if self.config.router_input == "inline":
            raise ValueError(
                'this adapter routes inline, while prefilling; run the model, or set router_input="probe" to route '
                "from the prompt's two ends alone"
            )
        routed = [p.numel() > self.config.min_routed_tokens for p in prompts]
        if not any(routed):
            return Route.full(len(self.layers), len(prompts))
        # Only prompts that can gain are probed, but every sequence keeps its column.
        probed = [p for p, r in zip(prompts, routed, strict=True) if r]
        with self.on(self.device):
            replayed = self._probes.p_full(probed)
            p_full = self.router.p_full(self.probe(probed)) if replayed is None else replayed
        found = Route.from_scores(p_full).with_dial(self.dial)
        if all(routed):
            return found
        full = Route.full(len(self.layers), len(prompts))
        order = torch.tensor(routed, dtype=torch.long).cumsum(0).sub(1).clamp_min(0)
        return found.select(order).where(routed, full)

    @torch.no_grad()
    def probe(self, prompts: Sequence[Tensor], *, by_head: bool = False) -> Tensor:
        """Every layer's pooled query from the prompts' two ends, float32 `[L, S, D]`; `by_head`: `[L, S, Hk, D]`.

        The backbone runs densely on the first and last `pool_tokens` tokens of each prompt, placed side by side:
        the cost does not grow with the prompt, and the route is known before prefill starts.
        """
        return pooled_ends(self, prompts, by_head)

    @torch.no_grad()
    def read(self, prompts: Sequence[Tensor], route: Route) -> Tensor:
        """Every layer's pooled query of whole prompts `[n]` under `route [L, S]`, float32 `[L, S, D]`.

        What a router that routes inline sees, if `route` is what it decides. Costs a prefill without the last layer.
        """
        return pooled_prompts(self, prompts, route)

    @contextmanager
    def stepping(self, cache: FluxCache, layout: Layout) -> Iterator[None]:
        """Run the decoder inside on `layout`, for callers that pack sequences themselves (`generation`).

        The cache must hold its rows and route already. Planning and advancing the cache stay with the caller, so the
        pass itself is device work only and can be captured in a CUDA graph.
        """
        assert cache.route is not None
        step = Step(layout, cache, cache.route.select(layout.slots))
        if self._prompt_tokens is None:
            step.prompt_ends = layout.ends
        else:
            step.prompt_ends = tuple(self._prompt_tokens[slot] for slot in layout.slots)
        self._preset = step
        try:
            yield
        finally:
            self._preset = self._step = None

    # ------------------------------------------------------------------ a pass of the decoder

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        left = self._step
        if left is not None and left is not self._preset and left.soft is None and not left.collect:
            # Hooks are skipped on KeyboardInterrupt: that pass never came to `_after_decoder`.
            self._step = None
            self._failed(left)
        if self._preset is not None:
            self._step = self._preset
            return None
        if self._step is not None and self._step.collect:
            return None
        kwargs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            return None  # the model's own error is the better one
        batch, columns = inputs.shape[:2]
        if columns == 0:
            raise ValueError("the prompt is empty (0 tokens)")
        cache = self._take_cache(kwargs)
        layout = self._soft.layout if self._soft is not None else None
        if layout is None:
            layout = Layout.of(batch, columns, kwargs.get("attention_mask"), kwargs.get("position_ids"), cache)
        self._check_context(max(layout.ends))
        if kwargs.get("attention_mask") is None and (cache is None or cache.is_empty):
            self.check_padding(kwargs.get("input_ids"))
        step = Step(layout, cache)
        if self._prompt_tokens is not None:
            step.prompt_ends = tuple(self._prompt_tokens)
        else:
            step.prompt_ends = layout.ends
        self._decide(step, kwargs)
        if cache is not None:
            if cache.is_empty:
                backbone = self.config.backbone
                assert backbone is not None
                like = next(self.decoder.parameters())
                like = like if inputs.dtype in (torch.int64, torch.int32) else inputs
                route = step.route or Route.full(len(self.layers), batch)
                cache.begin(batch, route, self.kv_heads, backbone.head_dim, like)
                try:
                    cache.reserve([n + cache.headroom for n in layout.counts])
                except PoolExhaustedError:
                    cache.clear()
                    raise
            elif layout.is_decode:
                cache.plan_decode()
            else:
                cache.reserve(layout.counts)
        # Set last: a refused request must leave no step behind.
        self._step = step
        return (), kwargs

    def _take_cache(self, kwargs: dict[str, Any]) -> FluxCache | None:
        """The FluxCache of this call, put in the place of the empty cache that transformers or the caller made.

        A caller who goes on to pass that cache gets the same FluxCache: they share their layers, so that it tells its
        length and transformers resets or crops neither unnoticed.
        """
        given = [kwargs.pop(name, None) for name in CACHE_KEYWORDS]
        cache = next((cache for cache in given if cache is not None), None)
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = bool(getattr(self.decoder.config, "use_cache", False)) and not self.decoder.training
            kwargs["use_cache"] = use_cache
        if self._soft is not None:
            if cache is not None:
                raise ValueError("training passes blend both sides of every layer and keep no cache: use_cache=False")
            kwargs["use_cache"] = False
            return None
        if cache is None and not use_cache:
            return None
        replaced = getattr(cache, "_flux_attention_cache", None)
        if replaced is not None:
            cache = replaced
        if isinstance(cache, FluxCache):
            cache.check_usable()
            kwargs |= cache_argument(self.decoder, cache)
            return cache
        if cache is not None and not (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0):
            state = "holds tokens" if isinstance(cache, DynamicCache) else "is of a fixed layout"
            raise ValueError(
                f"the cache is a {type(cache).__name__} that {state}; an attached model keeps its keys in a "
                "FluxCache. Pass none, or the FluxCache of an earlier call, and no cache_implementation"
            )
        made = self.new_cache()
        if cache is not None:
            cache.layers = made.layers
            cache._flux_attention_cache = made
        kwargs |= cache_argument(self.decoder, made)
        return made

    def _check_context(self, tokens: int) -> None:
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(f"{tokens} tokens exceed the model's context of {limit}")

    def check_padding(self, ids: Tensor | None) -> None:
        """Refuse a batch `[B, T]` without a mask that is padded: pad tokens would be routed and attended to as text.

        Raises ValueError, naming the pad token.
        """
        pad = getattr(self.decoder.config, "pad_token_id", None)
        if ids is None or pad is None or ids.shape[0] == 1:
            return
        ends = torch.cat((ids[:, 0], ids[:, -1]))
        if bool((ends == pad).any()):
            raise ValueError(
                f"the batch begins or ends with the padding token {pad} and has no attention_mask; pass the "
                "tokenizer's attention_mask"
            )

    def _decide(self, step: Step, kwargs: dict[str, Any]) -> None:
        """Give the step its route, or arrange for the layers to find it."""
        layers, layout = len(self.layers), step.layout
        sequences = len(layout.counts)
        if self._soft is not None:
            self._decide_soft(step, kwargs)
            return
        if step.cache is not None and not step.cache.is_empty:
            step.route = step.cache.route
            return
        if self.policy is None and self.config.router_input == "inline":
            short = [n <= self.config.min_routed_tokens for n in self._prompt_counts(layout)]
            if all(short):
                step.route = Route.full(layers, sequences)
            else:
                if not self.dial.is_open:
                    raise ValueError('a sparsity dial ranks all layers, so it needs a router_input of "probe"')
                step.inline = True
                step.keep_short_full = tuple(short)
                step.decisions = [None] * layers
                # On the host: it follows the first layer's queries to the device, which has begun by then.
                step.pool_plan = self._plan(layout, torch.device("cpu"))
                # Filled layer by layer.
                step.route = Route(torch.ones(layers, sequences, dtype=torch.bool), torch.ones(layers, sequences))
        else:
            step.route = self.route(self._prompts(layout, kwargs))
            if isinstance(step.route, HeadRoute) and step.cache is not None:
                raise ValueError("routes by KV head have no cache: run the model with use_cache=False")
        self.last_route = step.route

    def _decide_soft(self, step: Step, kwargs: dict[str, Any]) -> None:
        soft, layers, sequences = self._soft, len(self.layers), len(step.layout.counts)
        assert soft is not None
        if self.is_split:
            raise ValueError("routers are trained on a model that lies on one device as a whole, not on a split one")
        step.soft = soft
        if soft.forced is not None:
            shape = tuple(soft.forced.shape)
            assert self.config.backbone is not None
            heads = self.config.backbone.num_key_value_heads
            if shape not in ((layers, sequences), (layers, heads, sequences)):
                raise ValueError(
                    f"forced gates must be [{layers}, {sequences}] or [{layers}, {heads}, {sequences}], "
                    f"got {list(shape)}"
                )
            step.gates = soft.gates = soft.forced
            step.exact = soft.forced_exact
            return
        shape = (layers, sequences, 2)
        soft._noise = gumbel_noise(shape, self.device, soft.generator) if soft.noise else None
        if self.config.router_input == "probe":
            soft.pooled = self.probe(self._prompts(step.layout, kwargs))
            soft.logits = self.router(soft.pooled)
            step.gates = soft.gates = straight_through_gate(soft.logits, soft.temperature, soft._noise)
            step.exact = host_decisions(step.gates)
        else:
            step.inline = True
            step.pool_plan = self._plan(step.layout, self.device)
            step.pooled = [None] * layers
            step.decisions = [None] * layers
            soft.gates = soft.logits = None

    def _plan(self, layout: Layout, device: torch.device) -> PoolPlan:
        # In training the answer follows the prompt in the same row; only the prompt is pooled.
        lengths = self._prompt_counts(layout)
        config = self.config
        return PoolPlan.build(
            layout.flat_starts, lengths, config.pool_tokens, tail_tokens=config.tail_tokens, device=device
        )

    def _prompt_counts(self, layout: Layout) -> tuple[int, ...]:
        if self._prompt_tokens is None:
            return layout.counts
        if len(self._prompt_tokens) != len(layout.counts):
            raise ValueError(f"{len(self._prompt_tokens)} prompt lengths for {len(layout.counts)} sequences")
        return tuple(min(n, int(p)) for n, p in zip(layout.counts, self._prompt_tokens, strict=True))

    def _prompts(self, layout: Layout, kwargs: dict[str, Any]) -> list[Tensor]:
        ids = kwargs.get("input_ids")
        if ids is None:
            raise ValueError("routing before prefill reads the prompt's token ids: pass input_ids, not inputs_embeds")
        flat = ids.flatten()
        counts = self._prompt_counts(layout)
        return [flat[s : s + n] for s, n in zip(layout.flat_starts, counts, strict=True)]

    def _after_decoder(self, module: nn.Module, args: Any, output: Any) -> None:
        step = self._step
        if step is None or step.collect or self._preset is not None:
            return
        # Gradient checkpointing runs the layers again during backward, so a training step stays until the next one.
        if step.soft is None:
            self._step = None
        elif output is not None and step.inline and torch.is_grad_enabled():
            step.soft.logits = torch.stack([d[0] for d in step.decisions if d is not None])
            step.soft.gates = torch.stack([step.packings[("gate", i)] for i in range(len(self.layers))])
            step.soft.pooled = torch.stack([p for p in step.pooled if p is not None])
        if output is None:
            self._failed(step)
            return
        if step.inline and step.soft is None:
            self.last_route = step.route
        if step.cache is not None:
            step.cache.advance(step.layout.columns, step.layout.counts, decoded=step.layout.is_decode)

    def _failed(self, step: Step) -> None:
        """A pass ended half way: some layers have stored its tokens and some have not."""
        if step.cache is None:
            return
        # Fed again, a decode step writes the same slots of routable layers. Others have appended its token.
        if not step.layout.is_decode or len(self.layers) < len(self.decoder.layers):
            step.cache.fail()

    # ------------------------------------------------------------------ attention

    @property
    def probing(self) -> bool:
        """Whether the current pass is over prompts' ends alone, a few hundred tokens; reading them whole is not."""
        step = self._step
        return step is not None and step.collect and step.layout.columns <= 2 * self.config.pool_tokens

    @property
    def decodes(self) -> bool:
        """Whether the current pass adds one token to every row of a cache."""
        return self._step is not None and self._step.layout.is_decode and self._step.cache is not None

    def decode(self, layer: int, append: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], scale: float) -> Tensor:
        """One routable layer of a decode step, `[B, Hq, D]`; device work only.

        `append(k_pages, v_pages, page_table, counts)` puts a row's new key and value behind the `counts[b]` keys that
        it holds and returns the queries `[B, Hq, D]`.
        """
        step = self._step
        assert step is not None and step.cache is not None and step.cache.pool is not None
        cache, pool, tables = step.cache, step.cache.pool_of(layer), step.cache.tables_of(layer)
        device = tables.counts.device
        if device not in step.counts:
            # One launch for all layers.
            step.counts[device] = tables.counts + 1
        q = append(pool.keys, pool.values, tables.pages[layer], tables.counts[layer])
        table, counts = cache.decode_table(layer), step.counts[device][layer]
        return paged_decode(q, pool.keys, pool.values, table, counts, scale=scale, impl=self.decode_impl)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """One routable layer: `query [B, Hq, T, D]`, `key, value [B, Hk, T, D]` → `[B, T, Hq, D]`."""
        step = self._step
        if step is None:
            raise RuntimeError("an attached attention layer ran outside of its decoder; call the model itself")
        with self.on(query.device):
            return self._attend(step, layer, query, key, value, scale)

    def _attend(self, step: Step, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        exchange = step.soft.exchange if step.soft is not None else None
        if exchange is not None:
            query, key, value = (exchange.to_heads(x) for x in (query, key, value))
        batch, heads, columns, dim = query.shape
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if self.decodes:

            def append(keys: Tensor, values: Tensor, table: Tensor, counts: Tensor) -> Tensor:
                append_token(keys, values, table, counts, k[:, 0], v[:, 0])
                return q[:, 0]

            return self.decode(layer, append, scale)[:, None]
        q, k, v = (x.reshape(batch * columns, -1, dim) for x in (q, k, v))
        if not step.layout.is_plain:
            if query.device not in step.index:
                step.index[query.device] = step.layout.token_index(query.device)
            q, k, v = (x[step.index[query.device]] for x in (q, k, v))
        prefill = LayerPrefill(step, layer, self.full_mode, self.sparse_mode, scale, step.impl or self.impl)
        if step.soft is not None:
            out = prefill.blended(q, k, v)
        else:
            decide = functools.partial(self.pooling.decide, step, layer) if step.inline else None
            out = prefill.routed(q, k, v, decide)
        if not step.layout.is_plain:
            # Padding gets zeros: it must carry nothing into the layers above, NaN least of all.
            out = out.new_zeros(batch * columns, heads, dim).index_copy(0, step.index[query.device], out)
        out = out.view(batch, columns, heads, dim)
        return out if exchange is None else exchange.to_tokens(out)
