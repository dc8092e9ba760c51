"""Parameters: what is accepted, what is refused and in which words; the topology arithmetic."""

import pytest
import yaml

from disagg_lib.errors import ParameterError, TopologyError
from disagg_lib.experiment.loading import (
    experiment_text,
    load_experiment,
    load_recorded,
    refuse_contradiction,
)
from disagg_lib.experiment.parameters import parameter_names
from disagg_lib.files import REPOSITORY

REHEARSAL = {"engine": "rehearsal", "launcher": "local", "container": "none"}


def test_the_original_topology_needs_five_nodes_and_twenty_tasks(experiment):
    e = experiment()
    assert (e.node_count, e.gpu_count) == (5, 20)
    assert [(s.name, s.node, list(s.ranks)) for s in e.servers] == [
        ("ctx0", 0, [0, 1, 2, 3]),
        ("ctx1", 1, [4, 5, 6, 7]),
        ("ctx2", 2, [8, 9, 10, 11]),
        ("ctx3", 3, [12, 13, 14, 15]),
        ("gen0", 4, [16, 17, 18, 19]),
    ]


def test_four_nodes_for_twenty_gpus_are_refused_with_the_arithmetic(experiment):
    with pytest.raises(TopologyError) as refusal:
        experiment(nodes=4)
    assert "nodes: found 4, needed 5" in str(refusal.value)
    assert "4 context servers x 4 + 1 generation server x 4 = 20 GPUs" in str(refusal.value)
    assert "5 nodes" in str(refusal.value)


def test_sixteen_tasks_for_twenty_gpus_are_refused(experiment):
    with pytest.raises(TopologyError, match="ntasks: found 16, needed 20"):
        experiment(ntasks=16)


def test_a_true_claim_is_accepted(experiment):
    assert experiment(nodes=5, ntasks=20).node_count == 5


def test_ports_are_unique_over_the_job(experiment):
    e = experiment(num_ctx_servers=12, num_gen_servers=6)
    ports = [s.port for s in e.servers] + [e.server_port]
    assert len(set(ports)) == len(ports) == 19


def test_a_port_range_over_the_orchestrators_is_refused(experiment):
    with pytest.raises(ParameterError, match="worker_port: 5 servers take ports 7998-8002"):
        experiment(worker_port=7998)


def test_v51_refuses_a_server_across_nodes_by_name(experiment):
    with pytest.raises(TopologyError, match=r"gen0: 4 GPUs at ranks 6-9 would straddle 2 nodes"):
        experiment(num_ctx_servers=3, ctx_tp_size=2)


def test_dialect_1x_packs_the_same_servers_per_node(experiment):
    e = experiment(num_ctx_servers=3, ctx_tp_size=2, trtllm_dialect="1.x")
    assert [s.gpus for s in e.servers] == [
        ((0, 0), (0, 1)),
        ((0, 2), (0, 3)),
        ((1, 0), (1, 1)),
        ((2, 0), (2, 1), (2, 2), (2, 3)),
    ]
    assert e.node_count == 3


def test_a_server_of_eight_takes_two_whole_nodes(experiment):
    e = experiment(num_ctx_servers=2, ctx_tp_size=4, ctx_pp_size=2)
    assert [s.nodes for s in e.servers] == [(0, 1), (2, 3), (4,)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gen_batch_size": "512"}, ["gen_batch_size", "found '512' (text)", "a whole number of at least 1"]),
        ({"gen_batch_size": 2.5}, ["gen_batch_size", "found 2.5", "a whole number"]),
        ({"num_ctx_servers": -1}, ["num_ctx_servers", "found -1", "at least 1"]),
        ({"find_target_qps": "true"}, ["found 'true' (text)", "papermill's -p wants True"]),
        ({"num_ctx_servers": True}, ["num_ctx_servers", "found True (true/false)", "a whole number"]),
        ({"gen_gpu_memory_fraction": 1.5}, ["found 1.5", "above 0", "below 1"]),
        ({"ctx_tp_size": 3}, ["ctx_tp_size", "found 3", "128 attention heads"]),
        ({"ctx_pp_size": 4}, ["ctx_pp_size", "found 4", "126 layers"]),
        ({"engine": "vllm"}, ["engine", "found 'vllm'", "'trtllm', 'rehearsal', 'external'"]),
        ({"test_modes": []}, ["test_modes", "at least one"]),
        ({"prompt_mean_tokens": 17000}, ["prompt_mean_tokens", "13000"]),
        ({"test_modes": ["power"]}, ["test_modes", "found 'power'"]),
        ({"max_seq_len": 20001}, ["max_seq_len", "multiple of 32", "20032"]),
        ({"time_limit": 30}, ["time_limit", "h:mm:ss"]),
        ({"partition": "a; rm -rf"}, ["partition", "found 'a; rm -rf'"]),
        ({"scratch_dir": "a\nb"}, ["scratch_dir", "text on one line"]),
        ({"fault": "meteor"}, ["fault", "found 'meteor'"]),
        ({"container_mounts": "/a b:/b"}, ["container_mounts", "pyxis would expand", "Use a plain path"]),
        ({"container_mounts": "/a:/$(id)"}, ["container_mounts", "pyxis would expand"]),
        ({"container_image": '/a".sqsh'}, ["container_image", "pyxis would expand"]),
        ({"work_dir": "/w$x"}, ["work_dir", "pyxis would expand"]),
        ({"trtllm_dialect": "1.x", "model_dir": "/a b"}, ["model_dir", "splits its command at blanks"]),
        ({"sbatch_options": ["--nodes=3"]}, ["sbatch_options", "--nodes is one", "Leave it out"]),
        ({"sbatch_options": ["--qos=a b"]}, ["sbatch_options", "without blanks and quotes"]),
        ({"sbatch_options": "--qos=a"}, ["sbatch_options", "needed a list of text"]),
        ({"engine": "external", "launcher": "local"}, ["endpoint_url", "not given"]),
        (
            {"endpoint_url": "http://h:65536"},
            ["endpoint_url", "found 'http://h:65536'", "a port of 1 to 65535"],
        ),
        ({"endpoint_url": "http://h:x"}, ["endpoint_url", "http://host:port"]),
        ({"endpoint_url": "http://[::1"}, ["endpoint_url", "http://host:port"]),
        ({"endpoint_url": "http://h/v1?key=x"}, ["endpoint_url", "http://host:port"]),
        ({"endpoint_url": ["http://h:1", "https://h:2"]}, ["endpoint_url", "the same scheme and path"]),
        ({"endpoint_url": ["http://h:1", "http://h:1"]}, ["endpoint_url", "each once"]),
        ({"scenario": "Offline", "find_target_qps": True}, ["find_target_qps", "has no limits"]),
        (
            {"engine": "rehearsal", "container": "none", "rehearsal_queries": 200, "find_target_qps": True},
            ["rehearsal_queries", "Set 459 or more"],
        ),
        ({"search_rows_from": "results/x"}, ["search_rows_from", "without find_target_qps: true"]),
        ({"client": "nvidia_harness", "test_modes": ["test06"]}, ["client", "test06", "Set client: loadgen"]),
        ({"launcher": "local"}, ["launcher", "one node", "Set launcher: slurm"]),
    ],
)
def test_a_bad_value_is_refused_in_words(experiment, given, words):
    with pytest.raises(ParameterError) as refusal:
        experiment(**given)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("url", ["http://[::1]:8000", "https://gb01.site/openai/v1", "http://10.0.0.7:8000"])
def test_an_endpoint_has_a_host_a_port_or_not_and_a_prefix_or_not(experiment, url):
    assert experiment(engine="external", launcher="local", endpoint_url=url).endpoint_url == (url,)


def test_a_misspelt_name_is_refused_with_the_nearest(experiment):
    with pytest.raises(ParameterError, match="gen_batchsize: no such parameter. Did you mean gen_batch_size"):
        experiment(gen_batchsize=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n- 2\n", "found a list, needed a mapping"),
        ("", "found nothing, needed a mapping"),
        ("a: [", "not readable as YAML"),
        ("gen_tp_size: 4\ngen_tp_size: 8\n", "gen_tp_size is given twice"),
        ("gentp_size: 4\n", "Did you mean gen_tp_size"),
        ("gen_tp_size: four\n", "gen_tp_size: found 'four' (text)"),
        ("? [a, b]\n: 1\n", "not readable as YAML"),
    ],
)
def test_a_bad_params_file_is_named_with_its_fault(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ParameterError) as refusal:
        load_experiment([path])
    assert str(path) in str(refusal.value)
    assert words in str(refusal.value)


def test_a_missing_params_file_is_named():
    with pytest.raises(ParameterError, match="params/nowhere.yaml: cannot be read"):
        load_experiment(["params/nowhere.yaml"])


def test_later_files_and_given_values_win_and_provenance_says_so(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("partition: batch\nserver_target_qps: 5\n")
    e = load_experiment(["params/rehearsal.yaml", site], {"num_gen_servers": 2, "segment": None})
    assert (e.partition, e.server_target_qps, e.num_gen_servers) == ("batch", 5.0, 2)
    sources = {name: e.provenance[name] for name in ("engine", "partition", "num_gen_servers", "segment")}
    assert sources == {
        "engine": "params/rehearsal.yaml",
        "partition": str(site),
        "num_gen_servers": "given",
        "segment": "default",
    }


@pytest.mark.parametrize("gpus", [20, 40, 60])
def test_a_cluster_file_means_the_same_on_top_of_the_rehearsal(gpus):
    alone = load_experiment([f"params/gb200_{gpus}gpu.yaml", "params/site.example.yaml"])
    on_top = load_experiment(
        ["params/rehearsal.yaml", f"params/gb200_{gpus}gpu.yaml", "params/site.example.yaml"]
    )
    assert (alone.gpu_count, alone.node_count) == (gpus, gpus // 4)
    differing = {n for n in parameter_names() if getattr(alone, n) != getattr(on_top, n)}
    assert all(name.startswith("rehearsal_") for name in differing)


def test_an_unquoted_time_limit_survives_yaml(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("time_limit: 4:00:00\n")
    assert load_experiment([path]).time_limit == "4:00:00"


def test_experiment_yaml_reads_back_equal(tmp_path):
    e = load_experiment(["params/rehearsal.yaml"], {"fault": "no_tokens"})
    (tmp_path / "experiment.yaml").write_text(experiment_text(e))
    again = load_recorded(tmp_path)
    assert again == e
    assert again.provenance["fault"] == "given"
    recorded = yaml.safe_load((tmp_path / "experiment.yaml").read_text())
    assert recorded["parameters"]["engine"] == {"value": "rehearsal", "from": "params/rehearsal.yaml"}


def test_a_run_folder_keeps_its_parameters(tmp_path):
    e = load_experiment(["params/rehearsal.yaml"])
    refuse_contradiction(e, ["params/rehearsal.yaml"], {"scratch_dir": "scratch"}, tmp_path)
    with pytest.raises(ParameterError, match="gen_batch_size: found 8, but"):
        refuse_contradiction(e, [], {"gen_batch_size": 8}, tmp_path)


def test_paths_are_absolute_below_the_repository():
    assert load_experiment([], {"scratch_dir": "x/../y"}).scratch_dir == str(REPOSITORY / "y")


def test_every_description_fits_a_papermill_help_line():
    from disagg_lib.experiment.parameters import Experiment

    for name in parameter_names():
        assert "=" not in Experiment.model_fields[name].description, name


def test_routing_follows_the_orchestrator_unless_it_is_given(experiment):
    dynamo = {"trtllm_dialect": "1.x", "orchestrator": "dynamo"}
    assert (experiment().router, experiment(**dynamo).router) == ("round_robin", "least_tokens")
    assert experiment(**dynamo, routing="round_robin").router == "round_robin"
