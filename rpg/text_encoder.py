"""Text encoders: a description becomes an embedding, which is a generator's condition.

An encoder is three files as Hugging Face's transformers and sentence-transformers save them: `config.json`,
`tokenizer.json` and `model.safetensors`. Nothing is downloaded, and code that comes with an encoder is not
run. The digest of the files identifies the encoder: embeddings depend only on the files and the description.

A words model (`rpg.words`) is kept, copied and identified in the same way: it is three files as well, a head
and an adapter, and they name the digest of the encoder that they belong on.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpg.config import LONGEST_DESCRIPTION
from rpg.errors import RPGError, one_line
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import copy_file, sha256
from rpg.storage.locations import AnyPath, fetched
from rpg.threads import one_thread

ENCODER_DIRECTORY = "encoder"
"""The encoder's directory in a collection and in a saved generator."""
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"
"""The file that tells a words model from a text encoder."""
_FILES = {
    CONFIG_FILE: "a text encoder's configuration",
    TOKENIZER_FILE: "a text encoder's tokenizer, in the format of the tokenizers package",
    WEIGHTS_FILE: "a text encoder's weights in one .safetensors file; RPG never executes a pickle",
}
_WORDS_FILES = {
    ADAPTER_CONFIG: "the configuration of a words model's adapter",
    ADAPTER_WEIGHTS: "the weights of a words model's adapter",
    HEAD_FILE: "the head of a words model",
}
_MOST_TEXT_BYTES = 2**26
"""Of configuration and tokenizer: the largest tokenizers have half of this."""
# Embeddings use the outputs for the tokens, so files may lack the weights of the pooled output.
_UNUSED = "pooler."


class TextEncoder:
    """Embeds descriptions one at a time, on the CPU, in float32.

    Attributes:
        size: values in an embedding.
        network: the network of transformers, in evaluation mode; fine-tuned weights may be loaded into it.
    """

    def __init__(self, directory: Path, network: nn.Module | None = None) -> None:
        """Load the encoder in `directory`.

        Args:
            directory: of the encoder's files.
            network: takes the place of the one in the directory. It has the sizes that the directory's
                configuration says in an attribute `config`, and is called like transformers' networks.

        Raises:
            RPGError: naming the file that is missing or not what it should be; if the packages of
                `rpg[text]` are not installed.
        """
        _check_files(directory)
        try:
            import tokenizers
        except ImportError as error:
            raise _not_installed(directory) from error
        self.network = _loaded(directory) if network is None else network
        config: Any = self.network.config
        self.size, vocabulary = int(config.hidden_size), int(config.vocab_size)
        self._most_tokens = _positions(self.network, config)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        except Exception as error:
            raise RPGError(
                f"{directory / TOKENIZER_FILE}: not a tokenizer that the tokenizers package reads: "
                f"{one_line(error)[:300]}"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        words = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if words > vocabulary:
            raise RPGError(
                f"{directory / TOKENIZER_FILE}: expected at most the {vocabulary} tokens of {CONFIG_FILE}, "
                f"found {words}"
            )

    def tokens(self, description: str) -> list[int]:
        """The ids of a description's tokens, special ones included.

        Raises:
            RPGError: if the description is empty, too long or not text.
        """
        what = _called(description)
        if len(description) > LONGEST_DESCRIPTION:
            raise RPGError(
                f"{what}: expected at most {LONGEST_DESCRIPTION} characters, got {len(description)}"
            )
        try:
            encoded = self._tokenizer.encode(description)
        except (TypeError, UnicodeError) as error:
            raise RPGError(f"{what}: expected Unicode text") from error
        if not description.strip() or all(encoded.special_tokens_mask):
            raise RPGError(f"{what}: expected words, found nothing that the encoder reads")
        tokens, most = len(encoded.ids), self._most_tokens
        if most is not None and tokens > most:
            raise RPGError(f"{what}: expected at most {most} tokens, as the encoder reads, got {tokens}")
        return list(encoded.ids)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [texts, size] of padded token ids [texts, tokens], differentiable.

        Args:
            ids: of each text's tokens.
            mask: 1 where there is a token, 0 where there is padding; same shape.
        """
        outputs = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].float()
        mean = (outputs * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=1)

    def encode(self, description: str) -> list[float]:
        """The embedding of a description: `size` float32 values of norm 1.

        It is the mean of the last layer's outputs over all tokens, special ones included, like that of
        sentence-transformers. Each description is a batch of its own, so that its embedding does not depend
        on others.

        Raises:
            RPGError: if the description is empty, too long or not text.
        """
        what, ids = _called(description), torch.tensor([self.tokens(description)])
        try:
            with torch.inference_mode(), one_thread():
                embedding = self.embed(ids, torch.ones_like(ids))[0]
        except (IndexError, RuntimeError) as error:
            raise RPGError(f"{what}: the encoder fails at it: {one_line(error)[:300]}") from error
        if not embedding.isfinite().all():
            raise RPGError(f"{what}: the encoder's outputs are NaN or infinite")
        values: list[float] = embedding.tolist()
        return values


def _called(description: str) -> str:
    """What error messages call a description."""
    return f"description {description if len(description) <= 40 else description[:40] + '…'!r}"


def is_words_model(directory: Path) -> bool:
    """Whether a directory holds a words model (`rpg.words.sentences`), and not a text encoder."""
    return (directory / HEAD_FILE).is_file()


def encoder_digest(directory: AnyPath) -> str:
    """SHA-256 of the names and digests of an encoder's files.

    Raises:
        RPGError: naming the file that is missing or cannot be read.
    """
    with fetched(directory) as local:
        return _digest(local)


def check_encoder(directory: AnyPath, digest: str) -> None:
    """Check that the encoder in `directory` has the digest `digest`.

    Raises:
        RPGError: naming the file that is missing, or the directory if it holds another encoder.
    """
    with fetched(directory) as local:
        if (found := _digest(local)) != digest:
            raise RPGError(
                f"{local}: not the text encoder that the conditions came from: "
                f"expected digest {digest}, got {found}"
            )


def copy_encoder(source: AnyPath, target: AnyPath) -> None:
    """Copy an encoder's files to the directory `target`, each as a whole or not at all.

    Raises:
        RPGError: naming the file that is missing or cannot be written, or `target` if it holds other files.
    """
    with storage_errors_for(target):
        known = any((target / name).is_file() for name in (TOKENIZER_FILE, HEAD_FILE))
        foreign = target.is_dir() and any(target.iterdir()) and not known
    if foreign:
        raise RPGError(f"{target}: holds other files; expected a new directory or a text encoder's")
    with fetched(source) as local:
        names = _check_files(local)
        for name in names:
            copy_file(local / name, target / name)
    # Files of an encoder of the other kind would say that it is still there.
    with storage_errors_for(target):
        for name in {**_FILES, **_WORDS_FILES}.keys() - set(names):
            if (target / name).is_file():
                (target / name).unlink()


def _check_files(directory: Path) -> list[str]:
    """Check that an encoder's files are there, and return their names.

    Raises:
        RPGError: naming the file that is missing, too large, or of something else.
    """
    files = _WORDS_FILES if is_words_model(directory) else _FILES
    for name, what in files.items():
        path = directory / name
        if not path.is_file():
            raise RPGError(f"{path}: not found; expected {what}")
        # The packages read these into memory, and whatever they are.
        if path.suffix == ".json" and path.stat().st_size > _MOST_TEXT_BYTES:
            raise RPGError(f"{path}: has more than {_MOST_TEXT_BYTES:,} bytes; expected {what}")
    # transformers would load the network that the adapter names from another place.
    if files is _FILES and (directory / ADAPTER_CONFIG).exists():
        raise RPGError(f"{directory / ADAPTER_CONFIG}: expected a text encoder, found an adapter to one")
    return list(files)


def _digest(directory: Path) -> str:
    names = _check_files(directory)
    try:
        lines = "".join(f"{sha256(directory / name)}  {name}\n" for name in names)
    except OSError as error:
        raise RPGError(f"{directory}: cannot be read: {error.strerror}") from error
    return hashlib.sha256(lines.encode()).hexdigest()


def _not_installed(directory: Path) -> RPGError:
    return RPGError(f"{directory}: the packages for text encoders are not installed: pip install 'rpg[text]'")


def _loaded(directory: Path) -> nn.Module:
    """The network in a directory, by transformers."""
    try:
        import transformers
    except ImportError as error:
        raise _not_installed(directory) from error
    try:
        with quiet(transformers.utils.logging):
            config = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            # What lacks a size is no encoder.
            int(config.hidden_size), int(config.vocab_size)
    except Exception as error:
        raise RPGError(
            f"{directory / CONFIG_FILE}: not the configuration of an encoder that transformers knows: "
            f"{one_line(error)[:300]}"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise RPGError(f"{directory / CONFIG_FILE}: expected an encoder alone, found one with a decoder")
    return _model(directory, config, transformers)


def _model(directory: Path, config: Any, transformers: Any) -> nn.Module:
    """The network in evaluation mode. Missing weights are an error; transformers would draw random ones."""
    path = directory / WEIGHTS_FILE
    try:
        with quiet(transformers.utils.logging):
            model, found = transformers.AutoModel.from_pretrained(
                directory,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise RPGError(f"{path}: cannot be loaded: {one_line(error)[:300]}") from error
    lacking = {
        name if isinstance(name, str) else name[0]
        for name in [*found["missing_keys"], *found["mismatched_keys"]]
    }
    used = sorted(name for name in lacking if not name.startswith(_UNUSED))
    if used:
        raise RPGError(f"{path}: tensor '{used[0]}' is missing, or not of the shape that {CONFIG_FILE} says")
    network: nn.Module = model.float().eval()
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RPGError(f"{path}: tensor '{name}' holds NaN or infinite values")
    return network


def _positions(network: nn.Module, config: Any) -> int | None:
    """The most tokens that the network reads; None if it has no limit."""
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            # RoBERTa and related networks number positions from padding_idx + 1.
            return int(module.num_embeddings) - int(module.padding_idx) - 1
    most: int | None = getattr(config, "max_position_embeddings", None)
    return most


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Silence transformers' progress bars and logs, since problems are raised as errors."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
