"""Tiny text encoders: real BERTs with WordPiece tokenizers, their weights random."""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

WORDS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "a", "or", "any", "of", "cat", "dog", "##s",
    "truck", "one", "two", "three", ",", "?",
)  # fmt: skip
SIZE, LAYERS, HEADS, POSITIONS = 32, 2, 2, 16


def save_encoder(directory: Path, seed: int = 0, size: int = SIZE, positions: int = POSITIONS) -> Path:
    """Write config.json, tokenizer.json and model.safetensors as their packages do."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, special)
    # As published encoders have it, whatever lengths they are then used with.
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(max_length=6)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=size,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=positions,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BertModel(config)
        with torch.no_grad():
            for parameter in network.parameters():
                # transformers begins with zeros and ones, which would hide mistakes.
                parameter.add_(0.3 * torch.randn_like(parameter))
    network.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def token_ids(description: str) -> list[int]:
    """What the tokenizer is expected to read: whole words, a plural in two pieces, [CLS] and [SEP] around."""
    words = re.findall(r"\w+|[^\w\s]", description.lower())
    pieces = [
        piece for word in words for piece in ([word] if word in WORDS else [word.removesuffix("s"), "##s"])
    ]
    return [WORDS.index(piece) for piece in ("[CLS]", *pieces, "[SEP]")]
