"""The training objectives over packs: several documents a row, losses without logits, rows shared by several ranks.

Shapes: `T` tokens of a pack (`T/P` of them on this rank), `S` documents, `L` routable layers, `E` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flux_attention.models.attach import FluxAttention, Layout, SoftRouting, host_decisions
from flux_attention.router import gumbel_noise, straight_through_gate
from flux_attention.training.chunked_loss import chunked_cross_entropy, chunked_kl
from flux_attention.training.objective import AnswerObjective, TaskLoss
from flux_attention.training.parallel import Ulysses
from flux_attention.training.settle import RouteWindow


class PackedObjective(AnswerObjective):
    """`AnswerObjective` over one pack at a time.

    The loss of a pack is the mean over its documents. With the rows shared by P ranks, each rank's `loss` holds its own
    tokens P times: the mean of the ranks' gradients, which DDP takes, is then the gradient of the whole.

    Args:
        controller, loss, targets, noise, multiplier_start: as `AnswerObjective`.
        exchange: of the ranks that share a row.
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
    ) -> None:
        super().__init__(controller, loss, targets, noise=noise, multiplier_start=multiplier_start)
        self.exchange = exchange
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
        controller, exchange = self.controller, self.exchange
        counts, prompts = tuple(lengths.tolist()), tuple(prompt_lens.tolist())
        layout = pack_layout(input_ids.shape[1], counts)
        share = slice(None) if exchange is None else exchange.share(input_ids.shape[1])
        mine = {"input_ids": input_ids[:, share], "position_ids": position_ids[:, share]}
        rows = token_weight[0, share].nonzero()[:, 0]
        weight = token_weight[0, share][rows]

        def answers(soft: SoftRouting) -> Tensor:
            """Hidden states `[n, E]` of this rank's positions that predict an answer token."""
            with controller.soft_routing(soft), controller.prompt_lengths(prompts):
                hidden: Tensor = controller.decoder(**mine, use_cache=False).last_hidden_state
            return hidden[0, rows]

        teacher = None
        if self.loss == "distill":
            with torch.no_grad():
                teacher = answers(self._dense(layout))
        soft = self._routing(layout, input_ids, prompts)
        student = answers(soft)
        head = controller.model.get_output_embeddings().weight
        softcap = getattr(controller.decoder.config, "final_logit_softcapping", None)
        if teacher is None:
            task = chunked_cross_entropy(student, head, targets[0, share][rows], weight, softcap=softcap)
        else:
            task = chunked_kl(student, teacher, head, weight, softcap=softcap)
        assert soft.gates is not None and soft.logits is not None
        sparsity = 1 - soft.gates.float().mean(0)
        penalty = self.multipliers(sparsity, class_index)
        shares = 1 if exchange is None else exchange.ranks.shared
        return {
            "loss": shares * task + penalty,
            "task_loss": task.detach() if exchange is None else exchange.total(task),
            "penalty": penalty.detach(),
            "sparsity": sparsity.detach(),
            "class_index": class_index,
            "decisions": soft.logits.detach().argmax(-1),
        }

    def _dense(self, layout: Layout) -> SoftRouting:
        """Every layer full: the teacher."""
        layers, sequences = len(self.controller.layers), len(layout.counts)
        gates = torch.ones(layers, sequences, device=self.controller.device)
        return SoftRouting(
            forced=gates, forced_full=((True,) * sequences,) * layers, layout=layout, exchange=self.exchange
        )

    def _routing(self, layout: Layout, input_ids: Tensor, prompts: tuple[int, ...]) -> SoftRouting:
        """The student's gates: known before the pass with a probe, found layer by layer with an inline router."""
        controller = self.controller
        if controller.config.router_input == "inline":
            return SoftRouting(
                temperature=self.temperature,
                noise=self.noise,
                generator=self.generator,
                layout=layout,
                exchange=self.exchange,
            )
        flat = input_ids[0]
        pooled = controller.probe([flat[a : a + n] for a, n in zip(layout.starts, prompts, strict=True)])
        if self.exchange is not None:
            pooled = self.exchange.agreed(pooled)
        logits = self.router(pooled)
        noise = gumbel_noise(logits.shape, controller.device, self.generator) if self.noise else None
        gates = straight_through_gate(logits, self.temperature, noise)
        return SoftRouting(
            forced=gates,
            forced_full=host_decisions(gates),
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
