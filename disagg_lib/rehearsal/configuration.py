"""Read config.yaml as `trtllm-serve` does, in both dialects, and refuse what it refuses.

Light on purpose: 72 ranks of a rehearsal read this before they go to sleep, so nothing but PyYAML is imported.
Rules: TensorRT-LLM `llmapi/disagg_utils.py`; which keys each release knows: data/trtllm_keys.yaml.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from ..errors import ServeConfigError
from ..files import DATA
from ..serving.stacks import POLICIES

GROUPS = {"context_servers": "ctx", "generation_servers": "gen"}  # how messages call their servers
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size")
TRANSPORTS = ("DEFAULT", "UCX", "NIXL", "MPI", "MOONCAKE")


@dataclass(frozen=True)
class Instance:
    """One server of a group: its name in messages (ctx0, gen0), where it listens, its ranks, its engine arguments."""

    name: str
    role: str
    host: str
    port: int
    first_rank: int
    ranks: int
    engine: dict


@dataclass(frozen=True)
class ServeFile:
    """What the orchestrator and the MPI workers read."""

    dialect: str
    hostname: str
    port: int
    instances: tuple[Instance, ...]
    routers: dict
    max_retries: int


@dataclass(frozen=True)
class EngineArgs:
    """The engine arguments that the serving model acts on."""

    tp: int
    pp: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    chunked: bool
    kv_fraction: float
    graph_sizes: tuple[int, ...]
    graph_padding: bool
    transport: bool
    print_iter_log: bool
    chunks_overlap: bool
    capacity_policy: str = "GUARANTEED_NO_EVICT"


def _need(holds, message: str) -> None:
    if not holds:
        raise ServeConfigError(message)


def _whole(where: str, value, least: int = 1) -> int:
    fits = type(value) is int and value >= least
    _need(fits, f"{where}: found {value!r}; a whole number of at least {least} is needed.")
    return value


def _mapping(where: str, value) -> dict:
    _need(isinstance(value, dict), f"{where} is {value!r}; a mapping is needed.")
    return value


def load_yaml(path: Path) -> dict:
    """A YAML file that must hold a mapping."""
    try:
        return _mapping(f"{path}: the top", yaml.safe_load(Path(path).read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ServeConfigError(f"{path}: cannot be read as YAML: {error}") from None


@cache
def _key_file() -> dict:
    return load_yaml(DATA / "trtllm_keys.yaml")


@cache
def known_keys(*path: str) -> frozenset[str]:
    """The names in data/trtllm_keys.yaml at a path, e.g. known_keys("engine", "v5.1")."""
    entry = _key_file()
    for part in path:
        entry = entry[part]
    return frozenset(entry.split())


def dialect_of(content: dict) -> str:
    """`v5.1` if the file speaks in that release's flat keys (more of them than of the nested ones), else `1.x`."""
    keys = set(content).union(*(content[g] for g in GROUPS if isinstance(content.get(g), dict)))
    flat, nested = known_keys("engine", "v5.1"), known_keys("engine", "1.x")
    return "v5.1" if len(keys & flat) > len(keys & nested) else "1.x"


def _instances(where: str, group: str, entry: dict, inherited: dict, first_rank: int) -> list[Instance]:
    engine = {k: v for k, v in entry.items() if k not in ("num_instances", "urls", "router")}
    for key, value in inherited.items():
        _need(
            engine.setdefault(key, value) == value,
            f"{where}: {key} is {engine[key]!r} here and {value!r} at the top; a key at the top is inherited by both groups, so"
            " the two must be equal, or only one given.",
        )
    count = _whole(f"{where}.num_instances", entry.get("num_instances", 1))
    urls = [str(url) for url in entry.get("urls") or ()]
    fits = len(urls) == count
    _need(fits, f"{where} has {len(urls)} urls for num_instances {count}; one host:port each is needed.")
    ranks = math.prod(_whole(f"{where}.{key}", engine.get(key, 1)) for key in PARALLEL)
    role, found = group.removesuffix("_servers"), []
    for index, url in enumerate(urls):
        match = re.fullmatch(r"([^:/]+):(\d{1,5})", url)
        _need(match, f"{where}.urls has {url!r}; host:port is needed, with no scheme and no IPv6.")
        place = match[1], int(match[2]), first_rank + index * ranks, ranks
        found.append(Instance(f"{GROUPS[group]}{index}", role, *place, engine))
    return found


def read_serve_file(path: Path) -> ServeFile:
    """Read the shared file: dialect, servers in rank order, routers.

    Raises
    ------
    ServeConfigError : what the release's own reader refuses; engine keys are checked by `engine_args`, in workers only.
    """
    content = load_yaml(path)
    dialect = dialect_of(content)
    inherited = {k: v for k, v in content.items() if k not in known_keys("orchestrator", dialect)}
    instances, routers = [], {}
    for group in GROUPS:
        where = f"{path}: {group}"
        entry = _mapping(where, content.get(group, {}))
        instances += _instances(where, group, entry, inherited, sum(i.ranks for i in instances))
        router = _mapping(f"{where}.router", entry.get("router") or {})
        kind = router.get("type", "round_robin")
        fits = kind in ("round_robin", "load_balancing")
        _need(fits, f"{where}: router type {kind!r}; rehearsed are round_robin and load_balancing.")
        routers[group.removesuffix("_servers")] = kind, bool(router.get("use_tokens", False))
    seen: dict = {}
    for instance in instances:
        other = seen.setdefault((instance.host, instance.port), instance)
        _need(
            other is instance,
            f"{path}: {instance.host}:{instance.port} is the url of {other.name} and of {instance.name}; each server needs its"
            " own (a server for both roles is not rehearsed).",
        )
    port = _whole(f"{path}: port", content.get("port", 8000))
    retries = 3 if dialect == "v5.1" else _whole(f"{path}: max_retries", content.get("max_retries", 1), 0)
    hostname = str(content.get("hostname", "localhost"))
    return ServeFile(dialect, hostname, port, tuple(instances), routers, retries)


def check_engine_keys(where: str, engine: dict, dialect: str, per_worker: bool = False) -> None:
    """Refuse engine arguments that the release does not know; 1.x also checks inside objects."""
    known = known_keys("engine", "both") | known_keys("engine", dialect)
    if not per_worker:
        known |= {"free_gpu_memory_fraction"}
    unknown = sorted(set(engine) - known)
    for name in _key_file()["objects"]:
        inner = {} if engine.get(name) is None else _mapping(f"{where}: {name}", engine[name])
        if dialect == "1.x":
            unknown += [f"{name}.{key}" for key in inner if key not in known_keys("objects", name)]
    what = f"unknown engine argument {', '.join(unknown)} in dialect {dialect}"
    _need(not unknown, f"{where}: {what}; remove it or use that release's key.")
    _need(
        dialect == "1.x" or engine.get("backend") == "pytorch",
        f"{where}: backend is {engine.get('backend')!r}; this release then takes the TensorRT engine path, which this model has"
        " not. Set `backend: pytorch` at the top.",
    )


def _graph_sizes(where: str, graphs: dict, max_batch_size: int) -> tuple[int, ...]:
    """CUDA-graph sizes up to the batch, ascending: those given, or the release's default ones."""
    given, most = graphs.get("batch_sizes"), graphs.get("max_batch_size")
    both = given and most
    _need(not both, f"{where}: CUDA-graph batch_sizes and max_batch_size are both given; keep one.")
    default = (1, 2, 4, *range(8, 129, 8), 256, 512, 1024, 2048)
    sizes = given or [n for n in default if n <= (most or max_batch_size)]
    return tuple(sorted({n for n in sizes if _whole(f"{where}: CUDA-graph sizes", n) <= max_batch_size}))


def engine_args(where: str, engine: dict, dialect: str, role: str, per_worker: bool = False) -> EngineArgs:
    """Check one server's engine arguments and keep those that the serving model acts on, with the release's defaults."""
    check_engine_keys(where, engine, dialect, per_worker)
    # a.5 of the facts: a given kv_cache_config loses the group-level fraction.
    kv = engine if engine.get("kv_cache_config") is None else engine["kv_cache_config"]
    fraction = kv.get("free_gpu_memory_fraction", 0.9)
    fits = isinstance(fraction, int | float) and 0 < fraction < 1
    _need(fits, f"{where}: free_gpu_memory_fraction is {fraction!r}; a number between 0 and 1 is needed.")
    if dialect == "v5.1":
        keys = {"batch_sizes": "cuda_graph_batch_sizes", "max_batch_size": "cuda_graph_max_batch_size",
                "enable_padding": "cuda_graph_padding_enabled"}  # fmt: skip
        graphs = {k: engine.get(flat) for k, flat in keys.items()} if engine.get("use_cuda_graph") else None
        transport = "MPI"  # disaggregated_mpi_worker sets it itself
    else:
        graphs = engine.get("cuda_graph_config", {})
        transport = (engine.get("cache_transceiver_config") or {}).get("backend")
    choices = ", ".join(TRANSPORTS)
    fits = transport in (None, *TRANSPORTS)
    _need(fits, f"{where}: cache_transceiver_config.backend is {transport!r}; one of {choices}.")
    policy = (engine.get("scheduler_config") or {}).get("capacity_scheduler_policy", POLICIES[0])
    rehearsed = " and ".join(POLICIES)
    _need(policy in POLICIES, f"{where}: capacity_scheduler_policy is {policy!r}; rehearsed are {rehearsed}.")
    fits = role != "context" or engine.get("disable_overlap_scheduler")
    needed = "a context server needs `disable_overlap_scheduler: true`"
    _need(fits, f"{where}: the overlap scheduler is on; {needed}.")
    defaults = {"max_batch_size": 2048, "max_num_tokens": 8192, "max_seq_len": 131072}
    tp, pp, batch, tokens, length = (
        _whole(f"{where}: {key}", default if engine.get(key) is None else engine[key])
        for key, default in (dict.fromkeys(PARALLEL, 1) | defaults).items()
    )
    if role == "generation":
        batch = min(batch, tokens)  # each request of a step needs one token of it
    return EngineArgs(
        tp, pp, batch, tokens, length,
        chunked=bool(engine.get("enable_chunked_prefill", False)),
        kv_fraction=float(fraction),
        graph_sizes=() if graphs is None else _graph_sizes(where, graphs, batch),
        graph_padding=bool((graphs or {}).get("enable_padding", False)),
        transport=transport is not None,
        print_iter_log=bool(engine.get("print_iter_log", False)),
        chunks_overlap=dialect != "v5.1",
        capacity_policy=policy,
    )  # fmt: skip
