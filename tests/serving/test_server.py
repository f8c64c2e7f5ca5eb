"""`flux-attn serve` as a user meets it: another process, spoken to with the openai package."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.harness import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LONG = "The quick brown fox jumps over the lazy dog near the river bank. " * 60
MODEL = "smollm2"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-m", "flux_attention", "serve", MODEL, "--adapter", "smollm2-135m-instruct"]
    further = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--dtype", "float32"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *further, "--enforce-eager", "--kv-bundle", "5"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server did not come up: {log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def client(address):
    from openai import OpenAI

    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def flux(response):
    return response.model_extra["kv_transfer_params"]["flux"]


def xargs(**options):
    return {"vllm_xargs": {"flux_report": 1, **options}}


def test_chat_is_routed(client):
    messages = [{"role": "user", "content": LONG + "Which animal jumps?"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0, extra_body=xargs()
    )
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 640
    assert 0 < flux(answer)["sparsity"] <= 1
    quiet = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
    assert quiet.choices[0].message.content == answer.choices[0].message.content
    assert not quiet.model_extra.get("kv_transfer_params")


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"flux_max_sparsity": 0.3}, 0.0, 0.3),
        ({"flux_min_sparsity": 0.9}, 0.9, 1.0),
        ({"flux_policy": "dense"}, 0.0, 0.0),
        ({"flux_policy": "static:0,1,2"}, 0.1, 0.1),
        ({"flux_policy": "sparse"}, 1.0, 1.0),
    ],
)
def test_completions_with_a_dial(client, options, low, high):
    answer = client.completions.create(
        model=MODEL, prompt=LONG, max_tokens=4, temperature=0, extra_body=xargs(**options)
    )
    found = flux(answer)
    assert low - 1e-6 <= found["sparsity"] <= high + 1e-6
    assert len(found["sparse_layers"]) == round(found["sparsity"] * 30)
    assert (found["kv_saved"] > 0) == (found["sparsity"] == 1.0 or found["kv_blocks"] < found["kv_blocks_dense"])


def test_short_prompts_run_dense(client):
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=2, extra_body=xargs())
    assert flux(answer)["sparsity"] == 0


def test_streaming(client):
    options = {"model": MODEL, "prompt": LONG, "max_tokens": 12, "temperature": 0}
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert len(pieces) > 3
    assert "".join(pieces) == client.completions.create(**options).choices[0].text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flux_max_sparsity": 1.5}, "max_sparsity must be a number in"),
        ({"flux_min_sparsity": 0.9, "flux_max_sparsity": 0.1}, "above max_sparsity"),
        ({"flux_min_sparsity": "half"}, "flux_min_sparsity must be a number"),
        ({"flux_policy": "static:99"}, "routable layers are 0 … 29"),
        ({"flux_policy": "magic"}, "unknown policy"),
        ({"flux_policy": "dense", "flux_min_sparsity": 0.5}, "fixes the route"),
        ({"flux_sparsity": 0.5}, "unknown option flux_sparsity"),
        ({"flux_route": [0]}, "set by the engine"),
    ],
)
def test_bad_options_are_the_callers_fault(client, options, message):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=message):
        client.completions.create(model=MODEL, prompt=LONG, max_tokens=2, extra_body=xargs(**options))
    assert client.completions.create(model=MODEL, prompt="Hi", max_tokens=1).choices


def test_a_prompt_over_the_limit_is_refused(client):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="maximum context length"):
        client.completions.create(model=MODEL, prompt=LONG * 5, max_tokens=2)
    assert client.completions.create(model=MODEL, prompt="Hi", max_tokens=1).choices


def test_metrics_tell_routes_and_savings(client, address):
    client.completions.create(model=MODEL, prompt=LONG, max_tokens=2, extra_body=xargs(flux_policy="sparse"))
    text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("vllm:flux")]
    values = {name: float(value) for name, value in lines}
    assert values[f'vllm:flux_requests_total{{model_name="{MODEL}",route="sparse"}}'] >= 1
    held = values[f'vllm:flux_kv_blocks_held_total{{model_name="{MODEL}"}}']
    assert 0 < held < values[f'vllm:flux_kv_blocks_dense_total{{model_name="{MODEL}"}}']
    assert values[f'vllm:flux_sparsity_count{{model_name="{MODEL}"}}'] >= 1
