#!/bin/bash
# shellcheck disable=SC2016,SC2329 # quoted values stay as they are; traps call functions
#
# MLPerf Inference v5.1, Llama-3.1-405B, disaggregated TensorRT-LLM (1.x): engine rehearsal.
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
  REHEARSAL_STACK=v6.0
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
# What the parts of Dynamo find in their environment, beside what every step does
DYNAMO=(
  HF_HUB_OFFLINE=1
  DYN_LOG=warn
  DYN_SDK_DISABLE_ANSI_LOGGING=1
  DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS='["generate"]'
  DYN_TCP_RPC_HOST=127.0.0.1
  DYN_FILE_KV="$RUN/job/dynamo"
)
NAME=/project/scratch/models/Llama3.1-405B/fp4-quantized-modelopt/llama3.1-405b-instruct-hf-torch-fp4
# One step a server; the first of its nodes leads it.
MODEL=/project/scratch/models/Llama3.1-405B/fp4-quantized-modelopt/llama3.1-405b-instruct-hf-torch-fp4
CONTEXT=(--disaggregation-mode prefill --max-num-seqs 128 --max-num-batched-tokens 4096)
GENERATION=(--disaggregation-mode decode --max-num-seqs 512 --max-num-batched-tokens 512)
# worker NAME NODES TASKS FIRST_RANK GPUS FLAGS...: GPUS is what it may use of a shared node, or all
worker() {
  local name=$1 nodes=$2 tasks=$3 first=$4 gpus=$5 own=()
  shift 5
  own=("REHEARSAL_SERVER_NAME=$name") # its faults go by name
  [[ $gpus == all ]] || own+=("CUDA_VISIBLE_DEVICES=$gpus")
  own+=("${DYNAMO[@]}" "DYN_SYSTEM_HOST=${nodes%%,*}" "DYN_SYSTEM_PORT=${PORT[$name]}") # where it answers /health
  start "$name" logs/output_workers.log step "$nodes" "$tasks" "$first" "${own[@]}" \
    bash -c '[[ ${SLURM_PROCID-0} == 0 ]] || exec sleep infinity; exec "$@"' - /project/.venv-dynamo/bin/python -m dynamo.mocker --model-path "$MODEL" --model-name "$NAME" --block-size 32 --engine-type trtllm --speedup-ratio 1 --discovery-backend file --request-plane tcp --event-plane zmq "$@"
}
worker ctx0 "${NODES[0]}" 4 0 all "${CONTEXT[@]}"
worker ctx1 "${NODES[1]}" 4 4 all "${CONTEXT[@]}"
worker ctx2 "${NODES[2]}" 4 8 all "${CONTEXT[@]}"
worker ctx3 "${NODES[3]}" 4 12 all "${CONTEXT[@]}"
worker gen0 "${NODES[4]}" 4 16 all "${GENERATION[@]}"

agent phase orchestrator
start frontend0 logs/frontend0.log step "${NODES[0]}" 1 - "${DYNAMO[@]}" "${WITHOUT_SLURM[@]}" \
  /project/.venv-dynamo/bin/python -m dynamo.frontend --discovery-backend file --request-plane tcp --event-plane zmq --router-mode kv --no-router-kv-events --no-router-assume-kv-reuse --router-replica-sync \
  --http-host 127.0.0.1 --http-port "${PORT[frontend0]}"
start frontend1 logs/frontend1.log step "${NODES[1]}" 1 - "${DYNAMO[@]}" "${WITHOUT_SLURM[@]}" \
  /project/.venv-dynamo/bin/python -m dynamo.frontend --discovery-backend file --request-plane tcp --event-plane zmq --router-mode kv --no-router-kv-events --no-router-assume-kv-reuse --router-replica-sync \
  --http-host 127.0.0.1 --http-port "${PORT[frontend1]}"

# Ready: the orchestrator says 200, and completions have come back through every server.
agent phase ready
attend agent ready || exit

# client NAME LOG PART [ARGUMENTS...]: our measuring client, beside the orchestrator, to its end
client() {
  local name=$1 log=$2 part=$3
  shift 3
  start "client_$name" "$log" step "${NODES[0]}" 1 - /project/.venv/bin/python \
    "$RUN/job/program" "$part" --run-dir "$RUN" --url "http://${NODES[0]}:${PORT[frontend0]}" --url "http://${NODES[1]}:${PORT[frontend1]}" "$@"
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
