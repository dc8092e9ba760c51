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
from .elements import (
    WIDE,
    Fields,
    Latest,
    html_box,
    lines_html,
    message_html,
    muted_html,
    problems_by_field,
    show,
)
from .live import front_end_is_live
from .pictures import topology_svg
from .predicted import predict

CONTEXT = ("num_ctx_servers", "ctx_tp_size", "ctx_pp_size", "ctx_batch_size", "ctx_max_num_tokens")
GENERATION = ("num_gen_servers", "gen_tp_size", "gen_batch_size", "gen_max_num_tokens")
SHARED = ("gpus_per_node", "server_target_qps")


def topology_text(e: Experiment) -> str:
    """GPU count, nodes, and what preflight says of them."""
    lines = [f"{topology_arithmetic(e)} on {e.node_count} nodes of {e.gpus_per_node} GPUs."]
    for c in experiment_checks(e):
        if not c.ok:
            lines.append(f"{c.level}: {c.rule}: {c.found}. Needed: {c.requirement}. To do: {c.fix}.")
    return "\n".join(lines)


BUTTON = "Write run folder"
NOT_WRITTEN = f"Not written yet: press the button '{BUTTON}'."


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
            print(predict(experiment).text())
            return
        names = (*CONTEXT, *GENERATION, *SHARED)
        self.fields = Fields({name: getattr(experiment, name) for name in names}, self._typed)
        self.picture, self.words, self.predicted, self.outcome, self.files = (html_box() for _ in range(5))
        self._prediction = Latest(predict, lambda found: setattr(self.predicted, "value", found.html()))
        self.button, second = self._write_button(), self._write_button()
        self.buttons = (self.button, second)
        self.box = self._laid_out()
        self.last_box = ipw.VBox([ipw.HBox([second, self.outcome]), self.files], layout=WIDE)
        self._typed()
        show(self.box, topology_text(experiment))

    def _write_button(self) -> ipw.Button:
        button = ipw.Button(description=BUTTON, layout=ipw.Layout(width="180px"))
        button.on_click(lambda _: self._write_pressed())
        return button

    def _laid_out(self) -> ipw.Box:
        """Fields to the left; picture, verdict and button to the right, or below where the screen is narrow."""
        groups = {"Context servers": CONTEXT, "Generation servers": GENERATION, "Nodes and load": SHARED}
        typed = []
        for title, names in groups.items():
            typed += [ipw.HTML(f"<b>{title}</b>"), self.fields.rows(names)]
        left = ipw.VBox(typed, layout=ipw.Layout(flex="0 1 380px", width="auto"))
        seen = [self.picture, self.words, self.predicted, ipw.HBox([self.button, self.outcome])]
        right = ipw.VBox(seen, layout=ipw.Layout(flex="1 1 420px", width="auto", min_width="0"))
        wrapped = ipw.Layout(flex_flow="row wrap", align_items="flex-start", width="auto")
        box = ipw.Box([left, right], layout=wrapped)
        box.add_class("disagg-topology")
        return box

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
        """The run folder of what the form describes: the one that is written already, else a new one.

        Raises ParameterError, RunFolderError.
        """
        if self._written is None or self._written[0] != self.experiment:
            self._written = (self.experiment, create_run(self.experiment, self._run_dir))
        return self._written[1]

    def written(self) -> None:
        """Headless: write the run folder and list its files. Live only the button writes; this shows it once more."""
        if not self.live:
            print(f"{(run := self.write())}\n{files_text(run)}")
            return
        show(self.last_box, NOT_WRITTEN)

    def _typed(self) -> None:
        self._prediction.cancel()
        try:
            self.last_valid, self._error = changed(self._base, self.fields.typed()), None
            problems = {}
        except ParameterError as error:
            self._error, problems = error, problems_by_field(error, self.fields.texts)
        self.fields.tell(problems)
        self._tell_written()
        if problems:
            self._draw_impossible(problems)
            return
        self.picture.value = topology_svg(self.last_valid)
        self.words.value = lines_html(topology_text(self.last_valid))
        self.predicted.value = muted_html("predicting ...")
        self._prediction.start(self.last_valid)
        for redraw in self._followers:
            redraw()

    def _draw_impossible(self, problems: dict[str, str]) -> None:
        old = f'<div style="opacity:0.35">{topology_svg(self.last_valid)}</div>'
        self.picture.value = (message_html(problems[""]) if "" in problems else "") + old
        self.words.value = message_html("The picture is that of the last valid topology.")
        self.predicted.value = ""

    def _tell_written(self) -> None:
        """What the buttons would do now, and what they did."""
        tooltip = "Writes a new run folder for this topology; nothing is overwritten"
        for button in self.buttons:
            button.disabled = bool(self._error)
            button.tooltip = f"Not yet: {self._error}" if self._error else tooltip
        self.outcome.value, self.files.value = lines_html(NOT_WRITTEN), ""
        if not self._error and self._written and self._written[0] == self.last_valid:
            run = self._written[1]
            self.outcome.value = message_html(f"{run.name} is written. Next: 04_launch", kind="good")
            self.files.value = f"<pre>{files_text(run)}</pre>"

    def _write_pressed(self) -> None:
        try:
            self.write()
            self._tell_written()
        except DisaggError as error:
            self.outcome.value = message_html(str(error))


def files_text(run: Path) -> str:
    """A line a file of a run folder: its size and its name; the job's own program is one line."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and "program" not in path.parts]
    lines = [f"{path.stat().st_size:>9,} bytes  {path.relative_to(run)}" for path in files]
    program = sum(path.stat().st_size for path in (run / "job/program").rglob("*") if path.is_file())
    lines.append(f"{program:>9,} bytes  job/program/ (the agent and the client that go with the job)")
    return "\n".join(lines)


def topology_form(experiment: Experiment, run_dir: str | None = None) -> TopologyForm:
    """Show the form (live) or its picture and words (headless); see `TopologyForm`."""
    return TopologyForm(experiment, run_dir)
