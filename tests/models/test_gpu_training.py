"""Training over packs on the GPU, bfloat16: the fast path's gradients against float32 ones on the same device."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from flux_attention.config import FluxConfig
from flux_attention.models.attach import attach, detach
from flux_attention.training.compiled import compiled_layers
from flux_attention.training.packed_objective import PackedObjective
from flux_attention.training.packing import Pack
from flux_attention.training.recompute import recomputed_layers
from tests.models.test_training import make_samples
from tests.models.tiny import SHAPE

pytestmark = pytest.mark.gpu

CONFIG = FluxConfig(sink_tokens=128, window_tokens=128, pool_tokens=20, full_bias=0.0)


def make(dtype):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 64, "hidden_size": 192})).eval().requires_grad_(False)
    for parameter in model.parameters():
        # Not `model.to`: the rotary frequencies stay float32.
        parameter.data = parameter.data.to(dtype)
    return model.cuda()


def gradient(dtype, loss, router_input, *, impl="auto", fuse=None, recompute=True, offload=False, compiled=False):
    """Of the router's last weights, under gates that bfloat16 cannot turn: ± 9 beside whatever the prompt says.

    Of several packs one after the other: the error of one alone is a matter of chance.
    """
    model = make(dtype)
    controller = attach(model, FluxConfig(**{**vars(CONFIG), "router_input": router_input}), fuse=fuse)
    controller.impl = impl
    torch.manual_seed(5)
    controller.router.reset_parameters()
    controller.router.biases[-1].data[:, 1] = torch.tensor([9.0, -9.0, 9.0, -9.0])
    objective = PackedObjective(controller, loss, {"retrieval": 0.5, "holistic": 1.0}, noise=False).cuda()
    # Soft enough a temperature that such gates still have a gradient.
    objective.temperature = 6.0
    found = []
    with ExitStack() as stack:
        if compiled:
            stack.enter_context(compiled_layers(controller))
        if recompute:
            stack.enter_context(recomputed_layers(controller, offload=offload))
        for seed in range(6):
            pack = Pack.of(make_samples(3, seed=seed, shortest=500, longest=900)).as_dict()
            objective.zero_grad()
            outputs = objective(**{name: x.cuda() for name, x in pack.items()})
            # The penalty is the same everywhere and would hide the rest.
            (outputs["loss"] - outputs["penalty"]).backward()
            found += [p[-1].grad.flatten().clone() for p in (controller.router.biases, controller.router.weights)]
    detach(model)
    return torch.cat(found).double()


@pytest.mark.parametrize("router_input", ["probe", "inline"])
@pytest.mark.parametrize("loss", ["lm", "distill"])
def test_the_fast_path_is_as_exact_as_plain_bfloat16(loss, router_input):
    plain = {"impl": "sdpa", "fuse": False, "recompute": False}
    exact = gradient(torch.float32, loss, router_input, **plain)
    error = float((gradient(torch.bfloat16, loss, router_input, **plain) - exact).norm())
    for options in ({}, {"offload": True}, {"compiled": True}, {"fuse": False}):
        found = gradient(torch.bfloat16, loss, router_input, **options)
        assert float((found - exact).norm()) <= 2 * max(error, 1e-3 * float(exact.norm())), options
