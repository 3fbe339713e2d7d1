"""Speech codec: 24 kHz speech to 40 tokens a second out of one codebook, and back, as a stream.

Paper: "Codec Decoder" (its decoder stage 1 trains this model). Tokens, rate and streaming are the paper's; the inside
is ours, fast enough for two CPU cores (DIFFERENCES.md): log-mel in, inverse-STFT head out, ConvNeXt blocks between.
Trained in notebook 01, put to work in notebook 05.

    waveform --log-mel--> 120 Hz --stride 3--> 40 Hz blocks --> codebook          encoder: whole recordings
    codes --look-ahead--> 40 Hz blocks --x3--> 120 Hz blocks --inverse STFT--> waveform       decoder: a stream

The released decoder is not causal and decodes overlapping windows again and again. This one waits for
`lookahead_tokens` and then computes every sample once: the cost of a token does not depend on what came before.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import lengths_mask
from .audio import HOP_SAMPLES, SPEECH_SAMPLE_RATE_HZ, SPEECH_TOKENS_PER_SECOND, exact
from .chunk import StreamingConv1d
from .codebook import Codebook
from .errors import InputError
from .scales import Preset

FRAMES_PER_TOKEN = 3
FRAME_SAMPLES = exact(HOP_SAMPLES, FRAMES_PER_TOKEN)  # 200: frames at 120 Hz on both sides of the codebook
MEL_WINDOW_SAMPLES = 1024
HEAD_WINDOW_SAMPLES = 4 * FRAME_SAMPLES  # 800: four frames overlap on every sample
TAIL_SAMPLES = HEAD_WINDOW_SAMPLES - FRAME_SAMPLES
OVERLAP_GAIN = 1.5  # what squared Hann windows at a quarter's distance add up to
LOG_FLOOR = 3e-4  # of a full-scale tone, -70 dB: quieter bands than that are neither heard nor asked for
KERNEL = 7  # tokens or frames that a block's convolution spans
EXPANSION = 4  # inner width of a block
LOSS_WINDOWS_SAMPLES = (256, 512, 1024, 2048)
LIMIT = 0.9  # samples beyond it are bent, so that none reaches 1
LOUDEST_LOG_MAGNITUDE = math.log(2 * HEAD_WINDOW_SAMPLES)


class Spectrum(nn.Module):
    """Magnitudes of short windows of 24 kHz speech. (batch, samples) -> (batch, samples // hop_samples, bands).

    Frame i is centred on the i-th hop; bands = window_samples // 2 + 1. A full-scale tone is 1.
    """

    window: Tensor

    def __init__(self, window_samples: int, hop_samples: int) -> None:
        super().__init__()
        self.window_samples, self.hop_samples = window_samples, hop_samples
        window = torch.hann_window(window_samples)
        self.register_buffer("window", window * 2 / window.sum(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        before = (self.window_samples - self.hop_samples) // 2
        padded = functional.pad(waveform.float(), (before, self.window_samples - self.hop_samples - before))
        frames = padded.unfold(-1, self.window_samples, self.hop_samples)
        power = torch.view_as_real(torch.fft.rfft(frames * self.window)).square().sum(dim=-1)
        return power.clamp_min(1e-14).sqrt()  # the root has no slope at zero


class LogMelBank(Spectrum):
    """Log-mel spectrogram of 24 kHz speech. (batch, samples) -> (batch, samples // hop_samples, mels).

    Magnitudes, not powers; a full-scale tone is 0, silence log(3e-4).
    """

    mel_weights: Tensor

    def __init__(self, window_samples: int, hop_samples: int, mel_bins: int) -> None:
        super().__init__(window_samples, hop_samples)
        from torchaudio.functional import melscale_fbanks

        bands = window_samples // 2 + 1
        weights = melscale_fbanks(bands, 0.0, SPEECH_SAMPLE_RATE_HZ / 2, mel_bins, SPEECH_SAMPLE_RATE_HZ)
        self.register_buffer("mel_weights", weights, persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        return (super().forward(waveform) @ self.mel_weights).clamp_min(LOG_FLOOR).log()


class ConvNeXtBlock(nn.Module):
    """x + scale * MLP(norm(depthwise convolution of x)) over (batch, time, width); a stream if causal."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        if causal:
            self.depthwise = StreamingConv1d(width, width, KERNEL, groups=width)
        else:
            self.depthwise = nn.Conv1d(width, width, KERNEL, groups=width, padding=KERNEL // 2)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, EXPANSION * width), nn.GELU(), nn.Linear(EXPANSION * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, self.depthwise(x.transpose(1, 2)))

    def start(self, batch: int = 1) -> dict[str, Tensor]:
        return self.depthwise.start(batch)

    def step(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        return self.mix(x, self.depthwise.step(x.transpose(1, 2), state))

    def mix(self, x: Tensor, convolved: Tensor) -> Tensor:
        return x + self.scale * self.mlp(self.norm(convolved.transpose(1, 2)))


class CodecEncoder(nn.Module):
    """Waveform (batch, samples) -> latents (batch, tokens, codebook_width). It sees a whole recording at once."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.mels = LogMelBank(MEL_WINDOW_SAMPLES, FRAME_SAMPLES, preset.mel_bins)
        self.stem = nn.Conv1d(
            preset.mel_bins, preset.width, 3 * FRAMES_PER_TOKEN, FRAMES_PER_TOKEN, FRAMES_PER_TOKEN
        )
        self.norm = nn.LayerNorm(preset.width)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(preset.width, causal=False) for _ in range(preset.encoder_blocks)
        )
        self.out_norm = nn.LayerNorm(preset.width)
        self.out = nn.Linear(preset.width, preset.codebook_width, bias=False)
        # Each latent dimension varies about zero: otherwise all latents soon point the same way and share few codes.
        self.spread = nn.BatchNorm1d(preset.codebook_width, affine=False)

    def forward(self, waveform: Tensor, token_mask: Tensor) -> Tensor:
        """`token_mask` (batch, tokens): padding is zero before every convolution, as it is beyond a lone recording."""
        mask = token_mask[..., None]
        frame_mask = mask.repeat_interleave(FRAMES_PER_TOKEN, dim=1)
        mels = (self.mels(waveform) + 6.0) / 1.6  # about zero mean and unit variance for speech
        x = self.norm(self.stem((mels * frame_mask).transpose(1, 2)).transpose(1, 2)) * mask
        for block in self.blocks:
            x = block(x) * mask
        latents = self.out(self.out_norm(x)).float()
        return latents.masked_scatter(mask, self.spread(latents[token_mask]))


class InverseSTFTHead(nn.Module):
    """Frames (batch, frames, width) -> samples (batch, frames * 200): a spectrum per frame, overlapped and added.

    Frame i reaches samples 200 i to 200 i + 800, so a sample is done as soon as its own frame is: causal. The first
    three frames of a stream fade in, as nothing overlaps with them from before.
    """

    window: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        bands = HEAD_WINDOW_SAMPLES // 2 + 1
        self.norm = nn.LayerNorm(width)
        self.log_magnitude = nn.Linear(width, bands)
        self.phase = nn.Linear(width, bands)
        with torch.no_grad():  # begin at the level and tilt of quiet speech: about -35 dB of full scale
            self.log_magnitude.weight.mul_(0.3)
            self.log_magnitude.bias.copy_(torch.linspace(1.0, -3.0, bands))
        self.register_buffer("window", torch.hann_window(HEAD_WINDOW_SAMPLES), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.start(x.shape[0]))

    def start(self, batch: int = 1) -> dict[str, Tensor]:
        return {"tail": self.window.new_zeros(batch, TAIL_SAMPLES)}

    def step(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        pieces = self.windows(x)
        joined = overlap_add(pieces)
        joined = torch.cat([joined[:, :TAIL_SAMPLES] + state["tail"], joined[:, TAIL_SAMPLES:]], dim=1)
        state["tail"] = joined[:, -TAIL_SAMPLES:]
        return limit(joined[:, :-TAIL_SAMPLES])

    def windows(self, x: Tensor) -> Tensor:
        """(batch, frames, width) -> windowed waveforms (batch, frames, 800), in fp32."""
        x = self.norm(x)
        log_magnitude, phase = self.log_magnitude(x).float(), self.phase(x).float()
        magnitude = log_magnitude.clamp_max(LOUDEST_LOG_MAGNITUDE).exp()
        return (
            torch.fft.irfft(torch.polar(magnitude, phase), n=HEAD_WINDOW_SAMPLES) * self.window / OVERLAP_GAIN
        )


def overlap_add(pieces: Tensor) -> Tensor:
    """(batch, frames, 800), each 200 samples after the one before -> (batch, frames * 200 + 600)."""
    batch, frames, _ = pieces.shape
    overlaps = HEAD_WINDOW_SAMPLES // FRAME_SAMPLES
    quarters = pieces.reshape(batch, frames, overlaps, FRAME_SAMPLES)
    shifted = [functional.pad(quarters[:, :, i], (0, 0, i, overlaps - 1 - i)) for i in range(overlaps)]
    return torch.stack(shifted).sum(dim=0).flatten(1)


def limit(waveform: Tensor) -> Tensor:
    """Leave samples up to 0.9 as they are and bend louder ones smoothly, so that the result stays inside (-1, 1)."""
    room = 1 - LIMIT
    over = (waveform.abs() - LIMIT).clamp_min(0)
    return waveform.clamp(-LIMIT, LIMIT) + waveform.sign() * room * torch.tanh(over / room) * (1 - 1e-6)


@dataclass
class DecodeState:
    """What a decoding stream remembers: carries of the convolutions, the overlap, and how much is still held back."""

    held: int  # outputs of the first convolution still to be dropped: the look-ahead
    first: dict[str, Tensor]
    token_blocks: list[dict[str, Tensor]] = field(default_factory=list)
    frame_blocks: list[dict[str, Tensor]] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)


class CodecDecoder(nn.Module):
    """Code vectors (batch, tokens, codebook_width) -> waveform (batch, tokens * 600), causal but for the look-ahead."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        width = preset.width
        self.lookahead_tokens, self.codebook_width = preset.lookahead_tokens, preset.codebook_width
        self.first = StreamingConv1d(preset.codebook_width, width, max(KERNEL, self.lookahead_tokens + 1))
        self.norm = nn.LayerNorm(width)
        self.token_blocks = nn.ModuleList(
            ConvNeXtBlock(width, causal=True) for _ in range(preset.token_blocks)
        )
        self.up = nn.Linear(width, FRAMES_PER_TOKEN * width)
        self.frame_blocks = nn.ModuleList(
            ConvNeXtBlock(width, causal=True) for _ in range(preset.frame_blocks)
        )
        self.head = InverseSTFTHead(width)

    def forward(self, vectors: Tensor) -> Tensor:
        state = self.start(vectors.shape[0])
        return self.step(functional.pad(vectors, (0, 0, 0, self.lookahead_tokens)), state)

    def start(self, batch: int = 1) -> DecodeState:
        return DecodeState(
            self.lookahead_tokens,
            self.first.start(batch),
            [block.start(batch) for block in self.token_blocks],
            [block.start(batch) for block in self.frame_blocks],
            self.head.start(batch),
        )

    def step(self, vectors: Tensor, state: DecodeState) -> Tensor:
        """(batch, tokens, codebook_width) -> the samples that are now certain (batch, ready * 600)."""
        if vectors.shape[1] == 0:
            return vectors.new_zeros(vectors.shape[0], 0)
        x = self.first.step(vectors.transpose(1, 2), state.first).transpose(1, 2)
        dropped = min(state.held, x.shape[1])
        state.held -= dropped
        if dropped == x.shape[1]:
            return vectors.new_zeros(vectors.shape[0], 0)
        x = self.norm(x[:, dropped:])
        for block, carry in zip(self.token_blocks, state.token_blocks, strict=True):
            x = block.step(x, carry)
        x = self.up(x).unflatten(-1, (FRAMES_PER_TOKEN, -1)).flatten(1, 2)
        for block, carry in zip(self.frame_blocks, state.frame_blocks, strict=True):
            x = block.step(x, carry)
        return self.head.step(x, state.head)

    def finish(self, state: DecodeState) -> Tensor:
        """The samples that the look-ahead held back; zeros stand for the tokens that never come."""
        batch = state.first["carry"].shape[0]
        return self.step(self.head.window.new_zeros(batch, self.lookahead_tokens, self.codebook_width), state)


class Codec(nn.Module):
    """Encoder, codebook and decoder. `encode` and `decode` use them, `start`, `step` and `finish` decode a stream,
    `forward` gives the losses of a training batch."""

    sample_rate_hz = SPEECH_SAMPLE_RATE_HZ
    hop_samples = HOP_SAMPLES

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.commitment_weight = preset.commitment_weight
        self.encoder = CodecEncoder(preset)
        self.codebook = Codebook(preset.codebook_size, preset.codebook_width, preset.codebook_decay)
        self.decoder = CodecDecoder(preset)
        self.loss_mels = nn.ModuleList(
            LogMelBank(window, window // 4, min(preset.mel_bins, window // 16))
            for window in LOSS_WINDOWS_SAMPLES
        )

    @classmethod
    def from_preset(cls, preset: Preset) -> "Codec":
        """A fresh codec of a `codec` preset."""
        return cls(preset)

    @property
    def bits_per_second(self) -> float:
        """What the tokens cost: 400 bit/s with 1,024 codes."""
        return SPEECH_TOKENS_PER_SECOND * math.log2(self.codebook.size)

    @property
    def lookahead_samples(self) -> int:
        """Samples that a decoding stream holds back until later tokens (or `finish`) come."""
        return self.decoder.lookahead_tokens * HOP_SAMPLES

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """24 kHz waveform (batch, samples) -> codes (batch, tokens), one for every 600 samples begun.

        `lengths` (batch) in samples: codes beyond a recording's own tokens mean nothing. Raises InputError.
        """
        waveform, _, token_mask = self.padded(waveform, lengths)
        return self.codebook.codes_of(self.encoder(waveform, token_mask))

    def decode(self, codes: Tensor) -> Tensor:
        """codes (batch, tokens) -> waveform (batch, tokens * 600). Raises InputError for ids that are no codes."""
        return self.decoder(self.codebook.vectors_of(codes))

    def start(self, batch: int = 1) -> DecodeState:
        return self.decoder.start(batch)

    def step(self, codes: Tensor, state: DecodeState) -> Tensor:
        """Next codes (batch, tokens), any number of them -> samples (batch, ready * 600). Raises InputError."""
        return self.decoder.step(self.codebook.vectors_of(codes), state)

    def finish(self, state: DecodeState) -> Tensor:
        return self.decoder.finish(state)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of 24 kHz excerpts (batch, samples) with `lengths` (batch) in samples.

        Returns scalars: loss = mel + convergence + commitment_weight * commitment, these three, and perplexity.
        """
        return self.losses(self.reconstruct(waveforms, lengths))

    def losses(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of `forward` for what `reconstruct` returned."""
        mel, convergence = self.spectral_losses(outputs["rebuilt"], outputs["original"], outputs["lengths"])
        commitment = outputs["commitment"]
        loss = mel + convergence + self.commitment_weight * commitment
        reports = dict(
            mel=mel, convergence=convergence, commitment=commitment, perplexity=outputs["perplexity"]
        )
        return {"loss": loss} | {name: value.detach() for name, value in reports.items()}

    def reconstruct(self, waveforms: Tensor, lengths: Tensor | None = None) -> dict[str, Any]:
        """Through the codebook and back: rebuilt and original (batch, samples), both zero beyond `lengths`.

        The first token's 600 samples are left out of both: they fade in and have no past to build on.
        """
        waveforms, lengths, token_mask = self.padded(waveforms, lengths)
        vectors, codes, commitment = self.codebook(self.encoder(waveforms, token_mask), token_mask)
        rebuilt = self.decoder(vectors * token_mask[..., None])
        rebuilt = rebuilt * lengths_mask(lengths, rebuilt.shape[1])
        perplexity = self.codebook.perplexity(codes[token_mask])
        if waveforms.shape[1] > HOP_SAMPLES:
            rebuilt, waveforms = rebuilt[:, HOP_SAMPLES:], waveforms[:, HOP_SAMPLES:]
            lengths = (lengths - HOP_SAMPLES).clamp_min(0)
        return dict(
            rebuilt=rebuilt, original=waveforms, lengths=lengths, commitment=commitment, perplexity=perplexity
        )

    def spectral_losses(self, rebuilt: Tensor, original: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Over several window sizes: mean |log-mel difference|, and the mel difference relative to the original.

        The first hears quiet parts as well as loud ones, the second asks for the loud ones to be right.
        """
        mels, convergences = [], []
        for bank in self.loss_mels:
            made, wanted = bank(rebuilt), bank(original)
            real = lengths_mask(lengths // bank.hop_samples, wanted.shape[1])[..., None]
            made, wanted = made * real, wanted * real
            mels.append((made - wanted).abs().sum() / (real.sum() * wanted.shape[-1]).clamp_min(1))
            amplitude = wanted.exp() * real
            convergences.append(
                (made.exp() * real - amplitude).norm() / amplitude.norm().clamp_min(LOG_FLOOR)
            )
        return torch.stack(mels).mean(), torch.stack(convergences).mean()

    def padded(self, waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Whole tokens: waveform (batch, tokens * 600), zero beyond `lengths` (batch), and mask (batch, tokens)."""
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise InputError(
                f"speech came with shape {tuple(waveform.shape)}, expected (batch, samples) with at least one sample "
                f"at {SPEECH_SAMPLE_RATE_HZ} Hz: load it with audio.load and add the batch dimension."
            )
        batch, samples = waveform.shape
        if lengths is None:
            lengths = torch.full((batch,), samples, device=waveform.device)
        tokens = -(-samples // HOP_SAMPLES)
        waveform = waveform * lengths_mask(lengths, samples)
        waveform = functional.pad(waveform, (0, tokens * HOP_SAMPLES - samples))
        return waveform, lengths, lengths_mask(-(-lengths // HOP_SAMPLES), tokens)
