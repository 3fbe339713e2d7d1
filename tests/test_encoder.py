"""The encoder's two stream proofs, padding, masks, memory, and CTC."""

import pytest
import torch

from freeze_omni_lite import scales
from freeze_omni_lite.attention import chunk_mask
from freeze_omni_lite.chunk import (
    assert_past_never_changes,
    assert_streaming_equals_offline,
    first_difference,
    fork,
)
from freeze_omni_lite.encoder import (
    ALL_LEFT,
    FULL_CONTEXT,
    ConvSubsampling,
    CTCHead,
    Encoder,
    GlobalNormalization,
    ctc_loss,
    infeasible_share,
)

CHUNK = 16  # mel frames


@pytest.fixture
def encoder() -> Encoder:
    """The tiny preset, with statistics that differ from 0 and 1, as they do after training."""
    encoder = Encoder.from_preset(scales.load("encoder_ctc", "tiny")).eval()
    encoder.normalization.fit([mels(40)])
    return encoder


def mels(chunks: int, batch: int = 1) -> torch.Tensor:
    """(batch, 16 * chunks, mels) with the mean and deviation of real log-mels."""
    return 12 + 3 * torch.randn(batch, CHUNK * chunks, 80)


def test_normalization_gives_mean_zero_deviation_one():
    corpus = [mels(5)[0, :33], mels(3, batch=2), mels(1)]
    normalization = GlobalNormalization().fit(corpus)
    frames = torch.cat([normalization(m).reshape(-1, 80) for m in corpus])
    torch.testing.assert_close(frames.mean(0), torch.zeros(80), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.std(0, unbiased=False), torch.ones(80), atol=1e-4, rtol=0)
    assert set(normalization.state_dict()) == {"mean", "inverse_deviation"}
    with pytest.raises(ValueError, match="at least one"):
        GlobalNormalization().fit([])


def test_nineteen_mels_become_four_frames():
    assert ConvSubsampling(4, 8)(torch.randn(2, 3 + CHUNK, 80)).shape == (2, 4, 8)


@pytest.mark.parametrize("changes", [{}, {"convolution_kernel": 1}, {"chunk_frames": 2, "left_chunks": 3}])
def test_streaming_equals_offline_beyond_the_left_context(changes):
    encoder = Encoder.from_preset(scales.load("encoder_ctc", "tiny", **changes)).eval()
    x = mels(40, batch=2)
    assert_streaming_equals_offline(encoder, x, CHUNK, offline=lambda m: encoder(m)[0])
    assert_streaming_equals_offline(encoder, x, 3 * CHUNK, offline=lambda m: encoder(m)[0])


@pytest.mark.parametrize("chunk_frames, left_chunks", [(2, 4), (8, ALL_LEFT), (4, 0)])
@torch.no_grad()
def test_other_chunk_sizes_stream_too(encoder, chunk_frames, left_chunks):
    x = mels(24)
    state = encoder.start(1, chunk_frames, left_chunks)
    steps = [encoder.step(piece, state) for piece in x.split(4 * chunk_frames, dim=1)]
    whole, _ = encoder(x, None, chunk_frames, left_chunks)
    assert first_difference(torch.cat(steps, dim=1), whole, 1e-4) is None


@torch.no_grad()
def test_an_origin_that_is_one_chunk_off_is_noticed(encoder):
    """The released code's bug: positions of new frames and cached frames no longer share one origin."""
    x, state = mels(24), encoder.start()
    before = [encoder.step(piece, state) for piece in x[:, : 20 * CHUNK].split(CHUNK, dim=1)]
    state.frames -= 4
    after = encoder.step(x[:, 20 * CHUNK :], state)
    assert first_difference(torch.cat([*before, after], dim=1), encoder(x)[0], 1e-4) == 80


def test_past_never_changes(encoder):
    assert_past_never_changes(lambda m: encoder(m)[0], mels(24), cut=20 * CHUNK, kept=80)


@torch.no_grad()
def test_left_context_is_sixteen_chunks_a_layer(encoder):
    """With one layer and no convolution, frame 80 on forgets what lies before its 16 left chunks."""
    encoder = Encoder.from_preset(scales.load("encoder_ctc", "tiny", layers=1, convolution_kernel=1)).eval()
    x = mels(24)
    changed = x.clone()
    changed[:, : 4 * CHUNK - 3] += 5  # chunks 0 to 3, but not the 3 mels that chunk 4 carries
    a, b = encoder(x)[0], encoder(changed)[0]
    assert first_difference(a[:, 80:], b[:, 80:], 1e-5) is None
    assert first_difference(a[:, 76:80], b[:, 76:80], 1e-5) == 0


@torch.no_grad()
def test_padded_batch_equals_singles(encoder):
    lengths, batch = torch.tensor([5 * CHUNK, 2 * CHUNK, 30]), mels(5, batch=3)
    frames, frame_lengths = encoder(batch, lengths)
    assert frame_lengths.tolist() == [20, 8, 7] and torch.isfinite(frames).all()
    for chunk_frames in (None, FULL_CONTEXT):
        frames, _ = encoder(batch, lengths, chunk_frames)
        alone, _ = encoder(batch[1:2, : 2 * CHUNK], None, chunk_frames)
        torch.testing.assert_close(frames[1:2, :8], alone, atol=1e-4, rtol=1e-4)


def test_no_nan_from_empty_rows_forward_or_backward(encoder):
    frames, _ = encoder.train()(mels(2, batch=2), torch.tensor([2 * CHUNK, 0]))
    frames[:1].sum().backward()
    assert torch.isfinite(frames).all()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_masks_of_contexts(encoder):
    lengths = torch.tensor([12])
    assert torch.equal(encoder.mask(lengths, 12, None, None)[0, 0], chunk_mask(12, 4, 16))
    assert torch.equal(encoder.mask(lengths, 12, 3, ALL_LEFT)[0, 0], chunk_mask(12, 3, None))
    assert encoder.mask(lengths, 12, FULL_CONTEXT, None).all()


@torch.no_grad()
def test_memory_is_flat_and_sessions_are_apart(encoder):
    x = mels(1)
    state, sizes = encoder.start(), []
    for _ in range(500):
        encoder.step(x, state)
        sizes.append(state.nbytes())
    assert max(sizes[40:]) == min(sizes[40:]) and sizes[-1] < 2_000_000
    assert state.frames == 2000
    twin = fork(state)
    following = encoder.step(x, state)
    encoder.step(mels(1), state)
    torch.testing.assert_close(encoder.step(x, twin), following)


def test_dynamic_chunks_are_drawn_by_the_rule(encoder):
    generator = torch.Generator().manual_seed(3)
    draws = [encoder.draw_chunk_frames(generator) for _ in range(2000)]
    assert set(draws) == set(range(26))
    assert 0.45 < draws.count(FULL_CONTEXT) / len(draws) < 0.55
    assert draws[:5] == [
        encoder.draw_chunk_frames(g) for g in [torch.Generator().manual_seed(3)] for _ in range(5)
    ]


def test_wrong_lengths_are_refused(encoder):
    with pytest.raises(ValueError, match="multiple of 4"):
        encoder(torch.zeros(1, 15, 80))
    with pytest.raises(ValueError, match="multiple of 16"):
        encoder.step(torch.zeros(1, 12, 80), encoder.start())
    with pytest.raises(ValueError, match="cannot stream"):
        encoder.start(chunk_frames=FULL_CONTEXT)


def test_encoder_golden(golden, fill):
    encoder = fill(Encoder(64, 2, 2, 128, subsampling_channels=4, convolution_kernel=15))
    x = torch.sin(torch.arange(2 * CHUNK * 80) * 0.37).reshape(1, 2 * CHUNK, 80)
    frames, _ = encoder(x)
    golden("encoder_tiny", 1e-3, frames=frames[0])


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_larger_presets_have_the_expected_size(scale):
    with torch.device("meta"):
        encoder = Encoder.from_preset(scales.load("encoder_ctc", scale))
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    low, high = {"laptop": (4.5, 5.5), "paper": (320, 370)}[scale]
    assert low < millions < high


def test_ctc_loss_is_per_unit_and_skips_what_does_not_fit():
    log_probs = torch.randn(3, 6, 5).log_softmax(-1)
    lengths, targets = torch.tensor([6, 5, 2]), [[1, 2, 2], [4], [3, 3]]  # the last needs 3 frames
    assert infeasible_share(lengths, targets) == pytest.approx(1 / 3)
    singles = [
        torch.nn.functional.ctc_loss(
            log_probs[i, :length, None], torch.tensor([target]), [length], [len(target)], reduction="sum"
        )
        for i, (length, target) in enumerate(zip([6, 5], targets, strict=False))
    ]
    torch.testing.assert_close(ctc_loss(log_probs, lengths, targets), sum(singles) / 4)
    assert ctc_loss(log_probs, lengths, [[], [], []]).isfinite()
    assert infeasible_share(torch.tensor([]), []) == 0.0


def test_overfits_two_utterances(encoder):
    head = CTCHead.from_preset(scales.load("encoder_ctc", "tiny"))
    x, lengths = mels(4, batch=2), torch.tensor([4 * CHUNK, 3 * CHUNK])
    targets = [[8, 5, 12, 12, 15], [3, 1, 20]]
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 3e-3)
    encoder.train()
    for _ in range(60):
        loss = head.loss(*encoder(x, lengths), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert head.greedy(*encoder.eval()(x, lengths)) == targets


@torch.no_grad()
def test_mixed_precision_stays_close(encoder):
    x = mels(6)
    with torch.autocast("cpu", torch.bfloat16):
        short, _ = encoder(x)
    exact, _ = encoder(x)
    assert short.dtype == torch.float32
    assert (short - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()
