"""Figures against their limits, as bars on one scale: under in blue, over hatched in vermilion, words beside each."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment

LIMIT_AT = 75  # % of a bar's width
TEMPLATES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

_BARS = TEMPLATES.from_string("""
<div role="list" style="display:grid;grid-template-columns:max-content minmax(120px,320px) max-content;gap:4px 12px;align-items:center">
{% for bar in bars %}
  <span>{{ bar.name }}</span>
  <span role="img" aria-label="{{ bar.name }}: {{ bar.words }}" style="position:relative;height:14px;border:1px solid var(--jp-border-color1,#999)">
    <span style="position:absolute;inset:0 auto 0 0;width:{{ bar.width }}%;background:{{ bar.ground }}"></span>
    <span style="position:absolute;top:-3px;bottom:-3px;left:{{ limit_at }}%;width:2px;background:var(--jp-ui-font-color0,#000)"></span>
  </span>
  <span style="font-variant-numeric:tabular-nums">{{ "✗" if bar.over else "✓" }} {{ bar.words }}</span>
{% endfor %}
</div>
""")


@dataclass(frozen=True)
class Bar:
    """One figure beside its limit, in the same unit."""

    name: str
    value: float
    limit: float
    words: str

    @property
    def over(self) -> bool:
        return self.value > self.limit

    @property
    def width(self) -> float:
        return round(min(100.0, LIMIT_AT * self.value / self.limit), 1)

    @property
    def ground(self) -> str:
        return "repeating-linear-gradient(45deg,#d55e00 0 4px,#f2a36b 4px 8px)" if self.over else "#0072b2"


def bars_html(bars: Sequence[Bar]) -> str:
    return _BARS.render(bars=bars, limit_at=LIMIT_AT)
