"""The client and this project's server: what one records agrees with what the other measures."""

from __future__ import annotations

import asyncio
import re

import pytest

pytest.importorskip("httpx", reason="client and server need httpx, starlette, uvicorn: pip install -e '.[hw]'")
pytest.importorskip("uvicorn", reason="client and server need httpx, starlette, uvicorn: pip install -e '.[hw]'")

from hw.client.payload import Payloads
from hw.client.replayer import Replayer
from hw.client.run import client_figures, gaps_of, records_of
from hw.client.settings import ClientSettings
from hw.client.target import target_of
from hw.serve.server import ServerConfig
from sim.results.records import Status
from tests.hw.serve.loopback import eventually, serving
from tests.hw.serving import VOCABULARY, requests


def metrics(text: str) -> dict[str, float]:
    """Return metrics by name, with the reason of an end appended."""
    sample = r'^(\w+:\w+)\{engine="0",(?:finished_reason="(\w+)",)?model_name="\w+"\} (\S+)$'
    found = re.findall(sample, text, flags=re.MULTILINE)
    return {name + reason: float(value) for name, reason, value in found}


@pytest.mark.parametrize("token", [None, "sk-right"])
def test_counts_are_equal_and_the_client_sees_no_token_before_the_server(
    token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(0.02 * i, 5 + i % 7, 1 + i % 9) for i in range(30)]
    key = None
    if token is not None:
        monkeypatch.setenv("SERVER_KEY", token)
        key = "SERVER_KEY"
    with serving(config=ServerConfig(max_tokens=60, token=token)) as server:
        settings = ClientSettings(url=server.url, api_key=key, timeout_s=120)
        target = target_of(settings.url, chat=False, key_variable=key)
        answers = asyncio.run(Replayer(settings, target, Payloads(settings, "tiny", VOCABULARY)).run(requests(rows)))
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}

        def seen() -> dict[str, float]:
            return metrics(server.http.get("/metrics", headers=headers).text)

        eventually(lambda: seen()["vllm:request_success_totallength"] == 30, "not every request has ended")
        produced = sum(row[2] for row in rows)
        eventually(lambda: seen()["vllm:generation_tokens_total"] == produced, "the state of the last iteration is due")
        measured = seen()
    assert [a.error for a in answers] == [None] * 30
    records = records_of(answers)
    assert (records.status == Status.FINISHED).all()
    assert measured["vllm:prompt_tokens_total"] == records.prompt_tokens.sum() == sum(row[1] for row in rows)
    assert measured["vllm:generation_tokens_total"] == records.produced_tokens.sum() == sum(row[2] for row in rows)
    assert measured["vllm:inter_token_latency_seconds_count"] == gaps_of(answers).count.sum()
    assert client_figures(answers)["itl"] == "per token"
    # The server's clock starts when a request has arrived there, and stops before its token has left.
    assert records.ttft_s.sum() >= measured["vllm:time_to_first_token_seconds_sum"] > 0
    assert records.e2e_s.sum() >= measured["vllm:e2e_request_latency_seconds_sum"] > 0
