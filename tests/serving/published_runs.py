"""The published disaggregated runs that the shipped stacks were fitted on, as experiments; their logs lie in ../shared."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from disagg_lib.experiment.loading import load_experiment
from disagg_lib.serving.calibrate import Observed, observe_log, observe_row
from disagg_lib.serving.plan import deployment_of

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
PUBLISHED_AT_HAND = SHARED.is_dir()


@dataclass(frozen=True)
class Published:
    """Where a run's figures are, the round it claims, and its configuration (facts on v6.0; the v5.1 one runs the same servers)."""

    source: Path
    claimed: str
    params: dict


V51 = Published(
    SHARED / "published_llama3.1-405b_v5.1_disaggregated.csv", "v5.1",
    {"num_ctx_servers": 14, "num_gen_servers": 2, "gen_tp_size": 8, "server_target_qps": 15.2},
)  # fmt: skip
_V60 = {"trtllm_dialect": "1.x", "round": "v6.0", "routing": "least_tokens", "gen_capacity_policy": "MAX_UTILIZATION",
        "gen_cuda_graphs": "powers_of_two"}  # fmt: skip
GB200_V60 = Published(
    SHARED / "mlperf_logs_v6.0/NVIDIA__GB200-NVL72_GB200-186GB_aarch64x72_TRT__Interactive", "v6.0",
    _V60 | {"num_ctx_servers": 14, "num_gen_servers": 2, "gen_tp_size": 8, "gen_batch_size": 1280, "gen_max_num_tokens": 1024,
            "server_target_qps": 22.2, "min_query_count": 49878},
)  # fmt: skip
GB300_V60 = Published(
    SHARED / "mlperf_logs_v6.0/NVIDIA__GB300-NVL72_GB300-288GB_aarch64x72_TRT__Interactive", "v6.0",
    _V60 | {"gpu_system": "gb300", "num_ctx_servers": 26, "ctx_tp_size": 2, "ctx_batch_size": 64, "num_gen_servers": 5,
            "gen_tp_size": 4, "gen_batch_size": 256, "server_target_qps": 29.3, "min_query_count": 33252},
)  # fmt: skip


def published_run(spec: Published, draws: int = 3) -> Observed:
    """The run with its own load and tokens a sample, as its stack serves it."""
    deployment = deployment_of(load_experiment([], spec.params))
    if spec.source.suffix == ".csv":
        return observe_row(
            dict(pd.read_csv(spec.source).iloc[0]), spec.claimed, deployment, spec.source.stem, draws
        )
    return observe_log(spec.source, deployment, draws)
