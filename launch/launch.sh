#!/usr/bin/env bash
# Starts one machine's ranks, for a run on one or several machines: call it once on each, with the same arguments.
#   launch/launch.sh --hosts node-a,node-b --gpus-per-node 8 [--rank R] [--port P] [--dry-run] \
#       launch/accelerate/zero3_multinode.yaml recipes/classification.py \
#       --config recipes/configs/classification/mrpc.yaml train.learning_rate=2e-5
# --dry-run prints every machine's command instead. In a SLURM task, hosts, GPUs, rank and port come from SLURM.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "launch.sh: $*" >&2
    exit 2
}

hosts=() rank=${SLURM_NODEID:-} gpus=${SLURM_GPUS_ON_NODE:-} dry_run=''
# Two jobs on one machine must not share a port. The kernel assigns none below 30000 on its own.
port=$((${SLURM_JOB_ID:-0} ? 10000 + ${SLURM_JOB_ID:-0} % 19000 : 29500))
while [[ ${1-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=yes && shift && continue ;;
        --hosts) IFS=, read -ra hosts <<<"${2-}" ;;
        --rank) rank=${2-} ;;
        --gpus-per-node) gpus=${2-} ;;
        --port) port=${2-} ;;
        *) fail "there is no option $1; launch options come first, recipe options after the recipe" ;;
    esac
    [[ -n ${2-} ]] || fail "$1 needs a value"
    shift 2
done
(($# >= 2)) || fail "give a file of launch/accelerate/ and a recipe"
launch_file=$1 recipe=$2
shift 2
arguments=("$@")
for file in "$launch_file" "$recipe"; do [[ -f $file ]] || fail "there is no file $file"; done

if ((${#hosts[@]} == 0)) && [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
    names=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # only SLURM can expand node[01-02] and the like
    mapfile -t hosts <<<"$names"
fi
if ((${#hosts[@]} == 0)); then hosts=(localhost); fi
if ((${#hosts[@]} == 1)); then rank=0; fi
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "how many GPUs has a machine? give --gpus-per-node (on CPUs: ranks on a machine)"
if ((${#hosts[@]} * gpus > 1)) && grep -Eqi "^distributed_type: *['\"]?NO['\"]? *(#.*)?\$" "$launch_file"; then
    fail "${#hosts[@]} hosts x $gpus GPUs, but $launch_file has distributed_type NO, which trains on one; expected" \
        "another file in launch/accelerate/ (ddp.yaml, say), or --gpus-per-node 1"
fi
[[ -n $dry_run || ($rank =~ ^[0-9]+$ && $rank -lt ${#hosts[@]}) ]] ||
    fail "which of ${hosts[*]} is this? give --rank, from 0 to $((${#hosts[@]} - 1))"

# Variables already set win. torchrun kills the ranks 30 s after it is asked to stop: too soon to save a large model.
# SIGUSR1, which batch systems send before the time limit, would end torchrun at once.
environment=(
    "PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}"
    "TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}"
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
    "PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
)
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    # Many nodes cannot reach the Hub, and take long to find out. Nodes that build into one folder of a shared file
    # system wait for each other's locks, and wait forever for the lock of a build that was killed.
    local_disk=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/swaft-$UID-$SLURM_JOB_ID
    environment+=(
        "HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}"
        "HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}"
        "TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$local_disk/triton}"
        "TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$local_disk/torch_extensions}"
    )
    # SLURM sends signals to every process of a task. accelerate starts a single rank without torchrun, and would exit
    # before the rank does; SLURM would then kill the rank while it saves.
    if ((${#hosts[@]} * gpus == 1)); then trap '' TERM USR1; fi
fi
if [[ -d .venv/bin ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi

# Sets `command` to the command of machine $1.
command_of() {
    command=(
        env "${environment[@]}" accelerate launch --config_file "$launch_file"
        --num_machines "${#hosts[@]}" --num_processes "$((${#hosts[@]} * gpus))" --main_process_port "$port"
    )
    if ((${#hosts[@]} > 1)); then
        # accelerate's default for several machines, pdsh, needs a host file and ssh.
        command+=(--machine_rank "$1" --main_process_ip "${hosts[0]}" --deepspeed_multinode_launcher standard)
    fi
    command+=("$recipe" "${arguments[@]}")
}

if [[ -n $dry_run ]]; then
    for index in "${!hosts[@]}"; do
        command_of "$index"
        echo "# ${hosts[index]}"
        printf '%q' "${command[0]}"
        printf ' %q' "${command[@]:1}"
        echo
    done
    exit
fi
command_of "$rank"
# One process compiles what DeepSpeed needs, before the ranks race to do it; with a GPU there is nothing to compile.
if grep -Eq "^distributed_type: *['\"]?DEEPSPEED" "$launch_file"; then
    env "${environment[@]}" python -m swaft.training.launch.deepspeed_extension
fi
exec "${command[@]}" # so that signals reach torchrun, which passes them on to the ranks
