"""How well the forms are understood that people ask in: a table as Markdown.

    python benchmarks/words_forms.py models/cifar10-words … --encoder all-MiniLM-L6-v2/

Descriptions are made of class names and of facts that were learnt from, so that the form is what is new.
Their bits are worked out here, apart from what writes the descriptions that are learnt from.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch

from rpg.words.facts import Fact, Form, facts
from rpg.words.measuring import measure
from rpg.words.properties import CLASSES, class_names
from rpg.words.sentences import SentenceUnderstanding

NUMBER = 200
ALL = set(range(len(CLASSES)))
VEHICLES = {CLASSES.index(name) for name in ("airplane", "automobile", "ship", "truck")}
ANIMALS = ALL - VEHICLES
# Behind "things that do not" these would need other words.
NOT_VERBS = ("can", "are", "were", "do not", "never", "have", "lack", "need", "seldom", "must")


class Forms:
    """Descriptions of every form with the classes that they mean."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        known = [each for each in facts() if not all(each.bits)]
        self.have = [each for each in known if each.form is Form.have]
        self.do = [each for each in known if each.form is Form.do and not each.text.startswith(NOT_VERBS)]

    def name(self, i: int) -> str:
        """One of a class's names in the plural."""
        return self.chance.choice(class_names()[i].names).plural

    def of_names(self, form: str, few: int, meant: Callable[..., set[int]]) -> tuple[str, set[int]]:
        """A form with `few` names of different classes."""
        chosen = self.chance.sample(sorted(ALL), few)
        return form.format(*map(self.name, chosen)), meant(*chosen)

    def of_animals(self, form: str, few: int, meant: Callable[..., set[int]]) -> tuple[str, set[int]]:
        """A form with `few` names of different animals."""
        chosen = self.chance.sample(sorted(ANIMALS), few)
        return form.format(*map(self.name, chosen)), meant(*chosen)

    def of_fact(self, form: str, table: list[Fact], has: bool) -> tuple[str, set[int]]:
        """A form with a fact that is to hold, or not."""
        fact = self.chance.choice(table)
        return form.format(fact.text), {i for i in ALL if bool(fact.bits[i]) == has}

    def mistyped(self) -> tuple[str, set[int]]:
        """A name with two neighbouring letters swapped."""
        long = [(i, name.plural) for i in ALL for name in class_names()[i].names if len(name.plural) >= 5]
        i, name = self.chance.choice(long)
        k = self.chance.randrange(1, len(name) - 2)
        return f"find all {name[:k]}{name[k + 1]}{name[k]}{name[k + 2 :]}", {i}

    def either(self) -> tuple[str, set[int]]:
        """Two facts."""
        (first, a), (second, b) = self.of_fact("{}", self.have, True), self.of_fact("{}", self.do, True)
        return f"things with {first} or things that {second}", a | b

    def table(self) -> dict[str, Callable[[], tuple[str, set[int]]]]:
        """How to make a description of every form."""
        return {
            "A vs everything else": lambda: self.of_names("{} vs everything else", 1, lambda a: {a}),
            "exclude A and B": lambda: self.of_names("exclude {} and {}", 2, lambda a, b: ALL - {a, b}),
            "the opposite of A": lambda: self.of_names("the opposite of {}", 1, lambda a: ALL - {a}),
            "non-A": lambda: self.of_names("non-{}", 1, lambda a: ALL - {a}),
            "A and B, no D": lambda: self.of_names("{} and {}, no {}", 3, lambda a, b, d: {a, b}),
            "A or B but not D": lambda: self.of_names("{} or {} but not {}", 3, lambda a, b, d: {a, b}),
            "vehicles and A": lambda: self.of_animals("vehicles and {}", 1, lambda a: VEHICLES | {a}),
            "vehicles, A and B": lambda: self.of_animals(
                "vehicles, {} and {}", 2, lambda a, b: VEHICLES | {a, b}
            ),
            "things that DO": lambda: self.of_fact("things that {}", self.do, True),
            "things that do not DO": lambda: self.of_fact("things that do not {}", self.do, False),
            "things without X": lambda: self.of_fact("things without {}", self.have, False),
            "everything but things with X": lambda: self.of_fact(
                "everything but things with {}", self.have, False
            ),
            "things with X or things that DO": self.either,
            "a name with swapped letters": self.mistyped,
        }


def main() -> None:
    """Measure every directory, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    understandings = [SentenceUnderstanding.load(each, options.encoder) for each in options.directories]
    columns = [f"{each.name}: all ten right | sure and wrong" for each in options.directories]
    print(f"| form | {' | '.join(columns)} |\n| --- |" + " ---: | ---: |" * len(columns))
    for form, make in Forms(options.seed).table().items():
        rows = [make() for _ in range(NUMBER)]
        bits = torch.tensor([[float(i in meant) for i in sorted(ALL)] for _, meant in rows])
        cells = []
        for each in understandings:
            found = measure(each.encoder, each.head, [text for text, _ in rows], bits)
            wrong = found.right < 1
            sure = found.sureness >= each.head.calibration.least_sureness
            cells.append(f"{float((~wrong).float().mean()):.2f} | {float((sure & wrong).float().mean()):.2f}")
        print(f"| {form} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
