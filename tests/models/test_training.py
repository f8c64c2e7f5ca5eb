"""Training on a tiny model: the backbone stays as it is, runs resume to the same numbers, damage is what it says."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from flux_attention.data.sample import Sample
from flux_attention.models.attach import attach, attached, detach
from flux_attention.models.step import SoftRouting
from flux_attention.route import AllSparse, Dense
from flux_attention.training.damage import DamageMeter, greedy_ranking, leave_one_out
from flux_attention.training.data import Collator, RouterDataset
from flux_attention.training.features import FeatureDataset
from flux_attention.training.meter import CostMeter
from flux_attention.training.objective import AnswerObjective, AnswerTokens, answer_logits, teacher_logits
from flux_attention.training.route_search import search_routes
from flux_attention.training.trainer import RouterTrainer, TrainConfig

from .tiny import CONFIG, VOCABULARY, make_model


def make_samples(count, seed=0, shortest=70, longest=150):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, n=1: torch.randint(low, high, (n,), generator=generator).tolist()  # noqa: E731
    found = []
    for i in range(count):
        answer = tuple(draw(3, VOCABULARY, draw(2, 6)[0]))
        found.append(
            Sample(
                task=f"task{i % 2}",
                task_class=("retrieval", "holistic")[i % 2],
                prompt_ids=tuple(draw(3, VOCABULARY, draw(shortest, longest)[0])),
                answer_ids=answer,
                answers=("x",),
                metric=("exact_match", "nll")[i % 2],
            )
        )
    return found


def attach_tiny(router_input="probe", family="llama", dtype=torch.float32):
    model = make_model(family).to(dtype)
    controller = attach(model, replace(CONFIG, router_input=router_input, full_bias=0.5))
    torch.manual_seed(5)
    # Trained-like routers: decisions that depend on the prompt.
    torch.nn.init.normal_(controller.router.weights[-1], std=0.3)
    return controller


def batch_of(samples):
    return Collator(pad_token_id=0)(samples)


def config_of(**changes):
    values = {"steps": 6, "batch_size": 2, "accumulation": 2, "logging_steps": 1, "seed": 3, "multiplier_lr": 0.05}
    return TrainConfig(**{**values, **changes})


def train(controller, config, folder, samples=None, resume=None, callbacks=(), **options):
    data = RouterDataset(samples or make_samples(10))
    trainer = RouterTrainer(controller, config, data, folder, progress=False, callbacks=callbacks, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# ---------------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("router_input", ["probe", "inline"])
@pytest.mark.parametrize("loss", ["lm", "distill"])
def test_objective_is_the_formula(loss, router_input):
    controller = attach_tiny(router_input)
    controller.model.requires_grad_(False)
    samples = make_samples(3)
    batch = batch_of(samples)
    objective = AnswerObjective(controller, loss, {"retrieval": 0.5, "holistic": 1.0}, noise=False)
    found = objective(**batch)
    # Again from whole logits, one sample at a time, under the hard route that the gates stand for.
    soft = SoftRouting(noise=False)
    expected = []
    for row, sample in enumerate(samples):
        n, p = len(sample), len(sample.prompt_ids)
        ids = batch["input_ids"][row : row + 1, :n]
        with torch.no_grad(), controller.soft_routing(soft), controller.prompt_lengths([p]):
            controller.decoder(input_ids=ids, use_cache=False)
        with torch.enable_grad(), controller.soft_routing(soft), controller.prompt_lengths([p]):
            logits = controller.model(input_ids=ids, use_cache=False).logits[0, p - 1 : n - 1].detach()
        with controller.using(Dense()):
            dense = controller.model(input_ids=ids, use_cache=False).logits[0, p - 1 : n - 1].detach()
        targets = torch.tensor(sample.answer_ids)
        if loss == "lm":
            expected.append(torch.nn.functional.cross_entropy(logits, targets))
        else:
            reference = dense.log_softmax(-1)
            expected.append((reference.exp() * (reference - logits.log_softmax(-1))).sum(-1).mean())
    torch.testing.assert_close(found["task_loss"], torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    found["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())
    assert all(p.grad is None for p in controller.model.parameters())


def test_logits_are_computed_on_answers_only_and_equal_the_models():
    controller = attach_tiny()
    samples = make_samples(3)
    batch = batch_of(samples)
    answer = AnswerTokens.of(batch["labels"])
    seen = []
    handle = controller.model.lm_head.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0]))
    found = teacher_logits(controller, batch["input_ids"], batch["attention_mask"], answer)
    handle.remove()
    assert seen == [sum(len(s.answer_ids) for s in samples)]
    detach(controller.model)
    with torch.no_grad():
        whole = controller.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, whole[answer.rows, answer.columns], rtol=1e-4, atol=1e-4)


def test_only_router_and_multipliers_are_in_the_module():
    controller = attach_tiny()
    objective = AnswerObjective(controller, "lm", {"retrieval": 0.5, "holistic": 1.0})
    names = {name.split(".")[0] for name, _ in objective.named_parameters()}
    assert names == {"router", "multipliers"}
    with pytest.raises(ValueError, match="loss must be lm or distill"):
        AnswerObjective(controller, "mse", {"retrieval": 0.5, "holistic": 1.0})


# ---------------------------------------------------------------------------------------------------- trainer


@pytest.mark.parametrize("objective", ["lm", "distill"])
def test_training_moves_the_router_and_nothing_else(tmp_path, objective):
    controller = attach_tiny()
    model = controller.model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    router = {n: p.clone() for n, p in controller.router.named_parameters()}
    trainer = train(controller, config_of(objective=objective, save_steps=3), tmp_path)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert any(not torch.equal(router[n], p) for n, p in controller.router.named_parameters())
    groups = trainer.optimizer.param_groups
    assert [len(g["params"]) for g in groups] == [len(router), 1]
    assert (groups[1]["maximize"], groups[1]["weight_decay"]) == (True, 0.0)
    # Checkpoints hold the small part only.
    stored = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert {n.split(".")[0] for n in stored} == {"router", "multipliers"}
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert {"task_loss", "penalty", "temperature", "lambda1_retrieval", "omega_holistic"} <= set().union(*logged)


def test_multipliers_rise_while_the_target_is_missed(tmp_path):
    controller = attach_tiny()
    torch.nn.init.zeros_(controller.router.weights[-1])  # all full: far from both targets
    config = config_of(gumbel_noise=False, router_lr=1e-9, multiplier_start=0.0)
    trainer = train(controller, config, tmp_path)
    assert (trainer.objective.multipliers.values > 0.05).all()


@pytest.mark.parametrize("objective", ["lm", "distill"])
def test_resume_gives_the_same_numbers(tmp_path, objective):
    config = config_of(objective=objective, save_steps=3)
    straight = train(attach_tiny(), config, tmp_path / "a")
    train(attach_tiny(), config, tmp_path / "b", callbacks=[StopAt(3)])
    torch.manual_seed(999)  # nothing may hang on where the global generator happens to be
    resumed = train(attach_tiny(), config, tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for (name, one), (_, two) in zip(
        straight.objective.named_parameters(), resumed.objective.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    last = [[row["loss"] for row in t.state.log_history if "loss" in row][-3:] for t in (straight, resumed)]
    assert last[0] == last[1]


def test_accumulation_is_a_larger_batch(tmp_path):
    samples = make_samples(4)
    losses = []
    for size, accumulation in ((4, 1), (2, 2)):
        config = config_of(steps=1, batch_size=size, accumulation=accumulation, gumbel_noise=False)
        trainer = train(attach_tiny(), config, tmp_path / str(size), samples)
        losses.append(trainer.state.log_history[0]["loss"])
        assert trainer.state.log_history[0]["grad_norm"] > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    train(attach_tiny(), config_of(steps=1), tmp_path, report_to=("tensorboard",))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_damage_objective_learns_classes_from_features(tmp_path):
    controller = attach_tiny()
    layers = len(controller.layers)
    torch.manual_seed(0)
    classes = torch.arange(120) % 2
    pooled = torch.randn(layers, 120, controller.router.head_dim) + 2.0 * classes[None, :, None]
    controller.router.fit_input_scale(pooled)
    wanted = torch.tensor([[0.1, 0.9, 0.1, 0.9], [0.9, 0.1, 0.1, 0.9]])
    data = FeatureDataset(pooled, wanted[classes], classes)
    config = TrainConfig(objective="damage", steps=60, batch_size=60, accumulation=1, router_lr=3e-3, logging_steps=0)
    trainer = RouterTrainer(controller, config, data, tmp_path, progress=False)
    trainer.train()
    decided = controller.router.p_full(pooled).T > 0.5
    assert (decided == (wanted[classes] > 0.5)).float().mean() > 0.97
    trainer.save_adapter(tmp_path / "adapter")
    model = controller.model
    detach(model)
    attach(model, str(tmp_path / "adapter"))
    assert torch.equal(attached(model).router.p_full(pooled).T > 0.5, decided)


# ---------------------------------------------------------------------------------------------------- damage


def test_measured_damage_is_kl_to_the_dense_model():
    controller = attach_tiny()
    samples = make_samples(4)
    meter = DamageMeter(controller, samples, batch_tokens=300)
    layers = meter.layers
    routes = torch.stack([torch.ones(layers), torch.zeros(layers)]).bool()
    found = meter.routes(routes)
    assert found.damage[0].abs().max() < 1e-5
    assert (found.damage[1] > 1e-4).all()
    for i, sample in enumerate(samples):
        ids, p = torch.tensor([sample.prompt_ids + sample.answer_ids]), len(sample.prompt_ids)
        logits = []
        for policy in (Dense(), AllSparse()):
            with torch.no_grad(), controller.using(policy):
                logits.append(controller.model(input_ids=ids, use_cache=False).logits[0, p - 1 : -1])
        reference = logits[0].log_softmax(-1)
        kl = (reference.exp() * (reference - logits[1].log_softmax(-1))).sum(-1)
        kl = kl.mean() if sample.metric == "nll" else kl.sum()
        assert float(found.damage[1, i]) == pytest.approx(1 - float(torch.exp(-kl)), abs=1e-4)
        nll = torch.nn.functional.cross_entropy(logits[1], torch.tensor(sample.answer_ids))
        assert float(found.nll[1, i]) == pytest.approx(float(nll), abs=1e-4)
    # A subset shares the answers and gives the same.
    some = meter.subset([3, 1]).routes(routes)
    torch.testing.assert_close(some.damage, found.damage[:, [3, 1]], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="use_full must be"):
        meter.measure([0], routes)


def test_only_answered_samples_calibrate():
    controller = attach_tiny()
    samples = make_samples(4)
    with torch.no_grad(), controller.using(Dense()):
        prompt = torch.tensor([samples[0].prompt_ids])
        first = int(controller.model(input_ids=prompt, use_cache=False).logits[0, -1].argmax())
    # Sample 0 becomes one that the model gets right; sample 2 stays a random answer, 1 and 3 are running text.
    samples[0] = replace(samples[0], answer_ids=(first,))
    meter = DamageMeter(controller, samples)
    assert meter.answered() == [0, 1, 3]
    assert meter.answered(least=0.0) == [0, 1, 2, 3]
    torch.testing.assert_close(meter.dense.loss, meter.routes(torch.ones(1, meter.layers).bool()).loss[0])
    # A subset shares what is known; KL alone needs the dense model's answers.
    assert meter.subset([2, 0]).dense.loss.tolist() == meter.dense.loss[[2, 0]].tolist()
    assert DamageMeter(controller, samples, teacher=False).dense.damage.isnan().all()


def test_gates_of_one_sample_do_not_reach_another():
    controller = attach_tiny()
    samples = make_samples(3)

    def slopes(some):
        batch = batch_of(some)
        answer = AnswerTokens.of(batch["labels"])
        gates = torch.full((len(controller.layers), len(some)), 0.5, requires_grad=True)
        with controller.soft_routing(SoftRouting(forced=gates)):
            logits = answer_logits(controller, batch["input_ids"], batch["attention_mask"], answer)
        loss = torch.nn.functional.cross_entropy(logits, answer.targets, reduction="sum")
        return torch.autograd.grad(loss, gates)[0]

    together = slopes(samples)
    assert together.abs().amin() > 1e-5
    torch.testing.assert_close(together, torch.cat([slopes([sample]) for sample in samples], 1), rtol=1e-3, atol=1e-5)


def test_greedy_with_all_candidates_is_plain_greedy():
    controller = attach_tiny()
    meter = DamageMeter(controller, make_samples(4))
    layers = meter.layers
    found = greedy_ranking(meter, candidates=layers, jump=0)
    use_full = torch.ones(layers, dtype=torch.bool)
    for layer in found.order:
        totals = {}
        for other in range(layers):
            if use_full[other]:
                trial = use_full.clone()
                trial[other] = False
                totals[other] = float(meter.routes(trial[None]).damage.mean())
        assert totals[layer] <= min(totals.values()) + 1e-5
        use_full[layer] = False
    assert found.measured == layers
    assert [row["sparse"] for row in found.curve] == list(range(layers + 1))


def test_lazy_greedy_stops_and_still_ranks_every_layer():
    controller = attach_tiny()
    meter = DamageMeter(controller, make_samples(4))
    found = greedy_ranking(meter, candidates=1, jump=2, stop=0.75)
    assert (found.measured, sorted(found.order)) == (3, list(range(meter.layers)))
    single = leave_one_out(meter).mean(0)
    assert found.order[:2] == single.argsort()[:2].tolist()
    with pytest.raises(ValueError, match="candidates ≥ 1"):
        greedy_ranking(meter, candidates=0)


def test_cost_counts_real_tokens_by_phase():
    controller = attach_tiny()
    samples = make_samples(2)
    batch = batch_of(samples)
    cost = CostMeter(controller)
    with cost.phase("dense"), torch.no_grad():
        answer = AnswerTokens.of(batch["labels"])
        with controller.using(Dense()):
            answer_logits(controller, batch["input_ids"], batch["attention_mask"], answer)
    with cost.phase("probe"):
        controller.probe([torch.tensor(s.prompt_ids) for s in samples])
    cost.close()
    controller.probe([torch.tensor(samples[0].prompt_ids)])
    assert cost.tokens == {"dense": sum(map(len, samples)), "probe": 2 * 2 * CONFIG.pool_tokens}
    assert "total" in cost.table()
    with pytest.raises(RuntimeError, match="inside of phase"), cost.phase("a"), cost.phase("b"):
        pass


def test_route_search_on_a_model_is_repeatable_and_refuses_bad_input():
    controller = attach_tiny()
    meter = DamageMeter(controller, make_samples(4))
    first, second = (search_routes(meter, 0.5, 12, batch=6, seed=3) for _ in range(2))
    assert torch.equal(first.mean, second.mean)
    assert sorted(first.order) == list(range(meter.layers))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        search_routes(meter, 1.0, 12)
    with pytest.raises(ValueError, match="two measurements"):
        search_routes(meter, 0.5, 1)


def test_slopes_are_those_of_the_measured_loss():
    """Against differences of the loss, float64; and at hard gates the loss is what `measure` says."""
    controller = attach_tiny(dtype=torch.float64)
    samples = make_samples(3)
    # Passes of one and two samples, of different lengths.
    meter = DamageMeter(controller, samples, gradient_tokens=2 * max(map(len, samples)))
    generator = torch.Generator().manual_seed(0)
    indices = [0, 1, 2, 1]
    gates = torch.rand(meter.layers, len(indices), generator=generator) * 0.8 + 0.1
    _, slopes = meter.slopes(indices, gates)
    step = 0.01
    for layer in range(meter.layers):
        moved = [gates.clone(), gates.clone()]
        moved[0][layer] += step
        moved[1][layer] -= step
        high, low = (meter.slopes(indices, g)[0].double() for g in moved)
        torch.testing.assert_close(slopes[layer].double(), (low - high) / (2 * step), rtol=0.05, atol=1e-4)
    assert float(slopes.abs().max()) > 1e-3
    hard = torch.rand(meter.layers, len(indices), generator=generator) < 0.5
    torch.testing.assert_close(meter.slopes(indices, hard.float())[0], meter.measure(indices, hard).loss)
    # A few blends among hard gates: what all blends give at the limit, a hard gate's slope included.
    blended = torch.rand(meter.layers, len(indices), generator=generator) < 0.4
    mixed = torch.where(blended, gates, hard.float())
    close = torch.where(blended, gates, hard.float().clamp(1e-6, 1 - 1e-6))
    (loss, slopes), (limit, limits) = meter.slopes(indices, mixed), meter.slopes(indices, close)
    torch.testing.assert_close(loss, limit, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slopes, limits, rtol=1e-3, atol=1e-4)
    assert slopes.all()
    # Nothing of the backbone was asked for a gradient.
    assert all(parameter.grad is None for parameter in controller.model.parameters())
    with pytest.raises(ValueError, match="gates must be"):
        meter.slopes(indices, gates[:, :1])
