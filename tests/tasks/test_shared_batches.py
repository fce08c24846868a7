"""Training side by side on shared batches, against training each network by itself with plain PyTorch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.tasks import shared_batches
from rpg.tasks.cifar10_net import (
    Cifar10Net,
    convolved,
    evaluation_logits,
    first_patches,
    is_trained,
    normalised,
    stacked,
    training_logits,
)
from rpg.tasks.fine_tuning import binary_loss, ten_class_loss
from rpg.tasks.images.image_set import Images
from rpg.tasks.shared_batches import (
    Answers,
    _compiled_total_loss,
    _total_loss,
    augmented,
    batches,
    train_on_shared_batches,
)

CPU = torch.device("cpu")
SEED, EPOCHS, BATCH, RATE = 7, 2, 8, 1e-2


def networks(count: int, outputs: int = 1) -> list[Cifar10Net]:
    torch.manual_seed(0)
    made = [Cifar10Net(outputs).double() for _ in range(count)]
    for network in made:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                # With BatchNorm's initial ones and zeros, mistakes would not show.
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
                assert module.running_mean is not None and module.running_var is not None
                nn.init.normal_(module.running_mean, 0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return made


def some_images(count: int = 20) -> Images:
    torch.manual_seed(1)
    return Images(torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (count,)))


def train_by_itself(network: nn.Module, images: Images, answers: Tensor, outputs: int) -> None:
    """PyTorch's own modules and Adam, on the same batches, with the same schedule."""
    network.train()
    optimiser = torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.9, 0.99))
    steps = EPOCHS * (len(images.classes) // BATCH)
    for step, (pixels, classes) in enumerate(batches(images, SEED, EPOCHS, BATCH), start=1):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        logits = network(normalised(pixels).double())
        if outputs == 1:
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], answers[classes].double())
        else:
            loss = F.cross_entropy(logits, answers[classes])
        torch.autograd.backward(loss)
        optimiser.step()


def told(answers: Tensor) -> Answers:
    """The answers [M, 10] by class."""
    return lambda patches, classes: answers[:, classes]


@pytest.mark.parametrize("outputs", [1, 10])
def test_equals_training_each_model_by_itself(outputs: int) -> None:
    made, images = networks(3, outputs), some_images()
    answers = torch.randint(2, (3, 10)).bool() if outputs == 1 else torch.stack([torch.randperm(10)] * 3)
    trained = train_on_shared_batches(
        stacked([network.state_dict() for network in made], CPU), images, told(answers),
        binary_loss if outputs == 1 else ten_class_loss, SEED, EPOCHS, BATCH, RATE, torch.float64,
    )  # fmt: skip
    for i, network in enumerate(made):
        before = network.head.weight.detach().clone()
        train_by_itself(network, images, answers[i], outputs)
        assert (network.head.weight - before).abs().max() > 1e-3
        for name, value in network.state_dict().items():
            torch.testing.assert_close(trained[name][i], value, rtol=1e-6, atol=1e-8)


def test_a_first_layer_that_is_kept_is_that_of_a_frozen_network() -> None:
    """Its convolution and its BatchNorm, which takes the statistics that it had."""
    (made,), images = networks(1, 1), some_images()
    answers = torch.randint(2, (1, 10)).bool()
    first = {name: value.clone() for name, value in made.state_dict().items()}
    trained = train_on_shared_batches(
        stacked([first], CPU), images, told(answers), binary_loss, SEED, EPOCHS, BATCH, RATE, torch.float64,
        first_layer=first,
    )  # fmt: skip
    made.conv1.requires_grad_(False)
    made.norm1.requires_grad_(False)
    made.norm1.train = lambda mode=True: made.norm1  # type: ignore[method-assign]
    made.norm1.training = False
    train_by_itself(made, images, answers[0], 1)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(trained[name][0], value, rtol=1e-6, atol=1e-8)
        if name.startswith(("conv1.", "norm1.")):
            assert torch.equal(trained[name][0], first[name])


def test_a_model_does_not_depend_on_its_neighbours() -> None:
    start, images = stacked([network.state_dict() for network in networks(2)], CPU), some_images()
    answers = torch.tensor([[1, 0] * 5, [0, 0, 1, 1, 1] * 2]).bool()

    def trained(rows: slice, seed: int = SEED) -> dict[str, Tensor]:
        some = {name: value[rows] for name, value in start.items()}
        return train_on_shared_batches(
            some, images, told(answers[rows]), binary_loss, seed, EPOCHS, BATCH, RATE, torch.float64
        )

    together, one = trained(slice(0, 2)), trained(slice(1, 2))
    for name, value in one.items():
        torch.testing.assert_close(value[0], together[name][1])
    assert not torch.allclose(trained(slice(1, 2), seed=8)["conv1.weight"], one["conv1.weight"])


def test_models_that_only_fill_up_a_compiled_step_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    start, images = stacked([network.state_dict() for network in networks(3)], CPU), some_images()
    settings = (binary_loss, SEED, EPOCHS, BATCH, RATE, torch.float64)
    answers = told(torch.randint(2, (3, 10)).bool())
    expected = train_on_shared_batches(start, images, answers, *settings)
    sizes = []

    def total_loss(weights: dict[str, Tensor], inputs: Tensor, right: Tensor, *rest: Any) -> Any:
        sizes.append((len(weights["head.bias"]), len(right)))
        return shared_batches._total_loss(weights, inputs, right, *rest)

    monkeypatch.setattr(shared_batches, "_is_compiled", lambda models, device: True)
    monkeypatch.setattr(shared_batches, "_compiled_total_loss", lambda: total_loss)
    found = train_on_shared_batches(start, images, answers, *settings)
    assert set(sizes) == {(8, 8)}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_evaluation_is_that_of_the_plain_network() -> None:
    made, images = networks(3, 10), normalised(some_images(6).pixels).double()
    logits = evaluation_logits(stacked([each.state_dict() for each in made], CPU), first_patches(images))
    for i, network in enumerate(made):
        with torch.no_grad():
            torch.testing.assert_close(logits[i], network.eval()(images))


def test_bfloat16_is_near_to_float32() -> None:
    start = stacked([network.float().state_dict() for network in networks(2)], CPU)
    patches = first_patches(normalised(some_images(16).pixels))
    exact, _ = training_logits(start, patches, torch.float32)
    rough, statistics = training_logits(start, patches, torch.bfloat16)
    assert rough.dtype == torch.float32
    assert all(value.dtype == torch.float32 for pair in statistics.values() for value in pair)
    assert (rough - exact).norm() < 0.03 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_training_on_a_gpu_gives_the_same_networks() -> None:
    device = torch.device("cuda")
    start = stacked([network.float().state_dict() for network in networks(3)], device)
    weights = {name: value.requires_grad_() for name, value in start.items() if is_trained(name)}
    patches = first_patches(normalised(some_images(16).pixels.to(device)))
    right = torch.randint(2, (3, 16), device=device).bool()
    results = []
    for total_loss in (_total_loss, _compiled_total_loss()):
        total, statistics = total_loss(weights, patches, right, binary_loss, torch.float32)
        results.append((torch.autograd.grad(total, list(weights.values())), statistics))
    for expected, found in zip(*(gradients for gradients, _ in results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    for layer, expected_pair in results[0][1].items():
        torch.testing.assert_close(results[1][1][layer], expected_pair)


def test_convolutions_and_their_gradients_are_pytorchs_own() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    result = convolved(images, weight)
    plain = torch.stack([F.conv2d(images[i].movedim(-1, 1), weight[i], padding=1) for i in range(2)])
    torch.testing.assert_close(result, plain.movedim(2, -1))
    assert torch.autograd.gradcheck(convolved, (images, weight))


def test_augmentation_moves_and_mirrors_each_image() -> None:
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    pixels = torch.stack([rows, columns, rows + columns], dim=-1).to(torch.uint8).expand(200, -1, -1, -1)
    result = augmented(pixels, torch.Generator().manual_seed(0)).int()
    moves = set()
    for image in result:
        # Every pixel tells where it comes from; the middle is never cut off.
        step = int(image[16, 17, 1] - image[16, 16, 1])
        assert step in (1, -1)
        down, right = int(image[16, 16, 0]) - 16, int(image[16, 16 if step == 1 else 15, 1]) - 16
        across = (torch.arange(32) if step == 1 else 31 - torch.arange(32)) + right
        assert torch.equal(image[..., 0], (rows + down).clamp(0, 31))
        assert torch.equal(image[..., 1], across.clamp(0, 31).expand(32, -1))
        moves.add((down, right, step))
    assert {move[0] for move in moves} == {move[1] for move in moves} == set(range(-4, 5))
    assert len(moves) > 80


def test_images_of_other_sizes_are_moved_by_an_eighth_and_some_never_mirrored() -> None:
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(40), indexing="ij")
    pixels = torch.stack([rows, columns, rows], dim=-1).to(torch.uint8).expand(200, -1, -1, -1)
    result = augmented(pixels, torch.Generator().manual_seed(0), mirrored=False).int()
    moves = set()
    for image in result:
        down, right = int(image[12, 20, 0]) - 12, int(image[12, 20, 1]) - 20
        assert torch.equal(image[..., 0], (rows + down).clamp(0, 23))
        assert torch.equal(image[..., 1], (columns + right).clamp(0, 39))
        moves.add((down, right))
    assert {move[0] for move in moves} == {move[1] for move in moves} == set(range(-3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_is_that_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    start = stacked([network.state_dict() for network in networks(3)], device)
    images, answers = some_images().to(device), told(torch.randint(2, (3, 10)).bool().to(device))
    settings = (binary_loss, SEED, EPOCHS, BATCH, RATE, torch.float64)
    captured = train_on_shared_batches(start, images, answers, *settings)
    monkeypatch.setattr(shared_batches, "CapturedStep", lambda step, device: step)
    expected = train_on_shared_batches(start, images, answers, *settings)
    for name, value in expected.items():
        torch.testing.assert_close(captured[name], value)
        assert name.startswith("norm") or not torch.equal(captured[name], start[name])
