"""Parameters -> one frozen, validated Experiment and its topology: which server runs on which ranks and nodes."""

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import DisaggError

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_PARAMS_FILES = ("params/rehearsal.yaml",)
MODEL_PATH_IN_SCRATCH = "models/Llama3.1-405B/fp4-quantized-modelopt/llama3.1-405b-instruct-hf-torch-fp4"  # the harness looks here
SLURM_WORD = r"^[A-Za-z0-9][A-Za-z0-9_.,@+-]*$"
# Without user and query: secrets stand there.
ENDPOINT_URL = r"^https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?(/[\w./-]*)?$"
FAULTS = (
    r"^(none|crash_loading(:\w+)?|crash_midrun(:\w+(:\d+)?)?|health_503|no_tokens|slow_tokens|"
    r"truncated_stream(:\d+)?)$"
)


class ParameterError(DisaggError):
    """A parameter has an unknown name, a wrong type or an impossible value."""


class TopologyError(ParameterError):
    """Servers, GPUs, nodes and tasks do not add up."""


@dataclass(frozen=True)
class Server:
    """One context or generation server and where it runs.

    `gpus` holds (node index, GPU index on that node), one pair a rank, in rank order; the first rank leads
    the server and its node answers on `port`.
    """

    name: str  # ctx0, ctx1, ..., gen0, ...
    role: Literal["context", "generation"]
    tp_size: int
    pp_size: int
    first_rank: int
    gpus: tuple[tuple[int, int], ...]
    port: int

    @property
    def node(self) -> int:
        """Index of the node that leads this server."""
        return self.gpus[0][0]

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(sorted({node for node, _ in self.gpus}))

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + len(self.gpus))


def _parameter(default, description: str, **limits):
    return Field(default, description=description, **limits)


class Experiment(BaseModel):
    """Every parameter of a run, validated; frozen. `provenance` says where each value came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    # the switches
    engine: Literal["trtllm", "rehearsal", "external"] = _parameter("trtllm", "what serves")
    launcher: Literal["slurm", "local"] = _parameter("slurm", "what starts the job")
    trtllm_dialect: Literal["v5.1", "1.x"] = _parameter(
        "v5.1", "config.yaml's keys: MLPerf v5.1's release, or 1.2"
    )
    container: Literal["pyxis", "none"] = _parameter("pyxis", "how servers are contained")
    client: Literal["loadgen", "nvidia_harness"] = _parameter("loadgen", "what measures")
    test_modes: tuple[Literal["performance", "accuracy", "test06"], ...] = _parameter(
        ("performance", "accuracy"), "list, in this order; test06 is MLPerf's check of token ids"
    )
    scenario: Literal["Interactive", "Server", "Offline"] = _parameter("Interactive", "what LoadGen plays")
    # the topology
    num_ctx_servers: int = _parameter(4, "context servers", ge=1, le=10_000)
    ctx_tp_size: int = _parameter(4, "GPUs that share each layer of a context server", ge=1)
    ctx_pp_size: int = _parameter(1, "pipeline stages of a context server", ge=1)
    ctx_batch_size: int = _parameter(128, "requests in one context step, at the most", ge=1)
    ctx_max_num_tokens: int = _parameter(4096, "prompt tokens in one context step, at the most", ge=1)
    ctx_gpu_memory_fraction: float = _parameter(0.95, "share of free GPU memory for the KV cache", gt=0, lt=1)
    num_gen_servers: int = _parameter(1, "generation servers", ge=1, le=10_000)
    gen_tp_size: int = _parameter(4, "GPUs that share each layer of a generation server", ge=1)
    gen_batch_size: int = _parameter(512, "requests in one generation step, at the most", ge=1)
    gen_max_num_tokens: int = _parameter(512, "tokens in one generation step, at the most", ge=1)
    gen_gpu_memory_fraction: float = _parameter(0.95, "share of free GPU memory for the KV cache", gt=0, lt=1)
    max_seq_len: int = _parameter(22016, "tokens; 20000 in + 2000 out, up to a multiple of 32", ge=32)
    kv_transfer_backend: Literal["UCX", "NIXL", "MPI"] | None = _parameter(
        None, "KV cache transport; not given: MPI in v5.1 (the original's), NIXL in 1.x"
    )
    gpus_per_node: int = _parameter(4, "GPUs on one node", ge=1)
    nodes: int | None = _parameter(None, "a claim: must equal what the topology needs", ge=1)
    ntasks: int | None = _parameter(None, "a claim: must equal what the topology needs", ge=1)
    server_port: int = _parameter(8000, "TCP port of the orchestrator", ge=1024, le=65535)
    worker_port: int = _parameter(
        8336, "TCP port of the first server; one more for each further one", ge=1024, le=65535
    )
    find_target_qps: bool = _parameter(False, "true: search the highest VALID QPS in the job, then run at it")
    target_qps_min: float | None = _parameter(
        None, "queries/s where the search begins; not given: 0.6 x target", gt=0
    )
    target_qps_max: float | None = _parameter(
        None, "queries/s, highest to try; not given: 1.6 x target", gt=0
    )
    search_budget_s: int | None = _parameter(
        None, "seconds that the search's trials may take together; not given: what time_limit leaves", ge=60
    )
    search_rows_from: str | None = _parameter(
        None, "run folder whose interrupted search this job goes on with; its configuration must be the same"
    )
    plan_gpus: int | None = _parameter(
        None, "GPU budget of 02_plan; not given: what the topology needs", ge=1, le=10_000
    )
    gpu_system: str = _parameter(
        "gb200", "step-time table of plan, simulate and rehearsal (gb200 | gb300 | b200)", pattern=r"^\w+$"
    )
    calibration_file: str | None = _parameter(None, "factors that `calibrate` fitted; not given: 1 and 1")
    lengths_file: str | None = _parameter(
        None, "CSV of token lengths or prompt histogram; not given: the built-in shapes"
    )
    # the load
    server_target_qps: float = _parameter(3.85, "queries per second that LoadGen offers", gt=0, le=100_000)
    max_in_flight: int = _parameter(2048, "Offline: requests open at once", ge=1)
    dataset_path: str | None = _parameter(None, "the MLPerf pickle; not given: the synthetic data set")
    trust_dataset: bool = _parameter(False, "true: open a pickle of unknown checksum (a pickle can run code)")
    request_timeout_s: int = _parameter(1800, "seconds until one request counts as failed", ge=1)
    stall_timeout_s: int = _parameter(
        120, "seconds without a token, with queries open, that end the job", ge=1
    )
    load_timeout_s: int = _parameter(3600, "seconds that the servers may take to get ready", ge=1)
    # the rehearsal
    rehearsal_queries: int = _parameter(
        459, "performance queries; 459 is the fewest early stopping can judge", ge=1
    )
    rehearsal_accuracy_samples: int = _parameter(64, "samples of the accuracy run", ge=1, le=8313)
    rehearsal_output_tokens: int = _parameter(
        64, "mean output tokens, shortened from the data set's 646", ge=2, le=646
    )
    rehearsal_time_scale: float = _parameter(
        1.0, "1: the modelled GPUs' pace; 0.1: ten times as fast", gt=0, le=100
    )
    fault: str = _parameter(
        "none", "what the rehearsal does wrong on purpose, e.g. crash_midrun:gen0:50", pattern=FAULTS
    )
    # the model
    scratch_dir: str = _parameter("scratch", "path; holds models/ (MLPERF_SCRATCH_PATH)")
    model_dir: str | None = _parameter(None, "path of the checkpoint; not given: its place below scratch_dir")
    hf_repo: str = _parameter(
        "nvidia/Llama-3.1-405B-Instruct-FP4", "Hugging Face repository", pattern=r"^[\w.-]+/[\w.-]+$"
    )
    hf_revision: str | None = _parameter(None, "commit of that repository", pattern=r"^[\w./-]+$")
    # the site
    partition: str | None = _parameter(None, "Slurm partition", pattern=SLURM_WORD)
    account: str | None = _parameter(None, "Slurm account", pattern=SLURM_WORD)
    time_limit: str = _parameter("4:00:00", "h:mm:ss, in quotes", pattern=r"^(\d+-)?\d{1,3}:[0-5]\d:[0-5]\d$")
    segment: int | None = _parameter(None, "nodes that must share one NVLink domain (sbatch --segment)", ge=1)
    container_image: str | None = _parameter(None, "path of the .sqsh image, or its registry name")
    container_mounts: str | None = _parameter(None, "host:container paths, separated by commas")
    work_dir: str | None = _parameter(
        None, "folder in the container in which the servers start", pattern=r"^/"
    )
    client_dir: str | None = _parameter(
        None, "folder with LoadGen and numpy for the client; 00_setup builds it"
    )
    setup_jobs: Literal["none", "probe", "all"] = _parameter(
        "probe", "jobs of 00_setup: none, a look at one node, or also image and client where absent"
    )
    # the other ways to serve and to measure
    system_name: str | None = _parameter(None, "SYSTEM_NAME of the NVIDIA harness", pattern=r"^[\w.-]+$")
    harness_dir: str | None = _parameter(None, "path of closed/NVIDIA, for client: nvidia_harness")
    endpoint_url: str | None = _parameter(
        None, "http://host:port of a server that is up, for engine: external", pattern=ENDPOINT_URL
    )
    endpoint: Literal["/v1/completions", "/v1/chat/completions"] = _parameter(
        "/v1/completions", "where requests go; chat: empty messages and prompt_token_ids"
    )
    served_model: str = _parameter(
        "meta-llama/Llama-3.1-405B-Instruct", "the model's name in requests", pattern=r"^\S+$"
    )

    provenance: dict[str, str] = Field(default_factory=dict, exclude=True, repr=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value):
        if isinstance(value, str) and any(ord(c) < 32 or ord(c) == 127 for c in value):
            raise ValueError("text on one line, without control characters")
        return tuple(value) if isinstance(value, list) else value

    @field_validator("partition", "account", mode="before")
    @classmethod
    def _number_as_name(cls, value):
        return str(value) if type(value) is int else value

    @field_validator("time_limit", mode="before")
    @classmethod
    def _sexagesimal(cls, value):
        # YAML 1.1 reads an unquoted 4:00:00 as the number 14400, as papermill does, too.
        if type(value) is int:
            if value < 60:
                raise ValueError(
                    '"h:mm:ss" in quotes (a bare number counts seconds, and Slurm knows no less than 60)'
                )
            return f"{value // 3600}:{value % 3600 // 60:02d}:{value % 60:02d}"
        return value

    @field_validator("test_modes")
    @classmethod
    def _modes(cls, value):
        if not value or len(set(value)) != len(value):
            raise ValueError("at least one of 'performance', 'accuracy' and 'test06', each once")
        return value

    @field_validator("endpoint_url")
    @classmethod
    def _port(cls, value):
        port = re.search(r":(\d+)(/|$)", value or "")
        if port and not 1 <= int(port[1]) <= 65535:
            raise ValueError("a port of 1 to 65535 in http://host:port")
        return value

    @property
    def transfer_backend(self) -> str:
        return self.kv_transfer_backend or {"v5.1": "MPI", "1.x": "NIXL"}[self.trtllm_dialect]

    @property
    def model_path(self) -> str:
        return self.model_dir or f"{self.scratch_dir}/{MODEL_PATH_IN_SCRATCH}"

    @property
    def shortened(self) -> bool:
        """Whether queries and outputs are fewer than the benchmark's, on purpose."""
        return self.engine == "rehearsal"

    @property
    def time_limit_s(self) -> int:
        days, _, clock = self.time_limit.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds

    @property
    def search_bounds_qps(self) -> tuple[float, float]:
        """Where find_target_qps begins, and the highest QPS it tries."""
        low, high = self.target_qps_min, self.target_qps_max
        return low or round(0.6 * self.server_target_qps, 4), high or round(1.6 * self.server_target_qps, 4)

    @cached_property
    def servers(self) -> tuple[Server, ...]:
        """All context servers, then all generation servers: the order in which TensorRT-LLM hands out MPI ranks."""
        return () if self.engine == "external" else plan_servers(self)

    @property
    def gpu_count(self) -> int:
        """GPUs that serve; the MPI world size and sbatch's ntasks. An external endpoint needs one task for the client."""
        return sum(len(server.gpus) for server in self.servers) or 1

    @property
    def node_count(self) -> int:
        return 1 + max((node for server in self.servers for node, _ in server.gpus), default=0)


def _server_sizes(e: Experiment):
    yield from ((f"ctx{i}", "context", e.ctx_tp_size, e.ctx_pp_size) for i in range(e.num_ctx_servers))
    yield from ((f"gen{i}", "generation", e.gen_tp_size, 1) for i in range(e.num_gen_servers))


def topology_arithmetic(e: Experiment) -> str:
    """The sum as one would write it down: '4 context servers x 4 + 1 generation server x 4 = 20 GPUs'."""
    ctx_size, total = e.ctx_tp_size * e.ctx_pp_size, e.gpu_count

    def plural(count, noun):
        return f"{count} {noun}{'' if count == 1 else 's'}"

    return (
        f"{plural(e.num_ctx_servers, 'context server')} x {ctx_size} + "
        f"{plural(e.num_gen_servers, 'generation server')} x {e.gen_tp_size} = {plural(total, 'GPU')}"
    )


def plan_servers(e: Experiment) -> tuple[Server, ...]:
    """Place every server; no server straddles more nodes than it needs.

    Dialect v5.1 is one MPI world: ranks follow the nodes in order, so a topology that does not align is
    refused. In 1.x each server is a Slurm step of its own and goes to the first node with room.

    Raises
    ------
    TopologyError : a server would straddle a node boundary (v5.1).
    """
    per_node = e.gpus_per_node
    used: list[int] = []  # GPUs taken on each node
    servers = []
    rank = 0
    for number, (name, role, tp_size, pp_size) in enumerate(_server_sizes(e)):
        size = tp_size * pp_size
        if e.trtllm_dialect == "v5.1":
            gpus = tuple(divmod(r, per_node) for r in range(rank, rank + size))
            spanned, needed = gpus[-1][0] - gpus[0][0] + 1, math.ceil(size / per_node)
            if spanned > needed:
                raise TopologyError(
                    f"{name}: {size} GPUs at ranks {rank}-{rank + size - 1} would straddle {spanned} nodes of {per_node} "
                    f"GPUs where {needed} would do: in dialect v5.1 the ranks follow the nodes in order. Choose sizes "
                    f"that fill whole nodes in order (context servers come first), or set trtllm_dialect: 1.x, "
                    f"which packs each server by itself."
                )
        else:
            gpus = _pack(used, size, per_node)
        servers.append(Server(name, role, tp_size, pp_size, rank, gpus, e.worker_port + number))
        rank += size
    return tuple(servers)


def _pack(used: list[int], size: int, per_node: int) -> tuple[tuple[int, int], ...]:
    if size <= per_node:
        node = next((i for i, taken in enumerate(used) if taken + size <= per_node), len(used))
    else:
        node = len(used)
    gpus = []
    while size:
        if node == len(used):
            used.append(0)
        take = min(size, per_node - used[node])
        gpus += [(node, used[node] + i) for i in range(take)]
        used[node] += take
        size -= take
        node += 1
    return tuple(gpus)


def _check_together(e: Experiment) -> None:
    """Rules over several parameters.

    Raises
    ------
    ParameterError, TopologyError
    """
    if e.engine == "rehearsal" and e.container != "none":
        raise ParameterError(
            "container: found 'pyxis' with engine: rehearsal, which runs outside containers. Set container: none"
        )
    if e.client == "nvidia_harness":
        if e.scenario != "Interactive" or "test06" in e.test_modes:
            raise ParameterError(
                f"client: found 'nvidia_harness' with scenario: {e.scenario} and test_modes: {', '.join(e.test_modes)}; here it "
                "makes performance and accuracy runs of Interactive. Set client: loadgen"
            )
        if e.engine != "trtllm":
            raise ParameterError(
                f"client: found 'nvidia_harness' with engine: {e.engine}; it measures engine: trtllm. Set client: loadgen"
            )
        for key in ("scratch_dir", "harness_dir", "work_dir"):
            if any(c in "$#'\"`;() \t" for c in getattr(e, key) or ""):
                raise ParameterError(
                    f"{key}: found {getattr(e, key)!r}; the harness's makefiles expand such characters. Use a plain path"
                )
    if e.trtllm_dialect == "1.x" and e.kv_transfer_backend == "MPI":
        raise ParameterError(
            "kv_transfer_backend: found 'MPI' in dialect 1.x, where each server is a step of its own and no MPI world "
            "joins them. Use NIXL or UCX"
        )
    low, high = e.search_bounds_qps
    if low >= high:
        raise ParameterError(
            f"target_qps_min: found {low:g}, needed less than target_qps_max, {high:g}. Set both, or neither"
        )
    if e.find_target_qps and (e.client != "loadgen" or "performance" not in e.test_modes):
        raise ParameterError(
            "find_target_qps: found true, which needs client: loadgen and 'performance' among test_modes. Set them"
        )
    if e.search_rows_from and not e.find_target_qps:
        raise ParameterError(
            f"search_rows_from: found {e.search_rows_from!r} without find_target_qps: true. Set it, or leave this out"
        )
    if e.find_target_qps and e.shortened and e.rehearsal_queries < 459:
        raise ParameterError(
            f"rehearsal_queries: found {e.rehearsal_queries} with find_target_qps: true; early stopping needs 459 to call "
            "a trial VALID. Set 459 or more"
        )
    if e.find_target_qps and e.scenario == "Offline":
        raise ParameterError(
            "find_target_qps: found true with scenario: Offline, which has no limits. Leave it out"
        )
    if e.engine == "external":
        if e.endpoint_url is None:
            raise ParameterError(
                "endpoint_url: not given, but engine: external measures the server behind it. Set endpoint_url"
            )
        return
    # 128 query heads, 8 KV heads, 53248 feed-forward columns and 126 layers: config.json of the checkpoint.
    for key in ("ctx_tp_size", "gen_tp_size"):
        if 128 % getattr(e, key):
            raise TopologyError(
                f"{key}: found {getattr(e, key)}, which does not divide the model's 128 attention heads. Use 1, 2, 4, 8, 16, 32 or 64"
            )
    if 126 % e.ctx_pp_size:
        raise TopologyError(
            f"ctx_pp_size: found {e.ctx_pp_size}, which does not divide the model's 126 layers. Use 1, 2, 3, 6, 7, 9 or 14"
        )
    if e.max_seq_len % 32:
        raise ParameterError(
            f"max_seq_len: found {e.max_seq_len}, needed a multiple of 32 (tokens per KV block): {-(-e.max_seq_len // 32) * 32}"
        )
    sums = topology_arithmetic(e)
    for key, derived, why in (
        ("nodes", e.node_count, f"on {e.gpus_per_node} GPUs a node that is {e.node_count} nodes"),
        ("ntasks", e.gpu_count, f"one task a GPU is {e.gpu_count} tasks"),
    ):
        claim = getattr(e, key)
        if claim is not None and claim != derived:
            raise TopologyError(
                f"{key}: found {claim}, needed {derived}: {sums}, and {why}. "
                f"Set {key}: {derived}, or leave it out: it follows from the topology"
            )
    if e.launcher == "local" and e.engine == "trtllm" and (e.node_count > 1 or e.container != "none"):
        raise ParameterError(
            "launcher: found 'local' with engine: trtllm, which works on one node with container: none only "
            f"({sums}). Set launcher: slurm, or engine: rehearsal to try it without GPUs"
        )
    last_port = e.worker_port + len(e.servers) - 1
    if e.worker_port <= e.server_port <= last_port or last_port > 65535:
        raise ParameterError(
            f"worker_port: {len(e.servers)} servers take ports {e.worker_port}-{last_port}, which must be at most 65535 and leave out "
            f"server_port {e.server_port}. Choose another worker_port"
        )


def parameter_names() -> list[str]:
    """Every key that a params file, a notebook or -p may give."""
    return [name for name in Experiment.model_fields if name != "provenance"]


def refuse_unknown(names: Iterable[str], accepted: Iterable[str], where: str) -> None:
    """Raise ParameterError for the first name that is not accepted, with the nearest valid one."""
    accepted = list(accepted)
    for name in names:
        if name not in accepted:
            near = difflib.get_close_matches(str(name), accepted, n=1, cutoff=0.0)[0]
            raise ParameterError(
                f"{where}: {name}: no such parameter. Did you mean {near}? All names: `python -m disagg_lib parameters`"
            )


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here that is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_params_file(path: Path, shown: str) -> dict[str, Any]:
    """Read one params file: a flat mapping of known keys. `shown` names it in errors.

    Raises
    ------
    ParameterError : no such file, not YAML, not a mapping, an unknown or repeated key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ParameterError(
            f"{shown}: cannot be read ({reason}). Needed: a params file such as params/rehearsal.yaml, "
            f"relative to {REPOSITORY.name}/ or absolute"
        ) from None
    try:
        values = yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ParameterError(f"{shown}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ParameterError(
            f"{shown}: found {'nothing' if values is None else 'a ' + type(values).__name__}, needed a mapping: one `key: value` a line"
        )
    refuse_unknown(values, parameter_names(), shown)
    return values


def parameter_kind(name: str) -> tuple[type, tuple[str, ...]]:
    """What a params file gives for this key: (int, float, bool, str or list; the words to choose from, if any)."""
    kind = Experiment.model_fields[name].annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return list, typing.get_args(typing.get_args(kind)[0])
    if typing.get_origin(kind) is Literal:
        return str, typing.get_args(kind)
    return kind, ()


def _needed(name: str) -> str:
    """What a parameter wants, in words, from its declaration."""
    field = Experiment.model_fields[name]
    kind, options = parameter_kind(name)
    limits = {type(m).__name__: m for m in field.metadata}
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[
        kind if kind is not list else str
    ]
    if options:
        listed = ", ".join(repr(option) for option in options)
        words = f"a list of {listed}" if kind is list else f"one of {listed}"
    if "Ge" in limits:
        words += f" of at least {limits['Ge'].ge}"
    if "Gt" in limits:
        words += f" above {limits['Gt'].gt}"
    if "Le" in limits:
        words += f", at most {limits['Le'].le}"
    if "Lt" in limits:
        words += f", below {limits['Lt'].lt}"
    return f"{words} ({field.description})"


def _explain(error: Mapping, provenance: Mapping[str, str]) -> str:
    name = error["loc"][0]
    found = error["input"]
    note = error["msg"].removeprefix("Value error, ") if error["type"] == "value_error" else _needed(name)
    kind = {str: "text", int: "a whole number", float: "a number", bool: "true/false"}.get(
        type(found), type(found).__name__
    )
    return f"{provenance.get(name, 'given')}: {name}: found {found!r} ({kind}), needed {note}"


def _absolute(value: str, root: Path) -> str:
    return os.path.normpath(root / expand(value))


def expand(path: str | Path) -> Path:
    """A path with ~ expanded; a user that does not exist leaves it as it is."""
    return Path(os.path.expanduser(path))


def load_experiment(
    params_files: Iterable[str | Path] = DEFAULT_PARAMS_FILES,
    given: Mapping[str, Any] | None = None,
    root: Path = REPOSITORY,
) -> Experiment:
    """Resolve parameters: default < params files, in order < given.

    Parameters
    ----------
    params_files : flat YAML files; relative paths are below `root`.
    given : name -> value from an injected or edited cell, or from -p; None means not given.
    root : what relative paths (scratch_dir, dataset_path, ...) are below, too.

    Raises
    ------
    ParameterError, TopologyError : file, key, found, needed, what to do; the first of each key.
    """
    values: dict[str, Any] = {}
    provenance = dict.fromkeys(parameter_names(), "default")
    if isinstance(params_files, str):
        raise ParameterError(
            f"params_files: found the text {params_files!r}, needed a list: [{params_files!r}]"
        )
    sources = [(str(name), read_params_file(root / expand(name), str(name))) for name in params_files]
    refuse_unknown(given or (), parameter_names(), "given")
    for source, mapping in [*sources, ("given", dict(given or {}))]:
        for name, value in mapping.items():
            if value is not None:
                values[name], provenance[name] = value, source
    try:
        experiment = Experiment(**values, provenance=provenance)
        paths = {
            name: _absolute(value, root)
            for name in (
                "scratch_dir",
                "model_dir",
                "dataset_path",
                "calibration_file",
                "lengths_file",
                "harness_dir",
                "client_dir",
                "container_image",
            )
            if (value := getattr(experiment, name)) and (name != "container_image" or value.endswith(".sqsh"))
        }
        experiment = Experiment(**{**values, **paths}, provenance=provenance)
    except ValidationError as error:
        raise ParameterError("\n".join(_explain(item, provenance) for item in error.errors())) from None
    try:
        _check_together(experiment)
    except ParameterError as error:
        files = [source for source, _ in sources] or ["given"]
        name = str(error).split(":")[0]
        where = provenance.get(name, "")
        prefix = where if where not in ("", "default") else files[-1]
        raise type(error)(f"{prefix}: {error}") from None
    return experiment


def changed(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The same experiment but for these values, validated anew; what differs counts as given. None: not given.

    Raises
    ------
    ParameterError, TopologyError
    """
    new = {name: value for name, value in values.items() if value != getattr(experiment, name)}
    made = load_experiment((), {**experiment.model_dump(), **new})
    origins = {name: "default" if value is None else "given" for name, value in new.items()}
    return made.model_copy(update={"provenance": experiment.provenance | origins})


def experiment_text(experiment: Experiment) -> str:
    """experiment.yaml: every resolved parameter and where it came from; `load_recorded` reads it back."""
    values = experiment.model_dump(mode="json")
    recorded = {name: {"value": value, "from": experiment.provenance[name]} for name, value in values.items()}
    return yaml.safe_dump(
        {"format": 1, "parameters": recorded}, sort_keys=False, allow_unicode=True, width=1000
    )


def load_recorded(run_dir: Path) -> Experiment:
    """Read a run folder's experiment.yaml back.

    Raises
    ------
    ParameterError : absent, or not written by `experiment_text`.
    """
    path = run_dir / "experiment.yaml"
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))["parameters"]
        values = {name: entry["value"] for name, entry in recorded.items() if entry["value"] is not None}
        provenance = {name: str(entry["from"]) for name, entry in recorded.items()}
        return Experiment(**values, provenance=provenance)
    except FileNotFoundError:
        raise ParameterError(f"{path}: not there. Needed: a run folder that 03_configuration made") from None
    except (KeyError, TypeError, AttributeError, yaml.YAMLError, ValidationError) as error:
        raise ParameterError(
            f"{path}: not as this release writes it ({' '.join(str(error).split())[:300]})"
        ) from None


def refuse_contradiction(
    recorded: Experiment, params_files: Iterable[str | Path], given: Mapping[str, Any], run_dir: Path
) -> None:
    """04 and 05 take a run folder's parameters as they are: a given value that differs is an error, not a silent no.

    Raises
    ------
    ParameterError
    """
    claims: dict[str, Any] = {}
    for name in params_files:
        claims |= read_params_file(REPOSITORY / expand(name), str(name))
    claims = {name: value for name, value in {**claims, **given}.items() if value is not None}
    kept = {name: value for name, value in recorded.model_dump().items() if value is not None}
    claimed = load_experiment((), {**kept, **claims})
    for name in claims:
        if getattr(claimed, name) != getattr(recorded, name):
            raise ParameterError(
                f"given: {name}: found {getattr(claimed, name)!r}, but {run_dir.name} was made with "
                f"{getattr(recorded, name)!r}. A run folder keeps its parameters: run 03_configuration for a new one"
            )
