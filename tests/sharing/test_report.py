"""The one report of a run: what the card says, in each of its forms, and that it stands alone."""

import json
import re
import shutil

import pytest
import yaml
from example import EXAMPLE
from shared_runs import NOTEBOOK, make_measured, make_site_run, site, survivors
from test_rows import SHARED, make_run

from disagg_lib.results import outputs, rows
from disagg_lib.results.logs import LogError
from disagg_lib.sharing import findings
from disagg_lib.sharing.pages import export_html, notebook_page
from disagg_lib.sharing.report import make_report, report_html, report_line, report_text


def example_row():
    return rows.run_row(EXAMPLE)


def test_the_title_carries_verdict_source_speed_and_day():
    report, row = make_report(EXAMPLE), example_row()
    word = "VALID" if row["valid"] else "INVALID"
    tokens = f"{row['completed_tokens_per_s']:.0f} tokens/s"
    assert report.title.startswith(f"{word} (rehearsed) · {tokens} · 20 GPUs · ")
    assert f"<title>{report.title}</title>" in page_of(EXAMPLE)


def page_of(run, **more):
    given = {
        "pictures": [],
        "given": [],
        "settings": "",
        "versions": "",
        "left_out": [],
        "repeat": "",
        "notebooks": [],
        "footnote": "",
    }
    return make_report(run).html(page=True, **given | more)


def test_the_figures_of_the_card_are_those_of_the_logs():
    row, text = example_row(), report_text(EXAMPLE)
    assert f"TTFT p99 {row['ttft_p99_ms'] / 1e3:.2f} s" in text
    assert f"{row['ttft_p99_ms']:,.0f} ms of 4,500" in text
    assert f"{row['samples_per_s']:.2f} queries/s completed" in text
    assert "20 GPUs on 5 nodes, 4 x TP4 context + 1 x TP4 generation" in text
    assert "not compared with published results: rehearsed" in text


def test_an_invalid_run_says_what_is_over_by_how_much_and_what_to_do(tmp_path):
    report = make_report(over_ttft(tmp_path))
    assert (report.word, report.mood, report.sign) == ("INVALID", "bad", "✗")
    assert report.cause == "First tokens come too late: TTFT p99 5.41 s, limit 4.50 s (20 % over)."
    guess = example_row()["target_qps"] * 4500 / 5405.805 * 0.99
    tried = float(re.search(r"prompts queue for the 4 context servers. Try server_target_qps ([\d.]+)", report.remedy)[1])  # fmt: skip
    assert guess - 0.011 < tried <= guess
    bar = next(bar for bar in report.bars if bar.name == "Time to first token")
    assert bar.over and bar.filled == pytest.approx(0.75 * 5405.805 / 4500, rel=1e-3) and bar.mark == 0.75
    assert bar.finding == "Time to first token 5,406 ms of 4,500: not kept"
    assert 'class="filled over"' in report.html()


def over_ttft(tmp_path):
    """The example's run, as LoadGen would have written it at a TTFT p99 of 5.405805 s."""
    run = shutil.copytree(EXAMPLE, tmp_path / "over")
    for name in ("mlperf_log_detail.txt", "mlperf_log_summary.txt"):
        path = run / "mlperf/performance" / name
        text = re.sub(
            r'(result_first_token_99\.00_percentile_latency_ns", "value": )\d+',
            r"\g<1>5405805431",
            path.read_text(),
        )
        path.write_text(re.sub(r"(99\.00 percentile first token latency \(ns\) +: )\d+", r"\g<1>5405805431", text))  # fmt: skip
    return run


def test_a_rehearsal_is_never_submittable_however_valid(tmp_path):
    run = make_run(tmp_path / "run", kind="logs_full")
    report = make_report(run)
    assert report.word == "VALID" and report.proviso == "not submittable: rehearsed"
    assert "rehearsed: no GPU was used" in report.html() and "not submittable: rehearsed" in report.html()
    assert "never be submitted" in report.remedy


def test_a_measured_run_is_set_beside_the_best_published_one(tmp_path):
    run, _ = make_measured(tmp_path)
    report = make_report(run)
    figure, what, more = report.tiles[3]
    per_gpu = rows.run_row(run)["completed_tokens_per_s_per_gpu"]
    best = float(re.match(r"[\d.]+", more)[0])
    assert what == "of the best published tokens/s/GPU"
    assert figure == f"{100 * per_gpu / best:.0f} %"


def test_a_run_on_as_many_gpus_as_a_published_one_is_set_beside_that_one(tmp_path):
    result = rows.read_result(make_measured(tmp_path)[0])
    row = rows.result_row(result) | {
        "accelerators_total": 72,
        "accelerator": "GB200",
        "completed_tokens_per_s": 9921.02 / 2,
    }
    figure, what, more = list(findings.tiles_of(result, row))[3]
    assert (figure, what) == (
        "50 %",
        "of the published result on 72 GPUs (NVIDIA GB200, v5.1: 15.2 queries/s)",
    )
    assert "of the best tokens/s/GPU" in more


def test_a_run_without_a_result_gets_a_card_that_says_why(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.rmtree(run / "mlperf")
    assert "No job yet: run 04_launch." in report_text(run)
    for last, said in (("performance", "in its phase performance"),
                       ("failed: cancelled during performance, after 40 s", "No result: cancelled during performance, after 40 s."),
                       ("failed: the orchestrator ended", "No result: the orchestrator ended, after 50 s."),
                       ("done", "No result, though the job ended")):  # fmt: skip
        lines = [{"time_s": 1000.0, "phase": "container"}, {"time_s": 1050.0, "phase": last}]
        (run / "job/phases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        report = make_report(run)
        assert said in report.cause and report.word == "NO RESULT" and not report.has_result
        assert "NO RESULT" in report.html()


def test_a_job_that_failed_after_it_had_measured_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "job/phases.jsonl").write_text('{"time_s": 1.0, "phase": "failed: a node failed."}\n')
    assert "The job then failed: a node failed." in make_report(run).cause


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(LogError):
        make_report(tmp_path)


def folders():
    published = [
        path for part in ("mlperf_logs", "mlperf_logs_v6.0") for path in sorted((SHARED / part).glob("*/"))
    ]
    return [EXAMPLE, *published]  # fmt: skip


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_no_line_of_the_text_is_longer_than_a_terminal(folder):
    assert max(map(len, report_text(folder).splitlines())) <= 80
    assert "\n" not in report_line(folder) and report_line(folder).split()[0] in ("VALID", "INVALID")


def test_the_card_needs_no_script_and_nothing_from_elsewhere():
    card = report_html(EXAMPLE)
    assert "<script" not in card and not re.search(r"@import|url\(|https?://|<link", card)


def test_names_and_values_are_quoted(tmp_path):
    run = make_run(tmp_path / "<script>x")
    page = page_of(run, given=[("label", "<b>&", "given")], notebooks=["<i>"])
    assert "<script" not in page and "<b>&<" not in page and "&lt;b&gt;&amp;" in page and "<i>" not in page


def test_other_runs_are_the_same_where_the_noise_covers_the_difference(tmp_path):
    again = shutil.copytree(EXAMPLE, tmp_path / "again")
    report = make_report(EXAMPLE, [again, tmp_path / "none"])
    this, other, *published = report.rows
    assert this["this"] and other["name"] == "again" and other["ttft"] == other["rate"] == "same"
    assert published and all(row["source"] == "published" for row in published)
    assert "within the noise" in report.html()


def test_machines_find_verdict_figures_and_checks(tmp_path):
    run = make_run(tmp_path / "run", kind="logs_full")
    outputs.write_outputs(run)
    text = (run / "tables/result.json").read_text()
    values = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    row = rows.run_row(run)
    assert values["verdict"] == "VALID" and values["source"] == "rehearsed"
    for name in ("ttft_p99_ms", "tpot_p99_ms", "completed_tokens_per_s", "query_count", "target_qps"):
        assert values[name] == row[name], name
    checks = {check["name"]: check for check in values["checks"]}
    assert checks["ttft_p99"]["figure"] == row["ttft_p99_ms"] and checks["ttft_p99"]["limit"] == 4500
    assert checks["ttft_p99"]["status"] == "pass" and 0 < checks["ttft_p99"]["margin"] < 1
    assert str(tmp_path) not in text


def test_a_notebook_shows_the_card_and_keeps_the_values_as_scrapbook_reads_them():
    data, metadata = make_report(EXAMPLE)._repr_mimebundle_()
    scrap = data["application/scrapbook.scrap.json+json"]
    assert (scrap["name"], scrap["encoder"], scrap["version"]) == ("result", "json", 1)
    assert scrap["data"]["ttft_p99_ms"] == example_row()["ttft_p99_ms"]
    assert metadata["scrapbook"]["name"] == "result"
    assert data["text/plain"] == report_text(EXAMPLE) and data["text/html"] == report_html(EXAMPLE)


# -- pages


def executed(cells):
    return json.dumps({**NOTEBOOK, "cells": cells})


def markdown(text):
    return {"cell_type": "markdown", "id": "m" + str(len(text)), "metadata": {}, "source": text}


def picture(metadata):
    output = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}, "metadata": metadata}
    return {"cell_type": "code", "execution_count": 1, "id": f"p{len(metadata)}", "metadata": {}, "source": "draw()",
            "outputs": [output]}  # fmt: skip


def test_a_notebooks_page_has_its_heading_as_title_folds_code_and_names_pictures():
    told = picture({"image/png": {"alt": "TTFT <5 s"}})
    page = notebook_page(
        executed([markdown("# 05 · Analysis"), markdown("## The run over time"), picture({}), told])
    )
    assert "<title>05 · Analysis</title>" in page
    assert page.count('<details class="code">') == 2 and "<details open" not in page
    assert re.findall(r'alt="([^"]*)"', page) == ["Figure: The run over time", "TTFT &lt;5 s"]
    assert "data-jp-theme-light" not in page.split("<body", 1)[1]  # else the card would be light in the dark


def test_the_page_of_05_is_titled_by_the_verdict():
    data, metadata = make_report(EXAMPLE)._repr_mimebundle_()
    cell = picture({}) | {"outputs": [{"output_type": "display_data", "data": data, "metadata": metadata}]}
    page = notebook_page(executed([markdown("# 05 · Analysis"), cell]))
    assert f"<title>{make_report(EXAMPLE).title} · 05 · Analysis</title>" in page
    assert page.index("The limits") < page.index("</body>") and "application/scrapbook" not in page


def test_the_index_is_the_report_and_its_pictures_are_told_as_findings(tmp_path):
    index = (export_html(EXAMPLE, tmp_path / "html").path / "index.html").read_text()
    assert f"<title>{make_report(EXAMPLE).title}</title>" in index and "width=device-width" in index
    assert index.index(make_report(EXAMPLE).word) and "<main>" in index and "<h1" not in index
    alts = re.findall(r'<img src="[^"]+" alt="([^"]*)"', index)
    assert len(alts) == 4 and any("ms of 4,500" in alt for alt in alts)
    assert "4 x TP4 context + 1 x TP4 generation on 20 GPUs" in "".join(alts)
    assert "No figure of" not in index and "missing file" not in index
    style = re.search(r'<section class="disagg-report".*?</style>', report_html(EXAMPLE), re.DOTALL)[0]
    assert style.split("<style>")[1] in index  # nothing of it looked like a name


def test_pages_name_the_trademark_and_who_did_not_verify(tmp_path):
    index = (export_html(EXAMPLE, tmp_path / "html").path / "index.html").read_text()
    assert "Result not verified by MLCommons Association" in index and "trademarks of MLCommons" in index


def test_a_run_made_by_hand_gets_its_05_executed_for_the_page_and_stays_as_it_is(tmp_path):
    run = shutil.copytree(EXAMPLE, tmp_path / "run")
    shutil.rmtree(run / "notebooks")
    recorded = yaml.safe_load((run / "experiment.yaml").read_text())
    recorded["parameters"]["endpoint"]["value"] = "/v1/completions"
    recorded["parameters"]["scratch_dir"]["value"] = "scratch"
    (run / "experiment.yaml").write_text(yaml.safe_dump(recorded))
    before = sorted(run.rglob("*"))
    shared = export_html(run, tmp_path / "html")
    assert sorted(p.name for p in shared.path.glob("*.html")) == ["05_analysis.html", "index.html"], (
        shared.text()
    )
    assert make_report(EXAMPLE).word in (shared.path / "05_analysis.html").read_text()
    assert sorted(run.rglob("*")) == before


def test_a_run_whose_05_cannot_be_executed_is_shared_without_it(tmp_path):
    run = make_site_run(tmp_path / "run", site())
    shutil.rmtree(run / "notebooks")
    recorded = yaml.safe_load((run / "experiment.yaml").read_text())
    recorded["parameters"]["num_ctx_servers"] = {"value": "many", "from": "given"}
    (run / "experiment.yaml").write_text(yaml.safe_dump(recorded))
    shared = export_html(run, tmp_path / "html")
    assert [p.name for p in shared.path.glob("*.html")] == ["index.html"]
    assert any("05 could not be executed" in item for item in shared.left_out)
    assert survivors(shared.path, site()) == set()
