"""The codec: lengths, the decoding stream, what padding must not change, level, errors, and that it learns."""

import math

import pytest
import torch

from freeze_omni_lite import scales
from freeze_omni_lite.audio import HOP_SAMPLES, SPEECH_SAMPLE_RATE_HZ
from freeze_omni_lite.chunk import assert_past_never_changes, assert_streaming_equals_offline, fork
from freeze_omni_lite.codec import (
    HEAD_WINDOW_SAMPLES,
    LOG_FLOOR,
    Codec,
    InverseSTFTHead,
    LogMelBank,
    limit,
    overlap_add,
)
from freeze_omni_lite.errors import InputError

TOKENS = 53


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(1)
    return Codec.from_preset(scales.load("codec", "tiny")).eval()


@pytest.fixture
def codes(codec: Codec) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randint(codec.codebook.size, (2, TOKENS))


def vowel(seconds: float, pitch_hz: float = 120.0) -> torch.Tensor:
    """A hummed tone with harmonics that swells and fades twice a second: (samples,), peak about 0.3."""
    time = torch.arange(int(seconds * SPEECH_SAMPLE_RATE_HZ)) / SPEECH_SAMPLE_RATE_HZ
    pitch = pitch_hz * (1 + 0.1 * torch.sin(2 * math.pi * 1.3 * time))
    phase = 2 * math.pi * pitch.cumsum(0) / SPEECH_SAMPLE_RATE_HZ
    tone = sum(torch.sin(k * phase) / k**1.5 for k in range(1, 20))
    return 0.15 * tone * (0.55 - 0.45 * torch.cos(2 * math.pi * 2 * time))


@pytest.mark.parametrize(("samples", "tokens"), [(1, 1), (599, 1), (600, 1), (601, 2), (24_000, 40)])
def test_one_token_for_every_600_samples_begun(codec, samples, tokens):
    codes = codec.encode(0.1 * torch.randn(2, samples))
    assert codes.shape == (2, tokens) and codes.dtype == torch.long
    assert codec.decode(codes).shape == (2, tokens * HOP_SAMPLES)


def test_rates():
    codec = Codec.from_preset(scales.load("codec", "tiny", codebook_size=1024, lookahead_tokens=3))
    assert codec.bits_per_second == 400
    assert codec.lookahead_samples == 3 * 600
    assert (codec.sample_rate_hz, codec.hop_samples) == (24_000, 600)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 7, 20, 40, TOKENS])
def test_decoding_in_pieces_equals_decoding_at_once(codec, codes, size):
    assert_streaming_equals_offline(codec, codes, size, offline=codec.decode, tolerance=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_short_streams_come_out_whole(codec, codes, tokens):
    state = codec.start(2)
    audio = torch.cat([codec.step(codes[:, :tokens], state), codec.finish(state)], dim=1)
    torch.testing.assert_close(audio, codec.decode(codes[:, :tokens]), atol=1e-5, rtol=0)
    assert audio.shape == (2, tokens * HOP_SAMPLES)


@torch.no_grad()
@pytest.mark.parametrize("lookahead_tokens", [0, 2, 9])
def test_the_past_never_changes_beyond_the_declared_lookahead(lookahead_tokens):
    torch.manual_seed(1)
    codec = Codec.from_preset(scales.load("codec", "tiny", lookahead_tokens=lookahead_tokens)).eval()
    vectors, cut = torch.randn(1, 30, codec.decoder.codebook_width), 17
    kept = cut * HOP_SAMPLES - codec.lookahead_samples
    assert_past_never_changes(codec.decoder, vectors, cut, kept)
    with pytest.raises(AssertionError, match="changed"):  # and it does look exactly that far
        assert_past_never_changes(codec.decoder, vectors, cut, kept + HOP_SAMPLES, tolerance=0)
    state = codec.decoder.start(1)
    assert codec.decoder.step(vectors, state).shape[1] == 30 * HOP_SAMPLES - codec.lookahead_samples


@torch.no_grad()
def test_a_stream_keeps_a_constant_state_and_can_be_forked(codec, codes):
    state = codec.start(2)
    sizes = set()
    for code in codes.split(5, dim=1):
        codec.step(code, state)
        states = [state.first, *state.token_blocks, *state.frame_blocks, state.head]
        sizes.add(sum(tensor.numel() for part in states for tensor in part.values()))
    assert len(sizes) == 1
    other = fork(state)
    codec.step(codes, other)
    torch.testing.assert_close(
        codec.finish(state), codec.decode(codes)[:, -codec.lookahead_samples :], atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_a_batch_with_padding_equals_single_recordings(codec):
    lengths = torch.tensor([7000, 12_345, 24_000])
    waveforms = 0.1 * torch.randn(3, 24_000)  # noise in the padding too: it must not matter
    codes = codec.encode(waveforms, lengths)
    for row, length in enumerate(lengths.tolist()):
        single = codec.encode(waveforms[row : row + 1, :length])
        assert torch.equal(codes[row : row + 1, : single.shape[1]], single)


@torch.no_grad()
def test_losses_do_not_see_padding(codec):
    waveform, length = 0.1 * torch.randn(1, 24_000), torch.tensor([13_000])
    alone, padded = codec(waveform[:, :13_000]), codec(waveform, length)
    for name in alone:
        torch.testing.assert_close(alone[name], padded[name], atol=1e-5, rtol=1e-5, msg=name)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(1)
    codec = Codec.from_preset(scales.load("codec", "tiny")).train()
    losses = codec(torch.stack([vowel(0.6), 0.05 * torch.randn(14_400)]))
    assert {"loss", "mel", "convergence", "commitment", "perplexity"} == set(losses)
    losses["loss"].backward()
    dead = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@torch.no_grad()
def test_a_loud_spectrum_does_not_clip(codec):
    loud = limit(torch.linspace(-50, 50, 1001))
    assert loud.abs().max() < 1
    quiet = torch.linspace(-0.9, 0.9, 101)
    torch.testing.assert_close(limit(quiet), quiet)
    head = InverseSTFTHead(8)
    head.log_magnitude.bias.fill_(100.0)
    samples = head(torch.randn(1, 30, 8))
    assert samples.isfinite().all() and samples.abs().max() < 1


@torch.no_grad()
def test_output_starts_at_a_sane_level(codec, codes):
    level = codec.decode(codes).square().mean().sqrt()
    assert 0.002 < level < 0.2


def test_overlap_add_is_that_of_fold():
    pieces = torch.randn(2, 11, HEAD_WINDOW_SAMPLES)
    whole = torch.zeros(2, 11 * 200 + 600)
    for i in range(11):
        whole[:, i * 200 : i * 200 + 800] += pieces[:, i]
    torch.testing.assert_close(overlap_add(pieces), whole)


def test_head_turns_the_spectra_of_a_waveform_back_into_it():
    """Analysis with the head's own window, then overlap and add, is the identity after the fade-in."""
    window = torch.hann_window(HEAD_WINDOW_SAMPLES)
    waveform = vowel(0.5)[None]
    pieces = waveform.unfold(-1, HEAD_WINDOW_SAMPLES, 200) * window.square() / 1.5
    torch.testing.assert_close(
        overlap_add(pieces)[:, 600:-600], waveform[:, 600 : 600 + pieces.shape[1] * 200 - 600]
    )


def test_log_mels_say_zero_for_a_full_scale_tone_and_the_floor_for_silence():
    bank = LogMelBank(1024, 200, 40)
    tone = torch.sin(2 * math.pi * 3000 * torch.arange(24_000) / SPEECH_SAMPLE_RATE_HZ)
    mels = bank(torch.stack([tone, torch.zeros(24_000)]))
    assert mels.shape == (2, 120, 40)
    assert abs(mels[0, 60].max()) < 0.7
    torch.testing.assert_close(mels[1], torch.full((120, 40), math.log(LOG_FLOOR)))


def test_special_ids_never_reach_the_decoder(codec):
    state = codec.start()
    for call in (codec.decode, lambda x: codec.step(x, state)):
        with pytest.raises(InputError, match="is no code of this codec"):
            call(torch.tensor([[1, codec.codebook.size]]))


@pytest.mark.parametrize("waveform", [torch.zeros(24_000), torch.zeros(1, 0), torch.zeros(1, 1, 600)])
def test_wrong_shapes_are_refused_with_a_sentence(codec, waveform):
    with pytest.raises(InputError, match=r"expected \(batch, samples\)"):
        codec.encode(waveform)


def test_it_learns_one_batch():
    torch.manual_seed(1)
    codec = Codec.from_preset(scales.load("codec", "tiny")).train()
    batch = torch.stack([vowel(1.0), vowel(1.0, pitch_hz=200.0)])
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        losses = codec(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 5.0)
        optimizer.step()
        history.append(losses["mel"].item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5]), (
        f"log-mel distance went from {history[0]:.2f} to {history[-1]:.2f}"
    )
    rebuilt = codec.eval().decode(codec.encode(batch))
    loudness = [x.unfold(-1, 1200, 1200).square().mean(-1).sqrt().flatten() for x in (batch, rebuilt)]
    assert torch.corrcoef(torch.stack(loudness))[0, 1] > 0.8
    assert rebuilt.abs().max() < 1
