"""Vector quantiser: the nearest of a fixed number of learned directions, and how those directions are learned.

Paper: "Codec Decoder" (a single codebook of 1,024 codes). The released model trains its codebook by plain gradient;
here code vectors are moving averages of the latents that chose them, and codes that nobody chooses are revived, so
that all of them are in use after minutes (numbered in DIFFERENCES.md). Drawn in notebook 01.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import InputError

REVIVAL_SHARE = 0.3  # of the uniform use: below it a code counts as dead
SEED_NOISE = 0.01  # keeps two codes apart that are seeded from the same latent


def unit(vectors: Tensor) -> Tensor:
    """Vectors of any shape (..., width) scaled to length 1, in fp32 whatever precision comes in."""
    return nn.functional.normalize(vectors.float(), dim=-1)


def perplexity(codes: Tensor, size: int) -> Tensor:
    """exp(entropy) of the codes in use, a scalar from 1 (one code only) to `size` (all equally often)."""
    shares = torch.bincount(codes.flatten(), minlength=size).float()
    shares = shares / shares.sum().clamp_min(1)
    return torch.special.entr(shares).sum().exp()


class Codebook(nn.Module):
    """`size` unit vectors of `width` numbers; a latent is replaced by the one with the largest cosine.

    decay            moving average per training step: uses and sums keep this share of their old value
    revival_share    a code used less than this share of 1 / size is seeded again from the latents at hand

    Nothing here has a gradient: the buffers move in training mode only, summed over all ranks, and stay fp32.
    """

    vectors: Tensor
    sums: Tensor
    uses: Tensor
    seeded: Tensor

    def __init__(
        self, size: int, width: int, decay: float = 0.97, revival_share: float = REVIVAL_SHARE
    ) -> None:
        super().__init__()
        self.size, self.decay, self.revival_share = size, decay, revival_share
        vectors = unit(torch.randn(size, width))
        self.register_buffer("vectors", vectors)
        self.register_buffer("sums", vectors / size)  # moving average of the latents of each code
        self.register_buffer(
            "uses", torch.full((size,), 1 / size)
        )  # moving average of its share of all latents
        self.register_buffer("seeded", torch.tensor(False))

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise latents (batch, tokens, width); `mask` (batch, tokens) is True on real tokens.

        Returns the vectors (batch, tokens, width) whose gradient passes straight to the latents' directions, the
        codes (batch, tokens), and the commitment loss: mean squared distance of a latent from its code, a scalar.
        """
        with torch.autocast(latents.device.type, enabled=False):
            directions = unit(latents)
            real = (
                torch.ones(latents.shape[:-1], dtype=torch.bool, device=latents.device)
                if mask is None
                else mask
            )
            if self.training:
                self.seed_once(directions[real])
            codes = self.codes_of(directions)
            vectors = self.vectors_of(codes)
            if self.training:
                self.update(directions[real], codes[real])
            distances = (directions - vectors).square().sum(dim=-1)
            commitment = (distances * real).sum() / real.sum().clamp_min(1)
            return directions + (vectors - directions).detach(), codes, commitment

    def codes_of(self, latents: Tensor) -> Tensor:
        """(..., width) -> codes (...): the code with the largest cosine; a draw goes to the lower number."""
        return (unit(latents) @ self.vectors.T).argmax(dim=-1)

    def vectors_of(self, codes: Tensor) -> Tensor:
        """codes (...) -> unit vectors (..., width). Raises InputError for anything that is not a code."""
        self.check(codes)
        return nn.functional.embedding(codes, self.vectors)

    def check(self, codes: Tensor) -> None:
        """Special ids of the speech decoder (end of speech, padding) have no vector and must not come here."""
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise InputError(
                f"codes came as {codes.dtype}, expected whole numbers: encode a waveform to get codes."
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.size:
            wrong = codes[(codes < 0) | (codes >= self.size)].flatten()[0]
            raise InputError(
                f"{int(wrong)} is no code of this codec, expected 0 to {self.size - 1}: "
                "remove special ids such as end of speech before decoding."
            )

    def perplexity(self, codes: Tensor) -> Tensor:
        """How many codes the given ones amount to, a scalar from 1 to `size`."""
        return perplexity(codes, self.size)

    @torch.no_grad()
    def seed_once(self, directions: Tensor) -> None:
        """At the first training batch: every code starts as one of its latents (count, width)."""
        if bool(self.seeded) or len(directions) == 0:
            return
        self.vectors.copy_(self.draw(directions))
        self.sums.copy_(self.vectors / self.size)
        self.seeded.fill_(True)

    @torch.no_grad()
    def update(self, directions: Tensor, codes: Tensor) -> None:
        """Move uses, sums and vectors towards what the latents (count, width) with codes (count) show."""
        chosen = nn.functional.one_hot(
            codes, self.size
        ).float()  # a product, unlike index_add, repeats exactly
        counts, sums = total(chosen.sum(dim=0)), total(chosen.T @ directions)
        latents = counts.sum().clamp_min(1)
        self.uses.lerp_(counts / latents, 1 - self.decay)
        self.sums.lerp_(sums / latents, 1 - self.decay)
        self.vectors.copy_(unit(self.sums))
        self.revive(directions)

    @torch.no_grad()
    def revive(self, directions: Tensor) -> None:
        """Seed codes anew whose moving use fell under the stated share, with an even share of use to start from."""
        dead = self.uses < self.revival_share / self.size
        if len(directions) == 0 or not bool(dead.any()):
            return
        self.vectors[dead] = self.draw(directions)[dead]
        self.sums[dead] = self.vectors[dead] / self.size
        self.uses[dead] = 1 / self.size

    def draw(self, directions: Tensor) -> Tensor:
        """`size` of the latents (count, width) in random order (torch's seed), each latent about equally often."""
        rounds = -(-self.size // len(directions))
        order = torch.cat([torch.randperm(len(directions), device=directions.device) for _ in range(rounds)])
        drawn = directions[order[: self.size]]
        drawn = unit(drawn + SEED_NOISE * torch.randn_like(drawn))
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(drawn, src=0)
        return drawn


def total(x: Tensor) -> Tensor:
    """Sum of x over all ranks; x itself where there is one process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x
