"""From words to classes by a causal language model: it is asked yes or no for each class.

Small models lean to one answer whatever is asked, and the more so for some descriptions. So the same question
is asked about a neutral subject, and what counts is how much more a class is a yes than that (compare
"Calibrate Before Use", arXiv 2102.09690). Nothing is generated: only the probabilities of the two answers are
read, so a description cannot make the model say or do anything else.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import LONGEST_DESCRIPTION
from rpg.errors import RPGError, one_line
from rpg.text_encoder import quiet
from rpg.words.properties import CLASSES
from rpg.words.understood import Understood

_QUESTION = (
    'Here is a request: "{description}"\nIs {subject} one of the things that the request asks for? '
    "Answer with yes or no."
)
_NEUTRAL = "something"
_ANSWERS = (("Yes", " Yes", "yes", " yes"), ("No", " No", "no", " no"))
_WITHOUT_TEMPLATE = "Question: {question}\nAnswer:"
_LEAST_SURENESS = 0.75
"""Of what is acted on. The model itself does not say whether a description is about the classes."""


class LanguageModel:
    """Asks a causal language model, on the CPU, in float32."""

    def __init__(self, path: Path) -> None:
        """Load a model and its tokenizer.

        Args:
            path: a directory that Transformers' `AutoModelForCausalLM` loads, or a `.gguf` file. Nothing is
                downloaded, and code that comes with a model is not run.

        Raises:
            RPGError: naming the path, if it is no such model, or the packages of `rpg[llm]` are not
                installed.
        """
        try:
            import transformers
        except ImportError as error:
            raise RPGError(
                f"{path}: the packages for language models are not installed: pip install 'rpg[llm]'"
            ) from error
        if not path.exists():
            raise RPGError(f"{path}: not found; expected a language model's directory or .gguf file")
        directory: Path = path
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if path.is_file():
            if path.suffix != ".gguf":
                raise RPGError(f"{path}: expected a language model's directory or .gguf file")
            directory, options = path.parent, options | {"gguf_file": path.name}
        weights = {} if path.is_file() else {"use_safetensors": True}
        try:
            with quiet(transformers.utils.logging):
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **options)
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    directory, dtype=torch.float32, **options, **weights
                )
        except Exception as error:
            raise RPGError(
                f"{path}: not a language model that transformers loads: {one_line(error)[:300]}"
            ) from error
        self._model: Any = model.eval()
        self._answers = [self._first_tokens(words) for words in _ANSWERS]
        if not all(self._answers):
            raise RPGError(f"{path}: its tokenizer has no token that begins yes, or none that begins no")

    def understand(self, description: str) -> Understood:
        """Which classes a description means.

        Raises:
            RPGError: if the description is empty, too long or not text.
        """
        if not description.strip() or len(description) > LONGEST_DESCRIPTION:
            raise RPGError(
                f"a description: expected 1 to {LONGEST_DESCRIPTION} characters, got {len(description)}"
            )
        subjects = [f"{'an' if name[0] in 'aeio' else 'a'} {name}" for name in CLASSES]
        scores = self.scores(description, [*subjects, _NEUTRAL])
        probabilities = torch.sigmoid(scores[:-1] - scores[-1])
        sureness = float(torch.maximum(probabilities, 1 - probabilities).mean())
        return Understood(tuple(probabilities.tolist()), sureness, sureness >= _LEAST_SURENESS)

    @torch.inference_mode()
    def scores(self, description: str, subjects: Sequence[str]) -> Tensor:
        """How much more likely the answer is yes than no: log odds, for each subject."""
        prompts = [
            self._prompt(_QUESTION.format(description=description, subject=subject)) for subject in subjects
        ]
        # One prompt at a time: padding would need a token that some tokenizers do not have.
        logits = torch.stack(
            [self._model(input_ids=torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
        )
        yes, no = (logits[:, answer].logsumexp(1) for answer in self._answers)
        return yes - no

    def _prompt(self, question: str) -> list[int]:
        if getattr(self._tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": question}]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self._tokenizer(_WITHOUT_TEMPLATE.format(question=question))["input_ids"])

    def _first_tokens(self, words: Sequence[str]) -> list[int]:
        """The tokens that are one of the words as a whole."""
        ids = [self._tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        unknown = self._tokenizer.unk_token_id
        return sorted({each[0] for each in ids if len(each) == 1 and each[0] != unknown})
