"""Which axes of a network's tensors can be permuted together without a change to what the network computes.

Hidden units have no order: when the outputs of one layer are permuted, and the inputs of all that read them
likewise, the network computes the same. These groups of axes are found in the graph of the network's
operations, which is traced with an example: every axis of a tensor is followed from operation to operation,
and axes that meet belong together. Where an operation is not known here, or depends on the order (as heads of
attention do on the places of their values), the axes that reach it keep their order. So a group may be
missed, but none is made up.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from rpg.errors import RPGError, one_line

_aten = torch.ops.aten


@dataclass(frozen=True)
class AxisOfTensor:
    """An axis of a checkpoint's tensor.

    Attributes:
        tensor: its name.
        dimension: of the axis.
        block: values that stay together: the axis has a group's size times so many. It is more than 1 where a
            feature map of several places has been flattened.
    """

    tensor: str
    dimension: int
    block: int = 1


@dataclass(frozen=True)
class PermutationGroup:
    """Axes that one permutation of `size` units applies to."""

    size: int
    axes: tuple[AxisOfTensor, ...]


def permutation_groups(network: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[PermutationGroup]:
    """The groups of a network, in the order of its tensors.

    Args:
        network: in evaluation mode; its parameters and buffers are followed.
        run: runs the network that it is given on an example, and returns what it answers.

    Raises:
        RPGError: if the network cannot be traced.
    """
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    state = {name: value.detach() for name, value in state.items()}

    def compute(*values: Tensor) -> Tensor:
        return run(_WithState(network, dict(zip(state, values, strict=True))))

    try:
        with torch.no_grad():
            graph = make_fx(compute)(*state.values()).graph
    except Exception as error:
        raise RPGError(f"the network's operations cannot be traced: {one_line(error)[:300]}") from error
    found = _Axes()
    placeholders = iter(state.items())
    known: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name, value = next(placeholders)
            known[node] = [found.new(name, dimension, size) for dimension, size in enumerate(value.shape)]
        elif node.op == "output":
            found.freeze_all(_axes_in(node.args, known))
        elif node.op == "get_attr":
            known[node] = None
        else:
            known[node] = _followed(node, known, found)
    return found.groups()


class _WithState(nn.Module):
    """A network with other parameters and buffers."""

    def __init__(self, network: nn.Module, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        # As an attribute of a list, the network is no submodule, whose parameters would be looked for.
        self._network = [network]
        self._state = dict(state)

    def forward(self, *arguments: Any) -> Any:
        return functional_call(self._network[0], self._state, arguments)


@dataclass(frozen=True)
class _Axis:
    """An axis of an intermediate value: that of a unit's number, each unit `block` times in a row."""

    number: int
    block: int = 1


_Shape = list["_Axis | None"]
"""One entry a dimension; None where the order is fixed."""


@dataclass
class _Axes:
    """Axes of tensors, and which of them belong together: disjoint sets."""

    tensors: list[AxisOfTensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    parents: list[tuple[int, int]] = field(default_factory=list)
    """The number of another axis, and how many values of this one each of its units stands for."""
    frozen: list[bool] = field(default_factory=list)

    def new(self, tensor: str, dimension: int, size: int) -> _Axis:
        """An axis that belongs to no other yet."""
        number = len(self.tensors)
        self.tensors.append(AxisOfTensor(tensor, dimension))
        self.sizes.append(size)
        self.parents.append((number, 1))
        self.frozen.append(False)
        return _Axis(number)

    def root(self, number: int) -> tuple[int, int]:
        """The axis that stands for the set, and how many values of this one each of its units stands for."""
        block = 1
        while self.parents[number][0] != number:
            number, times = self.parents[number]
            block *= times
        return number, block

    def freeze(self, axis: _Axis | None) -> None:
        """Keep the order of an axis."""
        if axis is not None:
            self.frozen[self.root(axis.number)[0]] = True

    def freeze_all(self, axes: Sequence[_Axis | None]) -> None:
        """Keep the order of several axes."""
        for axis in axes:
            self.freeze(axis)

    def join(self, *axes: _Axis | None) -> None:
        """Have axes belong together; if the order of one is fixed, that of all is."""
        if None in axes:
            self.freeze_all(axes)
            return
        first = axes[0]
        for other in axes[1:]:
            assert first is not None
            assert other is not None
            self._join(first, other)

    def _join(self, one: _Axis, other: _Axis) -> None:
        (a, a_block), (b, b_block) = self.root(one.number), self.root(other.number)
        a_block, b_block = a_block * one.block, b_block * other.block
        if a == b:
            if a_block != b_block:
                self.frozen[a] = True
            return
        if self.sizes[a] * a_block != self.sizes[b] * b_block or (a_block % b_block and b_block % a_block):
            self.frozen[a] = self.frozen[b] = True
            return
        if a_block < b_block:
            a, a_block, b, b_block = b, b_block, a, a_block
        # The set with fewer units stands for both.
        self.parents[b] = (a, a_block // b_block)
        self.frozen[a] |= self.frozen[b]

    def groups(self) -> list[PermutationGroup]:
        """The sets of more than one unit whose order is free."""
        members: dict[int, list[AxisOfTensor]] = {}
        for number, axis in enumerate(self.tensors):
            root, block = self.root(number)
            members.setdefault(root, []).append(AxisOfTensor(axis.tensor, axis.dimension, block))
        return [
            PermutationGroup(self.sizes[root], tuple(axes))
            for root, axes in members.items()
            if not self.frozen[root] and self.sizes[root] > 1
        ]


def _axes_in(arguments: Any, known: Mapping[Node, Any]) -> list[_Axis | None]:
    """All axes of all values among some arguments."""
    found: list[_Axis | None] = []

    def collect(value: Any) -> None:
        if isinstance(value, Node):
            collect(known[value])
        elif isinstance(value, _Axis):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            for each in value:
                collect(each)
        elif isinstance(value, dict):
            collect(list(value.values()))

    collect(arguments)
    return found


def _sizes(node: Any) -> list[int]:
    value = node.meta["val"]
    return list(value.shape)


def _followed(node: Node, known: Mapping[Node, Any], axes: _Axes) -> Any:
    """The axes of what a node computes: one list, or one for each of its results."""

    def of(argument: Any) -> _Shape:
        shape = known[argument]
        return [None] * len(_sizes(argument)) if shape is None else list(shape)

    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, Node)
        return known[source][index]
    packet = getattr(node.target, "overloadpacket", node.target)
    if packet in _ELEMENTWISE:
        return _elementwise(node, of, axes)
    rule = _RULES.get(packet)
    shape = rule(node, of, axes) if rule else None
    if shape is None:
        axes.freeze_all(_axes_in([node.args, node.kwargs], known))
        value = node.meta["val"]
        if isinstance(value, (list, tuple)):
            return [[None] * each.ndim if isinstance(each, Tensor) else None for each in value]
        return [None] * value.ndim if isinstance(value, Tensor) else None
    return shape


_Of = Callable[[Any], _Shape]
_Rule = Callable[[Node, _Of, _Axes], Any]
"""Returns the axes of the results, or None where the order of all axes is to be kept."""


def _elementwise(node: Node, of: _Of, axes: _Axes) -> _Shape:
    sizes = _sizes(node)
    result: _Shape = [None] * len(sizes)
    inputs = [each for each in (*node.args, *node.kwargs.values()) if isinstance(each, Node)]
    for dimension, size in enumerate(sizes):
        meeting = []
        for each in inputs:
            own = _sizes(each)
            place = dimension - len(sizes) + len(own)
            # What is broadcast is the same for all units.
            if place >= 0 and own[place] == size:
                meeting.append(of(each)[place])
        axes.join(*meeting)
        result[dimension] = next((axis for axis in meeting if axis is not None), None)
        if None in meeting:
            result[dimension] = None
    return result


def _same(node: Node, of: _Of, axes: _Axes) -> _Shape:
    return of(node.args[0])


def _first_two(node: Node, of: _Of, axes: _Axes) -> Any:
    """Pooling: samples and channels stay, places do not."""
    value = node.meta["val"]
    source = of(node.args[0])
    many = isinstance(value, (list, tuple))
    count = (value[0] if many else value).ndim
    shape = [*source[: count - 2], None, None]
    return [shape, [None] * count] if many else shape


def _convolution(node: Node, of: _Of, axes: _Axes) -> _Shape | None:
    inputs, weight, bias, _, _, _, transposed, _, groups = node.args
    if transposed:
        return None
    w, x = of(weight), of(inputs)
    size = _sizes(weight)
    axes.freeze_all(w[2:])
    if groups == 1:
        axes.join(x[1], w[1])
    elif groups == size[0] and size[1] == 1:
        axes.join(x[1], w[0])
        axes.freeze(w[1])
    else:
        return None
    if bias is not None:
        axes.join(w[0], of(bias)[0])
    return [x[0], w[0], *[None] * (len(size) - 2)]


def _batch_norm(node: Node, of: _Of, axes: _Axes) -> Any:
    inputs, *parameters = node.args[:5]
    x = of(inputs)
    axes.join(x[1], *[of(each)[0] for each in parameters if each is not None])
    return [x, *[[None]] * (len(node.meta["val"]) - 1)]


def _layer_norm(node: Node, of: _Of, axes: _Axes) -> Any:
    inputs, normalised, *parameters = node.args[:4]
    if len(normalised) != 1:  # type: ignore[arg-type]
        return None
    x = of(inputs)
    axes.join(x[-1], *[of(each)[0] for each in parameters if each is not None])
    return [x, [None] * len(x), [None] * len(x)]


def _group_norm(node: Node, of: _Of, axes: _Axes) -> Any:
    inputs, weight, bias, *_, groups, _ = node.args
    if groups != 1:
        return None
    x = of(inputs)
    axes.join(x[1], *[of(each)[0] for each in (weight, bias) if each is not None])
    return [x, [None] * 2, [None] * 2]


def _addmm(node: Node, of: _Of, axes: _Axes) -> _Shape:
    bias, left, right = node.args[:3]
    a, b = of(left), of(right)
    axes.join(a[1], b[0])
    axes.join(of(bias)[-1], b[1])
    return [a[0], b[1]]


def _mm(node: Node, of: _Of, axes: _Axes) -> _Shape:
    left, right = node.args[:2]
    a, b = of(left), of(right)
    axes.join(a[1], b[0])
    return [a[0], b[1]]


def _transpose(node: Node, of: _Of, axes: _Axes) -> _Shape:
    shape = of(node.args[0])
    if len(node.args) == 1:
        return shape[::-1]
    places: Any = node.args[1]
    if isinstance(places, (list, tuple)):
        return [shape[place] for place in places]
    first, second = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    shape[first], shape[second] = shape[second], shape[first]
    return shape


def _reduction(node: Node, of: _Of, axes: _Axes) -> _Shape:
    """A mean or sum over some dimensions, which does not depend on the order along them."""
    shape = of(node.args[0])
    given: Any = node.args[1] if len(node.args) > 1 else None
    reduced = [place % len(shape) for place in given or range(len(shape))]
    if len(node.meta["val"].shape) == len(shape):
        return [None if place in reduced else axis for place, axis in enumerate(shape)]
    return [axis for place, axis in enumerate(shape) if place not in reduced]


def _view(node: Node, of: _Of, axes: _Axes) -> _Shape | None:
    """Dimensions that stay, and channels that are flattened with the places behind them, or taken apart."""
    source, shape = _sizes(node.args[0]), of(node.args[0])
    target = _sizes(node)
    result: _Shape = [None] * len(target)
    i = j = 0
    while i < len(source) and j < len(target):
        i_end, j_end = i + 1, j + 1
        while prod(source[i:i_end]) != prod(target[j:j_end]):
            if prod(source[i:i_end]) < prod(target[j:j_end]):
                i_end += 1
            else:
                j_end += 1
        found = _regrouped(source[i:i_end], shape[i:i_end], target[j:j_end], axes)
        result[j:j_end] = found
        i, j = i_end, j_end
    axes.freeze_all([axis for axis, size in zip(shape[i:], source[i:], strict=True) if size > 1])
    return result


def _regrouped(source: list[int], shape: _Shape, target: list[int], axes: _Axes) -> _Shape:
    """The axes of one part of a view: `source` and `target` have equally many values."""
    free = [place for place, size in enumerate(source) if size > 1]
    made = [place for place, size in enumerate(target) if size > 1]
    result: _Shape = [None] * len(target)
    if not free or not made:
        return result
    first, rest = shape[free[0]], [shape[place] for place in free[1:]]
    behind = prod(source[place] for place in free[1:])
    if first is None or any(axis is not None for axis in rest):
        axes.freeze_all(shape)
        return result
    block = first.block * behind
    inner = prod(target[place] for place in made[1:])
    if block % inner:
        axes.freeze(first)
        return result
    result[made[0]] = _Axis(first.number, block // inner)
    return result


def _expand(node: Node, of: _Of, axes: _Axes) -> _Shape:
    source, shape, target = _sizes(node.args[0]), of(node.args[0]), _sizes(node)
    added = len(target) - len(source)
    return [None] * added + [
        axis if source[place] == target[added + place] else None for place, axis in enumerate(shape)
    ]


def _unsqueeze(node: Node, of: _Of, axes: _Axes) -> _Shape:
    shape = of(node.args[0])
    place = int(node.args[1]) % (len(shape) + 1)  # type: ignore[arg-type]
    return [*shape[:place], None, *shape[place:]]


def _squeeze(node: Node, of: _Of, axes: _Axes) -> _Shape:
    shape, sizes = of(node.args[0]), _sizes(node.args[0])
    given: Any = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    places = [place % len(shape) for place in (given if isinstance(given, (list, tuple)) else [given])]
    return [axis for place, axis in enumerate(shape) if not (place in places and sizes[place] == 1)]


def _cat(node: Node, of: _Of, axes: _Axes) -> _Shape:
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    shapes = [of(part) for part in parts]
    along = int(node.args[1]) % len(shapes[0]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    result: _Shape = []
    for place, meeting in enumerate(zip(*shapes, strict=True)):
        if place == along:
            axes.freeze_all(meeting)
            result.append(None)
        else:
            axes.join(*meeting)
            result.append(None if None in meeting else meeting[0])
    return result


def _slice(node: Node, of: _Of, axes: _Axes) -> _Shape:
    shape = of(node.args[0])
    place = int(node.args[1]) % len(shape) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    if _sizes(node)[place] != _sizes(node.args[0])[place]:
        axes.freeze(shape[place])
        shape[place] = None
    return shape


def _select(node: Node, of: _Of, axes: _Axes) -> _Shape:
    shape = of(node.args[0])
    axes.freeze(shape.pop(int(node.args[1])))  # type: ignore[arg-type]
    return shape


_ELEMENTWISE = {
    _aten.add, _aten.sub, _aten.mul, _aten.div, _aten.relu, _aten.gelu, _aten.silu, _aten.sigmoid, _aten.tanh,
    _aten.hardtanh, _aten.hardswish, _aten.hardsigmoid, _aten.elu, _aten.leaky_relu, _aten.clamp,
    _aten.clamp_min, _aten.clamp_max, _aten.neg, _aten.exp, _aten.sqrt, _aten.rsqrt, _aten.pow, _aten.erf,
    _aten.softplus, _aten.mish, _aten.maximum, _aten.minimum, _aten.add_, _aten.relu_, _aten.hardtanh_,
    _aten.hardswish_, _aten.silu_, _aten.mul_, _aten.leaky_relu_,
}  # fmt: skip
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(
        (_aten.clone, _aten.detach, _aten.alias, _aten._to_copy, _aten.contiguous, _aten._softmax),
        _same,
    ),
    **dict.fromkeys(
        (_aten.max_pool2d_with_indices, _aten.avg_pool2d, _aten._adaptive_avg_pool2d), _first_two
    ),
    **dict.fromkeys((_aten.mean, _aten.sum, _aten.amax), _reduction),
    **dict.fromkeys((_aten.t, _aten.permute, _aten.transpose), _transpose),
    **dict.fromkeys((_aten.view, _aten._unsafe_view, _aten.reshape), _view),
    _aten.convolution: _convolution,
    **dict.fromkeys(
        (_aten._native_batch_norm_legit_no_training, _aten._native_batch_norm_legit, _aten.native_batch_norm),
        _batch_norm,
    ),
    _aten.native_layer_norm: _layer_norm,
    _aten.native_group_norm: _group_norm,
    _aten.addmm: _addmm,
    _aten.mm: _mm,
    _aten.cat: _cat,
    _aten.slice: _slice,
    _aten.select: _select,
    _aten.expand: _expand,
    _aten.unsqueeze: _unsqueeze,
    _aten.squeeze: _squeeze,
}
"""By operation. What is in neither table keeps the order of all axes that reach it."""
