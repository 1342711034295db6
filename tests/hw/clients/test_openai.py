"""OpenAI's own package against the server: what it sends is understood, and what it gets it understands."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the real clients are installed by `make clients`")

from hw.serve.server import ServerConfig  # noqa: E402
from tests.hw.serve.loopback import Server, eventually, serving  # noqa: E402

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def client_of(server: Server, key: str = "any") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def completion(server: Server, prompt: Any = "abc", **more: Any) -> Any:
    arguments = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "extra_body": {"ignore_eos": True}, **more}
    return client_of(server).completions.create(**arguments)


def chat(server: Server, **more: Any) -> Any:
    arguments = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 8, **more}
    return client_of(server).chat.completions.create(**{"extra_body": {"ignore_eos": True}, **arguments})


def test_a_completion_has_its_text_its_end_and_its_usage(server: Server) -> None:
    answer = completion(server)
    (choice,) = answer.choices
    assert len(choice.text) == 8
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 8, 11)
    assert answer.object == "text_completion"


def test_a_streamed_completion_has_the_same_text_and_ends_with_its_usage(server: Server) -> None:
    chunks = list(completion(server, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == completion(server).choices[0].text
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_chat_has_its_message_streamed_or_not(server: Server) -> None:
    message = chat(server).choices[0].message
    assert message.role == "assistant"
    assert len(message.content) == 8
    chunks = list(chat(server, stream=True))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == message.content
    with (
        client_of(server).chat.completions.stream(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=8,
            extra_body={"ignore_eos": True},
        ) as stream,
        pytest.raises(openai.LengthFinishReasonError) as caught,
    ):  # the package's way to report max_tokens
        stream.get_final_completion()
    assert caught.value.completion.choices[0].message.content == message.content


def test_an_answer_ends_before_a_stop(server: Server) -> None:
    full = completion(server).choices[0].text
    stopped = completion(server, stop=[full[3]])
    assert stopped.choices[0].text == full.partition(full[3])[0]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = completion(server, stop=full[3], stream=True)
    assert "".join(c.text for chunk in streamed for c in chunk.choices) == stopped.choices[0].text


def test_equal_seeds_sample_equal_texts_and_temperature_0_is_greedy(server: Server) -> None:
    def text(**more: Any) -> str:
        return str(completion(server, **more).choices[0].text)

    assert text(temperature=0) == text() == text(temperature=0, seed=5)
    hot = [text(temperature=1.5, seed=seed) for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1]
    assert len(set(hot)) > 1
    assert text(temperature=1.0, top_p=1e-6) == text()


def test_every_prompt_of_a_list_has_its_own_answer(server: Server) -> None:
    prompts = ["abc", "de", "fghi"]
    alone = [completion(server, prompt).choices[0].text for prompt in prompts]
    together = completion(server, prompts)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == alone
    assert together.usage.prompt_tokens == 9
    texts = ["", "", ""]
    for chunk in completion(server, prompts, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == alone
    assert completion(server, [[1, 2, 3], [4]]).usage.prompt_tokens == 4


def test_several_choices_of_one_prompt(server: Server) -> None:
    answer = chat(server, n=3, temperature=1.2, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 24


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"max_tokens": 10**6}, "BadRequestError"),
        ({"max_tokens": -1}, "BadRequestError"),
        ({"temperature": -1}, "BadRequestError"),
        ({"stop": ["a"] * 100}, "BadRequestError"),
        ({"prompt": ""}, "BadRequestError"),
        ({"prompt": [10**6]}, "BadRequestError"),
        ({"model": "another"}, "NotFoundError"),
    ],
)
def test_a_wrong_request_is_the_right_exception_with_a_message(server: Server, more: dict[str, Any], kind: str) -> None:
    for stream in (False, True):
        with pytest.raises(getattr(openai, kind)) as caught:
            completion(server, **{"prompt": "abc", "stream": stream, **more})
        assert caught.value.body["message"]
        assert caught.value.type == "invalid_request_error"


def test_a_server_with_a_token_wants_it() -> None:
    with serving(config=ServerConfig(max_tokens=60, token="sk-right")) as guarded:
        assert len(client_of(guarded, "sk-right").models.list().data) == 1
        with pytest.raises(openai.AuthenticationError):
            client_of(guarded, "sk-wrong").models.list()
        with pytest.raises(openai.AuthenticationError):
            completion(guarded)


def test_a_full_server_is_a_rate_limit() -> None:
    with serving(config=ServerConfig(max_tokens=60, max_waiting=1)) as small:

        async def burst() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{small.url}/v1", api_key="any", max_retries=0) as client:
                arguments = {"model": "tiny", "prompt": "abc", "max_tokens": 60, "extra_body": {"ignore_eos": True}}
                calls = [client.completions.create(**arguments) for _ in range(20)]
                return await asyncio.gather(*calls, return_exceptions=True)

        results = asyncio.run(burst())
    assert {type(result).__name__ for result in results} == {"Completion", "RateLimitError"}


def test_many_requests_at_once_each_get_their_own_answer(server: Server) -> None:
    prompts = [chr(97 + i) * (1 + i % 5) for i in range(20)]
    alone = [completion(server, prompt).choices[0].text for prompt in prompts]

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            calls = [
                client.completions.create(model="tiny", prompt=p, max_tokens=8, extra_body={"ignore_eos": True})
                for p in prompts
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(all_of_them()) == alone


def test_a_stream_that_is_closed_frees_its_place(server: Server) -> None:
    stream = completion(server, max_tokens=60, stream=True)
    next(iter(stream))
    stream.close()
    eventually(lambda: server.thread.state.running == 0, "the request still runs")


def test_the_served_model_is_listed(server: Server) -> None:
    assert [model.id for model in client_of(server).models.list()] == ["tiny"]
    assert client_of(server).models.retrieve("tiny").id == "tiny"
