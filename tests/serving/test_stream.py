"""Chunks as a reader meets them: in order, from threads and event loops, and kept back as long as he asks for it."""

import asyncio
import math
import threading

import pytest

from glmjax.serving.stream import Chunk, Stream


def chunk(*ids, index=0, end=None):
    return Chunk(ids, "", index, finish_reason=end)


def shown(stream):
    """What could be read now."""
    chunks = []
    while stream._settled() and (stream._chunks or stream._error):
        chunks.append(next(stream))
    return [token for c in chunks for token in c.ids]


def test_what_is_put_is_read_in_order():
    stream = Stream(2)
    for c in (chunk(1), chunk(7, index=1), chunk(2, end="stop"), chunk(8, index=1, end="length")):
        stream.put(c)
    assert [(c.index, c.ids) for c in stream] == [(0, (1,)), (1, (7,)), (0, (2,)), (1, (8,))]


def test_an_error_comes_after_what_was_before_it():
    stream = Stream()
    stream.put(chunk(1))
    stream.fail(TimeoutError("late"))
    stream.put(chunk(2))
    assert next(stream).ids == (1,)
    with pytest.raises(TimeoutError, match="late"):
        next(stream)


# Holding back


@pytest.mark.parametrize("holdback", [0, 1, 2, 3, 7])
def test_tokens_wait_until_there_are_more_than_are_held_back(holdback):
    stream, all_shown = Stream(holdback=holdback), []
    for token in range(6):
        stream.put(chunk(token))
        all_shown += shown(stream)
        assert all_shown == (list(range(token + 1)) if token >= holdback else [])


def test_the_end_shows_all_that_was_held_back():
    stream = Stream(holdback=math.inf)
    stream.put(chunk(*range(100)))
    assert shown(stream) == []
    stream.put(chunk(100, end="stop"))
    assert shown(stream) == [*range(101)]


def test_sequences_are_held_back_each_for_itself():
    stream = Stream(2, holdback=1)
    stream.put(chunk(1))
    stream.put(chunk(7, index=1))
    stream.put(chunk(8, index=1))
    assert shown(stream) == [7, 8]
    stream.put(chunk(2))
    assert shown(stream) == [1, 2]


def test_what_is_held_back_can_be_taken_back():
    stream = Stream(holdback=2)
    stream.put(chunk(1, 1))
    assert stream.take_back(0)
    stream.put(chunk(2, 2))
    assert shown(stream) == []  # held back anew
    stream.put(chunk(2))
    assert shown(stream) == [2, 2, 2]
    assert not stream.take_back(0)


def test_what_could_have_been_read_and_was_not_can_be_taken_back():
    stream = Stream(2)
    stream.put(chunk(1))
    stream.put(chunk(7, index=1))
    assert stream.take_back(0)
    assert shown(stream) == [7]


def test_an_error_does_not_show_what_was_held_back():
    stream = Stream(holdback=2)
    stream.put(chunk(1))
    stream.fail(TimeoutError("late"))
    with pytest.raises(TimeoutError):
        next(stream)


# Who waits


def test_a_thread_waits_for_what_comes():
    stream = Stream(holdback=1)
    reader = threading.Thread(target=lambda: got.extend(stream))
    got = []
    reader.start()
    stream.put(chunk(1))
    stream.put(chunk(2, end="stop"))
    reader.join(10)
    assert [c.ids for c in got] == [(1,), (2,)]


def test_an_event_loop_waits_for_what_comes_from_a_thread():
    stream = Stream(holdback=1)

    def engine():
        for token in range(5):
            stream.put(chunk(token, end="stop" if token == 4 else None))

    async def read():
        threading.Timer(0.01, engine).start()
        return [c.ids[0] async for c in stream]

    assert asyncio.run(read()) == [*range(5)]


def test_a_reader_that_is_cancelled_cancels_the_stream():
    cancelled = threading.Event()
    stream = Stream(cancelled=cancelled.set)

    async def read():
        task = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(read())
    assert cancelled.is_set()
