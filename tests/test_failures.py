"""docs/failures.md: every row names a test that exists, and a folder of the real Slurm holds what needs one."""

import re

import pytest

from disagg_lib.files import REPOSITORY

ROWS = re.findall(
    r"^\| (?!what|---)(.+?) \| .+ \| `(.+?)::(.+?)` \|$", (REPOSITORY / "docs/failures.md").read_text(), re.M
)


def test_there_are_at_least_twenty_four_rows():
    assert len({what for what, _, _ in ROWS}) >= 24


@pytest.mark.parametrize(("what", "file", "name"), ROWS, ids=[what[:40] for what, _, _ in ROWS])
def test_a_row_of_the_failures_names_a_test(what, file, name):
    assert f"\ndef {name}(" in (REPOSITORY / file).read_text()
