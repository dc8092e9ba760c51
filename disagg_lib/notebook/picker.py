"""What the notebooks show: forms, pictures and live progress at a screen, plain tables and pictures headless.

Each function decides by `front_end_is_live` which of the two it is. Live, nothing blocks: what takes long runs in a
thread or as a task of the kernel's loop, and its cell returns at once. All state is in the run folder, so a closed tab
or a new kernel loses nothing.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import ipywidgets as ipw
from IPython import get_ipython
from IPython.display import SVG, Markdown, display

from . import launch, results, run_folder, setup_jobs
from .errors import DisaggError
from .experiment import (
    REPOSITORY,
    Experiment,
    ParameterError,
    changed,
    expand,
    load_experiment,
    load_recorded,
    parameter_kind,
    topology_arithmetic,
)
from .figures import figure_interactivity, figure_latency_distributions
from .job_script import make_job_script
from .pictures import (
    chart_svg,
    marked_html,
    marked_lines,
    phase_steps,
    progress_html,
    rates,
    steps_html,
    topology_svg,
)
from .preflight import Check, checks_text, experiment_checks, require
from .serving.plan_figures import as_image
from .serving.prediction import simulate_table
from .serving.simulate import INTERACTIVE_LIMITS_MS
from .trtllm_config import config_files


def front_end_is_live() -> bool:
    """Whether a person is at a front end that shows widgets.

    The running cell's request says so itself: JupyterLab and its like allow it to ask for input (`allow_stdin` of
    Jupyter's messaging protocol); papermill, nbconvert and nbclient do not, wherever they were started. Outside a
    notebook nobody is there. The environment variable DISAGG_LIVE overrides: 1 live, 0 headless.

    Raises
    ------
    ParameterError : DISAGG_LIVE is neither 0 nor 1.
    """
    override = os.environ.get("DISAGG_LIVE", "")
    if override not in ("", "0", "1"):
        raise ParameterError(f"DISAGG_LIVE: found {override!r}, needed 1 (live), 0 (headless), or nothing")
    if override:
        return override == "1"
    kernel = getattr(get_ipython(), "kernel", None)
    request = kernel.get_parent("shell") if kernel else {}
    return bool(request.get("content", {}).get("allow_stdin"))


# -- what the widgets share

_MUTED = "color:var(--jp-ui-font-color2, #555)"
_WIDE = ipw.Layout(width="auto")  # as wide as the box; 100 % and its margin would be wider


def _show(widget: ipw.Widget, plain: str) -> None:
    """Display a widget; a viewer without widgets gets the words instead of a repr."""
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    display({"application/vnd.jupyter.widget-view+json": view, "text/plain": plain}, raw=True)


def _html(value: str = "") -> ipw.HTML:
    return ipw.HTML(value, layout=_WIDE)


def _message(text: str, good: bool = False) -> str:
    """A sentence with its mark, in the theme's own ink: colour alone says nothing."""
    mark, colour = ("✓", "#009e73") if good else ("✗", "#d55e00")
    return (
        f'<div role="alert" style="line-height:1.4"><b style="color:{colour}">{mark}</b> {escape(text)}</div>'
    )


def _lines(text: str) -> str:
    """Plain lines."""
    return f'<div style="line-height:1.4">{"<br>".join(map(escape, text.splitlines()))}</div>'


class _Latest:
    """Runs `work` in a thread once its arguments have rested; shows the newest result alone."""

    def __init__(self, work: Callable, show: Callable, rest_s: float = 0.3):
        self.work, self.show, self.rest_s = work, show, rest_s
        self.task: asyncio.Task | None = None

    def start(self, *arguments) -> None:
        if self.task is not None:
            self.task.cancel()
        self.task = asyncio.get_running_loop().create_task(self._run(arguments))

    async def _run(self, arguments: tuple) -> None:
        await asyncio.sleep(self.rest_s)
        self.show(await asyncio.to_thread(self.work, *arguments))


class _Fields:
    """One labelled text field a parameter, what it means beside it, and what is wrong with it while one types."""

    def __init__(self, values: Mapping[str, object], on_change: Callable[[], None]):
        self.texts: dict[str, ipw.Text] = {}
        self.notes: dict[str, ipw.HTML] = {}
        for name, value in values.items():
            text = ipw.Text(
                "" if value is None else str(value),
                description=name,
                tooltip=Experiment.model_fields[name].description,
                style={"description_width": "170px"},
                layout=ipw.Layout(width="min(340px, 100%)"),
            )
            text.observe(lambda _: on_change(), "value")
            self.texts[name], self.notes[name] = text, _html()

    def rows(self, names: Iterable[str]) -> ipw.VBox:
        line = ipw.Layout(flex_flow="row wrap", align_items="center", width="100%")
        note = ipw.Layout(flex="1 1 260px", width="auto", min_width="0")
        for name in names:
            self.notes[name].layout = note
        return ipw.VBox([ipw.HBox([self.texts[n], self.notes[n]], layout=line) for n in names], layout=_WIDE)

    def typed(self) -> dict[str, object]:
        return {name: _as_typed(name, text.value.strip()) for name, text in self.texts.items()}

    def tell(self, problems: Mapping[str, str], remarks: Mapping[str, str] | None = None) -> None:
        for name, note in self.notes.items():
            if name in problems:
                note.value = _message(problems[name])
            elif remarks and name in remarks:
                note.value = f'<span role="alert"><b>!</b> {escape(remarks[name])}</span>'
            else:
                note.value = (
                    f'<span style="{_MUTED}">{escape(Experiment.model_fields[name].description)}</span>'
                )


def _as_typed(name: str, text: str) -> object:
    """The value that a text means for this parameter; itself where it means none, for the check to say what is needed."""
    kind = parameter_kind(name)[0]
    if kind is bool:
        return {"true": True, "false": False}.get(text, text or None)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text or None
    return text or None


def _problems(error: ParameterError, fields: Iterable[str]) -> dict[str, str]:
    """An error's lines by the field they are about; '' for what is about no single field."""
    found: dict[str, str] = {}
    for line in str(error).splitlines():
        words = line.removeprefix("given: ")
        name = next((field for field in fields if words.startswith(f"{field}: ")), "")
        found[name] = " ".join(filter(None, (found.get(name), words.removeprefix(f"{name}: "))))
    return found


# -- the topology form (03)

CONTEXT = ("num_ctx_servers", "ctx_tp_size", "ctx_pp_size", "ctx_batch_size", "ctx_max_num_tokens")
GENERATION = ("num_gen_servers", "gen_tp_size", "gen_batch_size", "gen_max_num_tokens")
SHARED = ("gpus_per_node", "server_target_qps")


def predict_text(e: Experiment, seeds: Sequence[int] = range(4)) -> str:
    """TTFT, TPOT and verdict at the target QPS, simulated, in one sentence; or why there is no prediction."""
    if e.engine == "external":
        return "No prediction: the endpoint's topology is not known here."
    if e.scenario != "Interactive":
        return f"No prediction: the model judges by Interactive's limits, and this is {e.scenario}."
    scale = e.rehearsal_time_scale if e.engine == "rehearsal" else 1.0
    modelled = e.model_copy(update={"server_target_qps": e.server_target_qps * scale})
    try:
        table = simulate_table(modelled, seeds)
    except DisaggError as error:
        return f"No prediction: {error}"
    table = table[table["prompt_lengths"] == table["prompt_lengths"].iloc[0]]  # 02_plan has the other spreads
    median, good = table.median(numeric_only=True), int(table["valid"].sum())
    limits = INTERACTIVE_LIMITS_MS
    pace = "" if scale == 1 else f", which is {modelled.server_target_qps:g} at the modelled GPUs' own pace"
    return (
        f"At {e.server_target_qps:g} queries/s{pace}: TTFT p99 {median['ttft_p99_ms']:,.0f} ms (limit {limits[0]:g}), "
        f"TPOT p99 {median['tpot_p99_ms']:.1f} ms (limit {limits[1]:g}), VALID in {good} of {len(seeds)} seeds. "
        "Source: simulated, medians over the seeds."
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
        self.fields = _Fields({name: getattr(experiment, name) for name in names}, self._typed)
        self.picture, self.words, self.predicted, self.outcome = _html(), _html(), _html(), _html()
        self.button = ipw.Button(description="Write run folder", layout=ipw.Layout(width="180px"))
        self.button.on_click(lambda _: self._write_pressed())
        self._prediction = _Latest(predict_text, lambda text: setattr(self.predicted, "value", _lines(text)))
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
            layout=_WIDE,
        )
        self.box.add_class("disagg-topology")
        self._typed()
        _show(self.box, topology_text(experiment))

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
            self._written = (self.experiment, run_folder.create_run(self.experiment, self._run_dir))
        return self._written[1]

    def _typed(self) -> None:
        try:
            self.last_valid, self._error = changed(self._base, self.fields.typed()), None
            problems = {}
        except ParameterError as error:
            self._error, problems = error, _problems(error, self.fields.texts)
        self.fields.tell(problems)
        self.button.disabled = self._error is not None
        self.outcome.value = ""
        if self._error is not None:
            reasons = "; ".join(f"{name}: {text}" if name else text for name, text in problems.items())
            self.button.tooltip = f"Not yet: {reasons}"
            old = f'<div style="opacity:0.35">{topology_svg(self.last_valid)}</div>'
            self.picture.value = (_message(problems[""]) if "" in problems else "") + old
            self.words.value = _message("The picture is that of the last valid topology.")
            self.predicted.value = ""
            return
        self.button.tooltip = "Writes a new run folder for this topology; nothing is overwritten"
        self.picture.value = topology_svg(self.last_valid)
        self.words.value = _lines(topology_text(self.last_valid))
        self.predicted.value = f'<span style="{_MUTED}">predicting ...</span>'
        self._prediction.start(self.last_valid)
        for redraw in self._followers:
            redraw()

    def _write_pressed(self) -> None:
        try:
            run = self.write()
        except DisaggError as error:
            self.outcome.value = _message(str(error))
            return
        self.outcome.value = _message(f"{run.name} is written. Next: 04_launch", good=True)


def topology_form(experiment: Experiment, run_dir: str | None = None) -> TopologyForm:
    """Show the form (live) or its picture and words (headless); see `TopologyForm`."""
    return TopologyForm(experiment, run_dir)


# -- the site form (00)


def site_remarks(typed: Mapping[str, object], partitions: Iterable[str]) -> dict[str, str]:
    """What looks wrong from this machine, but may be right on the nodes or later: it does not stop the saving."""
    paths = {
        name: typed.get(name)
        for name in ("scratch_dir", "model_dir", "dataset_path", "harness_dir", "client_dir")
    }
    image = str(typed.get("container_image") or "")
    paths["container_image"] = image if image.endswith(".sqsh") else None
    found = {
        name: "not there, as seen from this machine"
        for name, path in paths.items()
        if isinstance(path, str) and not (REPOSITORY / expand(path)).exists()
    }
    for mount in filter(None, str(typed.get("container_mounts") or "").split(",")):
        host, colon, inside = mount.partition(":")
        if not (colon and inside.startswith("/") and Path(host).exists()):
            found["container_mounts"] = f"{mount}: needed an existing host path, a colon, an absolute path"
    if partitions and typed.get("partition") not in (None, *partitions):
        found["partition"] = f"this cluster's partitions: {', '.join(partitions)}"
    return found


class SiteForm:
    """params/site.yaml as a form: what was found on this machine above it, checks as one types, a button that saves."""

    def __init__(
        self, experiment: Experiment, values: Mapping[str, object], checks: Sequence[Check], path: Path
    ):
        self._base, self._path = experiment, path
        self._partitions: list[str] = []
        self.fields = _Fields(
            {name: values.get(name) for name in setup_jobs.SITE_KEYS + setup_jobs.EXPERIMENTS_KEYS},
            self._typed,
        )
        self.problem, self.outcome = _html(), _html()
        self.button = ipw.Button(description=f"Save {path.name}", layout=ipw.Layout(width="180px"))
        self.button.on_click(lambda _: self._save_pressed())
        found = "".join(f"<li>{_check_html(check)}</li>" for check in checks)
        marks = f'<ul style="list-style:none;padding:0;line-height:1.5">{found}</ul>'
        save = ipw.HBox([self.button, self.outcome])
        self.box = ipw.VBox(
            [ipw.HTML(marks), self.fields.rows(self.fields.texts), self.problem, save], layout=_WIDE
        )
        self.box.add_class("disagg-site")
        self._typed()
        if experiment.launcher == "slurm":
            _Latest(_partition_names, self._know, rest_s=0).start()

    def _know(self, partitions: list[str]) -> None:
        self._partitions = partitions
        self._typed()

    def _typed(self) -> None:
        typed = self.fields.typed()
        problems: dict[str, str] = {}
        try:
            made = changed(self._base, typed)
            require(check for check in experiment_checks(made) if check.rule == "secrets")
        except ParameterError as error:
            problems = _problems(error, self.fields.texts)
        except DisaggError as error:
            problems = {"": str(error)}
        self.fields.tell(problems, site_remarks(typed, self._partitions))
        self.problem.value = _message(problems[""]) if "" in problems else ""
        self.outcome.value = ""
        reasons = "; ".join(f"{name}: {text}" if name else text for name, text in problems.items())
        self.button.disabled = bool(problems)
        self.button.tooltip = (
            f"Not yet: {reasons}" if problems else "Writes the file; one that is there is kept beside it"
        )

    def _save_pressed(self) -> None:
        try:
            kept = setup_jobs.save_site(self.fields.typed(), self._path)
        except (DisaggError, OSError) as error:
            self.outcome.value = _message(str(error))
            return
        words = f"{self._path.parent.name}/{self._path.name} is written."
        self.outcome.value = _message(words + (f" The former one is {kept.name}" if kept else ""), good=True)


def _check_html(check: Check) -> str:
    """A tick or a cross, what was found, and the fix."""
    if check.ok:
        return _message(f"{check.requirement}: {check.found}", good=True)
    return _message(f"{check.requirement}: found {check.found}. To do: {check.fix}")


def _partition_names() -> list[str]:
    try:
        return [partition.name for partition in launch.partitions()]
    except DisaggError:  # the table above says that Slurm does not answer
        return []


def site_form(experiment: Experiment, found: Mapping[str, tuple], checks: Sequence[Check]) -> SiteForm | None:
    """Live: the form of params/site.yaml, filled from the file and from what was found. Headless: the checks, a line each."""
    if not front_end_is_live():
        print(checks_text(checks))
        return None
    values = {name: value for name, (value, _) in found.items()} | setup_jobs.read_site()
    form = SiteForm(experiment, values, checks, setup_jobs.SITE)
    _show(form.box, "The form of params/site.yaml: run the cell to see it")
    return form


# -- what will be written, against a preset (03)

PRESET = "params/gb200_20gpu.yaml"  # the original's run


def presets() -> list[str]:
    """Params files that describe an experiment, not a site or a system."""
    names = (f"params/{path.name}" for path in sorted((REPOSITORY / "params").glob("*.yaml")))
    return [name for name in names if not name.startswith(("params/site", "params/system"))]


def written_files(e: Experiment, job_script: bool) -> dict[str, str]:
    """File name -> text: the job script, or the engine's configuration."""
    return {"job.sh": make_job_script(e)} if job_script else config_files(e)


def _compared(e: Experiment, preset: str, job_script: bool) -> str:
    try:
        other = written_files(load_experiment([preset]), job_script)
    except ParameterError as error:
        return _message(str(error))
    return marked_html(marked_lines(written_files(e, job_script), other))


def diff_view(form: TopologyForm, job_script: bool = False) -> None:
    """What will be written for the form's topology; what differs from a preset is marked + (new) and - (preset's)."""
    if not form.live:
        other = written_files(load_experiment([PRESET]), job_script)
        for name, lines in marked_lines(written_files(form.experiment, job_script), other).items():
            text = "\n".join(lines)
            display(Markdown(f"**{name}**, against {PRESET}\n````diff\n{text}\n````"))
        return
    choice = ipw.Dropdown(options=presets(), value=PRESET, description="compare with", style={"description_width": "110px"}, layout=ipw.Layout(width="min(420px, 100%)"))  # fmt: skip
    shown = _html()
    latest = _Latest(_compared, lambda html: setattr(shown, "value", html), rest_s=0.1)

    def redraw(_=None):
        latest.start(form.last_valid, choice.value, job_script)

    choice.observe(redraw, "value")
    form.follow(redraw)
    _show(ipw.VBox([choice, shown], layout=_WIDE), "What will be written: run the cell to see it")


# -- the job monitor (04)

LOGS = {
    "server": "output_server.log",
    "workers": "output_workers.log",
    "performance": "mlperf_benchmark_performance.log",
    "accuracy": "mlperf_benchmark_accuracy.log",
}


def tail(path: Path, lines: int = 14) -> str:
    """The end of a log; reads its last 16 kB only."""
    if not path.exists():
        return "(not there yet)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16_000))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:]) or "(empty)"


def server_root() -> Path | None:
    """The folder that this kernel's Jupyter server serves; None if no such server is known."""
    from jupyter_server.serverapp import list_running_servers

    ours = (server for server in list_running_servers() if server["pid"] == os.getppid())
    return next((Path(server["root_dir"]) for server in ours), None)


def folder_link(folder: Path, words: str) -> str:
    """A link that opens a folder in JupyterLab's file browser; the path where the server does not reach it."""
    root = server_root()
    if root is None or not folder.resolve().is_relative_to(root.resolve()):
        return f"<code>{escape(str(folder))}</code>"
    path = folder.resolve().relative_to(root.resolve()).as_posix()
    arguments = escape(json.dumps({"path": path}), quote=True)
    return (
        f'<a href="#" class="jupyter-button" style="display:block;width:auto;margin:0" data-commandlinker-command="filebrowser:open-path" '
        f'data-commandlinker-args="{arguments}" title="{escape(str(folder), quote=True)}">{escape(words)}</a>'
    )


class JobMonitor:
    """A job's phases, load and logs, kept up by a task of the kernel's loop; `state` is what was seen last."""

    def __init__(self, run: Path, poll_s: float = 1.0):
        self.run, self.poll_s = run, poll_s
        self.experiment = load_recorded(run)
        self.state = launch.job_state(run, ask=False)
        self.rows: list[dict] = []
        self._new = run_folder.GrowingLines(run / "job/progress.jsonl")
        self._sure = False
        self.head, self.steps, self.progress, self.charts = _html(), _html(), _html(), _html()
        self.logs = ipw.Tab([_html() for _ in LOGS], titles=list(LOGS))
        self.logs.observe(lambda _: self._draw_log(), "selected_index")
        self.attach_button = ipw.Button(
            description="Attach", tooltip="Follow the job anew; it is not touched"
        )
        self.attach_button.on_click(lambda _: self.attach())
        self.cancel_button = ipw.Button(description="Cancel", layout=ipw.Layout(width="220px"))
        self.cancel_button.on_click(lambda _: self._cancel_pressed())
        link = ipw.HTML(folder_link(run, "Open run folder"))
        buttons = ipw.HBox(
            [self.attach_button, self.cancel_button, link],
            layout=ipw.Layout(flex_flow="row wrap", align_items="center"),
        )
        self.box = ipw.VBox(
            [self.head, self.steps, self.progress, self.charts, buttons, self.logs], layout=_WIDE
        )
        self.box.add_class("disagg-monitor")
        self._draw()

    def attach(self) -> None:
        """Follow the job from here on; whoever followed it in this kernel before stops."""
        loop, name = asyncio.get_running_loop(), f"monitor {self.run}"
        for task in asyncio.all_tasks(loop):
            if task.get_name() == name:
                task.cancel()
        self.task = loop.create_task(self._follow(), name=name)

    async def _follow(self) -> None:
        states = launch.follow(self.run, poll_s=self.poll_s)
        try:
            while (state := await asyncio.to_thread(next, states, None)) is not None:
                self.state = state
                self._draw()
        except (DisaggError, OSError) as error:
            self.head.value = _message(f"{error}. The job is not touched; Attach follows it again")

    def _draw(self) -> None:
        phases = run_folder.read_json_lines(self.run / "job/phases.jsonl")
        self.rows += self._new.new_rows()
        state, began = self.state, phases[0]["time_s"] if phases else 0.0
        job = f"job {escape(str(state.job_id))}: " if state.job_id else ""
        words = f"<b>{escape(self.run.name)}</b> · {job}<b>{escape(state.state)}</b>"
        if state.note:
            words += f" · {escape(state.note)}"
        if state.reason:
            words += f"<br>{_message(state.reason)}"
        self.head.value = words
        self.steps.value = steps_html(phase_steps(phases, self.experiment, time.time()))
        self.progress.value = progress_html(self.rows, state.ended)
        speed, outstanding = rates(self.rows, began)
        source = results.folder_source(self.run)
        charts = chart_svg(f"output tokens/s ({source})", speed) + chart_svg("outstanding queries", outstanding, "#d55e00")  # fmt: skip
        self.charts.value = f'<div style="display:flex;flex-wrap:wrap;gap:8px">{charts}</div>'
        self.cancel_button.disabled = state.ended or state.state == "not started"
        if not self._sure:
            ended = "There is no job to cancel" if self.cancel_button.disabled else "Ends the job; asks once"
            self.cancel_button.tooltip = ended
        self._draw_log()

    def _draw_log(self) -> None:
        place = self.logs.selected_index or 0
        name = list(LOGS.values())[place]
        text = escape(tail(self.run / "logs" / name))
        self.logs.children[place].value = (
            f"<code>logs/{name}</code>"
            '<pre tabindex="0" style="max-height:280px;overflow:auto;margin:0;font-size:12px;line-height:1.35;'
            f'color:var(--jp-content-font-color1,inherit)">{text}</pre>'
        )

    def _cancel_pressed(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._sure:
            self._ask(True)
            loop.call_later(10, self._ask, False)
        else:
            self._ask(False)
            self.cancel_button.disabled = True
            self._cancelling = loop.create_task(self._cancel())

    def _ask(self, sure: bool) -> None:
        self._sure = sure
        self.cancel_button.description = "Really cancel? Press again" if sure else "Cancel"
        self.cancel_button.button_style = "danger" if sure else ""

    async def _cancel(self) -> None:
        try:
            self.state = await asyncio.to_thread(launch.cancel, self.run)
            self._draw()
        except (DisaggError, OSError) as error:
            self.head.value = _message(f"not cancelled: {error}")


def follow_job(run: Path) -> JobMonitor | None:
    """Live: show the monitor and return it at once. Headless: print each phase and wait for the job's end.

    Raises
    ------
    JobError : headless, the job failed or was lost.
    """
    if not front_end_is_live():
        launch.watch(run)
        return None
    monitor = JobMonitor(run)
    _show(monitor.box, f"{run.name}: {launch.progress_line(monitor.state)}")
    monitor.attach()
    return monitor


def still_running(run: Path) -> bool:
    """Live: whether the run's job has not ended, and say so. Headless never: there the job has been waited for."""
    if not front_end_is_live():
        return False
    state = launch.job_state(run)
    if not state.ended:
        words = "no job yet: run 04_launch" if state.state == "not started" else "still running"
        print(f"{words} ({launch.progress_line(state)}). Run this cell again when the job has ended.")
    return not state.ended


# -- the run picker (05)

MOST_RUNS = 40  # ticks; `python -m disagg_lib results` takes any number


def runs_to_pick(run: Path) -> list[Path]:
    """The runs in results/, newest first, this one among them."""
    made = {path.parent.resolve() for path in run_folder.RESULTS.glob("*/experiment.yaml")} | {run.resolve()}
    newest = sorted(made, key=lambda path: (path / "experiment.yaml").stat().st_mtime, reverse=True)
    return [run.resolve(), *(path for path in newest if path != run.resolve())][:MOST_RUNS]


def _table_html(cells: Sequence[Sequence[str]]) -> str:
    """Text cells as a table whose headings are its first line and column."""
    style = 'style="text-align:left;white-space:normal;min-width:110px;vertical-align:top;padding:2px 14px 2px 0;line-height:1.4"'
    rows = "".join(
        "<tr>"
        + "".join(
            f"<{'td' if x and y else 'th'} {style}>{escape(c)}</{'td' if x and y else 'th'}>"
            for x, c in enumerate(row)
        )
        + "</tr>"
        for y, row in enumerate(cells)
    )
    return f'<div style="overflow-x:auto"><table>{rows}</table></div>'


def picked_html(runs: Sequence[Path]) -> str:
    """Table and figures of some runs, to be made in a thread."""
    if not runs:
        return "Tick a run."
    table = results.runs_table(runs)
    cells = results.table_cells(table)
    parts = [_table_html(cells)] if cells else []
    parts += [_message(f"{row.folder}: {row.error}") for row in table[table["error"] != ""].itertuples()]
    figures = []
    with contextlib.suppress(DisaggError):  # no run could be read: the lines above say why
        beside, words = results.beside_published(table)
        figures.append(figure_interactivity(beside))
        parts.append(_lines(words))
    for run in runs[:4]:
        with contextlib.suppress(DisaggError):
            figures.append(figure_latency_distributions(run))
    for figure in figures:
        picture = as_image(figure)._repr_mimebundle_()[0]["image/png"]
        parts.append(f'<img src="data:image/png;base64,{picture}" style="max-width:100%" alt="{escape(figure.get_suptitle(), quote=True)}">')  # fmt: skip
    return "".join(parts)


def run_picker(run: Path) -> None:
    """Live: tick runs, table and figures follow. Headless: the table and the figure of this run alone."""
    if not front_end_is_live():
        table = results.runs_table([run])
        print(results.format_table(table))
        if results.table_cells(table):
            beside, words = results.beside_published(table)
            print(words)
            display(as_image(figure_interactivity(beside)))
        return
    runs = runs_to_pick(run)
    ticks = [ipw.Checkbox(path == run.resolve(), description=path.name, indent=False, layout=_WIDE) for path in runs]  # fmt: skip
    shown = _html()
    latest = _Latest(picked_html, lambda html: setattr(shown, "value", html), rest_s=0.2)

    def redraw(_=None):
        chosen = [path for path, tick in zip(runs, ticks, strict=True) if tick.value]
        shown.value = f'<span style="{_MUTED}">reading {len(chosen)} runs ...</span>'
        latest.start(chosen)

    for tick in ticks:
        tick.observe(redraw, "value")
    redraw()
    listed = ipw.VBox(ticks, layout=ipw.Layout(max_height="200px", overflow="auto", width="100%"))
    box = ipw.VBox([listed, shown], layout=_WIDE)
    box.add_class("disagg-picker")
    _show(box, "Runs to compare: run the cell to tick them")
