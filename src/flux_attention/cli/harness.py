"""lm-evaluation-harness runs an attached model as `flux`: its tasks, its scoring, our routes.

    flux-attn lm-eval --model flux --model_args pretrained=smollm2,adapter=smollm2-135m-instruct --tasks gsm8k

is `lm_eval` with this model registered. In a program of one's own, importing this module registers it as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from flux_attention.cli.session import choose_device, find_adapter
from flux_attention.models.adapter import load_adapter
from flux_attention.models.attach import attach
from flux_attention.models.backbones import choose_dtype, load_backbone
from flux_attention.route import Dial, parse_policy

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lm-evaluation-harness is not complete here ({error.name} is missing): pip install 'flux-attention[eval]'",
        name=error.name,
    ) from error


@register_model("flux")
class FluxLM(HFLM):
    """A routed model for lm-evaluation-harness.

    Args (of `--model_args`, with commas between them):
        pretrained: "smollm2", a folder or a Hub id.
        adapter: folder, Hub id or shipped name; by default the shipped one that fits.
        policy: as `flux-attn --policy`; static layers with "+" between them here (static:1+4+7).
        min_sparsity, max_sparsity: the dial.
        impl: kernel implementation of prefill.
        device, dtype: as for `flux-attn`.
        batch_tokens: tokens of a pass that scores given answers.

    `batch_size` counts prompts that are answered together. Everything else is HFLM's.

    Raises:
        ValueError, OSError, ImportError: whatever is wrong with the arguments.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        adapter: str | None = None,
        policy: str = "router",
        min_sparsity: float = 0.0,
        max_sparsity: float = 1.0,
        impl: str = "auto",
        device: str | None = None,
        dtype: str = "auto",
        batch_tokens: int = 8192,
        batch_size: int | str = 1,
        **more: Any,
    ) -> None:
        chosen, dial = parse_policy(policy.replace("+", ",")), Dial(float(min_sparsity), float(max_sparsity))
        where = choose_device(device or "auto")
        model, tokenizer = load_backbone(pretrained, dtype=choose_dtype(dtype, where), device=where)
        loaded = find_adapter(model) if adapter is None else load_adapter(adapter)
        self.controller = attach(model, loaded)
        self.controller.policy, self.controller.dial = chosen, dial
        self.controller.impl = impl
        self.batch_tokens = int(batch_tokens)
        self.adapter_source, self.policy_name = loaded.source, policy
        self._sparsity: list[float] = []
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **more)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation and whether it is the model's first choice throughout.

        Only the context is routed, as a prompt is; continuations follow in the same pass, packed without padding.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = []
        for i, (_, context, continuation) in enumerate(requests):
            # The harness' own rule: what does not fit is cut from the left.
            kept = (list(context) + list(continuation))[-(self.max_length + 1) :]
            rows.append((i, kept[: len(kept) - len(continuation)], kept[len(kept) - len(continuation) :]))
        rows.sort(key=lambda row: len(row[1]) + len(row[2]))
        bar = tqdm(total=len(rows), disable=disable_tqdm, desc="Running loglikelihood requests")
        batch: list[tuple[int, list[int], list[int]]] = []
        for place, row in enumerate(rows):
            batch.append(row)
            longest = len(rows[place + 1][1]) + len(rows[place + 1][2]) if place + 1 < len(rows) else self.batch_tokens
            if (len(batch) + 1) * longest > self.batch_tokens:
                for (i, _, _), answer in zip(batch, self._score(batch), strict=True):
                    found[i] = answer
                    text = requests[i][0]
                    if text is not None:
                        self.cache_hook.add_partial("loglikelihood", text, answer)
                bar.update(len(batch))
                batch = []
        bar.close()
        return found

    @torch.no_grad()
    def _score(self, batch: Sequence[tuple[int, list[int], list[int]]]) -> list[tuple[float, bool]]:
        ids: list[int] = []
        keep: list[int] = []
        positions: list[int] = []
        for _, context, continuation in batch:
            tokens = (context + continuation)[:-1]
            # The logits of position t - 1 predict token t.
            keep += range(len(ids) + len(context) - 1, len(ids) + len(tokens))
            ids += tokens
            positions += range(len(tokens))
        device = self.controller.device
        # A context of one token (rolling log-likelihood) is routed by what it predicts.
        prompts = [len(c) if len(c) > 1 else len(c) + len(n) - 1 for _, c, n in batch]
        with self.controller.prompt_lengths(prompts):
            logits = self.controller.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(keep, device=device),
            ).logits[0]
        self._note()
        log_p = logits.float().log_softmax(-1)
        targets = torch.tensor([t for _, _, continuation in batch for t in continuation], device=device)
        chosen = log_p.gather(-1, targets[:, None])[:, 0]
        right = log_p.argmax(-1) == targets
        counts = [len(continuation) for _, _, continuation in batch]
        return [
            (float(values.double().sum()), bool(flags.all()))
            for values, flags in zip(chosen.split(counts), right.split(counts), strict=True)
        ]

    def _model_generate(self, *arguments: Any, **more: Any) -> torch.Tensor:
        answer: torch.Tensor = super()._model_generate(*arguments, **more)
        self._note()
        return answer

    def _note(self) -> None:
        if self.controller.last_route is not None:
            self._sparsity += self.controller.last_route.sparsity.tolist()

    def get_model_info(self) -> dict[str, Any]:
        """The harness' facts, and which adapter and policy routed at what mean Ω so far."""
        mean = sum(self._sparsity) / len(self._sparsity) if self._sparsity else None
        ours = {"flux_adapter": self.adapter_source, "flux_policy": self.policy_name, "flux_mean_sparsity": mean}
        return {**super().get_model_info(), **ours}


def run(arguments: Sequence[str]) -> None:
    """`lm_eval` with these arguments; `--model flux` is known to it."""
    from lm_eval.__main__ import cli_evaluate

    # It reads the command line itself.
    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
