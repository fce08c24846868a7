"""Collections whose conditions are embeddings of descriptions."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rpg.collection.collection import Collection, Entry
from rpg.collection.conditions import read_descriptions
from rpg.collection.register import register
from rpg.commands.inspection import inspect
from rpg.errors import RPGError
from rpg.storage.locations import location
from rpg.text_encoder import TextEncoder, encoder_digest
from tests.s3_server import S3Server
from tests.text_encoders import save_encoder

TEXTS = {"a.pt": "cat", "b.pt": "is it a cat, or any of two dogs?", "c.pt": "cat"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints, and descriptions of them in `texts.json`."""
    directory = tmp_path / "folder"
    directory.mkdir()
    for i, name in enumerate(TEXTS):
        torch.save({"w": torch.full((2, 3), float(i))}, directory / name)
    (directory / "texts.json").write_text(json.dumps(TEXTS))
    return directory


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'file,description\na.pt,cat\nb.pt,"is it a cat, or any of two dogs?"\n\nc.pt, cat \n'),
        ("t.json", json.dumps(TEXTS)),
        ("t.json", json.dumps([{"file": file, "description": text} for file, text in TEXTS.items()])),
    ],
)
def test_csv_and_json_forms_are_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    found = read_descriptions(tmp_path / name)
    assert {file: row.description for file, row in found.items()} == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "file,text\na.pt,cat\n", ", row 1: expected a header 'file,description', got 'file,text'"),
        ("t.csv", "file,description\na.pt,cat,dog\n", ", row 2: expected 2 cells as in the header, got 3"),
        ("t.csv", "file,description\n", ": holds no descriptions"),
        ("t.csv", "file,description\na,x\na,y\n", ", row 3: 'a' is listed twice, first in"),
        ("t.json", '{"a.pt": [1, 2]}', ", row 1: 'a.pt': expected text, got [1, 2]"),
        ("t.json", '[{"file": "a.pt", "text": "x"}]', ', row 1: expected {"file": ..., "description": text}'),
        ("t.json", "{", ": not valid JSON"),
        ("t.txt", "", ": expected descriptions as .csv or .json"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RPGError) as refusal:
        read_descriptions(tmp_path / name)
    assert str(refusal.value).startswith(f"{tmp_path / name}{words}")


def test_conditions_are_the_descriptions_embeddings(folder: Path, text_encoder: Path) -> None:
    register(folder, descriptions=folder / "texts.json", encoder=text_encoder)
    collection = Collection.load(folder)
    encoder = TextEncoder(text_encoder)
    assert {entry.file: entry.description for entry in collection.entries} == TEXTS
    for entry in collection.entries:
        assert entry.condition == encoder.encode(TEXTS[entry.file])
    assert collection.encoder == encoder_digest(text_encoder) == encoder_digest(collection.encoder_directory)


def test_rpg_inspect_names_the_encoder(folder: Path, text_encoder: Path) -> None:
    register(folder, descriptions=folder / "texts.json", encoder=text_encoder)
    facts = inspect(folder, verify=True).to_json()
    assert (facts["text_encoder"], facts["condition_width"]) == (encoder_digest(text_encoder), 32)
    (folder / "encoder" / "config.json").write_text("{}")
    inspect(folder)
    with pytest.raises(RPGError, match="folder/encoder: not the text encoder that the conditions came from"):
        inspect(folder, verify=True)


def test_values_that_are_not_given_anew_are_kept(folder: Path, text_encoder: Path, tmp_path: Path) -> None:
    register(folder, descriptions=folder / "texts.json", encoder=text_encoder)
    first = (folder / "collection.json").read_bytes()
    register(folder)
    assert (folder / "collection.json").read_bytes() == first

    shutil.copy(folder / "a.pt", folder / "d.pt")
    with pytest.raises(RPGError, match=r"'d\.pt': expected a condition of width 32"):
        register(folder)
    (folder / "texts.json").write_text(json.dumps({**TEXTS, "d.pt": "truck"}))
    added, _ = register(folder, descriptions=folder / "texts.json")
    assert added.entries[3].condition == TextEncoder(text_encoder).encode("truck")
    assert added.encoder == encoder_digest(text_encoder)

    other = save_encoder(tmp_path / "other", seed=1, size=8)
    changed, _ = register(folder, descriptions=folder / "texts.json", encoder=other)
    assert changed.condition_width == 8
    assert changed.encoder == encoder_digest(folder / "encoder") == encoder_digest(other)
    again, _ = register(folder, descriptions=folder / "texts.json", encoder=folder / "encoder")
    assert again.entries == changed.entries

    plain, _ = register(folder, conditions=_bits(folder))
    assert plain.encoder is None
    assert [entry.description for entry in plain.entries] == [None] * 4
    assert "encoder" not in json.loads((folder / "collection.json").read_text())


def _bits(folder: Path) -> Path:
    path = folder / "bits.csv"
    path.write_text("file,bits\na.pt,01\nb.pt,10\nc.pt,11\nd.pt,01\n")
    return path


def test_a_collection_behind_a_uri_keeps_its_encoder(folder: Path, text_encoder: Path, s3: S3Server) -> None:
    uri = location(s3.bucket("described"))
    for path in folder.glob("*.pt"):
        (uri / path.name).write_bytes(path.read_bytes())
    register(uri, descriptions=folder / "texts.json", encoder=text_encoder)
    collection, _ = register(uri, descriptions=folder / "texts.json")
    assert encoder_digest(collection.encoder_directory) == collection.encoder == encoder_digest(text_encoder)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({**TEXTS, "b.pt": "  "}, "texts.json, row 2: description '  ': expected words"),
        ({**TEXTS, "b.pt": "cat " * 20}, "texts.json, row 2: description 'cat cat"),
        ({**TEXTS, "d.pt": "cat"}, "texts.json, row 4: 'd.pt' is not among the checkpoints"),
        ({"a.pt": "cat"}, "texts.json: no row for 'b.pt'; expected a description for every checkpoint"),
    ],
)
def test_descriptions_that_cannot_be_used_are_refused(
    folder: Path, text_encoder: Path, texts: dict[str, str], words: str
) -> None:
    (folder / "texts.json").write_text(json.dumps(texts))
    with pytest.raises(RPGError) as refusal:
        register(folder, descriptions=folder / "texts.json", encoder=text_encoder)
    assert str(refusal.value).startswith(f"{folder}/{words}")
    assert not (folder / "collection.json").exists()
    assert not (folder / "encoder").exists()


def test_contradicting_arguments_are_refused(folder: Path, text_encoder: Path) -> None:
    texts = folder / "texts.json"
    with pytest.raises(RPGError, match=r"texts\.json: descriptions need a text encoder.*--encoder"):
        register(folder, descriptions=texts)
    with pytest.raises(RPGError, match="words: an encoder needs descriptions"):
        register(folder, encoder=text_encoder)
    with pytest.raises(RPGError, match="expected either a file of them or descriptions, got both"):
        register(folder, texts, descriptions=texts, encoder=text_encoder)
    with pytest.raises(RPGError, match=r"folder/config\.json: not found"):
        register(folder, descriptions=texts, encoder=folder)
    with pytest.raises(
        RPGError, match=r"pattern '\{c:digits\}\{rest\}': has a condition, and so has .*texts\.json"
    ):
        register(folder, pattern="{c:digits}{rest}", descriptions=texts, encoder=text_encoder)
    register(folder, descriptions=texts, encoder=text_encoder)
    (folder / "encoder" / "tokenizer.json").write_text("{}")
    with pytest.raises(RPGError, match="folder/encoder: not the text encoder that the conditions came from"):
        register(folder, descriptions=texts)


@pytest.mark.parametrize(
    ("entry", "encoder", "words"),
    [
        (Entry("a.pt", "", [1.0], description="cat"), "x" * 64, "encoder: expected 64 hexadecimal digits"),
        (Entry("a.pt", "", None, description="cat"), "0" * 64, "'a.pt': description: expected text, beside"),
        (Entry("a.pt", "", [1.0], description=3), "0" * 64, "'a.pt': description: expected text, beside"),  # type: ignore[arg-type]
    ],
)
def test_inconsistent_collections_are_refused(tmp_path: Path, entry: Entry, encoder: str, words: str) -> None:
    with pytest.raises(RPGError) as refusal:
        Collection(tmp_path, {}, [entry], encoder)
    assert words in str(refusal.value)
