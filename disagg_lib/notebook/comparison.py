"""03's comparison with a preset, line by line."""

import difflib
from collections.abc import Mapping
from html import escape

import ipywidgets as ipw
from IPython.display import Markdown, display

from ..errors import ParameterError
from ..experiment.loading import load_experiment
from ..experiment.parameters import Experiment
from ..run.config import config_files
from ..run.job_script import make_job_script
from .elements import WIDE, Latest, html_box, message_html, show
from .opening import presets
from .topology_form import TopologyForm


def marked_lines(files: Mapping[str, str], others: Mapping[str, str]) -> dict[str, list[str]]:
    """Every line of the files with its mark: ' ' in both, '+' in these alone, '-' in the others alone."""
    marked = {}
    for name, text in files.items():
        mine, theirs = text.splitlines(), others.get(name, "").splitlines()
        lines = list(difflib.unified_diff(theirs, mine, lineterm="", n=len(mine) + len(theirs)))[3:]
        marked[name] = lines or [" " + line for line in mine]
    return marked


def marked_html(marked: Mapping[str, list[str]]) -> str:
    grounds = {"+": "rgba(0,158,115,0.3)", "-": "rgba(213,94,0,0.3)", " ": "transparent"}
    parts = []
    for name, lines in marked.items():
        count = sum(line[0] != " " for line in lines)
        body = "".join(
            f'<div style="background:{grounds[line[0]]};white-space:pre">{escape(line)}</div>'
            for line in lines
        )
        parts.append(
            f"<b>{escape(name)}</b>, {count} line{'' if count == 1 else 's'} differ{'s' if count == 1 else ''}"
            '<div tabindex="0" role="region" style="width:0;min-width:100%;box-sizing:border-box;max-height:460px;overflow:auto;border:1px solid var(--jp-border-color1,#999);'
            'padding:4px;font-family:var(--jp-code-font-family,monospace);font-size:12px;line-height:1.4" '
            f'aria-label="{escape(name)}"><div style="min-width:max-content">{body}</div></div>'
        )
    return "".join(parts)


PRESET = "params/gb200_20gpu.yaml"  # the original's run


def written_files(e: Experiment, job_script: bool) -> dict[str, str]:
    """File name -> text: the job script, or the engine's configuration."""
    return {"job.sh": make_job_script(e)} if job_script else config_files(e)


def _compared(e: Experiment, preset: str, job_script: bool) -> str:
    try:
        other = written_files(load_experiment([preset]), job_script)
    except ParameterError as error:
        return message_html(str(error))
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
    shown = html_box()
    latest = Latest(_compared, lambda html: setattr(shown, "value", html), rest_s=0.1)

    def redraw(_=None):
        latest.start(form.last_valid, choice.value, job_script)

    choice.observe(redraw, "value")
    form.follow(redraw)
    show(ipw.VBox([choice, shown], layout=WIDE), "What will be written: run the cell to see it")
