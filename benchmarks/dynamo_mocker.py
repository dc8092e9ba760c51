"""A second opinion: `python benchmarks/dynamo_mocker.py [PARAMS ...]` sets the offline replay of Dynamo's mocker beside `simulate`.

Same arrivals, same lengths, same step times: what differs is the scheduler, which here is Dynamo's own (ai-dynamo 1.4.0, vLLM's
rules: the replay knows no TensorRT-LLM with disaggregation). Needs .venv-dynamo (`make test-dynamo` makes it). Both sides are
simulated; neither is a measurement.

How step times get in: the mocker's profile (NPZ) has one prefill time for the new tokens of a step, so attention, which depends on
what each prompt has already, is spread evenly over the load's tokens ("chunked"); or a context server takes one whole prompt at a
time, whose time is then exact ("whole prompts"). What the mocker has no place for (the stack's ttft_ms, the transfer's fixed part)
is added to its TTFT. `simulate` runs under the same rule: "whole prompts" is a context batch of one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from disagg_lib.experiment.loading import load_experiment
from disagg_lib.serving import rules
from disagg_lib.serving.latency import read_table
from disagg_lib.serving.lengths import MAX_INPUT_TOKENS
from disagg_lib.serving.loadgen_rules import Load, percentile
from disagg_lib.serving.plan import deployment_of, layout_of
from disagg_lib.serving.prediction import loads_of, spreads
from disagg_lib.serving.simulate import Deployment, ServerGroup, simulate

PYTHON = Path(__file__).parents[1] / ".venv-dynamo/bin/python"
PARAMS = ("params/gb200_20gpu.yaml", "params/gb200_72gpu_v6.0_published.yaml")
TRACE_BLOCK_TOKENS = 512
DIFFERENCES = """Where they differ by their rules:
- The mocker's first token costs a generation step after the transfer; ours comes at the step boundary where the prompt is admitted.
- "chunked": the mocker hands a finished prompt over only when its server computes no other, so prompts wait for those behind them.
- Its decode workers admit by the KV blocks that a prompt needs now (vLLM's rule); ours by the experiment's capacity policy.
- kv_router has its own cost of a worker; ours takes the server with the fewest prompt tokens."""
FIGURES = ("ttft p50", "ttft p90", "ttft p99", "tpot p50", "tpot p99")


def chunks_of(tokens: int, most: int) -> tuple[list[int], list[int]]:
    """Sizes of a prompt's chunks, and what was done before each."""
    done = list(range(0, tokens, most))
    return [min(most, tokens - start) for start in done], done


def attention_ms(context: tuple, tokens: int, most: int) -> float:
    """Attention of a whole prompt, chunk by chunk."""
    _, _, new, past, grid = context
    return sum(
        rules.interpolate_grid(new, past, grid, *chunk)
        for chunk in zip(*chunks_of(tokens, most), strict=True)
    )


def prompt_ms(context: tuple, tokens: int, most: int) -> float:
    """Time of a prompt that has a context server to itself."""
    dense = sum(rules.interpolate(*context[:2], chunk) for chunk in chunks_of(tokens, most)[0])
    return dense + attention_ms(context, tokens, most)


def prefill_profile(
    context: tuple, group: ServerGroup, prompts: np.ndarray, whole: bool
) -> tuple[list, list]:
    """New tokens of a step (a prompt's, if `whole`), and its ms."""
    most = group.max_num_tokens
    if whole:
        borders = [border + side for border in range(most, MAX_INPUT_TOKENS, most) for side in (0, 1)]
        tokens = sorted({1, *range(64, MAX_INPUT_TOKENS + 64, 64), *borders})
        return tokens, [prompt_ms(context, n, most) for n in tokens]
    a_token_ms = sum(attention_ms(context, n, most) for n in prompts) / prompts.sum()
    tokens = [n for n in context[0] if n <= most]
    return tokens, [rules.interpolate(*context[:2], n) + n * a_token_ms for n in tokens]


def decode_profile(generation: tuple, group: ServerGroup, kv_tokens: int) -> tuple[np.ndarray, ...]:
    """KV tokens of a batch (400,), mean context length (64,), and ms of a step (400, 64)."""
    held, means, sizes = (
        np.linspace(0, kv_tokens, 400),
        np.linspace(256, MAX_INPUT_TOKENS, 64),
        sorted(group.cuda_graph_sizes),
    )

    def step_ms(tokens, mean):
        batch = min(max(1.0, tokens / mean), group.max_batch_size)
        return rules.generation_step_ms(
            generation, batch, mean, sizes, group.cuda_graph_padding, rules.EAGER_FLOOR_MS
        )

    return held, means, np.array([[step_ms(tokens, mean) for mean in means] for tokens in held])


def engine_arguments(d: Deployment, prompts: np.ndarray, whole: bool, folder: Path) -> dict[str, dict]:
    """The mocker's arguments of a prefill and a decode worker; their profile is written into `folder`."""
    c, g = d.context, d.generation
    tables = [read_table(d.system, group.tp, group.pp).under(d.stack) for group in (c, g)]
    room = tables[1].kv_capacity_tokens(g.kv_fraction, g.max_num_tokens)
    prefill = prefill_profile(tables[0].context, c, prompts, whole)
    decode = decode_profile(tables[1].generation, g, room)
    names = (
        "prefill_isl",
        "prefill_ttft_ms",
        "decode_active_kv_tokens",
        "decode_context_length",
        "decode_itl",
    )
    profile = folder / "profile.npz"
    np.savez(
        profile,
        **{name: np.array(values, float) for name, values in zip(names, prefill + decode, strict=True)},
    )
    common = {
        "engine_type": "vllm", "block_size": rules.KV_BLOCK_TOKENS, "enable_prefix_caching": False,
        "planner_profile_data": str(profile), "kv_bytes_per_token": rules.KV_BYTES_PER_TOKEN,
        "kv_transfer_bandwidth": rules.TRANSFER_GB_PER_S_PER_GPU * min(c.tp * c.pp, g.tp * g.pp),
    }  # fmt: skip
    one = {"max_num_seqs": 1, "max_num_batched_tokens": 2 * MAX_INPUT_TOKENS, "enable_chunked_prefill": False}
    many = {"max_num_seqs": c.max_batch_size, "max_num_batched_tokens": c.max_num_tokens}
    return {
        "prefill": common | {"worker_type": "prefill", "num_gpu_blocks": 10**6} | (one if whole else many),
        "decode": common
        | {"worker_type": "decode", "num_gpu_blocks": room // rules.KV_BLOCK_TOKENS}
        | {
            "max_num_seqs": g.max_batch_size,
            "max_num_batched_tokens": max(g.max_num_tokens, g.max_batch_size),
        },
    }


def write_trace(path: Path, arrivals_s: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """A Mooncake trace; no block of a prompt is like another, so that nothing is reused."""
    block = 0
    with path.open("w") as file:
        for arrival, prompt, answer in zip(arrivals_s * 1e3, inputs.tolist(), outputs.tolist(), strict=True):
            blocks = -(-prompt // TRACE_BLOCK_TOKENS)
            ids = list(range(block, block + blocks))
            block += blocks
            row = {"timestamp": arrival, "input_length": prompt, "output_length": answer, "hash_ids": ids}
            file.write(json.dumps(row) + "\n")


def replay(d: Deployment, trace: Path, arguments: dict[str, dict], folder: Path) -> pd.DataFrame:
    """One row a query of the mocker's offline replay, in order of arrival."""
    rows = folder / "rows.jsonl"
    command = [
        PYTHON, "-m", "dynamo.replay", trace, "--replay-mode", "offline", "--trace-block-size", TRACE_BLOCK_TOKENS,
        "--prefill-engine-args", json.dumps(arguments["prefill"]), "--num-prefill-workers", d.context.count,
        "--decode-engine-args", json.dumps(arguments["decode"]), "--num-decode-workers", d.generation.count,
        "--router-mode", "round_robin" if d.context.router == "round_robin" else "kv_router",
        "--report-json", folder / "report.json", "--report-jsonl", rows,
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env={"DYN_LOG": "error"})
    if done.returncode:
        sys.exit(f"dynamo.replay ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return pd.read_json(rows, lines=True).sort_values("arrival_time_ms", kind="stable")


def figures(ttft_ms: np.ndarray, tpot_ms: np.ndarray, tokens_per_s: float) -> dict[str, float]:
    """A column of the table."""
    values = {"ttft": ttft_ms, "tpot": tpot_ms}
    row = {name: percentile(np.asarray(values[name[:4]]), int(name[6:]) / 100) for name in FIGURES}
    return row | {"tokens/s": tokens_per_s}


def compare(params: str, queries: int | None) -> pd.DataFrame:
    """One experiment both ways, figures in ms: columns (way, `simulate`), (way, `mocker`) and (way, `difference`) in %."""
    e = load_experiment([params])
    d, lengths = deployment_of(e), spreads(e, 1)[0][1][0]
    load = loads_of(e)(e.server_target_qps)
    load = Load(load.target_qps, load.arrivals_s[:queries], load.samples[:queries])
    added_ms = d.stack.ttft_ms + rules.TRANSFER_FIXED_MS
    columns = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way in ("whole prompts", "chunked"):
            whole = way == "whole prompts"
            same = replace(d, context=replace(d.context, max_batch_size=1)) if whole else d
            run = simulate(same, load, lengths)
            columns[way, "simulate"] = figures(
                run.ttft_ms, run.tpot_ms, run.output_tokens.sum() / run.end_s.max()
            )
            write_trace(folder / "trace.jsonl", load.arrivals_s, run.input_tokens, run.output_tokens)
            arguments = engine_arguments(d, run.input_tokens, whole, folder)
            rows = replay(d, folder / "trace.jsonl", arguments, folder)
            tpot = (rows["last_token_ms"] - rows["first_token_ms"]) / (rows["output_length"] - 1)
            tokens_per_s = rows["output_length"].sum() / rows["last_token_ms"].max() * 1e3
            columns[way, "mocker"] = figures(rows["ttft_ms"] + added_ms, tpot, tokens_per_s)
    table = pd.DataFrame(columns)
    for way in ("whole prompts", "chunked"):
        table[way, "difference"] = 100 * (table[way, "mocker"] / table[way, "simulate"] - 1)
    table.attrs["title"] = f"{layout_of(d)}, {load.target_qps:g} queries/s, {len(load.samples)} queries"
    return table.sort_index(axis=1, level=0, sort_remaining=False, ascending=False)


def main() -> None:
    """Print a table for each of the parameter files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("params", nargs="*", default=PARAMS, help="parameter files, one experiment each")
    parser.add_argument("--queries", type=int, help="only so many of the load's first queries")
    options = parser.parse_args()
    if not PYTHON.exists():
        print(f"{PYTHON} is missing: `make test-dynamo` makes it. Nothing was compared.")
        return
    for params in options.params:
        table = compare(params, options.queries)
        print(f"\n{table.attrs['title']}; source: simulated, both; difference in %")
        print(table.round(1).to_string())
    print(f"\n{DIFFERENCES}")


if __name__ == "__main__":
    main()
