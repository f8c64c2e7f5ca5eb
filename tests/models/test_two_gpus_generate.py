"""A model over two GPUs, layer by layer or head by head: the routes and tokens of one GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from flux_attention.generation import generate
from flux_attention.models.attach import attach, detach
from tests.models.test_tp_generate import assert_mixed, assert_same, launch_split
from tests.models.tp_ranks import make_folder, outcomes, the_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(400),
]
#: The layers' border, and the last norm and the head beyond it.
DEVICES = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.layers.0": 0,
    "model.layers.1": 0,
    "model.layers.2": 1,
    "model.layers.3": 1,
    "model.norm": 1,
    "lm_head": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    make_folder(found, "qwen3")
    return found


@pytest.fixture(scope="module")
def whole(folder):
    """What one GPU does, without graphs and with them."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval().cuda()
    eager = outcomes(model, folder, graphs=False)
    assert_mixed(eager)
    assert_same(outcomes(model, folder), eager, 1e-3)
    return eager


def test_layers_on_two_gpus(folder, whole):
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, device_map=DEVICES).eval()
    assert_same(outcomes(model, folder), whole, 1e-3)
    controller = attach(model, str(folder / "probe"))
    assert {device.index for device in controller.layer_devices} == {0, 1}
    prompts = the_prompts(controller.device)
    kept = generate(model, prompts, max_new_tokens=4).cache
    assert kept.pool_of(0).keys.device.index == 0 and kept.pool_of(3).keys.device.index == 1
    with pytest.raises(ValueError, match="one device as a whole"):
        generate(model, prompts, max_new_tokens=4, cuda_graph=True)
    with pytest.raises(ValueError, match="pass none"):
        generate(model, prompts, max_new_tokens=4, pool=kept.pool)
    kept.clear()
    detach(model)


def test_a_model_on_the_second_gpu(folder, whole):
    """Kernels, graphs and events of a device that is not the current one."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval().to("cuda:1")
    with torch.cuda.device(1):
        assert_same(outcomes(model, folder), whole, 1e-3)
    model.generation_config.eos_token_id = None
    controller = attach(model, str(folder / "probe"))
    prompts = the_prompts(controller.device)
    found = generate(model, prompts, max_new_tokens=40)
    assert found.tokens == whole["probe_routed"]
    with torch.no_grad():
        here = model(input_ids=prompts[0][None]).logits
        with torch.cuda.device(1):
            assert torch.equal(model(input_ids=prompts[0][None]).logits, here)
    detach(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_on_two_gpus(folder, whole, dtype):
    first, second = launch_split(folder, dtype, NCCL_NVLS_ENABLE="0")
    assert_same(second, first, 0.0, drawn=True)
    if dtype == "float32":
        assert_same(first, whole, 1e-3)
