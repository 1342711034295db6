"""The simulated server: its records are those of a replay, and its clients measure what it records."""

from __future__ import annotations

import asyncio
import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install -e '.[serve]'")
pytest.importorskip("httpx", reason="the client needs httpx: pip install -e '.[hw]'")

import uvicorn

from hw.client.payload import Payloads
from hw.client.replayer import Answer, Replayer
from hw.client.run import gaps_of, records_of
from hw.client.settings import ClientSettings
from hw.client.target import target_of
from sim.engine.protocol import Request
from sim.errors import ConfigError
from sim.replay.run import build_engine, build_trace, replay_with
from sim.results.records import Records, Status
from sim.serve.filler import WORDS, FillerTokenizer, answer_key, filler_answer
from sim.serve.recording import SERVED, served_trace, write_run
from sim.serve.server import SimulatedServerConfig
from sim.traces.readers.native import read_trace, write_trace
from tests.commands import exit_status
from tests.sim.serve.loopback import RECORDED, Server, built, eventually, serving

FEW_BLOCKS = ("budget=kv_blocks", "budget.blocks=90")
"""Room for about two of the requests below, so that requests wait and are preempted."""


MOVING = [[second, 0.165 if second % 2 else 0.2] for second in range(300)]
"""Shares of the memory; in every other second the dense weights do not fit."""


def rows(count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Return (prompt, output tokens) of some requests; every other prompt begins like the one before."""
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, 32_000, generator.integers(20, 900)).tolist() for _ in range(count)]
    for place in range(1, count, 2):
        prompts[place] = prompts[place - 1] + prompts[place][:100]
    return [(prompt, int(generator.integers(1, 60))) for prompt in prompts]


def send(server: Server, requests: list[tuple[list[int], int]], users: int = 6) -> list[dict[str, Any]]:
    """Send requests, ``users`` at a time, and return the answers."""
    with ThreadPoolExecutor(users) as pool:
        asked = [pool.submit(server.ask, prompt=prompt, max_tokens=output) for prompt, output in requests]
        answers = [one.result() for one in asked]
    server.drained()
    return [answer.json() for answer in answers]


def assert_equal(one: Records, other: Records) -> None:
    assert len(one) == len(other)
    for name in set(Records.__dataclass_fields__) - {"quality_nll"}:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    # The kernel adds the loss of several equal tokens at once, which rounds differently.
    np.testing.assert_allclose(one.quality_nll, other.quality_nll, rtol=1e-12)


@pytest.mark.parametrize(
    "overrides",
    [
        FEW_BLOCKS,
        (*FEW_BLOCKS, "engine=vllm_v0", "engine.preemption=swap", "engine.host_kv_blocks=400"),
        (*FEW_BLOCKS, "engine.prefix_caching=true", "engine.hash_block_tokens=64", "engine.schedules_ahead=true"),
        ("policy=greedy_stop", "budget=steps", f"budget.rows={MOVING}", "tick_s=0.5"),
    ],
    ids=["preemption", "swap", "prefix_cache", "plans"],
)
def test_the_records_are_those_of_a_replay_of_the_same_arrivals(overrides: tuple[str, ...]) -> None:
    generator = np.random.default_rng(1)
    together = generator.integers(0, 32_000, (8, 100)).tolist()  # they fit at first, but not with all their tokens
    again = generator.integers(0, 32_000, 300).tolist()
    with serving(*RECORDED, *overrides) as server:
        answers = [server.ask(prompt=together, max_tokens=200).json(), *send(server, rows(30))]
        answers += [server.ask(prompt=again, max_tokens=5).json() for _ in range(2)]
        server.drained()
        trace, records = served_trace(server.thread.replica), server.thread.replica.records()
        state = server.thread.state
    engine, policy = build_engine(server.cfg)
    replay_with(server.cfg, trace, engine, policy)
    assert_equal(engine.records(), records)
    assert sum(answer["usage"]["completion_tokens"] for answer in answers) == records.produced_tokens.sum()
    assert sum(answer["usage"]["prompt_tokens"] for answer in answers) == records.prompt_tokens.sum()
    if "policy=greedy_stop" in overrides:
        assert len(engine.transitions()) > 0
    else:
        assert state.preemptions > 0
    if "engine.prefix_caching=true" in overrides:
        assert records.cached_tokens[-1] > 0


CACHING = ("engine.prefix_caching=true", "engine.hash_block_tokens=16")


def test_a_chat_finds_the_prompt_and_the_answer_before_it_in_the_prefix_cache(tmp_path: Path) -> None:
    messages, said = [{"role": "system", "content": "Answer in words. " * 30}], []
    with serving(*RECORDED, *CACHING) as server:
        for turn in range(4):
            messages.append({"role": "user", "content": f"Question {turn}: and then?"})
            answer = server.ask("chat/completions", messages=messages, max_tokens=75 + 10 * turn, seed=turn).json()
            usage = answer["usage"]
            said.append(usage["prompt_tokens"] + usage["completion_tokens"])
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        server.ask("chat/completions", messages=[*messages[:2], {"role": "user", "content": "No."}], max_tokens=5)
        server.drained()
        records, trace = server.thread.replica.records(), served_trace(server.thread.replica)
        eventually(lambda: server.metrics()["vllm:request_success_totallength"] == 5, "5 requests have ended")
        found = server.metrics()
    assert found["vllm:prefix_cache_hits_total"] == records.cached_tokens.sum() > 0
    assert found["vllm:prefix_cache_queries_total"] == records.prompt_tokens.sum()
    # The last token of an answer has no KV.
    assert records.cached_tokens.tolist()[:4] == [0, *((tokens - 1) // 16 * 16 for tokens in said[:3])]
    # What does not repeat the answer finds the first prompt without "assistant:", its last tokens.
    assert 0 < records.cached_tokens[4] <= records.prompt_tokens[0] < records.cached_tokens[1]
    write_trace(trace, tmp_path / SERVED)
    engine, policy = build_engine(server.cfg)
    replay_with(server.cfg, read_trace(tmp_path / SERVED), engine, policy)
    assert_equal(engine.records(), records)


def test_an_answer_that_a_stop_string_ends_is_found_as_far_as_it_came() -> None:
    prompt = np.random.default_rng(5).integers(0, 32_000, 200).tolist()
    with serving(*RECORDED, *CACHING) as server:
        words = _words(server, prompt, 2000)
        server.ask(prompt=prompt, max_tokens=1500, stop=[f" {words[60]}"])
        server.drained()
        produced = int(server.thread.replica.records().produced_tokens[0])
        answer = FillerTokenizer(32_000)("".join(f" {word}" for word in words[:produced])).input_ids
        server.ask(prompt=[*prompt, *answer, 7, 7], max_tokens=1)
        server.drained()
        records = server.thread.replica.records()
    assert records.status.tolist() == [Status.REJECTED, Status.FINISHED]
    assert records.cached_tokens[1] == (200 + produced - 1) // 16 * 16 > 208


def _words(server: Server, prompt: list[int], count: int) -> list[str]:
    """Return the words of the answer of a prompt, without asking the server, whose cache would hold them."""
    key = answer_key(prompt, (server.cfg.seed,))
    return [WORDS[token - 1] for token in filler_answer(key, count)]


async def measured(overrides: tuple[str, ...], requests: list[Request]) -> tuple[list[Answer], Records]:
    """Send requests to a server in the same event loop; return what a client saw, and the records of the server."""
    _, api, thread = built(*overrides)
    running = uvicorn.Server(uvicorn.Config(api.app, host="127.0.0.1", port=0, log_level="error"))
    running.install_signal_handlers = lambda: None
    serving_task = asyncio.ensure_future(running._serve())
    while not running.started:
        await asyncio.sleep(0.01)
    settings = ClientSettings(url=f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}")
    target = target_of(settings.url, chat=False, key_variable=None)
    try:
        answers = await Replayer(settings, target, Payloads(settings, "llama2_7b", 32_000)).run(requests)
    finally:
        running.should_exit = True
        await serving_task
        thread.stop()
    return answers, thread.replica.records()


def test_a_client_measures_the_times_that_the_server_records() -> None:
    speed = 3.0
    requests = [
        Request(request_id=i, arrival_s=0.02 * i, prompt_tokens=200 + 37 * i % 600, output_tokens=20 + 7 * i % 120)
        for i in range(24)
    ]
    answers, records = asyncio.run(measured(("serve.records=true", f"serve.speed={speed}", *FEW_BLOCKS), requests))
    seen = records_of(answers)
    assert (seen.status == Status.FINISHED).all()
    # Requests may overtake each other on the way; prompts have lengths of their own.
    order = [int(np.flatnonzero(records.prompt_tokens == prompt)[0]) for prompt in seen.prompt_tokens]
    assert sorted(order) == list(range(len(requests)))
    np.testing.assert_array_equal(seen.produced_tokens, records.produced_tokens[order])
    # No token leaves before its time. How late one comes depends on how busy the machine is; at another speed than the
    # stated one, the sums would be three times as large.
    ttft_s, e2e_s = records.ttft_s[order] / speed, records.e2e_s[order] / speed
    for measured_s, recorded_s in ((seen.ttft_s, ttft_s), (seen.e2e_s, e2e_s)):
        assert (measured_s >= recorded_s).all()
        assert measured_s.sum() < 2 * recorded_s.sum()
    gaps = gaps_of(answers)
    assert gaps.count.sum() == (records.produced_tokens - 1).sum()
    assert (gaps.itl_s * gaps.count).sum() == pytest.approx((seen.finish_s - seen.first_token_s).sum())


def test_metrics_are_those_of_the_records() -> None:
    with serving(*RECORDED, *FEW_BLOCKS) as server:
        send(server, rows(12))
        records = server.thread.replica.records()
        eventually(lambda: server.metrics()["vllm:request_success_totallength"] == 12, "12 requests have ended")
        found = server.metrics()
    assert found["vllm:time_to_first_token_seconds_sum"] == pytest.approx(records.ttft_s.sum())
    assert found["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(records.e2e_s.sum())
    spans = {"prefill": records.ttft_s - (records.admitted_s - records.arrival_s)}
    spans |= {"decode": records.e2e_s - records.ttft_s}
    for name, values in (spans | {"inference": spans["prefill"] + spans["decode"]}).items():
        assert found[f"vllm:request_{name}_time_seconds_sum"] == pytest.approx(values.sum()), name
    assert found["vllm:prefix_cache_queries_total"] == 0  # there is no cache
    assert found["vllm:inter_token_latency_seconds_count"] == (records.produced_tokens - 1).sum()
    assert found["vllm:prompt_tokens_total"] == records.prompt_tokens.sum()
    assert found["vllm:generation_tokens_total"] == records.produced_tokens.sum()
    assert found["vllm:num_preemptions_total"] == records.preemptions.sum()
    assert found["rap:simulated_seconds"] >= records.finish_s.max()
    assert found["rap:largest_lag_seconds"] > 0


# --- One server for what does not depend on its engine ----------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Any:
    with serving("serve.speed=50", "serve.max_waiting=8", "serve.max_tokens=2000", "seed=3") as running:
        yield running


def test_an_answer_has_max_tokens_words_and_the_same_ones_every_time(server: Server) -> None:
    one, other = (server.ask(prompt="The lighthouse", max_tokens=30).json() for _ in range(2))
    assert one["choices"] == other["choices"]
    assert one["choices"][0]["finish_reason"] == "length"
    assert one["usage"] == {"prompt_tokens": 3, "completion_tokens": 30, "total_tokens": 33}
    assert len(one["choices"][0]["text"].split()) == 30
    continued = server.ask(prompt="The lighthouse" + one["choices"][0]["text"], max_tokens=1).json()
    assert continued["usage"]["prompt_tokens"] == 33


def test_sampled_answers_differ_by_their_seed(server: Server) -> None:
    def texts(seed: int) -> list[str]:
        answer = server.ask(prompt="Once", max_tokens=20, temperature=1, n=2, seed=seed).json()
        return [choice["text"] for choice in answer["choices"]]

    assert texts(1) == texts(1)
    assert len({*texts(1), *texts(2)}) == 4


def test_a_stream_has_one_piece_for_each_token_and_the_counts_at_its_end(server: Server) -> None:
    answer = server.ask(
        "chat/completions",
        messages=[{"role": "user", "content": "What is it?"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces = [line for line in answer.text.split("\n\n") if line]
    assert len(pieces) == 12 + 2
    assert pieces[-1] == "data: [DONE]"
    assert '"completion_tokens": 12' in pieces[-2]


def test_without_max_tokens_a_chat_ends_like_an_answer_of_the_trace(server: Server) -> None:
    lengths = set(build_trace(server.cfg).output_tokens.tolist())
    found = []
    for number in range(8):
        answer = server.ask("chat/completions", messages=[{"role": "user", "content": f"Question {number}"}]).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        found.append(answer["usage"]["completion_tokens"])
    assert set(found) <= lengths
    assert len(set(found)) > 1


def test_ignore_eos_and_min_tokens_make_answers_longer(server: Server) -> None:
    longest = server.ask("chat/completions", messages=[{"role": "user", "content": "Go on"}], ignore_eos=True).json()
    assert longest["usage"]["completion_tokens"] == 2000
    assert longest["choices"][0]["finish_reason"] == "length"
    chat = {"messages": [{"role": "user", "content": "Question 1"}]}
    assert server.ask("chat/completions", **chat, min_tokens=1500).json()["usage"]["completion_tokens"] >= 1500


def test_a_stop_string_ends_an_answer_but_not_before_min_tokens(server: Server) -> None:
    words = server.ask(prompt="The lighthouse", max_tokens=30).json()["choices"][0]["text"].split()
    stopped = server.ask(prompt="The lighthouse", max_tokens=30, stop=f" {words[4]}").json()
    assert stopped["choices"][0]["text"].split() == words[: words.index(words[4])]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    later = server.ask(prompt="The lighthouse", max_tokens=30, stop=f" {words[4]}", min_tokens=20).json()
    assert later["usage"]["completion_tokens"] > 20


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": [5] * 4090, "max_tokens": 10}, 400, "exceed the 4096 tokens"),
        ({"prompt": "x", "max_tokens": 2001}, 400, "set it to 1 to 2000"),
        ({"prompt": "x", "max_tokens": 4, "min_tokens": 5}, 400, "set it to 0 to 4"),
        ({"prompt": "x", "min_tokens": "5"}, 400, "min_tokens"),
        ({"prompt": [32_000]}, 400, "token ids from 0 to 31999"),
        ({"prompt": []}, 400, "not be empty"),
        ({"prompt": "x", "model": "gpt"}, 404, "llama2_7b"),
        ({"prompt": "x", "logprobs": 3}, 400, "not supported"),
        ({"prompt": "x", "n": 9}, 400, "serve.max_waiting allows 8"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_to_do(
    server: Server, body: dict[str, Any], status: int, says: str
) -> None:
    answer = server.ask(**body)
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (status, True), answer.text


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"prompt": "x"', b"\xff\xfe", b"[" * 5000, b'{"prompt": NaN}'])
def test_a_body_that_is_no_json_object_is_refused(server: Server, raw: bytes) -> None:
    answer = server.http.post("/v1/completions", content=raw)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


# --- Load and clients that leave ------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_kv_and_the_server_serves_on() -> None:
    with serving("serve.records=true", "serve.speed=2") as server:
        body = {"prompt": [7] * 100, "max_tokens": 4000 - 100, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            pieces = answer.iter_text()  # the response is closed with its iterator
            next(pieces)
            assert server.thread.state.kv_used_layer_blocks > 0
        eventually(
            lambda: server.metrics()["vllm:request_success_totalabort"] == 1, "the engine did not cancel the request"
        )
        eventually(lambda: server.thread.state.kv_used_layer_blocks == 0, "its KV is still held")
        assert server.ask(prompt="x", max_tokens=3).json()["usage"]["completion_tokens"] == 3
        records, trace = server.thread.replica.records(), served_trace(server.thread.replica)
    assert records.status.tolist() == [Status.REJECTED, Status.FINISHED]
    assert 0 < records.produced_tokens[0] < 3900
    assert trace.output_tokens.tolist() == records.produced_tokens.tolist()


@pytest.mark.parametrize(
    "overrides",
    [
        ("policy=limited", "policy.max_waiting=0", "policy.max_running=1"),
        ("serve.max_waiting=1",),
    ],
    ids=["the plan", "the server"],
)
def test_requests_beyond_a_limit_are_refused_with_429(overrides: tuple[str, ...]) -> None:
    with serving("serve.speed=1", *overrides) as server:
        body = {"prompt": [7] * 100, "max_tokens": 3000, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            pieces = answer.iter_text()  # the response is closed with its iterator
            next(pieces)
            refused = server.ask(prompt="x", max_tokens=3)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_plan_that_is_set_runs_from_then_on() -> None:
    with serving("serve.speed=20") as server:
        assert server.http.put("/plan", json={"drop_mha": [25], "weight_bits": 16}).status_code == 202
        eventually(lambda: server.http.get("/plan").json()["ready"], "the plan does not run")
        assert "25" in server.http.get("/plan").json()["runs"]
        assert server.ask(prompt="x", max_tokens=3).status_code == 200


# --- The command ----------------------------------------------------------------------------------------------------


def test_the_run_folder_has_the_requests_as_a_trace(tmp_path: Path) -> None:
    with serving(*RECORDED, *FEW_BLOCKS) as server:
        send(server, rows(6))
        summary = write_run(tmp_path, server.cfg, server.thread.replica)
        trace = served_trace(server.thread.replica)
    assert summary["finished"] == 6
    assert read_trace(tmp_path / SERVED) == trace
    assert {path.name for path in tmp_path.iterdir()} >= {"records.parquet", "summary.json", "config.yaml"}


def test_a_run_without_requests_writes_its_folder(tmp_path: Path) -> None:
    cfg, _, thread = built(*RECORDED)
    thread.stop()
    assert write_run(tmp_path, cfg, thread.replica)["finished"] == 0


@pytest.mark.parametrize("speed", [0.0, -1.0, 1e-320, math.inf, math.nan])
def test_a_speed_that_cannot_be_is_an_error(speed: float) -> None:
    with pytest.raises(ConfigError, match=r"serve\.speed is"):
        SimulatedServerConfig(speed=speed)


def test_a_port_in_use_is_an_error_before_anything_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    from sim.serve.server import main

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        assert exit_status(main, f"serve.port={taken.getsockname()[1]}") == 2
    assert capsys.readouterr().err.startswith("error: cannot listen on port")
