import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from rpg.errors import RPGError
from rpg.evaluation.figures import to_svg
from rpg.evaluation.report import (
    build_figures,
    build_report,
    figure_pairs,
    render_html,
    write_report,
)
from rpg.evaluation.results import Evaluated, Results, TaskSplit, condition_label, of_split
from rpg.evaluation.tables import comparisons, model_card_table, score_rows, terminal_table
from rpg.tasks.families import Metric

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>{{ 7*7 }} $x | &amp;"


def refuse(constant: str) -> Any:
    raise AssertionError(f"not JSON: {constant}")


class Page(HTMLParser):
    """Collects tags with their attributes, text, and unclosed tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.stack: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(results: Results) -> tuple[str, Page]:
    html = render_html(build_report(results), figure_pairs(results, to_svg))
    return html, Page(html)


@pytest.fixture(scope="module")
def whole(results: Results) -> tuple[str, Page]:
    return page_of(results)


def test_report_holds_accuracies_similarities_distances_and_tasks(results: Results) -> None:
    report = build_report(results)
    for group in ("originals", "generated_unseen", "generated_seen"):
        assert {"mean", "min", "max", "n"} <= set(report["score"][group])
    assert set(report["score"]["baselines"]) == {
        "centre", "nearest_task", "ridge_1", "ridge_2", "ridge_3", "majority"}  # fmt: skip
    assert (report["ensembles"], report["score"]["ensembles"]) == (None, None)
    assert report["score"]["generated_batchnorm_recomputed"]["n"] == 0
    assert set(report["timing_seconds"]) == {"collect", "shard", "train", "generate", "evaluate"}
    assert {"similarity", "distance", "config", "versions", "seed", "per_task"} <= set(report)
    assert len(report["per_task"]) == 40


def test_numbers_come_from_the_results(results: Results) -> None:
    report = build_report(results)
    unseen = [n.score for n in results.generated if n.split == "unseen"]
    originals = [n.score for n in results.originals if n.split == "unseen"]
    accuracy = report["score"]
    assert accuracy["generated_unseen"]["mean"] == pytest.approx(sum(unseen) / len(unseen))
    assert (accuracy["generated_unseen"]["min"], accuracy["generated_unseen"]["max"]) == (
        min(unseen),
        max(unseen),
    )
    assert accuracy["generated_unseen"]["n"] == len(unseen) == 100
    assert accuracy["ratio"] == pytest.approx((sum(unseen) / 100) / (sum(originals) / 60))
    row = report["per_task"][0]
    members = [n.score for n in results.generated if n.task == row["task"] and n.split == "unseen"]
    assert row["generated"]["mean"] == pytest.approx(np.mean(members))
    assert row["baselines"]["ridge_1"] == results.baselines["ridge_1"][row["task"]]
    assert report["similarity"]["unseen"]["noised_original_max"]["0.01"] > 0.9
    assert report["similarity"]["seen"]["generated_original"] is not None
    siblings = results.sibling_distances
    assert report["distance"]["training_siblings"]["median"] == pytest.approx(np.median(siblings))


def test_copies_of_training_checkpoints_are_counted() -> None:
    from_copies = build_report(copied())
    assert from_copies["similarity"]["unseen"]["generated_original_max"] == 1
    assert from_copies["distance"]["generated_unseen"]["closer_than_siblings"] == 6
    assert "no farther than" in " ".join(from_copies["summary"])
    assert "6 of 6 are closer" in " ".join(from_copies["summary"])


def copied() -> Results:
    wrong = np.random.default_rng(0).random((6, 50)) < 0.1
    networks = [
        Evaluated(str(i), str(i // 3), TaskSplit.unseen, 1 - float(row.mean()), row, (0.0,), 0.0)
        for i, row in enumerate(wrong)
    ]
    return Results("copies", 1, {}, {}, {}, networks, networks, sibling_distances=[0.3, 0.4])


def test_written_json_is_finite_and_equals_the_report(results: Results, tmp_path: Path) -> None:
    config: dict[Any, Any] = {
        "nan": float("nan"),
        "nested": [float("inf"), np.float32(1.5), Path("x"), (1, 2)],
        3: None,
    }
    odd = dataclasses.replace(
        results,
        config=config,
        generated=[
            *results.generated[:-1],
            dataclasses.replace(results.generated[-1], distance=float("nan")),
        ],
    )
    report = build_report(odd)
    write_report(tmp_path / "new", report, {})
    read = json.loads((tmp_path / "new" / "report.json").read_text(), parse_constant=refuse)
    assert read == report
    assert read["config"] == {"nan": None, "nested": [None, 1.5, "x", [1, 2]], "3": None}
    assert read["distance"]["generated_seen"]["n"] == 99
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]


def test_page_is_self_contained_and_well_formed(whole: tuple[str, Page]) -> None:
    html, page = whole
    assert page.stack == []
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "embed", "base")]
    for tag, attributes in page.tags:
        for name in ("src", "srcset"):
            if name in attributes:
                assert str(attributes[name]).startswith("data:image/svg+xml;base64,")
        if "href" in attributes:
            assert (tag, attributes["href"]) == ("a", "https://arxiv.org/abs/2501.11587")
        assert not [name for name in attributes if name.startswith("on")]
    assert re.findall(r"https?://[^\s\"'<]+", html) == ["https://arxiv.org/abs/2501.11587"]
    assert not re.search(r"url\(|@import", html)
    assert sum(tag == "img" for tag, _ in page.tags) == 4
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_page_says_the_result_first_and_shows_every_baseline(whole: tuple[str, Page]) -> None:
    _, page = whole
    text = " ".join(page.text.split())
    assert text.index("100 networks generated for 20 unseen tasks") < text.index("Share of right predictions")
    for name in ("ridge regression, order 2", "nearest training task", "mean checkpoint", "majority class"):
        assert name in text
    assert "0100111010" in text
    assert "2 min 29 s" in text


def test_hostile_names_are_text(make_results: Callable[..., Results]) -> None:
    results = make_results(tasks=3, task_name=lambda number: f"{HOSTILE}{number}", name=HOSTILE)
    results = dataclasses.replace(
        results,
        config={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        timing_seconds={HOSTILE: 1.0},
        baselines={HOSTILE: {f"{HOSTILE}314": 0.5}},
    )
    html, page = page_of(results)
    assert page.stack == []
    assert not [tag for tag, attributes in page.tags if tag == "script" or "onerror" in attributes]
    assert sum(tag == "img" for tag, _ in page.tags) == 4
    assert HOSTILE in page.text
    assert "<script" not in html
    assert model_card_table(build_report(results)).count("\n") == 10


def test_without_conditions_the_page_says_so(make_results: Callable[..., Results]) -> None:
    results = make_results(tasks=2, conditions=False, baselines=False, task_name=lambda _: "all")
    seen = dataclasses.replace(
        results,
        generated=of_split(results.generated, TaskSplit.seen),
        originals=of_split(results.originals, TaskSplit.seen),
        noised={},
        sibling_distances=(),
        losses=(),
    )
    report = build_report(seen)
    assert report["score"]["generated_unseen"] == {
        "mean": None, "median": None, "min": None, "max": None, "std": None, "n": 0, "failed": 0}  # fmt: skip
    assert report["score"]["baselines"] == {}
    assert report["score"]["ratio"] == pytest.approx(
        report["score"]["generated_seen"]["mean"] / report["score"]["originals"]["mean"]
    )
    assert set(report["similarity"]) == {"seen"}
    html = render_html(report, figure_pairs(seen, to_svg))
    assert "The collection has no conditions" in html
    assert set(build_figures(seen)) == {"similarity", "distances"}
    assert len(terminal_table(report).rows) == 2


def test_nothing_generated_still_renders(results: Results) -> None:
    empty = dataclasses.replace(
        results,
        generated=[],
        originals=[],
        noised={},
        baselines={},
        sibling_distances=(),
        losses=(),
        timing_seconds={},
    )
    report = build_report(empty)
    assert report["score"]["ratio"] is None
    assert report["summary"] == []
    assert Page(render_html(report, figure_pairs(empty, to_svg))).stack == []


def test_bad_results_are_refused(results: Results) -> None:
    first = results.generated[0]
    for change, message in (
        ({"score": float("nan")}, r"generated_0314.safetensors: expected a finite score"),
        ({"score": 1.5}, r"generated_0314.safetensors: expected an accuracy in 0…1"),
        (
            {"wrong": first.wrong[:-1]},
            r"generated_0314.safetensors: expected predictions on the same 540 inputs",
        ),
    ):
        broken = dataclasses.replace(results, generated=[dataclasses.replace(first, **change)])  # type: ignore[arg-type]
        with pytest.raises(RPGError, match=message):
            build_report(broken)


def test_failed_write_leaves_the_earlier_report(results: Results, tmp_path: Path) -> None:
    report = build_report(results)
    write_report(tmp_path, report, {})
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, {**report, "seed": float("nan")}, {})
    assert (tmp_path / "report.json").read_bytes() == before


def test_tables_carry_the_same_numbers(results: Results) -> None:
    report = build_report(results)
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(terminal_table(report))
    shown, card = capture.get(), model_card_table(report)
    mean = f"{report['score']['generated_unseen']['mean']:.3f}"
    assert mean in shown
    assert f"| **generated, unseen tasks** | **{mean}** |" in card
    assert comparisons(report)[0] == f"generated / originals: {report['score']['ratio']:.3f}"
    table, _, lines = card.partition("\n\n")
    assert {line.count("|") for line in table.splitlines()} == {6}
    assert f"- generated / originals: {report['score']['ratio']:.3f}" in lines


def test_conditions_are_labelled_by_bits_or_first_values() -> None:
    assert condition_label(None) == ""
    assert condition_label((0.0, 1.0, 1.0)) == "011"
    assert condition_label((0.25, -1.0)) == "0.25, -1"
    assert condition_label([0.0] * 384) == "0, 0, 0, …"


def with_answers(results: Results) -> Results:
    """The same with answers of two classes, a family's reference, and BatchNorm recomputed."""
    right = np.random.default_rng(1).random(540) < 0.5

    def answered(networks: Sequence[Evaluated]) -> list[Evaluated]:
        return [dataclasses.replace(n, answers=torch.from_numpy(n.wrong ^ right)) for n in networks]

    unseen = {network.task for network in of_split(results.generated, TaskSplit.unseen)}
    further = {
        "ten-class backbone": dict.fromkeys(unseen, 0.99),
        "best_original": dict.fromkeys(unseen, 0.97),
    }
    return dataclasses.replace(
        results,
        originals=answered(results.originals),
        generated=answered(results.generated),
        recomputed=of_split(results.generated, TaskSplit.unseen)[:40],
        baselines={**results.baselines, **further},
    )


def test_ensembles_references_and_variety_are_rows_and_lines(results: Results) -> None:
    whole = with_answers(results)
    report = build_report(whole)
    originals = of_split(whole.originals, TaskSplit.unseen)
    accuracies, gains = [], []
    for task in dict.fromkeys(network.task for network in originals):
        wrong = np.stack([network.wrong for network in originals if network.task == task])
        # Of two classes the majority is wrong where most networks are.
        accuracies.append(1 - float((wrong.mean(axis=0) > 0.5).mean()))
        gains.append(accuracies[-1] - 1 + float(wrong.mean()))
    votes = report["ensembles"]
    assert (votes["size"], votes["tasks"]) == (3, 20)
    assert report["score"]["ensembles"]["originals"]["mean"] == pytest.approx(np.mean(accuracies))
    assert report["score"]["ensembles"]["originals"]["min"] == pytest.approx(min(accuracies))
    assert votes["originals"]["gain"] == pytest.approx(np.mean(gains))
    assert votes["gain_ratio"] == pytest.approx(votes["generated"]["gain"] / votes["originals"]["gain"])
    alike = report["similarity"]["unseen"]
    assert alike["generated_minus_original"] == pytest.approx(
        alike["generated_generated"] - alike["original_original"]
    )
    names = [name for _, name, _ in score_rows(report)]
    assert names[:8] == [
        "originals, unseen tasks",
        "generated, unseen tasks",
        "generated, BatchNorm recomputed",
        "ensemble of 3 originals",
        "ensemble of 3 generated",
        "ten-class backbone",
        "best original by validation",
        "ridge regression, order 3",
    ]
    assert "The strongest baseline, ten-class backbone, reaches 0.990." in report["summary"]
    lines = comparisons(report)
    assert lines[1].startswith(f"gain in accuracy by ensembles of 3: originals {np.mean(gains):+.4f}, ")
    assert lines[1].endswith(f"({votes['gain_ratio']:.2f} ×)")
    assert lines[2] == (
        f"similarity of wrong answers: originals {alike['original_original']:.2f}, "
        f"generated {alike['generated_generated']:.2f} ({alike['generated_minus_original']:+.2f})"
    )
    _, page = page_of(whole)
    text = " ".join(page.text.split())
    for line in (*names, *lines[1:]):
        assert line[1:] in text
    assert all(line in model_card_table(report) for line in lines)


def test_too_few_networks_to_vote_are_told(make_results: Callable[..., Results]) -> None:
    few = with_answers(make_results(models_per_task=2))
    report = build_report(few)
    assert report["ensembles"] is None
    assert report["left_out"] == ["ensembles: no task has 3 originals and 3 generated networks"]


def test_ensembles_of_another_metric_are_no_row_of_its_table(results: Results) -> None:
    report = build_report(dataclasses.replace(with_answers(results), metric=Metric("loss", False)))
    assert report["ensembles"]["size"] == 3
    assert not [name for _, name, _ in score_rows(report) if "ensemble" in name]


def test_answers_of_other_inputs_are_refused(results: Results) -> None:
    whole = with_answers(results)
    short = dataclasses.replace(whole.originals[0], answers=torch.zeros(3))
    with pytest.raises(RPGError, match=r"original_0314\.safetensors: expected 540 answers, got \[3\]"):
        build_report(dataclasses.replace(whole, originals=[short, *whole.originals[1:]]))
