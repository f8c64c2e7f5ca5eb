"""Training over packs: the same gradients as documents alone, recomputed or not, whatever the vocabulary."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flux_attention.data.sample import TASK_CLASSES
from flux_attention.models.attach import attach, detach
from flux_attention.models.overrides import forward_overrides
from flux_attention.models.step import SoftRouting
from flux_attention.training.chunked_loss import chunked_cross_entropy, chunked_kl
from flux_attention.training.compiled import compiled_layers
from flux_attention.training.objective import AnswerObjective
from flux_attention.training.packed_objective import PackedObjective
from flux_attention.training.packing import Pack, PackCollator, PackedDataset, pack_lengths
from flux_attention.training.recompute import recomputed_layers

from .test_training import attach_tiny, batch_of, make_samples
from .tiny import CONFIG, make_model

TARGETS = {"retrieval": 0.5, "holistic": 1.0}


def gradients(objective, batch, recompute=False):
    objective.zero_grad()
    if recompute:
        with recomputed_layers(objective.controller):
            found = objective(**batch)
            found["loss"].backward()
    else:
        found = objective(**batch)
        found["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.controller.model.parameters())
    return found, {name: p.grad.clone() for name, p in objective.named_parameters()}


def assert_same(actual, expected, rtol=1e-4, atol=1e-6):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("router_input", ["probe", "inline"])
@pytest.mark.parametrize("loss", ["lm", "distill"])
def test_a_pack_is_its_documents(loss, router_input, family, recompute):
    """Against the padded batch of the same documents, whose objective is written without packs or chunks."""
    controller = attach_tiny(router_input, family)
    controller.model.requires_grad_(False)
    samples = make_samples(3)
    options = {"loss": loss, "targets": TARGETS, "noise": False}
    expected, wanted = gradients(AnswerObjective(controller, **options), batch_of(samples))
    # The row is longer than its documents: what fills it must not count.
    pack = Pack.of(samples, multiple=64)
    assert pack.input_ids.shape[1] % 64 == 0 and pack.input_ids.shape[1] > int(pack.lengths.sum())
    found, actual = gradients(PackedObjective(controller, **options), pack.as_dict(), recompute)
    for name in ("loss", "task_loss", "penalty", "sparsity"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert_same(actual, wanted)
    assert any(float(g.abs().max()) > 1e-4 for g in actual.values())


def test_a_choice_has_the_gradient_of_the_blend():
    """Straight-through gates: one side with a graph gives what both sides blended give."""
    controller = attach_tiny()
    controller.model.requires_grad_(False)
    samples = make_samples(3)
    batch = batch_of(samples)
    torch.manual_seed(0)
    hard = (torch.rand(len(controller.layers), 3) > 0.5).float()
    found = []
    for full in (None, tuple(tuple(v > 0.5 for v in row) for row in hard.tolist())):
        gates = hard.clone().requires_grad_()
        soft = SoftRouting(forced=gates, forced_exact=full)
        with controller.soft_routing(soft):
            hidden = controller.decoder(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).last_hidden_state
        (hidden.square() * batch["attention_mask"][..., None]).sum().backward()
        found.append((hidden.detach(), gates.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-3)


def test_recomputing_runs_the_chosen_side_alone_first():
    controller = attach_tiny()
    controller.model.requires_grad_(False)
    objective = PackedObjective(controller, "lm", TARGETS, noise=False)
    calls = []
    for name in ("full_mode", "sparse_mode"):
        mode = getattr(controller, name)

        class Counting(type(mode)):
            def prefill(self, inputs):
                calls.append((self.name, inputs.q.shape[0], torch.is_grad_enabled()))
                return super().prefill(inputs)

        setattr(controller, name, Counting(controller.config))
    samples = make_samples(3)
    with recomputed_layers(controller):
        loss = objective(**Pack.of(samples).as_dict())["loss"]
        probed = 2 * CONFIG.pool_tokens * len(samples)
        first = [call for call in calls if call[1] > probed]
        layers, tokens = len(controller.layers), sum(map(len, samples))
        assert sum(n for _, n, _ in first) == layers * tokens
        assert not any(gradient for *_, gradient in first)
        loss.backward()
    assert sum(n for _, n, gradient in calls if gradient) == layers * tokens
    assert sum(n for _, n, _ in calls if n > probed) == 3 * layers * tokens
    assert "forward" not in vars(controller.decoder.layers[0])


def test_noise_is_drawn_per_pack_from_the_generator():
    controller = attach_tiny()
    controller.model.requires_grad_(False)
    objective = PackedObjective(controller, "lm", TARGETS)
    objective.temperature = 1.5
    seen = []
    for seed in (1, 1, 2, 3, 4):
        objective.generator = torch.Generator().manual_seed(seed)
        seen.append(objective(**Pack.of(make_samples(4)).as_dict())["sparsity"])
    assert torch.equal(seen[0], seen[1])
    assert any(not torch.equal(seen[0], other) for other in seen[2:])


# ---------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("elements", [1, 7 * 53, 10**6])
def test_losses_are_the_formulas(elements, softcap):
    torch.manual_seed(0)
    n, hidden, vocabulary = 19, 12, 53
    weight = torch.randn(vocabulary, hidden)
    student, teacher = torch.randn(2, n, hidden)
    targets, rows = torch.randint(0, vocabulary, (n,)), torch.rand(n)

    def logits(x):
        y = x @ weight.T
        return y if softcap is None else torch.tanh(y / softcap) * softcap

    for kind in ("lm", "distill"):
        a, b = (student.clone().requires_grad_() for _ in range(2))
        if kind == "lm":
            expected = (F.cross_entropy(logits(a), targets, reduction="none") * rows).sum()
            actual = chunked_cross_entropy(b, weight, targets, rows, softcap=softcap, elements=elements)
        else:
            p, q = logits(teacher).log_softmax(-1), logits(a).log_softmax(-1)
            expected = ((p.exp() * (p - q)).sum(-1) * rows).sum()
            actual = chunked_kl(b, teacher, weight, rows, softcap=softcap, elements=elements)
        (2.5 * expected).backward()
        (2.5 * actual).backward()
        torch.testing.assert_close(actual, expected.detach())
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lm", "distill"])
def test_memory_of_the_loss_does_not_depend_on_the_vocabulary(kind):
    """The largest tensor that either pass makes, counted by the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self, weight):
            super().__init__()
            self.weight, self.elements = weight.untyped_storage().data_ptr(), 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for made in out if isinstance(out, tuple | list) else (out,):
                # A view of the output layer's weight is no new memory.
                if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.weight:
                    self.elements = max(self.elements, made.numel())
            return out

    n, hidden, budget = 96, 4, 24_000
    sizes = []
    for vocabulary in (500, 8000):
        weight = torch.randn(vocabulary, hidden)
        student = torch.randn(n, hidden).requires_grad_()
        rows = torch.ones(n)
        with Largest(weight) as seen:
            if kind == "lm":
                loss = chunked_cross_entropy(student, weight, torch.zeros(n).long(), rows, elements=budget)
            else:
                loss = chunked_kl(student, torch.randn(n, hidden), weight, rows, elements=budget)
            loss.backward()
        sizes.append(seen.elements)
    assert max(sizes) <= budget < n * 500
    assert sizes[0] == sizes[1]


# ---------------------------------------------------------------------------------------------------- packs


def test_packs_hold_every_document_once():
    torch.manual_seed(0)
    lengths = torch.randint(1, 300, (500,)).tolist()
    packs = pack_lengths(lengths, 512)
    assert sorted(i for pack in packs for i in pack) == list(range(500))
    filled = [sum(lengths[i] for i in pack) for pack in packs]
    assert max(filled) <= 512
    assert sum(filled) / (512 * len(packs)) > 0.95
    assert pack_lengths(lengths, 512) == packs
    # No document waits long: nothing overtakes it by more than the window.
    assert max(abs(i - packs[0][0]) for i in packs[0]) < 64


def test_a_pack_is_laid_out_as_said():
    samples = make_samples(3)
    pack = Pack.of(samples, multiple=1)
    start = 0
    for sample, length, prompt in zip(samples, pack.lengths.tolist(), pack.prompt_lens.tolist(), strict=True):
        ids = list(sample.prompt_ids + sample.answer_ids)
        assert pack.input_ids[0, start : start + length].tolist() == ids
        assert pack.position_ids[0, start : start + length].tolist() == list(range(length))
        learned = pack.token_weight[0, start : start + length].nonzero()[:, 0].tolist()
        assert learned == list(range(prompt - 1, length - 1))
        assert [pack.targets[0, start + i].item() for i in learned] == list(sample.answer_ids)
        start += length
    assert float(pack.token_weight.sum()) == pytest.approx(1.0)
    assert [TASK_CLASSES[i] for i in pack.class_index.tolist()] == [s.task_class for s in samples]


def test_data_sets_are_packed_repeatably():
    samples = make_samples(40)
    one, two = (PackedDataset(samples, 500, seed=seed) for seed in (1, 1))
    assert one.packs == two.packs != PackedDataset(samples, 500, seed=2).packs
    assert 0.7 < one.filled <= 1 and len(one) == len(one.packs)
    assert one[0] == [samples[i] for i in one.packs[0]]
    short = PackedDataset(samples, 500, short_first=True)
    longest = [max(len(samples[i]) for i in pack) for pack in short.packs]
    levels = [max(1, n - 1).bit_length() for n in longest]
    assert levels == sorted(levels) and levels[0] < levels[-1]


def test_bad_packs():
    samples = make_samples(3)
    long = max(range(3), key=lambda i: len(samples[i]))
    with pytest.raises(ValueError, match=rf"document {long} has {len(samples[long])} tokens, a pack 70"):
        PackedDataset(samples, 70)
    with pytest.raises(ValueError, match="document 1 has 9 tokens, a pack 8"):
        pack_lengths([8, 9], 8)
    with pytest.raises(ValueError, match="no documents"):
        PackedDataset([], 70)
    with pytest.raises(ValueError, match="one pack is one batch, got 2"):
        PackCollator()([samples, samples])
    with pytest.raises(ValueError, match="at least one document"):
        Pack.of([])


def test_the_model_is_as_it_was():
    model = make_model("llama")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    controller = attach(model, replace(CONFIG, full_bias=0.5))
    model.requires_grad_(False)
    gradients(PackedObjective(controller, "distill", TARGETS), Pack.of(make_samples(2)).as_dict(), recompute=True)
    detach(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any("forward" in vars(m) for m in model.modules())


def test_fractions_can_be_recomputed_too():
    controller = attach_tiny()
    controller.model.requires_grad_(False)
    batch = batch_of(make_samples(2))
    found = []
    for recompute in (False, True):
        gates = torch.full((len(controller.layers), 2), 0.3).requires_grad_()
        with controller.soft_routing(SoftRouting(forced=gates)):
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
            if recompute:
                with recomputed_layers(controller):
                    controller.decoder(**inputs).last_hidden_state.square().sum().backward()
            else:
                controller.decoder(**inputs).last_hidden_state.square().sum().backward()
        found.append(gates.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "gemma3"])
def test_compiled_layers_give_the_same_gradients(family):
    controller = attach_tiny("probe", family)
    controller.model.requires_grad_(False)
    objective = PackedObjective(controller, "lm", TARGETS, noise=False)
    batch = Pack.of(make_samples(2)).as_dict()
    expected, wanted = gradients(objective, batch)
    seen = []
    with compiled_layers(controller, backend="aot_eager"):
        changed = [m for m in controller.decoder.modules() if "forward" in vars(m)]
        seen += {type(m).__name__ for m in changed}
        found, actual = gradients(objective, batch, recompute=True)
        # A pass without gradients runs the model's own code.
        with torch.no_grad():
            torch.testing.assert_close(objective(**batch)["loss"], expected["loss"].detach(), rtol=1e-6, atol=1e-6)
    assert any(name.endswith("RMSNorm") for name in seen)
    assert any(name.endswith("MLP") for name in seen) == (family != "qwen3_moe")
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
    assert_same(actual, wanted)
    assert not any("forward" in vars(m) for m in controller.model.modules())


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor builds for a processor with g++")
def test_compiled_layers_round_where_the_model_does():
    # A teacher's passes are not compiled: what its student rounds elsewhere would be in the difference of the two.
    controller = attach_tiny("probe", "qwen3")
    layer = controller.decoder.layers[0].bfloat16()
    x = torch.randn(1, 50, controller.decoder.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    expected = layer.input_layernorm(x), layer.mlp(x)
    with compiled_layers(controller):
        found = layer.input_layernorm(x), layer.mlp(x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_last_product_is_not_computed_again():
    controller = attach_tiny()
    controller.model.requires_grad_(False)
    objective = PackedObjective(controller, "lm", TARGETS, noise=False)
    batch = Pack.of(make_samples(2)).as_dict()
    expected = gradients(objective, batch)[1]
    objective.zero_grad()
    real, poisoned = torch.Tensor.new_empty, []

    def poison(self, *shape, **options):
        poisoned.append(shape)
        return real(self, *shape, **options).fill_(torch.nan)

    with recomputed_layers(controller):
        loss = objective(**batch)["loss"]
        try:
            # Whatever the memory holds must reach nothing.
            torch.Tensor.new_empty = poison
            loss.backward()
        finally:
            torch.Tensor.new_empty = real
    tokens, hidden = int(batch["lengths"].sum()), controller.decoder.config.hidden_size
    assert poisoned.count((1, tokens, hidden)) == len(controller.layers)
    assert_same({n: p.grad for n, p in objective.named_parameters()}, expected)


def test_overrides_of_others_are_put_back():
    module = torch.nn.Linear(2, 2)
    mine = lambda x: x * 0  # noqa: E731
    module.forward = mine
    with forward_overrides() as override:
        override(module, lambda before: lambda x: before(x) + 1)
        with forward_overrides() as inner:
            inner(module, lambda before: lambda x: before(x) + 2)
            assert module(torch.ones(2)).tolist() == [3, 3]
        assert module(torch.ones(2)).tolist() == [1, 1]
    assert module.forward is mine


@pytest.mark.parametrize("router_input", ["probe", "inline"])
def test_fused_layers_train_to_the_same_gradients(router_input):
    """Passes without gradients run the fused layers, the others the model's own code; recomputing keeps both."""
    model = make_model("qwen3")
    found = []
    for fuse in (False, True):
        controller = attach(model, replace(CONFIG, router_input=router_input, full_bias=0.5), fuse=fuse)
        torch.manual_seed(5)
        controller.router.reset_parameters()
        torch.nn.init.normal_(controller.router.weights[-1], std=0.3)
        model.requires_grad_(False)
        objective = PackedObjective(controller, "distill", TARGETS, noise=False)
        found.append(gradients(objective, Pack.of(make_samples(3)).as_dict(), recompute=True))
        assert (controller.fusion is not None) == fuse
        assert ("forward" in vars(controller.decoder.layers[0])) == fuse
        detach(model)
    torch.testing.assert_close(found[0][0]["loss"], found[1][0]["loss"], rtol=1e-5, atol=1e-6)
    assert_same(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("full", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_documents_that_stay_dense_are_left_out_of_distillation(full):
    """Their KL and its gradient are 0: leaving them out changes no number, and they cost no pass."""
    controller = attach_tiny()
    controller.model.requires_grad_(False)
    samples = make_samples(3)
    batch = Pack.of(samples).as_dict()
    forced = [s in full for s in range(3)]
    found = []
    for skip in (False, True):
        objective = PackedObjective(controller, "distill", TARGETS, noise=False, skip_full=skip)

        class Pushed(type(controller.router)):
            def forward(self, pooled, layer=None):
                logits = super().forward(pooled, layer)
                # Documents of `full` get every layer full, the others never all of them.
                push = torch.tensor([[9.0 if f else -9.0 * (i == 0) for f in forced] for i in range(logits.shape[0])])
                return logits + torch.stack([torch.zeros_like(push), push], -1)

        kind, controller.router.__class__ = type(controller.router), Pushed
        passed = []
        handle = controller.decoder.register_forward_pre_hook(
            lambda module, args, kwargs, passed=passed: passed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        try:
            found.append(gradients(objective, batch, recompute=True))
        finally:
            handle.remove()
            controller.router.__class__ = kind
        tokens = [len(sample) for s, sample in enumerate(samples) if not (skip and s in full)]
        # The first pass is the probe; then the teacher and the student.
        assert passed[1:] == ([sum(tokens)] * 2 if tokens else [])
    for name in ("loss", "task_loss", "sparsity"):
        torch.testing.assert_close(found[1][0][name], found[0][0][name], rtol=1e-5, atol=1e-6)
    assert_same(found[1][1], found[0][1])
    assert float(found[0][0]["task_loss"]) > 1e-4 or len(full) == 3
