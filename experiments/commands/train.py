"""`voltana train`: routing policies from the routing MDP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from voltana.experiments.options import AsJson
from voltana.profiles.common.binding import parse_settings
from voltana.sim.config import make_config, read_toml

if TYPE_CHECKING:
    from voltana.experiments.study.train import Algorithm, Solver

train = typer.Typer(
    name="train", help="Solve or learn a policy and write its file.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.add_typer(train, short_help="Solve or learn a policy, write its file")


@train.callback()
def _verbs() -> None:
    """Keeps `train` a group: what is trained is named after it."""


@train.command("mdp", short_help="The `mdp` router for a fleet and a load")
def train_mdp(
    out: Annotated[Path, typer.Option(help="Policy file to write, for mdp:policy=FILE")],
    rate: Annotated[
        list[float],
        typer.Option(help="Arrival rate, requests/s; repeat it: the router takes the nearest"),
    ],
    decode: Annotated[int | None, typer.Option(help="Decode instances; 2 by default")] = None,
    solver: Annotated[
        str,
        typer.Option(
            help="vi, pi: exact, small models (pi without free clocks); factored: by groups;"
            " q: Q-learning on the simulator; sb3: a network, needs the extra rl"
        ),
    ] = "factored",
    config: Annotated[
        Path | None, typer.Option(help="TOML file of configuration keys; options override it")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any configuration key, repeatable")
    ] = None,
    penalty_j: Annotated[
        float, typer.Option(help="Joules that a late token counts as; more is safer")
    ] = 0.1,
    clock_rule: Annotated[
        str,
        typer.Option(
            help="Clocks in the model: a controller that decides by the state alone, or free"
            " (bounds what control could save)"
        ),
    ] = "ecofreq",
    clock_state: Annotated[
        bool,
        typer.Option(
            "--clock-state", help="Clock levels as states, changing with delay; slower to solve"
        ),
    ] = False,
    width: Annotated[
        int, typer.Option(help="Requests of a batch bucket; wider is quicker and more careful")
    ] = 4,
    max_requests: Annotated[int, typer.Option(help="Largest batch of the model")] = 320,
    kv_buckets: Annotated[int, typer.Option(help="Buckets of KV tokens a request")] = 2,
    group: Annotated[int, typer.Option(help="factored: instances of a group")] = 2,
    episodes: Annotated[int, typer.Option(help="q: episodes")] = 40,
    episode_s: Annotated[float, typer.Option(help="q, sb3: seconds of an episode")] = 200.0,
    steps: Annotated[int, typer.Option(help="sb3: arrivals to learn from")] = 100_000,
    algorithm: Annotated[str, typer.Option(help="sb3: ppo or dqn")] = "ppo",
    seed: Annotated[int, typer.Option(help="q, sb3: seed of everything drawn")] = 1,
    json: AsJson = False,
) -> None:
    """Train the `mdp` router for a fleet and a load; print its cost and bounds.

    Cost is energy of the decode instances plus penalty times tokens later than the ITL promise,
    per second, on the model of sim/mdp/model.py. The file says which profile it was made for and
    is refused with any other. q goes on from OUT.checkpoint if it was interrupted.
    Example: voltana train mdp --rate 30 --out mdp.npz --set slo_itl_s=0.045
    """
    from voltana.experiments.promise import overloads_at, tell
    from voltana.experiments.show import print_result
    from voltana.experiments.study.train import TrainingPlan, as_dict, describe
    from voltana.experiments.study.train import train as run

    values = (read_toml(config) if config else {}) | parse_settings(settings or [])
    if decode is not None:
        values["num_decode"] = decode
    trained = make_config(values, where=str(config) if config else "command line")
    trained.require_plain("training")
    plan = TrainingPlan(
        config=trained,
        rates_rps=tuple(sorted(set(rate))),
        solver=cast("Solver", solver),
        penalty_j=penalty_j,
        clock_rule=clock_rule,
        clock_state=clock_state,
        width_requests=width,
        max_requests=max_requests,
        kv_buckets=kv_buckets,
        group_size=group,
        episodes=episodes,
        episode_s=episode_s,
        steps=steps,
        algorithm=cast("Algorithm", algorithm),
        seed=seed,
    )  # the plan checks the words
    tell(overloads_at(plan.config, plan.rates_rps))
    made = run(plan, out)
    print_result(as_dict(made, out), describe(made, out), as_json=json)
