"""A sample of a generator's centre, so that a page can show how a network differs from it."""

from rpg.collection.layout import Layout

PLACES = 64
"""Values of a tensor that are told at most: enough for a picture, and little for the largest networks."""


def centre_sample(layout: Layout) -> list[tuple[str, list[float]]]:
    """Of each generated tensor its name and `min(numel, PLACES)` values of the mean training checkpoint.

    Value k of n lies at `k * numel // n` of the flattened tensor.
    """
    return [
        (spec.name, [float(flat[k * spec.numel // count]) for k in range(count)])
        for spec in layout.specs
        if spec.tokens
        for flat, count in [(layout.centre[spec.name].view(-1), min(spec.numel, PLACES))]
    ]
