"""The planner's answer as a card and as a complete params file: for `plan`, 02 and its button."""

from collections.abc import Sequence
from pathlib import Path

import ipywidgets as ipw
import yaml
from IPython.display import display

from ..errors import DisaggError, ParameterError
from ..experiment.parameters import Experiment
from ..files import REPOSITORY
from ..serving.plan import PlanRow
from .bars import TEMPLATES
from .elements import WIDE, html_box, message_html, show
from .live import front_end_is_live
from .predicted import predict

# What a plan rests on besides its topology, or is served with; written where the parameters give it.
PLANNED_ON = (
    *("recipe", "round", "scenario", "orchestrator", "num_frontends", "dynamo_release", "routing"),
    *("gen_capacity_policy", "stack", "prompt_mean_tokens", "lengths_file", "min_query_count"),
)


def choice_values(e: Experiment, row: PlanRow) -> dict[str, object]:
    """Every key that makes this row a real run: also what the experiment says of system, dialect and node, and what
    the plan rests on (`PLANNED_ON`).

    A plan is for GPUs: planned from a rehearsal's parameters it still is what TensorRT-LLM would serve under Slurm.
    """
    real = {"engine": "trtllm", "launcher": "slurm", "container": "pyxis"}
    if e.engine == "trtllm":
        real |= {"launcher": e.launcher, "container": e.container}
    stated = {name: getattr(e, name) for name in ("trtllm_dialect", "gpu_system", "gpus_per_node")}
    given = {n: getattr(e, n) for n in PLANNED_ON if not e.provenance[n].startswith(("default", "recipe "))}
    if "num_frontends" in given:  # each on a node of its own
        given["num_frontends"] = max(1, min(e.num_frontends, row.gpus // e.gpus_per_node))
    return real | stated | given | {"gen_cuda_graphs": "original"} | row.params()


def choice_text(e: Experiment, row: PlanRow) -> str:
    """A params file: what was planned and how sure that is, then its keys."""
    head = (
        f"# Planned for {row.gpus + row.gpus_idle} GPUs: {row.layout}. Simulated, not measured.\n"
        f"# Highest VALID queries/s {row.target_qps:.2f} [{row.target_qps_low:.2f}, {row.target_qps_high:.2f}], median [range] over"
        f" draws; at server_target_qps VALID in {100 * row.p_valid:.0f} % of loads of other seeds.\n"
    )
    return head + yaml.safe_dump(choice_values(e, row), sort_keys=False)


def write_choice(e: Experiment, row: PlanRow, path: Path) -> Path:
    """Write the params file.

    Raises
    ------
    ParameterError : it is there already, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(choice_text(e, row))
    except FileExistsError:
        raise ParameterError(
            f"{path}: is there already, and nothing is overwritten. Choose another name"
        ) from None
    except OSError as error:
        raise ParameterError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def free_plan_path(row: PlanRow) -> Path:
    """params/plan_<GPUs>gpu.yaml, or with a number if that is taken."""
    stem = REPOSITORY / f"params/plan_{row.gpus + row.gpus_idle}gpu"
    paths = (Path(f"{stem}{f'_{n}' * (n > 1)}.yaml") for n in range(1, 1000))
    return next(path for path in paths if not path.exists())


_ANSWER = TEMPLATES.from_string("""
<div style="border:2px solid #0072b2;border-radius:6px;padding:8px 14px;max-width:720px;line-height:1.5">
<b style="font-size:1.3em">{{ row.layout }}: {{ "%.2f" | format(row.recommended_qps) }} queries/s{{ gain }}</b><br>
{{ sure }}<br>{{ yours }}
</div>
""")


def _words(e: Experiment, row: PlanRow) -> dict[str, str]:
    found = predict(e)
    same = row.gpus + row.gpus_idle == e.gpu_count and not found.why_not
    share = row.recommended_qps / e.server_target_qps - 1
    return {
        "gain": f", {100 * share:+.0f} % over your target" if same else "",
        "sure": f"The lowest of the draws; VALID in {100 * row.p_valid:.0f} % of other seeds. Source: simulated.",
        "yours": f"Yours: {found.text()}",
    }


def show_answer(e: Experiment, ranked: Sequence[PlanRow]) -> None:
    """The first row as a card, beside what the parameters' own topology gives."""
    words, row = _words(e, ranked[0]), ranked[0]
    best = f"{row.layout}: {row.recommended_qps:.2f} queries/s{words['gain']}"
    plain = f"{best}. {words['sure']}\n{words['yours']}"
    display({"text/html": _ANSWER.render(row=row, **words), "text/plain": plain}, raw=True)


def use_a_row(e: Experiment, ranked: Sequence[PlanRow]) -> None:
    """Live: choose a row of the ranking, and a button writes its params file for 03. Headless: the first row's file as text."""
    if not front_end_is_live():
        print(choice_text(e, ranked[0]))
        return
    texts = (f"{n}: {row.layout}, {row.recommended_qps:.2f} queries/s" for n, row in enumerate(ranked, 1))
    options = list(zip(texts, ranked, strict=True))
    style, wide = {"description_width": "60px"}, ipw.Layout(width="min(520px, 100%)")
    choice = ipw.Dropdown(options=options, description="row", style=style, layout=wide)
    button, said = ipw.Button(description="Use this row in 03", layout=ipw.Layout(width="180px")), html_box()

    def pressed(_):
        try:
            path = write_choice(e, choice.value, free_plan_path(choice.value))
        except DisaggError as error:
            said.value = message_html(str(error))
            return
        name = path.relative_to(REPOSITORY).as_posix()
        said.value = message_html(f"{name} is written. Open 03_configuration and start from it.", kind="good")

    button.on_click(pressed)
    line = ipw.HBox([choice, button], layout=ipw.Layout(flex_flow="row wrap"))
    show(ipw.VBox([line, said], layout=WIDE), "A row to use in 03: run the cell to choose it")
