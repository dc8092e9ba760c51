"""What `plan` and `simulate` print: the model's predictions as tables, with what they depend on beside them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ..experiment.loading import load_experiment
from ..experiment.parameters import Experiment
from . import plan, screen
from .lengths import INPUT_CV, data_set_lengths, is_histogram, length_draws, scale_outputs
from .loadgen_rules import Load, Loads, official_load, random_load
from .simulate import SimulatedRun, simulate, summarise
from .stacks import NO_STACK, read_stack, shipped_stacks

PROMPT_CVS = (INPUT_CV, 0.30, 0.50)  # the built-in spread of prompt lengths, and the two reported beside it
DRAWS = 8
VERDICT = {True: "VALID", False: "INVALID"}


def spreads(e: Experiment, draws: int = DRAWS) -> list[tuple[str, tuple[np.ndarray, ...]]]:
    """(name, draws of the lengths) of what is reported side by side: the lengths file (one), or the built-in shape with three spreads."""
    if e.lengths_file:
        count = draws if is_histogram(e.lengths_file) else 1
        drawn = tuple(data_set_lengths(e.lengths_file, 405 + k) for k in range(count))
        return [(Path(e.lengths_file).name, drawn)]
    outputs, mean = read_stack(e.serving_stack).mean_output_tokens, e.prompt_mean_tokens
    return [(f"cv {cv}", length_draws(draws, outputs, cv, mean)) for cv in PROMPT_CVS]


def loads_of(e: Experiment) -> Loads:
    """The loads of the round that the experiment claims."""
    return partial(official_load, e.round, min_query_count=e.min_query_count or 100)


def _load(e: Experiment, seed: int | None) -> Load:
    """A rehearsal's load, the claimed round's, or (with a seed) another like it."""
    if e.shortened:
        return random_load(e.server_target_qps, seed or 0, 0.001, e.rehearsal_queries, equal_issue=False)
    return loads_of(e)(e.server_target_qps) if seed is None else random_load(e.server_target_qps, seed)


def _as_served(e: Experiment, lengths: np.ndarray) -> np.ndarray:
    return scale_outputs(lengths, e.rehearsal_output_tokens) if e.shortened else lengths


def simulate_table(e: Experiment, draws: int = DRAWS, other_seeds: bool = False) -> pd.DataFrame:
    """One row a prompt-length spread and draw of the lengths, at server_target_qps; a rehearsal is simulated as shortened.

    `other_seeds`: with random loads in place of the claimed round's, to see how lucky that is. A lengths file is one exact run.

    Raises
    ------
    PlanError : the QPS is beyond what the servers can keep up with.
    """
    deployment, limits, rows = plan.deployment_of(e), plan.limits_of(e), []
    for name, drawn in spreads(e, draws):
        if e.shortened or other_seeds:  # then loads differ, too
            drawn = (drawn * draws)[:draws]
        screen.check_saturation(deployment, e.server_target_qps, _as_served(e, drawn[0]))
        for draw, lengths in enumerate(drawn):
            load = _load(e, draw if e.shortened or other_seeds else None)
            row = {"topology": plan.layout_of(deployment), "prompt_lengths": name, "draw": draw}
            rows.append(row | summarise(simulate(deployment, load, _as_served(e, lengths)), limits))
    table = pd.DataFrame(rows).assign(ttft_limit_ms=limits[0], tpot_limit_ms=limits[1])
    return table.assign(loadgen_valid=table["valid"].map(VERDICT), submittable=False)


def highest_qps_table(e: Experiment, draws: int = DRAWS) -> pd.DataFrame:
    """One row: the highest QPS that stays VALID (whole runs, median [range] over draws) for each spread, beside server_target_qps."""
    deployment = plan.deployment_of(e)
    row = {"GPUs": e.gpu_count, "topology": plan.layout_of(deployment), "stack": deployment.stack.name}
    for name, drawn in spreads(e, draws):
        qps = plan.qps_over_draws(deployment, drawn, loads_of(e), plan.limits_of(e), e.server_target_qps)
        row[name] = _range(qps)
    return pd.DataFrame([row | {"server_target_qps": e.server_target_qps, "source": "simulated"}])


def advice_table(draws: int = DRAWS) -> pd.DataFrame:
    """`highest_qps_table` of the original's topologies, beside what the original advises for them (server_target_qps there)."""
    params = [load_experiment([f"params/gb200_{gpus}gpu.yaml"]) for gpus in (20, 40, 60)]
    table = pd.concat([highest_qps_table(e, draws) for e in params], ignore_index=True)
    return table.rename(columns={"server_target_qps": "the original's advice"})


def simulated_run(e: Experiment) -> SimulatedRun:
    """One run of the experiment, query by query, with the first draw of the first of the prompt spreads."""
    return simulate(plan.deployment_of(e), _load(e, None), _as_served(e, spreads(e, 1)[0][1][0]))


def _range(values: np.ndarray | pd.Series, form: str = ".2f") -> str:
    low, high = np.min(values), np.max(values)
    spread = f" [{low:{form}}, {high:{form}}]" if low < high else ""
    return f"{np.median(values):{form}}{spread}"


def format_simulation(table: pd.DataFrame) -> str:
    """Median [range] over draws for a terminal, a column a spread of prompt lengths."""
    columns = {}
    for name, part in table.groupby("prompt_lengths", sort=False):
        columns[name] = {
            "VALID": f"{int(part['valid'].sum())} of {len(part)}",
            "margin %": _range(100 * part["margin"], "+.1f"),
            "binds": part["binds"].mode()[0],
            **{f"TTFT {p} ms": _range(part[f"ttft_{p}_ms"], ".0f") for p in ("p50", "p99")},
            **{f"TPOT {p} ms": _range(part[f"tpot_{p}_ms"], ".1f") for p in ("p50", "p99")},
            "tokens/s": _range(part["completed_tokens_per_s"], ".0f"),
            "KV refused": f"{int(part['kv_refused'].sum())} of {len(part)}",
        }
    first = table.iloc[0]
    return (
        f"{first['topology']} at {first['target_qps']:g} queries/s; source: simulated\n"
        f"{pd.DataFrame(columns).rename_axis(columns='prompt lengths').to_string()}\n"
        "Median [range] over draws of the lengths. Margin: at the query that early stopping looks at.\n"
        f"Limits: TTFT {first['ttft_limit_ms']:g} ms, TPOT {first['tpot_limit_ms']:g} ms."
    )


def budget_of(e: Experiment, gpus: int | None = None, draws: int = DRAWS) -> screen.Budget:
    """`gpus` (or plan_gpus, or what the parameters need), with the parameters' system, round, lengths, stack and scheduling."""
    return screen.Budget(
        gpus or e.plan_gpus or e.gpu_count, e.gpu_system, e.gpus_per_node, spreads(e, draws)[0][1], plan.limits_of(e), stack=read_stack(e.serving_stack),
        chunks_overlap=e.trtllm_dialect != "v5.1", routing=e.router, gen_capacity_policy=e.gen_capacity_policy, loads=loads_of(e),
    )  # fmt: skip


def plan_table(ranked: Sequence[plan.PlanRow]) -> pd.DataFrame:
    """One row a topology with all its settings and figures, for a CSV file."""
    table = pd.DataFrame([row.as_dict() for row in ranked]).rename(columns={"layout": "topology"})
    table.insert(1, "rank", range(1, len(table) + 1))
    valid = table["p_valid"] >= 0.5
    return table.assign(loadgen_valid=valid.map(VERDICT), valid=valid, submittable="no")


# CPU seconds of the real orchestrators: a request of 9400 ids, a streamed token (150 requests, Python 3.11, no uvloop).
ORCHESTRATOR_CPU_S = {"v5.1": (19.3e-3, 21e-6), "1.x": (13.5e-3, 35e-6)}


def orchestrator_cores(dialect: str, qps: float, output_tokens: float = 646) -> float:
    """How much of a core TensorRT-LLM's own orchestrator takes at this load."""
    a_request_s, a_token_s = ORCHESTRATOR_CPU_S[dialect]
    return qps * (a_request_s + output_tokens * a_token_s)


def _stack_notes(e: Experiment) -> list[str]:
    stack = read_stack(e.serving_stack)
    fitted = "; ".join(stack.fitted_on) or "nothing: the latency table as it is"
    notes = [f"Stack {stack.name}, fitted on {fitted}"]
    for key, used in (("routing", stack.router), ("gen_capacity_policy", stack.gen_capacity_policy)):
        has = e.router if key == "routing" else getattr(e, key)
        if stack.fitted_on and has != used:
            notes.append(f"  it was fitted with {key}: {used}; here it is {has}")
    if not e.lengths_file and e.prompt_mean_tokens != stack.mean_input_tokens:
        notes.append(
            f"  its constants hold at prompts of {stack.mean_input_tokens:g} tokens on average, not {e.prompt_mean_tokens}"
        )
    return notes


def plan_notes(e: Experiment, ranked: Sequence[plan.PlanRow], draws: int = 4) -> str:
    """What the ranking depends on (prompt spreads, PP, KV refusals, aggregated servers, stack)."""
    best, notes = ranked[0], []
    gpus = best.gpus + best.gpus_idle
    for name, drawn in spreads(e, draws)[1:]:
        qps = plan.qps_over_draws(best.deployment, drawn, loads_of(e), plan.limits_of(e), best.target_qps)
        notes.append(f"With {name} of the prompt length instead of {INPUT_CV}: {_range(qps)} queries/s")
    one_stage = next((row for row in ranked if row.deployment.context.pp == 1), None)
    if best.deployment.context.pp > 1:
        instead = f"{one_stage.layout} gives {one_stage.target_qps:.2f}" if one_stage else "nothing fits"
        notes.append(f"PP of context servers is unproven; measure it first. Without it {instead} queries/s")
    if (cores := orchestrator_cores(e.trtllm_dialect, best.target_qps)) > 0.5:
        why = f"{cores:.2f} of a core at {best.target_qps:.2f} queries/s, measured on another processor"
        notes.append(f"The orchestrator is one Python process: {why}. Above about 0.8 it is the limit")
    if best.kv_refused:
        pauses = e.gen_capacity_policy == "MAX_UTILIZATION"
        waits = "a server may pause requests there, which is not modelled" if pauses else "they wait"
        notes.append(f"KV room was refused to requests at times: {waits}")
    # The aggregated engine has a stack of its own; where it knows nothing of the system, the table as it is.
    stack = shipped_stacks()["aggregated"]
    stack = stack if e.gpu_system in stack.systems else NO_STACK
    together = plan.aggregated_alternative(replace(budget_of(e, gpus, draws), stack=stack))
    ratio = best.target_qps / together.target_qps if together.target_qps else float("inf")
    notes.append(
        f"Aggregated ({together.layout}, stack {stack.name}): {together.target_qps:.2f} queries/s; disaggregation gives {ratio:.2f} times that"
    )
    return "\n".join(notes + _stack_notes(e))


def ranking(ranked: Sequence[plan.PlanRow]) -> pd.DataFrame:
    """What a person reads of a plan: queries/s are the highest that stay VALID, median [range] over draws."""
    rows = [
        {
            "topology": row.layout,
            "idle": row.gpus_idle,
            "target QPS": f"{row.target_qps:.2f} [{row.target_qps_low:.2f}, {row.target_qps_high:.2f}]",
            "P(VALID)": f"{row.p_valid:.2f}",
            "tokens/s/GPU": f"{row.tokens_per_s_per_gpu:.0f}",
            "TTFT p99 ms": f"{row.ttft_p99_ms:.0f}",
            "TPOT p99 ms": f"{row.tpot_p99_ms:.1f}",
            "binds": row.binds + " (KV refused)" * row.kv_refused,
            "ctx tray down": f"{row.without_context_server_qps:.2f}",
            "gen tray down": f"{row.without_generation_server_qps:.2f}",
        }
        for row in ranked
    ]
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="rank"))
