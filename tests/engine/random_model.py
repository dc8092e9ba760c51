"""A two-layer Llama of random weights with the real vocabulary's size; runs in the engine's environment."""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, END_ID = 128256, 128009

folder = Path(sys.argv[1])
torch.manual_seed(405)
sizes = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
}
config = LlamaConfig(
    **sizes, num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True,
    bos_token_id=128000, eos_token_id=END_ID,
)  # fmt: skip
LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(VOCABULARY)}, unk_token="t0"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer.save(str(folder / "tokenizer.json"))
words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": f"t{END_ID}", "unk_token": "t0"}
(folder / "tokenizer_config.json").write_text(json.dumps(words))
