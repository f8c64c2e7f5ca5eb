"""From which prompt length on routing pays on this machine: `flux-attn bench breakeven`.

    flux-attn bench breakeven --model smollm2 --adapter smollm2-135m-instruct --lengths 768,1536,3072

One engine of vLLM answers every prompt dense and routed in turns, one request at a time; a routed request includes its
probe. The shortest length from which on routed requests are no slower is what to give to
`flux-attn serve --break-even`. Each time is the fastest of the repetitions: other work on the machine can only add.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

# The engine in this process, so that its clock is ours, and quiet, so that the table can be read.
for _name, _value in (
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ("VLLM_USE_V2_MODEL_RUNNER", "0"),
    ("VLLM_LOGGING_LEVEL", "WARNING"),
):
    os.environ.setdefault(_name, _value)

WAYS = ("dense", "router")


def request(llm: Any, prompt: list[int], policy: str, tokens: int) -> tuple[float, float]:
    """Seconds of one request, alone, from its arrival to its last token; and its share of sparse layers."""
    from vllm import SamplingParams

    options = {"flux_policy": policy, "flux_report": 1}
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=options)
    started = time.perf_counter()
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return time.perf_counter() - started, output.kv_transfer_params["flux"]["sparsity"]


def text_ids(tokenizer: Any, count: int) -> list[int]:
    """`count` tokens of text, repeated where it is short: random tokens are routed as no text is."""
    from flux_attention.data.corpus import documents

    text = "\n\n".join(document.text for document in documents("docstrings", "test"))
    ids = list(tokenizer(text[: 8 * count]).input_ids)
    return (ids * (count // len(ids) + 1))[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for flux-attn serve")
    parser.add_argument("--adapter", default="smollm2-135m-instruct")
    parser.add_argument("--lengths", default="768,1024,1536,2048", help="of prompts, in tokens")
    parser.add_argument("--tokens", type=int, default=16, help="to generate per request")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--engine", default="{}", help="further arguments of vllm.LLM, as JSON")
    options = parser.parse_args()
    from flux_attention.serving.compat import check_version

    check_version()
    from vllm import LLM
    from vllm.platforms import current_platform

    from flux_attention.models.adapter import load_adapter
    from flux_attention.models.backbones import SMOLLM2, converted_folder
    from flux_attention.serving.launch import engine_arguments

    config = load_adapter(options.adapter).config
    lengths = sorted(int(length) for length in options.lengths.split(","))
    if lengths[0] <= config.min_routed_tokens:
        parser.error(f"--lengths: prompts of at most {config.min_routed_tokens} tokens (sinks + window) are not routed")
    on_cpu = current_platform.is_cpu()
    arguments = {
        "max_model_len": lengths[-1] + options.tokens,
        "block_size": config.block_tokens,
        # Both ways see every prompt several times.
        "enable_prefix_caching": False,
        **engine_arguments(options.adapter, on_cpu=on_cpu, asynchronous=not on_cpu, flux={"break_even_tokens": 0}),
        **json.loads(options.engine),
    }
    llm = LLM(str(converted_folder()) if options.model == SMOLLM2 else options.model, **arguments)
    ids = text_ids(llm.get_tokenizer(), lengths[-1])
    for policy in WAYS:  # kernels are compiled or chosen when they first run
        request(llm, ids, policy, options.tokens)
    pays: list[int] = []
    print(f"{'tokens':>8} {'dense s':>9} {'routed s':>9} {'speedup':>8} {'sparse':>7}")
    for length in lengths:
        # The end of the text: prompts begin differently.
        prompt = ids[len(ids) - length :]
        seconds: dict[str, list[float]] = {policy: [] for policy in WAYS}
        for _ in range(options.repetitions):
            for policy in WAYS:
                spent, sparsity = request(llm, prompt, policy, options.tokens)
                seconds[policy].append(spent)
        dense, routed = (min(seconds[policy]) for policy in WAYS)
        print(f"{length:>8} {dense:>9.3f} {routed:>9.3f} {dense / routed:>7.2f}× {sparsity:>7.2f}", flush=True)
        pays = [*pays, length] if routed <= dense else []
    if pays:
        print(f"routing pays from {pays[0]} tokens on: flux-attn serve … --break-even {pays[0] - 1}")
    else:
        print(f"routing does not pay at these lengths; try above {lengths[-1]} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
