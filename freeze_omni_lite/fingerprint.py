"""Hashes of weights: the proof that what should be frozen stayed bit-identical."""

import hashlib

import torch
from torch import nn

from .errors import FrozenChanged


def fingerprint(module: nn.Module) -> dict[str, str]:
    """SHA-256 of every parameter and persistent buffer, by name."""
    return {name: hash_tensor(tensor) for name, tensor in sorted(module.state_dict().items())}


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest(hashes: dict[str, str]) -> str:
    """One short name for all tensors together."""
    return hashlib.sha256(
        "".join(f"{name}{value}" for name, value in sorted(hashes.items())).encode()
    ).hexdigest()[:16]


def assert_unchanged(before: dict[str, str], after: dict[str, str], what: str) -> None:
    """Raise FrozenChanged that counts the changed tensors and names the first."""
    changed = [name for name in before if after.get(name) != before[name]] + [
        n for n in after if n not in before
    ]
    if changed:
        raise FrozenChanged(
            f"{len(changed)} tensors of {what} changed during training, first: {changed[0]}. Is it in the optimiser?"
        )
