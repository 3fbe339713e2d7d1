import pytest
import tiny
import torch

from freeze_omni_lite.errors import FrozenChanged, InputError
from freeze_omni_lite.fingerprint import assert_unchanged, digest
from freeze_omni_lite.frozen_llm import IGNORE, FrozenLLM, predicting_states, sample


@pytest.fixture(scope="module")
def llm():
    return tiny.llm()


def vectors_of(llm, positions=20, seed=0):
    return torch.randn(1, positions, llm.width, generator=torch.Generator().manual_seed(seed))


def test_prefill_in_pieces_equals_one_pass(llm):
    x = vectors_of(llm, 40)
    cache, out = llm.new_cache(), []
    for piece in x.split([7, 1, 1, 2, 29], dim=1):
        out.append(llm.prefill(piece, cache))
    assert cache.length == 40
    assert torch.allclose(torch.cat(out, 1), llm.hidden(x), atol=1e-5)


def test_past_never_changes(llm):
    x = vectors_of(llm)
    changed = x.clone()
    changed[:, 12:] += 1
    assert torch.equal(llm.hidden(x)[:, :12], llm.hidden(changed)[:, :12])


def test_cropped_cache_equals_fresh_prefill(llm):
    x, y = vectors_of(llm, 30), vectors_of(llm, 10, seed=1)
    cache = llm.new_cache()
    llm.prefill(x, cache)
    cache.crop(12)
    assert torch.allclose(llm.prefill(y, cache), llm.hidden(torch.cat([x[:, :12], y], 1))[:, 12:], atol=1e-5)


def test_fork_is_independent(llm):
    x, y = vectors_of(llm), vectors_of(llm, 5, seed=1)
    cache = llm.new_cache()
    llm.prefill(x, cache)
    branch = cache.fork()
    expected = llm.prefill(y, cache)
    assert (branch.length, cache.length) == (20, 25)
    llm.prefill(torch.randn(1, 3, llm.width), branch)
    cache.crop(20)
    assert torch.allclose(llm.prefill(y, cache), expected, atol=1e-5)


def test_a_step_copies_no_history(llm):
    cache = llm.new_cache()
    llm.prefill(vectors_of(llm, 65), cache)
    buffers = [layer.entries.buffers[0].data_ptr() for layer in cache.layers]
    for token in range(20):
        llm.step(token, cache)
    assert buffers == [layer.entries.buffers[0].data_ptr() for layer in cache.layers]


def test_gradients_reach_the_input_and_nothing_else(llm):
    before = llm.fingerprint()
    x = vectors_of(llm).requires_grad_()
    labels = torch.full((1, 20), IGNORE)
    labels[0, 15:] = 5
    llm.train()
    llm.loss(llm.hidden(x), labels).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in llm.parameters())
    assert not llm.model.training
    assert_unchanged(before, llm.fingerprint(), "the LLM")


def test_fingerprint_names_a_changed_tensor():
    llm = tiny.llm()
    before = llm.fingerprint()
    with torch.no_grad():
        llm.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-4
    with pytest.raises(FrozenChanged, match=r"1 tensors .*layers\.1\.mlp\.up_proj"):
        assert_unchanged(before, llm.fingerprint(), "the LLM")
    assert digest(before) != digest(llm.fingerprint())


def test_generated_states_equal_teacher_forced_ones(llm):
    opening = vectors_of(llm, 6)
    cache = llm.new_cache()
    hidden = llm.prefill(opening, cache)[:, -1:]
    generated = list(
        llm.generate(hidden, cache, 12, temperature=1.0, generator=torch.Generator().manual_seed(3))
    )
    tokens = [token for token, _ in generated]
    assert len(tokens) > 2
    whole = llm.hidden(torch.cat([opening, llm.embed([tokens])], 1))[0]
    forced = predicting_states(whole, 6, len(tokens))
    assert torch.allclose(torch.stack([state for _, state in generated]), forced, atol=1e-4)
    assert cache.length == 6 + len(tokens), (
        "an interrupted answer must be in the context, its end token must not"
    )


def test_batched_answers_equal_single_ones(llm):
    prompts = [[1, 5, 9], [1, 7, 8, 9, 10, 11], [4]]
    batch = llm.answers(prompts, 8)
    assert batch == [llm.answers([prompt], 8)[0] for prompt in prompts]
    cache = llm.new_cache()
    hidden = llm.prefill(llm.embed([prompts[0]]), cache)[:, -1:]
    assert batch[0] == [token for token, _ in llm.generate(hidden, cache, 8)]


def test_too_long_a_conversation_is_refused_before_it_breaks(llm):
    cache = llm.new_cache()
    with pytest.raises(InputError, match=r"513 positions.*has 512"):
        llm.prefill(torch.zeros(1, 513, llm.width), cache)
    assert cache.length == 0


def test_unknown_model_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="give a Hugging Face id or a folder"):
        FrozenLLM.load(str(tmp_path))


def test_sampling():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9])
    assert sample(logits, 0.0, 2) == 1
    drawn = {sample(logits, 1.0, 2, torch.Generator().manual_seed(i)) for i in range(30)}
    assert drawn == {1, 3}
