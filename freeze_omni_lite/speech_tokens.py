"""A corpus as speech tokens: waveforms go in once, the codec's codes stay, in shards that can be resumed.

Paper: decoder stages 2 and 3 train on codec tokens. An hour of speech is 144,000 tokens, 288 kB. Notebook 05 writes
the shards, notebooks 06 and 07 read them.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .audio import HOP_SAMPLES, SPEECH_TOKENS_PER_SECOND
from .codec import Codec
from .errors import StageMismatch
from .files import atomic_write_bytes


@dataclass
class Spoken:
    """One text and how it sounds. `question` is what the LLM answered with this text; "" for free sentences."""

    text: str
    codes: Tensor  # (speech_tokens,)
    question: str = ""

    @property
    def seconds(self) -> float:
        return len(self.codes) / SPEECH_TOKENS_PER_SECOND


@torch.inference_mode()
def tokenize(codec: Codec, waveforms: list[Tensor], batch: int = 8) -> list[Tensor]:
    """24 kHz waveforms (samples,) -> their codes (speech_tokens,), batched by length; padding leaves no trace."""
    order = sorted(range(len(waveforms)), key=lambda i: len(waveforms[i]))
    codes: dict[int, Tensor] = {}
    device = next(codec.parameters()).device
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        padded = pad_sequence([waveforms[i] for i in rows], batch_first=True)
        lengths = torch.tensor([len(waveforms[i]) for i in rows], device=device)
        found = codec.encode(padded.to(device), lengths).cpu()
        codes |= {i: found[row, : -(-len(waveforms[i]) // HOP_SAMPLES)] for row, i in enumerate(rows)}
    return [codes[i] for i in range(len(waveforms))]


def write_shards(
    folder: Path, codec: Codec, codec_hash: str, texts: list[tuple[str, str]],
    voice: Callable[[list[str]], list[Tensor]], shard_utterances: int,
) -> int:
    """Voice and tokenise (text, question) pairs, shard by shard; finished shards are kept. Returns shards written.

    voice  texts -> 24 kHz waveforms; only one shard of waveforms is held at a time
    """
    written = 0
    for number, first in enumerate(range(0, len(texts), shard_utterances)):
        rows = texts[first : first + shard_utterances]
        path = folder / f"shard-{number:05d}.safetensors"
        about = {"codec": codec_hash, "texts": json.dumps(rows)}
        if is_finished(path, about):
            continue
        codes = tokenize(codec, voice([text for text, _ in rows]))
        lengths = torch.tensor([len(row) for row in codes])
        atomic_write_bytes(path, save({"codes": torch.cat(codes).to(torch.int16), "lengths": lengths}, metadata=about))
        written += 1
        print(f"shard {number}: {len(rows)} utterances, {int(lengths.sum()) / SPEECH_TOKENS_PER_SECOND:.0f} s", flush=True)
    return written


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def is_finished(path: Path, about: dict[str, str]) -> bool:
    """Whether this shard holds these texts, tokenised by this codec."""
    return path.is_file() and metadata(path) == about


def read_shards(folder: Path, codec_hash: str | None = None) -> list[Spoken]:
    """All utterances of a folder. Raises StageMismatch if another codec made them, or if there are none."""
    paths = sorted(folder.glob("shard-*.safetensors"))
    if not paths:
        raise StageMismatch(f"{folder} holds no shards of speech tokens: run notebook 05 first.")
    return [spoken for path in paths for spoken in read_shard(path, codec_hash)]


def read_shard(path: Path, codec_hash: str | None) -> Iterable[Spoken]:
    about = metadata(path)
    if codec_hash is not None and about["codec"] != codec_hash:
        raise StageMismatch(f"{path} was made by another codec than the one at hand: run notebook 05 again.")
    tensors = load_file(path)
    codes = tensors["codes"].long().split(tensors["lengths"].tolist())
    for (text, question), row in zip(json.loads(about["texts"]), codes, strict=True):
        yield Spoken(text, row, question)
