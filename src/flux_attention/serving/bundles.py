"""Bundles of layers that share a KV-cache group: the better they agree, the more blocks go back.

A group gives a request's blocks back only when all its layers run sparse for it. Routers rank layers much alike from
prompt to prompt, so layers of neighbouring rank agree most often; the ranking is read off the router on a few texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flux_attention.serving.options import EngineOptions, probe_ends

Bundles = tuple[tuple[int, ...], ...]

_SOURCES = ("topics", "docstrings", "code")
_TEXTS = 8
_CHARS = 6000


def by_rank(p_full: Sequence[Sequence[float]], size: int) -> Bundles:
    """Bundles of `size` layers of neighbouring rank, each in the order in which it runs.

    Args:
        p_full: the router's scores of each text's layers, `[texts][L]`.
    """
    scores = torch.tensor(p_full)
    # Decisions first: a layer at .6 and one at .9 run alike.
    order = torch.argsort((scores > 0.5).float().mean(0) + 1e-3 * scores.mean(0), stable=True).tolist()
    return tuple(tuple(sorted(order[start : start + size])) for start in range(0, len(order), size))


def plan(
    options: EngineOptions,
    layers: int,
    pool_tokens: int,
    tokenizer: Any,
    score: Callable[[list[list[int]]], list[list[float]]],
) -> Bundles:
    """The KV-cache groups of an engine.

    Args:
        tokenizer: of the model, or None where the engine has none.
        score: the probe; called where the options leave open which layers go together.

    Raises:
        ValueError: bundles are to be found and there is no tokenizer to read texts with.
    """
    if isinstance(options.kv_bundle, tuple):
        return tuple(tuple(sorted(bundle)) for bundle in options.kv_bundle)
    size = options.bundle_size(layers)
    if size in (1, layers):
        return tuple(tuple(range(start, start + size)) for start in range(0, layers, size))
    if tokenizer is None:
        raise ValueError(
            f"bundles of {size} layers are found on texts, and the engine has no tokenizer: list kv_bundle"
        )
    return by_rank([row for ends in _ends(pool_tokens, tokenizer) for row in score([ends])], size)


def _ends(pool_tokens: int, tokenizer: Any) -> list[list[int]]:
    from flux_attention.data.corpus import window

    rng = random.Random(0)
    texts = [window(source, "train", rng, _CHARS).text for source in _SOURCES for _ in range(_TEXTS)]
    return [probe_ends(tokenizer(text).input_ids, pool_tokens) for text in texts]
