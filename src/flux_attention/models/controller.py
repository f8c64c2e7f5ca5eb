"""Routed attention on one model: what its hooks and its attention function do in a forward pass.

A pass runs under a `Step`, made before the decoder runs and dropped after it: where the sequences are (padding and
packing), the cache, and the route. Everything the attention function needs is in it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flux_attention.cache import FluxCache, PagePool, append_token
from flux_attention.config import FluxConfig
from flux_attention.kernels.api import Packing, _importable, paged_decode
from flux_attention.kernels.fused import Norm, pool_queries
from flux_attention.models.blend import hard_blend, members_of, soft_blend
from flux_attention.models.delta import AppliedDelta
from flux_attention.models.families import family_of, layer_types
from flux_attention.models.fuse import Fusion, fuse, why_not
from flux_attention.models.layout import Layout
from flux_attention.models.probe import ProbeGraphs
from flux_attention.models.step import SoftRouting, Step, host_decisions
from flux_attention.modes import Mode, PrefillInputs, make_mode
from flux_attention.route import Dial, HeadRoute, Policy, PolicyContext, Route
from flux_attention.router import LayerRouter, PoolPlan, gumbel_noise, straight_through_gate

ATTENTION_NAME = "flux_attention"


class FluxAttention:
    """Routed attention on one model. Made by `attach`, ended by `detach`.

    Attributes:
        model: the attached transformers model.
        config: the adapter's configuration, its backbone filled in.
        router: the `LayerRouter`, float32, on the model's device.
        policy: what makes a request's route; None = the router.
        dial: range that a routed request's sparsity is held in.
        impl: kernel implementation of prefill attention, "auto" or a name of `kernels.api`.
        overlap: let the kernels of a captured decode step begin before the one before has ended (Hopper and later).
        last_route: route of the last prefill.
        delta: weights of the backbone that the adapter replaced until `detach`; None where it replaced none.
    """

    def __init__(self, model: PreTrainedModel, config: FluxConfig, router: LayerRouter) -> None:
        self.model = model
        # transformers types a module's attributes as Tensor | Module; a decoder also has its config and layers.
        self.decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.family = family_of(self.decoder.config.model_type)
        self.config = config
        assert config.backbone is not None
        self.layers = config.backbone.routable_layers
        self.router = router
        self.policy: Policy | None = None
        self.dial = Dial()
        self.impl = "auto"
        self.decode_impl = "auto"
        self.overlap = False
        self.last_route: Route | None = None
        self.delta: AppliedDelta | None = None
        self.full_mode: Mode = make_mode(config.retrieval_mode, config)
        self.sparse_mode: Mode = make_mode(config.sparse_mode, config)
        self._step: Step | None = None
        self._soft: SoftRouting | None = None
        self._prompt_tokens: Sequence[int] | None = None
        self._preset: Step | None = None
        self.fusion: Fusion | None = None
        self._side: torch.cuda.Stream | None = None
        self._probes = ProbeGraphs(self)
        self._handles: list[Any] = []
        self._modules: list[nn.Module] = []
        self._implementation: str = model.config._attn_implementation or "sdpa"
        self._parameters = list(inspect.signature(type(self.decoder).forward).parameters)[1:]

    # ------------------------------------------------------------------ attach and detach

    def _install(self, fuse_layers: bool | None) -> None:
        # Registering is idempotent and does nothing for models that do not name this implementation.
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _mask)
        for index, layer in enumerate(self.decoder.layers):
            module = getattr(layer, self.family.attention)
            routable = self.layers.index(index) if index in self.layers else None
            module._flux_attention = (self, routable)
            self._modules.append(module)
            if routable is not None:
                hook = module.register_forward_pre_hook(self._before_attention, with_kwargs=True)
                self._handles.append(hook)
        self._handles.append(self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        self._handles.append(self.decoder.register_forward_hook(self._after_decoder, always_call=True))
        self.decoder.config._attn_implementation = ATTENTION_NAME
        self.decoder._flux_config = self.config
        self.model._flux_attention_controller = self
        able = self.device.type == "cuda" and _importable("triton")
        if fuse_layers or (fuse_layers is None and able and why_not(self) is None):
            self.fusion = fuse(self)

    def _remove(self) -> None:
        if self.fusion is not None:
            self.fusion.remove()
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            del module._flux_attention
        self._handles, self._modules = [], []
        self.decoder.config._attn_implementation = self._implementation
        del self.decoder._flux_config
        del self.model._flux_attention_controller
        if self.delta is not None:
            self.delta.revert(self.model)
            self.delta = None

    # ------------------------------------------------------------------ what users call

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    def new_cache(self, *, pool: PagePool | None = None, max_row_tokens: int | None = None) -> FluxCache:
        """An empty cache for this model."""
        config = self.decoder.config
        return FluxCache(
            self.config,
            self.layers,
            config.num_hidden_layers,
            layer_types=layer_types(config),
            sliding_window=getattr(config, "sliding_window", None),
            pool=pool,
            max_row_tokens=max_row_tokens,
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

        Raises ValueError with an inline router, which needs the prefill itself.
        """
        prompts = [prompt.reshape(-1) for prompt in prompts]
        for i, prompt in enumerate(prompts):
            if prompt.numel() == 0:
                raise ValueError(f"prompt {i} is empty")
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
        ends = [self.prompt_ends(p).to(self.device) for p in prompts]
        ids = nn.utils.rnn.pad_sequence(ends, batch_first=True)
        step = self.probe_step([e.numel() for e in ends], ids.shape[1])
        if by_head:
            assert self.config.backbone is not None
            step.collect_heads = self.config.backbone.num_key_value_heads
        found = self.run_probe(ids, step)
        return found if by_head else found.sum(2)

    def prompt_ends(self, prompt: Tensor) -> Tensor:
        """First and last `pool_tokens` tokens of a prompt, side by side."""
        pool = self.config.pool_tokens
        return torch.cat((prompt[:pool], prompt[max(pool, prompt.numel() - pool) :]))

    def probe_step(self, lengths: Sequence[int], columns: int, by_head: bool = False) -> Step:
        """The step of a probe over rows of `lengths` tokens in `columns` columns."""
        rows = len(lengths)
        layout = Layout(rows, columns, tuple(range(rows)), (0,) * rows, tuple(lengths), (0,) * rows)
        step = Step(layout, None, Route.full(len(self.layers), rows), collect=True, prompt_ends=layout.ends)
        # Every token of a probe is pooled: one weight per token, the overlap of short prompts included.
        step.pool_plan = PoolPlan.build(layout.flat_starts, lengths, self.config.pool_tokens, device=self.device)
        # Rows this short gain nothing from other kernels, and these can be captured in a graph.
        step.impl = "sdpa" if self.impl == "auto" else None
        return step

    def run_probe(self, ids: Tensor, step: Step) -> Tensor:
        """Pooled queries of `ids [S, columns]` in parts to be added up, `[L, S, parts, D]`; device work only.

        With `step.collect_heads` `[L, S, Hk, D]`, the heads' own.
        """
        step.pooled = [None] * len(self.layers)
        outer, self._step = self._step, step
        try:
            self.decoder(input_ids=ids, use_cache=False)
        except _ProbeDoneError:
            pass
        finally:
            self._step = outer
        if step.held:
            # Only where this pass has used it: a graph being captured must not wait for work outside of it.
            assert self._side is not None
            torch.cuda.current_stream(self.device).wait_stream(self._side)
            step.held.clear()
        return torch.stack([p for p in step.pooled if p is not None])

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

    # ------------------------------------------------------------------ hooks

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        longest = max(layout.ends)
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(f"{longest} tokens exceed the model's context of {limit}")
        self._check_padding(kwargs, layout, cache)
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
                cache.begin(batch, route, backbone.num_key_value_heads, backbone.head_dim, like)
            if not layout.is_decode:
                cache.reserve(layout.counts)
        # Set last: a refused request must leave no step behind.
        self._step = step
        if cache is not None and layout.is_decode:
            cache.plan_decode()
        return (), kwargs

    def _take_cache(self, kwargs: dict[str, Any]) -> FluxCache | None:
        """The FluxCache of this call, put in the place of the empty cache that transformers made."""
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = bool(getattr(self.decoder.config, "use_cache", False)) and not self.decoder.training
            kwargs["use_cache"] = use_cache
        if self._soft is not None:
            if cache is not None:
                raise ValueError("training passes blend both sides of every layer and keep no cache: use_cache=False")
            kwargs["use_cache"] = False
            return None
        if isinstance(cache, FluxCache):
            return cache
        if cache is None and not use_cache:
            return None
        if cache is not None and not (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0):
            state = "holds tokens" if isinstance(cache, DynamicCache) else "is of a fixed layout"
            raise ValueError(
                f"past_key_values is a {type(cache).__name__} that {state}; an attached model keeps its keys in a "
                "FluxCache. Pass none, or the FluxCache of an earlier call, and no cache_implementation"
            )
        cache = self.new_cache()
        kwargs["past_key_values"] = cache
        return cache

    def _check_padding(self, kwargs: dict[str, Any], layout: Layout, cache: FluxCache | None) -> None:
        """Pad tokens without a mask would be routed and attended to as text."""
        ids = kwargs.get("input_ids")
        pad = getattr(self.decoder.config, "pad_token_id", None)
        if kwargs.get("attention_mask") is not None or ids is None or pad is None or layout.batch == 1:
            return
        if cache is not None and not cache.is_empty:
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
                step.pool_plan = self._plan(layout)
                step.route = Route.full(layers, sequences)
        else:
            step.route = self.route(self._prompts(layout, kwargs))
            if isinstance(step.route, HeadRoute) and step.cache is not None:
                raise ValueError("routes by KV head have no cache: run the model with use_cache=False")
        self.last_route = step.route

    def _decide_soft(self, step: Step, kwargs: dict[str, Any]) -> None:
        soft, layers, sequences = self._soft, len(self.layers), len(step.layout.counts)
        assert soft is not None
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
            step.use_full = soft.forced_full
            return
        shape = (layers, sequences, 2)
        soft._noise = gumbel_noise(shape, self.device, soft.generator) if soft.noise else None
        if self.config.router_input == "probe":
            soft.pooled = self.probe(self._prompts(step.layout, kwargs))
            soft.logits = self.router(soft.pooled)
            step.gates = soft.gates = straight_through_gate(soft.logits, soft.temperature, soft._noise)
            step.use_full = host_decisions(step.gates)
        else:
            step.inline = True
            step.pool_plan = self._plan(step.layout)
            step.pooled = [None] * layers
            step.decisions = [None] * layers
            soft.gates = soft.logits = None

    def _plan(self, layout: Layout) -> PoolPlan:
        # In training the answer follows the prompt in the same row; only the prompt is pooled.
        lengths = self._prompt_counts(layout)
        return PoolPlan.build(layout.flat_starts, lengths, self.config.pool_tokens, device=self.device)

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

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._step
        if step is None or not (step.collect or step.inline):
            return
        assert step.pool_plan is not None
        _, layer = module._flux_attention  # type: ignore[misc]
        if not (step.soft or step.collect_heads) and self.fusion is not None and self.fusion.pools(layer):
            return  # the layer calls `pool`
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if step.soft is not None and not step.collect:
            self.layer_gate(step, layer, hidden, lambda tokens: self.family.queries(module, tokens))
            return
        # At most 2·pool_tokens tokens of each prompt: their queries cost nothing to compute a second time.
        tokens = step.pool_plan.gather(hidden.flatten(0, 1))
        with self._beside(step, tokens):
            queries = self.family.queries(module, tokens)
            if step.collect_heads:
                parts = queries.chunk(step.collect_heads, 2)
                self._collect(step, layer, torch.stack([step.pool_plan.mean(part) for part in parts], 1))
                return
            pooled = step.pool_plan.mean(queries)
            if step.collect:
                self._collect(step, layer, pooled[:, None])
                return
            step.decisions[layer] = _to_host(self.router(pooled.detach(), layer))

    @property
    def probing(self) -> bool:
        """Whether the current pass is a probe."""
        return self._step is not None and self._step.collect

    def pool(self, layer: int, queries: Tensor, norm: Norm | None) -> None:
        """Pool a fused layer's queries before the rotary embedding, `[N, Hq * D]`: for a probe, or to route inline.

        An inline decision is made in line with the layer, by four short launches behind the queries. Beside the other
        projections they would wait at each of them: a product's blocks hold the whole device until it is done. So the
        decision has two projections and the rotary embedding to reach the host.
        """
        step = self._step
        if step is None or step.soft or step.collect_heads or not (step.collect or step.inline):
            return
        plan, backbone = step.pool_plan, self.config.backbone
        assert plan is not None and backbone is not None
        if step.collect:
            with self._beside(step, queries):
                self._collect(step, layer, pool_queries(queries, plan.index, plan.weight, backbone.head_dim, norm))
            return
        parts = pool_queries(queries, plan.index, plan.weight, backbone.head_dim, norm)
        logits = self.router.from_parts(parts, layer)
        # Only the copy runs beside, by the device's copy engine.
        with self._beside(step, logits):
            step.decisions[layer] = _to_host(logits)

    def _collect(self, step: Step, layer: int, pooled: Tensor) -> None:
        """Keep a layer's pooled queries. Raises `_ProbeDoneError` with the last one's: the rest of the pass is idle."""
        step.pooled[layer] = pooled
        if layer == len(self.layers) - 1:
            raise _ProbeDoneError

    def layer_gate(self, step: Step, layer: int, hidden: Tensor, queries: Callable[[Tensor], Tensor]) -> Tensor:
        """A training step's gate z `[S]` of one layer, decided once however often the layer runs.

        Args:
            hidden: `[B, T, hidden]`, what `queries` turns into queries before RoPE.
            queries: `[S, K, hidden]` → `[S, K, Hq, D]`.
        """
        if step.gates is not None:
            return step.gates[layer]
        if ("gate", layer) not in step.packings:
            assert step.soft is not None and step.pool_plan is not None
            with torch.no_grad():
                if step.soft.exchange is not None:
                    pooled = step.soft.exchange.pooled(hidden, step.pool_plan, queries)
                else:
                    pooled = step.pool_plan.mean(queries(step.pool_plan.gather(hidden.flatten(0, 1))))
            logits = self.router(pooled, layer)
            noise = None if step.soft._noise is None else step.soft._noise[layer]
            step.pooled[layer] = pooled
            step.decisions[layer] = (logits, None)
            step.packings[("gate", layer)] = straight_through_gate(logits, step.soft.temperature, noise)
        gate: Tensor = step.packings[("gate", layer)]
        return gate

    @contextmanager
    def _beside(self, step: Step, tokens: Tensor) -> Iterator[None]:
        """Run what is inside beside the layer's own projections: on CUDA, on a stream of its own.

        Its launches are many and small. In line they would leave the device idle between them; beside the projections
        they take what those leave over, and the decision is on the host before the projections are done.
        """
        if not tokens.is_cuda:
            yield
            return
        if self._side is None:
            self._side = torch.cuda.Stream(tokens.device, priority=-1)
        step.held.append(tokens)
        self._side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(self._side):
            yield

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
            # The pass failed half way: some layers have stored its tokens and some have not.
            if step.cache is not None and not step.layout.is_decode:
                step.cache.clear()
            return
        if step.inline and step.soft is None:
            self.last_route = step.route
        if step.cache is not None:
            if step.inline:
                step.cache.set_route(step.route or Route.full(0, 0))
            step.cache.advance(step.layout.columns, step.layout.counts, decoded=step.layout.is_decode)

    # ------------------------------------------------------------------ attention

    def _inline_route(self, step: Step, layer: int) -> None:
        """Wait for this layer's decision and write it into the step's route."""
        decision = step.decisions[layer]
        assert decision is not None and step.route is not None
        logits, event = decision
        if event is not None:
            event.synchronize()
            step.held.clear()
        if step.route.p_full is None:
            step.route = Route(step.route.use_full, torch.ones(step.route.use_full.shape))
            if step.cache is not None:
                step.cache.set_route(step.route)
        assert step.route.p_full is not None
        # The device waits for these lines: plain numbers are quicker than a dozen operations on two of them.
        for s, ((sparse, full), short) in enumerate(zip(logits.tolist(), step.keep_short_full, strict=True)):
            if not short:
                step.route.p_full[layer, s] = 0.5 + 0.5 * math.tanh(0.5 * (full - sparse))
                step.route.use_full[layer, s] = full > sparse

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
        cache, pool = step.cache, step.cache.pool
        if step.counts is None:
            # One launch for all layers.
            step.counts = cache.key_counts + 1
        q = append(pool.keys, pool.values, cache.page_table[layer], cache.key_counts[layer])
        table = cache.decode_table(layer)
        return paged_decode(q, pool.keys, pool.values, table, step.counts[layer], scale=scale, impl=self.decode_impl)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """One routable layer: `query [B, Hq, T, D]`, `key, value [B, Hk, T, D]` → `[B, T, Hq, D]`."""
        step = self._step
        if step is None:
            raise RuntimeError("an attached attention layer ran outside of its decoder; call the model itself")
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
        if step.inline and step.soft is None:
            self._inline_route(step, layer)
        q, k, v = (x.reshape(batch * columns, -1, dim) for x in (q, k, v))
        if not step.layout.is_plain:
            if step.index is None:
                step.index = step.layout.token_index(query.device)
            q, k, v = (x[step.index] for x in (q, k, v))
        out = self._blend(step, layer, q, k, v, scale) if step.soft else self._routed(step, layer, q, k, v, scale)
        if not step.layout.is_plain:
            assert step.index is not None
            # Padding gets zeros: it must carry nothing into the layers above, NaN least of all.
            out = out.new_zeros(batch * columns, heads, dim).index_copy(0, step.index, out)
        out = out.view(batch, columns, heads, dim)
        return out if exchange is None else exchange.to_tokens(out)

    def _blend(self, step: Step, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """z·full + (1 − z)·sparse, the training form."""
        layout = step.layout
        ends = step.prompt_ends if len(step.prompt_ends) == len(layout.counts) else layout.ends

        def side(mode: Mode, members: list[int]) -> Tensor:
            lengths = tuple(layout.counts[s] for s in members)
            # Kept for the pass: a packing holds its offsets on the device.
            packing = step.packings.setdefault(("packing", *members), Packing(lengths, lengths))
            some_q, some_k, some_v = (members_of(x, members, layout.counts) for x in (q, k, v))
            some_ends = tuple(ends[s] for s in members)
            return mode.prefill(PrefillInputs(some_q, some_k, some_v, packing, some_ends, scale, self.impl))

        gate = step.packings.get(("gate", layer)) if step.gates is None else step.gates[layer]
        # A recomputed layer takes its gate as an input of its own, to which the gradient belongs.
        gate = step.packings.get(("input", layer), gate)
        assert gate is not None
        if step.gates is not None and step.use_full is None:
            every = list(range(len(layout.counts)))
            return soft_blend(side(self.full_mode, every), side(self.sparse_mode, every), gate, layout.counts)
        if step.use_full is not None:
            use_full = step.use_full[layer]
        else:
            if ("host", layer) not in step.packings:
                step.packings["host", layer] = host_decisions(gate[None])[0]
            use_full = step.packings["host", layer]
        return hard_blend(side, self.full_mode, self.sparse_mode, gate, use_full, layout.counts)

    def _routed(self, step: Step, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Each sequence on its own side; sequences of one side share a launch."""
        layout, cache = step.layout, step.cache
        assert step.route is not None
        ends = step.prompt_ends
        if isinstance(step.route, HeadRoute):
            return self._by_head(layout, step.route.heads[layer], ends, q, k, v, scale)
        out = self._sides(layout, cache, layer, step.route.use_full[layer].tolist(), ends, q, k, v, scale)
        if cache is not None:
            start = 0
            for s, n in enumerate(layout.counts):
                cache.append(layer, layout.slots[s], k[start : start + n], v[start : start + n])
                start += n
        return out

    def _by_head(
        self, layout: Layout, heads: Tensor, ends: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        """KV heads become sequences of one head each, and then a head is routed as a sequence is; `heads [Hk, S]`."""
        count, tokens = k.shape[1], q.shape[0]
        # [N, Hk·G, D] → [Hk·N, G, D]
        q, k, v = (x.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        counts = layout.counts * count
        split = Layout.pack(range(len(counts)), counts, (0,) * len(counts))
        out = self._sides(split, None, 0, heads.flatten().tolist(), ends * count, q, k, v, scale)
        return out.unflatten(0, (count, tokens)).transpose(0, 1).flatten(1, 2)

    def _sides(
        self,
        layout: Layout,
        cache: FluxCache | None,
        layer: int,
        use_full: list[bool],
        ends: tuple[int, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
    ) -> Tensor:
        sides = (
            (self.full_mode, [s for s, f in enumerate(use_full) if f]),
            (self.sparse_mode, [s for s, f in enumerate(use_full) if not f]),
        )
        assert self._step is not None
        impl = self._step.impl or self.impl
        out: Tensor | None = None
        for mode, members in sides:
            if not members:
                continue
            rows = _Rows(layout, members)
            side_q, new_k, new_v = (rows.take(x) for x in (q, k, v))
            side_k, side_v, packing = self._with_past(cache, layer, layout, members, new_k, new_v)
            side_ends = tuple(ends[s] for s in members)
            side = mode.prefill(PrefillInputs(side_q, side_k, side_v, packing, side_ends, scale, impl))
            if len(members) == len(use_full):
                out = side
            else:
                out = torch.empty_like(q) if out is None else out
                rows.put(out, side)
        assert out is not None
        return out

    def _with_past(
        self, cache: FluxCache | None, layer: int, layout: Layout, members: list[int], k: Tensor, v: Tensor
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
            old_k, old_v = cache.gather(layer, row)
            keys += [old_k, k[start : start + n]]
            values += [old_v, v[start : start + n]]
            k_lens.append(old_k.shape[0] + n)
            gaps.append(cache.gap(layer, row))
            start += n
        return torch.cat(keys), torch.cat(values), Packing(tuple(counts), tuple(k_lens), tuple(gaps))


class _ProbeDoneError(Exception):
    """Ends a probe once it has what it came for."""


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on its way to the host, and the event after which it is there."""
    if not values.is_cuda:
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


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


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls for an attached model."""
    controller, layer = module._flux_attention  # type: ignore[misc]
    if layer is None:
        original = ALL_ATTENTION_FUNCTIONS[_sliding_implementation(controller._implementation)]
        return original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout:
        raise ValueError(f"routed attention has no dropout, got {dropout}; the backbone is frozen: use model.eval()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return controller.attend(layer, query, key, value, scale), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Masks for the layers that are not routed; routable layers know their sequences from the step."""
    # Only sliding layers ask with a local size; a global mask over a long prompt must never be materialised.
    if kwargs.get("local_size") is None:
        return None
    kwargs.pop("config", None)
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def _sliding_implementation(original: str) -> str:
    return "sdpa" if original == "eager" else original
