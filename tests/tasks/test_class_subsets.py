"""The numbers of tasks and the held-out ones are those of the published work."""

import pytest

from rpg.tasks.class_subsets import ALL_TASKS, HELD_OUT_TASKS, class_bits, class_tasks

# Copied by hand from the published list.
HELD_OUT = {
    314, 482, 589, 197, 462, 111, 101, 278, 793, 279, 653, 238, 1001, 141, 884, 592, 502, 643, 383, 128,
}  # fmt: skip


def test_the_twenty_held_out_tasks() -> None:
    assert len(HELD_OUT) == 20
    assert set(HELD_OUT_TASKS) == HELD_OUT
    assert len(HELD_OUT_TASKS) == 20


@pytest.mark.parametrize(
    ("task", "bits"),
    [(314, "0100111010"), (1, "0000000001"), (512, "1000000000"), (1022, "1111111110"), (128, "0010000000")],
)
def test_class_bits_are_the_number_in_binary_class_0_first(task: int, bits: str) -> None:
    assert class_bits(task) == [float(bit) for bit in bits]


def test_every_task_has_bits_of_its_own() -> None:
    assert list(ALL_TASKS) == list(range(1, 1023))
    assert len({tuple(class_bits(task)) for task in ALL_TASKS}) == 1022
    assert all(0 < sum(class_bits(task)) < 10 for task in ALL_TASKS)


@pytest.mark.parametrize("validation", [0, 40])
@pytest.mark.parametrize("seed", [0, 7])
def test_splits_never_overlap(validation: int, seed: int) -> None:
    splits = {int(task.name): task.split for task in class_tasks(validation, seed)}
    assert list(splits) == list(ALL_TASKS)
    by_split = {
        name: {task for task, split in splits.items() if split == name}
        for name in ("train", "validation", "heldout")
    }
    assert by_split["heldout"] == HELD_OUT
    assert len(by_split["validation"]) == validation
    assert len(by_split["train"]) == 1022 - 20 - validation
    assert {int(task.name): task.split for task in class_tasks(validation, seed)} == splits
    assert all(task.condition == class_bits(int(task.name)) for task in class_tasks(validation, seed))


def test_validation_tasks_depend_on_the_seed() -> None:
    assert class_tasks(40, 0) != class_tasks(40, 1)
