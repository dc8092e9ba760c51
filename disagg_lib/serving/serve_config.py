"""Read config.yaml as `trtllm-serve` does, in both dialects, and refuse what it refuses.

Light on purpose: 72 ranks of a rehearsal read this before they go to sleep, so nothing but PyYAML is imported.
Rules: TensorRT-LLM `llmapi/disagg_utils.py`; which keys each release knows: data/trtllm_keys.yaml.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from disagg_lib.errors import DisaggError

TRANSPORTS = ("DEFAULT", "UCX", "NIXL", "MPI", "MOONCAKE")


class ServeConfigError(DisaggError):
    """A file or command line that `trtllm-serve` would refuse."""


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
    iter_stats: bool


def load_yaml(path: Path) -> dict:
    """A YAML file that must hold a mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ServeConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ServeConfigError(f"{path}: found {type(content).__name__} at the top; a mapping is needed.")
    return content


@cache
def known_keys(*path: str) -> frozenset[str]:
    """The names in data/trtllm_keys.yaml at a path, e.g. known_keys("engine", "v5.1")."""
    entry = _key_file()
    for part in path:
        entry = entry[part]
    return frozenset(entry.split())


@cache
def _key_file() -> dict:
    return load_yaml(Path(__file__).resolve().parent.parent / "data" / "trtllm_keys.yaml")


def _whole(where: str, value, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ServeConfigError(f"{where}: found {value!r}; a whole number of at least {least} is needed.")
    return value


def dialect_of(content: dict) -> str:
    """`v5.1` if the file speaks in that release's flat keys (more of them than of the nested ones), else `1.x`."""
    keys = set(content)
    for group in ("context_servers", "generation_servers"):
        keys |= set(content[group]) if isinstance(content.get(group), dict) else set()
    flat, nested = known_keys("engine", "v5.1"), known_keys("engine", "1.x")
    return "v5.1" if len(keys & flat) > len(keys & nested) else "1.x"


def _group_instances(path, group: str, entry, inherited: dict, first_rank: int) -> list[Instance]:
    if not isinstance(entry, dict):
        raise ServeConfigError(f"{path}: {group} is {type(entry).__name__}; a mapping is needed.")
    engine = {k: v for k, v in entry.items() if k not in ("num_instances", "urls", "router")}
    for key, value in inherited.items():
        if engine.setdefault(key, value) != value:
            raise ServeConfigError(
                f"{path}: {key} is {value!r} at the top and {engine[key]!r} in {group}; a key at the top is inherited by"
                " both groups, so the two must be equal, or only one given."
            )
    count = _whole(f"{path}: {group}.num_instances", entry.get("num_instances", 1), 0)
    urls = entry.get("urls")
    if count and not urls:
        raise ServeConfigError(
            f"{path}: {group} has no urls; one host:port for each of {count} servers is needed."
        )
    if len(urls or ()) != count:
        raise ServeConfigError(
            f"{path}: {group} has {len(urls or ())} urls for num_instances {count}; need one each."
        )
    sizes = [_whole(f"{path}: {group}.{k}", engine.get(k, 1), 1) for k in
             ("tensor_parallel_size", "pipeline_parallel_size")]  # fmt: skip
    ranks = sizes[0] * sizes[1]
    role = group.removesuffix("_servers")
    instances = []
    for index, url in enumerate(urls or ()):
        host, _, port = str(url).partition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ServeConfigError(
                f"{path}: {group}.urls has {url!r}; host:port is needed, with no scheme and no IPv6."
            )
        name = f"{'ctx' if role == 'context' else 'gen'}{index}"
        instances.append(Instance(name, role, host, int(port), first_rank + index * ranks, ranks, engine))
    return instances


def read_serve_file(path: Path) -> ServeFile:
    """Read the shared file: dialect, servers in rank order, routers.

    Raises
    ------
    ServeConfigError : what the release's own reader refuses; engine keys are checked by `engine_args`, in workers only.
    """
    content = load_yaml(path)
    dialect = dialect_of(content)
    inherited = {k: v for k, v in content.items() if k not in known_keys("orchestrator", dialect)}
    instances: list[Instance] = []
    for group in ("context_servers", "generation_servers"):
        first = sum(i.ranks for i in instances)
        instances += _group_instances(path, group, content.get(group) or {}, inherited, first)
        if not any(i.role == group.removesuffix("_servers") for i in instances):
            raise ServeConfigError(f"{path}: {group} has num_instances 0; at least 1 server is needed.")
    seen = {}
    for instance in instances:
        other = seen.setdefault((instance.host, instance.port), instance)
        if other is not instance:
            raise ServeConfigError(
                f"{path}: {instance.host}:{instance.port} is the url of {other.name} and of {instance.name};"
                " each server needs its own (a server for both roles is not rehearsed)."
            )
    routers = {}
    for role in ("context", "generation"):
        router = (content.get(f"{role}_servers") or {}).get("router") or {}
        if not isinstance(router, dict):
            raise ServeConfigError(
                f"{path}: {role}_servers.router is {router!r}; a mapping with type is needed."
            )
        kind = router.get("type", "round_robin")
        if kind not in ("round_robin", "load_balancing"):
            raise ServeConfigError(
                f"{path}: router type {kind!r}; rehearsed are round_robin and load_balancing."
            )
        routers[role] = (kind, bool(router.get("use_tokens", False)))
    return ServeFile(
        dialect,
        str(content.get("hostname", "localhost")),
        _whole(f"{path}: port", content.get("port", 8000), 1),
        tuple(instances),
        routers,
        3 if dialect == "v5.1" else _whole(f"{path}: max_retries", content.get("max_retries", 1), 0),
    )


def check_engine_keys(where: str, engine: dict, dialect: str, per_worker: bool = False) -> None:
    """Refuse engine arguments that the release does not know; 1.x also checks inside objects."""
    valid = known_keys("engine", "both") | known_keys("engine", dialect)
    if not per_worker:
        valid = valid | {"free_gpu_memory_fraction"}
    for name in _key_file()["objects"]:
        if not isinstance(engine.get(name), dict | None):
            raise ServeConfigError(f"{where}: {name} is {engine[name]!r}; a mapping is needed.")
    unknown = [key for key in engine if key not in valid]
    if dialect == "1.x":
        for name in _key_file()["objects"]:
            unknown += [
                f"{name}.{key}" for key in engine.get(name) or () if key not in known_keys("objects", name)
            ]
    if unknown:
        raise ServeConfigError(
            f"{where}: unknown engine argument {', '.join(unknown)} in dialect {dialect}; remove it or use that release's key."
        )
    if dialect == "v5.1" and engine.get("backend") != "pytorch":
        raise ServeConfigError(
            f"{where}: backend is {engine.get('backend')!r}; this release then takes the TensorRT engine path,"
            " which this model has not. Set `backend: pytorch` at the top."
        )


def engine_args(
    where: str, engine: dict, dialect: str, role: str | None, per_worker: bool = False
) -> EngineArgs:
    """Check one server's engine arguments and keep those that the serving model acts on, with the release's defaults."""
    check_engine_keys(where, engine, dialect, per_worker)
    kv = engine.get("kv_cache_config")
    # a.5 of the facts: a given kv_cache_config loses the group-level fraction.
    fraction = (kv or {}).get("free_gpu_memory_fraction", 0.9)
    if kv is None:
        fraction = engine.get("free_gpu_memory_fraction", 0.9)
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ServeConfigError(
            f"{where}: free_gpu_memory_fraction is {fraction!r}; a number between 0 and 1 is needed."
        )
    batch = _whole(f"{where}: max_batch_size", engine.get("max_batch_size", 2048), 1)
    if dialect == "v5.1":
        graphs = {"batch_sizes": engine.get("cuda_graph_batch_sizes"), "enable_padding": engine.get("cuda_graph_padding_enabled"),
                  "max_batch_size": engine.get("cuda_graph_max_batch_size")}  # fmt: skip
        graphs = graphs if engine.get("use_cuda_graph") else None
        transport = True  # disaggregated_mpi_worker sets the MPI transport itself
    else:
        graphs = engine.get("cuda_graph_config", {})
        backend = (engine.get("cache_transceiver_config") or {}).get("backend")
        if backend is not None and backend not in TRANSPORTS:
            raise ServeConfigError(
                f"{where}: cache_transceiver_config.backend is {backend!r}; one of {', '.join(TRANSPORTS)}."
            )
        transport = backend is not None
    sizes: list[int] = []
    if graphs is not None:
        if graphs.get("batch_sizes") and graphs.get("max_batch_size"):
            raise ServeConfigError(
                f"{where}: CUDA-graph batch_sizes and max_batch_size are both given; keep one."
            )
        most = graphs.get("max_batch_size") or batch
        if not all(isinstance(n, int) for n in [most, *(graphs.get("batch_sizes") or [])]):
            raise ServeConfigError(f"{where}: CUDA-graph sizes must be whole numbers, found {graphs}.")
        sizes = graphs.get("batch_sizes") or [
            n for n in (1, 2, 4, *range(8, 129, 8), 256, 512, 1024, 2048) if n <= most
        ]
    if role == "context" and not engine.get("disable_overlap_scheduler", False):
        raise ServeConfigError(
            f"{where}: the overlap scheduler is on; a context server needs `disable_overlap_scheduler: true`."
        )
    return EngineArgs(
        tp=_whole(f"{where}: tensor_parallel_size", engine.get("tensor_parallel_size", 1), 1),
        pp=_whole(f"{where}: pipeline_parallel_size", engine.get("pipeline_parallel_size", 1), 1),
        max_batch_size=batch,
        max_num_tokens=_whole(f"{where}: max_num_tokens", engine.get("max_num_tokens", 8192), 1),
        max_seq_len=_whole(f"{where}: max_seq_len", engine.get("max_seq_len") or 131072, 1),
        chunked=bool(engine.get("enable_chunked_prefill", False)),
        kv_fraction=float(fraction),
        graph_sizes=tuple(sorted({n for n in sizes if n <= batch})),
        graph_padding=bool((graphs or {}).get("enable_padding", False)),
        transport=transport,
        print_iter_log=bool(engine.get("print_iter_log", False)),
        iter_stats=bool(engine.get("enable_iter_perf_stats", False)),
    )
