"""`generate` on a model whose heads are split over two GPUs (`tp_plan`), or its layers (a device map), against one GPU.

    python benchmarks/generate_parallel.py --seconds 300         8 layers of Qwen3-8B's shapes, a 32K prompt
    python benchmarks/generate_parallel.py --tiny --device cpu   a rehearsal that a processor can run

The ranks must agree bit for bit. Against one GPU, sums in bfloat16 are in another order, so tokens are compared given
the same history (one GPU's answer), and once more without the positions where one GPU's two best logits are closer than
twice the largest difference between any two logits of the two models. Every figure is on the disk when it is known.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Recorder, add_run_options, label, run_sections
from model_8b import build, qwen3_8b, toy
from tests.models.tp_ranks import decide_either_way
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flux_attention.generation import generate
from flux_attention.models.adapter import save_adapter
from flux_attention.models.attach import attach, detach
from flux_attention.route import Fixed, Route
from flux_attention.training.parallel import end_together

# NVLink multicast is not there on every virtual machine with NVLink.
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def make_prompts(settings: dict[str, Any], vocabulary: int) -> list[Tensor]:
    """A long prompt, and two that share a batch with it in another run."""
    generator = torch.Generator().manual_seed(0)
    lengths = settings["prompt"], settings["prompt"] // 4 + 77, settings["prompt"] // 8
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]


def make_folder(folder: Path, settings: dict[str, Any], device: torch.device) -> None:
    """A random model, and an adapter whose layers decide either way."""
    config = toy() if settings["tiny"] else qwen3_8b(settings["layers"])
    # Divides by the ranks; the full one makes files that take longer to write than everything else.
    config.vocab_size = min(config.vocab_size, 32768)
    model = build(config, device, torch.float32 if settings["tiny"] else torch.bfloat16)
    model.save_pretrained(folder / "model")
    controller = attach(model)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, config.vocab_size, (500,), generator=generator) for _ in range(16)]
    decide_either_way(controller, prompts)
    save_adapter(folder / "adapter", controller.config, controller.router.state_dict())


@torch.no_grad()
def measure(
    model: PreTrainedModel, folder: Path, settings: dict[str, Any], answer: Tensor | None, fuse: bool | None = None
) -> dict[str, Any]:
    """Routes, tokens and seconds of a model; logits given `answer` `[n]` of the long prompt (None: its own)."""
    model.generation_config.eos_token_id = None
    controller = attach(model, str(folder / "adapter"), fuse=fuse)
    prompts = [p.to(controller.device) for p in make_prompts(settings, controller.decoder.config.vocab_size)]
    options = {"max_new_tokens": settings["tokens"], "tuned": False if controller.device.type == "cuda" else None}
    seconds, decode, result = [], [], None
    for _ in range(1 + settings["rounds"]):
        result = generate(model, prompts[0], **options)
        result.cache.clear()
        seconds.append(result.prefill_seconds)
        decode.append(result.decode_seconds)
    assert result is not None
    batch = generate(model, prompts, chunk_tokens=settings["chunk"], **options)
    batch.cache.clear()
    own = torch.tensor(result.tokens[0])
    given = own if answer is None else answer
    ids = torch.cat((prompts[0], given.to(controller.device)[:-1]))[None]
    # The same route for all, so that logits differ by rounding alone.
    layers = len(controller.layers)
    with controller.using(Fixed(Route(torch.arange(layers)[:, None] % 4 == 3))):
        logits = model(ids, use_cache=False, logits_to_keep=len(given)).logits[0].float().cpu()
    detach(model)
    return {
        "route": result.route.use_full,
        "scores": result.route.p_full.cpu(),
        "batch_route": batch.route.use_full,
        "tokens": own,
        "batch_tokens": torch.tensor(batch.tokens),
        "logits": logits,
        "prefill_s": seconds[1:],
        "decode_s": decode[1:],
        "graphs": not controller.is_split and controller.device.type == "cuda",
    }


def load(folder: Path, settings: dict[str, Any], **options: Any) -> PreTrainedModel:
    dtype = torch.float32 if settings["tiny"] else torch.bfloat16
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, **options)
    return model.eval()


def rank(folder: Path) -> None:
    """What a rank runs; it leaves its results in the folder."""
    settings = json.loads((folder / "settings.json").read_text())
    faulthandler.dump_traceback_later(settings["limit"], exit=True)
    number = int(os.environ["RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with end_together():
        model = load(folder, settings, tp_plan="auto")
        found = measure(model, folder, settings, torch.load(folder / "answer.pt"))
        torch.save(found, folder / f"rank-{number}.pt")


class Comparison:
    """One GPU's results, and what is compared with them."""

    def __init__(self, folder: Path, settings: dict[str, Any], device: torch.device, until: float) -> None:
        self.folder, self.settings, self.device, self.until = folder, settings, device, until
        self.whole: dict[str, Any] = {}

    def one(self, recorder: Recorder) -> None:
        """The model on one device, as it is run there: fused, decode steps replayed."""
        make_folder(self.folder, self.settings, self.device)
        model = load(self.folder, self.settings).to(self.device)
        self.whole = measure(model, self.folder, self.settings, None)
        recorder.note("whole_prefill_s", self.whole["prefill_s"])
        recorder.note("whole_decode_s", self.whole["decode_s"])
        sparsity = {key: 1 - self.whole[key].float().mean().item() for key in ("route", "batch_route")}
        recorder.note("sparsity", sparsity)
        torch.save(self.whole["tokens"], self.folder / "answer.pt")

    def tensor_parallel(self, recorder: Recorder) -> None:
        """Two ranks, which must agree bit for bit."""
        limit = max(30.0, self.until - time.perf_counter() - 5)
        (self.folder / "settings.json").write_text(json.dumps(self.settings | {"limit": limit}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        # The ranks find the package where this process does.
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
        if self.device.type == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        process = subprocess.Popen([*command, __file__, "--rank", str(self.folder)], env=environment)
        try:
            status = process.wait(limit + 10)
        finally:
            # The launcher passes this on to the ranks.
            process.terminate()
        if status:
            raise RuntimeError(f"the ranks ended with status {status}")
        first, second = (torch.load(self.folder / f"rank-{n}.pt") for n in range(2))
        names = ("route", "scores", "batch_route", "tokens", "batch_tokens", "logits")
        recorder.add("generate_tp2_ranks_differ", sum(not torch.equal(first[n], second[n]) for n in names), "outcomes")
        self.compare(recorder, "tp2", first)

    def device_map(self, recorder: Recorder) -> None:
        """Half of the layers on each GPU."""
        layers = self.settings["layers"]
        places: dict[str, int] = {f"model.layers.{i}": int(i >= layers // 2) for i in range(layers)}
        places |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
        model = load(self.folder, self.settings, device_map=places)
        self.compare(recorder, "map2", measure(model, self.folder, self.settings, self.whole["tokens"]))

    def compare(self, recorder: Recorder, name: str, found: dict[str, Any]) -> None:
        whole = self.whole
        equal = torch.cat([(found[key] == whole[key]).flatten() for key in ("route", "batch_route")])
        recorder.add(f"generate_{name}_routes_equal", float(equal.float().mean()), "share of decisions")
        recorder.note(f"{name}_scores_differ", float((found["scores"] - whole["scores"]).abs().max()))
        best = whole["logits"].topk(2).values
        margin, error = best[:, 0] - best[:, 1], float((found["logits"] - whole["logits"]).abs().max())
        same = found["logits"].argmax(-1) == whole["logits"].argmax(-1)
        clear = margin > 2 * error
        recorder.note(f"{name}_logits_differ", error)
        recorder.add(f"generate_{name}_tokens_equal", float(same.float().mean()), "share")
        recorder.note(f"{name}_positions_that_are_no_tie", int(clear.sum()))
        if clear.any():
            recorder.add(f"generate_{name}_tokens_equal_but_ties", float(same[clear].float().mean()), "share")
        free = (found["tokens"] == whole["tokens"]).tolist()
        recorder.note(f"{name}_free_running_equal_until", free.index(False) if False in free else len(free))
        ratio = min(whole["prefill_s"]) / min(found["prefill_s"])
        recorder.note(f"{name}_prefill_s", found["prefill_s"])
        recorder.note(f"{name}_decode_s", found["decode_s"])
        recorder.add(f"generate_{name}_prefill_{label(self.settings['prompt'])}_speedup", ratio, "×")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of the long prompt")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    parser.add_argument("--rounds", type=int, default=3, help="timed ones, after one to warm up")
    parser.add_argument("--seconds", type=float, default=300, help="time for everything")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank(options.rank)
        return 0
    until = time.perf_counter() + options.seconds
    faulthandler.dump_traceback_later(options.seconds + 30, exit=True)
    os.environ.update(ENVIRONMENT)
    names = ("tiny", "layers", "prompt", "tokens", "rounds")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.tiny:
        settings |= {"layers": toy().num_hidden_layers, "prompt": 4096, "tokens": 16, "rounds": 1}
    settings["chunk"] = settings["prompt"] // 4
    device = torch.device(options.device)
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        parser.error("two CUDA devices are needed; --tiny --device cpu is a rehearsal")
    out = options.out or (None if options.tiny else Path("benchmarks/results"))
    recorder = Recorder("generate-parallel", device, settings, out, options.commit)
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(Path(folder), settings, device, until)
        if failures := run_sections([("one device", comparison.one)], recorder, until):
            return failures
        sections = [("tensor parallel", comparison.tensor_parallel)]
        if device.type == "cuda":
            sections.append(("device map", comparison.device_map))
        return run_sections(sections, recorder, until)


if __name__ == "__main__":
    sys.exit(main())
