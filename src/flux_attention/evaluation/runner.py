"""Runs samples through an attached model under one policy and says, per sample, how well and how sparsely.

Teacher forcing scores a reference answer in the same pass that reads the prompt: only the prompt is routed, as it
would be when serving (`training.answers`). Generation scores the text that the model writes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from flux_attention.config import FluxConfig
from flux_attention.data import Sample, make_samples
from flux_attention.data.progress import Progress, tqdm_progress
from flux_attention.evaluation.metrics import score, span_accuracy
from flux_attention.generation import generate
from flux_attention.models.controller import FluxAttention
from flux_attention.modes import REGISTRY
from flux_attention.route import Dial, Policy, Route
from flux_attention.training.answers import forced_logits

Scoring = Literal["auto", "forced", "generated"]
SCORINGS: tuple[str, ...] = ("auto", "forced", "generated")


@dataclass(frozen=True)
class Record:
    """One sample under one policy.

    Attributes:
        index: the sample's number within its task, length and seed.
        tokens: of the prompt.
        score: in [0, 1]; None for tasks that are scored by NLL alone.
        exact: whether every answer token was the model's first choice; None when nothing was teacher-forced.
        nll: nats per answer token; None when nothing was teacher-forced.
        sparsity: Ω of the prompt's route.
        route: one character per routable layer, "1" = full (per KV head of a `HeadRoute`).
        p_full: the router's probabilities; None under a policy without scores.
        kv_share: bytes of KV cache after prefill, over dense.
        depth: where the needle was, in [0, 1]; None for tasks without one.
        document: which text the prompt is about, where several samples share few; else None.
        text: what the model wrote; None when nothing was generated.
    """

    task: str
    task_class: str
    metric: str
    length: int
    index: int
    tokens: int
    score: float | None
    exact: bool | None
    nll: float | None
    sparsity: float
    route: str
    p_full: tuple[float, ...] | None
    kv_share: float
    depth: float | None = None
    document: str | int | None = None
    text: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json` can write."""
        return {**asdict(self), "p_full": None if self.p_full is None else [round(p, 4) for p in self.p_full]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        return cls(**{**data, "p_full": None if data["p_full"] is None else tuple(data["p_full"])})


@dataclass(frozen=True)
class RunOptions:
    """How samples are run.

    Attributes:
        batch_size: samples packed into one pass.
        scoring: "forced" teacher-forces the reference, "generated" lets the model write, "auto" generates only where
            a right answer may be worded otherwise (`Sample.teacher_forced`) and no NLL is asked for.
        extra_tokens: how far beyond the reference's length generation may go.
    """

    batch_size: int = 1
    scoring: Scoring = "auto"
    extra_tokens: int = 16

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("extra_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {self.scoring!r}")

    def generates(self, sample: Sample) -> bool:
        if sample.metric == "nll":
            return False
        return self.scoring == "generated" or (self.scoring == "auto" and not sample.teacher_forced)


def kv_share(config: FluxConfig, route: Route, tokens: Sequence[int]) -> list[float]:
    """Share of a dense cache's pages that each sequence holds after a prefill of `tokens[s]` tokens."""
    return [kv_share_of(config, omega, n) for omega, n in zip(route.sparsity.tolist(), tokens, strict=True)]


def kv_share_of(config: FluxConfig, omega: float, tokens: int) -> float:
    """Share of a dense cache's pages that a prompt of `tokens` holds at sparsity `omega`."""
    page, sinks = config.block_tokens, config.sink_tokens
    whole = -(-tokens // page)
    kept_from = max(sinks, tokens // page * page - config.window_tokens)
    sparse = whole - (kept_from - sinks) // page if REGISTRY[config.sparse_mode].drops_keys else whole
    return ((1 - omega) * whole + omega * sparse) / whole


def check_samples(controller: FluxAttention, samples: Sequence[Sample], extra_tokens: int = 0) -> None:
    """Raises ValueError for a sample that the model's context cannot hold, before anything is run."""
    limit = getattr(controller.decoder.config, "max_position_embeddings", None)
    for sample in samples:
        needed = len(sample) + extra_tokens
        if limit is not None and needed > limit:
            raise ValueError(
                f"task {sample.task!r} at length {sample.meta.get('length', len(sample))} needs {needed} tokens, the "
                f"model's context has {limit}: choose a shorter length"
            )


def evaluate(
    controller: FluxAttention,
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    n: int,
    *,
    seed: int = 0,
    split: str = "test",
    policy: Policy | None = None,
    dial: Dial | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Make the samples of `tasks` × `lengths` and run them; the same arguments give the same samples every time.

    Args:
        tasks: names or aliases of `flux_attention.data`.
        n: samples per task and length.
        policy: what routes; None = the adapter's router.
        dial: range of sparsity that the router is held in.
        progress: wraps an iterable of batches with its length and a label; None = a tqdm bar.

    Raises:
        ValueError: unknown task, a length the model or the task cannot take, n < 1.
    """
    samples = [s for task in tasks for length in lengths for s in make_samples(task, n, length, seed, split, tokenizer)]
    return run_samples(
        controller, tokenizer, samples, policy=policy, dial=dial, options=options, progress=progress, label="evaluate"
    )


@torch.no_grad()
def run_samples(
    controller: FluxAttention,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    policy: Policy | None = None,
    dial: Dial | None = None,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    label: str = "",
) -> list[Record]:
    """Run given samples under a policy, in their order (see `evaluate`)."""
    options = options or RunOptions()
    check_samples(controller, samples, options.extra_tokens if any(map(options.generates, samples)) else 0)
    batches = list(_batches(samples, options))
    show = progress or tqdm_progress
    records: list[Record] = []
    with controller.using(policy, dial):
        for batch in show(batches, len(batches), label):
            records += score_batch(controller, tokenizer, batch, options)
    return records


def score_batch(
    controller: FluxAttention, tokenizer: Any, batch: Sequence[Sample], options: RunOptions
) -> list[Record]:
    """Samples of one kind of scoring in one pass, under the controller's policy."""
    if options.generates(batch[0]):
        return _generated(controller, tokenizer, batch, options)
    return _forced(controller, batch)


def _batches(samples: Sequence[Sample], options: RunOptions) -> Iterator[list[Sample]]:
    """Neighbours that are scored the same way, at most `batch_size` of them."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == options.batch_size or options.generates(sample) != options.generates(batch[0])):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


#: Answer tokens whose logits are scored at once: 0.4 GB of them in float32, at a vocabulary of 50,000.
_SCORED = 2048


def _forced(controller: FluxAttention, batch: Sequence[Sample]) -> list[Record]:
    logits, targets = forced_logits(controller, batch)
    parts = []
    # Float32 logits of a whole pass of running text would be several times what the model needs.
    step = max(1, _SCORED // max(map(len, targets)))
    for first in range(0, len(batch), step):
        log_p = torch.cat(logits[first : first + step]).float().log_softmax(-1)
        target = torch.cat(targets[first : first + step])
        parts.append((-log_p.gather(-1, target[:, None])[:, 0], log_p.argmax(-1) == target))
    # One copy to the host for each kind of result.
    losses, right = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    route = controller.last_route
    assert route is not None
    records, start = [], 0
    for i, sample in enumerate(batch):
        end = start + len(sample.answer_ids)
        correct = right[start:end].tolist()
        accuracy = None if sample.metric == "nll" else span_accuracy(correct, sample.scored_spans)
        nll = float(losses[start:end].double().mean())
        records.append(_record(controller, sample, route.select([i]), accuracy, all(correct), nll, None))
        start = end
    return records


def _generated(controller: FluxAttention, tokenizer: Any, batch: Sequence[Sample], options: RunOptions) -> list[Record]:
    from transformers import GenerationConfig

    stop = controller.model.generation_config.eos_token_id
    limit = max(len(s.answer_ids) for s in batch) + options.extra_tokens
    result = generate(
        controller.model,
        [torch.tensor(s.prompt_ids) for s in batch],
        # A model's own penalty would change what is measured.
        generation_config=GenerationConfig(
            do_sample=False, eos_token_id=stop, max_new_tokens=limit, repetition_penalty=1.0
        ),
    )
    result.cache.clear()
    records = []
    for i, sample in enumerate(batch):
        # Rows of a batch may run longer than their own limit would allow; alone they must score the same.
        tokens = result.tokens[i][: len(sample.answer_ids) + options.extra_tokens]
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        value = score(sample.metric, text, sample.answers)
        records.append(_record(controller, sample, result.route.select([i]), value, None, None, text))
    return records


def _record(
    controller: FluxAttention,
    sample: Sample,
    route: Route,
    value: float | None,
    exact: bool | None,
    nll: float | None,
    text: str | None,
) -> Record:
    tokens = len(sample.prompt_ids)
    return Record(
        task=sample.task,
        task_class=sample.task_class,
        metric=sample.metric,
        length=int(sample.meta.get("length", len(sample))),
        index=int(sample.meta.get("index", 0)),
        tokens=tokens,
        score=value,
        exact=exact,
        nll=nll,
        sparsity=float(route.sparsity[0]),
        route=route.column(0),
        p_full=None if route.p_full is None else tuple(route.p_full[:, 0].tolist()),
        kv_share=kv_share(controller.config, route, [tokens])[0],
        depth=sample.meta.get("depth"),
        document=sample.meta.get("document"),
        text=text,
    )
