"""00's form: what is about the site, remarked on as it is typed."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ipywidgets as ipw

from ..checks import Check, checks_text, require
from ..cluster import slurm
from ..cluster.preflight import experiment_checks
from ..cluster.site_file import EXPERIMENTS_KEYS, SITE, SITE_KEYS, read_site, save_site
from ..errors import DisaggError, ParameterError
from ..experiment.loading import changed
from ..experiment.parameters import Experiment
from ..files import REPOSITORY, expand
from .elements import WIDE, Fields, Latest, html_box, message_html, problems_by_field, show
from .live import front_end_is_live

NEEDED = ("partition", "account", "scratch_dir", "container_image")  # what nearly every site gives
OTHERS = tuple(key for key in SITE_KEYS + EXPERIMENTS_KEYS if key not in NEEDED)
PATHS = ("scratch_dir", "model_dir", "container_image", "container_mounts", "work_dir", "dataset_path", "harness_dir", "client_dir")  # fmt: skip


def site_remarks(typed: Mapping[str, object], partitions: Iterable[str]) -> dict[str, str]:
    """What looks wrong from this machine, but may be right on the nodes or later: it does not stop the saving."""
    names = ("scratch_dir", "model_dir", "dataset_path", "harness_dir", "client_dir")
    paths = {name: typed.get(name) for name in names}
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
        shown = {name: values.get(name) for name in NEEDED + OTHERS}
        self.fields = Fields(shown, self._typed, choices={"partition": ()}, wide=PATHS)
        self.problem, self.outcome = html_box(), html_box()
        self.button = ipw.Button(description=f"Save {path.name}", layout=ipw.Layout(width="180px"))
        self.button.on_click(lambda _: self._save_pressed())
        found = "".join(f"<li>{_check_html(check)}</li>" for check in checks)
        marks = f'<ul style="list-style:none;padding:0;line-height:1.5">{found}</ul>'
        title = f"{len(OTHERS)} more, which many sites leave empty"
        others = ipw.Accordion([self.fields.rows(OTHERS)], titles=[title])
        save = ipw.HBox([self.button, self.outcome])
        parts = [ipw.HTML(marks), self.fields.rows(NEEDED), others, self.problem, save]
        self.box = ipw.VBox(parts, layout=WIDE)
        self.box.add_class("disagg-site")
        self._typed()
        if experiment.launcher == "slurm":
            Latest(_partition_names, self._know, rest_s=0).start()

    def _know(self, partitions: list[str]) -> None:
        self._partitions = partitions
        self.fields.texts["partition"].options = tuple(partitions)
        self._typed()

    def _typed(self) -> None:
        typed = self.fields.typed()
        problems: dict[str, str] = {}
        try:
            made = changed(self._base, typed)
            require(check for check in experiment_checks(made) if check.rule == "secrets")
        except ParameterError as error:
            problems = problems_by_field(error, self.fields.texts)
        except DisaggError as error:
            problems = {"": str(error)}
        self.fields.tell(problems, site_remarks(typed, self._partitions))
        self.problem.value = message_html(problems[""]) if "" in problems else ""
        self.outcome.value = ""
        reasons = "; ".join(f"{name}: {text}" if name else text for name, text in problems.items())
        self.button.disabled = bool(problems)
        tooltip = "Writes the file; one that is there is kept beside it"
        self.button.tooltip = f"Not yet: {reasons}" if problems else tooltip

    def _save_pressed(self) -> None:
        try:
            kept = save_site(self.fields.typed(), self._path)
        except (DisaggError, OSError) as error:
            self.outcome.value = message_html(str(error))
            return
        former = f" The former one is {kept.name}" if kept else ""
        words = f"{self._path.parent.name}/{self._path.name} is written.{former}"
        self.outcome.value = message_html(words, kind="good")


def _check_html(check: Check) -> str:
    """A tick or a cross, what was found, and the fix."""
    if check.ok:
        return message_html(f"{check.requirement}: {check.found}", kind="good")
    kind = "problem" if check.level == "error" else "warning"
    return message_html(f"{check.requirement}: found {check.found}. To do: {check.fix}", kind=kind)


def _partition_names() -> list[str]:
    try:
        return [partition.name for partition in slurm.partitions()]
    except DisaggError:  # the table above says that Slurm does not answer
        return []


def site_form(experiment: Experiment, found: Mapping[str, tuple], checks: Sequence[Check]) -> SiteForm | None:
    """Live: the form of params/site.yaml, filled from the file and from what was found. Headless: the checks, a line each."""
    if not front_end_is_live():
        print(checks_text(checks))
        return None
    values = {name: value for name, (value, _) in found.items()} | read_site()
    form = SiteForm(experiment, values, checks, SITE)
    show(form.box, "The form of params/site.yaml: run the cell to see it")
    return form
