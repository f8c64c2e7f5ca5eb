"""Teacher-forced answers of samples: the logits that predict them, from one pass over rows of one length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flux_attention.data.sample import Sample
from flux_attention.models.controller import FluxAttention

#: Rows are padded to a multiple of this many tokens, so that passes come in few shapes.
ROW_TILE = 128


def forced_logits(controller: FluxAttention, samples: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits `[A, V]` and targets int64 `[A]` of each sample's A answer tokens, on the model's device.

    Only the prompts are routed, as they would be when serving; the head runs on the answers' positions alone. Rows
    are padded behind their answers, where no token before sees it: lengths that agree need no mask, and a layer whose
    sequences take different sides needs no index of its own.

    Raises ValueError for a sample beyond the model's context.
    """
    device, longest = controller.device, max(map(len, samples))
    limit = getattr(controller.decoder.config, "max_position_embeddings", None)
    columns = -(-longest // ROW_TILE) * ROW_TILE
    if limit is not None:
        columns = max(longest, min(columns, limit))
    rows, positions, answers = [], [], []
    ids = torch.empty(len(samples), columns, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row] = sample.answer_ids[-1]
        ids[row, : len(sample)] = torch.tensor((*sample.prompt_ids, *sample.answer_ids))
        count = len(sample.answer_ids)
        rows.append(torch.full((count,), row))
        # The logits of position t - 1 predict token t.
        positions.append(torch.arange(count) + len(sample.prompt_ids) - 1)
        answers.append(torch.tensor(sample.answer_ids))
    counts = [len(answer) for answer in answers]
    ids = ids.to(device)
    with controller.prompt_lengths([len(sample.prompt_ids) for sample in samples]):
        # The mask says that what ends the rows is meant, be it the padding token.
        output = controller.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    hidden = output.last_hidden_state[torch.cat(rows).to(device), torch.cat(positions).to(device)]
    logits = head_logits(controller, hidden)
    return list(logits.split(counts)), list(torch.cat(answers).to(device).split(counts))


def head_logits(controller: FluxAttention, hidden: Tensor) -> Tensor:
    """The output layer on chosen positions, `[n, H]` → `[n, V]` in the model's precision."""
    logits: Tensor = controller.model.get_output_embeddings()(hidden)
    softcap = getattr(controller.decoder.config, "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
