"""Attention inside a real engine against vLLM's own streaming attention, layer by layer (`rswa`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.serving.harness import Ask, generate, random_ids

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
# The first, an inner and the last query of every tile.
OFFSETS = (0, 13, 31)


@pytest.fixture
def watch(monkeypatch):
    """`watch(llm)`: (layer, request) → lists of queries, keys, values and outputs, an entry for each step to come."""
    from vllm.model_executor.models.utils import extract_layer_index

    from flux_attention.serving.attention import RoutedImpl, RoutedMetadata
    from flux_attention.serving.probe import ProbeMetadata

    def start(llm):
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        found = defaultdict(lambda: defaultdict(list))
        forward = RoutedImpl.forward

        def watched(self, layer, query, key, value, kv_cache, metadata, output, *args, **kwargs):
            result = forward(self, layer, query, key, value, kv_cache, metadata, output, *args, **kwargs)
            if metadata is not None and not isinstance(metadata, ProbeMetadata):
                plain = metadata.plain if isinstance(metadata, RoutedMetadata) else metadata
                starts = plain.query_start_loc.tolist()
                for row, name in enumerate(runner.input_batch.req_ids):
                    part = found[extract_layer_index(layer.layer_name), name]
                    tokens = slice(starts[row], starts[row + 1])
                    heads = {"queries": query, "keys": key, "values": value, "output": output}
                    for kind, tensor in heads.items():
                        part[kind].append(tensor[tokens].view(-1, tensor.shape[-2], tensor.shape[-1]).clone())
            return result

        monkeypatch.setattr(RoutedImpl, "forward", watched)
        return found

    return start


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, in its interpreter")
def test_layers_agree_with_the_engines_own_streaming_attention(start, tiny, watch, tmp_path):
    llm = start(tiny, max_num_batched_tokens=96, max_model_len=512)
    seen = watch(llm)
    asks = [
        Ask(tuple(random_ids(length, length)), (("flux_policy", policy),), tokens)
        for length, policy, tokens in ((230, "static:0,2", 70), (170, "static:1,2", 20))
    ]
    outputs = generate(llm, asks)
    parts = []
    for (layer, name), kinds in sorted(seen.items()):
        (output,) = [output for output in outputs if name.startswith(output.request_id)]
        sparse = layer in output.kv_transfer_params["flux"]["sparse_layers"]
        parts.append({kind: torch.cat(tensors) for kind, tensors in kinds.items()} | {"sparse": sparse})
        # Every token but the last one sampled, in several chunks and then one by one.
        assert len(parts[-1]["queries"]) == len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1
        assert len(kinds["queries"]) > len(output.outputs[0].token_ids)
    assert sorted(part["sparse"] for part in parts) == [False] * 4 + [True] * 4
    # A layer that is given for the other kind: it must show, or the comparison says nothing.
    parts += [part | {"sparse": not part["sparse"]} for part in parts[:2]]
    config = tiny.controller.config
    record = {
        "parts": parts,
        "offsets": OFFSETS,
        "sink": config.sink_tokens,
        "window": config.window_tokens,
        "tile": config.block_tokens,
        "scale": parts[0]["queries"].shape[-1] ** -0.5,
    }
    torch.save(record, tmp_path / "record")
    paths = os.pathsep.join((*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT / "src"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.rswa", str(tmp_path / "record"), str(tmp_path / "differences")],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differences = torch.load(tmp_path / "differences")
    assert max(differences[:8]) < 1e-4
    assert min(differences[8:]) > 1e-2
