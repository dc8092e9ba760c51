"""04's monitor of a job."""

import asyncio
import json
import os
import time
from html import escape
from pathlib import Path

import ipywidgets as ipw

from ..cluster import launch
from ..cluster.follow import follow, progress_line, watch
from ..errors import DisaggError
from ..experiment.loading import load_recorded
from ..files import GrowingLines, read_json_lines
from ..results.found import folder_source
from ..run.tables import phases_table
from .bars import TEMPLATES
from .elements import WIDE, html_box, message_html, show
from .live import front_end_is_live
from .outcome import outcome_html, outcome_text
from .progress import chart_svg, phase_steps, progress_html, rates, steps_html

LOGS = {
    "server": "output_server.log",
    "workers": "output_workers.log",
    "performance": "mlperf_benchmark_performance.log",
    "accuracy": "mlperf_benchmark_accuracy.log",
}


def tail(path: Path) -> str:
    """The end of a log; reads its last 16 kB only."""
    if not path.exists():
        return "(not there yet)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 16_000))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-14:]) or "(empty)"


def server_root() -> Path | None:
    """The folder that this kernel's Jupyter server serves; None if no such server is known."""
    from jupyter_server.serverapp import list_running_servers

    ours = (server for server in list_running_servers() if server["pid"] == os.getppid())
    return next((Path(server["root_dir"]).resolve() for server in ours), None)


def folder_link(folder: Path, words: str) -> str:
    """A link that opens a folder in JupyterLab's file browser; the path where the server does not reach it."""
    root = server_root()
    if root is None or not folder.resolve().is_relative_to(root):
        return f"<code>{escape(str(folder))}</code>"
    path = folder.resolve().relative_to(root).as_posix()
    arguments = escape(json.dumps({"path": path}), quote=True)
    return (
        f'<a href="#" class="jupyter-button" style="display:block;width:auto;margin:0" data-commandlinker-command="filebrowser:open-path" '
        f'data-commandlinker-args="{arguments}" title="{escape(str(folder), quote=True)}">{escape(words)}</a>'
    )


class JobMonitor:
    """A job's phases, load and logs, kept up by a task of the kernel's loop; `state` is what was seen last."""

    def __init__(self, run: Path):
        self.run = run
        self.experiment = load_recorded(run)
        self.state = launch.job_state(run, ask=False)
        self.rows: list[dict] = []
        self._new = GrowingLines(run / "job/progress.jsonl")
        self._sure = False
        self.head, self.steps, self.progress, self.charts, self.result = (html_box() for _ in range(5))
        self.logs = ipw.Tab([html_box() for _ in LOGS], titles=list(LOGS))
        self.logs.observe(lambda _: self._draw_log(), "selected_index")
        self.attach_button = ipw.Button(
            description="Attach", tooltip="Follow the job anew; it is not touched"
        )
        self.attach_button.on_click(lambda _: self.attach())
        self.cancel_button = ipw.Button(description="Cancel", layout=ipw.Layout(width="220px"))
        self.cancel_button.on_click(lambda _: self._cancel_pressed())
        link = ipw.HTML(folder_link(run, "Open run folder"))
        wrapped = ipw.Layout(flex_flow="row wrap", align_items="center")
        buttons = ipw.HBox([self.attach_button, self.cancel_button, link], layout=wrapped)
        parts = [self.head, self.result, self.steps, self.progress, self.charts, buttons, self.logs]
        self.box = ipw.VBox(parts, layout=WIDE)
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
        states = follow(self.run, poll_s=1.0)
        try:
            while (state := await asyncio.to_thread(next, states, None)) is not None:
                self.state = state
                self._draw()
        except (DisaggError, OSError) as error:
            self.head.value = message_html(f"{error}. The job is not touched; Attach follows it again")

    def _draw(self) -> None:
        phases = read_json_lines(self.run / "job/phases.jsonl")
        self.rows += self._new.new_rows()
        state, began = self.state, phases[0]["time_s"] if phases else 0.0
        job = f"job {escape(str(state.job_id))}: " if state.job_id else ""
        note = f" · {escape(state.note)}" if state.note else ""
        reason = f"<br>{message_html(state.reason)}" if state.reason else ""
        self.head.value = f"<b>{escape(self.run.name)}</b> · {job}<b>{escape(state.state)}</b>{note}{reason}"
        self.steps.value = steps_html(phase_steps(phases, self.experiment, time.time()))
        self.progress.value = progress_html(self.rows, state.ended)
        speed, outstanding = rates(self.rows, began)
        source = folder_source(self.run)
        charts = chart_svg(f"output tokens/s ({source})", speed) + chart_svg("outstanding queries", outstanding, "#d55e00")  # fmt: skip
        if state.ended and not self.result.value:
            self.result.value = result_html(self.run)
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
            self.head.value = message_html(f"not cancelled: {error}")


_RESULT = TEMPLATES.from_string("""
{{ outcome|safe }}
<p><b>Next: 05_analysis</b></p>
<details><summary>How long it took, and what it left</summary>{{ phases|safe }}<pre>{{ files }}</pre></details>
""")


def result_html(run: Path) -> str:
    """What an ended job grows: its outcome, how long each phase took, the files that it left."""
    phases = phases_table(run).to_html(index=False, border=0)
    return _RESULT.render(outcome=outcome_html(run), phases=phases, files=left_text(run))


def left_text(run: Path) -> str:
    """A line a log: size and name."""
    files = [*run.glob("logs/*"), *run.glob("mlperf/*/*")]
    return "\n".join(f"{path.stat().st_size:>11,} bytes  {path.relative_to(run)}" for path in sorted(files))


def follow_job(run: Path) -> JobMonitor | None:
    """Live: show the monitor and return it at once. Headless: print each phase, wait for the end, and say what came out.

    Raises
    ------
    JobError : headless, the job failed or was lost.
    """
    if not front_end_is_live():
        watch(run)
        print(f"\n{phases_table(run).to_string(index=False)}\n\n{left_text(run)}\n\n{outcome_text(run)}")
        return None
    monitor = JobMonitor(run)
    show(monitor.box, f"{run.name}: {progress_line(monitor.state)}")
    monitor.attach()
    return monitor
