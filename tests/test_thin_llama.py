"""The thin layers equal transformers' own, whatever is read at once; other architectures keep to transformers."""

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from freeze_omni_lite.frozen_llm import FrozenLLM
from freeze_omni_lite.thin_llama import ThinLlama


def qwen():
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
        torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    return FrozenLLM(model, tiny.tokenizer(), "qwen")


def states(llm, vectors, sizes):
    cache = llm.new_cache()
    return torch.cat([llm.prefill(piece, cache) for piece in vectors.split(sizes, dim=1)], dim=1), cache


@pytest.mark.parametrize("make", [tiny.llm, qwen])
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [25, 2, 2, 5, 1, 1, 4]])
def test_equals_transformers(make, sizes):
    llm = make()
    vectors = torch.randn(1, 40, 32)
    assert llm.thin is not None
    thin, thin_cache = states(llm, vectors, sizes)
    llm.thin_model = None
    theirs, their_cache = states(llm, vectors, sizes)
    torch.testing.assert_close(thin, theirs, atol=2e-5, rtol=1e-4)
    for one, two in zip(thin_cache.layers, their_cache.layers, strict=True):
        torch.testing.assert_close(one.entries.view()[0], two.entries.view()[0], atol=2e-5, rtol=1e-4)


def test_caches_may_be_cropped_and_forked():
    llm = tiny.llm()
    vectors = torch.randn(1, 12, 32)
    whole, cache = states(llm, vectors, [12])
    cache.crop(5)
    fork = cache.fork()
    again = llm.prefill(vectors[:, 5:], cache)
    torch.testing.assert_close(again, whole[:, 5:], atol=2e-5, rtol=1e-4)
    assert fork.length == 5 and cache.length == 12


def test_the_weights_are_the_models_own():
    llm = tiny.llm()
    before, bytes_before = llm.fingerprint(), sum(p.nbytes for p in llm.parameters())
    assert llm.thin is not None and llm.fingerprint() == before
    assert sum(p.nbytes for p in llm.parameters()) == bytes_before
    gate = llm.model.model.layers[1].mlp.gate_proj.weight
    gate.data.zero_()
    assert not llm.thin.layers[1].gate_up[0][: len(gate)].any()


def test_training_through_the_model_goes_on_afterwards():
    llm = tiny.llm()
    llm.prefill(torch.randn(1, 3, 32), llm.new_cache())
    vectors = torch.randn(2, 5, 32, requires_grad=True)
    llm.hidden(vectors).square().sum().backward()
    assert vectors.grad.abs().sum() > 0


def test_a_moved_model_is_made_thin_again():
    llm = tiny.llm()
    first = llm.thin
    llm.to(torch.float64)
    assert llm.thin is not first
    vectors = torch.randn(1, 3, 32, dtype=torch.float64)
    assert llm.prefill(vectors, llm.new_cache()).dtype == torch.float64


def test_other_architectures_keep_to_transformers():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
    llm = FrozenLLM(GPT2LMHeadModel(config), tiny.tokenizer(), "gpt2")
    assert ThinLlama.of(llm.model.base_model) is None and llm.thin is None
    assert llm.model.base_model(inputs_embeds=torch.randn(1, 3, 32)).last_hidden_state.shape == (1, 3, 32)
