"""Routes before admission: a request enters vLLM's waiting queue once its route is known.

A new request that needs the router is held back. The next step carries its two ends to the workers, which probe them
beside the step's own work and answer with the layers' scores; the step after that may admit it. So the scheduler knows
every admitted request's route: chunks of a prompt agree, blocks of sparse layers go back, and the prefix cache is
salted with the route before the first lookup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from flux_attention.route import Dense, PolicyContext, Route
from flux_attention.serving.compat import check_version
from flux_attention.serving.kv import RoutedManager
from flux_attention.serving.options import ROUTE_KEY, Deployment, RequestOptions, probe_ends
from flux_attention.serving.telemetry import Telemetry, report

PROBES = "flux_probes"
"""Attribute of a scheduler output: `{request id: token ids to probe}`."""
SCORES = "flux_scores"
"""Attribute of a model runner output: `{request id: p_full of every routable layer}`."""


if TYPE_CHECKING:
    _Mixed = Any
else:
    _Mixed = object


class RoutedScheduling(_Mixed):
    """What the plugin adds to vLLM's scheduler; a mix-in, because vLLM has two of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_version()
        super().__init__(*args, **kwargs)
        if self.scheduler_config.async_scheduling != isinstance(self, AsyncScheduler):
            raise ValueError(
                f"{type(self).__name__} is not for an engine with async_scheduling="
                f"{self.scheduler_config.async_scheduling}: FluxAsyncScheduler schedules a step ahead, FluxScheduler "
                "does not"
            )
        self.flux = Deployment.of(self.vllm_config)
        self.flux_routes: dict[str, tuple[bool, ...]] = {}
        self.flux_telemetry = Telemetry(self.vllm_config, self.flux.layers)
        self._unrouted: dict[str, Request] = {}
        self._probing: set[str] = set()
        self._settled: dict[str, tuple[int, int]] = {}
        manager = self.kv_cache_manager
        for group in manager.coordinator.single_type_managers:
            if isinstance(group, RoutedManager):
                group.routes = self.flux_routes
        self._allocate = manager.allocate_slots
        manager.allocate_slots = self._allocate_slots

    # ------------------------------------------------------------------ routes

    def _enqueue_waiting_request(self, request: Request) -> None:
        if request.request_id not in self.flux_routes and not self._decide(request):
            self._unrouted[request.request_id] = request
            return
        super()._enqueue_waiting_request(request)

    def _decide(self, request: Request, p_full: Sequence[float] | None = None) -> bool:
        """Give a request its route; False when it takes the router, whose scores `p_full` are not there yet."""
        layers, prompt, params = self.flux.layers, request.prompt_token_ids or [], request.sampling_params
        if params is None:
            return True  # embeds instead of generating: the model as it is
        options = RequestOptions.of(params.extra_args, layers, inline=self.flux.inline)
        policy = options.policy
        if policy is None and len(prompt) <= self.flux.break_even:
            policy = Dense()
        if policy is not None:
            route = policy(PolicyContext(layers, (torch.tensor(prompt, dtype=torch.long),)))
        elif p_full is not None:
            route = Route.from_scores(torch.tensor(p_full)[:, None]).with_dial(options.dial)
        elif self.flux.inline:
            params.extra_args = {**(params.extra_args or {}), ROUTE_KEY: ()}
            return True
        else:
            return False
        self._set_route(request, tuple(route.use_full[:, 0].tolist()))
        return True

    def _set_route(self, request: Request, use_full: tuple[bool, ...]) -> None:
        self.flux_routes[request.request_id] = use_full
        self.flux_telemetry.routed(use_full)
        # The request's own parameters travel to the workers with it, and stay there while it is preempted.
        params = request.sampling_params
        params.extra_args = {**(params.extra_args or {}), ROUTE_KEY: use_full}
        if self.kv_cache_manager.enable_caching and not all(use_full):
            # Keys of a layer depend on the modes of all layers below: a block is of use to the same route only.
            # Dense requests share theirs with requests that the plugin never saw.
            modes = "".join("01"[full] for full in use_full)
            request.cache_salt = f"{request.cache_salt or ''}|flux:{modes}"
            request.block_hashes = type(request.block_hashes)()
            request.update_block_hashes()

    # ------------------------------------------------------------------ the engine's step

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        wanted = [r for r in self._unrouted if r not in self._probing][: self.flux.options.probe_batch]
        if wanted:
            self._probing.update(wanted)
            pool = self.flux.config.pool_tokens
            probes = {r: probe_ends(self._unrouted[r].prompt_token_ids, pool) for r in wanted}
            setattr(output, PROBES, probes)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        for request_id, p_full in getattr(model_runner_output, SCORES, {}).items():
            self._probing.discard(request_id)
            request = self._unrouted.pop(request_id, None)
            if request is not None:
                self._decide(request, p_full)
                super()._enqueue_waiting_request(request)
            elif self.flux.inline and request_id in self.requests:
                self._decide(self.requests[request_id], p_full)
            # Else it was aborted meanwhile.
        return super().update_from_output(scheduler_output, model_runner_output)

    def get_num_unfinished_requests(self) -> int:
        unfinished: int = super().get_num_unfinished_requests()
        # A paused engine counts no waiting request, lest it go on stepping for nothing.
        return unfinished + (len(self._unrouted) if self.pause_state == PauseState.UNPAUSED else 0)

    def _connector_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        delayed, params = super()._connector_finished(request)
        route = self.flux_routes.get(request.request_id)
        extra = None if request.sampling_params is None else request.sampling_params.extra_args
        if route is not None:
            held = self._held_blocks(request)
            self.flux_telemetry.finished(*held)
            if extra and extra.get("flux_report"):
                # The one free-form field that vLLM carries from the scheduler into a response.
                params = {**(params or {}), "flux": report(route, *held)}
        return delayed, params

    def _held_blocks(self, request: Request) -> tuple[int, int]:
        """KV blocks of the request, and how many it would hold dense."""
        held = dense = 0
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            blocks = manager.req_to_blocks.get(request.request_id, ())
            held += sum(not block.is_null for block in blocks)
            dense += len(blocks)
        return held, dense

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        result = super()._free_request(request, *args, **kwargs)
        for table in (self.flux_routes, self._unrouted, self._settled):
            table.pop(request.request_id, None)
        self._probing.discard(request.request_id)
        return result

    # ------------------------------------------------------------------ allocation

    def _allocate_slots(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `allocate_slots`, skipped where it has nothing to do.

        A decoding request gets a block, caches one or gives some back only when it crosses a block boundary; asking
        every group at every token would cost more than the scheduler itself.
        """
        if request.status != RequestStatus.RUNNING or args or any(kwargs.values()):
            # Admitted, for the first time or again after preemption: what was settled is of another life.
            self._settled.pop(request.request_id, None)
            return self._allocate(request, num_new_tokens, *args, **kwargs)
        size, computed = self.block_size, request.num_computed_tokens
        tile = (computed - request.num_in_flight_tokens) // size
        end, settled_tile = self._settled.get(request.request_id, (0, 0))
        if computed + num_new_tokens < end and tile == settled_tile:
            return self.kv_cache_manager.empty_kv_cache_blocks
        blocks = self._allocate(request, num_new_tokens, *args, **kwargs)
        if blocks is not None:
            self._settled[request.request_id] = (-(-(computed + num_new_tokens) // size) * size, tile)
        return blocks


class FluxScheduler(RoutedScheduling, Scheduler):
    """`--scheduler-cls flux_attention.serving.scheduler.FluxScheduler`."""


class FluxAsyncScheduler(RoutedScheduling, AsyncScheduler):
    """The same for engines that schedule a step ahead, vLLM's default on GPUs."""
