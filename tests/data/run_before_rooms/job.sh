#!/bin/bash
# shellcheck disable=SC2016,SC2329 # quoted values stay as they are; traps call functions
#
# MLPerf Inference v5.1, Llama-3.1-405B, disaggregated TensorRT-LLM (v5.1): engine rehearsal.
# 4 context servers x 4 + 1 generation server x 4 = 20 GPUs, on 5 nodes of 4 GPUs.
#
# Submit from inside the run folder: cd <run folder> && bash job.sh
# It reads and writes nothing outside that folder but the model and what container_mounts name. Every
# step's progress is a line in job/phases.jsonl; on any end (success, failure, scancel, time limit) all
# servers are ended and the nodes go back.

set -uo pipefail
set -m # each background step is a process group of its own, which teardown can end as a whole

cd -- "${SLURM_SUBMIT_DIR:-$(dirname -- "$0")}" || exit 1
RUN=$PWD
PYTHON=/project/.venv/bin/python
agent() { "$PYTHON" "$RUN/job/job_agent.py" "$@"; }

agent admit || exit 1 # a folder is used once; a requeued job ends here
mkdir -p job/exit logs mlperf

# Variables that would redirect the harness, the servers or Slurm's steps, and tokens that no step needs.
unset LOG_DIR MODEL_DIR DATA_DIR PREPROCESSED_DATA_DIR BUILD_DIR CONFIG_DIR ARTIFACTS_DIR UCX_TLS
unset HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_TOKEN
export REHEARSAL_TIME_SCALE=1.0
export REHEARSAL_SYSTEM=gb200
export REHEARSAL_FAULT=none
export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1

export JOB_SCRIPT_PID=$$ # servers end by themselves when this script is gone

pids=()

# start NAME LOG COMMAND...: run in the background; its exit status lands in job/exit/NAME
start() {
  local name=$1 log=$2
  shift 2
  {
    "$@"
    echo "$?" >"job/exit/$name"
  } >>"$log" 2>&1 &
  pids+=("$!")
}

# attend COMMAND...: wait for it in a way that lets a signal interrupt
attend() {
  "$@" &
  pids+=("$!")
  wait "$!"
}

signalled() {
  trap '' TERM INT HUP
  agent reason signal "$1"
  exit 143
}

teardown() {
  local status=$? pid
  trap '' TERM INT HUP
  trap - EXIT
  agent phase teardown
  {
    for pid in ${pids[@]+"${pids[@]}"}; do
      kill -TERM -- "-$pid"
    done
    for ((i = 0; i < 30; i++)); do
      [[ -z $(jobs -rp) ]] && break
      sleep 0.1
    done
    for pid in ${pids[@]+"${pids[@]}"}; do
      kill -KILL -- "-$pid"
    done
    wait
  } 2>/dev/null # what has ended already, and bash's own word on each end
  agent finish "$status"
  exit
}
trap teardown EXIT
trap 'signalled TERM' TERM
trap 'signalled INT' INT
trap 'signalled HUP' HUP

# step NODES TASKS FIRST_RANK COMMAND...: TASKS copies of the command, on these nodes (comma separated), in
# node order. Lines are labelled with the rank, counted from FIRST_RANK; FIRST_RANK - means no label.
step() {
  local tasks=$2 first=$3
  shift 3
  agent ranks "$tasks" "$first" "$@"
}

agent phase container

agent phase bind
agent bind || exit
# There is no command substitution from the traps on: in bash 5.2 a signal that comes in one may lose its trap.
mapfile -t NODES <job/nodes.txt # in order
declare -A PORT # of each server, and the orchestrator
while read -r name _ port; do PORT[$name]=$port; done <job/addresses.txt

agent phase workers
# One MPI world: ranks follow the nodes in order, context servers first.
printf -v ALL_NODES '%s,' "${NODES[@]}"
ALL_NODES=${ALL_NODES%,}
start workers logs/output_workers.log step "$ALL_NODES" 20 0 \
  "$PYTHON" -m disagg_lib.serving.rehearsal disaggregated_mpi_worker -c "$RUN/job/config.bound.yaml" --log_level info

agent phase orchestrator
start orchestrator logs/output_server.log step "${NODES[0]}" 1 - \
  "$PYTHON" -m disagg_lib.serving.rehearsal disaggregated -c "$RUN/job/config.bound.yaml" \
  -t 3600 -r 1800

# Ready: the orchestrator says 200, and completions have come back through every server.
agent phase ready
attend agent ready || exit

agent phase performance
start client_performance logs/mlperf_benchmark_performance.log step "${NODES[0]}" 1 - \
  /project/.venv/bin/python "$RUN/job/loadgen_client.py" --run-dir "$RUN" --test-mode performance --url "http://${NODES[0]}:${PORT[orchestrator]}"
attend agent watch performance || exit

agent phase accuracy
start client_accuracy logs/mlperf_benchmark_accuracy.log step "${NODES[0]}" 1 - \
  /project/.venv/bin/python "$RUN/job/loadgen_client.py" --run-dir "$RUN" --test-mode accuracy --url "http://${NODES[0]}:${PORT[orchestrator]}"
attend agent watch accuracy || exit

exit 0
