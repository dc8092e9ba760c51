"""The synthetic checkpoint: what real tools make of it, and how it is written."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers

from disagg_lib.checkpoint.structure import REHEARSAL, verify_checkpoint
from disagg_lib.checkpoint.synthetic import make_rehearsal_checkpoint
from disagg_lib.errors import ModelError
from disagg_lib.job.token_ids import load_tokenizer
from disagg_lib.results.scoring import END_TOKEN, load_decoder

IDS = [1000, 5095, 17]
TEXT = "t1000 t5095 t17"  # as the stand-in sends them


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_rehearsal_checkpoint(tmp_path_factory.mktemp("synthetic") / "model")


def sizes(folder):
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_transformers_reads_its_configuration(made):
    config = transformers.AutoConfig.from_pretrained(made)
    assert (config.model_type, config.vocab_size, config.num_hidden_layers) == ("llama", 128256, 2)
    ends = transformers.GenerationConfig.from_pretrained(made).eos_token_id
    assert END_TOKEN in ends and config.eos_token_id == ends


def test_transformers_reads_its_tokenizer(made):
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) == (128256, END_TOKEN, 128000)
    assert tokenizer(TEXT).input_ids == [128000, *IDS]
    assert tokenizer.decode([*IDS, END_TOKEN], skip_special_tokens=True) == TEXT


def test_client_and_scorer_read_the_stand_ins_texts_with_it(made):
    encode, end_id, _ = load_tokenizer(made / "tokenizer.json")
    assert list(encode(" " + TEXT)) == IDS and end_id == END_TOKEN
    assert load_decoder(made)([[*IDS, END_TOKEN]]) == [TEXT]


def test_it_takes_less_than_five_megabytes(made):
    assert sum(size for size, _ in sizes(made).values()) < 5_000_000


def test_every_process_writes_the_same_bytes(made, tmp_path):
    script = (
        "import sys, pathlib; from disagg_lib.checkpoint.synthetic import make_rehearsal_checkpoint as make; "
    )
    script += "make(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, tmp_path / "other"], check=True)
    for path in made.iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()


def test_only_files_that_differ_are_written_again(tmp_path):
    folder = make_rehearsal_checkpoint(tmp_path / "model")
    before = sizes(folder)
    (folder / "config.json").write_text("{}")  # of an older release, or damaged
    (folder / "tokenizer.json").unlink()
    make_rehearsal_checkpoint(folder)
    after = sizes(folder)
    assert {name for name in before if before[name] != after[name]} == {"config.json", "tokenizer.json"}
    assert all(check.ok for check in verify_checkpoint(folder, REHEARSAL, 22016))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="found a checkpoint that is no rehearsal's"):
        make_rehearsal_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_two_that_write_it_at_once_both_have_it(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: make_rehearsal_checkpoint(tmp_path / "model"), range(4)))
    assert all(check.ok for check in verify_checkpoint(folders[0], REHEARSAL, 22016))
    assert [path for path in folders[0].iterdir() if path.name.startswith(".")] == []
