"""The topology as a picture: whole, readable, a hue a role."""

import re
import time

import pytest

from disagg_lib.experiment.loading import changed, load_experiment
from disagg_lib.notebook import pictures
from disagg_lib.results import style

NVL72 = load_experiment(
    ["params/gb200_72gpu.yaml"], {"num_ctx_servers": 14, "ctx_tp_size": 4, "num_gen_servers": 4}
)


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


def test_each_front_end_is_drawn_on_its_own_node():
    svg = pictures.topology_svg(load_experiment(["params/gb300_72gpu_v6.0.yaml"]))
    assert "8 Dynamo front ends" in svg and svg.count(">O</text>") == 8 + 1  # and the legend's
    external = pictures.topology_svg(
        load_experiment(given={"engine": "external", "endpoint_url": "http://localhost:8000"})
    )
    assert ">O</text>" not in external and ">L</text>" in external


def test_every_server_colour_bears_its_text():
    for colour in (*style.CONTEXT_COLOURS, *style.GENERATION_COLOURS):
        contrast = (luminance(colour) + 0.05) / (luminance(style.INK) + 0.05)
        assert contrast >= 4.5, colour  # WCAG 2, AA


def test_both_pictures_name_servers_alike():
    assert style.server_mark("context", "ctx12")[0] == "C12"
    assert style.server_mark("generation", "gen1") == ("G1", style.GENERATION_COLOURS[1])


def test_above_forty_nodes_a_node_is_a_square():
    svg = pictures.topology_svg(changed(NVL72, {"num_ctx_servers": 70, "num_gen_servers": 10}))
    assert "A square is a node of 4 GPUs" in svg
    assert len(re.findall(r'<rect x="\d+" y="\d+" width="32"', svg)) == 80 + 3  # and the legend
    assert float(re.search(r'width="(\d+)"', svg)[1]) <= 700
