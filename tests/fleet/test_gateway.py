"""What users of OpenAI's package get through the real gateway, whatever becomes of the workers behind it."""

import asyncio
import collections
import json
import os
import re
import signal
import time
import urllib.request

import openai
import pytest

from tests.fleet.running import CONTEXT, PAGE, RunningFleet, small

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Leipzig"]}, "days": {"type": "integer", "minimum": 3, "maximum": 3}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object"}}},
]
FORCED = {"type": "function", "function": {"name": "weather"}}
THOUGHT = "<think>plan it</think>"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "model").mkdir()
    flags = ("--flight-recorder", folder / "flights")
    fleet = RunningFleet(small(folder / "model"), folder / "log", *flags, replicas=2).ready()
    fleet.flights = folder / "flights"
    yield fleet
    assert fleet.leave() == 0, fleet.log.read_text()
    assert "resource_tracker" not in fleet.log.read_text()


@pytest.fixture(scope="module")
def client(fleet):
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def chat(client, text="def f(x):", **fields):
    asked = {"model": "small", "messages": [{"role": "user", "content": text}], "max_completion_tokens": 12}
    return client.chat.completions.create(**asked | fields)


def message(*args, **fields):
    return chat(*args, **fields).choices[0].message


# What is answered


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["small"]


def test_a_stream_is_the_whole(client):
    whole = chat(client, seed=3)
    *chunks, last = chat(client, seed=3, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 12


def test_what_is_cached_is_counted(client):
    text = "x = 1\n" * 20
    first, second = (chat(client, text, temperature=0).usage for _ in range(2))
    assert second.prompt_tokens == first.prompt_tokens > PAGE
    assert second.prompt_tokens_details.cached_tokens == second.prompt_tokens // PAGE * PAGE


def test_completions_stop(client):
    fields = {"model": "small", "prompt": "def f(x):", "temperature": 0}
    text = client.completions.create(max_tokens=12, **fields).choices[0].text
    [stopped] = client.completions.create(max_tokens=12, stop=[text[-3:]], **fields).choices
    assert stopped.text == text[: text.index(text[-3:])]
    assert stopped.finish_reason == "stop"


def test_logprobs(client):
    [choice] = chat(client, temperature=0, logprobs=True, top_logprobs=2).choices
    for token in choice.logprobs.content:
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_seeds(client):
    texts = [message(client, seed=seed).content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_several_choices(client):
    texts = {choice.index: choice.message.content for choice in chat(client, seed=7, n=2).choices}
    assert texts[0] == message(client, seed=7).content != texts[1]


def test_a_json_schema(client):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(message(client, response_format=asked).content)["a"] in (1, 2)


@pytest.mark.parametrize("choice", ["required", FORCED], ids=["required", "by name"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_tool_is_called(client, choice, stream):
    fields = {"tools": TOOLS[:1], "tool_choice": choice, "max_completion_tokens": 60, "stream": stream}
    if stream:
        calls = [call for chunk in chat(client, **fields) for call in chunk.choices[0].delta.tool_calls or ()]
        name, text = calls[0].function.name, "".join(call.function.arguments for call in calls)
    else:
        call, *_ = message(client, **fields).tool_calls
        name, text = call.function.name, call.function.arguments
    assert (name, json.loads(text)) == ("weather", {"city": "Leipzig", "days": 3})


def test_reasoning_and_a_call_are_told_apart(client):
    scripted = re.escape(
        f"{THOUGHT}I look.<tool_call>weather<arg_key>city</arg_key><arg_value>Bonn</arg_value></tool_call>"
    )
    told = message(client, tools=TOOLS, max_completion_tokens=80, extra_body={"regex": scripted})
    [call] = told.tool_calls
    assert (told.reasoning_content, told.content) == ("plan it", "I look.")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bonn"})


def test_reasoning_is_streamed_as_such(client):
    fields = {"max_completion_tokens": 40, "extra_body": {"regex": re.escape(f"{THOUGHT}an answer")}, "stream": True}
    deltas = [chunk.choices[0].delta for chunk in chat(client, **fields)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "plan it"
    assert "".join(delta.content or "" for delta in deltas) == "an answer"


def test_anthropics_messages(fleet):
    asked = {"model": "small", "max_tokens": 8, "messages": [{"role": "user", "content": "def f(x):"}]}
    request = urllib.request.Request(
        f"{fleet.url}/v1/messages", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=60))
    assert (answer["role"], answer["stop_reason"]) == ("assistant", "max_tokens")
    assert answer["usage"]["output_tokens"] == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "x " * 2 * CONTEXT}, "maximum context length"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "y"}}}},
            "json_schema",
        ),
        ({"extra_body": {"regex": "(a"}}, "regex"),
    ],
    ids=["too long", "a schema", "a regex"],
)
def test_what_cannot_be_served_is_the_clients_fault(client, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, **fields)


# Whatever becomes of the workers


class Load:
    """Requests, a few at a time, streamed and not, until it is left; what became of them."""

    def __init__(self, fleet, clients=3):
        self._fleet, self._clients, self._going = fleet, clients, True
        self.whole, self.streamed, self.lost = 0, 0, collections.Counter()

    async def _one(self, client, number):
        begun, stream = False, number % 2 == 0
        asked = {"temperature": 0, "max_completion_tokens": 48, "stream": stream, "extra_body": {"ignore_eos": True}}
        try:
            answer = await chat(client, f"def f{number}(x):", **asked)
            if not stream:
                self.whole += answer.choices[0].finish_reason == "length"
                return
            async for chunk in answer:
                begun = True
                self.streamed += bool(chunk.choices) and chunk.choices[0].finish_reason == "length"
        except openai.APIError as error:
            self.lost["a stream that had begun" if begun else f"{error}"] += 1

    async def _client(self, client, first):
        number = first
        while self._going:
            await self._one(client, number)
            number += self._clients

    async def during(self, what):
        """While something happens."""
        async with openai.AsyncOpenAI(
            base_url=f"{self._fleet.url}/v1", api_key="any", max_retries=0, timeout=60
        ) as client:
            asking = [asyncio.create_task(self._client(client, n)) for n in range(self._clients)]
            await asyncio.to_thread(what)
            self._going = False
            await asyncio.gather(*asking)


def until_new(fleet, before, workers=2):
    """Until so many workers serve that were not there."""
    fleet.until(lambda: len(set(fleet.pids()) - set(before)) >= workers)
    fleet.ready()


def test_all_record_what_they_have_dispatched_when_asked(fleet, client):
    message(client)
    fleet.signal(signal.SIGUSR1)
    fleet.until(lambda: all(any(fleet.flights.glob(f"worker-{n}/*-asked.json.gz")) for n in range(2)), seconds=30)
    assert message(client).content


def test_a_rolling_restart_loses_nothing(fleet):
    before, load = fleet.pids(), Load(fleet)

    def restart():
        time.sleep(1)
        fleet.signal(signal.SIGHUP)
        until_new(fleet, before)

    asyncio.run(load.during(restart))
    assert not load.lost
    assert load.whole > 4
    assert load.streamed > 4


def test_a_worker_that_is_killed_costs_no_more_than_the_streams_it_had_begun(fleet):
    before, load = fleet.pids(), Load(fleet)

    def kill():
        time.sleep(2)
        os.kill(before[0], signal.SIGKILL)
        until_new(fleet, before, workers=1)

    asyncio.run(load.during(kill))
    assert set(load.lost) <= {"a stream that had begun"}
    assert sum(load.lost.values()) <= 2
    assert load.whole > 4
    assert load.streamed > 4
