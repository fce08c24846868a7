"""A generator's text encoder: it is saved with the generator, and another one is refused."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rpg.collection.layout import Layout
from rpg.collection.shards import ShardedCollection
from rpg.commands.main import main
from rpg.config import ConditionKind, RecurrentKind, to_plain
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models
from rpg.storage.locations import location
from rpg.text_encoder import TextEncoder, encoder_digest
from tests.s3_server import S3Server
from tests.text_encoders import save_encoder

MakeGenerator = Callable[..., Generator]
MakeLayout = Callable[..., Layout]


@pytest.fixture
def saved(describing: Generator, tmp_path: Path) -> Path:
    describing.save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def test_a_saved_generator_contains_its_encoder(
    describing: Generator, saved: Path, text_encoder: Path, tmp_path: Path
) -> None:
    generator = Generator.from_pretrained(saved)
    assert generator.digest() == describing.digest()
    assert generator.text_encoder().encode("two dogs") == TextEncoder(text_encoder).encode("two dogs")
    assert "the embedding of a description" in (saved / "README.md").read_text()
    generator.save_pretrained(tmp_path / "copy")
    generator.save_pretrained(saved)
    for directory in (tmp_path / "copy", saved):
        again = Generator.from_pretrained(directory)
        assert again.digest() == describing.digest()
        assert again.text_encoder().encode("cat") == TextEncoder(text_encoder).encode("cat")


def test_a_generator_behind_a_uri_contains_its_encoder(
    describing: Generator, text_encoder: Path, s3: S3Server
) -> None:
    uri = location(s3.bucket("reads-descriptions")) / "generator"
    describing.save_pretrained(uri)
    generator = Generator.from_pretrained(uri)
    assert generator.text_encoder().encode("cat") == TextEncoder(text_encoder).encode("cat")


def test_rpg_generate_makes_the_same_from_a_description_as_from_its_embedding(
    saved: Path, text_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["is it a cat?", "two dogs"]
    asked = [f"--description={text}" for text in texts]
    out = tmp_path / "out"
    assert main(["generate", str(saved), *asked, "--number", "2", "--seed", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    generator = Generator.from_pretrained(saved)
    conditions = [TextEncoder(text_encoder).encode(text) for text in texts]
    expected = generate_models(generator, conditions, 2, 3, tmp_path / "expected", generator.config.sampling)
    assert [Path(line).read_bytes() for line in printed.out.splitlines()] == [
        path.read_bytes() for path in expected
    ]


def test_digests_of_generators_without_encoder_have_not_changed(
    make_generator: MakeGenerator, make_layout: MakeLayout
) -> None:
    generator = make_generator(make_layout(16))
    architecture = to_plain(generator.config)
    for key in ("sampling", "dtype"):
        del architecture[key]
    for key in ("encoder", "states", "form", "last_tokens"):
        del architecture["condition"][key]
    for key in ("output_width", "positions"):
        del architecture["recurrent"][key]
    hashed = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    hashed.update(generator.layout.digest().encode())
    for name, tensor in sorted(generator.state_dict().items()):
        hashed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    assert generator.digest() == hashed.hexdigest()
    generator.config.condition.encoder = "0" * 64
    assert generator.digest() != hashed.hexdigest()


def test_a_new_generator_takes_the_encoder_of_its_collection(
    describing: Generator, make_collection: Callable[..., ShardedCollection], tmp_path: Path
) -> None:
    shards = make_collection(tmp_path / "shards", condition_width=32)
    assert shards.encoder == ""
    config, digest = describing.config, "1" * 64
    asked = dataclasses.replace(config, condition=dataclasses.replace(config.condition, encoder="", size=0))
    built = Generator.for_collection(asked, shards.layout, shards.conditions, len(shards), digest)
    assert built.config.condition.encoder == digest
    assert (
        Generator.for_collection(asked, shards.layout, shards.conditions, 10).config.condition.encoder == ""
    )
    with pytest.raises(RPGError, match=r"generator\.condition\.encoder: the collection has '1{64}', got"):
        Generator.for_collection(config, shards.layout, shards.conditions, len(shards), digest)
    free = dataclasses.replace(asked, condition=dataclasses.replace(asked.condition, kind=ConditionKind.none))
    built = Generator.for_collection(free, shards.layout, shards.conditions, len(shards), digest)
    assert built.config.condition.encoder == ""


def other_encoder(saved: Path) -> None:
    shutil.rmtree(saved / "encoder")
    save_encoder(saved / "encoder", seed=1)


def other_config(saved: Path) -> None:
    config = OmegaConf.load(saved / "config.yaml")
    config.condition.encoder = "2" * 64
    OmegaConf.save(config, saved / "config.yaml")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda saved: shutil.rmtree(saved / "encoder"), "encoder/config.json: not found"),
        (lambda saved: (saved / "encoder" / "model.safetensors").unlink(), "model.safetensors: not found"),
        (other_encoder, "encoder: not the text encoder that the conditions came from"),
        (other_config, "generator.safetensors: was saved with another text encoder than config.yaml names"),
    ],
)
def test_a_missing_or_wrong_encoder_is_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object], words: str,
) -> None:  # fmt: skip
    spoil(saved)
    capsys.readouterr()
    assert main(["generate", str(saved), "--description", "cat", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rpg: error: {saved}/") and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_encoder_with_embeddings_of_another_size_is_refused(
    make_generator: MakeGenerator, make_layout: MakeLayout, text_encoder: Path
) -> None:
    generator = make_generator(make_layout(16), condition_size=3)
    with pytest.raises(RPGError, match=r"^description: this generator has no text encoder"):
        generator.text_encoder()
    generator.config.condition.encoder = encoder_digest(text_encoder)
    with pytest.raises(RPGError, match=r"^description: the text encoder is not at hand"):
        generator.text_encoder()
    generator.encoder_directory = text_encoder
    with pytest.raises(RPGError, match=r"words: expected embeddings of 3 values.*condition\.size.* got 32$"):
        generator.text_encoder()


def test_generators_without_encoder_refuse_descriptions(
    make_generator: MakeGenerator, make_layout: MakeLayout
) -> None:
    generator = make_generator(
        make_layout(16), recurrent=RecurrentKind.lstm, condition=ConditionKind.permutation
    )
    with pytest.raises(
        RPGError, match=r"^description: this generator takes none \(its kind is 'permutation'"
    ):
        generator.text_encoder()


def test_training_checkpoints_do_not_need_the_encoders_files(describing: Generator, tmp_path: Path) -> None:
    """Training checkpoints contain the encoder's digest, but not its files."""
    apart = Generator(describing.config, describing.layout)
    apart.load_state_dict(describing.state_dict())
    apart.save_pretrained(tmp_path / "step")
    assert not (tmp_path / "step" / "encoder").exists()
    generator = Generator.from_pretrained(tmp_path / "step")
    assert generator.digest() == describing.digest()
    with pytest.raises(RPGError, match=r"encoder/config\.json: not found"):
        generator.text_encoder()
