"""Rates, features against two other implementations, and the files that can and cannot be read."""

import numpy as np
import pytest
import soundfile
import torch

from freeze_omni_lite import audio
from freeze_omni_lite.chunk import assert_past_never_changes, assert_streaming_equals_offline
from freeze_omni_lite.errors import InputError


def speech_like(samples: int) -> torch.Tensor:
    """Harmonics with a slow envelope and a little noise, (samples,)."""
    t = torch.arange(samples) / audio.SAMPLE_RATE_HZ
    tone = sum(torch.sin(2 * torch.pi * 140 * k * t) / k for k in range(1, 20))
    return 0.1 * tone * (1 + torch.sin(2 * torch.pi * 3 * t)) + 0.001 * torch.randn(samples)


def test_rates_are_the_papers():
    assert (audio.CHUNK_SAMPLES, audio.MEL_FRAMES_PER_CHUNK, audio.ENCODER_FRAMES_PER_CHUNK) == (2560, 16, 4)
    assert (audio.LLM_VECTORS_PER_SECOND, audio.LLM_VECTORS_PER_CHUNK) == (12.5, 2)
    assert audio.SPEECH_TOKENS_PER_SECOND == 40
    with pytest.raises(ValueError, match="not a multiple"):
        audio.exact(16_000, 600)


def test_log_mel_equals_torchaudio_and_kaldi_native():
    import kaldi_native_fbank
    from torchaudio.compliance.kaldi import fbank

    waveform = speech_like(16_000)
    padded = torch.cat([torch.zeros(audio.CARRY_SAMPLES), waveform]) * audio.INT16_SCALE
    ours = audio.LogMel()(waveform[None])[0]
    assert ours.shape == (100, 80)

    theirs = fbank(padded[None], num_mel_bins=80, dither=0.0, sample_frequency=16_000.0)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither, options.mel_opts.num_bins = 0.0, 80
    kaldi = kaldi_native_fbank.OnlineFbank(options)
    kaldi.accept_waveform(16_000, padded.tolist())
    kaldi.input_finished()
    native = torch.from_numpy(np.stack([kaldi.get_frame(i) for i in range(kaldi.num_frames_ready)]))
    torch.testing.assert_close(ours, native, atol=2e-3, rtol=0)


def test_log_mel_streams_and_is_causal():
    features, waveform = audio.LogMel(), speech_like(2560 * 6)[None]
    assert_streaming_equals_offline(features, waveform, audio.CHUNK_SAMPLES)
    assert_streaming_equals_offline(features, waveform, 160)
    assert_past_never_changes(features, waveform, cut=2560 * 3, kept=48)


def test_log_mel_of_silence_is_finite():
    assert torch.isfinite(audio.LogMel()(torch.zeros(1, 2560))).all()


def test_log_mel_golden(golden):
    t = torch.arange(2560) / audio.SAMPLE_RATE_HZ
    golden("log_mel", 1e-3, mels=audio.LogMel()(0.3 * torch.sin(2 * torch.pi * 1000 * t)[None])[0])


@pytest.mark.parametrize("samples, whole", [(0, 2560), (1, 2560), (2560, 2560), (2561, 5120)])
def test_pad_to_chunks(samples, whole):
    padded = audio.pad_to_chunks(torch.ones(2, samples))
    assert padded.shape == (2, whole) and padded.sum() == 2 * samples


def test_save_and_load_keep_the_waveform(tmp_path):
    waveform = speech_like(8000)
    path = audio.save(tmp_path / "new folder" / "a.wav", waveform, 16_000)
    torch.testing.assert_close(audio.load(path), waveform, atol=1e-4, rtol=0)
    assert [p.name for p in path.parent.iterdir()] == ["a.wav"]


def test_load_converts_other_rates_and_channels(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, np.zeros_like(tone)], axis=1), 8000)
    waveform = audio.load(tmp_path / "a.wav")
    assert waveform.shape == (16_000,) and waveform.dtype == torch.float32
    assert int(torch.fft.rfft(waveform).abs().argmax()) == 440
    assert abs(audio.level_db(waveform) - -9.03) < 0.2  # half a sine of full scale


def bad_files(folder):
    (folder / "text.wav").write_text("not audio")
    (folder / "nothing.wav").touch()
    soundfile.write(folder / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    return {
        "missing.wav": "no audio file",
        "text.wav": "cannot be read",
        "nothing.wav": "cannot be read",
        "empty.wav": "no samples",
        "nan.wav": "NaN",
        ".": "no audio file",
    }


def test_load_says_what_is_wrong(tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(InputError, match=words) as caught:
            audio.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_save_is_all_or_nothing(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        audio.save(tmp_path / "a.unknown", torch.zeros(10), 16_000)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        audio.save(tmp_path / "file" / "a.wav", torch.zeros(10), 16_000)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
