"""Muon for all matrices of a shape at once, against torch's, which takes one after the other."""

import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bytelatent.model import build_model
from bytelatent.model.settings import preset
from bytelatent.training.muon import Muon, orthogonalized
from bytelatent.training.optimizer import Optimizers, build_optimizer
from bytelatent.training.settings import OptimizerSettings

SHAPES = [(6, 6), (6, 6), (4, 9), (9, 4), (9, 4), (5, 8), (1, 3)]


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def grouped(parameters: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": parameters[::2], "lr": 0.1, "weight_decay": 0.0},
        {"params": parameters[1::2], "lr": 0.03, "weight_decay": 0.4},
    ]


def one_step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    parameters[2].grad = None if seed == 1 else parameters[2].grad
    optimizer.step()


def test_steps_are_torchs() -> None:
    """But for the rounding of products in bfloat16; and the state of either is that of the other."""
    ours, theirs = matrices(), matrices()
    muon, torchs = Muon(grouped(ours)), torch.optim.Muon(grouped(theirs), adjust_lr_fn="match_rms_adamw")
    for seed in range(6):
        if seed == 3:
            file = io.BytesIO()
            torch.save(torchs.state_dict(), file)
            muon = Muon(grouped(ours))
            muon.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        before = [parameter.detach().clone() for parameter in ours]
        with torch.no_grad():
            for mine, other in zip(ours, theirs, strict=True):
                other.copy_(mine)
        one_step(ours, muon, seed)
        one_step(theirs, torchs, seed)
        for number, (mine, other, was) in enumerate(zip(ours, theirs, before, strict=True)):
            change = (other - was).norm()
            assert (mine - other).norm() <= 0.02 * change, number
            assert change > 0 or (number, seed) == (2, 1)
            if change > 0:
                torch.testing.assert_close(muon.state[mine]["momentum_buffer"], torchs.state[other]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(7, 7), (5, 12)])
def test_matrices_are_orthogonalized_as_alone(shape: tuple[int, int]) -> None:
    """In float64, against the singular values: each step is a polynomial of them."""
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    (a, b, c), steps = Muon(matrices()).defaults["ns_coefficients"], 5
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonalized(x, (a, b, c), steps, 1e-7), u @ values.diag_embed() @ v)
    assert not orthogonalized(torch.zeros(2, *shape), (a, b, c), steps, 1e-7).any()


class Launches(TorchDispatchMode):
    """Counts operations that compute or copy. Those on lists take a kernel for each some hundred tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.count += 1 + len(args[0]) // 100 if "_foreach" in str(func) else 1
        return func(*args, **(kwargs or {}))


def test_a_step_takes_few_kernels() -> None:
    with torch.device("meta"):
        model = build_model(preset("blt-100m"))
    optimizer = build_optimizer(model, OptimizerSettings(name="muon"))
    assert isinstance(optimizer, Optimizers)
    muon = optimizer.optimizers["muon"]
    for group in muon.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    assert sum(len(group["params"]) for group in muon.param_groups) > 130
    muon.step()  # makes the state
    with Launches() as launches:
        muon.step()
    assert launches.count < 150
