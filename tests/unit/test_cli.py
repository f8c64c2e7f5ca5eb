"""The command line: every command on a tiny model, and one clean line for every kind of bad input."""

import io
import json
import subprocess
import sys
import time

import pytest
import torch

from flux_attention.cli import main
from flux_attention.models.adapter import load_adapter

from .tiny_backbone import LAYERS, make_tokenizer, save_all


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    backbone, adapter = save_all(tmp_path_factory.mktemp("model"))
    return ["--model", str(backbone), "--adapter", str(adapter), "--device", "cpu"]


@pytest.fixture
def run(capsys):
    """Runs a command; returns exit code, output and error stream."""

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        done = capsys.readouterr()
        return exit_.value.code or 0, done.out, " ".join(done.err.split())

    return call


def test_help_is_fast_and_lists_the_commands():
    best = 10.0
    for _ in range(3):  # the first start may find a cold disk
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "flux_attention", "--help"], capture_output=True, text=True, timeout=60, check=True
        )
        best = min(best, time.perf_counter() - started)
    for command in ("demo", "generate", "route", "train", "eval", "board", "bench"):
        assert command in done.stdout
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, flux_attention.cli; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split()
    assert not {"torch", "transformers", "matplotlib"} & set(loaded)
    assert best < 2.0  # well under a second on an idle machine


def test_route_shows_a_row_per_prompt(run, places, tmp_path):
    long, figure = tmp_path / "long.txt", tmp_path / "routes.png"
    long.write_text("What is it? " * 40)
    code, out, err = run("route", *places, "-f", long, "-p", "short", "--figure", figure)
    assert code == 0, err
    rows = out.splitlines()
    # Prompts of --prompt come first.
    assert "short" in rows[0] and "█" * LAYERS in rows[0] and "Ω 0.00" in rows[0]
    assert "long.txt (" in rows[1] and "█▂" in rows[1]  # layer 0 is full, layer 1 sparse
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_route_as_json_follows_the_dial(run, places, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("What is it? " * 40)
    for low, high in ((0.0, 0.25), (0.75, 1.0)):
        dial = ("--min-sparsity", low, "--max-sparsity", high)
        code, out, err = run("route", *places, "--json", "-f", long, *dial)
        assert code == 0, err
        found = json.loads(out)
        assert low <= found["sparsity"] <= high
        assert len(found["use_full"]) == len(found["p_full"]) == LAYERS


def test_generate_prints_the_answer_alone_on_the_output(run, places):
    text = "Count with me: one, two, three. " * 20
    code, out, err = run("generate", *places, "-p", text, "-n", 5)
    assert code == 0, err
    assert "KV cache" in err and "KV cache" not in out
    assert run("generate", *places, "-p", text, "-n", 5)[1] == out
    sampled = [run("generate", *places, "-p", text, "-n", 9, "--temperature", 5, "--seed", s)[1] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_eval_records(run, places, tmp_path):
    code, out, err = run("eval", *places, "--suite", "quick", "-n", 2, "--record", "--results", tmp_path)
    assert code == 0, err
    assert "quick_sparsity" in out
    data = json.loads(next(tmp_path.glob("eval-quick-*.json")).read_text())
    assert data["settings"]["n"] == 2 and data["settings"]["adapter"] == places[3]
    assert {f["name"] for f in data["figures"]} >= {"quick_sparsity", "quick_needle1", "quick_needle1_dense"}
    assert len(data["details"]["samples"]) == 8


def test_demo_writes_a_report_that_opens_offline(run, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("demo", *places, "--length", 700, "--new-tokens", 3, "--rounds", 1, "--record")
    assert code == 0, err
    assert "prefill" in out and "Ω" in out
    page = (tmp_path / "flux-demo" / "report.html").read_text()
    assert "<svg" in page and "KV cache" in page
    assert "src=" not in page and "<link" not in page and "<script" not in page
    data = json.loads(next((tmp_path / "benchmarks" / "results").glob("demo-*.json")).read_text())
    names = {f["name"]: f["value"] for f in data["figures"]}
    assert names["demo_seconds_installed"] > 0 and names["demo_peak_gb"] > 0.1
    assert 0 < names["demo_retrieval_kv_vs_dense"] <= 1


def test_train_writes_an_adapter(run, places, tmp_path):
    pytest.importorskip("accelerate")
    rows = tmp_path / "rows.jsonl"
    row = {"context": "The code is 7. " * 40, "question": "Which code?", "answer": "7", "task": "qa"}
    rows.write_text("\n".join(json.dumps(row) for _ in range(2)))
    settings = ("--steps", 2, "--batch-size", 1, "--accumulation", 1, "--lengths", "3000", "--window-tokens", 128)
    out = tmp_path / "adapter"
    where = ("--out", out, "--runs", tmp_path / "runs", "--data", rows, "--save-steps", 0)
    code, _, err = run("train", *places[:2], *places[4:], *settings, *where)
    assert code == 0, err
    assert load_adapter(out).config.window_tokens == 128 and "are longer than" not in err
    long, empty = tmp_path / "long.jsonl", tmp_path / "empty.jsonl"
    long.write_text(json.dumps({**row, "context": "The code is 7. " * 800}))
    empty.write_text("")
    for data, message, wanted in ((long, "1 of 1 rows are longer than 3000 tokens", 0), (empty, "holds no rows", 2)):
        where = ("--out", tmp_path / "other", "--runs", tmp_path / "runs2", "--data", data, "--save-steps", 0)
        code, _, err = run("train", *places[:2], *places[4:], *settings, *where)
        assert code == wanted and message in " ".join(err.split())
    # The same seed gives the same router, another one another.
    found = [load_adapter(out).state]
    for seed in (0, 1):
        where = ("--out", tmp_path / f"{seed}", "--runs", tmp_path / f"runs{seed}", "--data", rows, "--seed", seed)
        assert run("train", *places[:2], *places[4:], *settings, *where)[0] == 0
        found.append(load_adapter(tmp_path / f"{seed}").state)
    first, same, other = ([value for _, value in sorted(state.items())] for state in found)
    assert all(map(torch.equal, first, same)) and not all(map(torch.equal, first, other))


def test_training_is_resumed_on_its_own_data(run, places, tmp_path):
    pytest.importorskip("accelerate")
    rows = {}
    for name, word in (("first", "7"), ("other", "8")):
        rows[name] = tmp_path / f"{name}.jsonl"
        row = {"context": f"The code is {word}. " * 40, "question": "Which code?", "answer": word, "task": "qa"}
        rows[name].write_text("\n".join(json.dumps(row) for _ in range(2)))

    def train(data, *more, share=0.5, lengths="3000"):
        settings = ("--steps", 2, "--batch-size", 1, "--accumulation", 1, "--window-tokens", 128, "--save-steps", 1)
        where = ("--out", tmp_path / "adapter", "--runs", tmp_path / "runs", "--data", rows[data])
        return run(
            "train", *places[:2], *places[4:], *settings, *where, "--data-share", share, "--lengths", lengths, *more
        )

    assert train("first")[0] == 0
    for code, _, err in (
        train("other", "--resume"),
        train("first", "--resume", share=0.6),
        train("first", "--resume", lengths="3100"),
    ):
        # As many samples, and the same settings beside them.
        assert code == 2 and "other settings (then → now): data: " in err
    code, _, err = train("first", "--resume")
    assert code == 0, err


def test_bench_names_what_there_is(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("bench", "kernels")
    assert code == 2 and "checkout of the project" in err
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "hello.py").write_text("import sys\nprint('hello', sys.argv[1:])  # __main__\n")
    (tmp_path / "benchmarks" / "shared.py").write_text("WORD = 1\n")
    code, _, err = run("bench", "kernels")
    assert code == 2 and err.endswith("known: hello")
    assert "NAME is one of hello" in run("bench", "--help")[1]
    assert run("bench", "hello", "--help")[1].strip() == "hello ['--help']"
    assert run("bench", "hello", "--quick")[1].strip() == "hello ['--quick']"


def test_a_benchmark_finds_what_lies_beside_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "beside_greeting.py").write_text("WORD = 'found'\n")
    (tmp_path / "benchmarks" / "greet.py").write_text("from beside_greeting import WORD\nprint(WORD)  # __main__\n")
    before = list(sys.path)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    code, out, err = run("bench", "greet")
    assert (code, out.strip()) == (0, "found"), err
    assert sys.path == before


def test_text_that_is_no_utf8_is_refused(run, monkeypatch):
    # What Python makes of such bytes depends on the locale.
    for errors, message in (
        ("strict", "standard input is not UTF-8 text"),
        ("surrogateescape", "byte that is not UTF-8"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors))
        code, _, err = run("route", "-f", "-")
        assert code == 2 and message in err
    code, _, err = run("route", "-p", b"caf\xe9".decode(errors="surrogateescape"))
    assert code == 2 and "the prompt 'caf?' holds a byte that is not UTF-8 (0xE9, character 4)" in err


BAD = [
    (["eval", "--suite", "continuation", "--figure", "x.png"], "the suite 'continuation' has none of"),
    (["eval", "--record", "--min-sparsity", "0.5"], "leave out the dial and --scoring"),
    (["route", "-p", "x", "--min-sparsity", "1.5"], "min_sparsity must be a number in [0, 1], got 1.5"),
    (["route", "-p", "x", "--min-sparsity", "0.8", "--max-sparsity", "0.2"], "min_sparsity 0.8 is above max_sparsity"),
    (["route", "-p", "x", "--policy", "sometimes"], "unknown policy 'sometimes'; the forms are router, dense"),
    (["route", "-p", "x", "--policy", "dense", "--min-sparsity", "0.5"], "policy 'dense' has none"),
    (["route", "-p", "x", "--device", "abacus"], "unknown device 'abacus'"),
    (["route", "-p", "x", "--dtype", "int3"], "unknown dtype 'int3'"),
    (["route"], "give a prompt"),
    (["route", "-p", "  "], "the prompt is empty"),
    (["route", "-f", "/nowhere/at/all"], "/nowhere/at/all"),
    (["generate", "-p", "x", "--top-p", "0"], "--top-p in (0, 1]"),
    (["generate", "-p", "x" * 9000], "context"),
    (["route", "-p", "x" * 9000], "exceed the model's context of 8192"),
    (["eval", "--suite", "guess"], "unknown suite 'guess'; known: needle, continuation, free, quick"),
    (["eval", "--scoring", "guess"], "scoring must be one of auto, forced, generated"),
    (["eval", "-n", "1"], "n must be at least 2"),
    (["demo", "--length", "9000"], "context"),
    (["board", "--record", "--policies", "router,damage"], "--record keeps a board with every static choice"),
    (["demo", "--rounds", "0"], "--rounds must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a)[:40] for a, _ in BAD])
def test_bad_input_is_one_line(run, places, arguments, message):
    command, *rest = arguments
    kept = [] if "--device" in rest else places[4:]
    code, out, err = run(command, *places[:4], *kept, *rest)
    assert code == 2
    assert err.startswith("error: ") or "error: " in err
    assert message in err and "Traceback" not in err
    assert out == "" or command == "demo"


def test_an_unknown_family_or_model_is_named(run, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=259, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for command in (("generate", "-p", "x"), ("route", "-p", "x"), ("eval",), ("demo",), ("train", "--out", tmp_path)):
        code, _, err = run(*command, "--model", tmp_path)
        assert code == 2 and "model family 'gpt2' is not known" in err
    code, _, err = run("generate", "-p", "x", "--model", tmp_path / "nowhere")
    assert code == 2 and "nowhere': no such folder" in err
    (tmp_path / "model.safetensors").unlink()
    code, _, err = run("generate", "-p", "x", "--model", tmp_path)
    assert code == 2 and f"backbone '{tmp_path}' cannot be loaded" in err


def test_training_lengths_are_checked_before_the_run(run, places, tmp_path):
    for lengths, message in (
        ("300", "needs more than length=300 tokens"),
        ("9000", "--lengths 9000 is over the"),
        ("256,900", "a router learns nothing from such samples"),
    ):
        settings = ("--out", tmp_path / "a", "--lengths", lengths, "--window-tokens", 128)
        code, _, err = run("train", *places[:2], *places[4:], *settings)
        assert code == 2 and message in err and "0/300" not in err
    assert not (tmp_path / "a").exists()


def test_a_missing_adapter_says_what_to_do(run, places):
    code, _, err = run("demo", *places[:2])
    assert code == 2 and "no shipped adapter fits" in err and "flux-attn train" in err
    code, _, err = run("route", "-p", "x", *places[:2], "--adapter", "nobody")
    assert code == 2 and "no adapter 'nobody'" in err


def test_training_settings_are_checked_first(run, tmp_path):
    for options, message in (
        (("--objective", "guess"), "--objective must be lm or distill"),
        (("--lengths", "a,b"), "--lengths must be numbers"),
        (("--data-share", 2), "--data-share must be in [0, 1], got 2.0"),
        (("--window-tokens", 100), "window_tokens must be a positive multiple of block_tokens (128), got 100"),
    ):
        code, _, err = run("train", "--model", "/nowhere", "--out", tmp_path, *options)
        assert code == 2 and message in err


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(ValueError, match="unknown suite"):
        main(["eval", "--suite", "guess", "--debug"])


def test_without_its_packages_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "flux_attention.cli.app", raising=False)
    with pytest.raises(SystemExit, match=r"needs typer: pip install 'flux-attention\[demo\]'"):
        main([])
