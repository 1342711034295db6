"""What the server answers: several choices, sampling, stop strings, token counts, and the rest of OpenAI's API."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx and uvicorn: pip install -e '.[hw]'")
pytest.importorskip("uvicorn", reason="the server needs starlette and uvicorn: pip install -e '.[hw]'")

from hw.serve.server import ServerConfig  # noqa: E402
from tests.hw.serve.loopback import Letters, Server, alone, eventually, serving  # noqa: E402

PROMPT = [5, 9, 20, 33]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(config=ServerConfig(max_tokens=60, max_choices=10)) as running:
        yield running


def texts(server: Server, **body: Any) -> list[str]:
    """Return the texts of the choices, after a check that a stream adds up to the same."""
    body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, **body}
    answer = server.ask(**body)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    streamed, reasons, usage = stream(server, body)
    assert streamed == [choice["text"] for choice in choices]
    assert reasons == [choice["finish_reason"] for choice in choices]
    assert usage == answer.json()["usage"]
    return streamed


def stream(server: Server, body: dict[str, Any]) -> tuple[list[str], list[str | None], dict[str, int]]:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    sent: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    *pieces, usage = map(json.loads, lines[:-1])
    for piece in pieces:
        (choice,) = piece["choices"]
        assert reasons.get(choice["index"]) is None, "nothing follows the last piece of a choice"
        assert piece["usage"] is None
        sent[choice["index"]] = sent.get(choice["index"], "") + choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    indices = sorted(sent)
    return [sent[i] for i in indices], [reasons[i] for i in indices], usage["usage"]


def greedy(prompt: list[int], tokens: int = 12) -> str:
    return Letters().decode(alone(prompt, tokens))


def test_several_prompts_are_several_choices_in_their_order(server: Server) -> None:
    prompts = [[1, 2, 3], [40, 41], [7]]
    assert texts(server, prompt=prompts) == [greedy(prompt) for prompt in prompts]
    assert texts(server, prompt=["ab", "c"]) == [greedy(Letters()(text).input_ids) for text in ("ab", "c")]
    usage = server.ask(prompt=prompts, n=2, max_tokens=3, ignore_eos=True).json()["usage"]
    assert usage == {"prompt_tokens": 6, "completion_tokens": 18, "total_tokens": 24}


def test_n_answers_of_a_prompt_follow_each_other(server: Server) -> None:
    first, second = [1, 2, 3], [40, 41]
    assert texts(server, prompt=[first, second], n=2) == [greedy(first)] * 2 + [greedy(second)] * 2
    assert len(set(texts(server, n=5, temperature=1.5, seed=1))) == 5


def test_more_answers_than_allowed_are_refused(server: Server) -> None:
    for body in ({"n": 11}, {"prompt": ["a"] * 11}, {"prompt": ["a"] * 6, "n": 2}):
        assert server.ask(**{"prompt": "a", **body}).status_code == 400


@pytest.mark.parametrize("sampled", [{"temperature": 0}, {"temperature": 0.0, "top_p": 0.5, "seed": 3}, {"seed": 4}])
def test_temperature_zero_is_greedy(server: Server, sampled: dict[str, Any]) -> None:
    assert texts(server, **sampled) == [greedy(PROMPT)]


def test_a_seed_fixes_what_is_sampled_whatever_else_runs(server: Server) -> None:
    sampled = {"temperature": 1.2, "top_p": 0.9, "seed": 11}
    (first,) = texts(server, **sampled)
    assert texts(server, prompt=[[1, 2], PROMPT, [3]], **sampled)[1] == first
    assert first != greedy(PROMPT)
    assert texts(server, **{**sampled, "seed": -(2**63)}) != [first]
    bodies = [{"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "temperature": 2.0} for _ in range(6)]
    assert len({server.ask(**body).json()["choices"][0]["text"] for body in bodies}) == 6


def test_top_p_alone_samples_from_the_likeliest(server: Server) -> None:
    assert texts(server, top_p=1e-9, seed=1) == [greedy(PROMPT)]
    assert texts(server, top_p=0.99, seed=1) != [greedy(PROMPT)]


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_before_a_stop_string_and_its_request_with_it(server: Server, several: bool) -> None:
    tokens = alone(PROMPT, 40)
    text = Letters().decode(tokens)
    stop = text[5:8]
    at = text.find(stop)
    body = {"max_tokens": 40, "stop": [stop, "never"] if several else stop}
    assert texts(server, **body) == [text[:at]]
    answer = server.ask(prompt=PROMPT, ignore_eos=True, **body).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == at + 3
    eventually(lambda: server.thread.state.kv_used_layer_blocks == 0, "the stopped request goes on")


def test_a_stop_string_that_does_not_come_changes_nothing(server: Server) -> None:
    assert texts(server, stop=greedy(PROMPT)[-1] + "!") == [greedy(PROMPT)]


@pytest.mark.parametrize(
    "nothing",
    [
        {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "stop": None, "logit_bias": {}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "stream": None, "stream_options": None, "seed": None},
        {"temperature": None, "top_p": None, "max_completion_tokens": None, "model": None, "never_heard_of": None},
        {"model": "tiny", "n": None, "stream_options": {"include_usage": None}, "stop": []},
    ],
)
def test_null_and_values_that_request_nothing_change_nothing(server: Server, nothing: dict[str, Any]) -> None:
    answer = server.ask(prompt=PROMPT, max_tokens=12, ignore_eos=True, **nothing).json()
    assert answer["choices"][0]["text"] == greedy(PROMPT)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({"max_tokens": 3, "max_completion_tokens": None}, 3),
        ({"max_tokens": None, "max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
        ({"max_completion_tokens": 5}, 5),
    ],
)
def test_the_newer_name_of_max_tokens_counts_where_it_has_a_value(
    server: Server, path: str, limits: dict[str, Any], tokens: int
) -> None:
    body = {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    answer = server.ask(path, ignore_eos=True, **body, **limits).json()
    assert answer["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize(
    "refused",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -1},
        {"repetition_penalty": 1.1},
        {"top_k": 5},
        {"min_p": 0.1},
        {"logit_bias": {"5": 1}},
        {"logprobs": 1},
        {"logprobs": True},
        {"echo": True},
        {"echo": 0},
        {"best_of": 2},
        {"best_of": True},
        {"suffix": "x"},
        {"min_tokens": 3},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]},
        {"temperature": 2.1},
        {"temperature": -0.1},
        {"temperature": True},
        {"top_p": 1.1},
        {"seed": 1.5},
        {"seed": 2**63},
        {"n": True},
        {"n": 1.0},
        {"stop": ""},
        {"stop": 3},
        {"stop": [["a"]]},
        {"stop": ["a"] * 17},
        {"stop": "x" * 1001},
        {"guided_json": {}},
        {"stream_options": {"include_usage": True, "other": 1}},
        {"never_heard_of": 0},
    ],
    ids=repr,
)
def test_what_would_be_ignored_is_refused_by_its_name(server: Server, refused: dict[str, Any]) -> None:
    answer = server.ask(prompt=PROMPT, max_tokens=2, **refused)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(refused))


def test_a_chat_may_use_the_newer_name_of_its_system_role(server: Server) -> None:
    def answered(role: str) -> Any:
        messages = [{"role": role, "content": "be brief", "name": "me"}, {"role": "user", "content": "hi"}]
        return server.ask("chat/completions", messages=messages, max_tokens=5, ignore_eos=True).json()["choices"]

    assert answered("developer") == answered("system")


def test_a_stream_may_have_the_counts_with_every_piece(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, "stream": True, "stream_options": options}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = [
            json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: {")
        ]
    assert [piece["usage"]["completion_tokens"] for piece in lines] == [1, 2, 3, 4, 4]


def until_it_runs(server: Server, plan: str) -> None:
    """Wait until a plan that was accepted runs, which begins between two iterations of the engine."""
    deadline_s = time.monotonic() + 30.0
    while server.http.get("/plan").json()["runs"] != plan:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_request_that_the_plan_does_not_admit_is_refused_with_its_status_streamed_or_not(server: Server) -> None:
    assert server.http.put("/plan", json={"max_waiting": 0}).status_code == 202
    try:
        until_it_runs(server, "max_waiting 0")
        for streamed in (False, True):
            answer = server.ask(prompt=PROMPT, max_tokens=2, stream=streamed)
            assert answer.status_code == 429
            assert answer.json()["error"]["type"] == "rate_limit_error"
    finally:
        assert server.http.put("/plan", json={}).status_code == 202


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/plan", 405),
        ("POST", "/health", 405),
    ],
)
def test_unknown_paths_and_methods_are_refused_in_openais_shape(
    server: Server, method: str, path: str, status: int
) -> None:
    answer = server.http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        allowed = "POST" if path.endswith("completions") else "GET"
        assert allowed in answer.json()["error"]["message"].partition("; use ")[2]


def test_the_served_model_can_be_looked_up(server: Server) -> None:
    (listed,) = server.http.get("/v1/models").json()["data"]
    assert server.http.get("/v1/models/tiny").json() == listed
    assert listed["max_model_len"] == server.thread.engine.context_limit


def counted(server: Server) -> dict[str, float]:
    lines = [line for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_count_every_token_and_every_end_once() -> None:
    with serving() as server:
        text = greedy(PROMPT)
        server.ask(prompt=PROMPT, max_tokens=12, ignore_eos=True)
        server.ask(prompt=PROMPT, max_tokens=12, ignore_eos=True, stop=text[3])
        server.http.put("/plan", json={"max_waiting": 0})  # accepted, and in force with the next iteration
        eventually(lambda: server.thread.state.plan.max_waiting == 0, "the plan is not in force")
        server.ask(prompt=PROMPT, max_tokens=12)
        eventually(lambda: server.thread.state.arrived == 3, "the state is behind")
        found = counted(server)
        ended = {
            reason: found[f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name="tiny"}}']
            for reason in ("stop", "length", "abort", "error")
        }
        # A stop string is found next to the engine, which may have produced the longest answer by then.
        assert ended.pop("stop") + ended.pop("length") == 2
        assert ended == {"abort": 0, "error": 1}
        tokens = found['vllm:generation_tokens_total{engine="0",model_name="tiny"}']
        for name, count in (
            ("time_to_first_token", 2),
            ("request_queue_time", 2),
            ("inter_token_latency", tokens - 2),
            ("time_per_output_token", tokens - 2),
            ("e2e_request_latency", 2),
            ("request_time_per_output_token", 2),
        ):
            assert found[f'vllm:{name}_seconds_count{{engine="0",model_name="tiny"}}'] == count, name
        e2e_s = found['vllm:e2e_request_latency_seconds_sum{engine="0",model_name="tiny"}']
        parts_s = [
            found[f'vllm:{n}_seconds_sum{{engine="0",model_name="tiny"}}']
            for n in ("time_to_first_token", "inter_token_latency")
        ]
        assert e2e_s >= sum(parts_s) * 0.999
        # As in vLLM, the prompt tokens of the request that was refused do not count.
        assert found['vllm:prompt_tokens_total{engine="0",model_name="tiny"}'] == 8
        assert found['vllm:kv_cache_usage_perc{engine="0",model_name="tiny"}'] == 0
        assert found['vllm:num_requests_running{engine="0",model_name="tiny"}'] == 0
        assert any(name.startswith("rap:plan_info{") and 'runs="max_waiting 0"' in name for name in found)
