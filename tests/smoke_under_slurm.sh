#!/usr/bin/env bash
# The smoke profile's runs as an array under a Slurm of two nodes, three of its jobs killed, against `pipelines.train` undisturbed: are
# results and weights the same bytes? Minutes, so it is no test: tests/smoke_under_slurm.sh, from the repository's folder, all of them
# or some (--experiment stability).
set -euo pipefail
here=$PWD scratch=$(mktemp -d /tmp/sweepXXXX)
trap '[ ! -d "$scratch/slurm" ] || "$here/tests/slurm.sh" stop "$scratch/slurm"; rm -rf "$scratch"' EXIT
for name in whole swept; do
  git clone --quiet --shared . "$scratch/$name"
  ln -s "$here/.venv" "$scratch/$name/.venv"
  rm -rf "$scratch/$name/data" && ln -s "$here/data" "$scratch/$name/data"
  [ ! -d eplib/kernels/build ] || cp -r eplib/kernels/build "$scratch/$name/eplib/kernels/"
done
export PYTHONPATH=.
(cd "$scratch/whole" && .venv/bin/python -m pipelines.train --profile smoke "$@" >"$scratch/whole.log" 2>&1)

tests/slurm.sh start "$scratch/slurm"
export SLURM_CONF=$scratch/slurm/slurm.conf
(cd "$scratch/swept" && exec .venv/bin/python -m pipelines.sweep --profile smoke --executor slurm --parallel 4 "$@") &
# Its processes die as on a machine that runs out of memory; `scancel` would say that somebody wants no such job, and none would follow.
dies() {
  local folder killed=1
  for folder in /proc/[0-9]*; do
    if { tr '\0' '\n' <"$folder/environ" | grep -qx "SLURM_ARRAY_TASK_ID=${1#*_}" && grep -aq submitit "$folder/cmdline"; } 2>/dev/null; then
      kill -KILL "${folder#/proc/}" && killed=0
    fi
  done
  return $killed
}
for _ in 1 2 3; do
  until job=$(squeue --noheader --array --states=running --format=%i | shuf -n 1) && [ -n "$job" ]; do sleep 0.2; done
  sleep 2
  dies "$job" && echo "killed $job" || echo "$job had ended"
done
wait $!

# times and hosts are in results/smoke/machine, which differs
diff --recursive --brief --exclude=machine "$scratch/whole/results/smoke" "$scratch/swept/results/smoke"
echo "$(find "$scratch/swept/results/smoke/runs" -mindepth 2 -maxdepth 2 | wc -l) runs: the same bytes"
