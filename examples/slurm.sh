#!/bin/bash
# Harvest once, then train a sweep, on a Slurm cluster: sbatch examples/slurm.sh
# Every command goes on where it was ended, so a job that runs into its limit is simply submitted again.
#
# Once, on a login node, which has a network (DATA is a folder that the compute nodes see):
#   python -m venv .venv && .venv/bin/pip install -e .
#   export HF_HOME=$DATA/huggingface HF_TOKEN=...          # Gemma is gated
#   .venv/bin/hf download google/gemma-2-2b
#   .venv/bin/hf download monology/pile-uncopyrighted train/00.jsonl.zst --repo-type dataset --local-dir $DATA/text
#   DATA=$DATA sbatch examples/slurm.sh
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

# Slurm runs a copy of this file from another folder; the checkout is where sbatch was called.
source "${SLURM_SUBMIT_DIR:-.}/.venv/bin/activate"
# The hub's cache is on the shared disk, since home folders are small; nothing is looked up on a node without a network.
export HF_HOME=${HF_HOME:-$DATA/huggingface} HF_HUB_OFFLINE=1

# SIGTERM comes two minutes before the limit: the command in front saves where it is and ends. Until then its log has a
# line a minute.
forward() { kill -TERM "$child" 2>/dev/null || true; wait "$child"; }
trap forward TERM
start() { "$@" & child=$!; wait "$child"; }

# The text is a file: a dataset of the hub would be streamed over the network.
start harvest run --layer "$LAYER" --tokens 15M --dataset "$DATA/text/train/00.jsonl.zst" --out "$DATA/l$LAYER"
# With several GPUs, a sweep spreads over them:
#   start torchrun --nproc-per-node=4 -m train run --shards "$DATA/l$LAYER" --config examples/sweep.yaml
start train run --shards "$DATA/l$LAYER" --k 96 --out "$DATA/runs/l$LAYER-k96"
start evaluate run "$DATA/runs/l$LAYER-k96" --shards "$DATA/l$LAYER"
