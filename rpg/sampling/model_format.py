"""The `.safetensors` files of one layout's models: their tensors, and many small files at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.collection.safetensors_file import SafetensorsValues
from rpg.errors import RPGError


class NotFiniteError(RPGError):
    """Weights that a generator made are NaN or infinite."""

    def __init__(self, path: object, tensor: str) -> None:
        """Name the model's file and the tensor."""
        super().__init__(f"{path}: tensor '{tensor}': NaN or infinite values were generated")


class ModelFormat:
    """What the files of a layout's models have in common.

    Tied tensors are written under each of their names, since the format knows no ties.

    Attributes:
        layout: of the models.
        dtypes: in the file, by tensor.
        names: under which a tensor's values are written: its own, and those of tensors that are tied to it.
        values: where they lie.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype | None = None) -> None:
        """Files of `layout`'s models, whose floating-point tensors have `dtype`, as with `module.to(dtype)`;
        None: the layout's own."""
        self.layout = layout
        self.dtypes = {
            spec.name: dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
            for spec in layout.specs
        }
        self.names: dict[str, list[str]] = {}
        for spec in layout.specs:
            self.names.setdefault(spec.alias_of or spec.name, []).append(spec.name)
        self.values = SafetensorsValues.of(
            {spec.name: (self.dtypes[spec.name], spec.shape) for spec in layout.specs}
        )

    def encode(self, decoded: Mapping[str, Tensor]) -> "EncodedModels":
        """What stands behind the headers of many models' files.

        Args:
            decoded: by name, of each tensor that is tokens: [M, numel] (`Layout.decode_many`).
        """
        count = len(next(iter(decoded.values())))
        contents = torch.empty(count, self.values.size, dtype=torch.uint8)
        not_finite: list[str | None] = [None] * count
        for name, value in self.layout.constants.items():
            self._put(contents, name, value.flatten().to(self.dtypes[name]).expand(count, -1))
        for name, values in decoded.items():
            # What is too large for the file's type becomes infinite here.
            weights = values.to(self.dtypes[name])
            self._put(contents, name, weights)
            for row in (~weights.isfinite().all(1)).nonzero().flatten().tolist():
                not_finite[row] = not_finite[row] or name
        return EncodedModels(contents, not_finite)

    def _put(self, contents: Tensor, name: str, values: Tensor) -> None:
        if not values.numel():
            return
        as_bytes = values.contiguous().view(torch.uint8)
        for each in self.names[name]:
            start = self.values.offsets[each]
            contents[:, start : start + as_bytes.shape[1]] = as_bytes


@dataclass(frozen=True)
class EncodedModels:
    """Small models as their files hold them, but for the headers."""

    contents: Tensor
    """Bytes, uint8 [M, n]."""
    not_finite: Sequence[str | None]
    """Of each model the first tensor with NaN or infinite values, if there is one."""

    def __len__(self) -> int:
        return len(self.not_finite)

    def __getitem__(self, some: slice) -> "EncodedModels":
        return EncodedModels(self.contents[some], self.not_finite[some])
