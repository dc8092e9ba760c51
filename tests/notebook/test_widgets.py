"""Forms, pictures and the monitor, without a browser; tests/browser/ has them in a real JupyterLab."""

import asyncio
import os
import re
import time

import jupyter_client
import nbclient
import nbformat
import pytest

from disagg_lib.checks import Check
from disagg_lib.cluster import launch, site_file
from disagg_lib.errors import DisaggError, ParameterError
from disagg_lib.experiment.loading import changed, load_experiment, load_recorded
from disagg_lib.files import GrowingLines
from disagg_lib.notebook import comparison, picker, pictures, progress, site_form, topology_form
from disagg_lib.notebook import monitor as monitors
from disagg_lib.notebook.live import front_end_is_live
from disagg_lib.notebook.opening import presets
from disagg_lib.notebook.predicted import predict
from disagg_lib.results import style
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
NVL72 = load_experiment(["params/gb200_72gpu.yaml"])
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


# -- the topology picture


def marks(svg):
    return re.findall(r">([CG]\d+)</text>", svg)


@pytest.mark.parametrize(("num_ctx", "num_gen", "nodes"), [(14, 4, 18), (28, 8, 36)])
def test_racks_are_drawn_whole_and_no_wider_than_a_page(num_ctx, num_gen, nodes):
    e = changed(NVL72, {"num_ctx_servers": num_ctx, "num_gen_servers": num_gen})
    svg = pictures.topology_svg(e)
    assert len(re.findall(r">node \d+<", svg)) == nodes
    assert len(marks(svg)) == 4 * nodes + 2  # and one of each in the legend
    assert float(re.search(r'width="(\d+)"', svg)[1]) <= 900
    assert len(set(re.findall(r'<rect x="\d+" y="\d+" width="32"', svg))) >= 4 * nodes, "no two on one place"


def test_idle_gpus_are_hatched_and_counted():
    e = load_experiment(given={"trtllm_dialect": "1.x", "gen_tp_size": 2, "gen_batch_size": 100})
    svg = pictures.topology_svg(e)
    assert "idle GPUs: 2" in svg and svg.count("stroke-dasharray") == 2 + 1


def test_an_absurd_topology_is_not_drawn_to_its_end():
    svg = pictures.topology_svg(load_experiment(given={"num_ctx_servers": 2000}))
    assert "and 1,713 more nodes, not drawn" in svg and len(svg) < 700_000


def test_a_picture_of_144_gpus_takes_a_twentieth_of_a_second_at_most():
    e = changed(NVL72, {"num_ctx_servers": 28, "num_gen_servers": 8})
    times = []
    for _ in range(5):
        start = time.process_time()
        pictures.topology_svg(e)
        times.append(time.process_time() - start)
    assert min(times) < 0.05


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_hue_is_a_role():
    for colours, blue_leads in ((style.CONTEXT_COLOURS, True), (style.GENERATION_COLOURS, False)):
        for colour in colours:
            red, blue = int(colour[1:3], 16), int(colour[5:7], 16)
            assert (blue > red) is blue_leads, colour


def test_an_nvlink_domain_is_a_bracket_over_its_nodes():
    svg = pictures.topology_svg(load_experiment(given={"segment": 2}))
    assert [f"NVLink {n}" in svg for n in range(4)] == [True, True, True, False]
    assert "NVLink" not in pictures.topology_svg(load_experiment())


def test_every_server_colour_bears_its_text():
    for colour in (*style.CONTEXT_COLOURS, *style.GENERATION_COLOURS):
        contrast = (luminance(colour) + 0.05) / (luminance(style.INK) + 0.05)
        assert contrast >= 4.5, colour  # WCAG 2, AA


def test_both_pictures_name_servers_alike():
    assert style.server_mark("context", "ctx12")[0] == "C12"
    assert style.server_mark("generation", "gen1") == ("G1", style.GENERATION_COLOURS[1])


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


def test_every_door_asks_the_same_seeds_and_shows_their_range():
    e = load_experiment(["params/gb200_20gpu.yaml"])
    table = prediction.simulate_table(e, prediction.SEEDS)
    first = table[table["prompt_lengths"] == table["prompt_lengths"].iloc[0]]
    found = predict(e)
    assert found.ttft_ms == tuple(first["ttft_p99_ms"].agg(["median", "min", "max"]))
    low, high = (f"{ms / 1e3:.1f}" for ms in found.ttft_ms[1:])
    assert f"[{low}, {high}]" in found.text() and f"VALID in {found.valid} of 8 seeds" in found.html()


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
        assert monitors.still_running(run) and not monitor.result.value
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
    assert not monitors.still_running(run)


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
    assert not monitors.still_running(run)


def test_the_folders_link_names_the_path_where_no_server_reaches_it(tmp_path):
    assert str(tmp_path) in monitors.folder_link(tmp_path, "Open") and "<a" not in monitors.folder_link(
        tmp_path, "Open"
    )


# -- the run picker


def test_the_newest_runs_can_be_picked_and_this_one_always(results_dir, tmp_path):
    mine = create_run(load_experiment(given=SMALL), tmp_path / "mine")
    old, new = (create_run(load_experiment(given=SMALL)) for _ in range(2))
    os.utime(old / "experiment.yaml", (1, 1))
    assert picker.runs_to_pick(mine) == [mine.resolve(), new.resolve(), old.resolve()]


def test_a_run_without_logs_is_a_line_in_the_picked_table(tmp_path):
    run = create_run(load_experiment(given=SMALL), tmp_path / "run")
    page = picker.picked_html([run])
    assert "has not measured yet" in page


def test_changed_values_are_checked_together():
    with pytest.raises(DisaggError, match="nodes: found 18, needed 19"):
        changed(changed(NVL72, {"nodes": 18}), {"num_gen_servers": 5})


# -- the site form


def form_at(path, checks=(), **typed):
    async def main():
        form = site_form.SiteForm(load_experiment(), {"partition": "batch"}, checks, path)
        for name, text in typed.items():
            form.fields.texts[name].value = text
        return form

    return asyncio.run(main())


def test_the_site_form_saves_and_keeps_the_former_file(live, tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("# mine\nrequest_timeout_s: 900\naccount: old\n")
    form = form_at(path, account="new", segment="5", trust_dataset=True)
    form.button.click()
    saved = site_file.read_site(path)
    assert saved == {
        "request_timeout_s": 900,
        "partition": "batch",
        "account": "new",
        "trust_dataset": True,
        "segment": 5,
    }
    assert (tmp_path / "site.yaml.1").read_text().startswith("# mine")
    form.button.click()
    assert (tmp_path / "site.yaml.2").exists(), "no former file is lost"


@pytest.mark.parametrize(("name", "text", "words"), [
    ("time_limit", "4:00", "found &#x27;4:00&#x27;, needed h:mm:ss, such as 4:00:00"),
    ("segment", "0", "of at least 1"),
    ("partition", "a b", "needed a name as Slurm has them, without blanks and ;"),
    ("account", "hf_" + "a" * 20, "something like a token"),
])  # fmt: skip
def test_a_wrong_value_is_said_and_nothing_is_saved(live, tmp_path, name, text, words):
    form = form_at(tmp_path / "site.yaml", **{name: text})
    assert words in form.fields.notes[name].value + form.problem.value
    assert form.button.disabled and "Not yet" in form.button.tooltip


def test_what_only_looks_wrong_from_here_does_not_stop_the_saving(live, tmp_path):
    form = form_at(
        tmp_path / "site.yaml", container_image="/nowhere/x.sqsh", container_mounts="/nowhere:inside"
    )
    assert "not there, as seen from this machine" in form.fields.notes["container_image"].value
    assert "needed an existing host path" in form.fields.notes["container_mounts"].value
    assert not form.button.disabled
    assert site_form.site_remarks({"partition": "x"}, ["a", "b"]) == {
        "partition": "this cluster's partitions: a, b"
    }


def test_checks_have_a_tick_or_a_cross_with_the_fix(live, tmp_path):
    checks = [Check("a thing", "here", True), Check("another", "absent", False, "install it")]
    form = form_at(tmp_path / "site.yaml", checks)
    shown = form.box.children[0].value
    assert "✓" in shown and "✗" in shown and "To do: install it" in shown


def test_an_emptied_field_is_not_given_any_more(live, tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("account: old\n")
    form_at(path, partition="").button.click()
    assert site_file.read_site(path) == {}
