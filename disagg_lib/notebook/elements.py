"""What the widgets share: fields that check as they are typed, messages, work in a thread."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

import ipywidgets as ipw
from IPython.display import display

from ..errors import ParameterError
from ..experiment.loading import BY_HAND
from ..experiment.parameters import Experiment, parameter_kind

MUTED = "color:var(--jp-ui-font-color2, #555)"
WIDE = ipw.Layout(width="auto")  # as wide as the box; 100 % and its margin would be wider


def show(widget: ipw.Widget, plain: str) -> None:
    """Display a widget; a viewer without widgets gets the words instead of a repr."""
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    display({"application/vnd.jupyter.widget-view+json": view, "text/plain": plain}, raw=True)


def html_box(value: str = "") -> ipw.HTML:
    return ipw.HTML(value, layout=WIDE)


MARKS = {  # what a line says -> sign, colour, role; only a problem is read out at once
    "good": ("✓", "#009e73", ""),
    "warning": ("! warning:", "#e69f00", ""),
    "problem": ("✗", "#d55e00", ' role="alert"'),
}


def message_html(text: str, kind: str = "problem") -> str:
    """A sentence with its mark, in the theme's own ink: colour alone says nothing. `kind`: one of MARKS."""
    mark, colour, role = MARKS[kind]
    return f'<div{role} style="line-height:1.4"><b style="color:{colour}">{mark}</b> {escape(text)}</div>'


def muted_html(text: str) -> str:
    """A remark, paler than the rest."""
    return f'<span style="{MUTED}">{escape(text)}</span>'


def lines_html(text: str) -> str:
    """Plain lines."""
    return f'<div style="line-height:1.4">{"<br>".join(map(escape, text.splitlines()))}</div>'


class Latest:
    """Runs `work` in a thread once its arguments have rested; shows the newest result alone."""

    def __init__(self, work: Callable, show: Callable, rest_s: float = 0.3):
        self.work, self.show, self.rest_s = work, show, rest_s
        self.task: asyncio.Task | None = None

    def cancel(self) -> None:
        """What is under way will not be shown."""
        if self.task is not None:
            self.task.cancel()

    def start(self, *arguments) -> None:
        self.cancel()
        self.task = asyncio.get_running_loop().create_task(self._run(arguments))

    async def _run(self, arguments: tuple) -> None:
        await asyncio.sleep(self.rest_s)
        self.show(await asyncio.to_thread(self.work, *arguments))


class Fields:
    """One labelled field a parameter, of its kind, what it means beside it, and what is wrong with it while one types.

    `choices`: name -> texts to choose from, besides what one types. `wide`: names whose values are long.
    """

    def __init__(
        self,
        values: Mapping[str, object],
        on_change: Callable[[], None],
        choices: Mapping[str, Sequence[str]] | None = None,
        wide: Iterable[str] = (),
    ):
        self.texts: dict[str, ipw.Text | ipw.Combobox | ipw.Checkbox] = {}
        self.notes: dict[str, ipw.HTML] = {}
        wide, choices = set(wide), choices or {}
        for name, value in values.items():
            common = {
                "description": name,
                "tooltip": Experiment.model_fields[name].description,
                "style": {"description_width": "170px"},
                "layout": ipw.Layout(width=f"min({640 if name in wide else 340}px, 100%)"),
            }
            text = "" if value is None else str(value)
            if parameter_kind(name)[0] is bool:
                field = ipw.Checkbox(bool(value), indent=True, **common)
            elif name in choices:
                field = ipw.Combobox(value=text, options=tuple(choices[name]), **common)
            else:
                field = ipw.Text(value=text, **common)
            field.observe(lambda _: on_change(), "value")
            self.texts[name], self.notes[name] = field, html_box()

    def rows(self, names: Iterable[str]) -> ipw.VBox:
        line = ipw.Layout(flex_flow="row wrap", align_items="center", width="100%")
        note = ipw.Layout(flex="1 1 260px", width="auto", min_width="0")
        for name in names:
            self.notes[name].layout = note
        return ipw.VBox([ipw.HBox([self.texts[n], self.notes[n]], layout=line) for n in names], layout=WIDE)

    def typed(self) -> dict[str, object]:
        """What the fields say; None where nothing is given, which for a tick is no tick."""
        return {name: _as_typed(name, field.value) for name, field in self.texts.items()}

    def tell(self, problems: Mapping[str, str], remarks: Mapping[str, str] | None = None) -> None:
        for name, note in self.notes.items():
            if name in problems:
                note.value = message_html(problems[name])
            elif remarks and name in remarks:
                note.value = message_html(remarks[name], kind="warning")
            else:
                note.value = muted_html(Experiment.model_fields[name].description)


def _as_typed(name: str, value: str | bool) -> object:
    """The value that a text or tick means for this parameter; itself where it means none, for the check to say what is needed."""
    if isinstance(value, str):
        value, kind = value.strip(), parameter_kind(name)[0]
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    return value or None


def problems_by_field(error: ParameterError, fields: Iterable[str]) -> dict[str, str]:
    """An error's lines by the field they are about; '' for what is about no single field."""
    found: dict[str, str] = {}
    for line in str(error).splitlines():
        origin, colon, rest = line.partition(": ")
        words = rest if colon and origin in BY_HAND else line
        name = next((field for field in fields if words.startswith(f"{field}: ")), "")
        found[name] = " ".join(filter(None, (found.get(name), words.removeprefix(f"{name}: "))))
    return found
