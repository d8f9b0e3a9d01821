"""Measures the horizon that BPTT needs at the last weights of a profile's text runs, and keeps it with their results.

    python -m pipelines.horizon --profile paper --experiment shakespeare --only bptt-lr

Of the chosen runs, those whose weights are here and that have no such record are measured: weights do not travel with a run's
results, what is measured here does. Exit status: 0 all measured, 1 no chosen run has weights here, 2 bad arguments.
"""

import argparse
import sys

from eplib.config import ConfigurationError
from eplib.profiles import load_profile
from eplib.store.records import Store
from pipelines.common import command

STEPS = (8, 16, 24, 32, 48, 64)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="horizons in relaxation steps")
    options = parser.parse_args(arguments)
    try:
        groups = load_profile(options.profile).get("runs") or {}
        if options.experiment not in groups:
            raise ConfigurationError(f"profile {options.profile} has no runs for {options.experiment!r}; it has "
                                     f"{', '.join(groups)}")
        if min(options.steps) < 1:
            raise ConfigurationError(f"a horizon is at least one step; got {min(options.steps)}")
    except ConfigurationError as error:
        print(f"horizon: {error}", file=sys.stderr)
        return 2
    store = Store(options.profile)
    chosen = [run for run in store.recorded(options.experiment)
              if options.only in run.config.name and run.has_weights() and run.config.estimator.kind != "Backprop"]
    if not chosen:
        print(f"horizon: no recorded run of {options.experiment} with {options.only!r} in its name has its weights here; "
              "train it here with python -m pipelines.train", file=sys.stderr)
        return 1
    for run in chosen:
        rows = run.recorded_horizon or run.record_horizon(options.steps)
        if [row["steps"] for row in rows] != list(options.steps):
            print(f"{run.config.name}: recorded before at other horizons, shown as they are; remove horizon.json of the run to "
                  "measure again", flush=True)
        for row in rows:
            print(f"{run.config.name}  " + "  ".join(f"{key} {value:.6g}" for key, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    command(main)
