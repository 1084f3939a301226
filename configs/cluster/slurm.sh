#!/usr/bin/env bash
# Runs engines on the nodes of a SLURM job until the job ends: sbatch configs/cluster/slurm.sh FILE.yaml
# Submit it from a folder on a file system that the nodes share, with qwen-jax[serve,ray] installed in its .venv.
#SBATCH --job-name=qwen-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

config=${1:?give the cluster\'s file, such as configs/cluster/qwen72b_h100.yaml}
port=${RAY_PORT:-6379}
export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1  # Ray's processes read these when they start
export PATH="$PWD/.venv/bin:$PATH"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')

end() {
  qwen-jax cluster down --address "http://$address:8265" || true
  kill "${running[@]}" 2> /dev/null || true
}
running=()
trap end EXIT
trap 'exit 143' TERM

srun --nodes=1 --ntasks=1 -w "$head" ray start --head --block --node-ip-address="$address" --port="$port" \
  --dashboard-host="$address" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" &
running+=($!)
for try in $(seq 60); do
  ray health-check --address "$address:$port" > /dev/null 2>&1 && break
  [ "$try" = 60 ] && { echo "Ray does not start on $head" >&2; exit 1; }
  sleep 2
done
if [ "${#nodes[@]}" -gt 1 ]; then
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" ray start --block \
    --address="$address:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" &
  running+=($!)
fi

qwen-jax cluster up "$config" --address "http://$address:8265"
wait -n "${running[@]}"  # until the job's time is over, or Ray ends on a node
