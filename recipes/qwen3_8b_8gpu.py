"""A router for Qwen3-8B on eight GPUs: 25 steps of four 128K packs, each shared by two GPUs; 13 M tokens.

    flux-attn data build chatqa2-long musique govreport xsum colt-132k=colt.jsonl --limit 1500 \\
        --model Qwen/Qwen3-8B --pack-tokens 131072 --out data/qwen3-8b-128k
    torchrun --nproc-per-node 8 recipes/qwen3_8b_8gpu.py
    accelerate launch --multi_gpu --num_processes 8 recipes/qwen3_8b_8gpu.py    # the same

Two GPUs hold half of a pack's tokens each and exchange heads in attention (Ulysses), so documents of 128K tokens need
no more memory than 64K on one. The frozen layers are sharded over all eight.
"""

from flux_attention.config import FluxConfig
from flux_attention.data import HOLISTIC, RETRIEVAL
from flux_attention.training.launch import PackRun, main
from flux_attention.training.scale import ScaleConfig

PLAN = PackRun(
    model="Qwen/Qwen3-8B",
    data="data/qwen3-8b-128k",
    out="adapters/qwen3-8b-128k",
    runs="runs/qwen3-8b-8gpu",
    flux=FluxConfig(sink_tokens=128, window_tokens=2048, full_bias=2.0),
    scale=ScaleConfig(
        objective="distill",
        targets={RETRIEVAL: 0.7, HOLISTIC: 1.0},
        pack_tokens=131072,
        sequence_parallel=2,
        shard_backbone=True,
        accumulation=1,
        steps=25,
        # A fraction of the published steps: the router starts less sure of full, it and the multipliers move faster.
        # Found on SmolLM2 (40 steps on a CPU); not yet tried at this size.
        router_lr=3e-3,
        multiplier_lr=0.1,
        multiplier_start=1.0,
        settle_steps=5,
        save_steps=5,
        logging_steps=1,
    ),
)

if __name__ == "__main__":
    main(PLAN)
