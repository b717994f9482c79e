"""A prefix cache in the plainest way: every cached token is an entry of its own.

SGLang's tree evicts pieces, not tokens: what one prompt had beyond others is a piece, which is cut
where a later prompt parts from it. Here a token knows whether a piece begins with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Token:
    """One cached token behind one prefix."""

    before: Token | None
    begins: bool = False
    used: int = 0
    locks: int = 0
    after: dict[Hashable, Token] = field(default_factory=dict)


class TokenCache:
    """Prefixes, and memory that running requests have of the same budget."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nothing = Token(None)
        self.computing = 0
        """Tokens of the running batch."""
        self.evicted = 0
        self._time = 0

    def all(self) -> list[Token]:
        """Every cached token."""
        found: list[Token] = []
        seen = [self.nothing]
        while seen:
            token = seen.pop()
            found += token.after.values()
            seen += token.after.values()
        return found

    def room(self) -> int:
        """Memory that is free, or would be if everything without a lock went."""
        return self.capacity - self.computing - sum(t.locks > 0 for t in self.all())

    def find(self, prompt: Sequence[Hashable]) -> list[Token]:
        """The cached tokens that a prompt begins with; they are in use now."""
        self._time += 1
        now, path, at = self._time, [], self.nothing
        for name in prompt:
            if name not in at.after:
                break
            at = at.after[name]
            at.used = now
            path.append(at)
        rest = [t for t in at.after.values() if not t.begins] if path else []
        if rest:  # it ends inside a piece: the rest of it is a piece now, and in use too
            rest[0].begins = True
            self._use_piece(rest[0], now)
            self._time += 1
            for token in self._piece(at):
                token.used = self._time
        return path

    def keep(self, prompt: Sequence[Hashable]) -> list[Token]:
        """All tokens of a prompt are there from now on."""
        path = self.find(prompt)
        known = len(path)
        self._time += 1
        for k in range(known, len(prompt)):
            before = path[-1] if path else self.nothing
            token = Token(before, begins=k == known, used=self._time)
            before.after[prompt[k]] = token
            path.append(token)
        return path

    def take(self, tokens: int) -> None:
        """Memory for a batch; the piece at an end that was used longest ago goes first."""
        self.computing += tokens
        self.free(0)

    def free(self, tokens: int) -> None:
        """Drop pieces until so many tokens are free, or all that is left is in use."""
        cached = len(self.all())
        while cached + self.computing + tokens > self.capacity:
            ends = [t for t in self.all() if not t.after and not t.locks]
            if not ends:
                return
            gone = self._piece(min(ends, key=lambda t: t.used))
            cached -= len(gone)
            self.evicted += len(gone)
            root = gone[-1].before
            assert root is not None
            root.after = {k: t for k, t in root.after.items() if t is not gone[-1]}

    @staticmethod
    def _piece(end: Token) -> list[Token]:
        """Its tokens, the last one first."""
        piece = [end]
        while not piece[-1].begins:
            before = piece[-1].before
            assert before is not None
            piece.append(before)
        return piece

    @staticmethod
    def _use_piece(first: Token, now: int) -> None:
        token: Token | None = first
        while token is not None:
            token.used = now
            token = next((t for t in token.after.values() if not t.begins), None)
