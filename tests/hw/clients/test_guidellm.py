"""guidellm against both servers: its figures agree with the server's, and its result is a trace."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("guidellm", reason="the real clients are installed by `make clients`")

import httpx

from hw.elastic.checkpoint import smollm2_folder, smollm2_package
from sim.config import build_option

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(smollm2_package() is None, reason="needs the small model: make test installs it"),
]

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 10, 20, 8
SECONDS = 30
FACTOR = 3.0
"""Client and server share a machine with other work, so their figures only have the same order."""
WAIT_S = 600


@pytest.fixture(scope="module", params=["hw.serve", "sim.serve"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve the default model from a process of its own, as a user does."""
    command = [sys.executable, "-m", request.param, "serve.port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    greeting = process.stdout.readline()
    found = re.search(r"http://[^\s;]+", greeting)
    try:
        assert found is not None, greeting
        yield found.group()
    finally:
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def result(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run guidellm once; return its result file."""
    file = tmp_path_factory.mktemp("guidellm") / "result.json"
    options = {
        "--backend": [f"kind=openai_http,target={url}"],
        "--profile": ["kind=constant,rate=2"],
        "--constraint": [f"kind=max_requests,count={REQUESTS}", f"kind=max_duration,seconds={SECONDS}"],
        "--tokenizer": [f"kind=huggingface_auto,model={smollm2_folder()}"],
        "--data": [f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"],
        "--output": [f"kind=json,path={file}"],
    }
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
    for name, values in options.items():
        for value in values:
            command += [name, value]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    subprocess.run(command, check=True, timeout=WAIT_S, env=offline)
    return file


def metric(url: str, name: str) -> float:
    """Return the value of a metric without a bucket."""
    text = httpx.get(f"{url}/metrics").text
    found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


def test_every_request_finishes_with_the_tokens_that_were_requested(result: Path, url: str) -> None:
    (benchmark,) = json.loads(result.read_text())["benchmarks"]
    done = benchmark["requests"]["successful"]
    assert not benchmark["requests"]["errored"]
    assert done
    assert {request["output_tokens"] for request in done} == {OUTPUT_TOKENS}
    if len(done) == REQUESTS:  # a slow machine may meet the limit of seconds first
        assert metric(url, "vllm:generation_tokens_total") == REQUESTS * OUTPUT_TOKENS


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("time_to_first_token_ms", "vllm:time_to_first_token_seconds"),
        ("inter_token_latency_ms", "vllm:request_time_per_output_token_seconds"),
    ],
)
def test_the_latencies_of_guidellm_are_those_of_the_server(result: Path, url: str, theirs: str, ours: str) -> None:
    (benchmark,) = json.loads(result.read_text())["benchmarks"]
    client_s = benchmark["metrics"][theirs]["successful"]["mean"] / 1e3
    server_s = metric(url, f"{ours}_sum") / metric(url, f"{ours}_count")
    assert server_s / FACTOR < client_s < FACTOR * server_s + 0.1


def test_the_result_is_read_back_as_a_trace(result: Path) -> None:
    trace: Any = build_option("trace", "file", {"path": str(result)})
    (benchmark,) = json.loads(result.read_text())["benchmarks"]
    done = sorted(benchmark["requests"]["successful"], key=lambda request: request["request_start_time"])
    assert trace.output_tokens.tolist() == [request["output_tokens"] for request in done]
    assert trace.prompt_tokens.tolist() == [request["prompt_tokens"] for request in done]
    assert trace.arrival_s[0] == 0.0
