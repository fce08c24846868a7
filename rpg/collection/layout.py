"""The layout: everything that turns a `state_dict` of one architecture into tokens and back."""

import bisect
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rpg.collection.checkpoint import read_checkpoint, write_checkpoint
from rpg.collection.companions import COMPANIONS_DIRECTORY, Companions, companions_in
from rpg.collection.tensor_spec import TensorKind, TensorSpec, spec_from_json
from rpg.collection.tokens import (
    count_tokens,
    cut,
    denormalise,
    join,
    normalise,
    token_lengths,
    values_per_token,
)
from rpg.config import Normalisation, TokenCut
from rpg.errors import RPGError
from rpg.state_dicts import check_structure, check_ties, owned, same_bits
from rpg.storage.below import check_ordinary_below, path_below
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import read_json, write_json
from rpg.storage.locations import AnyPath

_ENCODED_AT_ONCE = 1 << 20
"""Values whose normalised copies are held at a time."""
LAYOUT_FILE = "layout.json"
CENTRE_FILE = "centre.safetensors"
VERSION = 1
_NO_COMPANIONS = Companions()


class Encoded(NamedTuple):
    """A checkpoint as numbers.

    Attributes:
        tokens: float32 [layout.tokens, token_size]; padding is 0.
        constants: the checkpoint's own values of the tensors that are not tokens; tied ones are left out.
    """

    tokens: Tensor
    constants: dict[str, Tensor]


class Layout:
    """The ordered tensors of one architecture, and how each is normalised.

    `LayoutStatistics.layout` computes one from a collection; `Layout.load` reads one. All work is done on the
    CPU.

    Attributes:
        normalisation: residual (to the collection's centre) or z-score (per tensor, as published).
        token_size: values in a token.
        specs: one for each tensor, in state_dict order.
        tokens: total number of tokens of a checkpoint.
        centre: the mean checkpoint, a state_dict in weight space and each tensor's own dtype; constants have
            the values of the collection's first checkpoint.
        cut: what a token may hold. With `flat` tokens a token can hold values of several tensors: the values
            of all tensors lie in a row, and a tensor's tokens are those that it has a part of.
        companions: the files that lie beside the weights; none where a checkpoint is one file.
    """

    def __init__(
        self,
        normalisation: Normalisation,
        token_size: int,
        specs: Sequence[TensorSpec],
        centre: Mapping[str, Tensor],
        cut: TokenCut = TokenCut.by_tensor,
        companions: Companions = _NO_COMPANIONS,
    ) -> None:
        """Put a layout together from `specs`, placed with this size and cut, and a `centre` of theirs."""
        self.normalisation = normalisation
        self.token_size = token_size
        self.cut = cut
        self.specs = tuple(specs)
        self.centre = dict(centre)
        self.companions = companions
        self._ties = [(spec.name, spec.alias_of) for spec in self.specs if spec.alias_of is not None]
        self._tokenised = [spec for spec in self.specs if spec.tokens]
        self._first_tokens = [spec.first_token for spec in self._tokenised]
        # Where the tensors begin in the row of all values.
        self._starts = [0, *accumulate(spec.numel for spec in self._tokenised)]
        self.tokens = total_tokens(self.specs, token_size, cut)

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle. The centre is arrays, which pickle need not copy as it copies tensors."""
        centre = {
            spec.name: _bytes_of(self.centre[spec.name]) for spec in self.specs if spec.alias_of is None
        }
        return {**self.__dict__, "centre": centre}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled state. The arrays are copied, because Ray's lie in read-only memory."""
        self.__dict__.update(state)
        centre: dict[str, Tensor] = {}
        for spec in self.specs:
            if spec.alias_of is None:
                centre[spec.name] = torch.empty(spec.shape, dtype=spec.dtype)
                _bytes_of(centre[spec.name])[...] = state["centre"][spec.name]
            else:
                centre[spec.name] = centre[spec.alias_of]
        self.centre = centre

    @property
    def constants(self) -> dict[str, Tensor]:
        """The tensors that are not tokens: generated checkpoints get the first checkpoint's values."""
        return {spec.name: self.centre[spec.name] for spec in self.specs if _is_constant(spec)}

    def with_token_size(self, token_size: int, cut: TokenCut | None = None) -> "Layout":
        """The same tensors, equally normalised, cut into tokens of another size, or by another `cut`.

        Raises:
            RPGError: if a token would hold more values than the whole network.
        """
        values = sum(spec.numel for spec in self._tokenised)
        if not 1 <= token_size <= values:
            raise RPGError(
                f"shard.token_size: expected 1 to {values}, the values in the whole network, got {token_size}"
            )
        cut = cut or self.cut
        specs = placed(self.specs, token_size, cut)
        return Layout(self.normalisation, token_size, specs, self.centre, cut, self.companions)

    def with_companions(self, companions: Companions) -> "Layout":
        """The same layout of checkpoints that have these files beside their weights."""
        return Layout(self.normalisation, self.token_size, self.specs, self.centre, self.cut, companions)

    def check_fits(self, state_dict: Mapping[str, Tensor]) -> None:
        """Check that a checkpoint that the layout was not computed from can be stored with it without loss.

        It can if `decode` gives back all that a layout computed with this checkpoint would give back. Integer
        tensors may differ from the layout's, and with z-score so may all tensors that are not tokens, because
        no layout stores them for each checkpoint.

        Raises:
            RPGError: naming the tensor, if names, shapes or dtypes differ from the layout's, if tensors that
                are tied there differ, if a running variance is below the smallest that comes back, or if
                values differ that are equal in all checkpoints that the layout was made from.
        """
        check_structure(state_dict, {spec.name: (spec.shape, spec.dtype) for spec in self.specs})
        check_ties(state_dict, self._ties)
        if self.normalisation != Normalisation.residual:
            return
        for spec in self.specs:
            tensor = state_dict[spec.name]
            if spec.alias_of is not None or not spec.dtype.is_floating_point or not spec.numel:
                continue
            if spec.kind == TensorKind.constant and not same_bits(self.centre[spec.name], tensor):
                raise RPGError(
                    f"tensor '{spec.name}': expected the values that all earlier checkpoints have, "
                    "found others"
                )
            if spec.kind == TensorKind.running_var:
                smallest, floor = float(tensor.min()), spec.floor * spec.pre_mean
                if smallest / spec.pre_mean < spec.floor:
                    raise RPGError(
                        f"tensor '{spec.name}': expected running variances of at least {floor:g}, "
                        f"the smallest of the earlier checkpoints, found {smallest:g}"
                    )

    def encode(self, state_dict: Mapping[str, Tensor]) -> Encoded:
        """Turn a checkpoint into tokens; the order of its tensors does not matter.

        Raises:
            RPGError: naming the tensor, if names, shapes or dtypes differ from the layout's, if tied tensors
                differ, or if a running variance is negative.
        """
        check_structure(state_dict, {spec.name: (spec.shape, spec.dtype) for spec in self.specs})
        check_ties(state_dict, self._ties)
        tokens = torch.zeros(self.tokens, self.token_size)
        in_a_row = tokens.view(-1)
        for spec, start in zip(self._tokenised, self._starts, strict=False):
            flat = state_dict[spec.name].detach().to("cpu").reshape(-1)
            centre, held = self.centre_of(spec), self._held(spec)
            for part in _whole_tokens(spec, held):
                values = normalise(spec, flat[part], None if centre is None else centre[part])
                if self.cut == TokenCut.flat:
                    in_a_row[start + part.start : start + part.stop] = values
                    continue
                rows = cut(values, self.token_size, held)
                first = spec.first_token + part.start // held
                tokens[first : first + len(rows)] = rows
        constants = {spec.name: owned(state_dict[spec.name]) for spec in self.specs if _is_constant(spec)}
        return Encoded(tokens, constants)

    def decode(self, encoded: Encoded) -> dict[str, Tensor]:
        """Turn tokens back into a checkpoint with the layout's order, names, shapes, dtypes and ties.

        Raises:
            RPGError: if the tokens' shape is not the layout's, or naming a constant that is missing or of
                another shape or dtype.
        """
        tokens = encoded.tokens.detach().to("cpu")
        if tuple(tokens.shape) != (self.tokens, self.token_size):
            raise RPGError(
                f"tokens: expected shape [{self.tokens}, {self.token_size}], found {list(tokens.shape)}"
            )
        constants = {spec.name: (spec.shape, spec.dtype) for spec in self.specs if _is_constant(spec)}
        check_structure(encoded.constants, constants)
        decoded = self.decode_many(tokens[None])
        state_dict: dict[str, Tensor] = {}
        for spec in self.specs:
            if spec.alias_of is not None:
                state_dict[spec.name] = state_dict[spec.alias_of]
            elif spec.tokens:
                state_dict[spec.name] = decoded[spec.name][0].reshape(spec.shape)
            else:
                state_dict[spec.name] = owned(encoded.constants[spec.name])
        return state_dict

    def decode_many(self, tokens: Tensor) -> dict[str, Tensor]:
        """Turn the tokens of many checkpoints into weights; the bits are those that `decode` gives.

        Args:
            tokens: [M, tokens, token_size], of any float dtype, on the CPU.

        Returns:
            By name, of each tensor that is tokens: [M, numel], in the tensor's dtype.
        """
        decoded: dict[str, Tensor] = {}
        for spec, start in zip(self._tokenised, self._starts, strict=False):
            if self.cut == TokenCut.flat:
                values = tokens.flatten(1)[:, start : start + spec.numel]
            else:
                rows = tokens[:, spec.first_token : spec.first_token + spec.tokens]
                values = join(rows, spec.numel, self._held(spec))
            decoded[spec.name] = self._decode_values(spec, values)
        return decoded

    def decode_token(self, index: int, values: Tensor) -> list[tuple[TensorSpec, int, Tensor]]:
        """Turn one token into weights without reading any other; the bits are those that `decode` gives.

        Args:
            index: of the token, 0 … tokens − 1.
            values: [token_size], of any float dtype.

        Returns:
            For each tensor that the token holds values of, which is one unless tokens are flat: its spec,
            where in the flattened tensor the values start, and the values, in the tensor's dtype.
        """
        values = values.detach().to("cpu")
        return [
            (spec, start, self._decode_slice(spec, start, values[at : at + length]))
            for spec, start, at, length in self._parts(index)
        ]

    def spec_of(self, index: int) -> TensorSpec:
        """The tensor that a token is part of; of a flat token that holds several, the first."""
        return next(self._parts(index))[0]

    def _parts(self, index: int) -> Iterator[tuple[TensorSpec, int, int, int]]:
        """Which values a token holds: a tensor, where in it they start, where in the token, and how many."""
        if not 0 <= index < self.tokens:
            raise IndexError(f"token {index}: the layout has {self.tokens} tokens")
        if self.cut != TokenCut.flat:
            spec = self._tokenised[bisect.bisect_right(self._first_tokens, index) - 1]
            held = self._held(spec)
            start = (index - spec.first_token) * held
            yield spec, start, 0, min(held, spec.numel - start)
            return
        first = index * self.token_size
        tensor = bisect.bisect_right(self._starts, first) - 1
        while tensor < len(self._tokenised) and self._starts[tensor] < first + self.token_size:
            begin = max(first, self._starts[tensor])
            end = min(first + self.token_size, self._starts[tensor + 1])
            yield self._tokenised[tensor], begin - self._starts[tensor], begin - first, end - begin
            tensor += 1

    def _held(self, spec: TensorSpec) -> int:
        """Values of a tensor in each of its tokens, unless tokens are flat."""
        return values_per_token(spec.shape, self.token_size, self.cut)

    def positions(self) -> Tensor:
        """Int64 [tokens, 2]: index among the tokenised tensors, and index of the token within its tensor.

        Flat tokens belong to no tensor: the first index is 0, and the second counts all tokens.
        """
        if self.cut == TokenCut.flat:
            return torch.stack(
                [torch.zeros(self.tokens, dtype=torch.int64), torch.arange(self.tokens)], dim=1
            )
        counts = torch.tensor([spec.tokens for spec in self._tokenised], dtype=torch.int64)
        tensor = torch.repeat_interleave(torch.arange(len(counts)), counts)
        first = torch.tensor(self._first_tokens, dtype=torch.int64)
        return torch.stack([tensor, torch.arange(self.tokens) - first[tensor]], dim=1)

    def lengths(self) -> Tensor:
        """Int64 [tokens]: values in each token, without padding."""
        if self.cut == TokenCut.flat:
            return token_lengths(self._starts[-1], self.token_size)
        lengths = [token_lengths(spec.numel, self._held(spec)) for spec in self._tokenised]
        return torch.cat([torch.empty(0, dtype=torch.int64), *lengths])

    def mask(self) -> Tensor:
        """Bool [tokens, token_size]: True where a token holds a value, False where padding."""
        return torch.arange(self.token_size) < self.lengths()[:, None]

    def digest(self) -> str:
        """Hexadecimal SHA-256 over the layout, centre and companions included."""
        return self._digest

    def save(self, directory: AnyPath) -> None:
        """Write `layout.json`, `centre.safetensors` and, if there are any, `companions/`.

        Raises:
            RPGError: naming the file, if the file system refuses.
        """
        write_checkpoint(directory / CENTRE_FILE, self.centre, {"kind": "centre"})
        self.companions.write(directory / COMPANIONS_DIRECTORY)
        write_json(directory / LAYOUT_FILE, self._to_json())

    @classmethod
    def load(cls, directory: AnyPath) -> "Layout":
        """Read what `save` wrote.

        Raises:
            RPGError: naming the file, if it is missing, of another version, not consistent in itself, or if
                the centre or a companion is not the layout's own.
        """
        path = directory / LAYOUT_FILE
        content = read_json(path, "a layout", root=directory)
        specs = _read_specs(content, str(path))
        centre_path = directory / CENTRE_FILE
        try:
            with path_below(directory, CENTRE_FILE) as local:
                # Copied, because the tensors are mapped from the file and would change with it.
                stored = {name: owned(tensor) for name, tensor in read_checkpoint(local).items()}
        except OSError as error:
            why = (
                "not found; expected a checkpoint" if isinstance(error, FileNotFoundError) else error.strerror
            )
            raise RPGError(f"{centre_path}: {why}") from error
        try:
            check_structure(stored, {spec.name: (spec.shape, spec.dtype) for spec in specs})
        except RPGError as error:
            raise RPGError(f"{centre_path}: not the centre of {LAYOUT_FILE}: {error}") from error
        centre: dict[str, Tensor] = {}
        for spec in specs:
            centre[spec.name] = stored[spec.name] if spec.alias_of is None else centre[spec.alias_of]
        if "companions" in content:
            # Beside a user's own checkpoints there may be links, but not in what RPG wrote.
            with storage_errors_for(directory):
                check_ordinary_below(directory, COMPANIONS_DIRECTORY)
        companions = companions_in(directory / COMPANIONS_DIRECTORY, content.get("companions", {}), str(path))
        normalisation = Normalisation(content["normalisation"])
        layout = cls(normalisation, content["token_size"], specs, centre, _cut_of(content), companions)
        if layout._centre_digest != content["centre_sha256"]:
            raise RPGError(
                f"{centre_path}: expected the centre that {LAYOUT_FILE} was written with, found another"
            )
        return layout

    def centre_of(self, spec: TensorSpec) -> Tensor | None:
        """The values [numel] that a tensor's are differences from; None for z-score."""
        if self.normalisation == Normalisation.zscore:
            return None
        return self.centre[spec.name].view(-1)

    def _decode_values(self, spec: TensorSpec, values: Tensor) -> Tensor:
        """Values [M, numel] of one tensor to weights."""
        if spec.kind != TensorKind.running_var:
            return self._decode_slice(spec, 0, values)
        # exp and log may round differently at the end of a vector than within it. Tokens are decoded one by
        # one, so that the bits are those of decode_token.
        tokens = range(spec.first_token, spec.first_token + spec.tokens)
        parts = [part for token in tokens for part in self._parts(token) if part[0] is spec]
        weights = torch.empty(values.shape, dtype=spec.dtype)
        for row, decoded in zip(values, weights, strict=True):
            for _, start, _, length in parts:
                place = slice(start, start + length)
                decoded[place] = self._decode_slice(spec, start, row[place])
        return weights

    def _decode_slice(self, spec: TensorSpec, start: int, values: Tensor) -> Tensor:
        centre = self.centre_of(spec)
        if centre is not None:
            centre = centre[start : start + values.shape[-1]]
        return denormalise(spec, values, centre)

    @cached_property
    def _centre_digest(self) -> str:
        digest = hashlib.sha256()
        for spec in self.specs:
            if spec.alias_of is None and spec.numel:
                digest.update(_bytes_of(self.centre[spec.name]).data)
        return digest.hexdigest()

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._to_json(), sort_keys=True).encode()).hexdigest()

    def _to_json(self) -> dict[str, Any]:
        # Layouts of earlier versions have no key for how they are cut.
        cut = {} if self.cut == TokenCut.by_tensor else {"cut": self.cut.value}
        return {
            **cut,
            "version": VERSION,
            "normalisation": self.normalisation.value,
            "token_size": self.token_size,
            "tokens": self.tokens,
            "centre_sha256": self._centre_digest,
            **({"companions": self.companions.digests} if self.companions else {}),
            "tensors": [spec.to_json() for spec in self.specs],
        }


def _bytes_of(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """A contiguous tensor's memory, [bytes]."""
    values: npt.NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
    return values


def placed(
    specs: Sequence[TensorSpec], token_size: int, cut: TokenCut = TokenCut.by_tensor
) -> list[TensorSpec]:
    """The same tensors, cut into tokens of `token_size` values: `first_token` and `tokens` are set anew."""
    result, next_token, values = [], 0, 0
    for spec in specs:
        if spec.kind == TensorKind.constant or spec.alias_of is not None or not spec.numel:
            result.append(replace(spec, first_token=next_token, tokens=0))
            continue
        if cut == TokenCut.flat:
            first, values = values // token_size, values + spec.numel
            # The next tensor goes on in the last of this one's tokens, unless that is full.
            tokens, next_token = count_tokens(values, token_size) - first, values // token_size
        else:
            held = values_per_token(spec.shape, token_size, cut)
            first, tokens = next_token, count_tokens(spec.numel, held)
            next_token += tokens
        result.append(replace(spec, first_token=first, tokens=tokens))
    return result


def total_tokens(specs: Sequence[TensorSpec], token_size: int, cut: TokenCut) -> int:
    """How many tokens `placed` tensors have together."""
    if cut == TokenCut.flat:
        return count_tokens(sum(spec.numel for spec in specs if spec.tokens), token_size)
    return sum(spec.tokens for spec in specs)


def _whole_tokens(spec: TensorSpec, held: int) -> Iterator[slice]:
    """A tensor's values in pieces of whole tokens, `held` values each.

    A running variance is one piece, since a logarithm may round differently at the end of a piece.
    """
    step = spec.numel if spec.kind == TensorKind.running_var else max(1, _ENCODED_AT_ONCE // held) * held
    return (slice(start, min(start + step, spec.numel)) for start in range(0, spec.numel, step))


def _is_constant(spec: TensorSpec) -> bool:
    return spec.kind == TensorKind.constant and spec.alias_of is None


def _read_specs(content: Any, source: str) -> list[TensorSpec]:
    if not isinstance(content, dict):
        raise RPGError(f"{source}: expected a layout, a JSON object, found {type(content).__name__}")
    if content.get("version") != VERSION:
        raise RPGError(f"{source}: version: expected {VERSION}, got {content.get('version')!r}")
    keys = {"version", "normalisation", "token_size", "tokens", "centre_sha256", "tensors"}
    if missing := sorted(keys - set(content)):
        raise RPGError(f"{source}: key '{missing[0]}' is missing")
    if unknown := sorted(set(content) - keys - {"companions", "cut"}):
        raise RPGError(f"{source}: unknown key '{unknown[0]}'")
    if content["normalisation"] not in list(Normalisation):
        raise RPGError(
            f"{source}: normalisation: expected one of {', '.join(Normalisation)}, "
            f"got {content['normalisation']!r}"
        )
    if content.get("cut", TokenCut.by_tensor) not in list(TokenCut):
        raise RPGError(f"{source}: cut: expected one of {', '.join(TokenCut)}, got {content['cut']!r}")
    token_size = content["token_size"]
    if type(token_size) is not int or token_size < 1:
        raise RPGError(f"{source}: token_size: expected an integer of at least 1, got {token_size!r}")
    if not isinstance(content["tensors"], list) or not content["tensors"]:
        raise RPGError(f"{source}: tensors: expected a list of at least one tensor")
    specs = [spec_from_json(value, source) for value in content["tensors"]]
    _check_consistent(specs, token_size, _cut_of(content), content["tokens"], source)
    return specs


def _cut_of(content: dict[str, Any]) -> TokenCut:
    return TokenCut(content.get("cut", TokenCut.by_tensor))


def _check_consistent(
    specs: list[TensorSpec], token_size: int, cut: TokenCut, tokens: Any, source: str
) -> None:
    earlier: dict[str, TensorSpec] = {}
    for spec, expected in zip(specs, placed(specs, token_size, cut), strict=True):
        if spec.name in earlier:
            raise RPGError(f"{source}: tensor '{spec.name}' is listed twice")
        if spec.alias_of is not None:
            first = earlier.get(spec.alias_of)
            if first is None or (first.alias_of, first.shape, first.dtype) != (None, spec.shape, spec.dtype):
                raise RPGError(
                    f"{source}: tensor '{spec.name}': alias_of: expected an earlier tensor of the same shape "
                    f"and dtype, got '{spec.alias_of}'"
                )
        tokenised = spec.kind != TensorKind.constant and spec.alias_of is None
        if tokenised and not spec.dtype.is_floating_point:
            raise RPGError(f"{source}: tensor '{spec.name}': kind: expected constant, got {spec.kind}")
        if spec != expected:
            raise RPGError(
                f"{source}: tensor '{spec.name}': expected first_token and tokens "
                f"{(expected.first_token, expected.tokens)}, got {(spec.first_token, spec.tokens)}"
            )
        earlier[spec.name] = spec
    total = total_tokens(specs, token_size, cut)
    if tokens != total:
        raise RPGError(f"{source}: tokens: expected {total}, the sum over tensors, got {tokens!r}")
