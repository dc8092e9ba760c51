"""04's step from a run folder to a job: the rules before the queue, and the submission, never beside another job unasked."""

from pathlib import Path

import ipywidgets as ipw
import pandas as pd

from ..checks import checks_table, require
from ..cluster import launch
from ..cluster.preflight import check_experiment
from ..cluster.runs import submit_alone
from ..errors import DisaggError, JobError
from ..experiment.loading import load_recorded
from .elements import WIDE, html_box, message_html, show
from .live import front_end_is_live
from .monitor import JobMonitor, follow_job


def checks_before(run: Path) -> pd.DataFrame:
    """The rules that can be checked before the queue; none for a run whose job is submitted.

    Raises
    ------
    PreflightError : one that stops the submission is not met.
    """
    submitted = launch.job_state(run, ask=False).state != "not started"
    checks = [] if submitted else check_experiment(load_recorded(run))
    require(checks)
    return checks_table(checks)


def submit_and_follow(run: Path, beside: bool = False):
    """Submit the run, once, and follow it: live in a monitor, headless in lines, to the end.

    Live, where another job of the same folder of runs is active, a button asks before a second one is sent.

    Raises
    ------
    JobError : the launcher refused, or (headless) another job is active and `beside` is not true, or the job failed.
    """
    try:
        state = submit_alone(run, beside)
    except JobError as refusal:
        if not front_end_is_live() or launch.read_record(run) is not None:
            raise
        return _ask(run, refusal)
    print(f"job {state.job_id}: {state.state} {state.phase}")
    return follow_job(run)


def _ask(run: Path, refusal: JobError) -> None:
    button = ipw.Button(description="Submit beside it", layout=ipw.Layout(width="180px"))
    said = html_box(message_html(str(refusal)))
    box = ipw.VBox([said, button], layout=WIDE)

    def pressed(_):
        try:
            submit_alone(run, beside=True)
            monitor = JobMonitor(run)
        except DisaggError as error:
            said.value = message_html(str(error))
            return
        box.children = [monitor.box]
        monitor.attach()

    button.on_click(pressed)
    show(box, str(refusal))
