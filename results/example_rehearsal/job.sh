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
PYTHON=REDACTED_path2/.venv/bin/python
agent() { "$PYTHON" "$RUN/job/program" agent "$@"; }

agent admit || exit 1 # a folder is used once; a requeued job ends here
mkdir -p job/exit logs mlperf
unset HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_TOKEN # no step needs one
export JOB_SCRIPT_PID=$$ # servers end by themselves when this script is gone

# What every step's program finds in its environment. It stands inside the step: a container's image sets variables, which
# win over those exported out here. First what would redirect servers or harness, then what is set.
ENVIRONMENT=(
  env -u UCX_TLS -u LOG_DIR -u MODEL_DIR -u DATA_DIR -u PREPROCESSED_DATA_DIR -u BUILD_DIR -u CONFIG_DIR -u ARTIFACTS_DIR
  PYTHONNOUSERSITE=1
  REHEARSAL_TIME_SCALE=1.0
  REHEARSAL_SYSTEM=gb200
  REHEARSAL_STACK=v5.1
  REHEARSAL_FAULT=none
  OMP_NUM_THREADS=1
  PYTHONUNBUFFERED=1
)
# In front of a program inside its step: no variable of the step's, or caches of its own, or one more folder of modules.
WITHOUT_SLURM=(bash -c 'unset "${!SLURM_@}"; exec "$@"' -)

pids=()

# start NAME LOG COMMAND...: run in the background; its exit status lands in job/exit/NAME
start() {
  local name=$1 log=$2
  shift 2
  {
    "$@"
    echo "$?" >"job/exit/$name"
  } </dev/null >>"$log" 2>&1 &
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

# step NODES TASKS FIRST_RANK [NAME=VALUE...] COMMAND...: TASKS copies of the command, on these nodes (comma separated), in
# node order. Lines are labelled with the rank, counted from FIRST_RANK; FIRST_RANK - means no label.
step() {
  local tasks=$2 first=$3
  shift 3
  agent ranks "$tasks" "$first" "${ENVIRONMENT[@]}" "$@"
}

# What will serve and measure is there, on every node, in the container if there is one: it is unpacked here.
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
  "$PYTHON" -m disagg_lib.rehearsal disaggregated_mpi_worker -c "$RUN/job/config.bound.yaml" --log_level info

agent phase orchestrator
start orchestrator logs/output_server.log step "${NODES[0]}" 1 - \
  "${WITHOUT_SLURM[@]}" "$PYTHON" -m disagg_lib.rehearsal disaggregated -c "$RUN/job/config.bound.yaml" \
  -t 3600 -r 1800

# Ready: the orchestrator says 200, and completions have come back through every server.
agent phase ready
attend agent ready || exit

# client NAME LOG PART [ARGUMENTS...]: our measuring client, beside the orchestrator, to its end
client() {
  local name=$1 log=$2 part=$3
  shift 3
  start "client_$name" "$log" step "${NODES[0]}" 1 - REDACTED_path2/.venv/bin/python \
    "$RUN/job/program" "$part" --run-dir "$RUN" --url "http://${NODES[0]}:${PORT[orchestrator]}" "$@"
  attend agent watch "$name"
}

# Ready is not warm: completions like the run's own, before anything is measured, counted as nothing.
agent phase warmup
client warmup logs/warmup.log client --test-mode warmup || exit

agent phase performance
client performance logs/mlperf_benchmark_performance.log client --test-mode performance || exit

agent phase accuracy
client accuracy logs/mlperf_benchmark_accuracy.log client --test-mode accuracy || exit

exit 0
