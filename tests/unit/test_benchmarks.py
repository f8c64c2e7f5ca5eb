"""The benchmarks run at toy sizes, check themselves, and write results files that the plots can read."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, *arguments: str) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "benchmarks" / program), *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def figures(folder: Path) -> dict[str, float]:
    (path,) = folder.glob("*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["commit"] == "abc" and data["device"] and data["date"]
    return {figure["name"]: figure["value"] for figure in data["figures"]}


@pytest.mark.parametrize(
    ("program", "sections", "expected"),
    [
        ("kernels.py", "dense,streaming,decode,xattn,fuzz", ["prefill_full_4k_vs_fa4", "kernel_fuzz_shapes_quick"]),
        (
            "end_to_end.py",
            "memory,decode,routing,prefill",
            [
                "prefill_speedup_4k_q75_of_ideal",
                "decode_speedup_2k_q75",
                "kv_bytes_2k_q75_vs_dense",
                "routing_probe_ms",
            ],
        ),
    ],
)
def test_toy_run(tmp_path, program, sections, expected):
    output = run(
        program, "--tiny", "--device", "cpu", "--sections", sections, "--out", str(tmp_path), "--commit", "abc"
    )
    assert "FAILED" not in output
    found = figures(tmp_path)
    # A failed check would have put "unchecked_" before every name.
    assert set(expected) <= set(found)
    # Inline routing is a difference of two times, by events and by the clock: noise can turn its sign.
    assert all(value > 0 for name, value in found.items() if not name.startswith("routing_inline_"))


def test_layers_are_watched(monkeypatch):
    """Every layer's decision and launch is seen, on a stand-in for CUDA's events."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import routing
    from model_8b import toy
    from transformers import Qwen3ForCausalLM

    from flux_attention.config import FluxConfig
    from flux_attention.models.attach import attach
    from flux_attention.route import Fixed

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def query(self):
            return True

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(routing.torch.cuda, "Event", Event)
    model = Qwen3ForCausalLM(toy()).eval()
    controller = attach(model, FluxConfig(sink_tokens=128, window_tokens=256, router_input="inline"), fuse=True)
    routing.bias_layers(controller.router)
    ids = routing.torch.arange(1500)[None] % 256

    def run() -> SimpleNamespace:
        events = [Event(enable_timing=True) for _ in "ab"]
        events[0].record()
        model(ids)
        events[1].record()
        return SimpleNamespace(events=events)

    with routing.torch.no_grad():
        watch = routing.watch_layers(controller, run)
        with controller.using(Fixed(controller.last_route)):
            static = routing.watch_layers(controller, run)
    assert watch.sparse == [True, False, True, False] and not static.sparse
    for seen in (watch, static):
        assert len(seen.before_attention) == 4
        parts = zip(seen.before_attention, seen.decide, seen.idle, strict=True)
        assert all(whole > decide + idle > 0 for whole, decide, idle in parts)
        assert seen.before_first > 0 and seen.behind_last > 0
        assert seen.own_ms == seen.before_first + sum(seen.before_attention) + seen.behind_last
    assert sum(watch.decide) > sum(static.decide)

    noted = {}
    keeper = SimpleNamespace(
        add=lambda name, value, unit, values, interval: noted.update({name: values}), note=noted.__setitem__
    )
    monkeypatch.setattr(routing, "WATCHED", 2)
    passes = iter([watch, static, watch, static])
    monkeypatch.setattr(routing, "watch_layers", lambda *_: next(passes))
    routing.watched_layers(controller, None, None, keeper)
    assert noted["routing_inline_ms"] == [watch.own_ms - static.own_ms] * 2
    assert set(noted["routing_inline_parts_ms"]) == {"layers", "before", "behind", "static"}
    assert len(noted["routing_inline_watched"]) == 2
    summary = watch.summary()
    assert all(summary[side]["late"] == 2 and summary[side]["wait_us"] >= 0 for side in ("full", "sparse"))
    # What was watched is as it was.
    assert "attend" not in vars(controller) and routing.LayerPooling.decide.__name__ == "decide"


@pytest.fixture
def fuzzing(tmp_path, monkeypatch):
    """Runs the fuzz of some ops at toy sizes; gives the exit status and the figures of the results file."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kernels

    def go(ops: str, commit: str = "abc", *more: str) -> tuple[int, dict[str, float]]:
        arguments = ("--tiny", "--device", "cpu", "--sections", "fuzz", "--out", str(tmp_path), "--commit", commit)
        status = kernels.main([*arguments, "--fuzz-ops", ops, *more])
        (path,) = tmp_path.glob("*.json")
        data = json.loads(path.read_text(encoding="utf-8"))
        assert data["commit"] == commit
        return status, {figure["name"]: figure["value"] for figure in data["figures"]}

    return go


def test_fuzz_divided_among_calls(fuzzing):
    whole = "kernel_fuzz_shapes_quick"
    status, found = fuzzing("select_blocks,paged_decode")
    assert status == 0
    assert found == {"kernel_fuzz_select_blocks_shapes_quick": 6, "kernel_fuzz_paged_decode_shapes_quick": 6}
    _, found = fuzzing("dense,streaming,triangle,block_sparse")
    assert found[whole] == 6 and len(found) == 7
    # One op again leaves the others what they are.
    _, found = fuzzing("paged_decode")
    assert found[whole] == 6 and len(found) == 7
    # Results of other code do not count, nor those of code that nobody can tell.
    for commit in ("def", "def-dirty", "def-dirty"):
        _, found = fuzzing("paged_decode", commit)
        assert found == {"kernel_fuzz_paged_decode_shapes_quick": 6}
        _, found = fuzzing("select_blocks", commit)
        assert len(found) == (2 if commit == "def" else 1)
        _, found = fuzzing("paged_decode", "another")


def test_fuzz_reports_what_its_time_sufficed_for(fuzzing, monkeypatch, capfd):
    from tests.kernels import fuzz

    def slow(*_: object) -> fuzz.Case:
        time.sleep(0.7)
        return fuzz.Case("streaming", "auto", "", 0.0, 0.0, 1.0)

    fuzzing("dense,triangle,block_sparse,select_blocks")
    monkeypatch.setitem(fuzz.OPS, "streaming", slow)
    status, found = fuzzing("paged_decode,streaming", "abc", "--fuzz-seconds", "2")
    assert status == 1 and "kernel_fuzz_shapes_quick" not in found
    assert found["kernel_fuzz_paged_decode_shapes_quick"] == 6
    done = found["kernel_fuzz_streaming_shapes_quick"]
    assert 0 < done < 5
    assert f"within 2 s: streaming: 0 failed, {done:.0f} of 5 passed" in capfd.readouterr().out


def test_a_shape_over_its_limit_is_no_figure(fuzzing, monkeypatch, capfd):
    from tests.kernels import fuzz

    monkeypatch.setitem(fuzz.OPS, "dense", lambda *_: fuzz.Case("dense", "auto", "this one", 2.0, 0.0, 1.0))
    status, found = fuzzing(",".join(fuzz.OPS))
    assert status == 1 and len(found) == 6 and found["kernel_fuzz_dense_shapes_quick"] == 0
    output = capfd.readouterr().out
    assert "this one" in output and "dense: 6 failed, 0 of 5 passed" in output


def test_fuzz_processes_end_with_a_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kernels

    later = time.time() + 100
    shares = [kernels.Share("paged_decode", 1, 2, 3, later), kernels.Share("nothing", 0, 1, 3, later)]
    shares.append(kernels.Share("paged_decode", 0, 2, 3, time.time() - kernels.GRACE))
    found = dict(kernels._in_processes(shares))
    assert found[shares[0]]["passed"] == 3 and not found[shares[0]]["failed"]
    assert "KeyError: 'nothing'" in found[shares[1]]["failed"][0]
    assert "no end within 1 s" in found[shares[2]]["failed"][0]


@pytest.fixture
def serving(monkeypatch):
    """The module of benchmarks/serving.py, as it is without vLLM."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    # What it imports sets what vLLM reads: for this test alone.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    spec = importlib.util.spec_from_file_location("serving_benchmark", ROOT / "benchmarks" / "serving.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    monkeypatch.setattr("flux_attention.serving.compat.vllm_version", lambda: "0.26.0")
    return module


def test_no_speed_without_its_check(serving, tmp_path, monkeypatch, capfd):
    def check(recorder):
        recorder.add("vllm_gpu_check_sparse", 1.0, "nat")
        raise RuntimeError("routed requests differ")

    arguments = ["serving.py", "--gpu", "--out", str(tmp_path), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(serving, "check", check)
    monkeypatch.setattr(serving, "Speed", lambda *args: pytest.fail("a speed was measured"))
    assert serving.main() == 1
    assert set(figures(tmp_path)) == {"vllm_gpu_check_sparse"}
    assert "no speed is measured" in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--sections", "speed"])
    with pytest.raises(SystemExit):
        serving.main()


@pytest.mark.parametrize(("more", "kept"), [((), True), (("--shape", '{"num_hidden_layers": 2}'), False)])
def test_a_rehearsal_of_serving_keeps_nothing(serving, monkeypatch, more, kept):
    folders = []

    def note(sections, recorder, until=None):
        folders.append(recorder.folder)
        return 1

    monkeypatch.setattr(serving, "run_sections", note)
    monkeypatch.setattr(sys, "argv", ["serving.py", "--gpu", "--commit", "abc", *more])
    assert serving.main() == 1
    monkeypatch.setattr(sys, "argv", ["serving.py", "--gpu", "--commit", "abc", *more, "--out", "elsewhere"])
    assert serving.main() == 1
    assert folders == [Path("benchmarks/results") if kept else None, Path("elsewhere")]


def test_a_rehearsal_of_generate_keeps_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    import generate_parallel

    folders = []

    def note(sections, recorder, until):
        folders.append(recorder.folder)
        return 1

    monkeypatch.setattr(generate_parallel, "run_sections", note)
    monkeypatch.setattr(generate_parallel.faulthandler, "dump_traceback_later", lambda *args, **kwargs: None)
    for arguments in (["--tiny"], ["--tiny", "--out", "elsewhere"], []):
        monkeypatch.setattr(sys, "argv", ["generate_parallel.py", "--device", "cpu", *arguments])
        assert generate_parallel.main() == 1
    assert folders == [None, Path("elsewhere"), Path("benchmarks/results")]


def test_loads_by_the_time_there_is(serving):
    assert serving.parse_loads("32768x16,131072x4") == [(32768, 16), (131072, 4)]
    for text in ("", "32768", "x4", "32768x0", "-1x2", "32768x4x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="TOKENSxREQUESTS"):
            serving.parse_loads(text)
    speed = serving.Speed.__new__(serving.Speed)
    speed.pool, speed.tokens = 400_000, 256
    speed.alone = {}
    assert speed.needs(131072, 4) == 0
    # As measured on an H100: 4 at once are 64 s of prefill and some of decode.
    speed.alone[131072] = {"dense": {"ttft_s": 10.7, "tpot_ms": 13.6}, "sparse75": {"ttft_s": 5.2, "tpot_ms": 8.9}}
    assert 70 < speed.needs(131072, 4) < 95
    assert speed.needs(131072, 16) > 2.5 * speed.needs(131072, 4)
    assert 16 < speed.needs(32768, 4) < 35
    speed.until, ran = time.perf_counter() + 50, []
    speed.compare = lambda length, count: ran.append((length, count))
    speed.run_loads([(131072, 4), (131072, 2), (32768, 4)])
    assert ran == [(131072, 2), (32768, 4)]


def test_plots_show_what_the_files_hold(tmp_path):
    pytest.importorskip("matplotlib")
    results, out = tmp_path / "results", tmp_path / "figures"
    for i, (program, *more) in enumerate((("end_to_end.py", "--sections", "sweep"), ("head_level.py",))):
        folder = results / str(i)
        run(program, "--tiny", "--device", "cpu", "--out", str(folder), "--commit", "abc", *more)
        figures(folder)
        (path,) = folder.glob("*.json")
        path.rename(results / f"{i}.json")
        folder.rmdir()
    board = {"program": "board", "details": {"routes": {"needle": [1.0, 0.7, 0.1], "summary": [0.0, 0.2, 0.9]}}}
    for name, date in (("board-old", "2026-01-01"), ("board-new", "2026-01-02")):
        (results / f"{name}.json").write_text(json.dumps({**board, "device": "none", "date": date}))
        board["details"]["routes"]["counting"] = [0.5, 0.5, 0.5]
    made = run("plots.py", "--results", str(results), "--out", str(out)).split()
    assert [Path(path).name for path in made] == ["prefill.svg", "decode.svg", "head_level.svg", "routes.svg"]
    drawn = Path(made[-1]).read_text(encoding="utf-8")
    run("plots.py", "--results", str(results), "--out", str(out))
    assert "counting" in drawn and Path(made[-1]).read_text(encoding="utf-8") == drawn
    assert all("<svg" in Path(path).read_text(encoding="utf-8") for path in made)


def test_session_stops_in_time_and_leaves_nothing_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import session

    # A program that never ends, with a child that would write a file after it.
    slow, child, late = (tmp_path / name for name in ("slow.py", "child.py", "late"))
    child.write_text(f"import time; time.sleep(4); open({str(late)!r}, 'w')\n")
    slow.write_text(
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, {str(child)!r}])\ntime.sleep(60)\n"
    )
    (tmp_path / "quick.py").write_text("print('quick', __import__('sys').argv[1:])\n")
    quick = session.Step((str(tmp_path / "quick.py"), "{left}"), least=0.5)
    monkeypatch.setattr(session, "STARTUP", 0.0)
    steps = (quick, session.Step((str(slow),), least=0.5), quick)
    monkeypatch.setattr(session, "PARTS", {"part": steps})
    started = time.monotonic()
    assert session.run("part", 3, []) == 2
    assert time.monotonic() - started < 4
    out = capfd.readouterr().out
    assert "quick ['3']" in out and "stopped after" in out and "not begun" in out
    time.sleep(2.5)
    assert not late.exists()
