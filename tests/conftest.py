"""Shared fixtures: a fixed seed for every test, and golden snapshots.

Update the snapshots with `pytest --update-golden`, and say in the commit why they changed.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(
    1
)  # tiny tensors: a second thread costs more than it brings; child processes choose anew


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.npz anew")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """golden("name", tolerance, key=tensor, ...) compares with tests/golden/name.npz and names the key."""

    def compare(name: str, tolerance: float, **tensors: Tensor) -> None:
        path = GOLDEN / f"{name}.npz"
        arrays = {key: tensor.detach().numpy().astype(np.float32) for key, tensor in tensors.items()}
        if request.config.getoption("--update-golden"):
            np.savez_compressed(path, **arrays)
        stored = np.load(path)
        for key, array in arrays.items():
            label = f"golden {name}: {key}"
            np.testing.assert_allclose(array, stored[key], atol=tolerance, rtol=0, err_msg=label)

    return compare


@pytest.fixture
def fill() -> Callable[[nn.Module], nn.Module]:
    """Weights by formula, so that a snapshot depends neither on the seed nor on torch's initialisation."""

    def filled(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for place, (_, weight) in enumerate(sorted(module.named_parameters())):
                wave = torch.sin(torch.arange(weight.numel(), dtype=torch.float64) * (1.7 + 0.1 * place))
                scale = 1.5 / max(1, weight[0].numel() if weight.dim() > 1 else 4) ** 0.5
                weight.copy_((wave * scale + (weight.dim() == 1)).reshape(weight.shape))
        return module.eval()

    return filled
