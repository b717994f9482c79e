"""A cache of prompts' prefixes: SGLang's radix tree, with segments in place of tokens.

Source: `mem_cache/radix_cache.py` of SGLang 0.5.23. A node holds what one prompt had beyond others;
it is split where a later prompt parts from it, and evicted whole. Segments make it cheap: what
prompts share is compared by name, and only a cut inside a segment is a number of tokens.
"""

from __future__ import annotations

from heapq import heappop, heappush

from voltana.sim.policies.requests import Prompt


class Node:
    """Tokens `start` to `end` of all prompts that go through it."""

    __slots__ = (
        "below", "children", "end", "first", "is_listed", "locks", "names", "parent", "start",
        "touched",
    )  # fmt: skip

    def __init__(
        self, parent: Node | None, names: list[int], first: int, start: int, end: int, touched: int
    ) -> None:
        """A node without children.

        Args:
            parent: Of whose tokens its own are the continuation; None for the root.
            names: Segments that it has tokens of, the first and the last perhaps in part.
            first: Which segment of a prompt the first of them is.
            start: Tokens before it.
            end: Tokens before its children.
            touched: When it was last used, as a count.
        """
        self.parent = parent
        self.names = names
        self.first = first
        self.start = start
        self.end = end
        self.touched = touched
        self.below = 0
        """Which segment of a prompt its children begin with, or in."""
        self.children: dict[int, Node] = {}
        """By the segment that they begin with."""
        self.locks = 0
        self.is_listed = False
        """Whether the heap of leaves knows it."""


class RadixCache:
    """Prefixes in a memory that they share with running requests; the least recently used go.

    Whoever computes tokens calls `hold` first, and `insert` when they are there.
    """

    def __init__(self, capacity_tokens: int) -> None:
        """An empty cache in a memory of that many tokens."""
        self.capacity_tokens = capacity_tokens
        self.size_tokens = 0
        """In the tree."""
        self.locked_tokens = 0
        """In the tree, and in use by a request."""
        self.held_tokens = 0
        """Being computed, not in the tree yet."""
        self.evicted_tokens = 0
        self.root = Node(None, [], 0, 0, 0, 0)
        self._time = 0
        self._leaves: list[tuple[int, int, Node]] = []
        """(when touched, number, node): a heap, whose times may be old."""
        self._number = 0

    @property
    def available_tokens(self) -> int:
        """Free, or could be evicted."""
        return self.capacity_tokens - self.held_tokens - self.locked_tokens

    def count(self, prompt: Prompt, limit: int, *, locked: bool = False) -> int:
        """How many of the first `limit` tokens are here, or in use; nothing is touched."""
        node, names = self.root, prompt.names
        while node.end < limit:
            child = node.children.get(names[node.below])
            if child is None or (locked and child.locks == 0):
                break
            end = _common_end(child, prompt, limit)
            if end < child.end:
                return end
            node = child
        return node.end

    def match(self, prompt: Prompt, limit: int) -> Node:
        """The node at which the cached part of the first `limit` tokens ends, split off for it."""
        self._time += 1
        now, node, names = self._time, self.root, prompt.names
        while node.end < limit:
            child = node.children.get(names[node.below])
            if child is None:
                break
            child.touched = now
            end = _common_end(child, prompt, limit)
            if end < child.end:
                return self._split(child, prompt, end)
            node = child
        return node

    def insert(self, prompt: Prompt, limit: int) -> Node:
        """Put the first `limit` tokens in; returns the node at which they end."""
        node = self.match(prompt, limit)
        if node.end == limit:
            return node
        first, ends = node.below, prompt.ends
        last = first
        while ends[last] < limit:
            last += 1
        leaf = Node(node, prompt.names[first : last + 1], first, node.end, limit, self._tick())
        leaf.below = last + (ends[last] == limit)
        node.children[leaf.names[0]] = leaf
        self.size_tokens += limit - node.end
        self._list(leaf)
        return leaf

    def lock(self, node: Node) -> None:
        """Somebody uses the tokens up to here: they stay."""
        at: Node = node
        while at.parent is not None:
            if at.locks == 0:
                self.locked_tokens += at.end - at.start
            at.locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        """Somebody is done with them."""
        at: Node = node
        while at.parent is not None:
            at.locks -= 1
            if at.locks == 0:
                self.locked_tokens -= at.end - at.start
                if not at.children:
                    self._list(at)
            at = at.parent

    def hold(self, tokens: int) -> None:
        """Take memory for tokens that are to be computed, from prefixes where it must be."""
        self.held_tokens += tokens
        self.free(0)

    def free(self, tokens: int) -> None:
        """Drop prefixes until so many tokens of memory are free, or none is left to drop."""
        self._evict(tokens + self.held_tokens + self.size_tokens - self.capacity_tokens)

    def clear(self) -> None:
        """Lose everything, which is no eviction; nobody may hold anything."""
        assert not self.locked_tokens
        assert not self.held_tokens
        self.root = Node(None, [], 0, 0, 0, 0)
        self.size_tokens = 0
        self._leaves.clear()

    def _split(self, lower: Node, prompt: Prompt, end: int) -> Node:
        """Cut a node in two; returns the upper one, which is new."""
        parent, first, ends = lower.parent, lower.first, prompt.ends
        assert parent is not None
        last = first
        while ends[last] < end:
            last += 1
        count = last + 1 - first
        upper = Node(parent, lower.names[:count], first, lower.start, end, self._tick())
        is_whole = ends[last] == end
        upper.below = last + is_whole
        upper.locks = lower.locks
        lower.names = lower.names[count - (not is_whole) :]
        lower.first, lower.start, lower.parent = upper.below, end, upper
        parent.children[upper.names[0]] = upper
        upper.children[lower.names[0]] = lower
        return upper

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def _list(self, leaf: Node) -> None:
        if not leaf.is_listed:
            leaf.is_listed = True
            self._number += 1
            heappush(self._leaves, (leaf.touched, self._number, leaf))

    def _evict(self, tokens: int) -> None:
        """Drop whole leaves, the least recently used first, until so many tokens are gone."""
        while tokens > 0 and self._leaves:
            touched, _, leaf = heappop(self._leaves)
            leaf.is_listed = False
            parent = leaf.parent
            if parent is None or leaf.locks or leaf.children:
                continue
            if leaf.touched != touched:
                self._list(leaf)
                continue
            gone = leaf.end - leaf.start
            tokens -= gone
            self.size_tokens -= gone
            self.evicted_tokens += gone
            del parent.children[leaf.names[0]]
            leaf.parent = None
            if parent.parent is not None and not parent.children and parent.locks == 0:
                self._list(parent)


def _common_end(node: Node, prompt: Prompt, limit: int) -> int:
    """Up to which token the node and the first `limit` of a prompt that reaches it are the same.

    The prompt's next segment has the name of the node's first.
    """
    names, first = node.names, node.first
    count = len(names)
    if prompt.names[first : first + count] == names:
        return min(node.end, limit)
    theirs = prompt.names
    k = 1
    while k < count and first + k < len(theirs) and theirs[first + k] == names[k]:
        k += 1
    return min(prompt.ends[first + k - 1], node.end, limit)
