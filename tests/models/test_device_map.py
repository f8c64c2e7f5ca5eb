"""Models that a device map has spread, as far as one processor can show it: accelerate's hooks, pages by device."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from flux_attention.models.controller import FluxAttention
from tests.models.test_tp_generate import assert_same
from tests.models.tp_ranks import make_folder, outcomes


def test_layers_of_two_devices(tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    make_folder(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    expected = outcomes(model, tmp_path)
    places = {f"model.layers.{i}": "cpu" for i in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert "forward" in vars(model.model.layers[2].self_attn.q_proj)
    # One processor under two names.
    real = FluxAttention.__init__

    def spread(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.layer_devices = (torch.device("cpu"),) * 2 + (torch.device("cpu", 0),) * 2
        self._on_several = True

    monkeypatch.setattr(FluxAttention, "__init__", spread)
    assert_same(outcomes(model, tmp_path), expected, 0.0)
