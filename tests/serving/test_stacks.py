"""Stacks: the shipped ones, files, and what a stack does to a table."""

import pytest
import yaml

from disagg_lib.errors import CalibrationError
from disagg_lib.experiment.loading import load_experiment
from disagg_lib.serving.latency import read_table
from disagg_lib.serving.plan import deployment_of
from disagg_lib.serving.stacks import NO_STACK, read_stack, shipped_stacks, write_stack


def test_a_stack_weighs_the_parts_of_a_step():
    table, stack = read_table("gb200", 8), read_stack("v6.0")
    under = table.under(stack)
    i, j = table.context_tokens.index(4096), table.generation_batch.index(512)
    comm = table.context_comm_ms[i]
    assert under.context[1][i] == pytest.approx(table.context_ms[i] + 0.2 * comm) and comm > 40
    assert under.generation[1][j] == pytest.approx(table.generation_ms[j] + 11.34)
    assert under.context[4] == table.context[4] and under.generation[4] == table.generation[4]


def test_without_a_stack_the_table_is_as_the_library_has_it():
    table = read_table("gb300", 4)
    assert table.under(NO_STACK) == table


def test_parts_are_what_the_facts_say_of_the_three_published_layouts():
    """Facts: compute with attention / communication in ms, d72's and G200I's context TP4, G300I's TP2; within 3 %."""
    for system, tp, compute, comm in (("gb200", 4, 552, 263), ("gb300", 2, 816, 212)):
        from disagg_lib.serving.calibrate import _context_parts
        from disagg_lib.serving.simulate import Deployment, ServerGroup

        found = _context_parts(Deployment(system, ServerGroup(1, tp), ServerGroup(1, tp)), 9400.0)
        assert found == pytest.approx((compute, comm), rel=0.03)


def test_an_experiment_has_its_dialects_stack_unless_it_names_another(tmp_path):
    assert deployment_of(load_experiment([])).stack.name == "v5.1"
    assert deployment_of(load_experiment([], {"trtllm_dialect": "1.x"})).stack.name == "v6.0"
    assert deployment_of(load_experiment([], {"stack": "none", "gpu_system": "b200"})).stack == NO_STACK
    write_stack(read_stack("v6.0"), tmp_path / "mine.yaml")
    assert deployment_of(load_experiment([], {"stack": str(tmp_path / "mine.yaml")})).stack == read_stack(
        "v6.0"
    )
    with pytest.raises(CalibrationError, match="stack v5.1 has no constants for b200, only for gb200, gb300"):
        deployment_of(load_experiment([], {"gpu_system": "b200"}))


def test_a_written_stack_is_never_written_over(tmp_path):
    write_stack(read_stack("v5.1"), tmp_path / "s.yaml")
    with pytest.raises(FileExistsError):
        write_stack(NO_STACK, tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"b_context": -1}, "b_context"),
        ({"host_ms": "much"}, "much"),
        ({"router": "random"}, "router"),
        ({"gen_capacity_policy": "NONE"}, "gen_capacity_policy"),
        ({"fitted_on": []}, "fitted_on"),
        ({"context_factor": 0}, "context_factor"),
        ({"speed": 1}, "speed"),
    ],
)
def test_a_file_that_is_no_stack_is_refused_with_its_fault(tmp_path, change, word):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"name": "s", "fitted_on": ["a"]} | change))
    with pytest.raises(CalibrationError, match=word):
        read_stack(str(tmp_path / "s.yaml"))


@pytest.mark.parametrize("text", ["", "- 1\n", "{"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(CalibrationError, match=r"s.yaml"):
        read_stack(str(tmp_path / "s.yaml"))


def test_an_unknown_stack_names_those_that_there_are():
    with pytest.raises(CalibrationError, match=", ".join(shipped_stacks())):
        read_stack("v7")
