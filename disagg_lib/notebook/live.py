"""Whether somebody sits at this notebook."""

import os

from IPython import get_ipython

from ..errors import ParameterError


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
