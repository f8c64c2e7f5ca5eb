"""A router for Qwen3-8B on one 80 GB GPU: 50 steps of four 64K packs, 13 M tokens.

    flux-attn data build chatqa2-long musique govreport xsum --limit 1500 \\
        --model Qwen/Qwen3-8B --pack-tokens 65536 --out data/qwen3-8b
    python recipes/qwen3_8b_1gpu.py            # --resume goes on after an interruption

The KL to the dense model needs no labels, and a router has few weights: what the published recipe spends 0.74 B tokens
on is cut to what the routes need. Training ends early when two windows of ten steps agree and both targets are met.
"""

from flux_attention.training.launch import main, short_run

PLAN = short_run(
    "qwen3-8b",
    model="Qwen/Qwen3-8B",
    objective="distill",
    steps=50,
    pack_tokens=65536,
    accumulation=4,
    short_first=True,
    settle_steps=10,
)

if __name__ == "__main__":
    main(PLAN)
