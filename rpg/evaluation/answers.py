"""What a network for some of CIFAR-10's classes answers to images: in the terminal, and as a page of HTML."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rpg.errors import RPGError
from rpg.storage.files import write_text
from rpg.storage.locations import AnyPath
from rpg.tasks.cifar10_net import Cifar10Net, normalised
from rpg.threads import one_thread
from rpg.words.understood import Understood

_CELLS = 14
"""Pixels of an image's side in the terminal, where a character shows two, one above the other."""
_PER_ROW = 5
_UPPER_HALF = "\N{UPPER HALF BLOCK}"


@dataclass(frozen=True)
class Answers:
    """What a network answered.

    Attributes:
        pixels: the images, uint8 [N, 32, 32, 3].
        names: what each image shows, or its file's name.
        chances: the probability that the network gives to yes [N].
        expected: which answers are right, bool [N]; None where that is not known.
    """

    pixels: Tensor
    names: Sequence[str]
    chances: Tensor
    expected: Tensor | None = None

    @property
    def says(self) -> list[str]:
        """The answers."""
        return ["yes" if chance > 0.5 else "no" for chance in self.chances.tolist()]

    @property
    def right(self) -> list[bool] | None:
        """Which of them are right."""
        return None if self.expected is None else ((self.chances > 0.5) == self.expected).tolist()

    @property
    def accuracy(self) -> float | None:
        """The share of them that is right."""
        return None if self.right is None else sum(self.right) / len(self.right)


def check_family(shapes: dict[str, tuple[int, ...]], generator: AnyPath) -> None:
    """Refuse a generator whose networks are not those of CIFAR-10's binary tasks.

    Args:
        shapes: of the tensors of its networks, by name.
        generator: is named in the error.

    Raises:
        RPGError: if they are others.
    """
    if shapes != {name: tuple(tensor.shape) for name, tensor in Cifar10Net().state_dict().items()}:
        raise RPGError(f"{generator}: makes other networks than those of the task family cifar10")


@torch.inference_mode()
def answers(
    network: dict[str, Tensor], pixels: Tensor, names: Sequence[str], expected: Tensor | None = None
) -> Answers:
    """What a network, the state dict of a `Cifar10Net`, answers to images, uint8 [N, 32, 32, 3]."""
    model = Cifar10Net().eval()
    model.load_state_dict(network)
    with one_thread():
        chances = torch.sigmoid(model(normalised(pixels))[:, 0])
    return Answers(pixels, names, chances, expected)


def terminal_picture(found: Answers, chosen: Sequence[int]) -> RenderableType:
    """The chosen images in the colours of a terminal, each over its name and answer."""
    rows: list[RenderableType] = []
    for start in range(0, len(chosen), _PER_ROW):
        table = Table.grid(padding=(0, 1))
        some = chosen[start : start + _PER_ROW]
        table.add_row(*(_blocks(found.pixels[i]) for i in some))
        table.add_row(*(_caption(found, i) for i in some))
        rows.append(table)
    return Group(*rows)


def _blocks(pixels: Tensor) -> Text:
    image = Image.fromarray(pixels.numpy()).resize((_CELLS, _CELLS), Image.Resampling.BOX)
    text = Text()
    for y in range(0, _CELLS, 2):
        for x in range(_CELLS):
            above, below = (image.getpixel((x, row)) for row in (y, y + 1))
            text.append(_UPPER_HALF, Style(color=_colour(above), bgcolor=_colour(below)))
        if y + 2 < _CELLS:
            text.append("\n")
    return text


def _colour(pixel: object) -> str:
    assert isinstance(pixel, tuple)
    red, green, blue = pixel[:3]
    return f"rgb({red},{green},{blue})"


def _caption(found: Answers, index: int) -> Text:
    is_right = None if found.right is None else found.right[index]
    says = found.says[index]
    name = found.names[index][: _CELLS - len(says) - 1]
    style = {None: "", True: "green", False: "red"}[is_right]
    # Colours alone would not tell everybody.
    return Text(f"{name} {says}{'' if is_right is not False else ' ✗'}", style=style)


def write_page(
    path: Path,
    asked: str,
    understood: Understood | None,
    classes: Sequence[str],
    shown: Sequence[tuple[str, Answers]],
) -> None:
    """Write a page of HTML that needs no other file.

    Args:
        path: of the page.
        asked: the description, or the condition.
        understood: what was understood of it; None for a condition.
        classes: that the network is for.
        shown: answers, each with a title.

    Raises:
        RPGError: naming the file, if it cannot be written.
    """
    # Not before it is needed, since it would delay every network.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rpg.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = [
        (title, found, list(zip(map(_data_url, found.pixels), found.names, found.says, strict=True)))
        for title, found in shown
    ]
    page = environment.get_template("answers.html").render(
        asked=asked, understood=understood, classes=", ".join(classes), groups=groups
    )
    write_text(path, page)


def _data_url(pixels: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
