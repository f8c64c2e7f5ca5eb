"""A router for Qwen3-8B on eight GPUs: 25 steps of four 128K packs, each shared by two GPUs; 13 M tokens.

    flux-attn data build chatqa2-long musique govreport xsum colt-132k=colt.jsonl --limit 1500 \\
        --model Qwen/Qwen3-8B --pack-tokens 131072 --out data/qwen3-8b-128k
    torchrun --nproc-per-node 8 recipes/qwen3_8b_8gpu.py
    accelerate launch --multi_gpu --num_processes 8 recipes/qwen3_8b_8gpu.py    # the same

Two GPUs hold half of a pack's tokens each and exchange heads in attention (Ulysses), so documents of 128K tokens need
no more memory than 64K on one. The frozen layers are sharded over all eight.
"""

from flux_attention.training.launch import main, short_run

PLAN = short_run(
    "qwen3-8b-128k",
    model="Qwen/Qwen3-8B",
    objective="distill",
    steps=25,
    pack_tokens=131072,
    accumulation=1,
    sequence_parallel=2,
    shard_backbone=True,
    settle_steps=5,
)

if __name__ == "__main__":
    main(PLAN)
