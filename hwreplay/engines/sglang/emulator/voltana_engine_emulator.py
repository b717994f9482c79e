"""SGLang plug-in (entry point group `sglang.srt.plugins`): a profile's card in place of the model.

Scheduler, batching, KV pool, transfer, metrics and HTTP stay SGLang's own. Only `model.forward`,
which SGLang calls inside its timer, is replaced: it lets the time go by that the profile states for
the batch and the card's clock, books the energy, and answers with fixed logits. Nothing reads the
text. An idle scheduler with requests under way polls without a pause; here it naps, as it would
take the cores from the other servers.

VOLTANA_EMULATE holds JSON, written by `voltana.hwreplay.emulated.plan`. Without it nothing happens.
"""

from __future__ import annotations

import json
import os
import sys
import time

ENVIRONMENT = "VOLTANA_EMULATE"
LOAD = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
RUN = "sglang.srt.managers.scheduler.Scheduler.run_batch"
IDLE = "sglang.srt.managers.scheduler.Scheduler.on_idle"
NAP_S = 200e-6
TOKEN = 3
"""What is always answered; any id but the end's would do."""


class EmulatedModel:
    """Stands in for `forward` of the model that one rank has loaded."""

    def __init__(self, plan: dict, model: object, rank: int) -> None:
        import torch
        from voltana.hwreplay.emulated.plan import Passes, open_silicon
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        self._answer = LogitsProcessorOutput
        self._silicon = open_silicon(plan, rank)
        self._passes = Passes(plan["passes"]) if rank == 0 else None
        self._logits = torch.zeros(plan["max_requests"], model.config.vocab_size)
        self._logits[:, TOKEN] = 1.0
        self.num_decoding = 0
        """Requests at the end of a mixed batch that get a token; the rest are prompts."""

    def forward(self, input_ids, positions, forward_batch, **_options):  # noqa: ANN001, ANN202
        mode = forward_batch.forward_mode
        if not mode.is_idle():
            ended = self._silicon.run(self._work(forward_batch, mode))
            if self._passes is not None:
                self._passes.keep(ended)
        return self._answer(next_token_logits=self._logits[: forward_batch.batch_size])

    def rest(self) -> None:
        self._silicon.rest()

    def _work(self, forward_batch, mode):  # noqa: ANN001, ANN202
        from voltana.hwreplay.emulated.silicon import Work, effective_batch

        if mode.is_decode():
            return Work(decode=(forward_batch.batch_size, int(forward_batch.seq_lens_sum)))
        chunks = list(forward_batch.extend_seq_lens_cpu)
        prefixes = list(forward_batch.extend_prefix_lens_cpu)
        number = self.num_decoding  # not by the mode: SGLang runs a mixed batch as an extend one
        prompts = len(chunks) - number
        context = sum(chunks[prompts:]) + sum(prefixes[prompts:])
        chunks, prefixes = chunks[:prompts], prefixes[:prompts]
        equal = effective_batch(chunks, prefixes)
        return Work(decode=(number, context), chunk=(equal, sum(chunks)))


def register() -> None:
    """Called by SGLang in each of its processes."""
    text = os.environ.get(ENVIRONMENT)
    if not text:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.runtime_context import get_parallel

    plan = json.loads(text)
    made: list[EmulatedModel] = []

    def after_load(result, runner, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        sys.path.append(plan["code"])  # last, so that the engine's own packages win
        made.append(EmulatedModel(plan, runner.model, get_parallel().tp_rank))
        runner.model.forward = made[-1].forward
        return result

    def around_run(original, scheduler, batch, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        for model in made:
            model.num_decoding = len(batch.decoding_reqs or ())
        return original(scheduler, batch, *args, **kwargs)

    def around_idle(original, scheduler, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        for model in made:
            model.rest()
        if not scheduler.is_fully_idle():
            time.sleep(NAP_S)
        return original(scheduler, *args, **kwargs)

    HookRegistry.register(LOAD, after_load, HookType.AFTER)
    HookRegistry.register(RUN, around_run, HookType.AROUND)
    HookRegistry.register(IDLE, around_idle, HookType.AROUND)
