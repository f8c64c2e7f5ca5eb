"""Run the layers of an attached model with their elementwise work folded together, and take that off again.

`fuse` gives decoder layers, their attention, the last norm and the output projection forward functions of their own on
the *instance*; `remove` deletes them, and the model's methods are back. Classes, modules and values of weights stay as
they are; the weights of keys and values lie behind one another while the model is fused: one product can read both.
The forward functions serve inference: under gradients or autocast, and in a layer that somebody has put hooks into or
whose modules somebody has replaced, the model's own code runs. They are bound methods and objects, no closures, so a
copied or unpickled model's are its own.

Shapes: `B` rows, `T` tokens, `H` hidden size, `Hq`, `Hk` heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flux_attention.kernels import fused
from flux_attention.kernels.fused import Norm, VectorConfig

if TYPE_CHECKING:
    from flux_attention.models.controller import FluxAttention

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")


def why_not(controller: FluxAttention) -> str | None:
    """Reason why the layers of this model cannot be fused, or None."""
    config = controller.decoder.config
    if not controller.family.fusable:
        return f"the layers of {config.model_type} models are not of the plain pre-norm kind"
    if len(controller.layers) != config.num_hidden_layers:
        return "some of its layers are not routable"
    backbone = controller.config.backbone
    assert backbone is not None
    if backbone.head_dim & (backbone.head_dim - 1):
        return f"head dim {backbone.head_dim} is not a power of two"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its MLPs use {config.hidden_act}, not silu"
    for module in controller.decoder.modules():
        if "forward" in vars(module):
            return f"a {type(module).__name__} has a forward function of its own already (accelerate's hooks?)"
    for layer in controller.decoder.layers:
        linears = [getattr(layer.self_attn, name) for name in _PROJECTIONS] + [getattr(layer.mlp, n) for n in _GATED]
        odd = next((m for m in linears if type(m) is not nn.Linear), None)
        if odd is not None:
            return f"its projections are {type(odd).__name__}, not Linear (quantised, or an adapter)"
        if not all(m.weight.is_contiguous() for m in linears):
            return "its projections are not contiguous"
        if any(getattr(layer.mlp, name).bias is not None for name in ("gate_proj", "up_proj")):
            return "the projections up of its MLPs have biases"
    return None


class Fusion:
    """Fused forward functions on one attached model; made by `fuse`, ended by `remove`."""

    def __init__(self, controller: FluxAttention) -> None:
        self.controller = controller
        self.layers = [_Layer(controller, layer, index) for index, layer in enumerate(controller.decoder.layers)]
        self._changed: list[Any] = []
        # A split model's layers carry hooks, so its own code runs, and ranks may hold distributed tensors.
        attentions = [] if controller.is_split else [x.attention for x in self.layers]
        self._pairs: list[tuple[nn.Linear, nn.Linear]] = [(x.k_proj, x.v_proj) for x in attentions]
        try:
            self._begin()
        except BaseException:
            # Nobody else knows this object yet, so nobody else can undo what it has done so far. Weights that stay
            # together, because memory has run out, have the values that they had.
            with suppress(torch.OutOfMemoryError):
                self.remove()
            raise

    def _begin(self) -> None:
        for k, v in self._pairs:
            _lay_together(k.weight, v.weight)
            _lay_together(k.bias, v.bias)
        for fused_layer in self.layers:
            self._set(fused_layer.layer, _OnItsDevice(self.controller, fused_layer.forward))
            self._set(fused_layer.attention, fused_layer.attend)
        norm = self.controller.decoder.norm
        self._set(norm, _OnItsDevice(self.controller, partial(_normalise, norm)))
        head: Any = self.controller.model.get_output_embeddings()
        if type(head) is nn.Linear and "forward" not in vars(head) and head.weight.is_contiguous():
            self._set(head, _OnItsDevice(self.controller, partial(_project, head)))

    def _set(self, module: Any, forward: Callable[..., Any]) -> None:
        # nn.Module types `forward` as a method; an instance attribute comes before it, and hooks still run.
        vars(module)["forward"] = forward
        self._changed.append(module)

    def remove(self) -> None:
        for module in self._changed:
            vars(module).pop("forward", None)
        self._changed = []
        for parameter in (p for pair in self._pairs for module in pair for p in module.parameters()):
            parameter.data = parameter.data.clone()

    def pools(self, index: int) -> bool:
        """Whether layer `index` has its queries pooled itself (`LayerPooling.pool`) in this pass."""
        return not self.layers[index].runs_own(self.controller.device)

    def tune(self) -> None:
        """Time the launch configurations of the one-token products on these weights, once per shape; CUDA only."""
        some = self.layers[:8]
        attentions, mlps = [x.attention for x in some], [x.layer.mlp for x in some]
        weight = attentions[0].q_proj.weight
        x = torch.randn(weight.shape[1], dtype=weight.dtype, device=weight.device)
        fused.tune_vectors(
            "three",
            [a.q_proj.weight for a in attentions],
            lambda i, c: fused.norm_three(x, some[i].first, *some[i].three(), config=c),
        )
        fused.tune_vectors(
            "gated",
            [m.gate_proj.weight for m in mlps],
            lambda i, c: fused.norm_gated(
                x, some[i].second, mlps[i].gate_proj.weight, mlps[i].up_proj.weight, config=c
            ),
        )
        head: Any = self.controller.model.get_output_embeddings()
        outputs = ([a.o_proj.weight for a in attentions], [m.down_proj.weight for m in mlps], [head.weight])
        for weights in outputs:
            y = torch.randn(weights[0].shape[1], dtype=weight.dtype, device=weight.device)
            fused.tune_vectors("vector", weights, partial(_vector, y, weights))


def fuse(controller: FluxAttention) -> Fusion:
    """Fuse an attached model's layers. Raises ValueError with the reason where they cannot be."""
    reason = why_not(controller)
    if reason is not None:
        raise ValueError(f"this model cannot be fused: {reason}. attach(model, adapter, fuse=False) leaves it as it is")
    return Fusion(controller)


class _Layer:
    """One decoder layer: norm, attention, add, norm, gated MLP, add."""

    def __init__(self, controller: FluxAttention, layer: Any, index: int) -> None:
        self.controller, self.layer, self.index = controller, layer, index
        self.last = index == len(controller.layers) - 1
        self.attention: Any = layer.self_attn
        self._first, self._second = _NormOf(layer.input_layernorm), _NormOf(layer.post_attention_layernorm)
        norms = (getattr(self.attention, name, None) for name in ("q_norm", "k_norm"))
        self._q_norm, self._k_norm = (None if norm is None else _NormOf(norm) for norm in norms)
        # The attention carries the controller's own hook before it, which has nothing to do in a decode step.
        self._inner = [m for m in layer.modules() if m not in (layer, self.attention)]
        self._children = [(m, name, child) for m in layer.modules() for name, child in m.named_children()]

    @property
    def first(self) -> Norm:
        return self._first()

    @property
    def second(self) -> Norm:
        return self._second()

    @property
    def q_norm(self) -> Norm | None:
        return None if self._q_norm is None else self._q_norm()

    @property
    def k_norm(self) -> Norm | None:
        return None if self._k_norm is None else self._k_norm()

    @property
    def hooked(self) -> bool:
        """Whether somebody else has put hooks into this layer, or others (adapters, say) in the place of its modules,
        which its own code alone would call."""
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in self._inner):
            return True
        return any(m._modules.get(name) is not child for m, name, child in self._children)

    def runs_own(self, device: torch.device) -> bool:
        """Whether the model's own code runs in this pass."""
        return _wants_own(device) or self.hooked

    def three(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Weights and biases of the projections to queries, keys and values."""
        q, k, v = self.attention.q_proj, self.attention.k_proj, self.attention.v_proj
        return (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias)

    def gate_up(self) -> tuple[Tensor, Tensor]:
        """Weights of the MLP's two projections up."""
        return self.layer.mlp.gate_proj.weight, self.layer.mlp.up_proj.weight

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, T, H]` → `[B, T, H]`; arguments as transformers passes them."""
        arguments = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
            **kwargs,
        }
        if self.runs_own(hidden_states.device):
            out: Tensor = _own(self.layer, hidden_states, **arguments)
            return out
        assert position_embeddings is not None
        # Hooks on the attention module itself are called as long as the module is. One is the controller's own.
        watched = self.attention._forward_hooks or len(self.attention._forward_pre_hooks) > 1
        if hidden_states.shape[:2] == (1, 1) and self.controller.decodes and not watched:
            return self._one_token(hidden_states.flatten(), position_embeddings)[None, None]
        mlp = self.layer.mlp
        normed = fused.rms_norm(hidden_states, self.first)
        attended, _ = self.attention(hidden_states=normed, **arguments)
        del normed
        normed, total = fused.add_rms_norm(attended, hidden_states, self.second)
        del attended
        gated = fused.silu_mul(mlp.gate_proj(normed), mlp.up_proj(normed))
        # `total` is this layer's own, so the product is added where it lies.
        total.flatten(0, 1).addmm_(gated.flatten(0, 1), mlp.down_proj.weight.t())
        return total if mlp.down_proj.bias is None else total.add_(mlp.down_proj.bias)

    def attend(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The attention module, `[B, T, H]` → `[B, T, H]`."""
        module = self.attention
        if self.runs_own(hidden_states.device):
            out: tuple[Tensor, None] = _own(
                module,
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
            return out
        batch, columns, _ = hidden_states.shape
        probing = self.controller.probing
        q = module.q_proj(hidden_states).flatten(0, 1)
        pool = partial(self.controller.pooling.pool, self.index, q, self.q_norm)
        if not probing or self.last:
            # Ends a probe at its last layer.
            pool()
        k, v = self._keys_values(hidden_states, together=probing)
        cos, sin = (_per_token(x, batch, columns) for x in position_embeddings)
        if self.controller.decodes:
            attended = self._decode(q, k, v, cos, sin)
        else:
            q, k = fused.rotary(q, k, cos, sin, module.head_dim, self.q_norm, self.k_norm)
            if probing:
                # Here, because a probe's attention is what leaves most of a GPU idle.
                pool()
            q, k, v = (x.view(batch, columns, -1, module.head_dim).transpose(1, 2) for x in (q, k, v))
            attended = self.controller.attend(self.index, q, k, v, module.scaling)
        projected: Tensor = module.o_proj(attended.reshape(batch, columns, -1))
        return projected, None

    def _keys_values(self, x: Tensor, together: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of `x [B, T, H]`, `[B * T, Hk * D]`; `together`, of one product where the weights allow it.

        With few tokens a product is as long as its reading of the weight takes, and one that reads as little as either
        of the two does not fill a GPU.
        """
        k, v = self.attention.k_proj, self.attention.v_proj
        weight, bias = (_joint(k.weight, v.weight), _joint(k.bias, v.bias)) if together else (None, None)
        if weight is None or (bias is None and (k.bias is not None or v.bias is not None)):
            return k(x).flatten(0, 1), v(x).flatten(0, 1)
        keys, values = nn.functional.linear(x, weight, bias).flatten(0, 1).chunk(2, -1)
        return keys, values

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One token a row, `q [B, Hq * D]`, `k, v [B, Hk * D]` → `[B, Hq, D]`."""

        def append(keys: Tensor, values: Tensor, table: Tensor, counts: Tensor) -> Tensor:
            return fused.rotary_append(q, k, v, cos, sin, keys, values, table, counts, self.q_norm, self.k_norm)

        return self.controller.decode(self.index, append, self.attention.scaling)

    def _one_token(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """A whole layer for a single token `x [H]`, in seven launches."""
        q, k, v = (y[None] for y in fused.norm_three(x, self.first, *self.three()))
        cos, sin = (_per_token(y, 1, 1) for y in position_embeddings)
        attended = self._decode(q, k, v, cos, sin).flatten()
        out, down = self.attention.o_proj, self.layer.mlp.down_proj
        total = fused.vector(attended, out.weight, bias=out.bias, add=x)
        gated = fused.norm_gated(total, self.second, *self.gate_up())
        return fused.vector(gated, down.weight, bias=down.bias, add=total)


class _OnItsDevice:
    """A forward function whose kernels are launched where its input lies."""

    def __init__(self, controller: FluxAttention, run: Callable[..., Tensor]) -> None:
        self._controller, self._run = controller, run

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._controller.on(hidden_states.device):
            return self._run(hidden_states, *args, **kwargs)


class _NormOf:
    """A norm module as kernels take it, with the weight that it has now: `load_state_dict(assign=True)` replaces it."""

    def __init__(self, module: Any) -> None:
        self._module, self._norm = module, _norm(module)

    def __call__(self) -> Norm:
        if self._norm.weight is not self._module._parameters["weight"]:
            self._norm = _norm(self._module)
        return self._norm


def _vector(x: Tensor, weights: list[Tensor], i: int, config: VectorConfig) -> Tensor:
    return fused.vector(x, weights[i], config=config)


def _lay_together(first: Tensor | None, second: Tensor | None) -> None:
    """Move two parameters to where the second begins as the first ends."""
    if first is not None and second is not None:
        first.data, second.data = torch.cat((first.data, second.data)).chunk(2)


def _joint(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Two parameters of one shape as one tensor, where the second begins as the first ends; no copy, or None."""
    if first is None or second is None or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    if second.storage_offset() != first.storage_offset() + first.numel():
        return None
    return first.as_strided((2 * first.shape[0], *first.shape[1:]), first.stride())


def _own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward method of the module's class."""
    return type(module).forward(module, *args, **kwargs)


def _wants_own(device: torch.device) -> bool:
    """Whether fused code cannot serve here: it has no gradients, and knows nothing of autocast's dtypes."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled(device.type)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _normalise(module: Any, x: Tensor) -> Tensor:
    if _wants_own(x.device):
        out: Tensor = _own(module, x)
        return out
    return fused.rms_norm(x, _norm(module))


def _project(head: nn.Linear, hidden: Tensor) -> Tensor:
    if _wants_own(hidden.device) or hidden.numel() != head.in_features:
        out: Tensor = _own(head, hidden)
        return out
    return fused.vector(hidden.flatten(), head.weight, bias=head.bias).view(*hidden.shape[:-1], -1)


def _per_token(x: Tensor, batch: int, columns: int) -> Tensor:
    """`[1 or B, T, D]` → `[B * T, D]`."""
    return x.expand(batch, columns, x.shape[-1]).reshape(batch * columns, -1)
