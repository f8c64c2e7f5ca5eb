"""How temperature and learning rates move over a run; all are functions of the step, so a resumed run needs no state.

Source of the defaults: Flux Attention (arXiv 2604.07394), training details.
"""

from __future__ import annotations

import math


def _share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def temperature(step: int, steps: int, *, start: float = 1.5, end: float = 1.0, share: float = 0.6) -> float:
    """τ of the Gumbel-softmax at `step` of `steps`: a half cosine from `start` to `end` over the first `share`."""
    _share("share", share)
    span = share * steps
    progress = 1.0 if span <= 0 else min(1.0, step / span)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup(step: int, steps: int, *, share: float = 0.2) -> float:
    """Linear rise to 1 over the first `share` of the steps, then 1. Never 0: the first step trains, too."""
    _share("share", share)
    span = share * steps
    return 1.0 if span <= 0 else min(1.0, (step + 1) / span)


def warmup_cosine(step: int, steps: int, *, share: float = 0.2) -> float:
    """Linear rise over the first `share` of the steps, then a half cosine down to 0 at `steps`."""
    span = share * steps
    if step + 1 < span:
        return warmup(step, steps, share=share)
    _share("share", share)
    progress = (step - span) / max(1e-9, steps - span)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
