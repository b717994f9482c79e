"""Token ids of a workload's prompts: what its prompts share these share, and no more."""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np

from voltana.sim.workload.prompts import Prompts
from voltana.sim.workload.workload import Workload

STREAM: Final = 11
"""Spawn key of the random token ids."""


class TokenIds:
    """Makes the ids of each prompt, random but for what they must have in common.

    Without a word on what prompts share, each is drawn by itself. Else a segment has the same ids
    wherever it stands; those that follow one prefix begin differently, for as many of them as the
    vocabulary has ids; and the segment that is an answer repeats the id that is always answered.
    """

    def __init__(
        self,
        workload: Workload,
        vocabulary: tuple[int, int],
        *,
        seed: int,
        salt: int = 0,
        answer_id: int | None = None,
    ) -> None:
        """Nothing is drawn before `of`.

        Args:
            workload: Whose prompts.
            vocabulary: Ids lie from the first to below the second.
            seed: Of the run.
            salt: Other ids for another run.
            answer_id: What the servers answer, whatever they are asked. None: nobody knows, and
                prompts share nothing.
        """
        self._input_tokens = workload.input_tokens
        self._vocabulary = vocabulary
        self._key = seed, salt
        self._answer_id = answer_id
        self._prompts = None if answer_id is None else workload.prompts
        if self._prompts is None:
            return
        answers = self._prompts.answers
        self._answers = frozenset(() if answers is None else answers.tolist())
        self._numbers = {
            name: i for i, name in enumerate(dict.fromkeys(self._prompts.names.tolist()))
        }
        begins = [i for i in range(*vocabulary) if i != answer_id]
        ranks = _ranks(self._prompts)
        self._begins = {name: begins[rank % len(begins)] for name, rank in ranks.items()}

    def of(self, request_id: int) -> list[int]:
        """Ids of one prompt."""
        if self._prompts is None:
            return self._draw(request_id, int(self._input_tokens[request_id]))
        prompt = self._prompts.prompt(request_id)
        starts = [0, *prompt.ends[:-1]]
        found: list[int] = []
        for name, start, end in zip(prompt.names, starts, prompt.ends, strict=True):
            found += self._segment(name, end - start)
        return found

    def _segment(self, name: int, tokens: int) -> list[int]:
        if name in self._answers:
            assert self._answer_id is not None
            return [self._answer_id] * tokens
        return [self._begins[name], *self._draw(self._numbers[name], tokens)[1:]]

    def _draw(self, number: int, tokens: int) -> list[int]:
        seed, salt = self._key
        seeds = np.random.SeedSequence(seed, spawn_key=(STREAM, salt, number))
        ids: list[int] = np.random.default_rng(seeds).integers(*self._vocabulary, tokens).tolist()
        return ids


def _ranks(prompts: Prompts) -> dict[int, int]:
    """By name, which segment it is of those that follow the prefix at which it first stands."""
    places: dict[tuple[int, int], int] = {}
    followers: Counter[int] = Counter()
    found: dict[int, int] = {}
    for row in range(len(prompts)):
        place = 0
        for name in prompts.prompt(row).names:
            if (place, name) not in places:
                places[place, name] = len(places) + 1
                if name not in found:
                    found[name] = followers[place]
                followers[place] += 1
            place = places[place, name]
    return found
