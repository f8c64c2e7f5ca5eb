"""lm-evaluation-harness with an attached model, offline, on a local task file."""

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
pytest.importorskip("lm_eval.models.huggingface", reason="lm-evaluation-harness is not complete (extra: eval)")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from flux_attention.cli import main
from flux_attention.cli.harness import FluxLM
from flux_attention.models.attach import attached
from flux_attention.route import AllSparse, Dense

from .tiny_backbone import make_backbone, make_tokenizer, save_all

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [" yes", " no, never"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    backbone, adapter = save_all(folder)
    rows = [{"text": f"{i} " + "some long text. " * (10 + 3 * i), "label": i % 2, "answer": "a"} for i in range(5)]
    file = folder / "rows.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "choice.yaml").write_text(CHOICE.format(file=file))
    (tasks / "generate.yaml").write_text(GENERATE.format(file=file))
    return backbone, adapter, tasks


def requests_of(tokenizer, count=4):
    found = []
    for i in range(count):
        context, continuation = f"{i} " + "a text that is long. " * (4 + 5 * i), " and its end" * (1 + i % 2)
        found.append(((context, continuation), tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]))
    return found


def make(places, **more):
    backbone, adapter, _ = places
    return FluxLM(pretrained=str(backbone), adapter=str(adapter), device="cpu", **more)


@pytest.mark.parametrize("batch_tokens", [1, 700])
def test_dense_loglikelihoods_are_the_models(places, batch_tokens):
    lm = make(places, policy="dense", batch_tokens=batch_tokens)
    tokenizer, plain = make_tokenizer(), make_backbone()
    requests = requests_of(tokenizer)
    for (_, context, continuation), (value, greedy) in zip(
        requests, lm._loglikelihood_tokens(requests, disable_tqdm=True), strict=True
    ):
        with torch.no_grad():
            log_p = plain(torch.tensor([context + continuation])).logits[0, :-1].log_softmax(-1)
        rows = log_p[len(context) - 1 :]
        targets = torch.tensor(continuation)
        assert value == pytest.approx(float(rows.gather(-1, targets[:, None]).sum()), abs=1e-3)
        assert greedy == bool((rows.argmax(-1) == targets).all())
    assert isinstance(lm.controller.policy, Dense) and attached(lm.model) is lm.controller


def test_routed_loglikelihoods_differ_and_the_sparsity_is_told(places):
    requests = requests_of(make_tokenizer())
    dense = make(places, policy="dense")._loglikelihood_tokens(requests, disable_tqdm=True)
    lm = make(places, policy="sparse")
    assert isinstance(lm.controller.policy, AllSparse)
    sparse = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert any(abs(a[0] - b[0]) > 1e-3 for a, b in zip(dense, sparse, strict=True))
    facts = lm.get_model_info()
    assert facts["flux_mean_sparsity"] == 1.0 and facts["flux_policy"] == "sparse"


def test_a_context_too_long_is_cut_from_the_left(places):
    lm = make(places, policy="dense", max_length=64)
    context, continuation = [5] * 50 + list(range(10, 60)), [7, 8]
    cut = (context + continuation)[-65:]
    (long,) = lm._loglikelihood_tokens([(("a", "b"), context, continuation)], disable_tqdm=True)
    (short,) = lm._loglikelihood_tokens([(("a", "b"), cut[:-2], continuation)], disable_tqdm=True)
    assert long == short


def test_local_tasks(places):
    found = simple_evaluate(
        make(places, batch_size=2),
        tasks=["local_choice", "local_generate"],
        task_manager=TaskManager(include_path=str(places[2]), include_defaults=False),
        bootstrap_iters=0,
    )
    results = found["results"]
    assert 0 <= results["local_choice"]["acc,none"] <= 1
    assert results["local_generate"]["exact_match,none"] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def test_command_line(places, tmp_path, capsys):
    backbone, adapter, tasks = places
    options = {
        "--model": "flux",
        "--model_args": f"pretrained={backbone},adapter={adapter}",
        "--device": "cpu",
        "--tasks": "local_choice",
        "--include_path": str(tasks),
        "--output_path": str(tmp_path / "out"),
        "--limit": "2",
    }
    with pytest.raises(SystemExit) as exit_:
        main(["lm-eval", *(word for option in options.items() for word in option)])
    assert not exit_.value.code
    assert "local_choice" in capsys.readouterr().out
    (result,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["config"]["flux_adapter"] == str(adapter)


def test_bad_arguments(places):
    with pytest.raises(ValueError, match="unknown policy"):
        make(places, policy="guess")
    with pytest.raises(ValueError, match="above max_sparsity"):
        make(places, min_sparsity=0.9, max_sparsity=0.1)
