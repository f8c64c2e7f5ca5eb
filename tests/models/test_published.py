"""Published checkpoints become adapters that compute what the checkpoint does; what does not fit is refused by name."""

import copy
import json
import os

import pytest
import torch

from flux_attention.cli import main
from flux_attention.models import delta as delta_module
from flux_attention.models.adapter import AdapterError, load_adapter, save_adapter
from flux_attention.models.attach import attach, detach
from flux_attention.models.delta import DeltaError
from flux_attention.models.published import ConversionError, convert_checkpoint
from flux_attention.models.shards import ShardedCheckpoint

from .published import OPTIONS, make_base, make_routers, reference, write, write_tensors


def prompts():
    torch.manual_seed(3)
    return [torch.randint(0, 61, (1, n)) for n in (700, 531, 390)]


def tuned(model, seed=5):
    """A copy whose q, k and v projections of two layers moved."""
    moved = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in (0, 2):
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = getattr(moved.model.layers[layer].self_attn, name).weight
                weight.add_(torch.randn_like(weight) * 0.05)
    return moved


@pytest.fixture(params=["qwen3", "llama"])
def places(request, tmp_path):
    """Folders of a base model and of a checkpoint with trained q, k, v; the models and routers themselves."""
    base = make_base(request.param)
    model, routers = tuned(base), make_routers(base)
    base.save_pretrained(tmp_path / "base")
    write(tmp_path / "checkpoint", model, routers)
    return tmp_path, base, model, routers


def test_a_converted_model_computes_what_the_checkpoint_does(places):
    folder, base, model, routers = places
    found = convert_checkpoint(folder / "checkpoint", folder / "base", folder / "adapter")
    assert len(found.replaced) == 6
    assert found.compared == len(model.state_dict())
    before = {name: value.clone() for name, value in base.state_dict().items()}
    controller = attach(base, folder / "adapter")
    assert controller.delta.names == found.replaced
    chosen = set()
    for ids in prompts():
        expected, full = reference(model, routers, ids)
        with torch.no_grad():
            actual = base(input_ids=ids).logits
        assert controller.last_route.use_full[:, 0].tolist() == full
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        chosen |= set(enumerate(full))
    assert {full for _, full in chosen} == {True, False}  # both sides were tried
    detach(base)
    after = base.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_round_trip_is_exact(places):
    folder, base, model, routers = places
    convert_checkpoint(folder / "checkpoint", folder / "base", folder / "adapter")
    controller = attach(base, folder / "adapter")
    for layer, router in enumerate(routers):
        linears = [m for m in router.modules() if isinstance(m, torch.nn.Linear)]
        for i, linear in enumerate(linears):
            assert torch.equal(controller.router.weights[i][layer], linear.weight)
            assert torch.equal(controller.router.biases[i][layer], linear.bias)
    for name, value in model.state_dict().items():
        assert torch.equal(base.state_dict()[name], value), name
    config = controller.config
    assert (config.sink_tokens, config.window_tokens, config.pool_tokens) == (128, 128, 30)
    assert (config.retrieval_mode, config.sparse_mode, config.router_input) == ("full", "streaming", "inline")


def test_an_unchanged_backbone_needs_no_delta(tmp_path):
    base = make_base("qwen3", tied=True)
    base.save_pretrained(tmp_path / "base")
    write(tmp_path / "checkpoint", base, make_routers(base), shards=3)
    found = convert_checkpoint(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "adapter")
    assert found.replaced == ()
    assert sorted(os.listdir(tmp_path / "adapter")) == ["flux_config.json", "router.safetensors"]
    assert attach(base, tmp_path / "adapter").delta is None


def test_another_precision_is_the_same_weight(tmp_path):
    base = make_base("llama").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    write(tmp_path / "checkpoint", copy.deepcopy(base).float(), make_routers(base))
    assert convert_checkpoint(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "adapter").replaced == ()


def test_options_become_the_configuration(tmp_path):
    base = make_base("qwen3")
    base.save_pretrained(tmp_path / "base")
    options = {
        **OPTIONS,
        "toggle_type": "triangle",
        "retrieval_mode": "xattn",
        "local_window_size": 2048,
        "triangle_n_last": 64,
        "enable_ada_sparsity": True,
        "max_position_embeddings": 4096,
    }
    write(tmp_path / "checkpoint", base, make_routers(base), options=options)
    found = convert_checkpoint(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "adapter")
    config = load_adapter(tmp_path / "adapter").config
    assert (config.retrieval_mode, config.sparse_mode) == ("xattention", "triangle")
    assert (config.window_tokens, config.triangle_tokens) == (1920, 64)
    assert found.ignored == ("enable_ada_sparsity",)
    assert "4096 positions" in found.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling_mode": "first_token"}, "pooling_mode must be 'ctx_q'.*got 'first_token'"),
        ({"use_softmax": False}, "use_softmax must be true"),
        ({"toggle_type": "local"}, "toggle_type must be one of streaming, triangle, xattn, got 'local'"),
        ({"retrieval_mode": "dense"}, "retrieval_mode must be one of full, triangle, xattn, got 'dense'"),
        ({"sink_size": 0}, "sink_size must be an integer of at least 1, got 0"),
        ({"local_window_size": 128}, "local_window_size must be above 128, got 128"),
        ({"use_task_emb_for_mask": True}, "use_task_emb_for_mask is set"),
        ({"head_entropy_weight": 0.1}, "unknown option head_entropy_weight=0.1"),
        ({"rms_norm_eps": 0.5}, r"not trained from .*rms_norm_eps 0.5 ≠ 1e-06"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "architectures must be one of PawQwen3ForCausalLM"),
        ({"architectures": ["PawLlamaForCausalLM"]}, "backbone is 'llama', but .* holds a 'qwen3' model"),
    ],
)
def test_options_are_refused_by_name(tmp_path, change, message):
    base = make_base("qwen3")
    base.save_pretrained(tmp_path / "base")
    write(tmp_path / "checkpoint", base, make_routers(base), options={**OPTIONS, **change})
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 64), r"outside of the q, k and v.*layers\.0\.mlp\.up"),
        ("model.layers.0.self_attn.gate.weight", torch.zeros(2), r"does not have: model\.layers\.0\.self_attn\.gate"),
        (
            "model.layers.1.self_attn.mask_allocator.task_embedding.weight",
            torch.zeros(4, 16),
            r"unknown router tensor .*task_embedding\.weight",
        ),
        (
            "model.layers.1.self_attn.mask_allocator.cls_router_head_agnostic.4.bias",
            torch.zeros(1),
            r"head_agnostic\.4\.bias' must be \[2\] for head dim 16, got \[1\]",
        ),
        ("model.layers.2.self_attn.mask_allocator.cls_feat_extractor.0.bias", None, r"feat_extractor\.0\.bias' is mis"),
        ("model.norm.weight", None, r"tensors of the base model are missing: model\.norm\.weight"),
    ],
)
def test_tensors_are_refused_by_name(tmp_path, name, value, message):
    base = make_base("qwen3")
    base.save_pretrained(tmp_path / "base")
    write(tmp_path / "checkpoint", base, make_routers(base))
    with ShardedCheckpoint(tmp_path / "checkpoint") as checkpoint:
        tensors = {n: checkpoint.tensor(n) for n in checkpoint.names}
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    write_tensors(tmp_path / "checkpoint", tensors, 2)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "adapter")


def test_files_that_cannot_be_read(tmp_path):
    base = make_base("qwen3")
    base.save_pretrained(tmp_path / "base")
    write(tmp_path / "checkpoint", base, make_routers(base))
    convert = lambda: convert_checkpoint(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "adapter")  # noqa: E731
    shard = tmp_path / "checkpoint" / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"00002-of-00002.*corrupt or truncated"):
        convert()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002\.safetensors is missing"):
        convert()
    for path in (tmp_path / "checkpoint").glob("model*"):
        path.unlink()
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin: save it with safe_serialization=True"):
        convert()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        convert_checkpoint(tmp_path / "nothing", tmp_path / "base", tmp_path / "adapter")


# ---------------------------------------------------------------------------------------------------- the delta


def saved(folder, base, values):
    controller = attach(base)
    save_adapter(folder, controller.config, controller.router.state_dict(), values)
    detach(base)


def test_a_delta_follows_the_adapter_and_goes_with_it(tmp_path):
    base = make_base("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    for value in (1.0, 2.0):
        saved(tmp_path, base, {name: torch.full((64, 64), value)})
        assert len(list(tmp_path.glob("backbone_delta-*"))) == 1
        attach(base, tmp_path)
        assert bool((base.model.layers[0].self_attn.q_proj.weight == value).all())
        detach(base)
    saved(tmp_path, base, None)
    assert not list(tmp_path.glob("backbone_delta-*"))


def test_a_delta_that_does_not_fit(tmp_path):
    base = make_base("llama")
    for values, message in (
        ({"model.layers.9.self_attn.q_proj.weight": torch.zeros(64, 64)}, "the model has no weight 'model.layers.9"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 32)}, r"is \[64, 32\], the model's is \[64, 64\]"),
    ):
        saved(tmp_path, base, values)
        before = {n: v.clone() for n, v in base.state_dict().items()}
        with pytest.raises(DeltaError, match=message):
            attach(base, tmp_path)
        assert all(torch.equal(v, before[n]) for n, v in base.state_dict().items())
        attach(base)
        detach(base)
    with pytest.raises(DeltaError, match="NaN"):
        saved(tmp_path, base, {"a": torch.tensor([float("nan")])})
    detach(base)


def test_a_torn_delta_is_found(tmp_path):
    base = make_base("llama")
    saved(tmp_path, base, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)})
    path = next(tmp_path.glob("backbone_delta-*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(AdapterError, match="is torn or changed"):
        load_adapter(tmp_path)
    path.unlink()
    with pytest.raises(AdapterError, match="is missing"):
        load_adapter(tmp_path)


def test_a_full_disk_keeps_the_old_adapter(tmp_path, monkeypatch):
    base = make_base("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    saved(tmp_path, base, {name: torch.ones(64, 64)})
    before = sorted(os.listdir(tmp_path))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(delta_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, base, {name: torch.zeros(64, 64)})
    assert sorted(os.listdir(tmp_path)) == before
    detach(base)
    assert load_adapter(tmp_path).delta.load()[name].sum() == 64 * 64


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path, capsys):
    base = make_base("qwen3")
    base.save_pretrained(tmp_path / "base")
    write(tmp_path / "checkpoint", tuned(base), make_routers(base))
    places = [str(tmp_path / "checkpoint"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "adapter")]

    def run():
        with pytest.raises(SystemExit) as done:
            main(["convert", *places])
        return done.value.code or 0, *capsys.readouterr()

    code, out, err = run()
    assert code == 0 and out.strip() == str(tmp_path / "adapter")
    assert "6 differ (q, k, v)" in err
    config = tmp_path / "checkpoint" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mystery": 1}))
    code, out, err = run()
    assert code == 2 and out == ""
    assert "unknown option mystery=1" in " ".join(err.split()) and "Traceback" not in err
