"""From which prompt length on routing pays on this machine: `flux-attn bench breakeven`.

    python benchmarks/breakeven.py --model smollm2 --adapter smollm2-135m-instruct --lengths 768,1024,1536

One engine of vLLM, each prompt dense and routed in turns; a routed request includes its probe. The shortest length from
which on routed requests are no slower is what to give to `flux-attn serve --break-even`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from typing import Any

# The engine in this process: its clock is ours.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")


def seconds(llm: Any, prompt: list[int], policy: str, tokens: int) -> float:
    """Of one request, alone, from its arrival to its last token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args={"flux_policy": policy})
    started = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", default="smollm2-135m-instruct")
    parser.add_argument("--lengths", default="768,1024,1536,2048")
    parser.add_argument("--tokens", type=int, default=16, help="to generate per request")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--engine", default="{}", help="further arguments of vllm.LLM, as JSON")
    options = parser.parse_args()
    from vllm import LLM
    from vllm.platforms import current_platform

    from flux_attention.models.adapter import load_adapter
    from flux_attention.models.backbones import SMOLLM2, converted_folder
    from flux_attention.serving.launch import engine_arguments

    lengths = sorted(int(length) for length in options.lengths.split(","))
    on_cpu = current_platform.is_cpu()
    arguments = {
        "max_model_len": lengths[-1] + options.tokens,
        "block_size": load_adapter(options.adapter).config.block_tokens,
        # Both ways see every prompt several times.
        "enable_prefix_caching": False,
        **engine_arguments(options.adapter, on_cpu=on_cpu, asynchronous=not on_cpu, flux={}),
        **json.loads(options.engine),
    }
    llm = LLM(str(converted_folder()) if options.model == SMOLLM2 else options.model, **arguments)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    rng, pays = random.Random(0), []
    seconds(llm, [7] * lengths[0], "router", options.tokens)
    print(f"{'tokens':>8} {'dense s':>9} {'routed s':>9}")
    for length in lengths:
        prompt = [rng.randrange(10, vocabulary) for _ in range(length)]
        runs: dict[str, list[float]] = {"dense": [], "router": []}
        for _ in range(options.repetitions):
            for policy, found in runs.items():
                found.append(seconds(llm, prompt, policy, options.tokens))
        dense, routed = (statistics.median(found) for found in runs.values())
        print(f"{length:>8} {dense:>9.3f} {routed:>9.3f}", flush=True)
        pays = [*pays, length] if routed <= dense else []
    print(f"routing pays from {pays[0]} tokens on" if pays else "routing does not pay at these lengths")
    return 0


if __name__ == "__main__":
    sys.exit(main())
