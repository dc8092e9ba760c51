"""00's form of the site, without a browser."""

import asyncio

import pytest

from disagg_lib.checks import Check
from disagg_lib.cluster import site_file
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.notebook import site_form


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.setenv("DISAGG_LIVE", "1")


def form_at(path, checks=(), **typed):
    async def main():
        form = site_form.SiteForm(load_experiment(), {"partition": "batch"}, checks, path)
        for name, text in typed.items():
            form.fields.texts[name].value = text
        return form

    return asyncio.run(main())


def test_the_site_form_saves_and_keeps_the_former_file(tmp_path):
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
def test_a_wrong_value_is_said_and_nothing_is_saved(tmp_path, name, text, words):
    form = form_at(tmp_path / "site.yaml", **{name: text})
    assert words in form.fields.notes[name].value + form.problem.value
    assert form.button.disabled and "Not yet" in form.button.tooltip


def test_what_only_looks_wrong_from_here_does_not_stop_the_saving(tmp_path):
    form = form_at(
        tmp_path / "site.yaml", container_image="/nowhere/x.sqsh", container_mounts="/nowhere:inside"
    )
    assert "not there, as seen from this machine" in form.fields.notes["container_image"].value
    assert "needed an existing host path" in form.fields.notes["container_mounts"].value
    assert not form.button.disabled
    assert site_form.site_remarks({"partition": "x"}, ["a", "b"]) == {
        "partition": "this cluster's partitions: a, b"
    }


def test_checks_have_a_tick_or_a_cross_with_the_fix(tmp_path):
    checks = [Check("a thing", "here", True), Check("another", "absent", False, "install it")]
    form = form_at(tmp_path / "site.yaml", checks)
    shown = form.box.children[0].value
    assert "✓" in shown and "✗" in shown and "To do: install it" in shown


def test_an_emptied_field_is_not_given_any_more(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("account: old\n")
    form_at(path, partition="").button.click()
    assert site_file.read_site(path) == {}
