"""Engines of a tiny random model: what takes many requests or many engines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux_attention.models.adapter import save_adapter
from flux_attention.models.attach import attach, detach
from flux_attention.models.delta import DeltaError
from tests.serving import harness
from tests.serving.harness import TOLERANCE, Ask, differences, free_blocks, generate, mixed_asks, random_ids, scheduler

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LENGTHS = (5, 96, 97, 128, 129, 160, 161, 200, 255, 256, 257, 300, 333, 400, 511, 640)


@pytest.fixture(scope="module")
def llm(start, tiny):
    return start(tiny, max_num_batched_tokens=128, enable_prefix_caching=True, max_model_len=1024)


def test_chunks_and_prefix_cache(llm, tiny):
    asks = mixed_asks(tiny, random_ids(4000), LENGTHS, tokens=40)
    # The same prompts under other routes, in the same batch: a block of one route would corrupt another.
    asks += [Ask(ask.prompt, (("flux_policy", "static:1,2"),), 40) for ask in asks[8:12]]
    cold = generate(llm, asks)
    assert max(differences(tiny, asks, cold)) < TOLERANCE
    warm = generate(llm, asks)
    assert max(differences(tiny, asks, warm)) < TOLERANCE
    assert sum(output.num_cached_tokens > 0 for output in warm) > 10
    for first, second in zip(cold, warm, strict=True):
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert free_blocks(llm)[0] == free_blocks(llm)[1]


def test_routes_are_of_many_kinds(llm, tiny):
    """Guards the other tests: a router that always says the same would make them weak."""
    asks = [Ask(tuple(random_ids(200, seed)), tokens=1) for seed in range(12)]
    outputs = generate(llm, asks)
    routes = {tuple(output.kv_transfer_params["flux"]["sparse_layers"]) for output in outputs}
    assert len(routes) > 3
    assert max(differences(tiny, asks, outputs)) < TOLERANCE


def test_replayed_probes(llm, tiny, monkeypatch):
    """Fixed buffers and unused rows; what a graph does with them, a call does here."""
    probe = llm.llm_engine.model_executor.driver_worker.worker._probe
    used = []

    def captured(run, device):
        return lambda: used.append(1) or run()

    monkeypatch.setattr("flux_attention.serving.probe.captured", captured)
    monkeypatch.setattr(probe, "_replays", [])
    probe.capture(8)
    assert [rows for rows, _ in probe._replays] == [1, 2, 4, 8]
    used.clear()
    asks = [Ask(tuple(random_ids(97 + seed, seed)), tokens=2) for seed in range(19)]
    for some in (asks[:1], asks[1:4], asks[4:]):
        assert max(differences(tiny, some, generate(llm, some))) < TOLERANCE
    assert len(used) == 1 + 1 + 2
    prompts = [random_ids(16, seed) for seed in range(5)]
    replayed = probe.scores(prompts)
    monkeypatch.setattr(probe, "_replays", [])
    torch.testing.assert_close(torch.tensor(replayed), torch.tensor(probe.scores(prompts)))


@pytest.mark.parametrize("fault", ["refused", "wrong"])
def test_a_probe_that_cannot_be_captured_says_so(llm, monkeypatch, caplog, fault):
    def captured(run, device):
        if fault == "refused":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: run() + 0.1

    probe = llm.llm_engine.model_executor.driver_worker.worker._probe
    monkeypatch.setattr("flux_attention.serving.probe.captured", captured)
    probe.capture(2)
    assert not probe._replays
    assert "runs eagerly" in caplog.text and ("differ" if fault == "wrong" else "not permitted") in caplog.text


def test_blocks_follow_the_route(llm, tiny):
    """After prefill a request holds sinks + window + what follows in the window's last block, per sparse layer."""
    size, config = 32, tiny.controller.config
    engine, prompt = llm.llm_engine, random_ids(500, seed=5)
    for name, sparse in (("dense", ()), ("static:0,3", (0, 3)), ("sparse", (0, 1, 2, 3))):
        ask = Ask(tuple(prompt), (("flux_policy", name),), tokens=70)
        engine.add_request("one", {"prompt_token_ids": prompt}, ask.parameters())
        seen = 0
        while engine.has_unfinished_requests():
            before = {r.request_id: r.num_computed_tokens for r in scheduler(llm).running}
            outputs = engine.step()
            if not before or not scheduler(llm).running:
                continue
            (computed,) = before.values()
            if computed < len(prompt):
                continue
            seen += 1
            managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
            for layer, manager in enumerate(managers):
                ((_, blocks),) = manager.req_to_blocks.items()
                dense = -(-(computed + 1) // size)
                start = computed // config.block_tokens * config.block_tokens - config.window_tokens
                gap = (start - config.sink_tokens) // size
                assert sum(not block.is_null for block in blocks) == dense - (gap if layer in sparse else 0)
        assert seen > 60
        report = outputs[0].kv_transfer_params["flux"]
        assert report["sparse_layers"] == list(sparse) and (report["kv_saved"] > 0) == bool(sparse)


def test_random_requests_and_aborts_leave_nothing(llm, tiny):
    assert harness.random_traffic(llm, requests=500) > 100
    assert free_blocks(llm)[0] == free_blocks(llm)[1]
    asks = mixed_asks(tiny, random_ids(4000), LENGTHS)
    assert max(differences(tiny, asks, generate(llm, asks))) < TOLERANCE


def test_preemption_keeps_the_decision(start, tiny):
    # Four layers, one group each: 640 + 90 tokens need 23 blocks a layer dense; several such requests do not fit. The
    # last one is preempted first, and dense ones, which grow, see to it that one is, whatever the router says.
    llm = start(tiny, max_num_batched_tokens=256, num_gpu_blocks_override=150, max_model_len=1024)
    kinds = [(400, "dense"), (640, "static:1"), (350, "dense"), (300, ""), (500, "")]
    asks = [
        Ask(tuple(random_ids(length, seed)), (("flux_policy", policy),) if policy else (), 90)
        for seed, (length, policy) in enumerate(kinds * 2)
    ]
    probed = []
    worker = llm.llm_engine.model_executor.driver_worker.worker
    scores = worker._probe.scores
    worker._probe.scores = lambda ends: probed.extend(ends) or scores(ends)
    outputs = generate(llm, asks)
    assert sum(harness.preemptions(llm)) > 0
    assert len(probed) == sum(not ask.options for ask in asks)
    assert max(differences(tiny, asks, outputs)) < TOLERANCE
    assert free_blocks(llm)[0] == free_blocks(llm)[1]


@pytest.mark.parametrize("bundle", [2, [[0, 3], [1, 2]], 4])
def test_bundles_of_layers(start, tiny, bundle):
    llm = start(tiny, flux={"kv_bundle": bundle}, max_model_len=1024, enable_prefix_caching=True)
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    assert len(groups) == (1 if bundle == 4 else 2)
    asks = mixed_asks(tiny, random_ids(4000), LENGTHS[-8:], tokens=40)
    asks.append(Ask(tuple(random_ids(500)), (("flux_policy", "static:0,3"),), 4))
    outputs = generate(llm, asks)
    assert max(differences(tiny, asks, outputs)) < TOLERANCE
    saves = any(set(group.kv_cache_spec.bundle) <= {0, 3} for group in groups)
    assert (outputs[-1].kv_transfer_params["flux"]["kv_saved"] > 0) == saves
    assert saves or bundle != [[0, 3], [1, 2]]


def test_qwen3(start, tmp_path):
    reference = harness.tiny("qwen3", tmp_path)
    llm = start(reference, max_num_batched_tokens=128, max_model_len=1024)
    asks = mixed_asks(reference, random_ids(4000), LENGTHS, tokens=20)
    assert max(differences(reference, asks, generate(llm, asks))) < TOLERANCE


def test_inline_routing(start, tiny):
    plain = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048, "max_model_len": 1024}
    llm = start(tiny, flux={"router_input": "inline"}, num_gpu_blocks_override=150, **plain)
    asks = [ask for ask in mixed_asks(tiny, random_ids(4000), LENGTHS, tokens=40) if "sparsity" not in str(ask.options)]
    asks += [Ask(tuple(random_ids(400, seed)), tokens=40) for seed in range(6)]
    controller = tiny.controller
    before, controller.config = controller.config, replace(controller.config, router_input="inline")
    try:
        outputs = generate(llm, asks)
        assert max(differences(tiny, asks, outputs)) < TOLERANCE
    finally:
        controller.config = before
    assert sum(harness.preemptions(llm)) > 0
    assert any(output.kv_transfer_params["flux"]["kv_saved"] > 0 for output in outputs)
    assert free_blocks(llm)[0] == free_blocks(llm)[1]
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="routes inline"):
        generate(llm, [Ask(asks[0].prompt, (("flux_max_sparsity", 0.5),))])


def test_compiled_model(start, tiny):
    """Routing sits outside of what is compiled; the probe runs the same modules eagerly."""
    llm = start(tiny, enforce_eager=False, max_num_batched_tokens=128, max_model_len=1024, enable_prefix_caching=True)
    asks = mixed_asks(tiny, random_ids(4000), LENGTHS[-9:], tokens=20)
    assert max(differences(tiny, asks, generate(llm, asks))) < TOLERANCE


def test_an_adapter_of_another_model_is_refused(start, tiny):
    with pytest.raises(ValueError, match="num_hidden_layers 30 ≠ 4"):
        start(replace(tiny, adapter="smollm2-135m-instruct"))


def test_an_adapter_that_replaces_weights(start, tmp_path):
    """The engine runs on the adapter's q, k and v, dense requests too, as an attached model does."""
    reference = harness.tiny("llama", tmp_path)
    controller = reference.controller
    model = controller.model
    names = [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 2, 3) for part in "qkv"]
    delta = {name: model.get_parameter(name).detach() * 1.3 for name in names}
    save_adapter(reference.adapter, controller.config, controller.router.state_dict(), delta)
    detach(model)
    asks = mixed_asks(reference, random_ids(4000), LENGTHS, tokens=8)
    attached = harness.Reference(reference.folder, reference.adapter, attach(model, reference.adapter))
    llm = start(attached, max_num_batched_tokens=128, max_model_len=1024)
    outputs = generate(llm, asks)
    assert max(differences(attached, asks, outputs)) < TOLERANCE
    tokens = list(outputs[1].outputs[0].token_ids)
    ours = attached.logprobs(asks[1].prompt, tokens, ())
    attached.controller.delta.revert(model)
    # What the weights matter: else the comparison could not fail.
    theirs = harness.Reference("", "", attached.controller).logprobs(asks[1].prompt, tokens, ())
    assert float((ours - theirs).abs().max()) > 20 * TOLERANCE
    with pytest.raises(DeltaError, match="load-format"):
        start(attached, load_format="dummy")


def test_the_second_model_runner_is_refused(start, tiny, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    # It needs Triton, which processors lack: vLLM would refuse it here before the plugin is asked.
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        start(tiny)
