"""A software stack: the few constants by which its steps differ from the latency table, where each came from, how well they fit.

The constants are the same for every system and TP that the stack lists. Shipped ones stand in data/stacks.yaml; `calibrate` writes
files of the same form, one stack each. Source of the shipped values: facts on the serving model (published runs of v5.1 and v6.0).
"""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import yaml

from ..errors import CalibrationError
from ..files import DATA

ROUTERS = ("round_robin", "least_tokens")
POLICIES = ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION")


@dataclass(frozen=True)
class Stack:
    """context step = context_factor x (compute + attention + b_context x communication);
    generation step = generation_factor x (compute + generation_attention x attention + b_generation x communication + host_ms).

    `ttft_ms` is added to each request's time to first token. `router` and the policies are what the stack runs by default. The
    constants hold for the lengths they were fitted at: prompts of `mean_input_tokens` on average, answers of `mean_output_tokens` as the
    runs counted them (0: as the built-in shape has them).
    """

    name: str = "none"
    systems: tuple[str, ...] = ()
    b_context: float = 1.0
    b_generation: float = 1.0
    host_ms: float = 0.0
    ttft_ms: float = 0.0
    context_factor: float = 1.0
    generation_factor: float = 1.0
    generation_attention: float = 1.0
    router: str = "round_robin"
    ctx_capacity_policy: str = "MAX_UTILIZATION"
    gen_capacity_policy: str = "GUARANTEED_NO_EVICT"
    mean_input_tokens: float = 9400.0
    mean_output_tokens: float = 0.0
    fitted_on: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ()
    source: str = ""

    def check_system(self, system: str) -> None:
        """Refuse a system that the constants were never meant for; `none` fits all."""
        if self.systems and system not in self.systems:
            raise CalibrationError(
                f"stack {self.name} has no constants for {system}, only for {', '.join(self.systems)}. Take one of these, or stack:"
                " none, which is the latency table as it is."
            )


NO_STACK = Stack()


def _checked(values: dict, where) -> Stack:
    """A stack from plain values; CalibrationError says what does not fit."""
    try:
        numbers = [k for k, v in values.items() if isinstance(getattr(NO_STACK, k, None), float)]
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        values |= {k: float(values[k]) for k in numbers}
        stack = Stack(**values)
        wrong = [k for k in numbers if not 0 <= values[k] < 100_000]
        wrong += [k for k in ("context_factor", "generation_factor") if not 0 < getattr(stack, k) < 100]
        wrong += ["router"] if stack.router not in ROUTERS else []
        wrong += [
            k for k in ("ctx_capacity_policy", "gen_capacity_policy") if getattr(stack, k) not in POLICIES
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise CalibrationError(f"{where}: cannot be used as a stack ({error}).") from None
    if wrong or not stack.fitted_on:
        raise CalibrationError(
            f"{where}: cannot be used as a stack; wrong or missing: {', '.join(wrong or ['fitted_on'])}. `calibrate` writes such files."
        )
    return stack


@cache
def shipped_stacks() -> dict[str, Stack]:
    """The stacks of data/stacks.yaml by name, and `none`."""
    entries = yaml.safe_load((DATA / "stacks.yaml").read_text())["stacks"]
    return {"none": NO_STACK} | {n: _checked({"name": n} | v, n) for n, v in entries.items()}


def read_stack(name: str) -> Stack:
    """A shipped stack by its name, or the one in a file that `calibrate` wrote.

    Raises
    ------
    CalibrationError : neither, or the file is not a stack's.
    """
    if name in shipped_stacks():
        return shipped_stacks()[name]
    try:
        return _checked(yaml.safe_load(Path(name).read_text()), name)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CalibrationError(
            f"stack {name!r} is none of {', '.join(shipped_stacks())}, and cannot be read as a stack file ({error})."
        ) from None


def write_stack(stack: Stack, path: Path) -> None:
    """Write a stack file; never over an existing one."""
    values = {
        k: list(v) if isinstance(v, tuple) else round(v, 4) if isinstance(v, float) else v
        for k, v in asdict(stack).items()
    }
    with Path(path).open("x") as file:
        yaml.safe_dump(values, file, sort_keys=False)
