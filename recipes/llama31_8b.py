"""A router for Llama-3.1-8B-Instruct on one 80 GB GPU, with the paper's own objective (cross entropy on the answers).

    flux-attn data build chatqa2-long musique govreport xsum --limit 1500 \\
        --model meta-llama/Llama-3.1-8B-Instruct --pack-tokens 65536 --out data/llama31-8b
    python recipes/llama31_8b.py
    torchrun --nproc-per-node 4 recipes/llama31_8b.py --accumulation 1    # the same numbers on four GPUs

Needs no teacher pass, so a step is a fifth cheaper than distillation; the answers must be right ones.
"""

from flux_attention.training.launch import main, short_run

PLAN = short_run(
    "llama31-8b",
    model="meta-llama/Llama-3.1-8B-Instruct",
    objective="lm",
    steps=60,
    pack_tokens=65536,
    accumulation=4,
    short_first=True,
    settle_steps=10,
)

if __name__ == "__main__":
    main(PLAN)
