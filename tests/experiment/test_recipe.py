"""A recipe is one word that sets many: what it sets, who wins over it, and what is refused of it."""

import pytest

from disagg_lib.errors import ParameterError
from disagg_lib.experiment.loading import (
    changed,
    experiment_text,
    load_experiment,
    load_recorded,
    recipe_values,
)
from disagg_lib.experiment.parameters import Experiment, parameter_names


def test_the_recipe_sets_values_and_provenance_says_so(experiment):
    e = experiment(recipe="v6.0")
    assert (e.trtllm_dialect, e.gen_batch_size, e.stream_interval) == ("1.x", 1280, 20)
    assert e.provenance["stream_interval"] == e.provenance["gen_batch_size"] == "recipe v6.0"
    assert e.provenance["gen_tp_size"] == "default"


def test_the_recipe_differs_by_system(experiment):
    e = experiment(recipe="v6.0", gpu_system="gb300")
    assert (e.gen_batch_size, e.gen_max_num_tokens, e.ctx_cuda_graphs) == (256, 512, True)
    assert e.ctx_environment["TRTLLM_GEMM_ALLREDUCE_WORKSPACE_SIZE"] == "137494528"
    assert "TRTLLM_GEMM_ALLREDUCE_WORKSPACE_SIZE" not in e.gen_environment


@pytest.mark.parametrize("given", [{"gen_batch_size": 64}, {"gen_environment": {"NCCL_DEBUG": "INFO"}}])
def test_who_gives_a_parameter_wins_over_the_recipe(experiment, given):
    e = experiment(recipe="v6.0", **given)
    assert {name: getattr(e, name) for name in given} == given
    assert {e.provenance[name] for name in given} == {"given"}


def test_a_params_file_wins_over_a_recipe_that_a_later_source_names(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("gen_batch_size: 96\n")
    e = load_experiment([file], {"recipe": "v6.0"})
    assert (e.gen_batch_size, e.provenance["gen_batch_size"]) == (96, str(file))


def test_without_a_recipe_every_value_is_the_originals():
    assert recipe_values("v5.1", "gb200") == {}
    assert set(load_experiment([]).provenance.values()) == {"default"}


@pytest.mark.parametrize("system", ["gb200", "gb300", "b200"])
def test_a_recipe_names_parameters_only(system):
    values = recipe_values("v6.0", system)
    assert set(values) <= set(parameter_names())
    Experiment(**values)


def test_changing_the_recipe_takes_its_values_along_and_leaves_those_that_were_given(experiment):
    e = changed(experiment(recipe="v6.0", gen_max_num_tokens=777), {"recipe": "v5.1"})
    assert (e.trtllm_dialect, e.gen_batch_size, e.gen_max_num_tokens) == ("v5.1", 512, 777)
    assert e.provenance["gen_batch_size"] == "default"
    back = changed(e, {"recipe": "v6.0"})
    assert (back.gen_batch_size, back.provenance["gen_batch_size"]) == (1280, "recipe v6.0")


def test_a_run_folder_keeps_the_recipes_values_and_their_provenance(experiment, tmp_path):
    e = experiment(recipe="v6.0")
    (tmp_path / "experiment.yaml").write_text(experiment_text(e))
    kept = load_recorded(tmp_path)
    assert (kept, kept.provenance) == (e, e.provenance)


def test_a_recipe_in_a_dialect_that_does_not_know_its_keys_is_refused(experiment):
    with pytest.raises(ParameterError) as refusal:
        experiment(recipe="v6.0", trtllm_dialect="v5.1")
    assert "kv_transfer_backend" not in str(refusal.value)
    assert "sampler_type: found 'TRTLLMSampler' (of recipe v6.0)" in str(refusal.value)
    assert "dialect v5.1 does not know" in str(refusal.value)


def test_an_unknown_recipe_is_refused_with_the_known_ones(experiment):
    with pytest.raises(ParameterError, match=r"recipe: found 'v7.0' \(text\), needed one of 'v5.1', 'v6.0'"):
        experiment(recipe="v7.0")


@pytest.mark.parametrize(
    "value",
    [
        "A=1",
        {"A B": "1"},
        {"A": ["1"]},
        {"A": "1\n2"},
        {"A": True},
        {"SLURM_PROCID": "0"},
        {"1A": "x"},
        {1: "x"},
    ],
)
def test_an_environment_that_no_shell_could_set_is_refused(experiment, value):
    with pytest.raises(ParameterError, match="ctx_environment"):
        experiment(ctx_environment=value, trtllm_dialect="1.x")


def test_in_the_one_step_of_v51_both_roles_have_one_environment(experiment):
    with pytest.raises(ParameterError, match="Give both the same"):
        experiment(ctx_environment={"A": "1"})
    assert experiment(ctx_environment={"A": 1}, gen_environment={"A": "1"}).ctx_environment == {"A": "1"}


def test_the_transfer_buffer_holds_whole_blocks(experiment):
    with pytest.raises(ParameterError, match="kv_buffer_tokens: found 20190, needed a multiple of 32"):
        experiment(kv_buffer_tokens=20190)
    assert experiment(max_seq_len=22000, kv_buffer_tokens=20192).buffer_tokens == 20192
