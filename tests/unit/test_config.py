"""FluxConfig and Backbone: what they refuse, and the JSON round trip."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from flux_attention.config import FORMAT_VERSION, MODES, Backbone, FluxConfig

BACKBONE = Backbone(
    name="tiny",
    model_type="llama",
    num_hidden_layers=5,
    hidden_size=72,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    routable_layers=(0, 2, 4),
)


@pytest.mark.parametrize("backbone", [None, BACKBONE])
def test_json_round_trip(backbone):
    config = FluxConfig(
        retrieval_mode="xattention", sink_tokens=64, window_tokens=192, block_tokens=64, full_bias=2, backbone=backbone
    )
    assert FluxConfig.from_json(config.to_json()) == config
    assert FluxConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json())["format_version"] == FORMAT_VERSION
    assert hash(config) == hash(FluxConfig.from_json(config.to_json()))


def test_defaults():
    config = FluxConfig()
    assert config.min_routed_tokens == 128 + 2048
    assert {config.retrieval_mode, config.sparse_mode} <= set(MODES)
    with pytest.raises(FrozenInstanceError):
        config.sink_tokens = 256


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("retrieval_mode", "streaming", "one of full, xattention, triangle"),
        ("retrieval_mode", "dense", "one of"),
        ("sparse_mode", "full", "one of streaming, triangle, xattention"),
        ("sparse_mode", None, "one of"),
        ("router_input", "outline", "one of probe, inline"),
        ("sink_tokens", 0, "a positive multiple of block_tokens"),
        ("sink_tokens", 100, "a positive multiple of block_tokens"),
        ("sink_tokens", True, "a positive multiple of block_tokens"),
        ("window_tokens", -128, "a positive multiple of block_tokens"),
        ("window_tokens", 2048.0, "a positive multiple of block_tokens"),
        ("window_tokens", "2048", "a positive multiple of block_tokens"),
        ("block_tokens", 0, "a positive integer"),
        ("block_tokens", True, "a positive integer"),
        ("pool_tokens", 0, "a positive integer"),
        ("tail_tokens", 101, r"an integer from 0 to pool_tokens \(100\)"),
        ("tail_tokens", -1, "an integer from 0"),
        ("triangle_tokens", -1, "a positive integer"),
        ("xattention_stride", 0, "a positive integer"),
        ("xattention_stride", 24, "a divisor of block_tokens"),
        ("xattention_threshold", 0.0, r"in \(0, 1\]"),
        ("xattention_threshold", 1.01, r"in \(0, 1\]"),
        ("xattention_threshold", float("nan"), "a finite number"),
        ("xattention_threshold", True, "a finite number"),
        ("full_bias", float("inf"), "a finite number"),
        ("full_bias", "4.5", "a finite number"),
        ("backbone", {"name": "tiny"}, "a Backbone or None"),
    ],
)
def test_refused_values_are_named(field, value, expected):
    with pytest.raises(ValueError, match=rf"FluxConfig\.{field} must be {expected}") as caught:
        FluxConfig(**{field: value})
    assert repr(value) in str(caught.value)


def test_both_sides_must_differ():
    with pytest.raises(ValueError, match=r"sparse_mode must be another mode than retrieval_mode, got 'triangle'"):
        FluxConfig(retrieval_mode="triangle", sparse_mode="triangle")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("model_type", None),
        ("num_hidden_layers", 0),
        ("head_dim", 12.0),
        ("hidden_size", True),
        ("num_key_value_heads", 4),
        ("routable_layers", ()),
        ("routable_layers", (0, 5)),
        ("routable_layers", (-1,)),
        ("routable_layers", (2, 0)),
        ("routable_layers", (0, 0)),
        ("routable_layers", (False, 1)),
        ("routable_layers", 3),
    ],
)
def test_backbone_refuses(field, value):
    with pytest.raises(ValueError, match=rf"Backbone\.{field} must be"):
        replace(BACKBONE, **{field: value})


def test_from_dict_names_the_keys():
    data = FluxConfig(backbone=BACKBONE).to_dict()
    with pytest.raises(ValueError, match=r"has no field windw_tokens"):
        FluxConfig.from_dict({**data, "windw_tokens": 1})
    with pytest.raises(ValueError, match=r"FluxConfig lacks sink_tokens, sparse_mode"):
        FluxConfig.from_dict({k: v for k, v in data.items() if k not in ("sink_tokens", "sparse_mode")})
    with pytest.raises(ValueError, match=r"FluxConfig lacks format_version"):
        FluxConfig.from_dict({k: v for k, v in data.items() if k != "format_version"})
    with pytest.raises(ValueError, match=r"format_version must be 1, got 2"):
        FluxConfig.from_dict({**data, "format_version": 2, "new_field": 1})
    with pytest.raises(ValueError, match=r"backbone lacks head_dim"):
        FluxConfig.from_dict({**data, "backbone": {k: v for k, v in data["backbone"].items() if k != "head_dim"}})
    with pytest.raises(ValueError, match=r"from a mapping of its fields, got list"):
        FluxConfig.from_dict([])
    with pytest.raises(ValueError, match=r"from a mapping of its fields, got str"):
        FluxConfig.from_dict({**data, "backbone": "llama"})
    with pytest.raises(ValueError, match=r"not valid JSON: .*line 1"):
        FluxConfig.from_json('{"format_version": 1,')


def test_an_adapter_of_before_the_tail_averages_all_tokens_alike():
    values = FluxConfig().to_dict()
    del values["tail_tokens"]
    assert FluxConfig.from_dict(values) == FluxConfig()
    assert FluxConfig.from_dict({**values, "tail_tokens": 16}).tail_tokens == 16
