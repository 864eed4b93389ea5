"""A tokenizer of a few words, small configurations, and rows written with them."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

PAD, BOS, EOS, UNK = range(4)
WORDS = {f"w{i}": 4 + i for i in range(40)} | {"user": 44, "assistant": 45, ":": 46}
VOCABULARY = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNK, **WORDS}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ m.role }} : {{ m.content }} {% endfor %}")


def save_tokenizer(folder, framed="<s> $A", pair="<s> $A </s> $B </s>", **options):
    """A word-level tokenizer; `framed` says which special tokens it adds to a text."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=framed, pair=pair.replace("$B </s>", "$B:1 </s>:1"),
        special_tokens=[("<s>", BOS), ("</s>", EOS)])
    tokenizer.enable_padding(length=32)  # what some published tokenizers were saved with
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", **options).save_pretrained(folder)


def llama(**options):
    return transformers.LlamaConfig(
        **{"vocab_size": 48, "max_position_embeddings": 64, "hidden_size": 8,
           "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, **options})


def bert(kind=transformers.BertConfig, **options):
    return kind(**{"vocab_size": 48, "max_position_embeddings": 64, "hidden_size": 8,
                   "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1,
                   **options})


def t5(**options):
    return transformers.T5Config(vocab_size=48, d_model=8, **options)


def ids(samples, name="input_ids"):
    return [item[name].tolist() for item in samples.items]


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def tokens(*numbers):
    return [4 + n for n in numbers]
