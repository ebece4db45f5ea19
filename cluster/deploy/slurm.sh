#!/usr/bin/env bash
#SBATCH --job-name=grail
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#
# Starts Ray on every host of the job and runs one grail command on it, from the top of the checkout:
#
#   sbatch --nodes=4 --gpus-per-node=8 cluster/deploy/slurm.sh pretrain sasrec --data.path shards/x --run-dir runs/x
#   sbatch cluster/deploy/slurm.sh evaluate runs/x
#
# The checkout (with its .venv), the shards and the run directory lie where all hosts see them. There is one worker for
# each GPU of a host, or one a host without any; give --cluster.workers for another number, --cluster.min-workers to go
# on when hosts are lost (--no-kill keeps the job then).
#
# Two minutes before the end of its time (SIGUSR1 to this script), and on scancel (SIGTERM), the run saves and ends
# with 75. With GRAIL_REQUEUE=1 the job then queues itself again after the former, and goes on where it stopped.
set -euo pipefail

cd "${GRAIL_HOME:-${SLURM_SUBMIT_DIR:?run this with sbatch}}"
if [ $# -lt 2 ]; then
    echo "a grail command and its recipe or run directory are required, such as: pretrain sasrec; got: $*" >&2
    exit 2
fi
export PATH="$PWD/.venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
# Ray's ports are open to the network: every job has a token of its own, which srun hands on in the environment.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
head_ip=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }')
port=$((20000 + SLURM_JOB_ID % 10000))
address=$head_ip:$port
per_host=${SLURM_GPUS_ON_NODE:-1}

# Slurm ends a job with SIGTERM to every process. Ray's daemons must outlive it until the workers have saved: they do
# not get it, and what they start lets it in again. The last lines of this script end them.
ray_start() {
    exec env --block-signal=TERM ray start --block --disable-usage-stats --num-cpus="${SLURM_CPUS_ON_NODE:?}" \
        --num-gpus="${SLURM_GPUS_ON_NODE:-0}" "$@"
}
export -f ray_start

in_step() {
    srun --overlap --no-kill --kill-on-bad-exit=0 "$@" &
}

in_step --nodes=1 --ntasks=1 --nodelist="$head" \
    bash -c "ray_start --head --node-ip-address=$head_ip --port=$port --include-dashboard=false"
for _ in $(seq 300); do
    (: <"/dev/tcp/$head_ip/$port") 2>/dev/null && break
    sleep 0.2
done
if [ ${#hosts[@]} -gt 1 ]; then
    in_step --nodes=$((${#hosts[@]} - 1)) --ntasks=$((${#hosts[@]} - 1)) --exclude="$head" \
        bash -c "ray_start --address=$address"
fi

workers=(--cluster.address "$address" --cluster.workers $((${#hosts[@]} * per_host)))
workers+=(--cluster.cpus-per-worker $((SLURM_CPUS_ON_NODE / per_host)))
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    workers+=(--cluster.gpus-per-worker 1)
fi
grail "$1" "$2" "${workers[@]}" "${@:3}" &
driver=$!
warned=0
trap 'kill -TERM $driver 2>/dev/null' TERM
trap 'warned=1; kill -TERM $driver 2>/dev/null' USR1
code=0
wait $driver || code=$?
# A signal ends the wait, not the driver.
while [ $code -gt 128 ] && kill -0 $driver 2>/dev/null; do
    code=0
    wait $driver || code=$?
done

# The steps alone, and before the job is queued again: a signal to the whole job would cancel it while it waits there.
for step in 0 1; do
    scancel --quiet --signal=KILL "$SLURM_JOB_ID.$step" || true
done
if [ $code -eq 75 ] && [ $warned -eq 1 ] && [ "${GRAIL_REQUEUE:-0}" = 1 ]; then
    echo "saved; queueing again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
