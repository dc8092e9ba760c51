"""Step-latency tables: how long one context or generation step takes, per (system, TP, PP), and how much KV cache fits.

`python -m disagg_lib.serving.latency gb200 --out FILE` asks aiconfigurator-core (extra `latency`) and writes one table file;
the files in disagg_lib/data/ were made so and are read without it. A step splits into compute and communication, which depend
on the tokens in it, and attention, which depends on each request's new and past tokens: small grids instead of one big one.
"""

import argparse
import json
import logging
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from operator import add
from pathlib import Path

from ..errors import LatencyTableError
from ..files import DATA
from .stacks import Stack


@dataclass(frozen=True)
class LatencyTable:
    """One server shape. Times in ms for the whole pipeline (PP does not shorten a step); memory in bytes per GPU.

    context_ms[tokens], attention_ms[new x past] (row-major), generation_ms[batch], kv_ms[kv_batch x kv_length]; context_comm_ms and
    generation_comm_ms are the communication of a step, which stands beside the compute in context_ms and generation_ms.
    """

    system: str
    tp: int
    pp: int
    context_tokens: tuple[float, ...]
    context_ms: tuple[float, ...]
    context_comm_ms: tuple[float, ...]
    attention_new: tuple[float, ...]
    attention_past: tuple[float, ...]
    attention_ms: tuple[float, ...]
    generation_batch: tuple[float, ...]
    generation_ms: tuple[float, ...]
    generation_comm_ms: tuple[float, ...]
    kv_batch: tuple[float, ...]
    kv_length: tuple[float, ...]
    kv_ms: tuple[float, ...]
    free_bytes: float
    activation_bytes_per_token: float
    kv_bytes_per_token: float
    weights_bytes: float

    @property
    def context(self) -> tuple:
        """What `rules.context_step_ms` takes."""
        dense = tuple(map(add, self.context_ms, self.context_comm_ms))
        return self.context_tokens, dense, self.attention_new, self.attention_past, self.attention_ms

    @property
    def generation(self) -> tuple:
        """What `rules.generation_step_ms` takes."""
        dense = tuple(map(add, self.generation_ms, self.generation_comm_ms))
        return self.generation_batch, dense, self.kv_batch, self.kv_length, self.kv_ms

    def under(self, stack: Stack) -> "LatencyTable":
        """The step times of a stack."""
        context, generation = stack.context_factor, stack.generation_factor
        scaled = {
            "context_ms": context,
            "context_comm_ms": context * stack.b_context,
            "attention_ms": context,
            "generation_comm_ms": generation * stack.b_generation,
            "kv_ms": generation * stack.generation_attention,
        }
        times = {key: tuple(factor * ms for ms in getattr(self, key)) for key, factor in scaled.items()}
        times["generation_ms"] = tuple(generation * (ms + stack.host_ms) for ms in self.generation_ms)
        return replace(self, **times)

    def kv_capacity_tokens(self, fraction: float, max_num_tokens: int) -> int:
        """KV-cache tokens of one server: `fraction` of what weights and activations leave free."""
        free = self.free_bytes - self.activation_bytes_per_token * max_num_tokens
        return max(0, int(free * fraction / self.kv_bytes_per_token))


@cache
def _system_file(system: str) -> dict:
    path = DATA / f"latency_{system}.json"
    if not path.exists():
        known = sorted(file.stem.removeprefix("latency_") for file in DATA.glob("latency_*.json"))
        raise LatencyTableError(
            f"no latency table for system {system!r}; there are {', '.join(known)}. Build one with"
            f" `python -m disagg_lib.serving.latency {system} --out {path.name}` (extra `latency`)."
        )
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LatencyTableError(f"{path}: cannot be read as a latency table ({error}).") from None


def server_shapes(system: str) -> list[tuple[int, int]]:
    """The (TP, PP) pairs that the system's table holds."""
    return [tuple(map(int, key.split("x"))) for key in _system_file(system)["servers"]]


def read_table(system: str, tp: int, pp: int = 1) -> LatencyTable:
    """The table of one server shape.

    Raises
    ------
    LatencyTableError : no table for the system, or none for this TP and PP; says which there are.
    """
    content = _system_file(system)
    entry = content["servers"].get(f"{tp}x{pp}")
    if entry is None:
        known = ", ".join(f"TP{t} PP{p}" for t, p in server_shapes(system))
        raise LatencyTableError(f"no latency table for {system} TP{tp} PP{pp}; there are {known}.")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in (content["grid"] | entry).items()}
    return LatencyTable(system=system, tp=tp, pp=pp, **values)


MODEL = "meta-llama/Meta-Llama-3.1-405B"
QUANTISATION = {"gemm_quant_mode": "nvfp4", "kvcache_quant_mode": "fp8", "fmha_quant_mode": "fp8"}
# GEMM times jump when the tokens pass a multiple of the tile, 64 or 128: both sides of each jump are grid points.
_SMALL = [*range(1, 18), 24, 32, 33, 48, 49, 64, 65, 96]
_TILES = [n + side for n in range(128, 8193, 128) for side in (0, 1)]
GRID = {
    "context_tokens": sorted([*_SMALL, *_TILES, 160, 192, 193, 224, *range(8704, 20481, 512)]),
    "attention_new": [1, 16, 32, 64, 128, 256, *range(512, 8193, 512), *range(9216, 20481, 1024)],
    "attention_past": [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072, *range(4096, 20481, 2048)],
    "generation_batch": sorted([*_SMALL, *_TILES[:16], 160, 192, 193, 224, 320, 448]),
    # Decode attention drops when the batch reaches a power of two.
    "kv_batch": [1, 2, 3, 4, 8, 12, 15, 16, 20, 24, 28, 31, 32, 40, 48, 56, 63, 64, 72, 80, 96, 112, 120, 127, 128, 144, 160,
                 192, 224, 255, 256, 320, 384, 448, 511, 512, 768, 1024],
    "kv_length": [1, 512, *range(1024, 10241, 1024), *range(12288, 20481, 2048), 22016],
}  # fmt: skip


def compile_engine(system: str, tp: int, pp: int):
    """The library's model of one server shape."""
    from aiconfigurator_core.sdk import EngineHandle

    how = {"backend_version": "current", "tp_size": tp, "pp_size": pp, **QUANTISATION}
    return EngineHandle.compile(MODEL, library_system(system), "trtllm", **how)


def library_system(system: str) -> str:
    """The library's name of a system."""
    return f"{system}_sxm" if system.startswith("b") else system


# Operations that a stack may hide behind compute or fuse into it: all-reduces with their norms, and the way to the next stage.
_COMMUNICATION = ("_ar_", "embedding_ar", "p2p", "add_norm")


def _measure(handle) -> dict[str, list[float]]:
    """Ask the library at every grid point; ms. Attention and communication are told apart by the operations' names."""

    def split(ops):
        """compute, communication, attention"""
        parts = [0.0, 0.0, 0.0]
        for name, ms, *_ in ops:
            parts[2 if "attention" in name else any(word in name for word in _COMMUNICATION)] += ms
        return parts

    def context(new):
        return split(handle.run_static_per_op(batch_size=1, isl=new, osl=2)[0])

    def generation(batch, length):
        return split(handle.decode_step_per_op(batch, length, 2))

    def attention(new, past):
        return handle.predict_prefill_latency(1, new + past, past) - sum(context(new)[:2])

    values, dense = {}, [context(n) for n in GRID["context_tokens"]]
    steps = [generation(b, 1024) for b in GRID["generation_batch"]]
    values["context_ms"], values["context_comm_ms"], _ = zip(*dense, strict=True)
    values["generation_ms"], values["generation_comm_ms"], _ = zip(*steps, strict=True)
    values["attention_ms"] = [attention(n, p) for n in GRID["attention_new"] for p in GRID["attention_past"]]
    values["kv_ms"] = [generation(b, n)[2] for b in GRID["kv_batch"] for n in GRID["kv_length"]]
    return {key: [float(f"{v:.4g}") for v in row] for key, row in values.items()}


def build_table(system: str, shapes: list[tuple[int, int]]) -> dict:
    """Build a system's table with aiconfigurator-core 0.12; shapes are (TP, PP). Shapes that do not fit are left out."""
    from aiconfigurator_core.sdk import estimate_kv_cache

    servers = {}
    for tp, pp in shapes:
        memory = estimate_kv_cache(
            MODEL, library_system(system), "trtllm", "current", max_num_tokens=4096, max_batch_size=512,
            memory_fraction_kind="of_free", memory_fraction_value=1.0, tp_size=tp, pp_size=pp, **QUANTISATION,
        )  # fmt: skip
        parts = memory["memory_breakdown"]
        servers[f"{tp}x{pp}"] = {
            **_measure(compile_engine(system, tp, pp)),
            "free_bytes": memory["total_kv_size_bytes"] + parts["activations_bytes"],
            "activation_bytes_per_token": parts["activations_bytes"] / 4096,
            # The library's figure ignores PP: each stage holds its own layers only.
            "kv_bytes_per_token": memory["kv_size_per_token_bytes"] / pp,
            "weights_bytes": parts["weights_bytes"],
        }
    return {
        "source": "simulated",
        "provenance": {
            "library": f"aiconfigurator-core {version('aiconfigurator-core')} (Apache-2.0)",
            "system": library_system(system),
            "backend": "trtllm, slot current",
            "model": MODEL,
            **QUANTISATION,
        },
        "grid": GRID,
        "servers": servers,
    }


def main(arguments: list[str] | None = None) -> None:
    """Build one system's table file."""
    parser = argparse.ArgumentParser(prog="python -m disagg_lib.serving.latency", description=__doc__)
    parser.add_argument("system", help="gb200, gb300 or b200")
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--pp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, required=True, help="file to write; must not exist")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} exists; tables are never overwritten")
    logging.disable(logging.WARNING)  # the library warns about names that do not concern these queries
    table = build_table(options.system, [(tp, pp) for pp in options.pp for tp in options.tp])
    with options.out.open("x") as file:
        json.dump(table, file, separators=(",", ":"))
        file.write("\n")
    print(f"{options.out}: {len(table['servers'])} server shapes of {options.system}")


if __name__ == "__main__":
    main()
