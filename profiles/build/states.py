"""States out of service of the shipped profiles: `python -m voltana.profiles.build.states`.

All modelled, from few numbers with a source each. A card without a CUDA context draws less by what
a context costs; an instance that sleeps has its weights in the host's memory and gets them back
over PCIe, each card over its own link; one that is stopped reads them from disk and starts anew.
Of no card in service is any of this measured here.

Sources:
    What a context draws above a bare card: arXiv 2605.23918 (A100 80.0 and 53.7 W, H100 121.7 and
    71.8 W, L40S 102.1 and 35.6 W).
    Wake-up of a sleeping server, 0.1 to 6 s, and a reload of it, 30 to 100 s: vLLM's report on its
    sleep mode of 26 October 2025. Of a server restored from a snapshot on disk, 4.7 s (Qwen3-8B):
    what NVIDIA says of Dynamo Snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from voltana.profiles.catalog import DATA, Profile, list_profiles, load_profile
from voltana.profiles.common.files import write_text
from voltana.profiles.states import STATES_FILE, PowerStates, StateMeta, states_toml

PARAMETERS: Final = {
    "llama-3.1-8b": 8.03e9, "ministral-3b": 3.85e9, "qwen3-32b": 32.8e9, "qwen3-8b": 8.19e9,
    "qwen3-30b-a3b": 30.5e9,
}  # fmt: skip
"""Of each model, as its card says; two bytes each."""
CONTEXT_S: Final = 1.0
"""Context, allocator and first pass of a server that wakes: 8B models are back in 1.3 to 1.7 s."""
DISK_BYTES_PER_S: Final = 5e9
"""One NVMe drive, for all cards of an instance."""
START_S: Final = 30.0
"""Process, kernels and CUDA graphs of an engine that starts, beside its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the model needs to know of a card."""

    context_w: float
    """What a CUDA context draws above the bare card."""
    link_bytes_per_s: float
    """Of its PCIe link, as copies reach it."""
    source: str


_GEN4, _GEN5 = 24e9, 50e9
CARDS: Final = {
    "a100-80g-sxm": Card(context_w=26.3, link_bytes_per_s=_GEN4, source="of this card"),
    "h100-sxm": Card(context_w=49.9, link_bytes_per_s=_GEN5, source="of this card"),
    "h200-sxm": Card(context_w=49.9, link_bytes_per_s=_GEN5, source="the H100's"),
    "b200-sxm": Card(context_w=49.9, link_bytes_per_s=_GEN5, source="the H100's"),
    "rtx-pro-6000": Card(context_w=66.5, link_bytes_per_s=_GEN5, source="the L40S's"),
}


def make_states(profile: Profile, card: Card, weight_bytes: float) -> PowerStates:
    """The three states of one instance.

    Args:
        profile: Whose idle power is gone on from.
        card: Of its GPUs.
        weight_bytes: Of the model, all cards together.
    """
    rest_w = profile.truth().rest_power_w
    awake_w = profile.truth().idle_power_w
    cards = profile.meta.model.tensor_parallel
    lowest_mhz = profile.clocks_mhz[0]
    # a lock at the lowest clock takes away part of what a context costs, so never above that
    bare_w = min(rest_w(0) - cards * card.context_w, rest_w(lowest_mhz))
    copy_s = weight_bytes / cards / card.link_bytes_per_s
    size = f"{weight_bytes / 1e9:.1f} GB of weights"
    bare = (
        f"idle power less {card.context_w:g} W a card for the CUDA context (arXiv 2605.23918, "
        f"{card.source}), at most that of the lowest clock"
    )
    return PowerStates(
        parked=StateMeta(
            power_w=round(awake_w(lowest_mhz), 3),
            enter_s=0.0,
            wake_s=0.003,
            change_w=round(awake_w(0), 3),
            status="modelled",
            source=f"idle.csv at {lowest_mhz} MHz; one clock command away",
        ),
        asleep=StateMeta(
            power_w=round(bare_w, 3),
            enter_s=round(copy_s, 3),
            wake_s=round(copy_s + CONTEXT_S, 3),
            change_w=round(rest_w(0), 3),
            status="modelled",
            source=f"{bare}; {size} over PCIe at {card.link_bytes_per_s / 1e9:g} GB/s a card and "
            f"{CONTEXT_S:g} s for the context (published wake-ups: 0.1 to 6 s)",
        ),
        stopped=StateMeta(
            power_w=round(bare_w, 3),
            enter_s=0.0,
            wake_s=round(weight_bytes / DISK_BYTES_PER_S + START_S, 3),
            change_w=round(rest_w(0), 3),
            status="modelled",
            source=f"{bare}; {size} from disk at {DISK_BYTES_PER_S / 1e9:g} GB/s and {START_S:g} s "
            "for the engine (published reloads: 30 to 100 s)",
        ),
    )


def main() -> None:
    """Write `states.toml` beside the tables of every shipped profile."""
    for name in list_profiles():
        gpu, _, model = name.partition("/")
        card = next(found for key, found in CARDS.items() if gpu.startswith(key))
        weight_bytes = 2.0 * PARAMETERS[model.removesuffix("-tp2")]
        states = make_states(load_profile(name), card, weight_bytes)
        write_text(states_toml(states), DATA / name / STATES_FILE)


if __name__ == "__main__":
    main()
