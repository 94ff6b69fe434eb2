"""The server, as OpenAI's own client and misbehaving clients see it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from mpt_trt import Engine
from mpt_trt.api.text import EngineText
from mpt_trt.server import connections
from mpt_trt.server.outbox import Outbox
from mpt_trt.server.service import Limits
from support.server import HOST, Served, serving

PROMPTS = ["def read(self", "import os\n\n\nclass Path", "The"]
CHAT_ML = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Read a file"}]
NAME = "mpt-demo"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(CHAT_ML)
    return path


@pytest.fixture(scope="module")
def engine(demo_engine: Path, template: Path) -> Engine:
    """Another engine, with which answers are compared."""
    return Engine.load(demo_engine, "onnxruntime", num_threads=1, chat_template=template)


@pytest.fixture(scope="module")
def served(demo_engine: Path, template: Path) -> Iterator[Served]:
    with serving(demo_engine, template, Limits(max_waiting=8, timeout_s=60)) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with connected(served) as made:
        yield made


# Making one takes a tenth of a second.
HTTP = httpx.Client(timeout=60)


def connected(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=60)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "mpt-trt"


def test_completions(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(
        model=NAME, prompt=PROMPTS, temperature=0, max_tokens=12, logprobs=2
    )
    outputs = engine.generate(PROMPTS, 12, top_log_probs=2)
    for choice, output in zip(answer.choices, outputs, strict=True):
        (best,) = output.completions
        assert (choice.text, choice.finish_reason) == (best.text, best.finish_reason)
        assert choice.logprobs.token_logprobs == pytest.approx(best.log_probs, abs=1e-3)
        assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * len(best.tokens)
        assert choice.logprobs.text_offset[0] == 0
    prompt_tokens = sum(len(output.prompt_tokens) for output in outputs)
    new_tokens = sum(len(output.tokens) for output in outputs)
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.completion_tokens == new_tokens
    assert answer.usage.total_tokens == prompt_tokens + new_tokens


def test_top_p_0_takes_the_most_likely_tokens(client: openai.OpenAI, engine: Engine) -> None:
    """Whatever the temperature is; `top_k` is not given, or allows others."""
    expected = [output.text for output in engine.generate(PROMPTS, 12)]
    options = {"model": NAME, "prompt": PROMPTS, "max_tokens": 12, "top_p": 0}
    for extra in ({}, {"temperature": 5.0}, {"extra_body": {"top_k": 40}}):
        answer = client.completions.create(**options, **extra)
        assert [choice.text for choice in answer.choices] == expected
    (chat,) = engine.generate([MESSAGES], 12)
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=12, top_p=0)
    assert answer.choices[0].message.content == chat.text


def test_prompts_may_be_ids(client: openai.OpenAI, engine: Engine) -> None:
    ids = [engine.text.encode(prompt) for prompt in PROMPTS]
    options = {"model": NAME, "temperature": 0, "max_tokens": 8}
    texts = client.completions.create(prompt=PROMPTS, **options)
    assert client.completions.create(prompt=ids, **options).choices == texts.choices
    one = client.completions.create(prompt=ids[0], **options)
    assert one.choices[0].text == texts.choices[0].text


def test_stop_echo_and_n(client: openai.OpenAI, engine: Engine) -> None:
    (free,) = engine.generate(PROMPTS[:1], 16)
    stop = free.text[5:8]
    answer = client.completions.create(
        model=NAME, prompt=PROMPTS[0], temperature=0, max_tokens=16, stop=[stop], n=2, echo=True
    )
    expected = PROMPTS[0] + free.text[: free.text.index(stop)]
    assert [choice.text for choice in answer.choices] == [expected] * 2
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def log_probs_by_prefix(engine: Engine, ids: list[int]) -> list[dict[int, float]]:
    """Log-probabilities of every token after each prefix, one prompt at a time."""
    found = []
    for length in range(1, len(ids)):
        (output,) = engine.generate([ids[:length]], 1, top_log_probs=10**6)
        found.append(dict(output.completions[0].top_log_probs[0]))
    return found


def test_echo_with_log_probs(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.text.encode(PROMPTS[0] * 4)
    expected = log_probs_by_prefix(engine, ids)
    options = {"model": NAME, "prompt": [ids, ids[:1]], "temperature": 0, "echo": True}
    answer = client.completions.create(**options, max_tokens=3, logprobs=2)
    log_probs = answer.choices[0].logprobs
    assert len(log_probs.tokens) == len(ids) + 3
    assert (log_probs.token_logprobs[0], log_probs.top_logprobs[0]) == (None, None)
    for index, every in enumerate(expected, 1):
        assert log_probs.token_logprobs[index] == pytest.approx(every[ids[index]], abs=1e-3)
        top = sorted(every.values())[-2:]
        assert sorted(log_probs.top_logprobs[index].values()) == pytest.approx(top, abs=1e-3)
    text = answer.choices[0].text
    for token, start in zip(log_probs.tokens, log_probs.text_offset, strict=True):
        assert text[start:].startswith(token) or token == "<|endoftext|>"
    assert text.index(", size") == log_probs.text_offset[len(ids)]
    assert answer.choices[1].logprobs.token_logprobs[0] is None
    assert len(answer.choices[1].logprobs.tokens) == 1 + 3
    # The prompt without new tokens; the same in a stream.
    alone = client.completions.create(**options, max_tokens=0, logprobs=0)
    assert alone.usage.completion_tokens == 0
    assert alone.choices[0].finish_reason == "length"
    assert alone.choices[0].logprobs.token_logprobs == log_probs.token_logprobs[: len(ids)]
    streamed = client.completions.create(**options, max_tokens=3, logprobs=2, stream=True)
    chunks = [chunk.choices[0] for chunk in streamed if chunk.choices[0].index == 0]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [each for chunk in chunks for each in getattr(chunk.logprobs, field)]
        assert joined == getattr(log_probs, field), field


def test_a_prompt_without_new_tokens_may_fill_a_row(client: openai.OpenAI, served: Served) -> None:
    options = {"model": NAME, "temperature": 0, "echo": True, "logprobs": 0, "max_tokens": 0}
    ids = [1 + number % 50 for number in range(served.model.capacity)]
    generated = served.scheduler.num_generated
    for stream in (False, True):
        answer = client.completions.create(prompt=ids, **options, stream=stream)
        choice = (list(answer)[-1] if stream else answer).choices[0]
        assert len(choice.logprobs.token_logprobs) == len(ids)
        assert choice.finish_reason == "length"
    assert served.scheduler.num_generated == generated
    with pytest.raises(openai.BadRequestError, match="holds 96; shorten the prompt"):
        client.completions.create(prompt=[*ids, 1], **options)


def test_offsets_of_characters_of_several_tokens(client: openai.OpenAI, engine: Engine) -> None:
    prompt = "Zürich → 東京 é"
    count = len(engine.text.encode(prompt))
    answer = client.completions.create(
        model=NAME, prompt=prompt, temperature=0, max_tokens=2, logprobs=0, echo=True
    )
    starts = answer.choices[0].logprobs.text_offset
    assert starts == sorted(starts) and len(starts) == count + 2 > len(prompt)
    assert starts[count - 1] == len(prompt) - 1 and starts[count] == len(prompt)


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    def texts(**options: int) -> list[str]:
        answer = client.completions.create(
            model=NAME, prompt=PROMPTS[1], max_tokens=16, n=3, **options
        )
        return [choice.text for choice in answer.choices]

    assert texts(seed=5) == texts(seed=5)
    assert len({*texts(seed=5), *texts(seed=6), *texts(), *texts()}) > 6


def test_a_stream_of_completions_is_the_whole(client: openai.OpenAI) -> None:
    options = {"model": NAME, "prompt": PROMPTS, "max_tokens": 10, "seed": 3, "echo": True}
    whole = client.completions.create(**options)
    usage = {"include_usage": True}
    texts, reasons, chunks = [""] * 3, [None] * 3, []
    for chunk in client.completions.create(**options, stream=True, stream_options=usage):
        chunks.append(chunk)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_an_outbox_loses_nothing_and_keeps_the_order() -> None:
    count, size = 20_000, 3

    async def receive() -> list[list[int]]:
        outbox, found = Outbox(), [list[int]() for _ in range(size)]
        outbox.loop = asyncio.get_running_loop()
        has_all = asyncio.Event()

        def send() -> None:
            for number in range(count):
                outbox.put(found[number % size].append, number)
                if number % 7 == 0:
                    outbox.flush()
            outbox.put(lambda _: has_all.set(), None)
            outbox.flush()

        threading.Thread(target=send).start()
        async with asyncio.timeout(20):
            await has_all.wait()
        return found

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        found = asyncio.run(receive())
    finally:
        sys.setswitchinterval(before)
    assert found == [[*range(first, count, size)] for first in range(size)]


def test_extensions_that_load_generators_use(client: openai.OpenAI, engine: Engine) -> None:
    """`ignore_eos` generates on after an end token; a stream can report usage in each chunk."""
    (end,) = engine.text.end_ids
    usage = {"include_usage": True, "continuous_usage_stats": True}
    greedy = {"top_k": 1, "repetition_penalty": 0.05}

    def create(**options):
        body = greedy | options.pop("extra", {})
        return client.completions.create(
            model=NAME, prompt=[end], max_tokens=40, extra_body=body, **options
        )

    chunks = create(stream=True, stream_options=usage, extra={"ignore_eos": True})
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == [*range(1, 41), 40]
    # A low penalty repeats the prompt's token, the end token.
    assert create(stream=False).usage.completion_tokens == 1


def test_chat(client: openai.OpenAI, engine: Engine) -> None:
    (expected,) = engine.generate([MESSAGES], 12, top_log_probs=1)
    options = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=1)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(
        expected.completions[0].log_probs, abs=1e-3
    )
    assert all(len(one.top_logprobs) == 1 for one in choice.logprobs.content)
    parts = list(client.chat.completions.create(**options, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content for part in parts) == expected.text
    assert parts[-1].choices[0].finish_reason == choice.finish_reason


def test_chat_with_a_stop_string_and_without_a_limit(client: openai.OpenAI) -> None:
    options = {"model": NAME, "messages": MESSAGES, "temperature": 0}
    free = client.chat.completions.create(**options)
    text = free.choices[0].message.content
    # The row of 96 positions is filled.
    assert free.usage.total_tokens == 96 or free.choices[0].finish_reason == "stop"
    stopped = client.chat.completions.create(**options, stop=text[4:6])
    assert stopped.choices[0].message.content == text[: text.index(text[4:6])]
    assert stopped.choices[0].finish_reason == "stop"


def test_many_clients_at_once_get_what_they_get_alone(
    client: openai.OpenAI, engine: Engine
) -> None:
    requests = [(PROMPTS[number % 3] + " " * (number // 3), 4 + number) for number in range(12)]

    def ask(request: tuple[str, int]) -> str:
        prompt, count = request
        answer = client.completions.create(
            model=NAME, prompt=prompt, temperature=0, max_tokens=count
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(12) as askers:
        answers = list(askers.map(ask, requests))
    assert answers == [engine.generate([prompt], count)[0].text for prompt, count in requests]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "gpt"}, 404, "does not exist"),
        ({"prompt": ""}, 400, "prompt = '': a prompt is a text, token ids from 0 to"),
        ({"prompt": []}, 400, "prompt = []: a prompt is a text, token ids from 0 to"),
        ({"prompt": [-1]}, 400, "prompt = [-1], with -1 in it: a prompt is a text, token ids"),
        ({"prompt": [1, 2, -1]}, 400, "prompt = [1, 2, -1], with -1 in it: a prompt is"),
        ({"prompt": [1, 1.0]}, 400, "prompt = [1, 1.0], with 1.0 in it: a prompt is"),
        ({"prompt": [True]}, 400, "prompt = [True], with True in it: a prompt is"),
        ({"prompt": [[1, 2], [3, 2**31]]}, 400, ", with 2147483648 in it: a prompt is"),
        ({"prompt": [*"abcd", 5]}, 400, ", with 5 in it: a prompt is"),
        ({"prompt": ["a", ""]}, 400, "prompt = ['a', ''], with '' in it: a prompt is"),
        ({"prompt": [[1], []]}, 400, "prompt = [[1], []], with [] in it: a prompt is"),
        ({"prompt": ["a"] * 65}, 400, "a list of up to 64 of either, none of them empty"),
        ({"prompt": [[5000000]]}, 400, "vocabulary"),
        ({"prompt": 7}, 400, "prompt = 7: a prompt is a text, token ids from 0 to vocab_size - 1"),
        ({"prompt": "\ud800"}, 400, "unicode"),
        ({"max_tokens": 0}, 400, "max_tokens: 0 needs echo"),
        ({"max_tokens": -1}, 400, "max_tokens = -1: "),
        ({"max_tokens": 1000}, 400, "a cache row holds 96; shorten the prompt or lower max_tokens"),
        ({"temperature": -1}, 400, "temperature = -1: "),
        ({"temperature": "hot"}, 400, "temperature = 'hot': Input should be a valid number"),
        ({"temperature": float("nan")}, 400, "temperature = nan: "),
        (
            {"repetition_penalty": 1e-300},
            400,
            "repetition_penalty = 1e-300: Input should be greater than or equal to 0.01",
        ),
        ({"repetition_penalty": 101}, 400, "repetition_penalty = 101: Input should be less than"),
        ({"n": 65}, 400, "n = 65: "),
        ({"stop": [""]}, 400, "stop = ['']: String should have at least 1 character"),
        ({"stop": ["a"] * 17}, 400, "...: List should have at most 16 items"),
        ({"stop": ["a", 5]}, 400, "stop = ['a', 5]: Input should be a valid string"),
        ({"stop": 5}, 400, "stop = 5: Input should be a valid string"),
        ({"logprobs": 21}, 400, "logprobs = 21: "),
        ({"best_of": 3}, 400, "best_of is not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty = 0.5 is not supported; leave it out"),
        ({"logit_bias": {"1": 2}}, 400, "logit_bias = {'1': 2} is not supported; leave it out"),
        ({"suffix": "x"}, 400, "suffix = 'x' is not supported; leave it out"),
        ({"max_token": 4}, 400, "unknown field max_token"),
        ({"stream_options": {"usage": True}}, 400, "stream_options: unknown field usage"),
        ({"n": 13}, 400, "13 completions in one request are more than the 12 that may run"),
        ({"n": 4, "prompt": ["a"] * 4}, 400, "16 completions in one request are more than the 12"),
    ],
)
def test_bad_requests_are_rejected_in_openais_format(
    changes: dict, status: int, message: str, served: Served
) -> None:
    body = {"model": NAME, "prompt": "The", "max_tokens": 4, **changes}
    answer = HTTP.post(f"{served.url}/v1/completions", content=json.dumps(body).encode())
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert message in error["message"]
    if status == 400 and "vocabulary" not in message:
        assert error["param"] == next(iter(changes))
    served.wait_until_idle()


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": MESSAGES, "max_tokens": 96}, "max_tokens", "or lower max_tokens"),
        (
            {"messages": MESSAGES, "max_completion_tokens": 96},
            "max_completion_tokens",
            "or lower max_completion_tokens",
        ),
        (
            {"messages": [{"role": "user", "content": "a b c " * 40}]},
            "messages",
            "shorten the prompt",
        ),
        ({"messages": [{"role": "user"}]}, "messages", "messages: the field content is missing"),
        ({}, "messages", "messages is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "messages: content of the type 'image_url' is not supported, only 'text'",
        ),
        (
            {"messages": MESSAGES, "top_logprobs": 2},
            "top_logprobs",
            "top_logprobs = 2: it needs logprobs: true",
        ),
        (
            {"messages": MESSAGES, "response_format": {"type": "json_object"}},
            "response_format",
            "response_format = {'type': 'json_object'} is not supported; leave it out",
        ),
    ],
)
def test_bad_chats_are_rejected_by_the_name_of_their_field(
    body: dict, param: str, message: str, served: Served
) -> None:
    answer = HTTP.post(f"{served.url}/v1/chat/completions", json={"model": NAME, **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].endswith(message)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b"\xff", 400),
        (b'{"a":' * 5000, 400),
        (b"[" * 100_000, 400),
        (b'"' + b"a" * (1 << 20) + b'"', 413),
    ],
    ids=["nothing", "list", "cut", "no text", "deep", "very deep", "large"],
)
def test_bodies_that_are_no_requests(content: bytes, status: int, served: Served) -> None:
    for path in ("completions", "chat/completions"):
        answer = HTTP.post(f"{served.url}/v1/{path}", content=content)
        assert (answer.status_code, "error" in answer.json()) == (status, True)


def test_paths_that_do_not_exist(client: openai.OpenAI, served: Served) -> None:
    for answer in (
        HTTP.get(f"{served.url}/v1/completions"),
        HTTP.post(f"{served.url}/v2/%0aX", json={}),
    ):
        assert answer.status_code in (404, 405) and answer.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_health_and_metrics(client: openai.OpenAI, served: Served) -> None:
    def values() -> dict[str, float]:
        text = HTTP.get(f"{served.url}/metrics").text
        return {name: float(v) for name, v in re.findall(r"^(mpt_trt\S+) (\S+)$", text, re.M)}

    assert HTTP.get(f"{served.url}/health").json() == {"status": "ok"}
    before = values()
    client.completions.create(model=NAME, prompt="The", max_tokens=3, temperature=0)
    served.wait_until_idle()
    after = values()
    assert after["mpt_trt_generated_tokens_total"] == before["mpt_trt_generated_tokens_total"] + 3
    assert after["mpt_trt_time_to_first_token_seconds_count"] >= 1
    assert after["mpt_trt_running"] == after["mpt_trt_waiting"] == 0
    assert after['mpt_trt_requests_total{endpoint="/v1/completions",status="200"}'] >= 1


def raw_request(body: dict, extra: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n{extra}"
    return f"{head}\r\n".encode() + content


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_hangs_up_frees_its_rows(is_stream: bool, served: Served) -> None:
    body = {"model": NAME, "prompt": "The", "max_tokens": 90, "n": 4, "stream": is_stream}
    before = served.scheduler.num_generated
    with socket.create_connection((HOST, served.port)) as connection:
        connection.sendall(raw_request(body))
        served.wait_for(lambda: served.scheduler.num_running == 4)
        if is_stream:
            assert connection.recv(100)
    served.wait_until_idle()
    assert served.scheduler.num_generated - before < 4 * 90
    assert served.service.num_live == 0


def test_sockets_that_misbehave_do_not_disturb(client: openai.OpenAI, served: Served) -> None:
    attacks = [
        b"",
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: x\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 200_000,
        raw_request({"model": NAME, "prompt": "The"}, "X-Evil: \x1b[31m\r\n"),
    ]
    connections = [socket.create_connection((HOST, served.port)) for _ in attacks]
    for connection, attack in zip(connections, attacks, strict=True):
        try:
            connection.sendall(attack)
        except OSError:  # refused already
            continue
    # Meanwhile, and after they have gone.
    for _ in range(2):
        answer = client.completions.create(model=NAME, prompt="The", max_tokens=3)
        assert answer.usage.completion_tokens <= 3
        for connection in connections:
            connection.close()
    served.wait_until_idle()


def test_connections_that_send_no_request_are_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once or after an answered request, with a part of the headers or without any."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    parts = [b"", b"GET /health HTTP/1.1\r\nX: ", whole + b"GET /health HT"]
    opened = [socket.create_connection((HOST, served.port), timeout=20) for _ in parts]
    for connection, part in zip(opened, parts, strict=True):
        connection.sendall(part)
    # A request that takes longer than its headers may. Its connection is not used again.
    options = {"model": NAME, "prompt": "The", "max_tokens": 90, "n": 4}
    with connected(served) as own:
        assert own.completions.create(**options).choices
    for connection, part in zip(opened, parts, strict=True):
        with connection:
            content = b"".join(iter(lambda one=connection: one.recv(1000), b""))
        assert content.count(b"200 OK") == part.count(whole)


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_text_that_cannot_fit_is_not_encoded(
    field: str, client: openai.OpenAI, served: Served
) -> None:
    long = "a " * 250_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineText, "encode", None)
        with pytest.raises(openai.BadRequestError, match=f"{field}: 500000 characters") as error:
            if field == "prompt":
                client.completions.create(model=NAME, prompt=long)
            else:
                client.chat.completions.create(
                    model=NAME, messages=[{"role": "user", "content": long}]
                )
    assert (error.value.code, error.value.param) == ("context_length_exceeded", field)


def test_a_reader_that_is_slow_does_not_stop_others(client: openai.OpenAI, served: Served) -> None:
    body = {"model": NAME, "prompt": "The", "max_tokens": 90, "stream": True, "n": 3}
    with socket.create_connection((HOST, served.port)) as connection:
        connection.sendall(raw_request(body))
        assert client.completions.create(model=NAME, prompt="The", max_tokens=3).choices
        served.wait_until_idle()


def test_logs_escape_what_clients_send(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mpt_trt.server.app"):
        HTTP.get(f"{served.url}/v1/models/%1b[31mfake")
    (line,) = [r.getMessage() for r in caplog.records if r.name == "mpt_trt.server.app"]
    assert "\\x1b[31mfake" in line and line.isprintable()


def test_a_key_is_required(demo_engine: Path) -> None:
    with serving(demo_engine, api_key="secret") as served:
        with connected(served, "secret") as friend:
            assert friend.models.list().data
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                friend.chat.completions.create(model=NAME, messages=MESSAGES)
        with connected(served, "guess") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert HTTP.get(f"{served.url}/metrics").status_code == 401
        assert HTTP.get(f"{served.url}/health").status_code == 200


def test_time_is_limited_and_the_queue_too(demo_engine: Path) -> None:
    with serving(demo_engine, limits=Limits(max_waiting=0, timeout_s=0.3)) as served:
        step = served.model.step
        is_open = threading.Event()

        def slow(*arguments):
            is_open.wait(0.1)
            return step(*arguments)

        served.model.step = slow
        with connected(served) as client:
            with pytest.raises(openai.BadRequestError, match="5 completions in one request"):
                client.completions.create(model=NAME, prompt="The", max_tokens=50, n=5)
            running = client.completions.create(
                model=NAME, prompt="The", max_tokens=50, n=4, stream=True
            )
            with pytest.raises(openai.RateLimitError, match="4 requests are running"):
                client.completions.create(model=NAME, prompt="The", max_tokens=50)
            running.close()
            served.wait_until_idle()
            with pytest.raises(openai.InternalServerError, match=r"longer than 0\.3 s"):
                client.completions.create(model=NAME, prompt="The", max_tokens=50, n=4)
            with pytest.raises(openai.APIError, match=r"longer than 0\.3 s"):
                list(client.completions.create(model=NAME, prompt="A", max_tokens=50, stream=True))
            is_open.set()
            served.wait_until_idle()
            assert client.completions.create(model=NAME, prompt="The", max_tokens=3).choices


def test_a_client_that_reads_nothing_frees_its_place_after_its_time(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4096
    connection_made = connections.HttpProtocol.connection_made

    def buffer_little(self, transport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        connection_made(self, transport)

    monkeypatch.setattr(connections.HttpProtocol, "connection_made", buffer_little)
    body = {"model": NAME, "prompt": "The", "max_tokens": 90, "n": 4, "logprobs": 20}
    body |= {"stream": True, "ignore_eos": True}
    with (
        serving(demo_engine, limits=Limits(max_waiting=0, timeout_s=3)) as served,
        socket.socket() as stalled,
    ):
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        stalled.connect((HOST, served.port))
        stalled.sendall(raw_request(body))
        served.wait_for(lambda: served.service.num_live == 4)
        served.wait_for(lambda: served.service.num_live == 0)
        with connected(served) as client:
            assert client.completions.create(model=NAME, prompt="The", max_tokens=3).choices


def test_a_choice_that_a_stop_string_has_ended_cannot_fail(
    demo_engine: Path, engine: Engine
) -> None:
    """The engine runs a step more than such a choice needs."""
    first, second = engine.generate(PROMPTS[:2], 9)
    last = first.tokens[4]
    stop = engine.text.decoder.decode([last])
    assert first.text.count(stop) == 1 and stop not in second.text
    with serving(demo_engine) as served, connected(served) as client:
        step, failed = served.model.step, []

        def failing(input_ids, *arguments):
            logits = step(input_ids, *arguments)
            if len(logits) == 2 and input_ids[0, 0] == last:
                failed.append(1)
                logits[0] = np.nan
            return logits

        served.model.step = failing
        stopped = client.completions.create(
            model=NAME, prompt=PROMPTS[:2], max_tokens=9, temperature=0, stop=stop
        )
    assert failed
    expected = [first.text[: first.text.index(stop)], second.text]
    assert [choice.text for choice in stopped.choices] == expected


@pytest.mark.parametrize("on_failure", ["continue", "exit"])
def test_a_failing_step_ends_what_runs(demo_engine: Path, on_failure) -> None:
    with serving(demo_engine, on_failure=on_failure) as served:
        step = served.model.step
        failures = iter([RuntimeError("out of luck")])

        def failing(*arguments):
            if served.scheduler.num_running == 3 and (error := next(failures, None)):
                raise error
            return step(*arguments)

        served.model.step = failing
        with connected(served) as client:
            with pytest.raises(openai.InternalServerError, match="the engine failed") as failure:
                client.completions.create(model=NAME, prompt="The", max_tokens=50, n=3)
            assert failure.value.status_code == 500 and "luck" not in str(failure.value)
            if on_failure == "continue":
                assert client.completions.create(model=NAME, prompt="The", max_tokens=3).choices
            else:
                served.worker.join(10)
                with pytest.raises(openai.InternalServerError, match="shutting down"):
                    client.completions.create(model=NAME, prompt="The", max_tokens=3)
                assert HTTP.get(f"{served.url}/health").status_code == 503
