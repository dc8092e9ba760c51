"""Which server runs on which ranks, GPUs and nodes. `e` is an Experiment, whose module calls this one."""

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import TopologyError


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


@dataclass(frozen=True)
class Part:
    """What serves beside the servers: an orchestrator, a front end, a service; on the node of this index."""

    name: str
    node: int
    port: int


def _server_sizes(e):
    yield from ((f"ctx{i}", "context", e.ctx_tp_size, e.ctx_pp_size) for i in range(e.num_ctx_servers))
    yield from ((f"gen{i}", "generation", e.gen_tp_size, 1) for i in range(e.num_gen_servers))


def topology_arithmetic(e) -> str:
    """The sum as one would write it down: '4 context servers x 4 + 1 generation server x 4 = 20 GPUs'."""
    ctx_size, total = e.ctx_tp_size * e.ctx_pp_size, e.gpu_count

    def plural(count, noun):
        return f"{count} {noun}{'' if count == 1 else 's'}"

    return (
        f"{plural(e.num_ctx_servers, 'context server')} x {ctx_size} + "
        f"{plural(e.num_gen_servers, 'generation server')} x {e.gen_tp_size} = {plural(total, 'GPU')}"
    )


def plan_servers(e) -> tuple[Server, ...]:
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
