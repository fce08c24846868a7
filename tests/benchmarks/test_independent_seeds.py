"""The benchmark of independent seeds, with few networks and steps: what its table says of known networks."""

from pathlib import Path

import pytest
import torch

from benchmarks.independent_seeds import GENERATED, Measured, between, line, main
from rpg.tasks.digits import DigitsNet, digits_images

pytestmark = pytest.mark.slow


def networks(count: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [DigitsNet(outputs=10).state_dict() for _ in range(count)]


def test_copies_of_originals_are_told_from_new_networks() -> None:
    made = networks(5)
    originals = Measured.of(made[:4])
    # A file may hold the same tensors in another order.
    copy = dict(reversed(made[1].items()))
    copied = line("copies", Measured.of([copy, copy]), originals).split("|")
    assert [cell.strip() for cell in copied[5:9]] == ["0.00", "0.00", "1 of 2", "1.00"]
    other = line("other", Measured.of([made[4], made[0]]), originals).split("|")
    assert float(other[6]) > 0.5


def test_accuracy_is_of_the_test_images() -> None:
    [made] = networks(1)
    network = DigitsNet(outputs=10)
    network.load_state_dict(made)
    test = digits_images()["test"]
    with torch.no_grad():
        right = (network(test.images).argmax(1) == test.classes).double().mean()
    assert float(Measured.of([made]).accuracies) == pytest.approx(float(right))
    assert between([made, made]) == pytest.approx(float(right))


def test_the_table_has_both_collections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["independent_seeds", str(tmp_path / "seeds"), "--networks", "16", "--steps", "2"]
    monkeypatch.setattr("sys.argv", given)
    main()
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines() if row.startswith("| ")][2:]
    assert [row[1].strip() for row in rows] == [
        f"{kind}, {name}{states}"
        for name in ("as they are", "aligned")
        for kind, states in (("originals", ""), ("generated", ", a state each"), ("generated", ", no states"))
    ]
    # Alignment leaves what networks compute as it is.
    assert rows[0][2:4] == rows[3][2:4]
    assert float(rows[0][2]) > 0.9
    assert all(row[7].strip().endswith(f"of {GENERATED}") for row in (rows[1], rows[2], rows[4], rows[5]))
