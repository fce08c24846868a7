"""Conditions: from names, CSV and JSON; wrong rows are named."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpg.collection.conditions import UPSTREAM_PATTERN, NameFacts, NamePattern, bits, read_conditions
from rpg.collection.tables import check_files
from rpg.errors import RPGError

BITS_314 = [0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0]


class TestBits:
    def test_the_bits_of_314(self) -> None:
        assert bits(314, 10) == BITS_314

    @given(st.integers(1, 1022))
    def test_against_powers_of_two(self, number: int) -> None:
        assert sum(bit * 2 ** (9 - i) for i, bit in enumerate(bits(number, 10))) == number

    @pytest.mark.parametrize("number", [0, 1023, 1024, -1])
    def test_no_class_and_all_classes_are_refused(self, number: int) -> None:
        with pytest.raises(RPGError, match="expected 1 to 1022"):
            bits(number, 10)


class TestPattern:
    @pytest.mark.parametrize(
        "name",
        [
            "0000_acc0.9613_class0314_condition_cifar10_vittiny.pth",
            "12_acc0.9613_class314_x.safetensors",
            "0000_acc0.9613_class0314.pt",
            "0000_acc0.9613_class0314",
        ],
    )
    def test_names_of_the_published_model_are_read(self, name: str) -> None:
        facts = NamePattern(UPSTREAM_PATTERN).read(name)
        assert facts is not None
        assert facts.condition == BITS_314
        assert facts.metrics == {"acc": 0.9613}

    @pytest.mark.parametrize("name", ["class0314.pt", "x_acc0.9_class3.pt", "0_acc0.9_classy.pt", "model.pt"])
    def test_other_names_do_not_match_the_published_pattern(self, name: str) -> None:
        assert NamePattern(UPSTREAM_PATTERN).read(name) is None

    @pytest.mark.parametrize(
        "pattern",
        [
            "{index}_acc{acc}_class{class:bits10}_{rest}.pth",
            "{index}_acc{acc}_class{class:bits10}_{rest}",
            "{}_acc{acc}_class{class:bits10}_{rest}".replace("{}", "{i}"),
            r"(?P<index>\d+)_acc(?P<acc>[\d.]+)_class(?P<class__bits10>\d+)_.*",
        ],
    )
    def test_templates_and_regular_expressions(self, pattern: str) -> None:
        facts = NamePattern(pattern).read("0000_acc0.9613_class0314_cifar10_vit.pth")
        assert facts is not None
        assert facts.condition == BITS_314
        assert facts.metrics == {"acc": 0.9613}

    @pytest.mark.parametrize(
        ("pattern", "name", "condition", "metrics"),
        [
            ("{task:digits}_{seed}", "0101_3.safetensors", [0, 1, 0, 1], {}),
            (
                "lr{lr:value}_wd{wd:value}_loss{loss}",
                "lr1e-3_wd-2.5_loss0.25.pt",
                [0.001, -2.5],
                {"loss": 0.25},
            ),
            ("f1_{f1:metric}_{c:value}.pt", "f1_0.5_7.pt", [7], {"f1": 0.5}),
            ("{a:bits2}{b}{c:bits3}", "2x5", [1, 0, 1, 0, 1], {}),
            ("{name}", "model.pt", None, {}),
            ("a.b{c:value}", "a.b3.5.pth", [3.5], {}),
            (r"(?P<my_task__digits>[01]+)\.pt", "011.pt", [0, 1, 1], {}),
        ],
    )
    def test_each_kind_reads_its_form(
        self, pattern: str, name: str, condition: list[float] | None, metrics: dict[str, float]
    ) -> None:
        facts = NamePattern(pattern).read(name)
        assert facts is not None
        assert facts.condition == condition
        assert facts.metrics == metrics

    def test_a_permutation_state_is_no_part_of_the_condition(self) -> None:
        facts = NamePattern("task{class:bits10}_copy{copy:state}").read("task0314_copy12.safetensors")
        assert facts == NameFacts(BITS_314, {}, 12)
        assert NamePattern("{copy:state}").read("3.pt") == NameFacts(None, {}, 3)

    def test_the_whole_name_has_to_match(self) -> None:
        pattern = NamePattern("a.b{c:value}")
        assert pattern.read("axb3.pt") is None
        assert pattern.read("xa.b3.pt") is None
        assert pattern.read("a.b3.zip") is None

    @given(st.integers(1, 1022), st.floats(0, 1), st.integers(0, 9999))
    def test_round_trip(self, number: int, accuracy: float, index: int) -> None:
        facts = NamePattern(UPSTREAM_PATTERN).read(f"{index:04d}_acc{accuracy:.4f}_class{number:04d}_x.pth")
        assert facts is not None
        assert facts.condition == [float(bit) for bit in f"{number:010b}"]
        assert facts.metrics == {"acc": float(f"{accuracy:.4f}")}

    @pytest.mark.parametrize(
        ("pattern", "words"),
        [
            ("", "no named field"),
            ("model.pt", "no named field"),
            ("{}", "expected {name} or {name:kind}"),
            ("{a:b:c}", "expected {name} or {name:kind}"),
            ("{class:bits}", "unknown kind 'bits'"),
            ("{class:bits1}", "unknown kind 'bits1'"),
            ("{class:number}", "unknown kind 'number'"),
            ("{a", "unmatched brace"),
            ("{a}_{a}", "not a valid pattern"),
            ("(?P<a>[", "not a valid pattern"),
        ],
    )
    def test_bad_patterns_are_refused(self, pattern: str, words: str) -> None:
        with pytest.raises(RPGError) as caught:
            NamePattern(pattern)
        assert f"pattern '{pattern}'" in str(caught.value)
        assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("pattern", "name", "words"),
        [
            ("{class:bits10}", "2000.pt", "expected 1 to 1022"),
            ("{class:bits10}", "0.pt", "expected 1 to 1022"),
            ("{class:bits10}", "9" * 5000, "'class'"),
            (r"(?P<x__value>.*)\.pt", "abc.pt", "expected a number, got 'abc'"),
            (r"(?P<x__value>.*)\.pt", "nan.pt", "finite"),
            (r"(?P<x__digits>.*)\.pt", "1x.pt", "expected digits"),
            (r"(?P<x__digits>1)?\.pt", ".pt", "found no 'x'"),
            (r"(?P<x__state>.*)\.pt", "-1.pt", "expected a whole number up to 2147483647, got '-1'"),
            ("{x:state}", "9" * 5000, "expected a whole number"),
        ],
    )
    def test_names_with_wrong_fields_are_refused(self, pattern: str, name: str, words: str) -> None:
        with pytest.raises(RPGError) as caught:
            NamePattern(pattern).read(name)
        assert name in str(caught.value)
        assert words in str(caught.value)


def conditions_of(path: Path) -> dict[str, list[float]]:
    return {file: row.condition for file, row in read_conditions(path).items()}


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("c.csv", "file,a,b\nx.pt,1,-2.5\ny.pt,1e3,0\n", {"x.pt": [1, -2.5], "y.pt": [1000, 0]}),
            ("c.CSV", "file, a\r\n\r\n x.pt , 3 \r\n", {"x.pt": [3]}),
            ("c.csv", "\ufefffile,bits\nx,0101\ny,1100\n", {"x": [0, 1, 0, 1], "y": [1, 1, 0, 0]}),
            ("c.csv", "file,bits\nx,10\ny,11\n", {"x": [1, 0], "y": [1, 1]}),
            ("c.csv", "file,value\nx,10\ny,7\n", {"x": [10], "y": [7]}),
            ("c.csv", "file,value\nx,0\ny,1\n", {"x": [0], "y": [1]}),
            ("c.csv", 'file,a\n"x, ""1"".pt",1\n', {'x, "1".pt': [1]}),
            ("c.json", '{"x": [1, 2.5], "y": [0, 0]}', {"x": [1, 2.5], "y": [0, 0]}),
            (
                "c.json",
                '[{"file": "x", "condition": [1]}, {"condition": [2], "file": "y"}]',
                {"x": [1], "y": [2]},
            ),
        ],
    )
    def test_csv_and_json_forms_are_read(
        self, tmp_path: Path, name: str, content: str, expected: dict[str, list[float]]
    ) -> None:
        (tmp_path / name).write_text(content, newline="")
        assert conditions_of(tmp_path / name) == expected

    @given(
        st.dictionaries(
            st.text(st.characters(categories=("L", "N"), include_characters=' ,"_.'), min_size=1).filter(
                lambda name: name == name.strip()
            ),
            st.tuples(*[st.floats(-3e38, 3e38)] * 3),
            min_size=1,
        )
    )
    def test_csv_and_json_round_trip(
        self, tmp_path_factory: pytest.TempPathFactory, conditions: dict[str, tuple[float, ...]]
    ) -> None:
        directory = tmp_path_factory.mktemp("conditions")
        with (directory / "c.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["file", "a", "b", "c"], *([k, *v] for k, v in conditions.items())])
        (directory / "c.json").write_text(json.dumps(conditions))
        expected = {name: list(values) for name, values in conditions.items()}
        assert conditions_of(directory / "c.csv") == expected
        assert conditions_of(directory / "c.json") == expected

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", ", row 1: expected a header"),
            ("name,a\nx,1\n", ", row 1: expected a header"),
            ("file\nx\n", ", row 1: expected a header"),
            ("file,a\n", "no conditions"),
            ("file,a\nx,1\ny,two\n", ", row 3: column 'a': expected a number, got 'two'"),
            ("file,a\nx,\n", ", row 2: column 'a': expected a number, got ''"),
            ("file,a\nx,nan\n", ", row 2: column 'a': expected a finite number, got 'nan'"),
            ("file,a\nx,1e999\n", ", row 2: column 'a': expected a finite number"),
            ("file,a,b\nx,1,2\n\ny,1\n", ", row 4: expected 3 cells"),
            ("file,a\nx,1,2\n", ", row 2: expected 2 cells"),
            ("file,a\nx,1\nx,2\n", ", row 3: 'x' is listed twice, first in"),
            ("file,a\n,2\n", ", row 2: expected a file name"),
            ("file,bits\nx,0101\ny,011\n", ", row 3: 'y': expected 4 values as in"),
            ("file,bits\nx,0101\ny,0201\n", ", row 3: 'y': expected bits such as 0101"),
            ('file,a\nx,"1\n', "not valid CSV"),
        ],
    )
    def test_bad_csv_is_refused(self, tmp_path: Path, content: str, words: str) -> None:
        self.refused(tmp_path / "c.csv", content, words)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ("3", "expected {file: [numbers]}"),
            ("{}", "no conditions"),
            ("[]", "no conditions"),
            ('{"x": 3}', ", row 1: 'x': expected a list of numbers"),
            ('{"x": []}', ", row 1: 'x': expected a list of numbers"),
            ('{"x": {}}', ", row 1: 'x': expected a list of numbers"),
            ('{"x": ["1"]}', ", row 1: 'x': expected numbers, got \"1\""),
            ('{"x": [true]}', ", row 1: 'x': expected numbers, got true"),
            ('{"x": [1], "y": [NaN]}', ", row 2: 'y': expected a finite number"),
            ('{"x": [1], "y": [1, 2]}', ", row 2: 'y': expected 1 values"),
            ('{"x": [1], "x": [2]}', ", row 2: 'x' is listed twice"),
            ('[{"file": "x"}]', ", row 1: expected"),
            ('[{"file": 3, "condition": [1]}]', ", row 1: file: expected text"),
            ('[{"file": "x", "condition": [1], "acc": 2}]', ", row 1: expected"),
            (f'{{"x": [1{"0" * 400}]}}', ", row 1: 'x': expected a"),
            (f'{{"x": [1{"0" * 4300}]}}', ": not valid JSON: "),
            ('{"x": [1], "y": [-1e39]}', ", row 2: 'y': expected values that are finite as float32"),
        ],
    )
    def test_bad_json_is_refused(self, tmp_path: Path, content: str, words: str) -> None:
        self.refused(tmp_path / "c.json", content, words)

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RPGError, match=r"c\.csv: not found"):
            read_conditions(tmp_path / "c.csv")
        with pytest.raises(RPGError, match=r"c\.txt: expected conditions as \.csv or \.json"):
            read_conditions(tmp_path / "c.txt")
        (tmp_path / "c.csv").mkdir()
        with pytest.raises(RPGError, match=r"c\.csv: cannot be read: Is a directory"):
            read_conditions(tmp_path / "c.csv")
        (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RPGError, match=r"c\.json: not UTF-8 text"):
            read_conditions(tmp_path / "c.json")

    def test_rows_and_checkpoints_have_to_agree(self, tmp_path: Path) -> None:
        path = tmp_path / "c.csv"
        path.write_text("file,a\nx,1\ny,2\n")
        rows = read_conditions(path)
        check_files(rows, ["y", "x"], path, "condition")
        with pytest.raises(RPGError, match=r"c\.csv, row 3: 'y' is not among the checkpoints"):
            check_files(rows, ["x"], path, "condition")
        with pytest.raises(RPGError, match=r"c\.csv: no row for 'z'"):
            check_files(rows, ["x", "y", "z"], path, "condition")

    @staticmethod
    def refused(path: Path, content: str, words: str) -> None:
        path.write_text(content, newline="")
        with pytest.raises(RPGError) as caught:
            read_conditions(path)
        message = str(caught.value)
        assert message.startswith(str(path))
        assert words in message
        assert "\n" not in message
