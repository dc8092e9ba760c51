"""Which orchestrator, how many of them, where: what follows from it, and what is refused before the queue."""

import pytest

from disagg_lib.errors import ParameterError

DYNAMO = {"orchestrator": "dynamo", "trtllm_dialect": "1.x"}


def test_front_ends_stand_on_nodes_and_ports_of_their_own(experiment):
    doors = experiment(**DYNAMO, num_frontends=3).doors
    assert [(d.name, d.node, d.port) for d in doors] == [
        ("frontend0", 0, 8000),
        ("frontend1", 1, 8001),
        ("frontend2", 2, 8002),
    ]


def test_one_orchestrator_has_the_name_that_it_always_had(experiment):
    assert [door.name for door in experiment().doors] == ["orchestrator"]
    assert experiment().services == ()


@pytest.mark.parametrize(
    ("given", "services"),
    [
        ({"dynamo_release": "0.8"}, ["etcd", "etcd_peer", "nats"]),
        ({"dynamo_release": "1.4"}, ["etcd", "etcd_peer"]),  # several nodes of a cluster
        ({"dynamo_release": "1.4", "dynamo_discovery": "file"}, []),
        ({"dynamo_release": "1.4", "launcher": "local", "engine": "rehearsal"}, []),
    ],
)
def test_services_are_those_that_the_release_and_its_discovery_need(experiment, given, services):
    e = experiment(**DYNAMO, **given)
    assert [service.name for service in e.services] == services
    ports = [part.port for part in (*e.doors, *e.services, *e.servers)]
    assert len(set(ports)) == len(ports)


def test_a_release_that_yaml_read_as_a_number_is_taken(experiment):
    assert experiment(**DYNAMO, dynamo_release=0.8).dynamo_release == "0.8"


def test_behind_dynamo_the_model_is_called_by_its_path(experiment):
    """Front ends of 0.8 look any other name up on the hub."""
    assert experiment(**DYNAMO, model_dir="/m").model_name == "/m"
    assert experiment(**DYNAMO, served_model="mine").model_name == "mine"
    assert experiment().model_name == "meta-llama/Llama-3.1-405B-Instruct"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (DYNAMO | {"num_frontends": 6}, "num_frontends: found 6, more than the 5 nodes of 4 context servers"),
        ({"orchestrator": "dynamo"}, "orchestrator: found 'dynamo' in dialect v5.1"),
        ({"num_frontends": 2}, "num_frontends: found 2 in dialect v5.1"),
        (
            DYNAMO | {"dynamo_release": "2.0"},
            "dynamo_release: found '2.0' .text., needed one of '0.8', '1.4'",
        ),
        (DYNAMO | {"dynamo_release": "0.8", "dynamo_discovery": "file"}, "which needs etcd. Leave it out"),
        (DYNAMO | {"worker_port": 8002, "num_frontends": 3}, "leave out server_port 8000 to 800"),
        (DYNAMO | {"engine": "rehearsal", "fault": "no_tokens"}, "whose mock workers know no faults"),
        (DYNAMO | {"client": "nvidia_harness"}, "Set client: loadgen"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(experiment, given, said):
    with pytest.raises(ParameterError, match=said) as refusal:
        experiment(**given)
    assert "\n" not in str(refusal.value)
