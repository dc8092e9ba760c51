#!/bin/bash
# shellcheck disable=SC2016,SC2329 # quoted values stay as they are; traps call functions
#SBATCH --job-name=disagg_405B
#SBATCH --nodes=5
#SBATCH --ntasks=20
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=4:00:00
#SBATCH --partition=batch
#SBATCH --account=mlperf
#SBATCH --output=job/disagg_405B_slurm_log.txt
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:TERM@120
#
# MLPerf Inference v5.1, Llama-3.1-405B, disaggregated TensorRT-LLM (1.x): engine trtllm.
# 4 context servers x 4 + 1 generation server x 4 = 20 GPUs, on 5 nodes of 4 GPUs.
#
# Submit from inside the run folder: cd <run folder> && sbatch job.sh
# It reads and writes nothing outside that folder but the model and what container_mounts name. Every
# step's progress is a line in job/phases.jsonl; on any end (success, failure, scancel, time limit) all
# servers are ended and the nodes go back.

set -uo pipefail
set -m # each background step is a process group of its own, which teardown can end as a whole
export PATH SLURM_EXPORT_ENV=ALL # sbatch --export=NONE, a site's default perhaps, would leave the steps without

cd -- "${SLURM_SUBMIT_DIR:-$(dirname -- "$0")}" || exit 1
RUN=$PWD
PYTHON=python3
agent() { "$PYTHON" "$RUN/job/program" agent "$@"; }

agent admit || exit 1 # a folder is used once; a requeued job ends here
mkdir -p job/exit logs mlperf
unset HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_TOKEN # no step needs one

# What every step's program finds in its environment. It stands inside the step: a container's image sets variables, which
# win over those exported out here. First what would redirect servers or harness, then what is set.
ENVIRONMENT=(
  env -u UCX_TLS -u LOG_DIR -u MODEL_DIR -u DATA_DIR -u PREPROCESSED_DATA_DIR -u BUILD_DIR -u CONFIG_DIR -u ARTIFACTS_DIR -u TMPDIR
  PYTHONNOUSERSITE=1
  TLLM_LOG_LEVEL=INFO
  NCCL_DEBUG=WARN
  UCX_LOG_LEVEL=warn
  TRTLLM_ENABLE_PDL=1
  TRTLLM_SERVER_DISABLE_GC=1
  TRTLLM_WORKER_DISABLE_GC=1
  NCCL_GRAPH_MIXING_SUPPORT=0
)
# In front of a program inside its step: no variable of the step's, or caches of its own, or one more folder of modules.
WITHOUT_SLURM=(bash -c 'unset "${!SLURM_@}"; exec "$@"' -)
WITH_OWN_CACHES=(bash -c '
  own=/tmp/disagg_405B_${USER-}/${SLURM_JOB_ID-}.${SLURM_STEP_ID-}.${SLURM_PROCID-}
  for name in XDG_CACHE_HOME TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR FLASHINFER_WORKSPACE_BASE CUDA_CACHE_PATH; do
    mkdir -p "$own/$name" && export "$name=$own/$name"
  done
  exec "$@"' -)

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
  status=$?
  timeout 60 "${SRUN[@]}" "${ON_EACH_NODE[@]}" "$PYTHON" "$RUN/job/program" agent janitor end >>logs/container.log 2>&1
  exit "$status"
}
trap teardown EXIT
trap 'signalled TERM' TERM
trap 'signalled INT' INT
trap 'signalled HUP' HUP

SRUN=(srun --overlap --mpi=pmix --cpu-bind=none --kill-on-bad-exit=1) # servers bind themselves to cores
ON_EACH_NODE=(--ntasks-per-node=1 --ntasks=5)
CONTAINER=(
  --container-image=/images/mlpinf.sqsh
  --container-name="disagg_405B_${SLURM_JOB_ID-}"
  --container-mounts="$RUN:$RUN,"'/scratch:/scratch,/code:/work'
  --no-container-remap-root # root inside is not who the job is outside: PMIx would refuse each rank
  --container-mount-home
  --container-workdir=/work
)
# step NODES TASKS FIRST_RANK [NAME=VALUE...] COMMAND...: TASKS copies of the command, on these nodes (comma separated), in
# node order. Lines are labelled with the rank, counted from FIRST_RANK; FIRST_RANK - means no label.
step() {
  local nodes=$1 tasks=$2 first=$3 commas label=()
  shift 3
  commas=${nodes//[^,]/}
  local count=$((${#commas} + 1))
  [[ $first == - ]] || label=(--label)
  "${SRUN[@]}" --nodelist="$nodes" --nodes="$count" --ntasks="$tasks" \
    --ntasks-per-node="$(((tasks + count - 1) / count))" --distribution=block --unbuffered \
    ${label[@]+"${label[@]}"} ${CONTAINER[@]+"${CONTAINER[@]}"} "${ENVIRONMENT[@]}" "$@" 2>&1 |
    awk -v first="$first" 'first ~ /^[0-9]+$/ && /^ *[0-9]+:/ {
      colon = index($0, ":"); $0 = (first + substr($0, 1, colon - 1)) substr($0, colon)
    } { print; fflush() }'
}

# What will serve and measure is there, on every node, in the container if there is one: it is unpacked here.
agent phase container
# Its janitor removes it when the job ends in a way that lets no new step begin, such as scancel.
start container_janitor logs/container.log "${SRUN[@]}" "${ON_EACH_NODE[@]}" "$PYTHON" "$RUN/job/program" agent janitor
start container logs/container.log "${SRUN[@]}" "${ON_EACH_NODE[@]}" ${CONTAINER[@]+"${CONTAINER[@]}"} \
  "${ENVIRONMENT[@]}" python3 -c 'import shutil, tensorrt_llm; lacks = [p for p in ("trtllm-llmapi-launch", "trtllm-serve") if not shutil.which(p)]; assert not lacks, f"not on PATH: {lacks}"'
attend agent await container || exit
start container_client logs/container_client.log "${SRUN[@]}" --nodes=1 --ntasks=1 ${CONTAINER[@]+"${CONTAINER[@]}"} \
  "${ENVIRONMENT[@]}" python3 -c 'import mlperf_loadgen, numpy'
attend agent await container_client || exit

agent phase bind
agent bind || exit
# There is no command substitution from the traps on: in bash 5.2 a signal that comes in one may lose its trap.
mapfile -t NODES <job/nodes.txt # in order
declare -A PORT # of each server, and the orchestrator
while read -r name _ port; do PORT[$name]=$port; done <job/addresses.txt

agent phase workers
# One step a server; the first of its nodes leads it.
MODEL=/scratch/models/Llama3.1-405B/fp4-quantized-modelopt/llama3.1-405b-instruct-hf-torch-fp4
CONTEXT=(
  --tp_size 4 --pp_size 1
  --max_batch_size 128 --max_num_tokens 4096 --max_seq_len 22016
  --backend pytorch --extra_llm_api_options "$RUN/config.ctx.yaml" --server_role context --log_level info
)
GENERATION=(
  --tp_size 4 --pp_size 1
  --max_batch_size 512 --max_num_tokens 512 --max_seq_len 22016
  --backend pytorch --extra_llm_api_options "$RUN/config.gen.yaml" --server_role generation --log_level info
)
# worker NAME NODES TASKS FIRST_RANK GPUS FLAGS...: GPUS is what it may use of a shared node, or all
worker() {
  local name=$1 nodes=$2 tasks=$3 first=$4 gpus=$5 own=()
  shift 5
  own=("TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR=ipc:///tmp/disagg_405B_${SLURM_JOB_ID-}_$name")
  [[ $gpus == all ]] || own+=("CUDA_VISIBLE_DEVICES=$gpus")
  start "$name" logs/output_workers.log step "$nodes" "$tasks" "$first" "${own[@]}" \
    "${WITH_OWN_CACHES[@]}" trtllm-llmapi-launch trtllm-serve "$MODEL" --host "${nodes%%,*}" --port "${PORT[$name]}" "$@"
}
worker ctx0 "${NODES[0]}" 4 0 all "${CONTEXT[@]}"
worker ctx1 "${NODES[1]}" 4 4 all "${CONTEXT[@]}"
worker ctx2 "${NODES[2]}" 4 8 all "${CONTEXT[@]}"
worker ctx3 "${NODES[3]}" 4 12 all "${CONTEXT[@]}"
worker gen0 "${NODES[4]}" 4 16 all "${GENERATION[@]}"

agent phase orchestrator
start orchestrator0 logs/output_server.log step "${NODES[0]}" 1 - \
  "${WITHOUT_SLURM[@]}" trtllm-serve disaggregated -c "$RUN/job/config.bound.yaml" \
  -t 3600 -r 1800
start orchestrator1 logs/output_server.log step "${NODES[1]}" 1 - \
  "${WITHOUT_SLURM[@]}" trtllm-serve disaggregated -c "$RUN/job/config.bound.1.yaml" \
  -t 3600 -r 1800

# Ready: the orchestrator says 200, and completions have come back through every server.
agent phase ready
attend agent ready || exit

# client NAME LOG PART [ARGUMENTS...]: our measuring client, beside the orchestrator, to its end
client() {
  local name=$1 log=$2 part=$3
  shift 3
  start "client_$name" "$log" step "${NODES[0]}" 1 - python3 \
    "$RUN/job/program" "$part" --run-dir "$RUN" --url "http://${NODES[0]}:${PORT[orchestrator0]}" --url "http://${NODES[1]}:${PORT[orchestrator1]}" "$@"
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
