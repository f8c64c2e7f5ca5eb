"""The commands of training at scale: data build, data check, train-packs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from flux_attention.data.sample import Sample
from flux_attention.models.adapter import load_adapter
from flux_attention.models.attach import attach
from flux_attention.training.launch import PackRun, run
from flux_attention.training.scale import ScaleConfig

from .test_cli import run as command  # noqa: F401  (a fixture)
from .tiny_backbone import save_all

ROW = {"context": "The code is 7. " * 20, "question": "Which code?", "answer": "7", "task": "qa"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    tasks = ("qa", "summary")
    made = [
        {**ROW, "answer": f"answer {i}", "task": tasks[i % 2], "context": ROW["context"] * (1 + i % 3)}
        for i in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, made)))
    return path


def test_from_rows_to_an_adapter(command, backbone, rows, tmp_path):  # noqa: F811
    data, out = tmp_path / "data", tmp_path / "adapter"
    code, shown, err = command("data", "build", rows, "--out", data, "--model", backbone, "--pack-tokens", 2048)
    assert code == 0, err
    assert "retrieval" in shown and "packs of 2,048 tokens" in err
    assert "built before" in command("data", "build", rows, "--out", data, "-m", backbone, "--pack-tokens", 2048)[2]
    settings = ("--steps", 2, "--accumulation", 1, "--pack-tokens", 2048, "--window-tokens", 128, "--device", "cpu")
    where = ("--model", backbone, "--out", out, "--runs", tmp_path / "runs", "--save-steps", 1)
    code, shown, err = command("train-packs", data, *where, *settings)
    assert code == 0, err
    # The Trainer prints its log before.
    assert shown.strip().splitlines()[-1] == str(out)
    adapter = load_adapter(out)
    assert adapter.config.window_tokens == 128
    # The scale of the router's input was set from the documents.
    assert not torch.equal(adapter.state["input_scale"], torch.ones_like(adapter.state["input_scale"]))
    code, _, err = command("train-packs", data, *where, *settings[:1], 4, *settings[2:], "--resume")
    assert code == 2 and "steps: 2 → 4" in err
    code, _, err = command("train-packs", data, *where, *settings, "--resume")
    assert code == 0, err
    rows.write_text(rows.read_text().replace("answer 1", "answer one"))
    assert command("data", "build", rows, "--out", data, "--model", backbone, "--pack-tokens", 2048)[0] == 0
    code, _, err = command("train-packs", data, *where, *settings, "--resume")
    assert code == 2 and "other settings (then → now): data: " in err
    model = AutoModelForCausalLM.from_pretrained(backbone)
    attach(model, out)
    # From there with its own settings, which are not the defaults; what it settles is not asked for otherwise.
    start = ("--start", out, "--runs", tmp_path / "again", "--device", "cpu", "--pack-tokens", 2048, "--steps", 1)
    where = ("--model", backbone, "--out", tmp_path / "next", "--accumulation", 1)
    code, _, err = command("train-packs", data, *where, *start)
    assert code == 0, err
    assert load_adapter(tmp_path / "next").config.window_tokens == 128


def test_the_seed_is_the_whole_of_chance(command, backbone, rows, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    assert command("data", "build", rows, "--out", data, "--model", backbone, "--pack-tokens", 2048)[0] == 0
    found = []
    for i, seed in enumerate((0, 0, 1)):
        scale = ScaleConfig(objective="distill", pack_tokens=2048, steps=2, accumulation=1, seed=seed)
        plan = PackRun(model=str(backbone), data=data, out=tmp_path / f"{i}", runs=tmp_path / f"runs{i}", scale=scale)
        run(plan, device="cpu", progress=False)
        found.append([value for _, value in sorted(load_adapter(tmp_path / f"{i}").state.items())])
    assert all(map(torch.equal, found[0], found[1])) and not all(map(torch.equal, found[0], found[2]))


def test_check_names_bad_rows(command, backbone, rows):  # noqa: F811
    code, shown, err = command("data", "check", rows, "--model", backbone)
    assert code == 0 and shown == "" and "12 good" in err
    bad = [{**ROW, "task": "riddle"}, {**ROW, "answer": "x" * 400}, ROW, ROW]
    rows.write_text("\n".join(map(json.dumps, bad)))
    code, shown, err = command("data", "check", rows, "--model", backbone, "--max-length", 500)
    lines = shown.splitlines()
    assert code == 1 and len(lines) == 3
    assert "row 1: field 'task' holds 'riddle'" in lines[0]
    assert "row 2:" in lines[1] and "more than max_length=500" in lines[1]
    assert "row 4: duplicate" in lines[2]
    assert "1 good" in err and "2 bad" in err and "1 duplicate" in err
    assert command("data", "check", rows, "-m", backbone, "--class", "riddle=retrieval", "--max-length", 999)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "build", "gone.jsonl", "--out", "x"], "neither a file nor a known data set"),
        (["data", "build", "colt-132k", "--out", "x"], "is not on the Hub"),
        (
            ["data", "check", "ROWS", "--class", "riddle"],
            "--class must be TASK=retrieval or TASK=holistic, got 'riddle'",
        ),
        (["data", "check", "ROWS", "--class", "riddle=hard"], "must be one of ('retrieval', 'holistic'), got 'hard'"),
        (["data", "build", "ROWS", "--out", "x", "--overlong", "cut"], "overlong must be truncate, skip or error"),
        (["train-packs", "nowhere", "--model", "m", "--out", "x"], "nowhere is no data set"),
        (["train-packs", "nowhere", "--model", "m", "--out", "x", "--quantize", "2bit"], 'must be None or "4bit"'),
        (["train-packs", "d", "--model", "m", "--out", "x", "--pack-tokens", "0"], "pack_tokens must be an integer"),
        # A default that is asked for counts, too.
        (
            [
                "train-packs",
                "d",
                "-m",
                "m",
                "-o",
                "x",
                "--start",
                "a",
                "--window-tokens",
                "2048",
                "--router-input=probe",
            ],
            "--start a goes on with the adapter's own settings: leave out --router-input, --window-tokens",
        ),
        (
            ["train-packs", "d", "-m", "m", "-o", "x", "--start", "a", "--sparse-mode", "streaming", "--sink-tokens=1"],
            "leave out --sparse-mode, --sink-tokens",
        ),
    ],
)
def test_bad_input_is_one_line(command, rows, arguments, message):  # noqa: F811
    code, out, err = command(*[str(rows) if a == "ROWS" else a for a in arguments])
    assert code == 2 and message in err and "Traceback" not in err and out == ""


def test_data_of_another_model_is_refused(command, backbone, rows, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    assert command("data", "build", rows, "--out", data, "--model", backbone, "--pack-tokens", 2048)[0] == 0
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, "largest_token": 9999}))
    with pytest.raises(
        ValueError, match=r"holds token 9999, but .* has 259: build the data with this model's tokenizer"
    ):
        run(PackRun(model=str(backbone), data=data, out=tmp_path / "out"), device="cpu")
    for changes, message in (({"calibrate": 1}, "calibrate must be 0 or at least 2"),):
        with pytest.raises(ValueError, match=message):
            PackRun(model="m", data=data, out="x", **changes)


def test_a_quantised_backbone_needs_its_package(backbone, command, rows, tmp_path, monkeypatch):  # noqa: F811
    import importlib.util

    data = tmp_path / "data"
    assert command("data", "build", rows, "--out", data, "--model", backbone, "--pack-tokens", 2048)[0] == 0
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flux-attention\[quantize\]'"):
        run(PackRun(model=str(backbone), data=data, out=tmp_path / "out", quantize="4bit"), device="cpu")


def test_a_quantised_backbone_passes_gradients_on(backbone, tmp_path):
    """Against the same weights dequantised: what the router learns must not depend on how they are stored."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from flux_attention.training.launch import _load
    from flux_attention.training.packed_objective import PackedObjective
    from flux_attention.training.packing import Pack
    from flux_attention.training.recompute import recomputed_layers

    from .tiny_backbone import CONFIG

    model = _load(PackRun(model=str(backbone), data="d", out="o", quantize="4bit"), torch.device("cpu"))
    linears = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(linears) == 7 * model.config.num_hidden_layers
    plain = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16).eval().requires_grad_(False)
    for name, module in model.named_modules():
        if module in linears:
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.to(torch.bfloat16)
    samples = [
        Sample("qa", "retrieval", tuple(range(3, 120)), (7, 8, 9), ("x",), "f1"),
        Sample("summary", "holistic", tuple(range(90, 3, -1)) * 2, (9, 8, 7), ("x",), "f1"),
    ]
    found = []
    for one in (model, plain):
        controller = attach(one, CONFIG)
        torch.manual_seed(0)
        controller.router.reset_parameters()
        torch.nn.init.normal_(controller.router.weights[-1], std=0.3)
        controller.router.biases[-1].data.zero_()
        objective = PackedObjective(controller, "lm", {"retrieval": 0.5, "holistic": 1.0}, noise=False)
        with recomputed_layers(controller):
            objective(**Pack.of(samples).as_dict())["loss"].backward()
        assert all(p.grad is None for p in one.parameters())
        found.append(torch.cat([p.grad.flatten() for p in controller.router.parameters()]))
    assert found[1].abs().max() > 1e-4
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()
