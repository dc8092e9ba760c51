"""Every parameter of a run, its type, limits, default and meaning: one frozen model."""

import re
import types
import typing
import urllib.parse
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .topology import Part, Server, plan_servers

MODEL_PATH_IN_SCRATCH = "models/Llama3.1-405B/fp4-quantized-modelopt/llama3.1-405b-instruct-hf-torch-fp4"  # the harness looks here
SLURM_WORD = r"^[A-Za-z0-9][A-Za-z0-9_.,@+-]*$"
SBATCH_OPTION = r"--([a-z][a-z-]+)(=[^\s#'\"\\]+)?"
OUR_SBATCH_OPTIONS = [
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "gpus-per-node",
    "exclusive",
    "mem",
    "time",
    "partition",
    "account",
    "output",
    "error",
    "open-mode",
    "requeue",
    "no-requeue",
    "signal",
    "segment",
    "comment",
    "array",
    "chdir",
    "export",
    "wrap",
    "parsable",
    "test-only",
    "wait",
    "hold",
]
OUR_VARIABLES = (
    "REHEARSAL_",
    "SLURM_",
    "JOB_SCRIPT_PID",
    "CUDA_VISIBLE_DEVICES",
    "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR",
)
# Without user and query: secrets stand there.
ENDPOINT_URL = r"^https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?(/[\w./-]*)?$"
TIME_LIMIT = r"^(\d+-)?\d{1,3}:[0-5]\d:[0-5]\d$"
FAULTS = (
    r"^(none|crash_loading(_quiet)?(:\w+)?|(crash_midrun(_quiet)?|gen_refuses)(:\w+(:\d+)?)?|no_request_id|"
    r"health_503|no_tokens|slow_tokens|no_detokenize|(truncated_stream|eos_first)(:\d+)?)$"
)


def _parameter(default, description: str, **limits):
    return Field(default, description=description, **limits)


class Experiment(BaseModel):
    """Every parameter of a run, validated; frozen. `provenance` says where each value came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    # the switches
    recipe: Literal["v5.1", "v6.0"] = _parameter("v5.1", "round whose engine settings are the defaults")
    engine: Literal["trtllm", "rehearsal", "external"] = _parameter("trtllm", "what serves")
    launcher: Literal["slurm", "local"] = _parameter("slurm", "what starts the job")
    trtllm_dialect: Literal["v5.1", "1.x"] = _parameter(
        "v5.1", "config.yaml's keys: MLPerf v5.1's release, or 1.2"
    )
    orchestrator: Literal["trtllm", "dynamo"] = _parameter(
        "trtllm", "what joins context and generation servers"
    )
    num_frontends: int = _parameter(1, "orchestrators or front ends, each on a node of its own", ge=1, le=64)
    container: Literal["pyxis", "none"] = _parameter("pyxis", "how servers are contained")
    client: Literal["loadgen", "nvidia_harness"] = _parameter("loadgen", "what measures")
    test_modes: tuple[Literal["performance", "accuracy", "test06"], ...] = _parameter(
        ("performance", "accuracy"), "list, in this order; test06 is MLPerf's check of token ids"
    )
    scenario: Literal["Interactive", "Server", "Offline"] = _parameter("Interactive", "what LoadGen plays")
    round: Literal["v5.1", "v6.0", "v6.1"] = _parameter("v5.1", "the MLPerf round whose rules the run claims")
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
    ctx_capacity_policy: Literal["MAX_UTILIZATION", "GUARANTEED_NO_EVICT"] = _parameter(
        "MAX_UTILIZATION", "when a context server takes a request"
    )
    gen_capacity_policy: Literal["MAX_UTILIZATION", "GUARANTEED_NO_EVICT"] = _parameter(
        "GUARANTEED_NO_EVICT",
        "when a generation server takes a request: room for its prompt, or for all it may say",
    )
    gen_cuda_graphs: Literal["original", "powers_of_two"] = _parameter(
        "original", "batch sizes captured as CUDA graphs: the original's list, or powers of two (v6.0)"
    )
    routing: Literal["round_robin", "least_tokens"] | None = _parameter(
        None,
        "who gets a request: servers in turn, or the one with the fewest tokens to do; not given: in turn, behind Dynamo the latter",
    )
    max_seq_len: int = _parameter(22016, "tokens; 20000 in + 2000 out, up to a multiple of 32", ge=32)
    kv_transfer_backend: Literal["UCX", "NIXL", "MPI"] | None = _parameter(
        None, "KV cache transport; not given: MPI in v5.1 (the original's), NIXL in 1.x"
    )
    kv_buffer_tokens: int | None = _parameter(
        None, "tokens that the KV transfer buffer holds; not given: max_seq_len", ge=32
    )
    stream_interval: int | None = _parameter(
        None, "tokens a streamed event, after the first; not given: the release's 1", ge=1, le=1000
    )
    sampler_type: Literal["auto", "TorchSampler", "TRTLLMSampler"] | None = _parameter(
        None, "which sampler (dialect 1.x); not given: the release's choice"
    )
    allreduce_strategy: Literal["AUTO", "MNNVL"] | None = _parameter(
        None, "how GPUs add up (dialect 1.x); not given: MNNVL where a server spans nodes"
    )
    iter_perf_stats: bool = _parameter(False, "true: servers collect statistics of their steps")
    ctx_torch_compile: bool = _parameter(
        False, "true: context servers compile whole graphs (dialect 1.x: piecewise CUDA graphs)"
    )
    ctx_cuda_graphs: bool = _parameter(
        False, "false: off on context servers (dialect 1.x); true: as the release has it"
    )
    gen_postprocess_workers: int | None = _parameter(
        None, "processes of a generation server that make text of tokens; not given: none", ge=0, le=64
    )
    ctx_environment: dict[str, str] = _parameter(
        {}, "variables of the context servers, name to value; replaces the recipe's"
    )
    gen_environment: dict[str, str] = _parameter(
        {}, "variables of the generation servers, name to value; replaces the recipe's"
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
    stack: str | None = _parameter(
        None,
        "constants of the serving model: v5.1, v6.0, none, or a file of `calibrate`; not given: the dialect's",
    )
    # Outside of these bounds a Beta between 400 and 20,000 tokens has no room for a spread of 0.5.
    prompt_mean_tokens: int = _parameter(
        9400, "mean of the built-in prompt lengths; the stacks' constants hold at 9400", ge=1000, le=13_000
    )
    lengths_file: str | None = _parameter(
        None, "CSV of token lengths or prompt histogram; not given: the built-in shapes"
    )
    # the load
    server_target_qps: float = _parameter(3.85, "queries per second that LoadGen offers", gt=0, le=100_000)
    min_query_count: int | None = _parameter(
        None,
        "queries at the least; not given: LoadGen's own, one permutation of the data set",
        ge=1,
        le=1_000_000,
    )
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
    time_limit: str = _parameter("4:00:00", "wall time of the job, h:mm:ss", pattern=TIME_LIMIT)
    segment: int | None = _parameter(None, "nodes that must share one NVLink domain (sbatch --segment)", ge=1)
    container_image: str | None = _parameter(None, "path of the .sqsh image, or its registry name")
    container_mounts: str | None = _parameter(None, "host:container paths, separated by commas")
    work_dir: str | None = _parameter(
        None, "folder in the container in which the servers start", pattern=r"^(/|REDACTED_path)"
    )
    client_dir: str | None = _parameter(
        None, "folder with LoadGen and numpy for the client; 00_setup builds it"
    )
    setup_jobs: Literal["none", "probe", "all"] = _parameter(
        "probe", "jobs of 00_setup: none, a look at one node, or also image and client where absent"
    )
    mpi: Literal["pmix", "pmi2", "none"] = _parameter(
        "pmix", "srun's --mpi; 00's probe says what yours offers"
    )
    request_gpus: bool = _parameter(True, "false: no --gpus-per-node, where Slurm does not manage the GPUs")
    sbatch_options: tuple[str, ...] = _parameter(
        (), "further sbatch options, such as --reservation; none that the job script sets"
    )
    load_stagger_s: int = _parameter(
        5, "seconds between the starts of servers that share a node (dialect 1.x)", ge=0, le=600
    )
    # Dynamo
    dynamo_release: Literal["0.8", "1.4"] = _parameter("1.4", "whose flags are written; 0.8 is MLPerf v6.0's")
    dynamo_discovery: Literal["etcd", "file"] | None = _parameter(
        None, "how its parts meet; not given: file on one machine with 1.4, etcd otherwise"
    )
    dynamo_dir: str = _parameter(".venv-dynamo", "virtual environment with ai-dynamo, for rehearsals")
    # the other ways to serve and to measure
    system_name: str | None = _parameter(None, "SYSTEM_NAME of the NVIDIA harness", pattern=r"^[\w.-]+$")
    harness_dir: str | None = _parameter(None, "path of closed/NVIDIA, for client: nvidia_harness")
    endpoint_url: tuple[str, ...] = _parameter(
        (), "http://host:port of a server that is up, or a list of its front ends', for engine: external"
    )
    endpoint: Literal["/v1/completions", "/v1/chat/completions"] = _parameter(
        "/v1/completions",
        "where requests go; chat (TensorRT-LLM alone knows it so): empty messages and prompt_token_ids",
    )
    served_model: str | None = _parameter(
        None,
        "the model's name in requests; not given: Meta's, behind Dynamo the checkpoint's path",
        pattern=r"^\S+$",
    )

    provenance: dict[str, str] = Field(default_factory=dict, exclude=True, repr=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value):
        if isinstance(value, str) and any(ord(c) < 32 or ord(c) == 127 for c in value):
            raise ValueError("text on one line, without control characters")
        return tuple(value) if isinstance(value, list) else value

    @field_validator("ctx_environment", "gen_environment", mode="before")
    @classmethod
    def _environment(cls, value):
        if not isinstance(value, dict):
            raise ValueError("a mapping of a variable's name to its value")
        for name, text in value.items():
            plain = type(text) in (str, int, float) and all(32 <= ord(c) != 127 for c in str(text))
            if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII) or not plain:
                raise ValueError(
                    f"a variable's name and its value, text on one line (in quotes), not {name!r}: {text!r}"
                )
            if name.startswith(OUR_VARIABLES):
                raise ValueError(f"none of the job script's own variables, and {name} is one. Leave it out")
        return {name: str(text) for name, text in value.items()}

    @field_validator("dynamo_release", mode="before")
    @classmethod
    def _release(cls, value):
        return str(value) if type(value) is float else value

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

    @field_validator("sbatch_options")
    @classmethod
    def _options(cls, value):
        for option in value:
            match = re.fullmatch(SBATCH_OPTION, option)
            if not match:
                raise ValueError(f"--name or --name=value, without blanks and quotes, not {option!r}")
            if match[1] in OUR_SBATCH_OPTIONS:
                raise ValueError(
                    f"none of the job script's own options, and --{match[1]} is one. Leave it out"
                )
        return value

    @field_validator("endpoint_url", mode="before")
    @classmethod
    def _one_url(cls, value):
        return (value,) if isinstance(value, str) else value

    @field_validator("endpoint_url")
    @classmethod
    def _urls(cls, value):
        for url in value:
            if not re.fullmatch(ENDPOINT_URL, url):
                raise ValueError(f"http://host:port, without user and query, not {url!r}")
            port = re.search(r":(\d+)(/|$)", url)
            if port and not 1 <= int(port[1]) <= 65535:
                raise ValueError("a port of 1 to 65535 in http://host:port")
        parts = [urllib.parse.urlsplit(url) for url in value]
        if len({(part.scheme, part.path.rstrip("/")) for part in parts}) > 1 or len(set(value)) < len(value):
            raise ValueError("front ends of one server: each once, all with the same scheme and path")
        return value

    @property
    def transfer_backend(self) -> str:
        return self.kv_transfer_backend or {"v5.1": "MPI", "1.x": "NIXL"}[self.trtllm_dialect]

    @property
    def router(self) -> str:
        return self.routing or {"trtllm": "round_robin", "dynamo": "least_tokens"}[self.orchestrator]

    @property
    def serving_stack(self) -> str:
        return self.stack or {"v5.1": "v5.1", "1.x": "v6.0"}[self.trtllm_dialect]

    @property
    def buffer_tokens(self) -> int:
        return self.kv_buffer_tokens or self.max_seq_len

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

    @property
    def model_name(self) -> str:
        """In requests. Dynamo 0.8's front ends fetch a model whose name is no path from the hub."""
        of_dynamo = self.orchestrator == "dynamo" and self.engine != "external"
        return self.served_model or (self.model_path if of_dynamo else "meta-llama/Llama-3.1-405B-Instruct")

    @property
    def discovery(self) -> str:
        # A watched folder on a network file system tells of no other node's changes.
        one_machine = self.launcher == "local" or self.node_count == 1
        return self.dynamo_discovery or ("file" if one_machine and self.dynamo_release == "1.4" else "etcd")

    @cached_property
    def doors(self) -> tuple[Part, ...]:
        """What takes requests, each on a node of its own: the orchestrators, or Dynamo's front ends."""
        word = "frontend" if self.orchestrator == "dynamo" else "orchestrator"
        names = [word] if self.num_frontends == 1 else [f"{word}{i}" for i in range(self.num_frontends)]
        return (
            tuple(Part(name, i, self.server_port + i) for i, name in enumerate(names)) if self.servers else ()
        )

    @cached_property
    def services(self) -> tuple[Part, ...]:
        """What Dynamo's parts meet through, on the first node."""
        names = ["etcd", "etcd_peer"] if self.orchestrator == "dynamo" and self.discovery == "etcd" else []
        names += ["nats"] if self.orchestrator == "dynamo" and self.dynamo_release == "0.8" else []
        first = self.server_port + self.num_frontends
        return tuple(Part(name, 0, first + i) for i, name in enumerate(names)) if self.servers else ()

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


def parameter_names() -> list[str]:
    """Every key that a params file, a notebook or -p may give."""
    return [name for name in Experiment.model_fields if name != "provenance"]


def parameter_kind(name: str) -> tuple[type, tuple[str, ...]]:
    """What a params file gives for this key: (int, float, bool, str or list; the words to choose from, if any)."""
    kind = Experiment.model_fields[name].annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return list, typing.get_args(typing.get_args(kind)[0])
    if typing.get_origin(kind) is Literal:
        return str, typing.get_args(kind)
    return typing.get_origin(kind) or kind, ()


PATTERN_WORDS = {
    SLURM_WORD: "a name as Slurm has them, without blanks and ;",
    TIME_LIMIT: "h:mm:ss, such as 4:00:00",
    ENDPOINT_URL: "http://host:port, without user and query",
}


def what_is_needed(name: str) -> str:
    """What a parameter wants, in words, from its declaration."""
    field = Experiment.model_fields[name]
    kind, options = parameter_kind(name)
    limits = {type(m).__name__: m for m in field.metadata}
    words = {
        list: "a list of text",
        dict: "a mapping of text to text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
    }[kind]
    pattern = next((found for m in field.metadata if (found := getattr(m, "pattern", None))), "")
    words = PATTERN_WORDS.get(pattern, words)
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
