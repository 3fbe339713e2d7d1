"""The adapter's stream proofs and scale, the trained embeddings, and token CTC."""

import pytest
import torch

from freeze_omni_lite import scales
from freeze_omni_lite.adapter import Adapter, PromptEmbedding, TaskEmbedding, TokenCTC
from freeze_omni_lite.chunk import assert_past_never_changes, assert_streaming_equals_offline
from freeze_omni_lite.encoder import infeasible_share
from freeze_omni_lite.errors import InputError


@pytest.fixture
def adapter() -> Adapter:
    return Adapter.from_preset(scales.load("encoder_adapter", "tiny"), 16, 24, embedding_rms=0.11).eval()


def test_two_frames_become_one_vector_of_embedding_size(adapter):
    vectors, lengths = adapter(torch.randn(3, 12, 16), torch.tensor([12, 7, 0]))
    assert vectors.shape == (3, 6, 24) and lengths.tolist() == [6, 4, 0]
    torch.testing.assert_close(vectors.square().mean(-1).sqrt(), torch.full((3, 6), 0.11), atol=1e-3, rtol=0)
    assert adapter.state_dict()["embedding_rms"] == pytest.approx(0.11)  # saved with the weights


def test_streams_and_is_causal(adapter):
    x = torch.randn(2, 40, 16)
    for size in (4, 2, 8):
        assert_streaming_equals_offline(adapter, x, size, offline=lambda f: adapter(f)[0], tolerance=1e-5)
    assert_past_never_changes(lambda f: adapter(f)[0], x, cut=20, kept=10)
    with pytest.raises(ValueError, match="multiple of 2"):
        adapter.step(x[:, :3], adapter.start(2))


@torch.no_grad()
def test_leaves_its_input_alone_and_padding_out(adapter):
    x = torch.randn(2, 12, 16)
    before = x.clone()
    vectors, lengths = adapter(x, torch.tensor([12, 6]))
    assert torch.equal(x, before)
    torch.testing.assert_close(vectors[1:, : lengths[1]], adapter(x[1:, :6])[0])


@pytest.mark.parametrize("kind", [PromptEmbedding, TaskEmbedding])
def test_embeddings_start_as_rows_of_the_table(kind):
    table = torch.randn(50, 8)
    generator = torch.Generator().manual_seed(1)
    embedding = kind(5, 8, table, generator)
    assert embedding(3).shape == (3, 5, 8)
    assert all((table == vector).all(dim=1).any() for vector in embedding.vectors)
    embedding(2).sum().backward()
    assert (embedding.vectors.grad == 2).all()
    assert kind(0, 8)(2).shape == (2, 0, 8)
    assert [name for name, _ in embedding.named_parameters()] == ["vectors"]


def test_embedding_does_not_share_the_frozen_table():
    table = torch.randn(10, 4)
    before = table.clone()
    embedding = PromptEmbedding(3, 4, table)
    with torch.no_grad():
        embedding.vectors.zero_()
    assert torch.equal(table, before)


@pytest.fixture
def token_ctc() -> TokenCTC:
    return TokenCTC(torch.randn(100, 24), [70, 3, 41, 3], temperature=15.0)


def test_token_ctc_reads_the_nearest_embedding():
    table = torch.randn(100, 24)
    ctc = TokenCTC(table, [70, 3, 41])
    blank = ctc.blank.detach()
    vectors = torch.stack([blank, table[41], table[41], blank, table[41], table[3], table[70]])[None] * 0.1
    assert ctc.greedy(vectors, torch.tensor([7])) == [[41, 41, 3, 70]]
    assert ctc.greedy(vectors, torch.tensor([2])) == [[41]]


def test_token_ctc_trains_only_the_blank_and_saves_its_tokens(token_ctc):
    assert [name for name, _ in token_ctc.named_parameters()] == ["blank"]
    assert set(token_ctc.state_dict()) == {"blank", "token_ids"}
    assert token_ctc.token_ids.tolist() == [3, 41, 70]


def test_token_ctc_loss_moves_the_adapter(adapter, token_ctc):
    frames, targets = torch.randn(2, 12, 16), [[41, 3], [70, 70]]
    optimizer = torch.optim.AdamW([*adapter.parameters(), *token_ctc.parameters()], 1e-2)
    for _ in range(40):
        loss = token_ctc.loss(*adapter(frames), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 and token_ctc.greedy(*adapter(frames)) == targets


def test_token_ctc_skips_what_is_too_long_and_refuses_unknown_tokens(token_ctc):
    vectors, lengths = torch.randn(2, 3, 24), torch.tensor([3, 2])
    lists = [[41], [70, 70]]
    assert infeasible_share(lengths, lists) == 0.5
    alone = token_ctc.loss(vectors[:1], lengths[:1], lists[:1])
    torch.testing.assert_close(token_ctc.loss(vectors, lengths, lists), alone)
    with pytest.raises(InputError, match="token 5 is not among the 3"):
        token_ctc.loss(vectors, lengths, [[5], []])
