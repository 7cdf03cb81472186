"""The prefix tree: full, verified pages by the tokens in them and before them."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from glmjax.serving.pool import Lease, Pool


class Prefix(NamedTuple):
    """What a page is of: nothing but these tokens, in this order, gives these rows.

    Attributes:
        namespace: what must be the same beside the tokens: model, adapter, a tenant's salt.
        digest: SHA-256 of the tokens of its last page and the digest of those before.
        pages: how many it takes.
    """

    namespace: Hashable
    digest: bytes = b""
    pages: int = 0

    def then(self, page: bytes) -> Prefix:
        """With the tokens of another page, as int32 bytes."""
        return Prefix(self.namespace, hashlib.sha256(self.digest + page).digest(), self.pages + 1)


class Node:
    """A page in the tree.

    Attributes:
        lease: the page.
        parent: the page before it; None for a root, which has no page.
        key: the page's tokens, as int32 bytes.
        prefix: all tokens up to its end.
        children: the pages after it, by their tokens.
        used: when it was last matched or inserted.
    """

    __slots__ = ("children", "key", "lease", "parent", "prefix", "used")

    def __init__(self, lease: Lease | None, parent: Node | None, key: bytes, prefix: Prefix):
        self.lease, self.parent, self.key, self.prefix = lease, parent, key, prefix
        self.children: dict[bytes, Node] = {}
        self.used = 0


@runtime_checkable
class Watcher(Protocol):
    """Is told of every page that comes and goes."""

    def stored(self, node: Node) -> None:
        """A page can be found; the one before it could before."""

    def removed(self, node: Node) -> None:
        """A page cannot be found any more; nor could the ones after it."""


class PrefixTree:
    """Which pages hold what, for whoever begins with the same tokens.

    A page depends on all tokens up to its end and on nothing after it, so it belongs below the page of the tokens before
    it. The tree holds one reference to each of its pages.

    Args:
        pool: of the pages.
        page_size: A, tokens of a page.
        watcher: is told of every page; or None.
    """

    def __init__(self, pool: Pool, page_size: int, watcher: Watcher | None = None):
        self._pool, self._page_size, self._watcher = pool, page_size, watcher
        self._roots: dict[Hashable, Node] = {}
        self._nodes: dict[Lease, Node] = {}
        self._clock = itertools.count(1)
        self._oldest: list[
            tuple[int, int, Lease]
        ] = []  # (used, order, lease): what may have changed since is looked up

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, lease: Lease) -> bool:
        return lease in self._nodes

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._nodes)

    def match(self, ids: Sequence[int] | np.ndarray, namespace: Hashable = None) -> list[Lease]:
        """The pages of the longest cached prefix, in order. They are not shared yet: that is the caller's to do.

        Args:
            ids: tokens.
            namespace: what must be the same beside the tokens: model, adapter, a tenant's salt.
        """
        node, found = self._roots.get(namespace), []
        for key in keys(ids, self._page_size) if node else ():
            if (node := node.children.get(key)) is None:
                break
            found.append(node)
        self._touch(found)
        return [node.lease for node in found]

    def insert(self, ids: Sequence[int] | np.ndarray, leases: Sequence[Lease], namespace: Hashable = None) -> int:
        """Keep full pages; where the tree has a page of the same tokens already, it keeps its own.

        Args:
            ids: the tokens of the pages, at least as many as fill them.
            leases: held by the caller, in order, every one of them full and verified.
            namespace: as for `match`.

        Returns:
            How many pages are new to the tree.

        Raises:
            ValueError: there are fewer tokens than pages.
        """
        if len(ids) < len(leases) * self._page_size:
            raise ValueError(f"{len(ids)} tokens do not fill {len(leases)} pages of {self._page_size}")
        if not leases:
            return 0
        node, path, new = self._roots.setdefault(namespace, Node(None, None, b"", Prefix(namespace))), [], 0
        for key, lease in zip(keys(ids, self._page_size), leases, strict=False):
            child = node.children.get(key)
            if child is None:
                self._pool.share([lease])
                child = node.children[key] = self._nodes[lease] = Node(lease, node, key, node.prefix.then(key))
                new += 1
                if self._watcher is not None:
                    self._watcher.stored(child)
            path.append(child)
            node = child
        self._touch(path)
        return new

    def evict(self, count: int) -> list[tuple[Prefix, Lease]]:
        """Let go of up to `count` pages that nobody else holds, the longest unused first, leaves before their parents.

        Returns:
            What it let go of. The pages hold it until they are retired.
        """
        gone, held = [], []
        while len(gone) < count and self._oldest:
            used, order, lease = heapq.heappop(self._oldest)
            node = self._nodes.get(lease)
            if node is None or node.used != used or node.children:
                continue  # gone or used since, or an inner page, which comes up again when its last child goes
            if self._pool.references(lease) > 1:
                held.append((used, order, lease))
                continue
            gone.append((node.prefix, lease))
            self._drop(node)
        for entry in held:
            heapq.heappush(self._oldest, entry)
        return gone

    def remove(self, leases: Sequence[Lease]) -> list[Lease]:
        """Let go of these pages and of all that depend on them; the pages that left the tree."""
        gone: list[Lease] = []
        for lease in leases:
            if lease in self._nodes:
                below = [self._nodes[lease]]
                for node in below:
                    below.extend(node.children.values())
                for node in reversed(below):
                    gone.append(node.lease)
                    self._drop(node)
        return gone

    def clear(self) -> list[Lease]:
        """Let go of everything."""
        return self.remove([node.lease for root in list(self._roots.values()) for node in root.children.values()])

    def nodes(self) -> Iterator[Node]:
        """Its pages, each after the one before it."""
        below = list(self._roots.values())
        for node in below:
            below.extend(node.children.values())
            if node.lease is not None:
                yield node

    def paths(self) -> Iterator[tuple[tuple[int, ...], tuple[Lease, ...], Hashable]]:
        """Tokens and pages from the beginning to each leaf, and its namespace."""
        for node in list(self._nodes.values()):
            if not node.children:
                path = []
                while node.lease is not None:
                    path.append(node)
                    node = node.parent
                ids = np.frombuffer(b"".join(step.key for step in reversed(path)), np.int32)
                yield tuple(ids.tolist()), tuple(step.lease for step in reversed(path)), path[0].prefix.namespace

    def check(self) -> None:
        """Pages and paths agree.

        Raises:
            AssertionError: naming what does not.
        """
        found = {}
        for root in self._roots.values():
            assert root.children, "an empty namespace was kept"
            below = [root]
            for node in below:
                for key, child in node.children.items():
                    assert child.parent is node, f"{child.lease} has another parent"
                    assert child.key == key, f"{child.lease} stands at other tokens"
                    assert child.prefix == node.prefix.then(key), f"{child.lease} goes by other tokens"
                    assert child.used <= node.used or node is root, f"{child.lease} was used after its parent"
                    found[child.lease] = child
                    below.append(child)
        assert found == self._nodes, "the index of pages differs from the tree"
        waiting = {(used, lease) for used, _, lease in self._oldest}
        leaves = {(node.used, lease) for lease, node in found.items() if not node.children}
        assert leaves <= waiting, "a leaf could never be evicted"

    def _touch(self, path: Sequence[Node]) -> None:
        """Used now: a page never later than the one before it, so that a leaf is the oldest of its path."""
        now = next(self._clock)
        for node in path:
            node.used = now
        if path:
            self._wait(path[-1])

    def _wait(self, node: Node) -> None:
        """Let a leaf come up for eviction at the time it was used."""
        if not node.children:
            heapq.heappush(self._oldest, (node.used, next(self._clock), node.lease))
        if len(self._oldest) > 2 * len(self._nodes) + 64:  # most are of times that have passed
            leaves = (node for node in self._nodes.values() if not node.children)
            self._oldest = [(node.used, next(self._clock), node.lease) for node in leaves]
            heapq.heapify(self._oldest)

    def _drop(self, node: Node) -> None:
        parent = node.parent
        del parent.children[node.key], self._nodes[node.lease]
        if self._watcher is not None:
            self._watcher.removed(node)
        self._pool.release([node.lease])
        if parent.lease is not None:
            self._wait(parent)
        elif not parent.children:
            self._roots = {name: root for name, root in self._roots.items() if root is not parent}


def keys(ids: Sequence[int] | np.ndarray, page_size: int) -> Iterator[bytes]:
    """The tokens of each full page, as int32 bytes."""
    ids = np.asarray(ids, np.int32)
    for begin in range(0, len(ids) - page_size + 1, page_size):
        yield ids[begin : begin + page_size].tobytes()


def common_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    most = min(len(a), len(b))
    differing = np.flatnonzero(np.asarray(a[:most]) != np.asarray(b[:most]))
    return int(differing[0]) if len(differing) else most
