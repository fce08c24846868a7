"""Classifiers of images by the names of their networks: against a loop over images, loss, what is refused."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from rpg.collection.collection import FAMILY, Collection
from rpg.config import CollectConfig
from rpg.errors import RPGError
from rpg.tasks.families import family_of, load_family, uses_gpu
from rpg.tasks.image_classifiers import ImageClassifier
from rpg.tasks.image_networks import ADAMW, SGD
from rpg.tasks.images.image_set import image_set

CPU = torch.device("cpu")
CLASSES, HEIGHT, WIDTH = 3, 24, 32


class Small(ImageClassifier):
    """A network that a test trains in seconds."""

    network = "timm:test_vit"
    arguments: ClassVar[dict[str, Any]] = {"embed_dim": 16, "depth": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes of colour images, 24 × 32, in folders."""
    directory = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 7)):
        for number, name in enumerate(("blue", "green", "red")):
            folder = directory / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(200, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
                pixels[..., 2 - number] += 55
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(directory)


def test_a_network_is_a_family_by_its_name(images: str) -> None:
    for name, parameters in (("torchvision:resnet18", 11_170_371), ("timm:vit_tiny_patch16_224", 5_358_339)):
        family = load_family(name, images)
        family.check()
        network = family.build_network()
        assert sum(parameter.numel() for parameter in network.parameters()) == parameters
        assert uses_gpu(name)


def test_a_collection_may_name_such_a_family(tmp_path: Path) -> None:
    for name in ("timm:convnext_pico", "torchvision:resnet18"):
        assert family_of(Collection(tmp_path, {FAMILY: name}, [])) == name
    with pytest.raises(RPGError, match="which is code"):
        family_of(Collection(tmp_path, {FAMILY: "timm.models:resnet18"}, []))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("torchvision:resnet18", SGD), ("timm:resnet50_gn", SGD), ("timm:mobilenetv3_large_100", SGD),
     ("timm:vit_tiny_patch16_224", ADAMW), ("timm:convnext_atto", ADAMW), ("torchvision:swin_t", ADAMW)],
)  # fmt: skip
def test_networks_with_layernorm_are_trained_by_adamw(images: str, name: str, recipe: Any) -> None:
    assert load_family(name, images).usual_recipe() == recipe


def test_checkpoints_come_in_order_and_answer_as_in_a_plain_loop(images: str, tmp_path: Path) -> None:
    family = Small(images, CPU)
    family.check()
    config = CollectConfig(backbone_epochs=1, batch_size=9, learning_rate=2e-3, checkpoints_per_task=3)
    got = list(family.checkpoints(config, 0, tmp_path / "state.pt"))
    first, *lines = [line for line in got if isinstance(line, str)]
    assert first.startswith("54 images of 32 × 24, 3 classes, mean 0.4")
    assert [line.split(",")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    found = [{n: v.clone() for n, v in each.items()} for each in got if isinstance(each, dict)]
    assert len(found) == 3
    network = family.build_network().eval()
    train, test = (image_set(images).images(split) for split in ("train", "test"))
    values = train.pixels.double() / 255
    mean, deviation = values.mean((0, 1, 2)), values.std((0, 1, 2), correction=0)
    answers = family.predict_many(found, "test")
    for row, checkpoint in zip(answers, found, strict=True):
        network.load_state_dict(checkpoint, strict=True)
        with torch.no_grad():
            alone = [
                int(network((((image / 255.0 - mean) / deviation).movedim(2, 0)[None]).float())[0].argmax())
                for image in test.pixels
            ]
        assert row.tolist() == alone
    assert family.labels(None, "test").tolist() == [0] * 7 + [1] * 7 + [2] * 7


def test_training_learns_the_classes(images: str, tmp_path: Path) -> None:
    family = Small(images, CPU)
    config = CollectConfig(backbone_epochs=25, batch_size=9, learning_rate=5e-3, checkpoints_per_task=2)
    *_, last, _ = family.checkpoints(config, 0, tmp_path / "state.pt")
    [answers] = family.predict_many([last], "test")
    assert (answers == family.labels(None, "test")).float().mean() > 0.8


def test_the_loss_is_the_cross_entropy_of_augmented_training_images(images: str) -> None:
    family = Small(images, CPU)
    inputs, classes = family.batch(7, torch.Generator().manual_seed(3))
    again, _ = family.batch(7, torch.Generator().manual_seed(3))
    assert inputs.equal(again)
    assert inputs.shape == (7, 3, HEIGHT, WIDTH)
    logits = family.build_network()(inputs)
    plain = torch.stack([-row.log_softmax(0)[label] for row, label in zip(logits, classes, strict=True)])
    torch.testing.assert_close(family.loss(logits, (inputs, classes), None), plain.mean())


def test_a_network_that_cannot_take_the_images_is_refused_before_any_work(images: str) -> None:
    for name, says in (
        ("torchvision:alexnet", "does not run on images of 32 × 24: "),
        ("torchvision:vgg11", "does not run on images of 32 × 24: .*too small"),
        ("torchvision:vit_b_16", "indivisible by patch size"),
    ):
        with pytest.raises(RPGError, match=f"network: '{name}'.*{says}") as error:
            load_family(name, images).check()
        assert "\n" not in str(error.value)
