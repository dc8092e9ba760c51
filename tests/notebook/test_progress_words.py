"""What 04 says of a run beside its report."""

import json

from disagg_lib.notebook.outcome import outcome_html, outcome_text


def test_an_orchestrator_that_was_the_limit_is_told(tmp_path):
    (tmp_path / "job").mkdir()
    lines = [{"mode": "performance", "time_s": second, "cpu_s": 0.95 * second} for second in range(30)]
    (tmp_path / "job/orchestrator.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for told in (outcome_text(tmp_path), outcome_html(tmp_path)):
        assert "The orchestrator, 0.95 of a core in performance, was the limit" in told


def test_an_idle_orchestrator_is_no_news(tmp_path):
    assert "The orchestrator" not in outcome_text(tmp_path)
