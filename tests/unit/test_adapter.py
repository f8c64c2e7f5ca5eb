"""Adapter files: round trip, every kind of damage, and saves that fail or are killed at any step."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flux_attention.config import Backbone, FluxConfig
from flux_attention.models import adapter as module
from flux_attention.models.adapter import (
    CONFIG_FILE,
    DELTA_PATTERN,
    ROUTER_FILE,
    AdapterError,
    check_backbone,
    describe_backbone,
    load_adapter,
    resolve,
    save_adapter,
    shipped_adapters,
)

BACKBONE = Backbone(
    name="tiny",
    model_type="llama",
    num_hidden_layers=3,
    hidden_size=72,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    routable_layers=(0, 1, 2),
)
OLD, NEW = FluxConfig(backbone=BACKBONE), FluxConfig(window_tokens=512, backbone=BACKBONE)


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    stacked = torch.randn(3, 7, 5, generator=generator)
    # Views of one storage and a transposed tensor: what stacked weights look like.
    return {"first": stacked[0], "rest": stacked[1:], "turned": stacked[0].T}


def assert_holds(folder, config, seed):
    loaded = load_adapter(folder)
    assert loaded.config == config
    assert loaded.state.keys() == state(seed).keys()
    assert all(torch.equal(loaded.state[name], value) for name, value in state(seed).items())


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    save_adapter(path, OLD, state(0))
    return path


def test_round_trip(tmp_path):
    folder = tmp_path / "deep" / "adapter"
    for config, seed in ((OLD, 0), (NEW, 1)):
        save_adapter(folder, config, state(seed))
        assert_holds(folder, config, seed)
        assert sorted(os.listdir(folder)) == [CONFIG_FILE, ROUTER_FILE]
    assert load_adapter(folder).source == str(folder)


def test_other_files_are_left_alone(folder):
    (folder / "README.md").write_text("card")
    save_adapter(str(folder), NEW, state(1))
    assert_holds(folder, NEW, 1)
    assert (folder / "README.md").read_text() == "card"


class Killed(BaseException):
    """Stands for a kill: nothing after it may run, cleaning up included."""


STEPS = ("write", "write", "replace", "replace")


@pytest.mark.parametrize("step", range(len(STEPS)))
@pytest.mark.parametrize("how", ["before", "after"])
def test_killed_save_leaves_an_adapter(folder, monkeypatch, step, how):
    done = []

    def guarded(name, function):
        def call(*args):
            last = len(done) == step
            if last and how == "before":
                if name == "write":  # half of the bytes got there
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                raise Killed
            function(*args)
            done.append(name)
            if last:
                raise Killed

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", guarded("write", module._write))
        patch.setattr(module.os, "replace", guarded("replace", os.replace))
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Killed):
            save_adapter(folder, NEW, state(1))
    assert tuple(done) == STEPS[: len(done)]
    committed = done.count("replace") >= 1
    assert_holds(folder, *((NEW, 1) if committed else (OLD, 0)))

    # A second save over the leftovers that is killed while writing must not eat the only good router either.
    with monkeypatch.context() as patch:

        def torn(path, data):
            path.write_bytes(data[:9])
            raise Killed

        patch.setattr(module, "_write", torn)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(Killed):
            save_adapter(folder, OLD, state(2))
    assert_holds(folder, *((NEW, 1) if committed else (OLD, 0)))

    save_adapter(folder, NEW, state(3))
    assert_holds(folder, NEW, 3)
    assert sorted(os.listdir(folder)) == [CONFIG_FILE, ROUTER_FILE]


@pytest.mark.parametrize("at", [1, 2])
def test_full_disk_keeps_the_old_adapter(folder, monkeypatch, at):
    calls = []
    real = os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(folder, NEW, state(1))
    assert_holds(folder, OLD, 0)
    assert sorted(os.listdir(folder)) == [CONFIG_FILE, ROUTER_FILE]


def test_save_refuses_before_it_writes(folder, tmp_path):
    with pytest.raises(AdapterError, match="backbone is None"):
        save_adapter(folder, FluxConfig(), state(1))
    with pytest.raises(AdapterError, match="no tensors"):
        save_adapter(folder, NEW, {})
    with pytest.raises(AdapterError, match=r"'first' holds NaN or infinite"):
        save_adapter(folder, NEW, {**state(1), "first": torch.tensor([1.0, float("inf")])})
    with pytest.raises(AdapterError, match=r"'first' must be float32.*int64"):
        save_adapter(folder, NEW, {"first": torch.arange(3)})
    assert_holds(folder, OLD, 0)
    with pytest.raises(AdapterError, match="backbone is None"):
        save_adapter(tmp_path / "none", FluxConfig(), state(1))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", [CONFIG_FILE, ROUTER_FILE])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=rf"{folder} is no adapter: {name} is missing"):
        load_adapter(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_router(folder, keep):
    path = folder / ROUTER_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match=rf"{ROUTER_FILE} is corrupt or truncated"):
        load_adapter(folder)


def test_router_of_another_adapter(folder, tmp_path):
    save_adapter(tmp_path / "other", OLD, state(1))
    (folder / ROUTER_FILE).write_bytes((tmp_path / "other" / ROUTER_FILE).read_bytes())
    with pytest.raises(AdapterError, match=r"does not belong to flux_config\.json.*torn"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.tensor([1.0, float("nan")])}, r"router\.safetensors: tensor 'a' holds NaN"),
        ({"a": torch.tensor([1, 2])}, r"router\.safetensors: tensor 'a' must be float32.*int64"),
        ({}, r"router\.safetensors: the router holds no tensors"),
    ],
)
def test_unusable_router(folder, tensors, message):
    path = folder / ROUTER_FILE
    before = module._sha256(path.read_bytes())
    save_file(tensors, path)
    config = folder / CONFIG_FILE
    config.write_text(config.read_text().replace(before, module._sha256(path.read_bytes())))
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"flux_config\.json: "),
        ("[]", r"expected a JSON object, got list"),
        ("\xff", r"flux_config\.json: "),
        (FluxConfig(backbone=BACKBONE).to_json(), r"router_sha256 must be"),
    ],
)
def test_damaged_config(folder, text, message):
    (folder / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder)


def test_invalid_value_in_config(folder):
    config = folder / CONFIG_FILE
    config.write_text(config.read_text().replace('"window_tokens": 2048', '"window_tokens": -1'))
    with pytest.raises(AdapterError, match=r"flux_config\.json: FluxConfig\.window_tokens must be .*got -1"):
        load_adapter(folder)


def test_not_found(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_download", lambda name: pytest.fail(f"asked the Hub for {name}"))
    for source in ("no-such-adapter", tmp_path / "gone", "./gone/adapter", "/gone/adapter", ""):
        with pytest.raises(AdapterError):
            load_adapter(source) if source else resolve("no-such-adapter")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        load_adapter(tmp_path / "file")


def test_hub_id(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_adapter("someone/their-router").config == OLD
    assert asked == {"name": "someone/their-router", "allow_patterns": [CONFIG_FILE, ROUTER_FILE, DELTA_PATTERN]}

    def offline(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(AdapterError, match=r"no adapter 'someone/their-router'.*offline"):
        load_adapter("someone/their-router")


def test_shipped_adapters_load():
    for name, folder in shipped_adapters().items():
        loaded = load_adapter(name)
        assert resolve(name) == folder
        assert loaded.config.backbone is not None


def tiny(**changes):
    options = {
        "hidden_size": 72,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 11,
    }
    return LlamaConfig(**{**options, **changes})


def test_describe_backbone():
    found = describe_backbone(LlamaForCausalLM(tiny()), (0, 1, 2))
    assert found == replace(BACKBONE, name="llama")
    assert describe_backbone(tiny(head_dim=32), (0,)).head_dim == 32


def test_check_backbone_says_both_sides():
    found = describe_backbone(tiny(), (0, 1, 2))
    check_backbone(OLD, found)  # the name alone differs
    check_backbone(FluxConfig(), found)
    with pytest.raises(AdapterError) as caught:
        check_backbone(OLD, replace(found, name="other", num_hidden_layers=4, routable_layers=(0, 1, 2, 3)))
    message = str(caught.value)
    assert "'tiny'" in message
    assert "'other'" in message
    assert "num_hidden_layers 3 ≠ 4" in message
    assert "routable_layers (0, 1, 2) ≠ (0, 1, 2, 3)" in message
    assert "head_dim" not in message
