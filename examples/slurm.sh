#!/bin/bash
# Harvest once, then train a sweep, on a Slurm cluster: sbatch examples/slurm.sh
# Every command goes on where it was ended, so a job that runs into its limit is simply submitted again.
#SBATCH --job-name=matryoshka
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

LAYER=${LAYER:-17}
DATA=${DATA:-data}

# SIGTERM comes two minutes before the limit: the command in front saves where it is and ends. Until then its log has a
# line a minute.
forward() { kill -TERM "$child" 2>/dev/null || true; wait "$child"; }
trap forward TERM
start() { "$@" & child=$!; wait "$child"; }

start harvest run --layer "$LAYER" --tokens 15M --out "$DATA/l$LAYER"
# With several GPUs, a sweep spreads over them:
#   start torchrun --nproc-per-node=4 -m train run --shards "$DATA/l$LAYER" --config examples/sweep.yaml
start train run --shards "$DATA/l$LAYER" --k 96 --out "$DATA/runs/l$LAYER-k96"
start evaluate run "$DATA/runs/l$LAYER-k96" --shards "$DATA/l$LAYER"
