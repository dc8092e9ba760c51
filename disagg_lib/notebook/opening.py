"""How every notebook begins: what it is about in one line, a list to choose from, errors in two lines."""

from collections.abc import Callable, MutableMapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as ipw
from IPython import get_ipython
from IPython.display import display

from ..cluster.runs import run_label
from ..cluster.site_file import SITE
from ..errors import DisaggError
from ..experiment.parameters import Experiment
from ..files import REPOSITORY
from ..run.folder import newest_runs
from .elements import WIDE, html_box, show
from .live import front_end_is_live

MOST_RUNS = 40  # in a list; `run_dir` and `python -m disagg_lib results` take any


def one_line_errors() -> None:
    """Our own errors as the sentence that they are, without the frames; papermill and its status see them as before."""
    shell = get_ipython()
    if shell is None:
        return

    def short(shell, kind, error, trace, tb_offset=None):
        shell._showtraceback(kind, error, [f"{kind.__name__}: {error}", "(%tb shows where)"])

    shell.set_custom_exc((DisaggError,), short)


def headline(e: Experiment) -> str:
    """REHEARSAL or REAL, and where: the first thing to know of a notebook."""
    nodes = f"{e.node_count} node{'s' * (e.node_count > 1)}"
    partition = f"partition {e.partition}" if e.partition else "its default partition"
    if e.engine == "external":
        return f"REAL: the server at {', '.join(e.endpoint_url)}, measured from here"
    if e.engine == "rehearsal":
        where = "on this machine" if e.launcher == "local" else f"under Slurm, {nodes} of {partition}"
        return f"REHEARSAL {where}, no GPU"
    where = f"under Slurm, {partition}" if e.launcher == "slurm" else "on this machine"
    return f"REAL: {e.gpu_count} GPUs on {nodes} {where}"


def show_headline(e: Experiment, name: str = "") -> None:
    words = headline(e) + (f" · {name}" if name else "")
    html = f'<p style="font-size:1.15em"><b>{escape(words)}</b></p>'
    display({"text/html": html, "text/plain": words}, raw=True)


def show_run(namespace: MutableMapping[str, Any], run: Path, e: Experiment) -> None:
    """The line that says what a run is; live, and where no `run_dir` is given, a list of the others."""
    show_headline(e, run.name)
    if not namespace.get("run_dir"):
        choose_run(namespace, run)


def presets() -> list[str]:
    """Params files that describe an experiment, not a site or a system."""
    names = (f"params/{path.name}" for path in sorted((REPOSITORY / "params").glob("*.yaml")))
    return [name for name in names if not name.startswith(("params/site", "params/system"))]


RUN_ALL = (
    '<a href="#" class="jupyter-button" style="width:auto" data-commandlinker-command="notebook:run-all-cells" '
    'data-commandlinker-args="{}">Run all cells</a> to go on with it.'
)


def _chooser(label: str, options: Sequence, value: Any, choose: Callable[[Any], None], plain: str) -> None:
    """A list that changes what the notebook is about, and the link that runs it anew."""
    style = {"description_width": "110px"}
    choice = ipw.Dropdown(options=options, value=value, description=label, style=style, layout=ipw.Layout(width="min(640px, 100%)"))  # fmt: skip
    after = html_box()

    def chosen(change):
        choose(change["new"])
        after.value = RUN_ALL

    choice.observe(chosen, "value")
    show(ipw.VBox([choice, after], layout=WIDE), plain)


def choose_preset(namespace: MutableMapping[str, Any]) -> None:
    """Live: a list of presets to start from; what is typed in the parameters cell still wins over it."""
    if not front_end_is_live():
        return
    options: list[tuple[str, list[str] | None]] = [("the parameters cell", None)]
    for name in presets():
        files = [name] + ["params/site.yaml"] * (SITE.exists() and name != "params/rehearsal.yaml")
        options.append((" + ".join(files), files))
    now = namespace.get("chosen_preset")
    value = now if now in [files for _, files in options] else None

    def choose(files):
        namespace.update(chosen_preset=files)

    _chooser("start from", options, value, choose, "presets to start from")


def runs_to_pick(run: Path) -> list[Path]:
    """This run, then the others in results/, newest first."""
    return list(dict.fromkeys(path.resolve() for path in (run, *newest_runs())))[:MOST_RUNS]


def choose_run(namespace: MutableMapping[str, Any], run: Path) -> None:
    """Live: a list of the runs, this one chosen; another one is taken when the cells are run again."""
    if not front_end_is_live():
        return
    options = [(run_label(path), str(path)) for path in runs_to_pick(run)]
    _chooser("run", options, options[0][1], lambda path: namespace.update(chosen_run=path), run_label(run))
