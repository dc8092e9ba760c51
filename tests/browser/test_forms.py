"""The forms of 00 and 03, and the runs of 05, as a person at the screen meets them."""

import statistics

import pytest
import yaml

# The milliseconds from a keystroke to the new picture, as the page itself sees them.
MEASURE_REDRAW = """async ([label, text]) => {
  const form = document.querySelector('.disagg-topology');
  const field = [...form.querySelectorAll('input')].find(i => i.labels[0]?.textContent === label);
  const old = form.querySelector('svg').outerHTML;
  return await new Promise((resolve, reject) => {
    let began = 0;
    const watch = new MutationObserver(() => {
      const svg = form.querySelector('svg');
      if (svg && svg.outerHTML !== old) { watch.disconnect(); resolve(performance.now() - began); }
    });
    watch.observe(form, {childList: true, subtree: true, characterData: true});
    setTimeout(() => reject(new Error('no new picture within 5 s')), 5000);
    began = performance.now();
    field.value = text;
    field.dispatchEvent(new Event('input', {bubbles: true}));
    field.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true}));
  });
}"""


@pytest.fixture(scope="module")
def opened_03(notebook):
    opened = notebook("03_configuration")
    opened.run_all()
    yield opened
    opened.close()


@pytest.fixture
def configuration(opened_03):
    """03 with the form as the parameters have it."""
    for name, text in (("num_ctx_servers", "1"), ("num_gen_servers", "1"), ("gen_tp_size", "4")):
        field(opened_03, name).fill(text)
    opened_03.page.get_by_text(
        "1 context server x 4 + 1 generation server x 4 = 8 GPUs on 2 nodes"
    ).wait_for()
    return opened_03


def field(notebook, name):
    return notebook.page.get_by_label(name, exact=True)


def wait_for_words(notebook, words):
    """The form says these words; a timeout shows what it says instead."""
    form = notebook.page.locator(".disagg-topology")
    try:
        form.get_by_text(words).wait_for()
    except (
        Exception
    ) as error:  # playwright's TimeoutError; the package may be absent, the tests are then skipped
        typed = {name: field(notebook, name).input_value() for name in ("num_ctx_servers", "num_gen_servers")}
        raise AssertionError(f"needed {words!r}, fields {typed}, found:\n{form.inner_text()}") from error


def test_03_runs_and_every_input_has_a_label(configuration):
    configuration.refuse_ugliness()
    labels = configuration.page.evaluate(
        "() => [...document.querySelectorAll('.jp-OutputArea input, .jp-OutputArea select')]"
        ".map(i => i.labels?.[0]?.textContent || i.getAttribute('aria-label') || '')"
    )
    assert len(labels) >= 14 and all(labels), labels
    configuration.screenshots("form", ".disagg-topology")
    configuration.screenshots("diff", ".jp-OutputArea select")


def test_03_says_what_is_impossible_and_redraws_what_is_possible(configuration):
    page = configuration.page
    before = set((configuration.lab.tree / "results").iterdir())
    button = page.locator(".disagg-topology").get_by_role("button", name="Write run folder")
    field(configuration, "gen_tp_size").fill("3")
    page.get_by_text("does not divide the model's 128 attention heads").wait_for()
    assert button.is_disabled() and "gen_tp_size: found 3" in button.get_attribute("title")
    configuration.screenshots("impossible", ".disagg-topology")
    field(configuration, "gen_tp_size").fill("eight")
    page.get_by_text("found 'eight' (text), needed a whole number").wait_for()
    assert set((configuration.lab.tree / "results").iterdir()) == before
    field(configuration, "gen_tp_size").fill("8")
    page.locator(".disagg-topology").get_by_text(
        "1 context server x 4 + 1 generation server x 8 = 12 GPUs"
    ).wait_for()
    assert page.locator(".disagg-topology svg text", has_text="G0").count() == 8 + 1
    assert button.is_enabled()


def test_03_redraws_within_200_ms(configuration, capsys):
    page = configuration.page
    page.wait_for_timeout(2000)
    times = {}
    for label, text, repeats in (("12 GPUs", "2", 9), ("144 GPUs", "35", 5)):
        taken = []
        for number in range(repeats):
            value = text if number % 2 == 0 else str(int(text) - 1)
            taken.append(page.evaluate(MEASURE_REDRAW, ["num_ctx_servers", value]))
        times[label] = statistics.median(taken)
    with capsys.disabled():
        print(" redraw, median: " + ", ".join(f"{k} {v:.0f} ms" for k, v in times.items()), end=" ")
    assert all(value < 200 for value in times.values()), times


@pytest.mark.parametrize(("context", "generation", "gpus"), [("14", "4", 72), ("28", "8", 144)])
def test_03_draws_racks_readably(configuration, context, generation, gpus):
    page = configuration.page
    for name, text in (("num_ctx_servers", context), ("num_gen_servers", generation)):
        field(configuration, name).fill(text)
        field(configuration, name).press("Tab")
    wait_for_words(configuration, f"= {gpus} GPUs on {gpus // 4} nodes")
    picture = page.locator(".disagg-topology svg")
    picture.scroll_into_view_if_needed()
    configuration.screenshots(f"{gpus}gpus", ".disagg-topology svg")
    shown = picture.evaluate("""svg => {
      const texts = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
      const frame = svg.getBoundingClientRect();
      return {height: Math.min(...texts.map(t => t.height)),
              outside: texts.filter(t => t.right > frame.right + 1 || t.bottom > frame.bottom + 1).length};
    }""")
    assert shown["height"] >= 10 and shown["outside"] == 0, shown


def test_03_is_filled_and_submitted_with_the_keyboard_alone(configuration):
    page = configuration.page
    before = set((configuration.lab.tree / "results").iterdir())
    field(configuration, "num_ctx_servers").focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("3")
    for _ in range(11):
        page.keyboard.press("Tab")
    page.locator(".disagg-topology").get_by_text(
        "3 context servers x 4 + 1 generation server x 4 = 16 GPUs"
    ).wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Write run folder"
    page.keyboard.press("Enter")
    page.locator(".disagg-topology").get_by_text("is written. Next: 04_launch").wait_for()
    (made,) = set((configuration.lab.tree / "results").iterdir()) - before
    recorded = yaml.safe_load((made / "experiment.yaml").read_text())["parameters"]
    assert recorded["num_ctx_servers"] == {"value": 3, "from": "typed here"}


def test_00_checks_and_saves_the_sites_parameters(notebook):
    opened = notebook("00_setup")
    opened.run_all()
    opened.refuse_ugliness()
    page, site = opened.page, opened.lab.tree / "params/site.yaml"
    page.get_by_text("more, which many sites leave empty").click()
    field(opened, "time_limit").fill("4:00")
    page.get_by_text("found '4:00', needed h:mm:ss, such as 4:00:00").wait_for()
    button = page.get_by_role("button", name="Save site.yaml")
    assert button.is_disabled() and not site.exists()
    opened.screenshots("site", ".disagg-site")
    field(opened, "time_limit").fill("1:00:00")
    field(opened, "partition").fill("batch")
    button.click()
    page.get_by_text("params/site.yaml is written.").wait_for()
    saved = yaml.safe_load(site.read_text())
    site.unlink()  # it is of no use to the other tests
    assert (saved["partition"], saved["time_limit"]) == ("batch", "1:00:00")
    opened.close()


@pytest.mark.parametrize("name", ["01_model_download", "02_plan"])
def test_the_other_notebooks_run_without_a_complaint(notebook, name):
    opened = notebook(name)
    opened.run_all(timeout_s=240)
    opened.refuse_ugliness()
    opened.screenshots("outputs", ".jp-OutputArea-output table, .jp-OutputArea-output img")
    opened.close()
