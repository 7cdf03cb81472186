"""The events of the cache as the gateway reads them, so that it sends requests to where their prefix is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
from smg_grpc_proto.generated import common_pb2 as pb

from glmjax.serving.engine import Engine
from glmjax.serving.events import Cleared, EventBatch, Removed, Stored
from glmjax.worker.threads import in_thread


async def followed(engine: Engine, start: int) -> AsyncIterator[pb.KvEventBatch]:
    """Batches without end.

    Args:
        engine: whose.
        start: number of the last batch that the follower has; 0 to begin with all there is now.

    Raises:
        LostError: there is nothing to go on from: the follower has to begin again.
        ClosedError: the engine has been closed.
    """
    changed, loop, size = asyncio.Event(), asyncio.get_running_loop(), engine.config.page_size
    with engine.events.watched(lambda: loop.call_soon_threadsafe(changed.set)):
        if start == 0:
            for batch in await in_thread(engine.cached):
                yield batch_message(batch, size)
                start = batch.number
        while True:
            changed.clear()
            for batch in engine.events.after(start):
                yield batch_message(batch, size)
                start = batch.number
            await changed.wait()


def batch_message(batch: EventBatch, page_size: int) -> pb.KvEventBatch:
    """A batch as the protocol has it: pages that follow each other are told together.

    Args:
        batch: of events.
        page_size: A.
    """
    told = pb.KvEventBatch(sequence_number=batch.number, timestamp=batch.seconds)
    before: bytes | None = None  # of the page that was stored last, if the last event was that
    for event in batch.events:
        if isinstance(event, Stored) and event.before == before:
            told.events[-1].stored.blocks.append(_block(event, page_size))
        else:
            told.events.append(_event(event, page_size))
        before = event.digest if isinstance(event, Stored) else None
    for n, event in enumerate(told.events):
        event.event_id = n
    return told


def _event(event: Stored | Removed | Cleared, page_size: int) -> pb.KvCacheEvent:
    match event:
        case Stored():
            parent = _hash(event.before) if event.before else None
            stored = pb.KvBlocksStored(blocks=[_block(event, page_size)], parent_block_hash=parent)
            return pb.KvCacheEvent(stored=stored)
        case Removed():
            return pb.KvCacheEvent(removed=pb.KvBlocksRemoved(block_hashes=[_hash(event.digest)]))
        case Cleared():
            return pb.KvCacheEvent(cleared=pb.KvCacheCleared())


def _block(page: Stored, page_size: int) -> pb.KvBlock:
    ids = np.frombuffer(page.ids, np.int32).tolist()
    return pb.KvBlock(block_hash=_hash(page.digest), token_ids=ids, block_size=page_size)


def _hash(digest: bytes) -> int:
    """What the protocol has room for."""
    return int.from_bytes(digest[:8], "little", signed=True)
