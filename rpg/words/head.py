"""The head on a sentence encoder: from an embedding to the classes, and to whether it is about them.

It adds up two answers: that of a network with one hidden layer, and that of the nearest descriptions whose
classes are known.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.errors import RPGError, one_line
from rpg.storage.files import is_number, replacing_file
from rpg.words.properties import CLASSES

HEAD_FILE = "head.safetensors"
_METADATA = "rpg.words"
_IN_MEMORY = "memory."
_MEMORY = ("projection", "rows", "bits")
_DIRECTIONS = 192
_FOR_DIRECTIONS = 3000
"""Descriptions by which the directions are found."""
_NEAREST = 20
_NEARNESS = 0.03
"""By how much the cosine must be smaller for a share of 1/e."""
_LEAST_SHARE = 0.02
_MEMORY_WEIGHT = 1.0


@dataclass(frozen=True)
class Calibration:
    """What validation descriptions taught about a head's outputs.

    Attributes:
        class_temperature: logits of the classes are divided by it.
        scope_shift: is added to the logit of being about the classes,
        scope_temperature: which is then divided by this.
        least_sureness: less than this is not sure.
    """

    class_temperature: float = 1.0
    scope_temperature: float = 1.0
    scope_shift: float = 0.0
    least_sureness: float = 0.75


@dataclass(frozen=True)
class Memory:
    """Embeddings of descriptions whose classes are known: the nearest ones say what another one means.

    Attributes:
        projection: to the directions in which they differ most [directions, size].
        rows: the embeddings in these directions, of norm 127 or less [descriptions, directions], int8.
        bits: 1 for each class that is meant [descriptions, 10], uint8.
    """

    projection: Tensor
    rows: Tensor
    bits: Tensor

    @classmethod
    def of(cls, embeddings: Tensor, bits: Tensor) -> "Memory":
        """Keep embeddings [descriptions, size] and their bits [descriptions, 10]."""
        directions = min(_DIRECTIONS, *embeddings.shape)
        projection = (
            torch.linalg.svd(embeddings[:_FOR_DIRECTIONS], full_matrices=False).Vh[:directions].half()
        )
        rows = embeddings @ projection.float().T
        return cls(projection, (127 * rows / rows.abs().max()).round().to(torch.int8), bits.to(torch.uint8))

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits [texts, 10] of the shares of classes among the nearest descriptions of each embedding."""
        rows = F.normalize(self.rows.float(), dim=1)
        cosines = F.normalize(embeddings @ self.projection.float().T, dim=1) @ rows.T
        nearest, which = cosines.topk(min(_NEAREST, len(rows)), 1)
        weights = torch.softmax(nearest / _NEARNESS, 1)
        shares = (self.bits.float()[which] * weights[..., None]).sum(1)
        return shares.clamp(_LEAST_SHARE, 1 - _LEAST_SHARE).logit()


class ClassHead(nn.Module):
    """One hidden layer, then a logit for each class and one for being about the classes.

    Attributes:
        memory: what the logits of the nearest known descriptions are added from, if there is one.
        calibration: how logits become probabilities.
        encoder: digest of the encoder that it was trained on.
    """

    def __init__(self, size: int, hidden: int, dropout: float = 0.0) -> None:
        """Take embeddings of `size` values; dropout acts on the inputs of both layers while training."""
        super().__init__()
        self._scale = size**0.5
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(size, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, len(CLASSES) + 1),
        )
        self.memory: Memory | None = None
        self.calibration = Calibration()
        self.encoder = ""

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classes [texts, 10] and of being about them [texts], from embeddings of norm 1."""
        logits = self.layers(self._scale * embeddings)
        classes = logits[:, :-1]
        if self.memory is not None:
            classes = classes + _MEMORY_WEIGHT * self.memory.logits(embeddings)
        return classes, logits[:, -1]

    @torch.inference_mode()
    def probabilities(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Calibrated probabilities of the classes [texts, 10] and of being about them [texts]."""
        classes, scope = self(embeddings)
        of = self.calibration
        return (
            torch.sigmoid(classes / of.class_temperature),
            torch.sigmoid((scope + of.scope_shift) / of.scope_temperature),
        )

    def save(self, path: Path) -> None:
        """Write weights in half precision, memory, calibration and the encoder's digest as one file."""
        metadata = {"encoder": self.encoder, "calibration": asdict(self.calibration)}
        tensors = {name: tensor.half().contiguous() for name, tensor in self.layers.state_dict().items()}
        if self.memory is not None:
            for name in _MEMORY:
                tensors[_IN_MEMORY + name] = getattr(self.memory, name).contiguous()
        with replacing_file(path) as temporary:
            temporary.write_bytes(save(tensors, {_METADATA: json.dumps(metadata)}))

    @classmethod
    def load(cls, path: Path) -> "ClassHead":
        """Read what `save` wrote, in evaluation mode.

        Raises:
            RPGError: naming the file, if it is missing or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})[_METADATA])
                found_tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tensors = {name: each.float() for name, each in found_tensors.items() if _IN_MEMORY not in name}
            hidden, size = tensors["1.weight"].shape
            head = cls(size, hidden)
            head.layers.load_state_dict(tensors)
            if len(found_tensors) > len(tensors):
                head.memory = Memory(*(found_tensors[_IN_MEMORY + name] for name in _MEMORY))
                head.memory.logits(torch.zeros(1, size))
            head.encoder = str(metadata["encoder"])
            head.calibration = Calibration(**metadata["calibration"])
        except FileNotFoundError as error:
            raise RPGError(f"{path}: not found; expected the head of a sentence encoder") from error
        except Exception as error:
            raise RPGError(f"{path}: not the head of a sentence encoder: {one_line(error)[:300]}") from error
        if not all(tensor.isfinite().all() for tensor in found_tensors.values()):
            raise RPGError(f"{path}: holds NaN or infinite values")
        found = asdict(head.calibration)
        if (
            not all(map(is_number, found.values()))
            or min(found["class_temperature"], found["scope_temperature"]) <= 0
        ):
            raise RPGError(f"{path}: expected finite numbers and positive temperatures, found {found}")
        return head.eval()
