"""Originals with noise added: the published steps, and what they leave as it is."""

import torch
from torch import Tensor, nn

from rpg.evaluation.similarity import add_noise


def network() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Linear(64, 100))
    model.state_dict()["1.running_var"].uniform_(0.01, 4)
    return {**model.state_dict(), "temperature": torch.tensor(1.5), "one": torch.tensor([2.0]),
            "empty": torch.zeros(0), "mask": torch.tensor([True, False])}  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def published(name: str, value: Tensor, noise: Tensor, level: float) -> Tensor:
    """The published steps, one by one, in float64."""
    value, noise = value.double(), noise.double()
    pre_mean = value.mean() * 0.95
    if "running_var" in name:
        value = torch.log(value / pre_mean + 0.05)
    mean, std = value.mean(), value.std()
    value = (value - mean) / std + noise * level
    value = value * std + mean
    return torch.clip(torch.exp(value) - 0.05, min=0.001) * pre_mean if "running_var" in name else value


def test_noise_is_added_by_the_published_steps() -> None:
    state = network()
    state["1.weight"].uniform_(0.5, 1.5)
    state["1.bias"].normal_()
    result = add_noise(state, 0.05, seeded(3))
    source = seeded(3)
    for name, value in state.items():
        if value.is_floating_point() and value.numel() > 1:
            if name == "1.running_mean":
                torch.randn(value.shape, generator=source)
                continue
            expected = published(name, value, torch.randn(value.shape, generator=source), 0.05)
            torch.testing.assert_close(result[name].double(), expected, rtol=1e-4, atol=1e-6)


def test_noise_has_the_level_asked_for() -> None:
    state = {"w": torch.randn(200_000, generator=seeded(1)) * 3 + 7}
    change = add_noise(state, 0.02, seeded(2))["w"] - state["w"]
    assert abs(float(change.std()) / (0.02 * float(state["w"].std())) - 1) < 0.01
    assert abs(float(change.mean())) < 0.001


def test_integers_scalars_and_constant_tensors_keep_their_values() -> None:
    state = network()
    result = add_noise(state, 0.05, seeded(0))
    for name in (
        "temperature",
        "one",
        "empty",
        "mask",
        "1.num_batches_tracked",
        "1.running_mean",
        "1.weight",
    ):
        assert torch.equal(result[name], state[name]), name
    assert not torch.equal(result["0.weight"], state["0.weight"])


def test_running_var_stays_positive() -> None:
    state = {"bn.running_var": torch.tensor([1e-8, 1e-4, 1.0, 50.0])}
    result = add_noise(state, 3.0, seeded(0))["bn.running_var"]
    assert (result >= 0.00099 * 0.95 * state["bn.running_var"].mean()).all()
    zero = {"bn.running_var": torch.zeros(4)}
    assert torch.equal(add_noise(zero, 0.05, seeded(0))["bn.running_var"], torch.zeros(4))


def test_names_shapes_dtypes_and_ties_are_kept_and_the_input_is_not_changed() -> None:
    shared = torch.randn(6, 4)
    state = {
        "a": shared,
        "b": torch.randn(5).bfloat16(),
        "c": shared,
        "d": shared[0],
        "e": torch.randn(3).half(),
    }
    before = {name: value.clone() for name, value in state.items()}
    result = add_noise(state, 0.05, seeded(0))
    assert list(result) == list(state)
    for name, value in state.items():
        assert torch.equal(value, before[name])
        assert (result[name].shape, result[name].dtype) == (value.shape, value.dtype)
    assert torch.equal(result["a"], result["c"])


def test_equal_seeds_give_equal_copies() -> None:
    state = network()
    first, second, other = (add_noise(state, 0.01, seeded(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in state)
    assert not torch.equal(first["0.weight"], other["0.weight"])
