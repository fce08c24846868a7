"""The head on a sentence encoder: from an embedding to the classes, and to whether it is about them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rpg.errors import RPGError, one_line
from rpg.storage.files import is_number, replacing_file
from rpg.words.properties import CLASSES

HEAD_FILE = "head.safetensors"
_METADATA = "rpg.words"


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


class ClassHead(nn.Module):
    """One hidden layer, then a logit for each class and one for being about the classes.

    Attributes:
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
        self.calibration = Calibration()
        self.encoder = ""

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the classes [texts, 10] and of being about them [texts], from embeddings of norm 1."""
        logits = self.layers(self._scale * embeddings)
        return logits[:, :-1], logits[:, -1]

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
        """Write weights in half precision, calibration and the encoder's digest as one .safetensors file."""
        metadata = {"encoder": self.encoder, "calibration": asdict(self.calibration)}
        tensors = {name: tensor.half().contiguous() for name, tensor in self.layers.state_dict().items()}
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
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            hidden, size = tensors["1.weight"].shape
            head = cls(size, hidden)
            head.layers.load_state_dict(tensors)
            head.encoder = str(metadata["encoder"])
            head.calibration = Calibration(**metadata["calibration"])
        except FileNotFoundError as error:
            raise RPGError(f"{path}: not found; expected the head of a sentence encoder") from error
        except Exception as error:
            raise RPGError(f"{path}: not the head of a sentence encoder: {one_line(error)[:300]}") from error
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise RPGError(f"{path}: holds NaN or infinite values")
        found = asdict(head.calibration)
        if (
            not all(map(is_number, found.values()))
            or min(found["class_temperature"], found["scope_temperature"]) <= 0
        ):
            raise RPGError(f"{path}: expected finite numbers and positive temperatures, found {found}")
        return head.eval()
