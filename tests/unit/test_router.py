from __future__ import annotations

import functools
import itertools

import pytest
import torch

from flux_attention.router import LayerRouter, PoolPlan, gumbel_noise, pool_queries, straight_through_gate

HEADS, DIM, POOL = 3, 8, 5
LENGTHS = (1, 4, 7, 10, 11, 63)


def queries(length: int, seed: int) -> torch.Tensor:
    return torch.randn(length, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def by_definition(q: torch.Tensor, tail: int = 0) -> torch.Tensor:
    n = min(POOL, q.shape[0])
    ends = torch.cat((q[:n], q[q.shape[0] - n :])).double().mean((0, 1))
    return (ends + q[-tail:].double().mean((0, 1))) / 2 if tail else ends


@pytest.mark.parametrize("tail", [0, 1, 3, POOL])
def test_plain_padded_and_packed_agree_with_the_definition(tail):
    rows = [queries(n, seed) for seed, n in enumerate(LENGTHS)]
    expected = torch.stack([by_definition(q, tail) for q in rows]).float()
    width = max(LENGTHS) + 3
    plan = functools.partial(PoolPlan.build, pool_tokens=POOL, tail_tokens=tail)

    packed = pool_queries(torch.cat(rows), plan([0, *itertools.accumulate(LENGTHS[:-1])], LENGTHS))
    assert torch.allclose(packed, expected, atol=1e-6)
    for side in ("left", "right"):
        # Poisoned padding: NaN anywhere in it would show.
        batch = torch.full((len(rows), width, HEADS, DIM), float("nan"))
        starts = []
        for i, q in enumerate(rows):
            start = width - len(q) if side == "left" else 0
            batch[i, start : start + len(q)] = q
            starts.append(i * width + start)
        # Padded slots of the plan itself have weight 0 and index 0, which must hold a number.
        batch[0, 0] = batch[0, 0].nan_to_num(0.0)
        padded = pool_queries(batch.flatten(0, 1), plan(starts, LENGTHS))
        assert torch.allclose(padded, expected, atol=1e-6)
    for q, want in zip(rows, expected, strict=True):
        assert torch.allclose(pool_queries(q, plan([0], [len(q)]))[0], want, atol=1e-6)


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunks_add_up(chunk, tail):
    for seed, n in enumerate(LENGTHS):
        q, total = queries(n, seed), torch.zeros(1, DIM)
        for start in range(0, n, chunk):
            part = q[start : start + chunk]
            plan = PoolPlan.build([0], [len(part)], POOL, tail_tokens=tail, past=[start], totals=[n])
            total += pool_queries(part, plan)
        assert torch.allclose(total[0], by_definition(q, tail).float(), atol=1e-6)


def test_pooling_accumulates_in_fp32():
    q = queries(63, 0).to(torch.bfloat16)
    pooled = pool_queries(q, PoolPlan.build([0], [63], POOL))
    assert pooled.dtype == torch.float32
    assert torch.allclose(pooled[0], by_definition(q).float(), atol=1e-6)


def test_empty_prompt():
    with pytest.raises(ValueError, match="empty prompt"):
        PoolPlan.build([0], [0], POOL)


def test_one_layer_is_a_slice_of_all():
    torch.manual_seed(0)
    router = LayerRouter(4, DIM)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    router.fit_input_scale(torch.randn(4, 9, DIM) * 5 + 2)
    pooled = torch.randn(4, 3, DIM)
    together = router(pooled)
    for layer in range(4):
        assert torch.allclose(router(pooled[layer], layer), together[layer], rtol=1e-4, atol=1e-4)
        # The stacked weights are plain Linear layers.
        x = (pooled[layer] - router.input_mean[layer]) * router.input_scale[layer]
        for i, activate in enumerate((True, False, True, True, False)):
            x = torch.nn.functional.linear(x, router.weights[i][layer], router.biases[i][layer])
            x = torch.nn.functional.silu(x) if activate else x
        assert torch.allclose(x, together[layer], rtol=1e-4, atol=1e-3)
    assert together.shape == (4, 3, 2)
    assert torch.allclose(router.p_full(pooled), together.softmax(-1)[..., 1])


def test_starts_towards_full():
    router = LayerRouter(3, DIM)
    p_full = router.p_full(torch.randn(3, 7, DIM) * 100)
    assert torch.allclose(p_full, torch.tensor(4.5).sigmoid().expand_as(p_full))
    sizes = [tuple(w.shape[1:]) for w in router.weights]
    assert sizes == [(8 * DIM, DIM), (2 * DIM, 8 * DIM), (4 * DIM, 2 * DIM), (DIM, 4 * DIM), (2, DIM)]


def test_input_scale_whitens():
    router = LayerRouter(2, DIM)
    pooled = torch.randn(2, 200, DIM) * torch.tensor([100.0, 0.01])[:, None, None] + 3
    router.fit_input_scale(pooled)
    white = (pooled - router.input_mean[:, None]) * router.input_scale[:, None]
    assert torch.allclose(white.std(1), torch.ones(2, DIM), atol=1e-2)
    with pytest.raises(ValueError, match="pooled queries"):
        router.fit_input_scale(torch.randn(2, 1, DIM))


def test_bad_shapes():
    with pytest.raises(ValueError, match="do not fit a router of 2 layers"):
        LayerRouter(2, DIM)(torch.randn(3, 1, DIM))
    with pytest.raises(ValueError, match="at least one layer"):
        LayerRouter(0, DIM)


def test_gate_is_hard_forward_and_soft_backward():
    logits = torch.randn(4, 5, 2, requires_grad=True)
    noise = gumbel_noise((4, 5, 2), torch.device("cpu"), torch.Generator().manual_seed(0))
    z = straight_through_gate(logits, 1.2, noise)
    assert torch.equal(z.detach(), ((logits + noise).argmax(-1)).float())
    (gradient,) = torch.autograd.grad(z.sum(), logits)
    soft = ((logits + noise) / 1.2).softmax(-1)[..., 1]
    (wanted,) = torch.autograd.grad(soft.sum(), logits)
    assert torch.allclose(gradient, wanted)
    assert torch.equal(straight_through_gate(logits, 0.5).detach(), logits.argmax(-1).float())
    with pytest.raises(ValueError, match="temperature"):
        straight_through_gate(logits, 0.0)


def test_gumbel_sampling_follows_the_probabilities():
    logits = torch.tensor([0.0, 1.0]).expand(20_000, 2)
    noise = gumbel_noise(logits.shape, torch.device("cpu"), torch.Generator().manual_seed(0))
    share = straight_through_gate(logits, 1.0, noise).mean()
    assert abs(share.item() - torch.tensor(1.0).sigmoid().item()) < 0.015
