"""Rules that are checked before the queue, each with what was found and what to do."""

import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..checks import Check
from ..errors import JobError, LatencyTableError, NoAnswer
from ..experiment.parameters import Experiment
from ..experiment.topology import topology_arithmetic
from ..files import REPOSITORY, existing_parent
from ..results.accuracy import read_references
from ..results.scoring import load_decoder, sentence_splitter
from ..run.durations import TEARDOWN_S, job_seconds, search_seconds
from ..run.job_script import make_job_script
from ..run.made_with import cite_client, pinned_versions
from ..serving import latency
from ..serving.lengths import INPUT_MEAN, MAX_INPUT_TOKENS, MAX_OUTPUT_TOKENS, SAMPLE_COUNT
from . import slurm
from .probe import last_probe, probe_script, read_probe, software_rows

# rule: (requirement, what goes wrong without it, what to do, level); {} is filled in by the rule's own words
RULES = {
    "gpu_arithmetic": (
        "no idle GPU in the allocation",
        "{idle} GPUs held and idle for the whole job",
        "choose server counts and sizes that fill the nodes",
        "warning",
    ),
    "tp_over_nodes": (
        "servers over several nodes share one NVLink domain",
        "tensor parallelism over the slow network, if Slurm picks nodes of two racks",
        "set segment in params/site.yaml to the nodes of one domain, at least those of the widest server",
        "warning",
    ),
    "context_memory": (
        "weights and one request of {longest} tokens fit",
        "an engine that cannot start, or never finishes its longest request",
        "use TP 2 to 16 for the context servers, or raise ctx_gpu_memory_fraction",
    ),
    "generation_memory": (
        "weights and one request of {longest} tokens fit",
        "an engine that cannot start, or never finishes its longest request",
        "use TP 2 to 16 for the generation servers, or raise gen_gpu_memory_fraction",
    ),
    "gen_max_num_tokens": (
        "gen_max_num_tokens not below gen_batch_size",
        "a batch that can never fill: each request needs one token a step",
        "set gen_max_num_tokens: {batch}",
        "warning",  # MLPerf v6.0's record has 1024 for 1280
    ),
    "max_seq_len": (
        "at least {in_} in + {out} out = {needed} tokens",
        "requests that are refused or cut short, which make a run INVALID",
        "set max_seq_len: 22016",
    ),
    "transfer_buffer": (
        "the KV transfer buffer (kv_buffer_tokens, or as long as max_seq_len) holds the longest prompt, {longest}",
        "transfers that stall under load",
        "set {key}: 22016",
    ),
    "walltime": (
        "time_limit covers loading and all test modes at server_target_qps",
        "a job that is ended in the middle of its last test mode",
        "set time_limit to at least {enough}",
    ),
    "teardown_time": (
        "a time_limit of 0:04:00 or more",
        "teardown that begins with the job: Slurm signals it 120 s before the limit",
        "raise time_limit",
        "warning",
    ),
    "free_space": (
        "1 GB free for the run folder",
        "logs cut short",
        "free some space, or give run_dir elsewhere",
    ),
    "secrets": (
        "no token in any parameter",
        "a secret in experiment.yaml, the job script and every notebook that is shared",
        "take it out and revoke it; log in to the hub instead (`hf auth login`), or set HF_TOKEN",
    ),
    "model_folder": (
        "the checkpoint of 126 layers is readable here",
        "servers that die while loading, after the queue",
        "run 01_model_download, or set scratch_dir or model_dir (params/site.yaml)",
    ),
    "dynamo": (
        "ai-dynamo {release} in dynamo_dir",
        "front ends that cannot start",
        "run `make test-dynamo`, which installs it into .venv-dynamo, or set dynamo_dir or dynamo_release",
    ),
    "dynamo_model": (
        "a checkpoint whose tokenizer_config.json holds a chat template",
        "front ends that never list the model",
        "run 01_model_download, which makes a rehearsal's, or set model_dir",
    ),
    "data_set": (
        "the benchmark's data set, readable and trusted",
        "{prevents}",
        "set dataset_path, and trust_dataset: true, in params/site.yaml (opening a pickle can run code)",
    ),
    "container_image": (
        "the container image is there",
        "a job that ends in its first phase",
        "set container_image in params/site.yaml, see 00_setup",
    ),
    "container_mounts": (
        "each mount is an existing host path, a colon, an absolute path",
        "containers that do not start",
        "correct container_mounts in params/site.yaml",
    ),
    "tensorrt_llm_mount": (
        "a mount that ends at work_dir and holds TensorRT-LLM (.llm_*/lib/python3*/site-packages/tensorrt_llm)",
        "servers that find no TensorRT-LLM: the v5.1 image has it in the mounted tree alone",
        "add <the tree's closed/NVIDIA>:{work_dir} to container_mounts, and build TensorRT-LLM there (00_setup)",
    ),
    "rehearsal_mount": (
        "this project and its .venv are seen in the container at their own paths",
        "a stand-in that cannot start there",
        "add {project}:{project} to container_mounts; the image's python3 must be .venv's release",
    ),
    "accuracy_inputs": (
        "data set with references, and the tokenizer whose ids it holds",
        "an accuracy run that nobody can score",
        "run 01_model_download; set dataset_path and model_dir in params/site.yaml",
    ),
    "scorer": (
        "the extra `accuracy`",
        "an accuracy run that cannot be scored here",
        "pip install '.[accuracy]'",
    ),
    "sentence_splitter": (
        "NLTK's punkt_tab data",
        "gen_len, which nothing judges, differing by blanks",
        "python -m nltk.downloader punkt_tab",
        "warning",
    ),
    "client_loadgen": (
        "LoadGen {pin} in client_dir: the round's, whose seeds are built in",
        "a run with another round's seeds, found after it",
        "build client_dir anew (setup_jobs: all)",
    ),
    "probe": (
        "{requirement}",
        "servers that do not start, after the queue",
        "{fix}",
    ),
    "harness_dir": (
        "harness_dir holds the harness's Makefile (closed/NVIDIA)",
        "a client that cannot start",
        "set harness_dir",
    ),
    "harness_config": (
        "the system's configuration file exists",
        "the harness running on with an empty configuration: it only logs a line",
        "set system_name to a folder of the harness's configurations, or add the file",
    ),
    "slurm": (
        "a controller that answers, and Slurm's commands on PATH",
        "a submission that nobody answers",
        "go to a login node of the cluster, or set launcher: local for a rehearsal here",
    ),
    "partition": (
        "a partition of this cluster that is up: {names}",
        "a submission that is refused",
        "set partition in params/site.yaml",
    ),
    "partition_nodes": (
        "{nodes} nodes",
        "a job that never starts",
        "choose a larger partition or a smaller topology",
    ),
    "partition_time": (
        "time_limit {limit}",
        "a job that is refused, or waits for ever",
        "set time_limit to at most {allowed}, or choose another partition",
    ),
    "account": (
        "one of your accounts: {names}",
        "a submission that is refused",
        "set account in params/site.yaml",
    ),
    "segment": (
        "an sbatch that knows --segment",
        "nodes of two NVLink domains in one server",
        "ask for a reservation within one rack; --segment is left out",
        "warning",
    ),
    "sbatch": (
        "sbatch --test-only takes the job script",
        "a submission that is refused",
        "do what the message says",
    ),
}


def _rule(rule: str, ok: bool, found: object, level: str = "", **words: object) -> Check:
    requirement, prevents, fix, *stated = (text.format(**words) for text in RULES[rule])
    return Check(requirement, str(found), ok, fix, rule, prevents, level or (*stated, "error")[0])


def experiment_checks(e: Experiment) -> list[Check]:
    """Every rule that needs no cluster: arithmetic, memory, time, paths, secrets."""
    checks = [_secrets(e), *_times(e), _free_space()]
    if e.servers:
        checks += [*_topology(e), *_memory(e), *_lengths(e)]
        if e.engine == "trtllm":
            checks.append(_model_folder(e))
        elif e.orchestrator == "dynamo":
            checks += _dynamo_rehearsal(e)
    checks += _container(e)
    if e.engine != "rehearsal" and e.client == "loadgen":
        checks += [_data_set(e), *_client(e)]
    return checks + (_harness(e) if e.client == "nvidia_harness" else [])


def _topology(e: Experiment) -> list[Check]:
    held, used = e.node_count * e.gpus_per_node, e.gpu_count
    found = f"{topology_arithmetic(e)}; {e.node_count} nodes x {e.gpus_per_node} = {held}"
    wide = ", ".join(server.name for server in e.servers if len(server.nodes) > 1)
    spread = f"{wide} on several nodes, segment {e.segment}" if wide else "every server on one node"
    return [
        _rule("gpu_arithmetic", held == used, found, idle=held - used),
        _rule("tp_over_nodes", not wide or e.segment is not None, spread),
    ]


MEAN_ANSWER_TOKENS = 653  # of the published runs; the built-in shapes have 646


def _memory(e: Experiment) -> Iterator[Check]:
    """Weights and KV cache against GPU memory, with NVFP4 weights and an FP8 KV cache."""
    for role, short, pp_size in (("context", "ctx", e.ctx_pp_size), ("generation", "gen", 1)):
        tp_size, batch = getattr(e, f"{short}_tp_size"), getattr(e, f"{short}_batch_size")
        fraction, tokens = getattr(e, f"{short}_gpu_memory_fraction"), getattr(e, f"{short}_max_num_tokens")
        rule, of = f"{role}_memory", f"TP{tp_size} PP{pp_size}"
        try:
            capacity = latency.read_table(e.gpu_system, tp_size, pp_size).kv_capacity_tokens(fraction, tokens)
        except LatencyTableError as error:
            one_gpu = tp_size * pp_size == 1
            found = f"{of}: 216 GiB of weights on one GPU of 186" if one_gpu else error
            yield _rule(rule, False, found, "error" if one_gpu else "warning", longest=e.max_seq_len)
            continue
        mean = INPUT_MEAN + (MEAN_ANSWER_TOKENS if role == "generation" else 0)
        found = f"{of}: {capacity:,} KV tokens hold about {capacity // mean} of {batch} mean requests"
        yield _rule(rule, capacity >= e.max_seq_len, found, longest=e.max_seq_len)


def _lengths(e: Experiment) -> list[Check]:
    batch, length = e.gen_batch_size, e.max_seq_len
    longest, out = MAX_INPUT_TOKENS, MAX_OUTPUT_TOKENS
    found = f"{e.gen_max_num_tokens} tokens a step for {batch} requests"
    words = {"in_": longest, "out": out, "needed": longest + out}
    holds, buffer = e.buffer_tokens >= longest, f"{e.buffer_tokens} tokens"
    key = "kv_buffer_tokens" if e.kv_buffer_tokens else "max_seq_len"
    return [
        _rule("gen_max_num_tokens", e.gen_max_num_tokens >= batch, found, batch=batch),
        _rule("max_seq_len", length >= longest + out, f"{length} tokens", **words),
        _rule("transfer_buffer", holds, buffer, longest=longest, key=key),
    ]


def _times(e: Experiment) -> list[Check]:
    needed_s = job_seconds(e) + search_seconds(e)
    modes = ["find_target_qps"] * e.find_target_qps + list(e.test_modes)
    half_hours = math.ceil((needed_s + TEARDOWN_S) / 1800)
    found = (
        f"{e.time_limit} = {e.time_limit_s} s, of which teardown keeps {TEARDOWN_S} s; loading and "
        f"{' and '.join(modes)} take about {needed_s:.0f} s"
    )
    enough = f"{half_hours // 2}:{half_hours % 2 * 30:02d}:00"
    return [
        _rule("walltime", e.time_limit_s - TEARDOWN_S >= needed_s, found, enough=enough),
        _rule("teardown_time", e.time_limit_s >= 240 or e.launcher == "local", e.time_limit),
    ]


def _free_space() -> Check:
    free_gb = shutil.disk_usage(existing_parent(REPOSITORY / "results")).free / 1e9
    return _rule("free_space", free_gb >= 1, f"{free_gb:.1f} GB")


SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|(?i:(?:api[_-]?key|token|password|secret)\s*[=:]\s*\S{8,})|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}"
)


def _secrets(e: Experiment) -> Check:
    values = e.model_dump().items()  # a mapping as text, so that API_KEY: 123 in it is seen as well
    texts = {name: str(value).replace("'", "") for name, value in values if isinstance(value, str | dict)}
    holders = ", ".join(name for name, text in texts.items() if SECRET.search(text))
    return _rule("secrets", not holders, f"something like a token in {holders}" if holders else "none")


def _model_folder(e: Experiment) -> Check:
    config = Path(e.model_path) / "config.json"
    if not os.access(config, os.R_OK):
        return _rule("model_folder", False, f"no readable config.json in {e.model_path}")
    # A rehearsal's two-layer checkpoint may stand in the same place below the default scratch_dir.
    layers = re.search(r'"num_hidden_layers":\s*(\d+)', config.read_text(errors="replace"))
    found = layers[1] if layers else "unknown"
    return _rule("model_folder", found == "126", f"{e.model_path}, {found} layers")


def _dynamo_rehearsal(e: Experiment) -> Iterator[Check]:
    python = Path(e.dynamo_dir) / "bin/python"
    versions = [path.name for path in Path(e.dynamo_dir).glob("lib/python3*/site-packages/ai_dynamo-*")]
    fits = any(name.startswith(f"ai_dynamo-{e.dynamo_release}.") for name in versions)
    found = f"{python}, {versions[0].removesuffix('.dist-info')}" if versions else f"no ai-dynamo in {python}"
    yield _rule("dynamo", os.access(python, os.X_OK) and fits, found, release=e.dynamo_release)
    settings = Path(e.model_path) / "tokenizer_config.json"
    told = "chat_template" in settings.read_text(errors="replace") if settings.is_file() else False
    found = f"{e.model_path}, {'with' if told else 'without'} a chat template"
    yield _rule("dynamo_model", told, found)


def _data_set(e: Experiment) -> Check:
    path, level = e.dataset_path, "error"
    if path is None:
        found, level = "synthetic prompts", "warning"
        prevents = "a measured run that can claim no round: its prompts are made up"
    elif not os.access(path, os.R_OK):
        found, prevents = f"{path} is not readable here", "a client that ends after the servers have loaded"
    else:
        found = f"{path}, trust_dataset: {str(e.trust_dataset).lower()}"
        prevents = "a client that refuses the pickle after the servers have loaded (a pickle can run code)"
    ok = path is not None and os.access(path, os.R_OK) and e.trust_dataset
    return _rule("data_set", ok, found, level, prevents=prevents)


def scoring_checks(e: Experiment) -> Iterator[Check]:
    """What an accuracy run's score needs, looked at before the run, since hours later it is missed. Opens the data set."""
    if e.engine == "rehearsal" or e.client != "loadgen":
        return
    if not e.dataset_path or "accuracy" not in e.test_modes:
        return
    try:
        load_decoder(Path(e.model_path))
        tokens = json.loads((Path(e.model_path) / "tokenizer.json").read_text(encoding="utf-8"))
        highest = max(tokens["model"]["vocab"].values())
        references = read_references(Path(e.dataset_path), None, e.trust_dataset)
        ids = max(max(row) for row in references["tok_input"].head(100))
        found = f"{len(references)} samples with ids up to {ids}; a tokenizer up to {highest}"
        # The 256 special tokens of Llama 3 follow its vocabulary.
        yield _rule("accuracy_inputs", len(references) == SAMPLE_COUNT and ids <= highest + 256, found)
    except Exception as error:  # a pickle that is opened may raise anything
        yield _rule("accuracy_inputs", False, f"{type(error).__name__}: {error}")
    absent = [name for name in ("rouge_score", "tokenizers") if importlib.util.find_spec(name) is None]
    yield _rule("scorer", not absent, f"{', '.join(absent)} absent" if absent else "there")
    note = sentence_splitter()[1]
    yield _rule("sentence_splitter", note.startswith("sentences cut"), note)


def _client(e: Experiment) -> Iterator[Check]:
    if e.client_dir and (cited := cite_client(e.client_dir)):
        name = "mlcommons-loadgen"
        pin = pinned_versions()[name]
        yield _rule("client_loadgen", cited.get(name) == pin, cited.get(name), pin=pin)


def _container(e: Experiment) -> Iterator[Check]:
    if e.container == "none" or e.launcher == "local":
        return
    image = e.container_image
    readable = bool(image) and os.access(image, os.R_OK)
    if image and not image.endswith(".sqsh"):
        yield _rule("container_image", True, f"{image} (a registry's name: pulled on the nodes)")
    else:
        found = image if readable else f"{image} is not readable here" if image else "not given"
        yield _rule("container_image", readable, found)
    for mount in (e.container_mounts or "").split(",") if e.container_mounts else []:
        host, colon, inside = mount.partition(":")
        good = bool(colon) and inside.startswith("/") and os.path.exists(host)
        why = f"{host} does not exist here" if colon else f"{mount}: no host:container pair"
        yield _rule("container_mounts", good, mount if good else why)
    mounts = dict(pair.split(":")[1::-1] for pair in (e.container_mounts or "").split(",") if ":" in pair)
    if e.engine == "trtllm" and e.trtllm_dialect == "v5.1" and e.work_dir:
        host = Path(mounts.get(e.work_dir.rstrip("/"), "/nowhere"))
        holds = sorted(host.glob(".llm_*/lib/python3*/site-packages/tensorrt_llm"))
        found = holds[0] if holds else f"no TensorRT-LLM in {host}" if host.exists() else "no such mount"
        yield _rule("tensorrt_llm_mount", bool(holds), found, work_dir=e.work_dir)
    if e.engine == "rehearsal":
        seen = [Path(inside) for inside, host in mounts.items() if inside == host] + [Path.home()]
        covered = any(REPOSITORY.is_relative_to(path) for path in seen)
        yield _rule("rehearsal_mount", covered, e.container_mounts, project=REPOSITORY)


def _harness(e: Experiment) -> list[Check]:
    where = Path(e.harness_dir) if e.harness_dir else None
    makefile = where is not None and (where / "Makefile").is_file()
    pattern = f"{e.system_name}/Interactive/llama3_1-405b.py"
    configs = sorted(where.glob(f"**/{pattern}")) if makefile and e.system_name else []
    found = configs[0] if configs else f"no {pattern} below {where}"
    return [_rule("harness_dir", makefile, where), _rule("harness_config", bool(configs), found)]


def cluster_checks(e: Experiment, script: str) -> list[Check]:
    """What Slurm itself says of partition, limits, account and the job script."""
    commands = ("sbatch", "srun", "squeue", "scontrol", "sinfo")
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        return [_rule("slurm", False, f"{', '.join(missing)} not on PATH")]
    try:
        return list(_cluster_rules(e, script))
    except JobError as error:
        return [_rule("slurm", False, error)]


def _cluster_rules(e: Experiment, script: str) -> Iterator[Check]:
    known = slurm.partitions()
    chosen = next((p for p in known if (p.name == e.partition if e.partition else p.is_default)), None)
    up = "" if chosen is None else f", {'up' if chosen.is_up else 'down'}"
    names = ", ".join(p.name for p in known)
    found = f"{e.partition or 'the default'}{up}"
    checks = [_rule("partition", chosen is not None and chosen.is_up, found, names=names)]
    if chosen is not None:
        enough, found = chosen.nodes >= e.node_count, f"{chosen.name} has {chosen.nodes} nodes"
        checks.append(_rule("partition_nodes", enough, found, nodes=e.node_count))
        allowed, limit = f"{chosen.time_limit_s:.0f} s", f"{e.time_limit} = {e.time_limit_s} s"
        enough, found = chosen.time_limit_s >= e.time_limit_s, f"{chosen.name} allows {allowed}"
        checks.append(_rule("partition_time", enough, found, limit=limit, allowed=allowed))
    mine = slurm.accounts()
    if e.account and mine:
        checks.append(_rule("account", e.account in mine, e.account, names=", ".join(mine)))
    if e.segment:
        checks.append(_rule("segment", slurm.knows_segment(), e.segment))
    yield from checks
    if all(check.ok or check.level == "warning" for check in checks):
        refusal = ""
        try:
            slurm.test_submission(script)
        except NoAnswer:
            raise
        except JobError as error:
            refusal = str(error)
        yield _rule("sbatch", not refusal, refusal or "would take it")


def check_experiment(e: Experiment) -> list[Check]:
    """Every rule that can be checked from here, before anything is submitted."""
    checks = [*experiment_checks(e), *scoring_checks(e)]
    if e.launcher == "slurm":
        checks += [*_last_probe(e), *cluster_checks(e, make_job_script(e))]
    return checks


def _last_probe(e: Experiment) -> Iterator[Check]:
    """What 00's newest probe of the same parameters found in the container, if there is one."""
    if folder := last_probe(e, probe_script(e)):
        for requirement, found, ok, fix in software_rows(e, read_probe(folder)):
            yield _rule("probe", ok, found, requirement=requirement, fix=fix)
