"""The paged KV cache: a functional pytree with explicit versions, so that a race cannot emit a token.

**Leases.** A page has a version, which changes when it is retired and at no other time. Whoever uses a page names the
version it was given; `verdict` compares all of them at the head of a program, and a sequence with a stale one, or whose
pages do not hold exactly the rows it counts on, takes no part in it: nothing of it is read, written or emitted.
A late transfer into a page that has changed hands finds another version and is dropped.

**Order.** All programs on a cache are ordered by data flow, since each takes the cache that the one before returned. So
a page may be leased again as soon as the program that retires it has been dispatched.

**A page record is atomic**: latents, index keys and MTP rows of all layers, and the tail, are collected and landed as
one, and become visible as one, when `ready_G` says so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from glmjax.model.cache import empty_rows
from glmjax.model.config import GlmConfig
from glmjax.pallas.rows import Rows

OK, STALE, UNREADY = 0, 1, 2
"""Verdicts on a sequence's pages: as they were granted; one has another version, or rows that are not this sequence's;
one has not got all of its rows yet."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Pages of all sequences, donated to every program, which returns the next epoch.

    Attributes:
        latents: rows [L, G, A, C]; the MTP layer's last.
        index_keys: rows [L', G, A, J] of the layers with an indexer.
        tail_GD: hidden state after the final norm at the page's last position, in the model's dtype.
        version_G: int32, how often the page has been retired.
        ready_G: int32, the page's rows that hold what they should, 0..A, from its first on.
        epoch: int32, programs applied so far.
        versioned: whether versions and readiness are looked at. False is for measuring what they are good for.
    """

    latents: Rows
    index_keys: Rows
    tail_GD: Any
    version_G: Any
    ready_G: Any
    epoch: Any
    versioned: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def create(
        cls,
        config: GlmConfig,
        pages: int,
        page_size: int,
        dtype: Any,
        *,
        tail_dtype: Any,
        mtp: bool,
        versioned: bool = True,
    ) -> PagedCache:
        """An empty cache.

        Args:
            config: the model's.
            pages: G.
            page_size: A, rows of a page.
            dtype: of the rows; `glmjax.model.cache.FP8` packs them.
            tail_dtype: the model's: what follows a prefix hit must not depend on how rows are stored.
            mtp: whether the MTP layer has rows.
            versioned: see above.
        """
        extra = int(mtp)
        layers, indexers = config.num_hidden_layers + extra, config.indexer_types.count("full") + extra
        latents, keys = empty_rows(config, pages, page_size, dtype, tail_dtype, layers=layers, indexers=indexers)
        return cls(
            latents=latents,
            index_keys=keys,
            tail_GD=jnp.zeros((pages, config.hidden_size), tail_dtype),
            version_G=jnp.zeros(pages, jnp.int32),
            ready_G=jnp.zeros(pages, jnp.int32),
            epoch=jnp.int32(0),
            versioned=versioned,
        )

    @property
    def page_size(self) -> int:
        """A."""
        return self.latents.page_size

    @property
    def pages(self) -> int:
        """G."""
        return self.version_G.shape[0]

    @property
    def page_bytes(self) -> int:
        """Of one page: rows and tail."""
        of = self.latents.values_LGAC, self.index_keys.values_LGAC, self.tail_GD
        return sum(array.nbytes for array in of) // self.pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """What each sequence of a program was granted: its pages in order, from its first token on.

    Attributes:
        pages_BM: int32, −1 after the last.
        versions_BM: int32, of the leases.
    """

    pages_BM: Any
    versions_BM: Any

    def capacity_B(self, page_size: int) -> Int32[Array, "B"]:
        """Rows granted to each sequence."""
        return jnp.sum(self.pages_BM >= 0, axis=1, dtype=jnp.int32) * page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageRecords:
    """Z pages outside the cache: offloaded, in transfer, or about to land.

    Attributes:
        latents: rows [L, Z, A, C], as they are stored.
        index_keys: rows [L', Z, A, J].
        tail_ZD: hidden state at the last position, of full pages.
        ready_Z: int32, rows that hold what they should.
    """

    latents: Rows
    index_keys: Rows
    tail_ZD: Any
    ready_Z: Any


def verdict(cache: PagedCache, table: PageTable, length_B: Int[Array, "B"]) -> Int32[Array, "B"]:
    """Whether each sequence's pages are as it was granted them: `OK`, `STALE` or `UNREADY`.

    Every granted page counts, those that are only to be written too: a row that is dropped because its page has another
    owner must not be read in that page afterwards. And every page must hold exactly the rows that the sequence counts
    on: more than these are somebody else's.

    Args:
        cache: before the program.
        table: leases.
        length_B: rows that each sequence has; −1 for an idle one, which is always OK.
    """
    granted_BM = table.pages_BM >= 0
    page_BM = jnp.where(granted_BM, table.pages_BM, 0)
    begin_M = jnp.arange(granted_BM.shape[1], dtype=jnp.int32) * cache.page_size
    wanted_BM = jnp.clip(length_B[:, None] - begin_M, 0, cache.page_size)
    ready_BM = jnp.where(granted_BM, cache.ready_G[page_BM], 0)
    another_BM = granted_BM & (cache.version_G[page_BM] != table.versions_BM)
    stale_B = jnp.any(another_BM | (ready_BM > wanted_BM), axis=1)
    unready_B = jnp.any(ready_BM < wanted_BM, axis=1)
    fault_B = jnp.where(stale_B, STALE, jnp.where(unready_B, UNREADY, OK))
    return jnp.where((length_B >= 0) & cache.versioned, fault_B, OK).astype(jnp.int32)


def advance(cache: PagedCache, table: PageTable, length_B: Int[Array, "B"]) -> Int32[Array, "G"]:
    """`ready_G` with `length_B` rows in the pages of each sequence; −1 for one that took no part."""
    begin_M = jnp.arange(table.pages_BM.shape[1], dtype=jnp.int32) * cache.page_size
    ready_BM = jnp.clip(length_B[:, None] - begin_M, 0, cache.page_size)
    page_BM = jnp.where((length_B[:, None] >= 0) & (table.pages_BM >= 0), table.pages_BM, cache.pages)
    return cache.ready_G.at[page_BM].set(ready_BM, mode="drop")


def retire(cache: PagedCache, page_Z: Int[Array, "Z"]) -> PagedCache:
    """With new versions for these pages (−1 for none), and nothing ready in them."""
    page_Z = jnp.where(page_Z >= 0, page_Z, cache.pages)
    version_G = cache.version_G.at[page_Z].add(1, mode="drop")
    return dataclasses.replace(cache, version_G=version_G, ready_G=cache.ready_G.at[page_Z].set(0, mode="drop"))


def collect(
    cache: PagedCache, page_Z: Int[Array, "Z"], version_Z: Int[Array, "Z"], upto_Z: Int[Array, "Z"]
) -> tuple[PageRecords, Bool[Array, "Z"]]:
    """The records of leased pages, and which of them are what was asked for.

    Args:
        cache: not changed.
        page_Z: pages; −1 for none.
        version_Z: of the leases.
        upto_Z: rows to take of each; a sibling may have written more.
    """
    page_Z = jnp.clip(page_Z, -1, cache.pages - 1)
    at_Z = jnp.maximum(page_Z, 0)
    as_leased_Z = (cache.version_G[at_Z] == version_Z) & (cache.ready_G[at_Z] >= upto_Z)
    ok_Z = (page_Z >= 0) & (as_leased_Z | (not cache.versioned))
    records = PageRecords(
        latents=cache.latents.pages(at_Z),
        index_keys=cache.index_keys.pages(at_Z),
        tail_ZD=cache.tail_GD[at_Z],
        ready_Z=jnp.where(ok_Z, upto_Z, 0).astype(jnp.int32),
    )
    return records, ok_Z


def land(
    cache: PagedCache, page_Z: Int[Array, "Z"], version_Z: Int[Array, "Z"], records: PageRecords
) -> tuple[PagedCache, Bool[Array, "Z"]]:
    """With records written into leased pages in which nothing is ready, and which of them were: the others are dropped.

    Args:
        cache: donated.
        page_Z: where to; −1 for none.
        version_Z: of the leases.
        records: what.
    """
    at_Z = jnp.clip(page_Z, 0, cache.pages - 1)
    as_leased_Z = (cache.version_G[at_Z] == version_Z) & (cache.ready_G[at_Z] == 0)
    ok_Z = (page_Z == at_Z) & (records.ready_Z > 0) & (as_leased_Z | (not cache.versioned))
    to_Z = jnp.where(ok_Z, page_Z, cache.pages)
    cache = dataclasses.replace(
        cache,
        latents=cache.latents.with_pages(to_Z, records.latents),
        index_keys=cache.index_keys.with_pages(to_Z, records.index_keys),
        tail_GD=cache.tail_GD.at[to_Z].set(records.tail_ZD, mode="drop"),
        ready_G=cache.ready_G.at[to_Z].set(records.ready_Z, mode="drop"),
    )
    return cache, ok_Z


def tails_after(
    tail_GD: Float[Array, "G D"],
    page_size: int,
    table: PageTable,
    begin_B: Int[Array, "B"],
    count_B: Int[Array, "B"],
    hidden_BTD: Float[Array, "B T D"],
) -> Float[Array, "G D"]:
    """`tail_GD` with the hidden states of those tokens of a stretch that are the last of their page.

    Args:
        tail_GD: donated.
        page_size: A.
        table: of the sequences.
        begin_B: position of each stretch's first token.
        count_B: tokens of each stretch that count; 0 for a sequence that takes no part.
        hidden_BTD: after the final norm.
    """
    pages, length = tail_GD.shape[0], hidden_BTD.shape[1]
    end_BE = (begin_B // page_size + 1)[:, None] * page_size - 1
    end_BE = end_BE + jnp.arange(-(-length // page_size), dtype=jnp.int32) * page_size
    offset_BE = end_BE - begin_B[:, None]
    hidden_BED = jnp.take_along_axis(hidden_BTD, jnp.clip(offset_BE, 0, length - 1)[..., None], axis=1)
    entry_BE = jnp.clip(end_BE // page_size, 0, table.pages_BM.shape[1] - 1)
    page_BE = jnp.take_along_axis(table.pages_BM, entry_BE, axis=1)
    page_BE = jnp.where((offset_BE < count_B[:, None]) & (page_BE >= 0), page_BE, pages)
    return tail_GD.at[page_BE].set(hidden_BED.astype(tail_GD.dtype), mode="drop")


def tails_before(cache: PagedCache, table: PageTable, begin_B: Int[Array, "B"]) -> Float[Array, "B D"]:
    """Hidden state of the token before each position, which is a page's first; zeros at the very beginning."""
    entry_B1 = jnp.clip(begin_B // cache.page_size - 1, 0, table.pages_BM.shape[1] - 1)[:, None]
    page_B = jnp.maximum(jnp.take_along_axis(table.pages_BM, entry_B1, axis=1)[:, 0], 0)
    return jnp.where((begin_B > 0)[:, None], cache.tail_GD[page_B], 0)
