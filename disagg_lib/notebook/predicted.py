"""What the model says of an experiment at its load: one answer, the same draws as `simulate` and 02, in words or as bars."""

from dataclasses import dataclass

from ..errors import DisaggError, PlanError
from ..experiment.parameters import Experiment
from ..serving import plan, prediction, screen
from ..serving.lengths import scale_outputs
from ..serving.simulate import INTERACTIVE_LIMITS_MS
from .bars import Bar, bars_html
from .elements import lines_html, muted_html


@dataclass(frozen=True)
class Predicted:
    """Medians over draws of the lengths at the target QPS with their ranges, all in ms; or `why_not` there is no prediction."""

    why_not: str = ""
    load: str = ""
    ttft_ms: tuple[float, float, float] = (0, 0, 0)  # median, lowest, highest
    tpot_ms: tuple[float, float, float] = (0, 0, 0)
    valid: int = 0

    @property
    def bars(self) -> list[Bar]:
        rows = zip(
            ("TTFT", "TPOT"), (self.ttft_ms, self.tpot_ms), INTERACTIVE_LIMITS_MS, ("s", "ms"), strict=True
        )
        found = []
        for name, values, limit_ms, unit in rows:
            median, low, high, limit = (ms / (1e3 if unit == "s" else 1) for ms in (*values, limit_ms))
            words = f"{median:.1f} {unit} [{low:.1f}, {high:.1f}], limit {limit:g} {unit}"
            found.append(Bar(f"{name} p99", values[0], limit_ms, words))
        return found

    @property
    def verdict(self) -> str:
        return f"{self.load}: VALID in {self.valid} of {prediction.DRAWS} draws of the lengths"

    def text(self) -> str:
        if self.why_not:
            return f"No prediction: {self.why_not}"
        figures = ", ".join(f"{bar.name} {bar.words}" for bar in self.bars)
        return f"{self.verdict}; {figures}. Source: simulated, median [range] over the draws."

    def html(self) -> str:
        if self.why_not:
            return lines_html(self.text())
        source = "Source: simulated, median [range] over the draws; 02_plan has the other spreads of prompt lengths."
        return f"{lines_html(self.verdict)}{bars_html(self.bars)}{muted_html(source)}"


def predict(e: Experiment) -> Predicted:
    """The prediction for an experiment at its own load. A rehearsal's pace is taken out before and put back after."""
    if e.engine == "external":
        return Predicted("the endpoint's topology is not known here.")
    if e.scenario != "Interactive":
        return Predicted(f"the model judges by Interactive's limits, and this is {e.scenario}.")
    scale = e.rehearsal_time_scale if e.engine == "rehearsal" else 1.0
    modelled = e.model_copy(update={"server_target_qps": e.server_target_qps * scale})
    try:
        table = prediction.simulate_table(modelled)
    except PlanError as error:
        return Predicted(str(error) if scale == 1 else _beyond(e, scale))
    except DisaggError as error:
        return Predicted(str(error))
    table = table[table["prompt_lengths"] == table["prompt_lengths"].iloc[0]]
    pace = "" if scale == 1 else f" ({modelled.server_target_qps:g} at the modelled GPUs' own pace)"
    ranges = table[["ttft_p99_ms", "tpot_p99_ms"]].agg(["median", "min", "max"]).T.itertuples(index=False)
    return Predicted("", f"At {e.server_target_qps:g} queries/s{pace}", *ranges, int(table["valid"].sum()))


def _beyond(e: Experiment, scale: float) -> str:
    """A rehearsal at another pace that cannot keep up, in the field's own queries per second."""
    lengths = scale_outputs(prediction.spreads(e, 1)[0][1][0], e.rehearsal_output_tokens)
    most = min(screen.saturation_qps(plan.deployment_of(e), lengths)) / scale
    return (
        f"server_target_qps {e.server_target_qps:g} is beyond saturation: at pace {scale:g} the servers are always busy from "
        f"{most:.2f} queries/s. Choose less than {0.9 * most:.2f}, or more servers."
    )
