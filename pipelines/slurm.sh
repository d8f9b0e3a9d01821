#!/usr/bin/env bash
# A sweep on your cluster: edit the three lines, then run this where you call sbatch, from the repository's folder on the disk that
# the nodes share. It submits what is not recorded yet and follows it to the end; call it again after a change, or a logout.
profile=paper
slurm=(--slurm partition=gpu --slurm mem=16G)                # what your sbatch wants: partition, account, qos, mem
size=(--device cuda --share 4 --parallel 8 --minutes 240)    # runs to a card, jobs at a time, time of one; --device cpu for none

exec .venv/bin/python -m pipelines.sweep --profile "$profile" --executor slurm "${slurm[@]}" "${size[@]}" "$@"   # --dry: how long
