"""The parts of the vLLM plugin that need no vLLM: block tables, options, versions."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flux_attention.config import FluxConfig
from flux_attention.models.delta import BackboneDelta, DeltaError
from flux_attention.route import Dial, Static
from flux_attention.serving.bundles import by_rank, plan
from flux_attention.serving.compat import UnsupportedVLLMError, check_version
from flux_attention.serving.launch import command_line, engine_arguments
from flux_attention.serving.options import Deployment, EngineOptions, RequestOptions, check_request, probe_ends
from flux_attention.serving.tables import Pattern, VirtualBatch
from flux_attention.serving.weights import loading_with, replaced
from tests.unit.tiny_backbone import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = FluxConfig(sink_tokens=64, window_tokens=128, block_tokens=32)


# ---------------------------------------------------------------------------------------------------- block tables


@pytest.mark.parametrize("block_size", [32, 16])
def test_virtual_sequences_see_what_the_mask_says(block_size):
    pattern = Pattern.of(CONFIG, block_size)
    rng = np.random.default_rng(0)
    width = 40 * 32 // block_size
    # Every block has a number of its own, so that a table tells which positions it holds.
    blocks = (np.arange(8 * width, dtype=np.int32) + 1).reshape(8, width)
    for _ in range(60):
        ends = rng.integers(1, 900, 8)
        starts = np.where(rng.random(8) < 0.4, ends - 1, (ends * rng.random(8)).astype(int))
        sparse = rng.random(8) < 0.6
        batch = VirtualBatch.of(starts, ends, sparse, pattern)
        tensors = batch.tensors(torch.from_numpy(blocks), pattern)
        table = tensors.table.numpy()
        assert tensors.lengths.tolist() == batch.lengths.tolist()
        assert tensors.query_starts.tolist() == tensors.query_starts_cpu.tolist() == batch.query_starts.tolist()
        assert batch.query_starts[-1] == (ends - starts).sum()
        queries = [(row, t) for row in range(8) for t in range(starts[row], ends[row])]
        for v, row in enumerate(batch.rows):
            first, last = batch.query_starts[v : v + 2]
            length = int(batch.lengths[v])
            held = table[v].repeat(block_size)[:length] - 1
            position = (held % width) * block_size + np.arange(length) % block_size
            assert (held // width == row).all()
            for i in range(first, last):
                query_row, t = queries[i]
                assert query_row == row
                seen = position[: length - (last - 1 - i)]  # bottom-right causal
                every = np.arange(t + 1)
                window = t // 32 * 32 - CONFIG.window_tokens
                kept = every[(every < CONFIG.sink_tokens) | (every >= window)] if sparse[row] else every
                np.testing.assert_array_equal(np.sort(seen), kept)


def test_a_gap_is_what_no_later_query_sees():
    pattern = Pattern.of(CONFIG, 32)
    for position in range(700):
        first, last = pattern.gap(position)
        seen = {
            k // 32 for t in range(position, position + 64) for k in range(t + 1) if k < 64 or k >= t // 32 * 32 - 128
        }
        assert not seen & set(range(first, last))
        # Nothing more could go: the next block is still seen.
        assert position < 224 or last in seen


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_writes_the_same_tables():
    # A process of its own: triton reads the switch when it is first imported.
    code = """
import json, warnings
import numpy as np, torch
from tests.kernels import interpreter
warnings.simplefilter("ignore")
interpreter.repair()
from flux_attention.serving.compact_triton import compact_decode
from flux_attention.serving.tables import Pattern, VirtualBatch
rng, bad = np.random.default_rng(0), []
for case in range(12):
    size = (32, 16)[case % 2]
    pattern, rows, layers, width = Pattern(64, 128, 32, size), 7, 3, 300
    lengths = rng.integers(0, 4000 if case > 6 else 300, rows).clip(max=width * size).astype(np.int32)
    lengths[case % rows] = 0
    blocks = rng.integers(1, 10_000, (rows, width)).astype(np.int32)
    sparse = rng.random((layers, rows)) < 0.5
    tables, out = torch.full((layers, 9, width), -7, dtype=torch.int32), torch.zeros(layers, 9, dtype=torch.int32)
    compact_decode(torch.from_numpy(blocks), torch.from_numpy(lengths), torch.from_numpy(sparse.view(np.uint8)),
                   tables, out, sink=64, window=128, tile=32, block_size=size)
    for layer in range(layers):
        real = lengths > 0
        batch = VirtualBatch.of(lengths - 1, lengths, sparse[layer], pattern)
        expected = batch.tensors(torch.from_numpy(blocks), pattern).table.numpy()
        for row in range(rows):
            n = int(batch.lengths[row]) if real[row] else 0
            count = -(-n // size)
            if int(out[layer, row]) != n or (tables[layer, row, :count].numpy() != expected[row, :count]).any():
                bad.append([case, layer, row])
            if (tables[layer, row, count:] != -7).any():
                bad.append(["wrote behind", case, layer, row])
print(json.dumps(bad))
"""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []


def test_short_rows_drop_nothing():
    pattern = Pattern.of(CONFIG, 32)
    ends = np.arange(1, 700, dtype=np.int32)
    keys = np.arange(700)
    for end, drops in zip(ends, pattern.drops(ends), strict=True):
        t = end - 1
        seen = (keys <= t) & ((keys < CONFIG.sink_tokens) | (keys >= t // 32 * 32 - CONFIG.window_tokens))
        assert drops == (seen.sum() < end)
    assert 0 < pattern.drops(ends).sum() < len(ends)


# ---------------------------------------------------------------------------------------------------- options


def engine(flux, **changes):
    """As much of a vLLM configuration as the options look at."""
    from flux_attention.models.adapter import load_adapter

    backbone = load_adapter("smollm2-135m-instruct").config.backbone
    from transformers import LlamaConfig

    hf = LlamaConfig(
        num_hidden_layers=changes.pop("layers", 30),
        hidden_size=backbone.hidden_size,
        num_attention_heads=backbone.num_attention_heads,
        num_key_value_heads=backbone.num_key_value_heads,
        head_dim=backbone.head_dim,
    )
    if "model_type" in changes:
        hf.model_type = changes.pop("model_type")
    default = {
        "block_size": 128,
        "enable_prefix_caching": False,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "enable_chunked_prefill": False,
        "disable_hybrid_kv_cache_manager": False,
        "enforce_eager": True,
        "enable_prompt_embeds": False,
        "disable_cascade_attn": True,
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
        "use_v2_model_runner": False,
    }
    assert set(changes) <= set(default)
    values = SimpleNamespace(**{**default, **changes})
    return SimpleNamespace(
        additional_config={} if flux is None else {"flux": flux},
        model_config=SimpleNamespace(
            hf_config=hf,
            hf_text_config=hf,
            enforce_eager=values.enforce_eager,
            enable_prompt_embeds=values.enable_prompt_embeds,
            disable_cascade_attn=values.disable_cascade_attn,
        ),
        cache_config=values,
        parallel_config=values,
        scheduler_config=values,
        speculative_config=values.speculative_config,
        kv_transfer_config=values.kv_transfer_config,
        lora_config=values.lora_config,
        use_v2_model_runner=values.use_v2_model_runner,
    )


ADAPTER = {"adapter": "smollm2-135m-instruct"}


def test_a_deployment_knows_its_layers():
    found = Deployment.of(engine({**ADAPTER, "kv_bundle": 5, "break_even_tokens": 1000}))
    assert found.layers == 30 and not found.inline and found.break_even == 1000
    assert found.options.bundle_size(30) == 5
    sizes = {layers: EngineOptions(**ADAPTER).bundle_size(layers) for layers in (4, 6, 28, 30, 32, 36, 37)}
    assert sizes == {4: 1, 6: 1, 28: 4, 30: 5, 32: 4, 36: 6, 37: 1}
    assert Deployment.of(engine({**ADAPTER, "break_even_tokens": 0})).break_even == 640


@pytest.mark.parametrize(
    ("flux", "changes", "message"),
    [
        (None, {}, "flux-attn serve"),
        ({}, {}, r"flux\.adapter is missing"),
        ({"adapter": "no-such-one"}, {}, "no adapter 'no-such-one'"),
        ({**ADAPTER, "windows": 3}, {}, "unknown option flux.windows"),
        ({**ADAPTER, "kv_bundle": 7}, {}, "divisor of the model's 30 routable layers, got 7"),
        ({**ADAPTER, "kv_bundle": [[0, 1], [2]]}, {}, "lists of equal length"),
        ({**ADAPTER, "kv_bundle": True}, {}, r"flux\.kv_bundle must be"),
        ({**ADAPTER, "kv_bundle": [1, 2]}, {}, r"flux\.kv_bundle must be"),
        ({**ADAPTER, "kv_bundle": [["a", "b"], [1, 2]]}, {}, r"flux\.kv_bundle must be"),
        ({**ADAPTER, "break_even_tokens": -1}, {}, r"flux\.break_even_tokens must be"),
        ({**ADAPTER, "router_input": "oracle"}, {}, "one of probe, inline"),
        (ADAPTER, {"layers": 12}, "num_hidden_layers 30 ≠ 12"),
        (ADAPTER, {"model_type": "gemma3_text"}, "'gemma3_text' is not served"),
        (ADAPTER, {"block_size": 48}, "must divide the adapter's block of 128"),
        (ADAPTER, {"pipeline_parallel_size": 2}, "pipeline parallelism"),
        (ADAPTER, {"decode_context_parallel_size": 2}, "decode context parallelism"),
        (ADAPTER, {"speculative_config": object()}, "speculative decoding"),
        (ADAPTER, {"kv_transfer_config": object()}, "KV transfer"),
        (ADAPTER, {"lora_config": object()}, "LoRA"),
        (ADAPTER, {"disable_cascade_attn": False}, "cascade attention"),
        (ADAPTER, {"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        (ADAPTER, {"disable_hybrid_kv_cache_manager": True}, "hybrid-kv-cache-manager"),
        ({**ADAPTER, "router_input": "inline"}, {"enable_chunked_prefill": True}, "excludes chunked prefill"),
        ({**ADAPTER, "router_input": "inline"}, {"enable_prefix_caching": True}, "excludes prefix caching"),
        ({**ADAPTER, "router_input": "inline"}, {"enforce_eager": False}, "excludes compiled models"),
    ],
)
def test_bad_engines_are_refused(flux, changes, message):
    with pytest.raises(ValueError, match=message):
        Deployment.of(engine(flux, **changes))


def test_requests_choose():
    assert RequestOptions.of(None, 30) == RequestOptions()
    assert RequestOptions.of({"other": 1, "flux_report": 1}, 30).report
    assert RequestOptions.of({"flux_max_sparsity": 0.5}, 30).dial == Dial(0.0, 0.5)
    assert RequestOptions.of({"flux_policy": "static:0,29"}, 30).policy == Static((0, 29))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flux_max_sparsity": float("nan")}, "flux_max_sparsity must be a number in"),
        ({"flux_max_sparsity": "0.5"}, "flux_max_sparsity must be a number"),
        ({"flux_max_sparsity": [0.5]}, "flux_max_sparsity must be a number"),
        ({"flux_policy": 3}, "flux_policy must be a policy's name"),
        ({"flux_policy": "static:30"}, "routable layers are 0 … 29"),
        ({"flux_policy": "interleaved:2"}, r"sparsity must be in \[0, 1\]"),
        ({"flux_report": "yes"}, "flux_report must be 0 or 1"),
        ({"flux_route": [True]}, "set by the engine"),
        ({"flux_dial": 1}, "unknown option flux_dial"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_request(engine(ADAPTER), SimpleNamespace(extra_args=options))
    check_request(engine(None), SimpleNamespace(extra_args=options))  # none of the plugin's business


def test_a_dial_needs_a_probe():
    with pytest.raises(ValueError, match="routes inline"):
        check_request(
            engine({**ADAPTER, "router_input": "inline"}), SimpleNamespace(extra_args={"flux_max_sparsity": 1 / 2})
        )


def test_the_probe_reads_both_ends():
    assert probe_ends(range(1000), 3) == [0, 1, 2, 997, 998, 999]
    assert probe_ends(range(4), 3) == [0, 1, 2, 3]  # what the ends share is read once, as on the transformers path


# ---------------------------------------------------------------------------------------------------- weights


class Loaded:
    """A model as vLLM's loaders see it."""

    def load_weights(self, weights):
        self.weights = dict(weights)
        return set(self.weights)


def test_replaced_weights_stand_in_the_checkpoints_place(tmp_path):
    delta = BackboneDelta.write(tmp_path, {"b": torch.full((2, 3), 5.0)})
    stream = [("a", torch.ones(2)), ("b", torch.ones(2, 3, dtype=torch.bfloat16)), ("c", torch.ones(1))]
    model, plain = Loaded(), Loaded.load_weights
    with loading_with(delta, Loaded):
        assert model.load_weights(iter(stream)) == {"a", "b", "c"}
    assert Loaded.load_weights is plain
    assert torch.equal(model.weights["b"], torch.full((2, 3), 5.0, dtype=torch.bfloat16))
    assert model.weights["b"].dtype == torch.bfloat16 and model.weights["a"] is stream[0][1]
    with loading_with(None, Loaded):
        model.load_weights(iter(stream))
    assert model.weights["b"] is stream[1][1]


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([("a", torch.ones(2))], "has no weight 'b'"),
        ([("b", torch.ones(3, 2))], r"is \[2, 3\], the checkpoint's is \[3, 2\]"),
        ([("b", torch.ones(2, 3).to(torch.float8_e4m3fn))], "unquantised"),
        ([("b", torch.ones(2, 3, dtype=torch.int8))], "unquantised"),
    ],
)
def test_replaced_weights_that_do_not_fit_are_refused(tmp_path, stream, message):
    delta = BackboneDelta.write(tmp_path, {"b": torch.full((2, 3), 5.0)})
    with pytest.raises(DeltaError, match=message):
        list(replaced(stream, delta))


def test_replaced_weights_are_never_left_out(tmp_path):
    delta = BackboneDelta.write(tmp_path, {"b": torch.full((2, 3), 5.0)})
    with pytest.raises(DeltaError, match="load-format"), loading_with(delta, Loaded):
        pass  # dummy weights: nothing is loaded by name


# ---------------------------------------------------------------------------------------------------- starting


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.27.2.dev3+g12"])
def test_supported_versions(version):
    assert check_version(version) == version


@pytest.mark.parametrize("version", ["0.25.1", "0.28.0", "1.0", "unknown"])
def test_other_versions_are_refused_with_the_range(version):
    with pytest.raises(UnsupportedVLLMError, match=r">=0\.26,<0\.28"):
        check_version(version)


def test_a_server_gets_the_plugins_options():
    line = command_line("some/model", ADAPTER["adapter"], ["--port", "1"], on_cpu=True, flux={"kv_bundle": 5})
    assert line[:2] == ["--model", "some/model"] and line[-2:] == ["--port", "1"]
    assert json.loads(line[line.index("--additional-config") + 1])["flux"] == {**ADAPTER, "kv_bundle": 5}
    assert line[line.index("--block-size") + 1] == "128"
    gpu = engine_arguments(ADAPTER["adapter"], on_cpu=False, asynchronous=True, flux={})
    assert gpu["attention_backend"] == "CUSTOM" and gpu["scheduler_cls"].endswith("FluxAsyncScheduler")
    for option in (
        "--scheduler-cls=x",
        "--scheduler_cls=x",
        "--additional_config",
        "--additional-config.flux.adapter=x",
    ):
        with pytest.raises(ValueError, match="set by flux-attn serve"):
            command_line("some/model", ADAPTER["adapter"], [option], on_cpu=True, flux={})
    line = command_line("some/model", ADAPTER["adapter"], ["--no_async_scheduling"], on_cpu=False, flux={})
    assert line[line.index("--scheduler-cls") + 1].endswith(".FluxScheduler")


# ---------------------------------------------------------------------------------------------------- bundles


def test_layers_of_neighbouring_rank_share_a_bundle():
    p_full = [[0.1, 0.9, 0.2, 0.8, 0.7, 0.1], [0.1, 0.9, 0.3, 0.7, 0.2, 0.2]]
    assert by_rank(p_full, 2) == ((0, 5), (2, 4), (1, 3))
    assert by_rank(p_full, 6) == (tuple(range(6)),)


def test_bundles_are_asked_for_or_found():
    def never(ends):
        raise AssertionError("nothing is to be found")

    options = EngineOptions(adapter="a", kv_bundle=[[3, 0], [1, 2]])
    assert plan(options, 4, 100, None, never) == ((0, 3), (1, 2))
    assert plan(replace(options, kv_bundle=1), 3, 100, None, never) == ((0,), (1,), (2,))
    assert plan(replace(options, kv_bundle=4), 4, 100, None, never) == ((0, 1, 2, 3),)
    with pytest.raises(ValueError, match="no tokenizer"):
        plan(replace(options, kv_bundle=2), 4, 100, None, never)
    seen = []

    def score(ends):
        seen.extend(ends)
        return [[0.9, 0.1, 0.8, 0.2]] * len(ends)

    tokenizer = make_tokenizer()
    assert plan(replace(options, kv_bundle=2), 4, 100, tokenizer, score) == ((1, 3), (0, 2))
    assert len(seen) == 24 and all(len(ends) == 200 for ends in seen)


def test_the_command_names_the_way_out(monkeypatch, capsys):
    from flux_attention.cli import main
    from flux_attention.serving import launch

    monkeypatch.setattr(launch, "check_version", lambda: check_version("0.30.0"))
    with pytest.raises(SystemExit) as left:
        main(["serve", "smollm2", "--adapter", "smollm2-135m-instruct", "--port", "1"])
    assert left.value.code == 2
    assert "vLLM 0.30.0 is not supported" in " ".join(capsys.readouterr().err.split())


def test_other_versions_run_without_the_plugin(monkeypatch, caplog):
    """vLLM calls `register` in every process of every engine, for the plugin's or not."""
    from flux_attention import serving
    from flux_attention.serving import compat

    monkeypatch.setattr(compat, "vllm_version", lambda: "0.30.0")
    serving.register()
    assert "vLLM 0.30.0 is not supported" in caplog.text
