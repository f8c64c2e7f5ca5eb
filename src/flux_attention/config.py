"""What defines an adapter: the two sides of the switch, the shape of sparse attention, the router's input.

Lengths are in tokens throughout.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

MODES = ("full", "streaming", "triangle", "xattention")
RETRIEVAL_MODES = ("full", "xattention", "triangle")
SPARSE_MODES = ("streaming", "triangle", "xattention")
ROUTER_INPUTS = ("probe", "inline")
FORMAT_VERSION = 1

RouterInput = Literal["probe", "inline"]


def _refuse(owner: object, field: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{type(owner).__name__}.{field} must be {expected}, got {value!r}")


def _check_choice(owner: object, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, field)
    if not isinstance(value, str) or value not in choices:
        raise _refuse(owner, field, f"one of {', '.join(choices)}", value)


def _check_positive_int(owner: object, field: str) -> None:
    value = getattr(owner, field)
    # bool is an int in Python; `sink_tokens=True` is a mistake, not a length of one.
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise _refuse(owner, field, "a positive integer", value)


def _check_finite_float(owner: object, field: str) -> None:
    value = getattr(owner, field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refuse(owner, field, "a finite number", value)
    object.__setattr__(owner, field, float(value))


def _check_keys(owner: str, data: Mapping[str, Any], expected: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{owner} must be read from a mapping of its fields, got {type(data).__name__}")
    if unknown := sorted(map(str, set(data) - expected)):
        raise ValueError(f"{owner} has no field {', '.join(unknown)}; it has {', '.join(sorted(expected))}")
    if missing := sorted(expected - set(data)):
        raise ValueError(f"{owner} lacks {', '.join(missing)}")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The frozen model that a router belongs to: a router fits this shape only.

    `routable_layers` holds the indices of the decoder layers with a router, ascending; a hybrid model's sliding-window
    layers are not in it. Raises `ValueError` naming the field when one is out of range.
    """

    name: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    routable_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("name", "model_type"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise _refuse(self, field, "a non-empty string", value)
        for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            _check_positive_int(self, field)
        if self.num_attention_heads % self.num_key_value_heads:
            expected = f"a divisor of num_attention_heads ({self.num_attention_heads})"
            raise _refuse(self, "num_key_value_heads", expected, self.num_key_value_heads)
        layers = self.routable_layers
        expected = f"ascending layer indices below num_hidden_layers ({self.num_hidden_layers}), at least one"
        if not isinstance(layers, list | tuple) or not layers:
            raise _refuse(self, "routable_layers", expected, layers)
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.num_hidden_layers:
                raise _refuse(self, "routable_layers", expected, layers)
        if list(layers) != sorted(set(layers)):
            raise _refuse(self, "routable_layers", expected, layers)
        # JSON knows lists only; a tuple keeps the dataclass hashable.
        object.__setattr__(self, "routable_layers", tuple(layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json` can write."""
        return {**asdict(self), "routable_layers": list(self.routable_layers)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Backbone":
        """Inverse of `to_dict`; unknown and missing fields raise `ValueError` naming them."""
        _check_keys("backbone", data, {field.name for field in fields(cls)})
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """Everything that defines an adapter, validated on construction.

    Fields:
        retrieval_mode: attention of a layer routed to the full side (`p_full` high).
        sparse_mode: attention of a layer routed to the sparse side; differs from `retrieval_mode`.
        sink_tokens, window_tokens: first and latest keys that sparse attention keeps; positive multiples of
            `block_tokens`.
        block_tokens: block of the sparse pattern and page of the cache.
        pool_tokens: tokens at each end of the prompt that the router averages.
        tail_tokens: the last so many of them make half of that average, at most `pool_tokens`; 0 = all count alike, as
            in the paper. What a user asks is a dozen tokens at the end of a prompt.
        router_input: "probe" routes before prefill from the two ends of the prompt alone, "inline" while prefilling.
        triangle_tokens: last queries of the prompt that attend densely in the triangle mode.
        xattention_stride: stride of the antidiagonal scores; divides `block_tokens`.
        xattention_threshold: share of the attention mass that the chosen blocks hold, in (0, 1].
        full_bias: initial bias of the router's full logit; positive starts near full attention.
        backbone: the model the router was trained for; None before it is known.

    Raises:
        ValueError: naming the field, what it must be and what it was.
    """

    retrieval_mode: str = "full"
    sparse_mode: str = "streaming"
    sink_tokens: int = 128
    window_tokens: int = 2048
    block_tokens: int = 128
    pool_tokens: int = 100
    tail_tokens: int = 0
    router_input: RouterInput = "probe"
    triangle_tokens: int = 128
    xattention_stride: int = 16
    xattention_threshold: float = 0.9
    full_bias: float = 4.5
    backbone: Backbone | None = None

    def __post_init__(self) -> None:
        _check_choice(self, "retrieval_mode", RETRIEVAL_MODES)
        _check_choice(self, "sparse_mode", SPARSE_MODES)
        if self.sparse_mode == self.retrieval_mode:
            raise _refuse(self, "sparse_mode", "another mode than retrieval_mode", self.sparse_mode)
        _check_choice(self, "router_input", ROUTER_INPUTS)
        for field in ("block_tokens", "pool_tokens", "triangle_tokens", "xattention_stride"):
            _check_positive_int(self, field)
        tail = self.tail_tokens
        if isinstance(tail, bool) or not isinstance(tail, int) or not 0 <= tail <= self.pool_tokens:
            raise _refuse(self, "tail_tokens", f"an integer from 0 to pool_tokens ({self.pool_tokens})", tail)
        for field in ("sink_tokens", "window_tokens"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0 or value % self.block_tokens:
                raise _refuse(self, field, f"a positive multiple of block_tokens ({self.block_tokens})", value)
        if self.block_tokens % self.xattention_stride:
            expected = f"a divisor of block_tokens ({self.block_tokens})"
            raise _refuse(self, "xattention_stride", expected, self.xattention_stride)
        _check_finite_float(self, "xattention_threshold")
        if not 0.0 < self.xattention_threshold <= 1.0:
            raise _refuse(self, "xattention_threshold", "in (0, 1]", self.xattention_threshold)
        _check_finite_float(self, "full_bias")
        if self.backbone is not None and not isinstance(self.backbone, Backbone):
            raise _refuse(self, "backbone", "a Backbone or None", self.backbone)

    @property
    def min_routed_tokens(self) -> int:
        """Prompts of at most this many tokens see the same keys on both sides: dense, without running the router."""
        return self.sink_tokens + self.window_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json` can write, with `format_version`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["backbone"] = None if self.backbone is None else self.backbone.to_dict()
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "FluxConfig":
        """Inverse of `to_dict`.

        Raises:
            ValueError: another `format_version`, unknown or missing fields (named), or an invalid value.
        """
        # A newer format may well have other fields, so the version is looked at first: it is the better message.
        if isinstance(data, Mapping) and data.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            version = data["format_version"]
            raise ValueError(
                f"FluxConfig format_version must be {FORMAT_VERSION}, got {version!r}: update flux-attention"
            )
        # Adapters of before this field average all tokens alike.
        data = {"tail_tokens": 0, **data} if isinstance(data, Mapping) else data
        _check_keys("FluxConfig", data, {field.name for field in fields(cls)} | {"format_version"})
        values = {key: value for key, value in data.items() if key != "format_version"}
        if values["backbone"] is not None:
            values["backbone"] = Backbone.from_dict(values["backbone"])
        return cls(**values)

    def to_json(self) -> str:
        """Indented JSON with a final newline."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "FluxConfig":
        """Inverse of `to_json`; text that is no JSON raises `ValueError` with the position."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"FluxConfig is not valid JSON: {error}") from error
        return cls.from_dict(data)
