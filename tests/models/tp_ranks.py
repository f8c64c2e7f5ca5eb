"""What each rank of a split model runs in the tests of `generate`: `torchrun … tp_ranks.py FOLDER DTYPE`.

The folder holds the model and, by router input, its adapters, as `make_folder` leaves them. Each rank leaves
`found-RANK.pt` there.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux_attention.generation import generate
from flux_attention.models.adapter import save_adapter
from flux_attention.models.attach import attach, detach
from flux_attention.models.controller import FluxAttention
from flux_attention.route import Dial
from flux_attention.training.parallel import end_together
from tests.models.tiny import CONFIG, SHAPE, make_prompts, mixed_route

#: Heads and vocabulary divide by two, and the head dim is the least that Triton's kernels take.
WIDE = SHAPE | {
    "vocab_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_size": 192,
    "intermediate_size": 320,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE)),
}
ROUTERS = ("probe", "inline")


@torch.no_grad()
def decide_either_way(controller: FluxAttention, prompts: Sequence[Tensor]) -> None:
    """A random router whose layers run half of these prompts full."""
    router, pooled = controller.router, controller.probe(prompts)
    router.fit_input_scale(pooled)
    router.weights[-1].normal_(0, 1)
    logits = router(pooled)
    router.biases[-1][:, 1] += (logits[..., 0] - logits[..., 1]).median(1).values


def make_folder(folder: Path, family: str) -> None:
    """Save a random model, and an adapter for each router input whose layers decide either way."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    model.save_pretrained(folder / "model")
    prompts = [prompt % 96 for prompt in make_prompts(*range(90, 106))]
    for router in ROUTERS:
        controller = attach(model, replace(CONFIG, router_input=router))
        decide_either_way(controller, prompts)
        save_adapter(folder / router, controller.config, controller.router.state_dict())
        detach(model)


def the_prompts(device: torch.device) -> list[Tensor]:
    return [(prompt % 93 + 3).to(device) for prompt in make_prompts(300, 222, 97, 41)]


@torch.no_grad()
def outcomes(model: PreTrainedModel, folder: Path, *, graphs: bool | None = None) -> dict[str, Any]:
    """Routes, tokens, scores and logits of the cases that a split model must have in common with a whole one."""
    model.generation_config.eos_token_id = None
    found: dict[str, Any] = {}
    for router in ROUTERS:
        controller = attach(model, str(folder / router))
        prompts = the_prompts(controller.device)
        cases: dict[str, dict[str, Any]] = {"routed": {}, "fixed": {"route": mixed_route(len(controller.layers), 4)}}
        if router == "probe":
            cases["chunked"] = {"chunk_tokens": 64}
            found["by_head"] = controller.probe(prompts, by_head=True).cpu()
        for name, options in cases.items():
            result = generate(model, prompts, max_new_tokens=40, cuda_graph=graphs, **options)
            found[f"{router}_{name}"] = result.tokens
            found[f"{router}_{name}_route"] = result.route.use_full
            if result.route.p_full is not None:
                found[f"{router}_{name}_scores"] = result.route.p_full.cpu()
            result.cache.clear()
        # transformers' own generate, and a plain forward pass.
        if router == "probe":
            with controller.using(None, Dial(0.5, 0.5)):
                ids = prompts[0][None]
                found["logits"] = model(ids, use_cache=False).logits.float().cpu()
                found["theirs"] = model.generate(ids, max_new_tokens=20, do_sample=False).tolist()
                found["dial_route"] = controller.last_route.use_full
        # Every rank draws from a state of its own: what comes out must be one rank's all the same.
        torch.manual_seed(int(os.environ.get("RANK", "0")))
        sampling = GenerationConfig(do_sample=True, temperature=1.5, eos_token_id=None)
        found[f"{router}_sampled"] = generate(model, prompts, max_new_tokens=12, generation_config=sampling).tokens
        detach(model)
    return found


def load_split(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, its heads split over all ranks; CUDA where there is one for each."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=dtype)
    return model.eval()


def main() -> None:
    folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    faulthandler.dump_traceback_later(200, exit=True)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with end_together():
        found = outcomes(load_split(folder / "model", dtype), folder)
        torch.save(found, folder / f"found-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
