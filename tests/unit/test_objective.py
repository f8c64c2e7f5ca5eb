"""Answer positions, the Lagrangian, damage targets, and the training configuration."""

from dataclasses import replace

import pytest
import torch

from flux_attention.data.sample import Sample
from flux_attention.models.attach import attach
from flux_attention.route import Dial, Route
from flux_attention.router import LayerRouter
from flux_attention.training.checkpoints import ResumeError
from flux_attention.training.damage import (
    budget_targets,
    rank_positions,
    static_ranking,
)
from flux_attention.training.data import Mixture, MixtureDataset, RouterDataset
from flux_attention.training.features import FeatureDataset, collate_features
from flux_attention.training.objective import (
    AnswerTokens,
    DamageObjective,
    Multipliers,
    initialise_bias,
    token_kl,
)
from flux_attention.training.trainer import RouterTrainer, TrainConfig, compact_state, dataset_key

from .tiny_backbone import CONFIG, make_backbone, make_tokenizer

TARGETS = {"retrieval": 0.5, "holistic": 1.0}


def test_answer_positions_are_the_ones_before_the_answer():
    labels = torch.full((2, 7), -100)
    labels[0, 4:7] = torch.tensor([11, 12, 13])
    labels[1, 2] = 21
    answer = AnswerTokens.of(labels)
    assert answer.rows.tolist() == [0, 0, 0, 1]
    assert answer.columns.tolist() == [3, 4, 5, 1]
    assert answer.targets.tolist() == [11, 12, 13, 21]
    values = torch.tensor([1.0, 2.0, 6.0, 5.0])
    assert answer.sample_mean(values, 2).tolist() == [3.0, 5.0]


def test_labels_without_an_answer_are_refused():
    with pytest.raises(ValueError, match="no answer token"):
        AnswerTokens.of(torch.full((1, 5), -100))


def test_token_kl_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, 63, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=student)
    )
    torch.testing.assert_close(token_kl(teacher, student), expected.float(), rtol=1e-5, atol=1e-5)
    assert token_kl(teacher, teacher).abs().max() < 1e-6


def test_lagrangian_by_hand_and_its_gradients():
    multipliers = Multipliers(TARGETS, start=0.3)
    with torch.no_grad():
        multipliers.values.copy_(torch.tensor([[0.1, 0.2], [0.4, 0.8]]))
    sparsity = torch.tensor([0.75, 0.5], requires_grad=True)
    penalty = multipliers(sparsity, torch.tensor([0, 1]))
    assert penalty.item() == pytest.approx(0.5 * (0.1 * 0.25 + 0.2 * 0.0625 + 0.4 * 0.5 + 0.8 * 0.25))
    penalty.backward()
    assert sparsity.grad is not None
    assert sparsity.grad[0] > 0  # too sparse: less is cheaper
    assert sparsity.grad[1] < 0
    # Ascent raises every multiplier whose class is off its target.
    assert (multipliers.values.grad > 0).all()


def test_multipliers_stay_non_negative():
    multipliers = Multipliers(TARGETS)
    with torch.no_grad():
        multipliers.values.sub_(1.0)
    multipliers.project()
    assert multipliers.values.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"retrieval": 0.5}, "must name the classes"),
        ({"retrieval": 0.5, "holistic": 1.5}, r"targets\['holistic'\] must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_targets_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        Multipliers(targets)
    with pytest.raises(ValueError, match="targets"):
        TrainConfig(targets=targets)


def test_budget_targets_are_exact_and_ordered():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(6, 10, generator=generator)
    sparsity = torch.tensor([0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
    targets = budget_targets(scores, sparsity, softness=0.7)
    assert (targets < 0.5).sum(1).tolist() == [0, 3, 5, 7, 9, 10]
    assert torch.equal(targets.argsort(1), scores.argsort(1))
    assert ((targets > 0) & (targets < 1)).all()
    both = budget_targets(scores, sparsity, softness=(0.2, 4.0))
    step, slope = (budget_targets(scores, sparsity, softness) for softness in (0.2, 4.0))
    torch.testing.assert_close(both, (step + slope) / 2)
    assert (both < 0.5).sum(1).tolist() == [0, 3, 5, 7, 9, 10]
    assert torch.equal(both.argsort(1), scores.argsort(1))
    for nothing in (0.0, (0.2, 0.0), ()):
        with pytest.raises(ValueError, match="softness must be positive"):
            budget_targets(scores, sparsity, nothing)


def layers_under_a_dial(softness):
    """Two kinds of prompts with rankings of their own are learned at Ω .75; the share of layers that a dial of other
    Ω then takes as their rankings do, and the share of open decisions as the budget wants them."""
    torch.manual_seed(0)
    layers, dim, kinds = 16, 8, torch.arange(200) % 2
    scores = torch.stack([torch.randperm(layers), torch.randperm(layers)]).float()[kinds]
    pooled = torch.randn(200, layers, dim) + 3.0 * kinds[:, None, None]
    target = budget_targets(scores, 0.75, softness)
    router = LayerRouter(layers, dim)
    router.fit_input_scale(pooled.transpose(0, 1))
    objective = DamageObjective(router)
    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        objective(pooled, target, kinds)["loss"].backward()
        optimizer.step()
    p_full = router.p_full(pooled.transpose(0, 1))
    shares = []
    for sparse in (4, 8, 14):
        omega = sparse / layers
        use_full = Route.from_scores(p_full).with_dial(Dial(omega, omega)).use_full.T
        assert ((~use_full).sum(1) == sparse).all()
        shares.append((use_full == (scores >= sparse)).float().mean())
    return torch.stack(shares).mean(), ((p_full.T > 0.5) == (scores >= 12)).float().mean()


def test_a_gentle_slope_teaches_the_order_that_a_dial_needs():
    dialled, decided = layers_under_a_dial((0.2, 4.0))
    assert dialled > 0.93
    assert decided > 0.99
    # A step alone leaves the order to chance: what this is measured against.
    assert layers_under_a_dial(0.2)[0] < dialled - 0.05


def test_rankings():
    damage = torch.tensor([[3.0, 1.0, 2.0], [5.0, 0.0, 1.0]])
    ranking = static_ranking(damage)
    assert ranking == [1, 2, 0]
    assert rank_positions(ranking).tolist() == [1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="every layer from 0 to 2 once"):
        rank_positions([0, 2, 2])


def test_initial_bias_is_the_static_route():
    router = LayerRouter(4, 8)
    wanted = torch.tensor([0.1, 0.9, 0.5, 0.7])
    initialise_bias(router, wanted)
    torch.testing.assert_close(router.p_full(torch.randn(4, 3, 8)), wanted[:, None].expand(-1, 3))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        initialise_bias(router, [0.0, 0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=r"must be \[4\], got \[3\]"):
        initialise_bias(router, [0.5, 0.5, 0.5])


def test_damage_objective_is_binary_cross_entropy_of_p_full():
    torch.manual_seed(0)
    router = LayerRouter(3, 8)
    torch.nn.init.normal_(router.weights[-1])
    pooled, target = torch.randn(5, 3, 8), torch.rand(5, 3)
    objective = DamageObjective(router).eval()
    found = objective(pooled, target, torch.zeros(5, dtype=torch.long))
    p_full = router.p_full(pooled.transpose(0, 1)).T
    expected = torch.nn.functional.binary_cross_entropy(p_full, target)
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(found["sparsity"], (p_full <= 0.5).float().mean(1))
    # Class 0 three times, class 1 once: as if its rows were there three times.
    weighted = DamageObjective(router, class_weights={"retrieval": 3.0, "holistic": 1.0}).eval()
    classes, rows = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 0, 0, 1, 2, 3, 3, 3, 4])
    found = weighted(pooled, target, classes)
    torch.testing.assert_close(
        found["loss"], torch.nn.functional.binary_cross_entropy(p_full[rows], target[rows]), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="class_weights must give each of retrieval, holistic"):
        TrainConfig(class_weights={"retrieval": 2.0})


def test_noise_and_dropout_act_on_whitened_features_in_training_only():
    router = LayerRouter(2, 16)
    router.fit_input_scale(torch.randn(2, 50, 16) * 100 + 30)
    features = torch.randn(2, 4, 16) * 100 + 30
    objective = DamageObjective(router, input_noise=0.0, input_dropout=0.0)
    torch.testing.assert_close(objective._perturbed(features), features, rtol=1e-4, atol=1e-3)
    objective = DamageObjective(router, input_noise=0.0, input_dropout=0.5)
    dropped = (objective._perturbed(features) - router.input_mean[:, None]).abs() < 1e-3
    assert 0.2 < dropped.float().mean() < 0.8
    objective = DamageObjective(router, input_noise=0.1, input_dropout=0.0)
    change = (objective._perturbed(features) - features) * router.input_scale[:, None]
    assert 0.07 < change.std() < 0.13
    with pytest.raises(ValueError, match="input_dropout in"):
        DamageObjective(router, input_dropout=1.0)


def test_feature_rows_keep_layers_and_samples_apart():
    pooled = torch.arange(2 * 3 * 4, dtype=torch.float32).view(2, 3, 4)  # [L, n, D]
    data = FeatureDataset(pooled, torch.rand(3, 2), torch.tensor([0, 1, 1]))
    batch = collate_features([data[2], data[0]])
    assert torch.equal(batch["pooled"][0], pooled[:, 2])
    assert torch.equal(batch["pooled"][1], pooled[:, 0])
    assert batch["class_index"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="target must be"):
        FeatureDataset(pooled, torch.rand(2, 3), torch.tensor([0, 1, 1]))


def test_datasets_as_large_are_told_apart():
    sample = Sample("qa", "retrieval", (3, 4, 5), (6,), ("x",), "f1")
    changed = [
        replace(sample, task_class="holistic"),
        replace(sample, prompt_ids=(3, 4, 6)),
        replace(sample, prompt_ids=(3, 4), answer_ids=(5, 6)),
        replace(sample, answer_ids=(7,)),
    ]
    keys = [dataset_key(RouterDataset([sample, other])) for other in (sample, *changed)]
    keys.append(dataset_key(RouterDataset([changed[0], sample])))
    assert len(set(keys)) == 6 and None not in keys
    assert dataset_key(RouterDataset([sample, replace(sample)])) == keys[0]

    plain = Mixture(extra=[sample], extra_share=0.5)
    weights = {"retrieval": 0.4, "holistic": 0.6}
    mixtures = [
        plain,
        replace(plain, tasks=plain.tasks[1:]),
        replace(plain, lengths=(4096, 4000)),
        replace(plain, lengths=(4096, 4000), length_weights=(1.0, 2.0)),
        replace(plain, class_weights=weights),
        replace(plain, task_weights={"kv_lookup": 2.0}),
        replace(plain, seed=1),
        replace(plain, block=4),
        replace(plain, extra_share=0.6),
        replace(plain, extra=changed[:1]),
    ]
    tokenizer = make_tokenizer()
    keys = [dataset_key(MixtureDataset(mixture, tokenizer, 8)) for mixture in mixtures]
    assert len(set(keys)) == len(mixtures) and None not in keys
    assert dataset_key(MixtureDataset(replace(plain), make_tokenizer(), 8)) == keys[0]
    tokenizer.add_tokens(["code"])
    assert dataset_key(MixtureDataset(plain, tokenizer, 8)) != keys[0]

    pooled, target, classes = torch.ones(3, 2, 4), torch.zeros(2, 3), torch.tensor([0, 1])
    other = pooled.clone()
    other[2, 1, 3] = 2
    made = [(pooled, target, classes), (other, target, classes), (pooled, target + 1, classes)]
    made.append((pooled, target, classes.flip(0)))
    keys = [dataset_key(FeatureDataset(*parts)) for parts in made]
    assert len(set(keys)) == 4 and None not in keys
    assert dataset_key(FeatureDataset(pooled.clone(), target, classes)) == keys[0]
    assert dataset_key([sample]) is None


def test_data_of_another_kind_is_told_by_a_given_key(tmp_path):
    pytest.importorskip("accelerate")
    controller = attach(make_backbone(), CONFIG)
    config = TrainConfig(steps=1, batch_size=2, accumulation=1, save_steps=1)
    samples = [Sample("qa", "retrieval", tuple(range(3, 60)), (7, 8), ("x",), "f1")] * 2

    def train(key, resume):
        RouterTrainer(controller, config, samples, tmp_path, progress=False, data_key=key).train(resume)

    train("one", False)
    train("one", True)
    with pytest.raises(ResumeError, match="data: 'one' → 'two'"):
        train("two", True)


def test_compact_state_keeps_decisions():
    torch.manual_seed(0)
    router = LayerRouter(5, 16)
    torch.nn.init.normal_(router.weights[-1])
    pooled = torch.randn(5, 200, 16) * 40 + 200
    router.fit_input_scale(pooled)
    state = compact_state(router)
    assert {t.dtype for n, t in state.items() if not n.startswith("input_")} == {torch.float16}
    copy = LayerRouter(5, 16)
    copy.load_state_dict(state)
    assert (copy.p_full(pooled) - router.p_full(pooled)).abs().max() < 0.01


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective", "mse"),
        ("steps", 0),
        ("steps", True),
        ("batch_size", 1.5),
        ("accumulation", -1),
        ("router_lr", 0.0),
        ("multiplier_lr", -1e-3),
        ("clip", float("nan")),
        ("warmup_share", 1.2),
        ("betas", (0.9, 1.0)),
        ("seed", -1),
        ("save_steps", -5),
    ],
)
def test_bad_options_name_the_field(field, value):
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field} must be"):
        TrainConfig(**{field: value})


def test_defaults_are_the_published_recipe():
    config = TrainConfig()
    assert (config.steps, config.batch_size * config.accumulation) == (300, 48)
    assert (config.router_lr, config.multiplier_lr, config.clip) == (5e-4, 1e-3, 5.0)
    assert (config.betas, config.weight_decay, config.warmup_share) == ((0.9, 0.95), 0.1, 0.2)
