"""Forms, pictures and the monitor, without a browser; tests/browser/ has them in a real JupyterLab."""

import asyncio
import os
import re
import time

import jupyter_client
import nbclient
import nbformat
import pytest

from disagg_lib.cluster import launch
from disagg_lib.errors import DisaggError, ParameterError
from disagg_lib.experiment.loading import changed, load_experiment, load_recorded
from disagg_lib.files import GrowingLines
from disagg_lib.notebook import comparison, picker, progress, topology_form
from disagg_lib.notebook import monitor as monitors
from disagg_lib.notebook.live import front_end_is_live
from disagg_lib.notebook.opening import presets, runs_to_pick
from disagg_lib.notebook.predicted import predict
from disagg_lib.run.writing import create_run
from disagg_lib.serving import prediction

SMALL = {
    "num_ctx_servers": 1,
    "rehearsal_time_scale": 0.05,
    "server_target_qps": 20.0,
    "rehearsal_queries": 600,
    "rehearsal_output_tokens": 8,
    "test_modes": ["performance"],
}
NVL72 = load_experiment(
    ["params/gb200_72gpu.yaml"], {"num_ctx_servers": 14, "ctx_tp_size": 4, "num_gen_servers": 4}
)
ASK = "from disagg_lib.notebook.live import front_end_is_live\nprint(front_end_is_live())"


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv("DISAGG_LIVE", "1")


def form_of(experiment, *first, **typed):
    """A live form into which a person has typed, pairs first."""

    async def main():
        form = topology_form.topology_form(experiment)
        for name, text in (*first, *typed.items()):
            form.fields.texts[name].value = text
        form._prediction.task.cancel()
        return form

    return asyncio.run(main())


# -- live or headless


def test_outside_a_notebook_nobody_is_there(monkeypatch):
    monkeypatch.delenv("DISAGG_LIVE", raising=False)
    assert not front_end_is_live()


@pytest.mark.parametrize(("word", "expected"), [("1", True), ("0", False)])
def test_the_environment_overrides(monkeypatch, word, expected):
    monkeypatch.setenv("DISAGG_LIVE", word)
    assert front_end_is_live() is expected


def test_another_word_in_the_override_is_refused(monkeypatch):
    monkeypatch.setenv("DISAGG_LIVE", "yes")
    with pytest.raises(ParameterError, match="DISAGG_LIVE: found 'yes', needed 1"):
        front_end_is_live()


@pytest.mark.parametrize("started_from", ["a terminal", "a notebook in JupyterLab"])
def test_nbclient_and_so_papermill_are_headless(monkeypatch, started_from):
    monkeypatch.delenv("DISAGG_LIVE", raising=False)
    if started_from != "a terminal":  # its variables are inherited
        monkeypatch.setenv("JPY_SESSION_NAME", "/somewhere/04_launch.ipynb")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(ASK)])
    nbclient.NotebookClient(notebook, timeout=60).execute()
    assert notebook.cells[0].outputs[0].text == "False\n"


def test_a_front_end_that_can_be_asked_is_live(monkeypatch):
    monkeypatch.delenv("DISAGG_LIVE", raising=False)
    manager, client = jupyter_client.manager.start_new_kernel(kernel_name="python3")
    try:
        said = []
        client.execute_interactive(
            ASK, allow_stdin=True, timeout=60, output_hook=lambda m: said.append(m["content"].get("text"))
        )
        assert "True\n" in said
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# -- the topology form


def test_a_word_for_a_number_gets_a_message_beside_its_field(live):
    form = form_of(load_experiment(), ctx_tp_size="four")
    assert "found &#x27;four&#x27; (text), needed a whole number" in form.fields.notes["ctx_tp_size"].value
    assert form.button.disabled and "ctx_tp_size: found 'four'" in form.button.tooltip


def test_an_impossible_topology_is_explained_and_cannot_be_written(live, results_dir):
    form = form_of(load_experiment(), gen_tp_size="3")
    assert "does not divide the model&#x27;s 128 attention heads" in form.fields.notes["gen_tp_size"].value
    with pytest.raises(ParameterError, match="gen_tp_size"):
        form.write()
    assert not results_dir.exists()


def test_a_straddling_server_is_explained_above_the_picture(live):
    form = form_of(load_experiment(), num_ctx_servers="1", ctx_tp_size="2", gen_tp_size="4")
    assert "would straddle 2 nodes" in form.picture.value and form.button.disabled


def test_every_wrong_field_has_its_own_message(live):
    form = form_of(load_experiment(), ctx_batch_size="0", server_target_qps="nan", gpus_per_node="")
    for name in ("ctx_batch_size", "server_target_qps"):
        assert "✗" in form.fields.notes[name].value
    assert "✗" not in form.fields.notes["gen_tp_size"].value


def test_a_mended_form_is_written_once_with_what_was_typed(live, results_dir):
    form = form_of(load_experiment(), ("ctx_tp_size", "x"), ("ctx_tp_size", "8"))
    assert not form.button.disabled
    form.button.click()
    (run,) = results_dir.iterdir()
    assert form.write() == run and list(results_dir.iterdir()) == [run]
    recorded = load_recorded(run)
    assert recorded.ctx_tp_size == 8 and recorded.provenance["ctx_tp_size"] == "typed here"
    assert recorded.provenance["engine"].endswith("rehearsal.yaml")
    assert "is written" in form.outcome.value


def test_a_taken_run_dir_is_said_beside_the_button(live, tmp_path):
    async def main():
        form = topology_form.topology_form(load_experiment(), str(tmp_path))
        form._prediction.task.cancel()
        form.button.click()
        return form.outcome.value

    assert "nothing is overwritten" in asyncio.run(main())


def test_the_prediction_follows_and_says_that_it_is_simulated(live):
    async def main():
        form = topology_form.topology_form(load_experiment())
        await form._prediction.task
        return form.predicted.value

    words = asyncio.run(main())
    assert "TTFT p99" in words and "simulated" in words and "limit 80 ms" in words


def test_a_bad_value_withdraws_the_prediction_of_the_good_one_before_it(live):
    async def main():
        form = topology_form.topology_form(load_experiment())
        form.fields.texts["num_ctx_servers"].value = "5"
        form.fields.texts["num_ctx_servers"].value = "x"
        await asyncio.sleep(1.5)
        return form.predicted.value

    assert asyncio.run(main()) == ""


def test_there_is_no_prediction_for_limits_that_the_model_does_not_know():
    words = predict(load_experiment(given={"scenario": "Offline"})).text()
    assert words.startswith("No prediction") and "Offline" in words


def test_a_load_beyond_saturation_is_said_in_the_fields_own_queries():
    assert "beyond saturation" in predict(load_experiment(given={"server_target_qps": 99.0})).text()
    slow = predict(load_experiment(given={"server_target_qps": 60.0, "rehearsal_time_scale": 0.1})).why_not
    assert slow.startswith("server_target_qps 60 is beyond saturation: at pace 0.1")
    assert 20 < float(re.search(r"less than ([\d.]+)", slow)[1]) < 60


def test_every_door_asks_the_same_draws_and_shows_their_range():
    e = load_experiment(["params/gb200_20gpu.yaml"])
    table = prediction.simulate_table(e)
    first = table[table["prompt_lengths"] == table["prompt_lengths"].iloc[0]]
    found = predict(e)
    assert found.ttft_ms == tuple(first["ttft_p99_ms"].agg(["median", "min", "max"]))
    low, high = (f"{ms / 1e3:.1f}" for ms in found.ttft_ms[1:])
    assert f"[{low}, {high}]" in found.text() and f"VALID in {found.valid} of 8 draws" in found.html()


def test_headless_the_form_prints_and_gives_the_experiment_back(monkeypatch, capsys):
    monkeypatch.setenv("DISAGG_LIVE", "0")
    e = load_experiment()
    assert topology_form.topology_form(e).experiment is e
    printed = capsys.readouterr().out
    assert "= 20 GPUs on 5 nodes of 4 GPUs." in printed and "TPOT p99" in printed


# -- what will be written


def test_lines_that_differ_from_the_preset_are_marked():
    marked = comparison.marked_lines({"a": "one\ntwo\n", "b": "new\n"}, {"a": "one\nTWO\n"})
    assert marked == {"a": [" one", "-TWO", "+two"], "b": ["+new"]}
    assert comparison.marked_lines({"a": "one\n"}, {"a": "one\n"}) == {"a": [" one"]}


def test_the_marked_text_is_escaped():
    page = comparison.marked_html({"a": ["+<script>"]})
    assert "<script>" not in page and "1 line" in page


def test_presets_are_experiments_alone():
    assert "params/gb200_72gpu.yaml" in presets()
    assert not any("site" in name or "system" in name for name in presets())


# -- the monitor


def rows(*pairs, mode="performance", total=100):
    return [{"time_s": t, "mode": mode, "done": done, "total": total, "tokens": 10 * done, "outstanding": 1, "failed": 0}
            for t, done in pairs]  # fmt: skip


def test_phases_are_done_running_or_to_come():
    seen = [{"time_s": 0.0, "phase": "container"}, {"time_s": 2.0, "phase": "bind"}]
    steps = progress.phase_steps(seen, load_experiment(), 5.0)
    assert steps[:3] == [("container", "done", 2.0), ("bind", "now", 3.0), ("workers", "to come", None)]
    assert steps[-1] == ("done", "to come", None)
    steps = progress.phase_steps(
        [*seen, {"time_s": 4.0, "phase": "failed: out of luck"}], load_experiment(), 9.0
    )
    assert steps[-2:] == [("bind", "failed", 2.0), ("failed", "failed", None)]


def test_the_time_to_go_follows_from_the_last_minutes_pace():
    assert progress.remaining_s(rows((0, 0), (10, 20))) == 40.0
    assert progress.remaining_s(rows((0, 5), (10, 5))) is None
    assert "20 of 100 queries done, about 40.0 s to go" in progress.progress_html(rows((0, 0), (10, 20)))


def test_token_rates_do_not_cross_from_one_mode_to_the_next():
    both = rows((0, 0), (1, 5)) + rows((2, 0), (3, 1), mode="accuracy")
    speed, outstanding = progress.rates(both, 0)
    assert speed == [(1, 50.0), (3, 10.0)] and len(outstanding) == 4


def test_a_chart_has_no_more_than_a_few_hundred_points():
    line = re.search(r'points="([^"]+)"', progress.chart_svg("x", [(t, 1.0) for t in range(14_400)]))[1]
    assert 100 < len(line.split()) < 300


def test_growing_lines_are_read_once_and_whole(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = GrowingLines(path)
    assert lines.new_rows() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert lines.new_rows() == [{"a": 1}, {"a": 2}]
    assert lines.new_rows() == []
    with path.open("a") as file:
        file.write(": 3}\n")
    assert lines.new_rows() == [{"a": 3}]


def test_the_end_of_a_long_progress_file_is_enough_for_the_state(tmp_path):
    run = create_run(load_experiment(given=SMALL), tmp_path / "run")
    line = '{"time_s": 1, "mode": "performance", "done": %d, "failed": 0, "tokens": 1, "outstanding": 1, "total": 9}\n'
    (run / "job/progress.jsonl").write_text("".join(line % i for i in range(10_000)))
    assert launch.job_state(run, ask=False).progress["done"] == 9999


def test_the_monitor_costs_little_and_cancels_at_the_second_press(live, tmp_path, capsys):
    run = create_run(load_experiment(given=SMALL), tmp_path / "run")
    launch.submit(run)

    async def main():
        start = time.monotonic()
        monitor = monitors.follow_job(run)
        assert time.monotonic() - start < 1, "its cell returns at once"
        assert not monitor.result.value
        while monitor.state.phase != "performance" or not monitor.rows:
            assert time.monotonic() - start < 60 and not monitor.state.ended, monitor.state
            await asyncio.sleep(0.1)
        cpu, wall, before = time.process_time(), time.monotonic(), len(monitor.rows)
        await asyncio.sleep(10)
        share = (time.process_time() - cpu) / (time.monotonic() - wall)
        assert len(monitor.rows) >= before + 7
        assert "queries done" in monitor.progress.value and "polyline" in monitor.charts.value
        monitor.cancel_button.click()
        assert "Press again" in monitor.cancel_button.description
        await asyncio.sleep(0.5)
        assert not launch.job_state(run).ended, "once is not enough"
        monitor.cancel_button.click()
        await monitor._cancelling
        await monitor.task
        assert monitor.cancel_button.disabled and "cancelled" in monitor.head.value
        assert (
            "Next: 05_analysis" in monitor.result.value and "logs/output_server.log" in monitor.result.value
        )
        return share

    share = asyncio.run(main())
    with capsys.disabled():
        print(f" monitor: {100 * share:.2f} % of one core ", end="")
    assert share < 0.05


def test_a_second_monitor_takes_over_from_the_first(live, tmp_path):
    run = create_run(load_experiment(given=SMALL), tmp_path / "run")

    async def main():
        first = monitors.follow_job(run)
        second = monitors.follow_job(run)
        await asyncio.sleep(0.5)
        return first.task.cancelled(), second.head.value

    cancelled, words = asyncio.run(main())
    assert cancelled and "has no job yet" in words


def test_headless_the_same_call_waits_for_the_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DISAGG_LIVE", "0")
    e = load_experiment(given=SMALL | {"rehearsal_queries": 30, "server_target_qps": 40.0})
    run = create_run(e, tmp_path / "run")
    launch.submit(run)
    assert monitors.follow_job(run) is None
    assert launch.job_state(run).state == "done"
    assert "performance" in capsys.readouterr().out


def test_the_folders_link_names_the_path_where_no_server_reaches_it(tmp_path):
    assert str(tmp_path) in monitors.folder_link(tmp_path, "Open") and "<a" not in monitors.folder_link(
        tmp_path, "Open"
    )


# -- the run picker


def test_the_newest_runs_can_be_picked_and_this_one_always(results_dir, tmp_path):
    mine = create_run(load_experiment(given=SMALL), tmp_path / "mine")
    old, new = (create_run(load_experiment(given=SMALL)) for _ in range(2))
    os.utime(old / "experiment.yaml", (1, 1))
    assert runs_to_pick(mine) == [mine.resolve(), new.resolve(), old.resolve()]


def test_a_run_without_logs_is_a_line_in_the_picked_table(tmp_path):
    run = create_run(load_experiment(given=SMALL), tmp_path / "run")
    page = picker.picked_html([run])
    assert "has not measured yet" in page


def test_two_picked_runs_are_set_against_each_other():
    cells = [["run", "a", "b"], ["source", "rehearsed", "rehearsed"], ["tokens/s", "200.0", "190.0"], ["TPOT mean ms", "-", "3.1"]]  # fmt: skip
    assert [line[3] for line in picker.with_difference(cells)] == ["second against first", "", "-5.0 %", ""]
    three = [[*line, line[2]] for line in cells]
    assert picker.with_difference(three) == three


def test_a_figure_over_its_limit_is_marked_in_the_picked_table():
    cells = [["run", "a", "b"], ["TPOT p99 ms", "79.99", "80.01"], ["TPOT limit ms", "80", "80"]]
    assert picker.over_limit(cells) == {("TPOT p99 ms", 2)}
    assert picker._table_html(cells).count("over its limit") == 1


def test_changed_values_are_checked_together():
    with pytest.raises(DisaggError, match="nodes: found 18, needed 19"):
        changed(changed(NVL72, {"nodes": 18}), {"num_gen_servers": 5})
