"""Agents: a model call, a tool, its output into the next call's prompt, until the task is done.

Synthetic. Its numbers are ours, chosen so that prompts and answers have about the means of
Mooncake's "Tool and Agent" trace, 8,596 and 182 tokens (README of the trace release,
kvcache-ai/Mooncake, FAST '25): the trace itself does not say which requests belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from voltana.sim.policies.spec import parameter
from voltana.sim.workload.sessions.session import Session, cut_to_context, thinks_s

LINE: Final = (
    "agents at work, synthetic: an instruction that many share, a model call a step, tools in"
    " between (agent:steps=6,tool=3)"
)
ANSWER_TOKENS: Final = 182
"""Mean of the trace; geometric, ours."""
MOST_KINDS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentParameters:
    """How agents work; all ours, see the module."""

    steps: float = parameter(6.0, "mean model calls of a task (geometric)", low=1.0)
    tool_s: float = parameter(3.0, "mean time a tool takes (exponential)", low=0.0)
    kinds: int = parameter(4, "agents with an instruction of their own", low=1, high=MOST_KINDS)
    instruction_tokens: int = parameter(4_000, "instruction and tools of each kind", low=1)
    task_tokens: int = parameter(500, "mean of what a task adds (exponential)", low=1)
    result_tokens: int = parameter(600, "mean of what a tool returns (exponential)", low=1)
    longest_tokens: int = parameter(32_768, "context at which a task ends", low=2)
    waits: bool = parameter(True, "a call waits for the answer; false: as if that took no time")
    num_shared: ClassVar[int] = MOST_KINDS
    """Names of segments that belong to no single session."""


def draw_task(parameters: AgentParameters, rng: np.random.Generator) -> Session:
    """One task of a random kind of agent."""
    count = int(rng.geometric(1.0 / parameters.steps))
    asked = np.ceil(parameters.result_tokens * rng.standard_exponential(count)).astype(np.int64)
    asked[0] = int(np.ceil(parameters.task_tokens * rng.standard_exponential()))
    session = Session(
        opening=(int(rng.integers(parameters.kinds)),),
        opening_tokens=(parameters.instruction_tokens,),
        asked_tokens=np.maximum(asked, 1).tolist(),
        answer_tokens=rng.geometric(1.0 / ANSWER_TOKENS, count).tolist(),
        think_s=thinks_s(count, parameters.tool_s, rng),
    )
    return cut_to_context(session, parameters.longest_tokens)
