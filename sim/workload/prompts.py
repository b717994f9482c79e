"""What the prompts of a workload share, and which of its requests wait for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.policies.requests import Prompt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SEGMENTS: Final = "segments"
PREVIOUS: Final = "previous"
THINK_S: Final = "think_s"
ANSWER: Final = "answer"
"""Columns of a plain trace beside arrivals and lengths: what prompts share, who waits for whom, and
which segment of later prompts an output is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompts:
    """Each prompt as a row of named segments; see `voltana.sim.policies.requests.Prompt`."""

    names: IntArray
    """Of all rows' segments, one row after the other. Shape (m,)."""
    tokens: IntArray
    """Of the same segments, all >= 1. Shape (m,)."""
    starts: IntArray
    """Where each row begins, and m. Shape (n + 1,)."""
    answers: IntArray | None = None
    """Name of the segment that each row's output is; None where nobody says. Shape (n,)."""

    @classmethod
    def of_rows(
        cls,
        names: Sequence[Sequence[int]],
        tokens: Sequence[Sequence[int]],
        answers: Sequence[int] | None = None,
    ) -> Prompts:
        """From one list of names and one of lengths a request.

        Args:
            names: Of each prompt's segments.
            tokens: Of the same.
            answers: Name of the segment that each request's output is.
        """
        counts = [len(row) for row in names]
        return cls(
            names=np.fromiter(chain.from_iterable(names), dtype=np.int64),
            tokens=np.fromiter(chain.from_iterable(tokens), dtype=np.int64),
            starts=np.concatenate(([0], np.cumsum(counts, dtype=np.int64))),
            answers=None if answers is None else np.array(answers, dtype=np.int64),
        )

    @classmethod
    def of_blocks(
        cls, blocks: Sequence[Sequence[int]], input_tokens: IntArray, block_tokens: int
    ) -> Prompts:
        """From the hashes of a trace, whose blocks are of one length, but for a prompt's last.

        Args:
            blocks: One list a request: equal numbers are equal tokens behind an equal prefix.
            input_tokens: Of each prompt, shape (n,).
            block_tokens: Of a whole block.

        Raises:
            VoltanaError: A prompt has more or fewer blocks than its length needs.
        """
        numbers: dict[tuple[int, int], int] = {}
        names, tokens = [], []
        for row, (hashes, length) in enumerate(zip(blocks, input_tokens.tolist(), strict=True)):
            needed = -(-length // block_tokens)
            if len(hashes) != needed:
                raise VoltanaError(
                    f"a prompt of {length} tokens must have {needed} blocks of {block_tokens}, got "
                    f"{len(hashes)} (request {row}): mend the row, or leave its hashes out"
                )
            lengths = [block_tokens] * (needed - 1) + [length - block_tokens * (needed - 1)]
            pairs = zip(hashes, lengths, strict=True)
            # a block cut short is another one, should a trace give both one number
            names.append([numbers.setdefault(pair, len(numbers)) for pair in pairs])
            tokens.append(lengths)
        return cls.of_rows(names, tokens)

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Prompts:
        """From the cells that `texts` makes.

        Raises:
            VoltanaError: One is none of its kind.
        """
        names, tokens = [], []
        for row, text in enumerate(texts):
            try:
                pairs = [tuple(map(int, pair.split(":"))) for pair in str(text).split()]
                names.append([name for name, _ in pairs])
                tokens.append([length for _, length in pairs])
            except ValueError:
                raise VoltanaError(
                    f"{SEGMENTS} must be pairs name:tokens of whole numbers with a space between, "
                    f"got {text!r} (request {row})"
                ) from None
        return cls.of_rows(names, tokens)

    def texts(self) -> list[str]:
        """Each prompt as a cell of a file: its segments as name:tokens, in order."""
        pairs = [f"{n}:{t}" for n, t in zip(self.names.tolist(), self.tokens.tolist(), strict=True)]
        return [" ".join(pairs[a:b]) for a, b in pairwise(self.starts.tolist())]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def input_tokens(self) -> IntArray:
        """Length of each prompt, shape (n,)."""
        ends = np.concatenate(([0], np.cumsum(self.tokens)))
        return np.diff(ends[self.starts])

    def prompt(self, row: int) -> Prompt:
        """One of them."""
        part = slice(self.starts[row], self.starts[row + 1])
        return Prompt(self.names[part].tolist(), self.tokens[part].tolist())

    def taken(self, rows: IntArray) -> Prompts:
        """Some of them, in that order."""
        counts = (self.starts[1:] - self.starts[:-1])[rows]
        starts = np.concatenate(([0], np.cumsum(counts)))
        at = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], counts)
        answers = None if self.answers is None else self.answers[rows]
        return Prompts(names=self.names[at], tokens=self.tokens[at], starts=starts, answers=answers)

    def check(self, input_tokens: IntArray, output_tokens: IntArray, name: str) -> None:
        """Refuse segments that are not those of prompts and answers of these lengths.

        Args:
            input_tokens: Of each prompt, shape (n,).
            output_tokens: Of each answer, shape (n,).
            name: Of the workload.

        Raises:
            VoltanaError: A length differs, or one segment's name has two lengths.
        """
        if len(self) != len(input_tokens):
            raise VoltanaError(
                f"{name} must have one prompt a request, {len(input_tokens)}, got {len(self)}"
            )
        if len(self.tokens) and self.tokens.min() < 1:
            raise VoltanaError(f"segments of {name} must have >= 1 token, got {self.tokens.min()}")
        wrong = np.flatnonzero(self.input_tokens != input_tokens)
        if len(wrong):
            row = int(wrong[0])
            raise VoltanaError(
                f"segments of a prompt must add up to its input_tokens, {input_tokens[row]}, got "
                f"{self.input_tokens[row]} (request {row} of {name})"
            )
        names, tokens = self.names, self.tokens
        if self.answers is not None:
            names, tokens = np.append(names, self.answers), np.append(tokens, output_tokens)
        order = np.lexsort((tokens, names))
        names, tokens = names[order], tokens[order]
        twice = np.flatnonzero((np.diff(names) == 0) & (np.diff(tokens) != 0))
        if len(twice):
            at = int(twice[0])
            raise VoltanaError(
                f"segments of one name must have one length, got {tokens[at]} and {tokens[at + 1]} "
                f"tokens (name {names[at]} in {name})"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turns:
    """Which request of a workload waits for whose answer, and how long it comes after that.

    The `arrival_s` of one that waits is its earliest: what it were if answers took no time.
    """

    previous: IntArray
    """The request whose last token it waits for, an earlier row; -1: it waits for none. (n,)."""
    think_s: FloatArray
    """From that token to its arrival, >= 0; 0 where it waits for none. Shape (n,)."""

    def taken(self, rows: IntArray) -> Turns:
        """Some of them, in rising order; one whose predecessor is not among them waits for none."""
        place = np.full(len(self.previous) + 1, -1)
        place[rows] = np.arange(len(rows))
        previous = place[self.previous[rows]]  # of -1, the extra last one: -1
        return Turns(previous=previous, think_s=np.where(previous < 0, 0.0, self.think_s[rows]))

    def check(self, count: int, name: str) -> None:
        """Refuse turns that wait for a later one.

        Raises:
            VoltanaError: So it is, or two wait for one, or a think time is negative.
        """
        if len(self.previous) != count or len(self.think_s) != count:
            raise VoltanaError(f"turns of {name} must be one a request, {count}")
        bad = np.flatnonzero((self.previous >= np.arange(count)) | (self.previous < -1))
        if len(bad):
            row = int(bad[0])
            raise VoltanaError(
                f"previous must be an earlier request or -1, got {self.previous[row]} (request "
                f"{row} of {name})"
            )
        waited_for = self.previous[self.previous >= 0]
        if len(np.unique(waited_for)) != len(waited_for):
            raise VoltanaError(f"at most one turn of {name} may wait for a request")
        if not (np.isfinite(self.think_s).all() and (self.think_s >= 0).all()):
            raise VoltanaError(f"think_s of {name} must be finite and >= 0")
