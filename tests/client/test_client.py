"""The client gives what the engine gives, in threads, event loops and the terminal, and leaves nothing behind."""

import asyncio
import subprocess
import sys
import threading
import time

import grpc
import pytest

from glmjax.client.__main__ import main
from glmjax.client.client import AsyncClient, Client
from glmjax.serving.engine import Engine
from tests.serving.test_grammar import CONFIG, LENGTH, glm
from tests.worker.running import PROMPT, Running, before_plans, until

SAMPLED = {"temperature": 1.2, "seed": 3, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A worker whose tokenizer is that of its model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    glm().tokenizer.raw.save(str(folder / "tokenizer.json"))
    running = Running(tokenizer_path=folder).ready()
    yield running
    running.leave()
    assert running.closed() == 0


@pytest.fixture
def client(running):
    with Client(running.address) as client:
        yield client


def alone(prompt=PROMPT, **fields):
    return glm().generate(prompt, **SAMPLED | fields).finish()


def test_an_answer_is_what_generate_gives(client):
    [answer] = client.generate(PROMPT, **SAMPLED)
    assert (answer.text, list(answer.ids), answer.finish_reason) == (alone().text, alone().ids, "length")
    assert answer.prompt_tokens == len(glm().encode(PROMPT))


def test_pieces_come_to_the_answer(client):
    pieces = list(client.stream(PROMPT, **SAMPLED))
    assert "".join(piece.text for piece in pieces) == alone().text
    assert [token for piece in pieces for token in piece.ids] == alone().ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


@pytest.mark.parametrize("include", [False, True])
def test_text_ends_before_or_after_its_stop_string(client, include):
    stop = alone().text[4:6]
    asked = {"stop": (stop,), "include_stop_str_in_output": include}
    [answer] = client.generate(PROMPT, **SAMPLED | asked)
    assert answer.text == alone(**asked).text
    assert "".join(piece.text for piece in client.stream(PROMPT, **SAMPLED | asked)) == answer.text


@pytest.mark.parametrize("least", [6, 12])
def test_a_stop_string_counts_once_there_are_so_many_tokens(client, least):
    asked = {"stop": tuple(set(alone().text)), "min_new_tokens": least}
    [answer] = client.generate(PROMPT, **SAMPLED | asked)
    assert len(answer.ids) >= least
    assert answer.text == alone(**asked).text
    assert "".join(piece.text for piece in client.stream(PROMPT, **SAMPLED | asked)) == answer.text


def test_tokens_scores_and_several_sequences(client):
    ids = glm().encode(PROMPT)
    answers = client.generate(ids, n=2, logprobs=2, prompt_logprobs=1, **SAMPLED)
    assert [list(answer.ids) for answer in answers] == [alone(seed=3 + i).ids for i in range(2)]
    assert all(len(answer.scores) == len(answer.ids) and len(answer.scores[0].top) == 2 for answer in answers)
    for answer in answers:
        assert [len(score.top) for score in answer.prompt_scores] == [1] * (len(ids) - 1)


def test_what_is_refused_is_refused_before_it_is_sent_or_by_the_worker(client):
    with pytest.raises(ValueError, match="top_p 2 is outside"):
        client.generate(PROMPT, top_p=2)
    with pytest.raises(grpc.RpcError) as error:
        client.generate("a b c " * 100)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_who_leaves_the_loop_cancels(client, running, monkeypatch):
    before = running.engine.stats().finished
    before_plans(monkeypatch, running.engine, lambda: time.sleep(0.05))
    for _ in client.stream(PROMPT, ignore_eos=True, max_new_tokens=LENGTH - 20):
        break
    until(lambda: not len(running.worker.service.live) and running.engine.stats().running == 0)
    assert running.engine.stats().finished == before
    assert client.loads().num_running_reqs == 0


def test_an_event_loop_asks_many_at_once(running):
    async def ask():
        async with AsyncClient(running.address) as client:

            async def stream(seed):
                return "".join([piece.text async for piece in client.stream(PROMPT, **SAMPLED | {"seed": seed})])

            whole = [client.generate(PROMPT, **SAMPLED | {"seed": seed}) for seed in range(4)]
            texts = [answer.text for [answer] in await asyncio.gather(*whole)]
            assert (await client.info()).vocab_size == glm().config.vocab_size
            assert (await client.loads()).max_running_requests == CONFIG.max_num_seqs
            assert (await client.tokenizer()).encode(PROMPT) == glm().encode(PROMPT)
            assert texts == await asyncio.gather(*map(stream, range(4)))
            return texts

    assert asyncio.run(ask()) == [alone(seed=seed).text for seed in range(4)]


def test_a_call_waits_for_a_worker_that_is_starting():
    go = threading.Event()

    def make():
        assert go.wait(60)
        return Engine(glm(), CONFIG)

    running = Running(make=make)
    threading.Timer(0.3, go.set).start()
    with Client(running.address) as client:
        assert client.generate(glm().encode(PROMPT), **SAMPLED)[0].ids == tuple(alone().ids)
    running.leave()
    assert running.closed() == 0


def test_another_worker_answers_where_one_has_left(running):
    gone = Running().ready()
    with Client(running.address, gone.address) as client:
        client.generate(PROMPT, **SAMPLED)
        gone.leave()
        assert gone.closed() == 0
        for _ in range(4):
            assert client.generate(PROMPT, **SAMPLED)[0].finish_reason == "length"


# The terminal


def test_the_terminal_shows_text_and_statistics(running, capsys):
    flags = ["--address", running.address, "--temperature", "1.2", "--random-seed", "3", "--max-new-tokens", "12"]
    assert main([PROMPT, *flags]) == 0
    out, err = capsys.readouterr()
    assert out == f"{PROMPT}{alone().text}\n"
    assert "12 new (length); first token after" in err


def test_the_terminal_says_what_went_wrong(running, capsys):
    assert main(["a b c " * 100, "--address", running.address]) == 2
    assert "INVALID_ARGUMENT" in capsys.readouterr().err
    assert main(["x", "--address", running.address, "--top-p", "3"]) == 2
    assert "top_p 3.0 is outside" in capsys.readouterr().err


def test_a_client_has_no_jax():
    code = "import sys, glmjax; glmjax.Client, glmjax.AsyncClient; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
