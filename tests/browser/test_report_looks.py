"""The report as a reader meets it: verdict at the top, at every width, light and dark, in print, in 05; axe-core content."""

import shutil

import pytest
from conftest import SCREENSHOTS, SMALL, axe_violations, set_parameters
from test_job_monitor import make_runs

from disagg_lib.files import REPOSITORY
from disagg_lib.sharing.pages import export_html
from disagg_lib.sharing.report import make_report

EXAMPLE = REPOSITORY / "results/example_rehearsal"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The example without its executed notebooks, so that 05 is executed on it."""
    run = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("run") / "20990101-000000_example")
    shutil.rmtree(run / "notebooks")
    return run


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory):
    return export_html(run, tmp_path_factory.mktemp("report") / "html").path


@pytest.fixture(scope="module")
def look(browser):
    """look(path, width, scheme): a page of a file."""
    contexts = []

    def open_(path, width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()


def screenshot(page, name):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"report_{name}.png", full_page=True)


def bottom_of_verdict(page):
    """Lower edge of the word VALID, INVALID or NO RESULT; a remark may stand below it."""
    return page.locator(".disagg-report .word").evaluate(
        "word => { const range = document.createRange(), remark = word.querySelector('small'); range.selectNodeContents(word);"
        " if (remark) range.setEndBefore(remark); return range.getBoundingClientRect().bottom; }"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_the_index_fits_its_width_and_everyone_can_read_it(pages, look, width, scheme):
    page = look(pages / "index.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert bottom_of_verdict(page) < 300
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    screenshot(page, f"index_{width}_{scheme}")
    assert axe_violations(page, "html") == []


def test_the_index_leads_with_the_verdict_in_title_and_heading(pages, look):
    page = look(pages / "index.html")
    report = make_report(EXAMPLE)
    assert page.title() == report.title
    assert report.word in page.get_by_role("heading", level=1).inner_text()
    assert page.get_by_role("heading", level=2).count() == 3  # limits, other runs, to paste


def test_the_report_prints_whole_and_on_white(pages, look):
    page = look(pages / "index.html", scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("details img").first.bounding_box()["height"] > 100, "what is folded is printed, too"


def test_the_page_of_05_shows_the_verdict_first(pages, look):
    page = look(pages / "05_analysis.html")
    assert bottom_of_verdict(page) < 300
    assert page.title().startswith(make_report(EXAMPLE).word)
    page.get_by_text("code", exact=True).first.click()
    assert page.locator("details.code[open] .jp-InputArea").is_visible()


def test_05_opens_with_the_verdict_in_jupyterlab(run, notebook, tree):
    mine = shutil.copytree(run, tree / "results" / run.name)
    opened = notebook("05_analysis")
    opened.run_all()
    opened.refuse_ugliness()
    opened.page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
    opened.page.locator(".disagg-report .word").wait_for()
    screenshot(opened.page, "05_top")
    assert bottom_of_verdict(opened.page) < 300
    for dark in (False, True):
        opened.theme(dark)
        opened.page.wait_for_timeout(300)
        screenshot(opened.page, f"05_{'dark' if dark else 'light'}")
        assert axe_violations(opened.page, ".disagg-report") == []
    opened.close()
    shutil.rmtree(mine)


def test_05_on_a_run_without_a_result_shows_a_card_and_no_error(notebook, tree):
    mine = make_runs(tree, SMALL)
    (mine / "job/phases.jsonl").write_text('{"time_s": 1.0, "phase": "failed: the servers died"}\n')
    source = tree / "notebooks/05_analysis.ipynb"
    cloned = source.read_text()
    set_parameters(source, {"run_dir": str(mine)})  # not given, it is the newest run that has a result
    opened = notebook("05_analysis")
    opened.run_all()
    opened.refuse_ugliness()
    assert "NO RESULT" in opened.page.locator(".disagg-report .word").text_content()
    assert "the servers died" in opened.page.locator(".disagg-report").text_content()
    opened.close()
    source.write_text(cloned)
    shutil.rmtree(mine)
