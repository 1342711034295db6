"""Server and client on loopback: OpenAI's requests in, the engine's tokens out, and the records of a replay."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

httpx = pytest.importorskip("httpx", reason="client and server need httpx, starlette, uvicorn: pip install -e '.[hw]'")
uvicorn = pytest.importorskip(
    "uvicorn", reason="client and server need httpx, starlette, uvicorn: pip install -e '.[hw]'"
)

from hw.client.payload import Payloads  # noqa: E402
from hw.client.replayer import Answer, Replayer  # noqa: E402
from hw.client.run import records_of, summary_of  # noqa: E402
from hw.client.settings import ClientSettings  # noqa: E402
from hw.client.target import target_of  # noqa: E402
from hw.engine.clock import RealClock  # noqa: E402
from hw.engine.hw_engine import HwEngine  # noqa: E402
from hw.engine.prompts import RandomPrompts  # noqa: E402
from hw.serve.server import Api, ServerConfig  # noqa: E402
from sim.cost.plan import dense_plan  # noqa: E402
from sim.policies import Fixed  # noqa: E402
from sim.results.metrics import Slo  # noqa: E402
from sim.results.records import Status  # noqa: E402
from sim.serve.engine_thread import EngineThread  # noqa: E402
from sim.serve.prompts import chat_tokens  # noqa: E402
from sim.serve.requests import ApiError, ChatMessage  # noqa: E402
from tests.hw.serve.loopback import EOS, Letters  # noqa: E402
from tests.hw.serving import VOCABULARY, hw_engine, requests, tiny_spec  # noqa: E402


@dataclass
class Server:
    url: str
    thread: EngineThread


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    clock = RealClock("wall")

    def build(thread: EngineThread) -> HwEngine:
        return hw_engine(
            timed=False,
            kv_blocks=40,
            clock=clock,
            ends=thread.ends,
            on_token=thread.on_token,
            own_prompts=thread.prompt,
        )

    thread = EngineThread(build, Fixed(dense_plan(tiny_spec())), clock, eos=EOS, tick_s=1.0)
    api = Api(thread, tiny_spec(), Letters(), ServerConfig(max_tokens=60, max_body_bytes=20_000))
    running = uvicorn.Server(uvicorn.Config(api.app, host="127.0.0.1", port=0, log_level="error"))
    listener = threading.Thread(target=running.run, daemon=True)
    listener.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield Server(f"http://127.0.0.1:{port}", thread)
    running.should_exit = True
    listener.join(timeout=10)
    thread.stop()


def alone(prompt: list[int], output: int) -> list[int]:
    """Return the tokens that the engine produces for one prompt without other requests."""
    engine = hw_engine(own_prompts=lambda *_: prompt)
    engine.submit(requests([(0.0, len(prompt), output)]))
    engine.run_until(float("inf"))
    return engine.tokens(0)


def ask(server: Server, path: str = "completions", **body: Any) -> Any:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=30)


def stream(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    """Return the events of a streamed answer, with usage."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{server.url}/v1/{path}", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def letters(text: str) -> list[int]:
    return list(Letters()(text).input_ids)


def test_a_completion_is_what_the_engine_produces_with_its_usage(server: Server) -> None:
    prompt = [5, 9, 20, 33]
    answer = ask(server, prompt=prompt, max_tokens=9, ignore_eos=True).json()
    assert answer["choices"][0]["text"] == Letters().decode(alone(prompt, 9))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}


def test_a_streamed_completion_comes_token_by_token_and_adds_up_to_the_same_text(server: Server) -> None:
    body = {"prompt": "hello there", "max_tokens": 7, "ignore_eos": True}
    complete = ask(server, **body).json()["choices"][0]["text"]
    events = stream(server, "completions", body)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == complete
    assert len(events) == 7 + 1
    assert events[-1]["usage"]["completion_tokens"] == 7


def test_a_chat_without_a_template_is_answered_as_its_plain_join(server: Server) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    answer = ask(server, "chat/completions", messages=messages, max_tokens=6, ignore_eos=True).json()
    prompt = letters("system: be brief\nuser: hi\nassistant:")
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": Letters().decode(alone(prompt, 6))}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["chat"] == "plain join of roles"


def test_a_streamed_chat_comes_in_deltas_that_add_up_to_the_same_text(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 5, "ignore_eos": True}
    complete = ask(server, "chat/completions", **body).json()["choices"][0]["message"]["content"]
    *events, usage = stream(server, "chat/completions", body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert [delta.get("role") for delta in deltas] == ["assistant", None, None, None, None]
    assert "".join(delta["content"] for delta in deltas) == complete
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5


def test_a_chat_without_a_limit_may_have_what_fits(server: Server) -> None:
    answer = ask(server, "chat/completions", messages=[{"role": "user", "content": "a" * 110}], ignore_eos=True).json()
    used = answer["usage"]
    assert used["total_tokens"] == min(used["prompt_tokens"] + 60, server.thread.engine.context_limit)


def template_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["?", "<user>", "<assistant>", "hi", "there"])}
    by_word = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_word, unk_token="?")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def test_a_chat_is_formatted_by_the_template_of_the_tokenizer_if_there_is_one() -> None:
    tokenizer = template_tokenizer()
    assert chat_tokens(tokenizer, [ChatMessage(role="user", content="hi there")]) == [1, 3, 4, 2]
    with pytest.raises(ApiError, match="no system here"):
        chat_tokens(tokenizer, [ChatMessage(role="system", content="hi")])


def test_an_answer_ends_at_the_end_of_text_unless_it_is_ignored(server: Server) -> None:
    for seed in range(200):
        prompt = list(RandomPrompts(VOCABULARY, seed)(0, 6))
        tokens = alone(prompt, 40)
        if EOS in tokens[:-1]:
            break
    else:
        pytest.fail("no prompt led the tiny model to its end of text")
    answer = ask(server, prompt=prompt, max_tokens=40).json()
    assert answer["usage"]["completion_tokens"] == tokens.index(EOS) + 1
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        ({"prompt": "a", "temperature": 2.5}, 400, "temperature"),
        ({"prompt": "a", "top_p": -0.5}, 400, "top_p"),
        ({"prompt": "a", "n": 0}, 400, "n"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 61}, 400, "max_tokens"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1, 97]}, 400, "prompt"),
        ({"prompt": ["a", ""]}, 400, "prompt"),
        ({"prompt": "a" * 150, "max_tokens": 20}, 400, "prompt"),
        ({"prompt": "a", "model": "gpt"}, 404, "model"),
        ({"prompt": "a" * 30_000}, 413, None),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, 400, "tools"),
        ({"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 61}, 400, "max_completion_tokens"),
        ({"prompt": "a", "max_tokens": 2.5}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
        ({"prompt": {"text": "a"}}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": "a", "model": 3}, 404, "model"),
        ({"prompt": "a", "stream_options": []}, 400, "stream_options"),
        ({"prompt": "a", "stop": ["b", ""]}, 400, "stop"),
        ({"prompt": "a", "presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"prompt": "a", "logprobs": 0}, 400, "logprobs"),
        ({"prompt": "a", "echo": True}, 400, "echo"),
        ({"max_tokens": 3}, 400, "prompt"),
        ({"messages": [3]}, 400, "messages"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_shape(
    server: Server, body: dict[str, Any], status: int, names: str | None
) -> None:
    response = ask(server, "chat/completions" if "messages" in body else "completions", **body)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == names
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0; set it to 1 to 60"),
        ({"prompt": "a", "n": 0}, "n is 0; set it to 1 to 128"),
        ({"prompt": "a", "echo": True}, "echo=True is not supported; leave it out"),
        (
            {"prompt": "a", "temprature": 1},
            "there is no field 'temprature'; did you mean 'temperature'? Otherwise leave it out",
        ),
        ({"prompt": "a", "guided_json": {}}, "there is no field 'guided_json'; leave it out"),
        ({"prompt": "a", "model": "gpt"}, "model 'gpt' is not served; set model to 'tiny', or leave it out"),
        (
            {"prompt": "a", "max_tokens": "3"},
            "max_tokens is '3'; it should be a valid integer; change it or leave it out",
        ),
        ({}, "prompt is missing; add it"),
        (
            {"messages": [{"role": "user", "content": [3]}]},
            'content is [3]; set it to a text, or to a list of {"type": "text", "text": ...}',
        ),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages[0].role is 'tool'; it should be 'system', 'user' or 'assistant'; change it or leave it out",
        ),
    ],
)
def test_a_refusal_is_one_sentence_with_the_value_what_is_allowed_and_the_next_move(
    server: Server, body: dict[str, Any], message: str
) -> None:
    response = ask(server, "chat/completions" if "messages" in body else "completions", **body)
    assert response.json()["error"]["message"] == message


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b'"a"', b"null", b"\xff\xfe", b'{"prompt": "\\ud800"}'])
@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions"])
def test_a_body_that_is_no_request_is_refused_and_the_engine_serves_on(server: Server, path: str, raw: bytes) -> None:
    response = httpx.post(f"{server.url}/{path}", content=raw, timeout=30)
    assert response.status_code == 400
    assert response.json()["error"]["message"]
    assert ask(server, prompt=[1], max_tokens=1).status_code == 200


def test_models_and_metrics_report_what_is_served_and_how(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny"
    before = metrics(server)
    ask(server, prompt=[1, 2, 3], max_tokens=5, ignore_eos=True)
    time.sleep(0.1)
    after = metrics(server)
    tokens, ended = 'vllm:generation_tokens_total{engine="0",model_name="tiny"}', "vllm:request_success_total"
    assert after[tokens] - before[tokens] == 5
    finished = f'{ended}{{engine="0",finished_reason="length",model_name="tiny"}}'
    assert after[finished] - before[finished] == 1
    assert after['rap:kv_used_layer_blocks{engine="0",model_name="tiny"}'] == 0


def test_metrics_are_typed_and_explained_and_two_apps_do_not_share_them(server: Server) -> None:
    response = httpx.get(f"{server.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    types = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    explained = {line.split()[2] for line in lines if line.startswith("# HELP") and len(line.split()) > 3}
    assert types["vllm:num_requests_waiting"] == "gauge"
    assert types["vllm:generation_tokens_total"] == "counter"
    assert types["vllm:time_to_first_token_seconds"] == "histogram"
    assert explained == set(types)
    names = {name.partition("{")[0] for name in metrics(server)}
    assert {"vllm:time_to_first_token_seconds_sum", "rap:out_of_memory_total", "rap:plan_info"} <= names
    Api(server.thread, tiny_spec(), Letters(), ServerConfig())  # a second app in this process registers without a clash


def metrics(server: Server) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_the_plan_can_be_read_and_set_while_the_model_serves(server: Server) -> None:
    assert httpx.get(f"{server.url}/plan").json()["runs"] == "dense"
    dense_bytes = metrics(server)['rap:weight_bytes{engine="0",model_name="tiny"}']
    assert httpx.put(f"{server.url}/plan", json={"drop_mha": [1], "weight_bits": 8}).status_code == 202
    for _ in range(100):
        if (
            httpx.get(f"{server.url}/plan").json()["ready"]
            and metrics(server)['rap:weight_bytes{engine="0",model_name="tiny"}'] < dense_bytes
        ):
            break
        ask(server, prompt=[1], max_tokens=2)
    assert httpx.get(f"{server.url}/plan").json()["runs"] == "-MHA 1; W8 0-3"
    refused = httpx.put(f"{server.url}/plan", json={"drop_mha": [9]})
    assert refused.status_code == 400
    assert "MHA9" in refused.json()["error"]["message"]
    httpx.put(f"{server.url}/plan", json={})
    for _ in range(100):  # the next test compares plans: no copy may still be under way
        plan = httpx.get(f"{server.url}/plan").json()
        if plan["runs"] == "dense" and plan["ready"]:
            return
        ask(server, prompt=[1], max_tokens=2)
    raise AssertionError(f"the dense plan never came back: {plan}")


@pytest.mark.parametrize(
    "raw", ["", "[]", '{"drop_mha": 5}', '{"weight_bits": "8"}', '{"drop": 1}', '{"drop_ffn": ["x"]}']
)
def test_what_is_no_plan_is_refused_and_changes_nothing(server: Server, raw: str) -> None:
    before = httpx.get(f"{server.url}/plan").json()
    response = httpx.put(f"{server.url}/plan", content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["message"]
    assert httpx.get(f"{server.url}/plan").json() == before


def test_a_client_that_goes_away_frees_its_place(server: Server) -> None:
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json={"prompt": [1], "max_tokens": 60, "stream": True, "ignore_eos": True},
    ) as response:
        next(response.iter_lines())
    for _ in range(200):
        if server.thread.state.running == 0:
            break
        time.sleep(0.02)
    assert server.thread.state.running == 0


def answers_of(settings: ClientSettings, rows: list[tuple[float, int, int]]) -> list[Answer]:
    target = target_of(settings.url, chat=settings.chat, key_variable=None)
    return asyncio.run(Replayer(settings, target, Payloads(settings, "tiny", VOCABULARY)).run(requests(rows)))


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_a_trace_replayed_against_the_server_gives_records_with_real_token_counts(server: Server, loop: str) -> None:
    rows = [(0.02 * i, 5 + i % 7, 1 + i % 9) for i in range(20)]
    settings = ClientSettings(url=server.url, loop=loop, users=3, max_connections=5, timeout_s=30)
    answers = answers_of(settings, rows)
    records = records_of(answers)
    assert sorted(a.request.request_id for a in answers) == list(range(20))
    assert (records.status == Status.FINISHED).all()
    assert (records.produced_tokens == records.output_tokens).all()
    assert records.prompt_tokens.tolist() == [row[1] for row in rows]
    assert (records.ttft_s > 0).all()
    assert np.nanmin(records.tpot_s) >= 0
    summary = summary_of(answers, Slo())
    assert summary["finished"] == 20
    assert summary["makespan_s"] > 0


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_a_trace_replayed_as_chats_gives_records_with_the_tokens_of_the_template_counted(
    server: Server, tmp_path: Path, loop: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse keeper counts the ships that pass in the night. " * 20)
    rows = [(0.02 * i, 3 + i % 5, 1 + i % 9) for i in range(12)]
    settings = ClientSettings(url=server.url, loop=loop, users=3, timeout_s=30, chat=True, text=str(text))
    answers = answers_of(settings, rows)
    records = records_of(answers)
    assert (records.status == Status.FINISHED).all()
    assert (records.produced_tokens == records.output_tokens).all()
    around = len("user: \nassistant:")
    for answer in answers:
        assert answer.timeline is not None
        assert answer.timeline.prompt_tokens == 4 * answer.request.prompt_tokens + around  # a letter is a token here
        assert answer.timeline.piece_tokens == (1,) * answer.request.output_tokens
    assert (records.ttft_s > 0).all()


def test_a_refused_request_is_counted_and_only_sent_again_with_retries(server: Server) -> None:
    rows = [(0.0, 5, 3), (0.0, 5, 500)]
    answers = answers_of(ClientSettings(url=server.url), rows)
    assert records_of(answers).status.tolist() == [Status.FINISHED, Status.REJECTED]
    assert answers[1].error is not None
    assert "HTTP 400" in answers[1].error
    assert answers[1].retries == 0
    again = ClientSettings(url=server.url, retries=2)
    assert answers_of(again, rows)[1].retries == 2


def test_the_command_writes_the_files_of_a_replay(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.core.global_hydra import GlobalHydra

    import hw.client.run

    GlobalHydra.instance().clear()
    overrides = ["trace=small", "trace.duration_s=2", "trace.on_rate_rps=8", "trace.off_rate_rps=8"]
    overrides += ["trace.lengths.max_prompt_tokens=30", "trace.lengths.max_output_tokens=8", "model.vocab_size=97"]
    overrides += [f"client.url={server.url}", "client.served_model=tiny", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["hw.client", *overrides])
    hw.client.run.main()
    records = pd.read_parquet(tmp_path / "records.parquet")
    assert (records.status == "finished").all()
    assert json.loads((tmp_path / "client.json").read_text())["failed"] == 0
    assert {"summary.json", "transitions.parquet", "provenance.json"} <= {path.name for path in tmp_path.iterdir()}
