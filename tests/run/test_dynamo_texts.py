"""What the job script says to Dynamo, by release; that the script is right is what tests/dynamo shows."""

import re
import subprocess
import sys

import pytest

from disagg_lib.files import REPOSITORY
from disagg_lib.run import dynamo
from disagg_lib.run.job_script import make_job_script

DYNAMO = {"orchestrator": "dynamo", "trtllm_dialect": "1.x"}


def script_of(e):
    return make_job_script(e, python="/project/.venv/bin/python")


def test_the_record_is_started_as_it_was(experiment):
    """Source: NVIDIA's closed v6.0, front ends and workers of llama3.1-405b Interactive; --enforce-disagg is ours."""
    script = script_of(experiment(REPOSITORY / "params/gb200_72gpu_v6.0_published.yaml", container="none"))
    router = "--router-mode kv --kv-overlap-score-weight 1.1 --router-replica-sync --enforce-disagg"
    assert len(re.findall(rf"python3 -m dynamo\.frontend .*{router}", script)) == 4
    assert (
        'trtllm-llmapi-launch python3 -m dynamo.trtllm --model-path "$MODEL" --served-model-name "$NAME"'
        in script
    )
    for word in ("prefill", "decode"):
        assert f"--disaggregation-mode {word} --extra-engine-args" in script
    assert script.count("--url ") == 4


def test_front_ends_have_no_variable_of_slurms(experiment):
    script = script_of(experiment(**DYNAMO, num_frontends=2))
    starts = re.findall(r"^start frontend\d .*$", script, re.MULTILINE)
    assert len(starts) == 2 and all('"${WITHOUT_SLURM[@]}"' in start for start in starts)


def test_only_a_local_job_keeps_to_loopback(experiment):
    local = {"launcher": "local", "engine": "rehearsal", "container": "none"}
    for release in dynamo.RELEASES:
        assert "0.0.0.0" not in script_of(experiment(**DYNAMO, **local, dynamo_release=release))
        assert "127.0.0.1" not in script_of(experiment(**DYNAMO, dynamo_release=release))


@pytest.mark.parametrize(
    ("found", "release", "said"),
    [("0.8.1", "0.8", "not there"), ("1.4.0", "0.8", "Dynamo is 1.4.0, dynamo_release 0.8")],
)
def test_the_check_in_the_image_names_both_releases_and_what_lacks(
    experiment, tmp_path, found, release, said
):
    info = tmp_path / f"ai_dynamo-{found}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ai-dynamo\nVersion: {found}\n")
    (tmp_path / "dynamo").mkdir()
    code = dynamo.check_code(experiment(**DYNAMO, dynamo_release=release))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1]


def test_the_check_is_one_word_for_the_shell(experiment):
    assert "'" not in dynamo.check_code(experiment(**DYNAMO))
