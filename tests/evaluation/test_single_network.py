"""Judging single networks, against plain PyTorch and sets of images."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rpg.collection.checkpoint import checkpoint_sha256, write_checkpoint
from rpg.collection.collection import FAMILY, Collection, Entry
from rpg.errors import RPGError
from rpg.evaluation.judge import FamilyJudge
from rpg.evaluation.single_network import SingleNetworkJudge
from rpg.tasks.cifar10_images import cifar10_images
from rpg.tasks.cifar10_net import Cifar10Net, normalised
from rpg.tasks.digits import DigitsNet, digits_images
from tests.cifar10_files import write_cifar10

ODD = [0.0, 1.0] * 5
SMALL = [1.0] * 3 + [0.0] * 7


def wrong(network: dict[str, Tensor], condition: list[float]) -> set[int]:
    """The test images that a network gets wrong."""
    plain = DigitsNet()
    plain.load_state_dict(network)
    test = digits_images()["test"]
    with torch.no_grad():
        answers = plain(test.images)[:, 0] > 0
    wanted = {i for i, value in enumerate(condition) if value}
    return {i for i, answer in enumerate(answers.tolist()) if answer != (int(test.classes[i]) in wanted)}


def test_accuracy_and_the_nearest_original(
    tmp_path: Path, make_checkpoints: Callable[..., list[dict[str, Tensor]]]
) -> None:
    networks = make_checkpoints(5, DigitsNet().state_dict())
    entries = []
    for i, condition in enumerate((ODD, ODD, SMALL)):
        path = tmp_path / f"{i}.safetensors"
        write_checkpoint(path, networks[i], {})
        entries.append(Entry(path.name, checkpoint_sha256(path), condition))
    judge = SingleNetworkJudge(FamilyJudge("digits"), Collection(tmp_path, {FAMILY: "digits"}, entries))
    errors = wrong(networks[3], ODD)
    originals = [wrong(network, ODD) for network in networks[:2]]
    judged = judge.judge("n", networks[3], ODD)
    assert judged.metrics["accuracy"] == pytest.approx(1 - len(errors) / len(digits_images()["test"].images))
    assert judged.similarity == pytest.approx(max(len(errors & o) / len(errors | o) for o in originals))
    assert judge.judge("n", networks[4], [1.0] + [0.0] * 9).similarity is None
    half = {name: value.half() for name, value in networks[3].items()}
    assert judge.judge("n", half, ODD).metrics["accuracy"] == pytest.approx(
        judged.metrics["accuracy"], abs=0.02
    )
    assert judge.judge("n", networks[2], SMALL).similarity == 1


def test_a_family_that_needs_images_is_given_them(
    tmp_path: Path, make_checkpoints: Callable[..., list[dict[str, Tensor]]]
) -> None:
    write_cifar10(tmp_path, train=20, test=30)
    network = make_checkpoints(1, Cifar10Net().state_dict())[0]
    write_checkpoint(tmp_path / "a.safetensors", network, {})
    entry = Entry("a.safetensors", checkpoint_sha256(tmp_path / "a.safetensors"), ODD)
    collection = Collection(tmp_path, {FAMILY: "cifar10"}, [entry])
    judged = SingleNetworkJudge(FamilyJudge("cifar10", str(tmp_path)), collection).judge("n", network, ODD)
    test = cifar10_images(str(tmp_path), "test")
    plain = Cifar10Net().eval()
    plain.load_state_dict(network)
    with torch.no_grad():
        answers = plain(normalised(test.pixels))[:, 0] > 0
    right = (answers == (test.classes % 2 == 1)).float().mean()
    assert judged.metrics["accuracy"] == pytest.approx(float(right))
    assert judged.similarity == 1
    with pytest.raises(RPGError, match=r"collect\.images"):
        SingleNetworkJudge(FamilyJudge("cifar10"), collection)


def test_a_network_that_cannot_be_measured_is_told_by_name(tmp_path: Path) -> None:
    judge = SingleNetworkJudge(FamilyJudge("digits"), None)
    with pytest.raises(RPGError, match=r"model 3: .*expected a condition of 10 class bits, got None"):
        judge.judge("model 3", DigitsNet().state_dict(), None)
    assert judge.judge("model 3", DigitsNet().state_dict(), ODD).similarity is None
