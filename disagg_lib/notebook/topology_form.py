"""03's form: the topology, checked and drawn as it is typed."""

from collections.abc import Callable
from pathlib import Path

import ipywidgets as ipw
from IPython.display import SVG, display

from ..cluster.preflight import experiment_checks
from ..errors import DisaggError, ParameterError
from ..experiment.loading import changed
from ..experiment.parameters import Experiment
from ..experiment.topology import topology_arithmetic
from ..run.writing import create_run
from ..serving.prediction import simulate_table
from .elements import MUTED, WIDE, Fields, Latest, html_box, lines_html, message_html, problems_by_field, show
from .live import front_end_is_live
from .pictures import topology_svg

CONTEXT = ("num_ctx_servers", "ctx_tp_size", "ctx_pp_size", "ctx_batch_size", "ctx_max_num_tokens")
GENERATION = ("num_gen_servers", "gen_tp_size", "gen_batch_size", "gen_max_num_tokens")
SHARED = ("gpus_per_node", "server_target_qps")


def predict_text(e: Experiment, draws: int = 4) -> str:
    """TTFT, TPOT and verdict at the target QPS, simulated, in one sentence; or why there is no prediction."""
    if e.engine == "external":
        return "No prediction: the endpoint's topology is not known here."
    scale = e.rehearsal_time_scale if e.engine == "rehearsal" else 1.0
    modelled = e.model_copy(update={"server_target_qps": e.server_target_qps * scale})
    try:
        table = simulate_table(modelled, draws)
    except DisaggError as error:
        return f"No prediction: {error}"
    table = table[table["prompt_lengths"] == table["prompt_lengths"].iloc[0]]  # 02_plan has the other spreads
    median, good = table.median(numeric_only=True), int(table["valid"].sum())
    limits = table["ttft_limit_ms"].iloc[0], table["tpot_limit_ms"].iloc[0]
    pace = "" if scale == 1 else f", which is {modelled.server_target_qps:g} at the modelled GPUs' own pace"
    return (
        f"At {e.server_target_qps:g} queries/s{pace}: TTFT p99 {median['ttft_p99_ms']:,.0f} ms (limit {limits[0]:g}), "
        f"TPOT p99 {median['tpot_p99_ms']:.1f} ms (limit {limits[1]:g}), VALID in {good} of {len(table)} draws of the lengths. "
        "Source: simulated, medians over them."
    )


def topology_text(e: Experiment) -> str:
    """GPU count, nodes, and what preflight says of them."""
    lines = [f"{topology_arithmetic(e)} on {e.node_count} nodes of {e.gpus_per_node} GPUs."]
    lines += [
        f"{c.level}: {c.rule}: {c.found}. Needed: {c.requirement}. To do: {c.fix}."
        for c in experiment_checks(e)
        if not c.ok
    ]
    return "\n".join(lines)


class TopologyForm:
    """The topology as a form and a picture; `experiment` is what the fields say now. Headless, the parameters' own."""

    def __init__(self, experiment: Experiment, run_dir: str | None = None):
        self._base = self.last_valid = experiment
        self._error: ParameterError | None = None
        self._run_dir = run_dir
        self._written: tuple[Experiment, Path] | None = None
        self._followers: list[Callable[[], None]] = []
        self.live = front_end_is_live()
        if not self.live:
            display(SVG(topology_svg(experiment)))
            print(topology_text(experiment))
            print(predict_text(experiment))
            return
        names = (*CONTEXT, *GENERATION, *SHARED)
        self.fields = Fields({name: getattr(experiment, name) for name in names}, self._typed)
        self.picture, self.words, self.predicted, self.outcome = (
            html_box(),
            html_box(),
            html_box(),
            html_box(),
        )
        self.button = ipw.Button(description="Write run folder", layout=ipw.Layout(width="180px"))
        self.button.on_click(lambda _: self._write_pressed())
        self._prediction = Latest(
            predict_text, lambda text: setattr(self.predicted, "value", lines_html(text))
        )
        self.box = ipw.VBox(
            [
                ipw.HTML("<b>Context servers</b>"),
                self.fields.rows(CONTEXT),
                ipw.HTML("<b>Generation servers</b>"),
                self.fields.rows(GENERATION),
                ipw.HTML("<b>Nodes and load</b>"),
                self.fields.rows(SHARED),
                self.picture,
                self.words,
                self.predicted,
                ipw.HBox([self.button, self.outcome]),
            ],
            layout=WIDE,
        )
        self.box.add_class("disagg-topology")
        self._typed()
        show(self.box, topology_text(experiment))

    @property
    def experiment(self) -> Experiment:
        """What the form describes.

        Raises
        ------
        ParameterError, TopologyError : the form is not valid now.
        """
        if self._error is not None:
            raise self._error
        return self.last_valid

    def follow(self, redraw: Callable[[], None]) -> None:
        """Call `redraw` now and after each valid change."""
        self._followers.append(redraw)
        redraw()

    def write(self) -> Path:
        """The run folder of what the form describes: the one its button has written, else a new one.

        Raises
        ------
        ParameterError, RunFolderError
        """
        if self._written is None or self._written[0] != self.experiment:
            self._written = (self.experiment, create_run(self.experiment, self._run_dir))
        return self._written[1]

    def _typed(self) -> None:
        try:
            self.last_valid, self._error = changed(self._base, self.fields.typed()), None
            problems = {}
        except ParameterError as error:
            self._error, problems = error, problems_by_field(error, self.fields.texts)
        self.fields.tell(problems)
        self.button.disabled = self._error is not None
        self.outcome.value = ""
        if self._error is not None:
            reasons = "; ".join(f"{name}: {text}" if name else text for name, text in problems.items())
            self.button.tooltip = f"Not yet: {reasons}"
            old = f'<div style="opacity:0.35">{topology_svg(self.last_valid)}</div>'
            self.picture.value = (message_html(problems[""]) if "" in problems else "") + old
            self.words.value = message_html("The picture is that of the last valid topology.")
            self.predicted.value = ""
            return
        self.button.tooltip = "Writes a new run folder for this topology; nothing is overwritten"
        self.picture.value = topology_svg(self.last_valid)
        self.words.value = lines_html(topology_text(self.last_valid))
        self.predicted.value = f'<span style="{MUTED}">predicting ...</span>'
        self._prediction.start(self.last_valid)
        for redraw in self._followers:
            redraw()

    def _write_pressed(self) -> None:
        try:
            run = self.write()
        except DisaggError as error:
            self.outcome.value = message_html(str(error))
            return
        self.outcome.value = message_html(f"{run.name} is written. Next: 04_launch", good=True)


def topology_form(experiment: Experiment, run_dir: str | None = None) -> TopologyForm:
    """Show the form (live) or its picture and words (headless); see `TopologyForm`."""
    return TopologyForm(experiment, run_dir)
