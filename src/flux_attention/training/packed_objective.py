"""The training objectives over packs: several documents a row, losses without logits, rows shared by several ranks.

Shapes: `T` tokens of a pack (`T/P` of them on this rank), `S` documents, `L` routable layers, `E` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_attention.models.controller import FluxAttention
from flux_attention.models.layout import Layout
from flux_attention.models.step import SoftRouting, host_decisions
from flux_attention.router import gumbel_noise, straight_through_gate
from flux_attention.training.chunked_loss import chunked_cross_entropy, chunked_kl
from flux_attention.training.objective import AnswerObjective, TaskLoss
from flux_attention.training.parallel import Ulysses
from flux_attention.training.settle import RouteWindow


@dataclass(frozen=True)
class _Row:
    """One row of documents, as a `packing.Pack` has it, with lengths on the host."""

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    token_weight: Tensor
    counts: tuple[int, ...]
    prompts: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        return pack_layout(self.input_ids.shape[1], self.counts)

    def only(self, members: Sequence[int], multiple: int) -> _Row:
        """The row of some of its documents, filled up to a multiple of `multiple` tokens."""
        starts, counts = self.layout.starts, tuple(self.counts[s] for s in members)
        index = torch.cat([torch.arange(starts[s], starts[s] + self.counts[s]) for s in members])
        filling = -index.numel() % multiple
        device = self.input_ids.device
        index = F.pad(index, (0, filling)).to(device)
        ids, positions, targets, weight = (
            x[:, index] for x in (self.input_ids, self.position_ids, self.targets, self.token_weight)
        )
        if filling:
            # Positions that begin anew, and nothing to learn.
            positions[:, -filling:] = torch.arange(filling, device=device)
            weight[:, -filling:] = 0.0
        return _Row(ids, positions, targets, weight, counts, tuple(self.prompts[s] for s in members))


class PackedObjective(AnswerObjective):
    """`AnswerObjective` over one pack at a time.

    The loss of a pack is the mean over its documents. With the rows shared by P ranks, each rank's `loss` holds its own
    tokens P times: the mean of the ranks' gradients, which DDP takes, is then the gradient of the whole.

    Args:
        controller, loss, targets, noise, multiplier_start: as `AnswerObjective`.
        exchange: of the ranks that share a row.
        skip_full: leave documents whose gates are all full out of the passes of `distill`. They are the dense model:
            their KL is 0, and so is its gradient. Needs gates that are known beforehand, so a probe.
        always_passes: where that would leave out all of a pack's documents, run the passes with the shortest. Ranks
            that gather the layers' weights from each other have to pass through them equally often.
    """

    def __init__(
        self,
        controller: FluxAttention,
        loss: TaskLoss,
        targets: Mapping[str, float],
        *,
        noise: bool = True,
        multiplier_start: float = 0.25,
        exchange: Ulysses | None = None,
        skip_full: bool = True,
        always_passes: bool = False,
    ) -> None:
        super().__init__(controller, loss, targets, noise=noise, multiplier_start=multiplier_start)
        self.exchange, self.skip_full, self.always_passes = exchange, skip_full, always_passes
        #: Where the trainer collects decisions, to see when they settle; None = nowhere.
        self.window: RouteWindow | None = None

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor,
        token_weight: Tensor,
        lengths: Tensor,
        prompt_lens: Tensor,
        class_index: Tensor,
    ) -> dict[str, Tensor]:
        """One `packing.Pack`, whole on every rank that shares it; returns what `AnswerObjective` does.

        Besides, `decisions`: `[L, S]`, whether the router would run full without noise.
        """
        counts, prompts = tuple(lengths.tolist()), tuple(prompt_lens.tolist())
        row = _Row(input_ids, position_ids, targets, token_weight, counts, prompts)
        soft = self._routing(row)
        task = self._task(row, soft)
        assert soft.gates is not None and soft.logits is not None
        sparsity = 1 - soft.gates.float().mean(0)
        penalty = self.multipliers(sparsity, class_index)
        shares = 1 if self.exchange is None else self.exchange.ranks.shared
        return {
            "loss": shares * task + penalty,
            "task_loss": task.detach() if self.exchange is None else self.exchange.total(task),
            "penalty": penalty.detach(),
            "sparsity": sparsity.detach(),
            "class_index": class_index,
            "decisions": soft.logits.detach().argmax(-1),
        }

    def _task(self, row: _Row, soft: SoftRouting) -> Tensor:
        """This rank's part of the loss; `soft.gates` and `soft.logits` are known afterwards."""
        if self.loss == "distill" and self.skip_full and soft.forced is not None:
            assert soft.forced_exact is not None
            soft.gates = soft.forced
            sparse = [s for s in range(len(row.counts)) if not all(layer[s] for layer in soft.forced_exact)]
            if not sparse and not self.always_passes:
                return row.token_weight.new_zeros(())
            sparse = sparse or [min(range(len(row.counts)), key=row.counts.__getitem__)]
            if len(sparse) < len(row.counts):
                row = row.only(sparse, 1 if self.exchange is None else self.exchange.ranks.shared)
                soft = replace(
                    soft,
                    forced=soft.forced[:, sparse],
                    forced_exact=tuple(tuple(layer[s] for s in sparse) for layer in soft.forced_exact),
                    layout=row.layout,
                )
        controller, exchange = self.controller, self.exchange
        share = slice(None) if exchange is None else exchange.share(row.input_ids.shape[1])
        mine = {"input_ids": row.input_ids[:, share], "position_ids": row.position_ids[:, share]}
        learned = row.token_weight[0, share].nonzero()[:, 0]
        weight = row.token_weight[0, share][learned]

        def answers(routing: SoftRouting) -> Tensor:
            """Hidden states `[n, E]` of this rank's positions that predict an answer token."""
            with controller.soft_routing(routing), controller.prompt_lengths(row.prompts):
                hidden: Tensor = controller.decoder(**mine, use_cache=False).last_hidden_state
            return hidden[0, learned]

        head = controller.model.get_output_embeddings().weight
        softcap = getattr(controller.decoder.config, "final_logit_softcapping", None)
        if self.loss == "lm":
            return chunked_cross_entropy(answers(soft), head, row.targets[0, share][learned], weight, softcap=softcap)
        with torch.no_grad():
            teacher = answers(self._dense(row.layout))
        return chunked_kl(answers(soft), teacher, head, weight, softcap=softcap)

    def _dense(self, layout: Layout) -> SoftRouting:
        """Every layer full: the teacher."""
        layers, sequences = len(self.controller.layers), len(layout.counts)
        gates = torch.ones(layers, sequences, device=self.controller.device)
        return SoftRouting(
            forced=gates, forced_exact=((True,) * sequences,) * layers, layout=layout, exchange=self.exchange
        )

    def _routing(self, row: _Row) -> SoftRouting:
        """The student's gates: known before the pass with a probe, found layer by layer with an inline router."""
        controller, layout = self.controller, row.layout
        if controller.config.router_input == "inline":
            return SoftRouting(
                temperature=self.temperature,
                noise=self.noise,
                generator=self.generator,
                layout=layout,
                exchange=self.exchange,
            )
        flat = row.input_ids[0]
        pooled = controller.probe([flat[a : a + n] for a, n in zip(layout.starts, row.prompts, strict=True)])
        if self.exchange is not None:
            pooled = self.exchange.agreed(pooled)
        logits = self.router(pooled)
        noise = gumbel_noise(logits.shape, controller.device, self.generator) if self.noise else None
        gates = straight_through_gate(logits, self.temperature, noise)
        return SoftRouting(
            forced=gates,
            forced_exact=host_decisions(gates),
            layout=layout,
            exchange=self.exchange,
            logits=logits,
            pooled=pooled,
        )


def pack_layout(columns: int, counts: tuple[int, ...]) -> Layout:
    """Documents of `counts` tokens back to back in one row of `columns`; what is left over belongs to none."""
    starts, start = [], 0
    for count in counts:
        starts.append(start)
        start += count
    zeros = (0,) * len(counts)
    return Layout(1, columns, zeros, tuple(starts), counts, zeros)
