"""A random two-layer language model with a word tokenizer, for tests that need an LLM but not a good one."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from freeze_omni_lite.frozen_llm import FrozenLLM

TEXT = "system user assistant you are helpful what is the capital of france paris rome red blue . , ? hello yes no"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, three special tokens, a line break; ChatML as the chat template."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {word: i for i, word in enumerate([*specials, "\n", *TEXT.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=specials,
    )
    fast.chat_template = CHATML
    return fast


def llm(width: int = 32, layers: int = 2, seed: int = 0) -> FrozenLLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    return FrozenLLM(LlamaForCausalLM(config), tokenizer(), "tiny")
