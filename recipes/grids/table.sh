#!/bin/bash
# The large table by one resumable command: several processes share a GPU, because a small model alone cannot fill it.
#
#   bash recipes/grids/table.sh OUTPUT [SECONDS] [PROCESSES] [SAMPLES]
#
# OUTPUT     where the journal of every process goes; the same folder (or OUTPUT.tgz) goes on where it was
# SECONDS    after which nothing new is begun (default: none), the making of samples not counted
# PROCESSES  in all (default: 7 a GPU); they are dealt out to the GPUs in turn
# SAMPLES    folder of prepared samples (default: OUTPUT/prepared); what is missing there is made first
#
# In the environment: GRID, another grid than table.toml; GPUS, how many GPUs to use (default: all that nvidia-smi
# lists; 0 leaves the choice to each process); PYTHON, the interpreter.
#
# OUTPUT.tgz holds what has been done so far. Sum it up anywhere, without a GPU:
#   locret eval recipes/grids/table.toml --output OUTPUT --sample-files SAMPLES --stop-after 0 --device cpu
#   python benchmarks/eval_table.py OUTPUT
set -euo pipefail
output=${1:?"say where to write: bash recipes/grids/table.sh OUTPUT [SECONDS] [PROCESSES] [SAMPLES]"}
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)}
seconds=${2:-1000000} processes=${3:-$((7 * (gpus > 1 ? gpus : 1)))} samples=${4:-$1/prepared}
grid=${GRID:-$(dirname "$0")/table.toml}
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True HF_HUB_OFFLINE=1
python=${PYTHON:-python3}

mkdir -p "$output"
if [[ -e $output.tgz && ! -e $output/grid.json ]]; then tar xzf "$output.tgz" -C "$output"; fi
cores=$(env -u OMP_NUM_THREADS nproc)  # nproc believes the 1 that is for torch
"$python" -m locret eval "$grid" --prepare "$cores" --sample-files "$samples"
pids=()
for ((rank = 0; rank < processes; rank++)); do
  if ((gpus > 0)); then export CUDA_VISIBLE_DEVICES=$((rank % gpus)); fi
  RANK=$rank WORLD_SIZE=$processes LOCAL_RANK=$rank "$python" -m locret eval "$grid" --output "$output" \
    --sample-files "$samples" --stop-after "$seconds" >"$output/process-$rank.log" 2>&1 &
  pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null; exit 130' INT TERM
for pid in "${pids[@]}"; do wait "$pid" || echo "process $pid failed; its log is in $output" >&2; done
tail -qn 1 "$output"/process-*.log
tar czf "$output.tgz" -C "$output" --exclude=prepared --exclude=samples.jsonl --exclude='report.*' .
ls -l "$output.tgz"
