from fedssl_simulations.tables import metric_names, opened, recommenders, results_table
from rich.console import Console


def both(value):
    return {"all": {"ndcg@10": value, "hr@10": value * 2}, "unseen": {"ndcg@10": value + 0.01, "hr@10": value * 2 + 0.01}}


REPORT = {
    "test": {**both(0.3), "parts": {"encoder": both(0.1), "counts": both(0.35)}},
    "baselines": {"popularity": {"test": both(0.01), "validation": both(0.03), "seconds": 1.5}, "my_own": {"test": both(0.02)}},
}


def test_rows_are_baselines_then_parts_then_the_model():
    rows = recommenders(REPORT)
    assert [(row.label, row.kind) for row in rows] == [
        ("Popularity", "baseline"),
        ("My own", "baseline"),
        ("Encoder alone", "part"),
        ("Item-to-item counts alone", "part"),
        ("Federated", "federated"),
    ]
    assert rows[-1].all["ndcg@10"] == 0.3
    assert [(row.label, row.all["ndcg@10"]) for row in recommenders(REPORT, "validation")] == [("Popularity", 0.03)]


def test_a_report_without_results_has_no_rows():
    assert recommenders({}) == []
    assert recommenders({"test": {}, "baselines": None}) == []
    assert results_table({"privacy": {}}).row_count == 0


def test_metrics_stand_in_the_order_of_kind_and_cut():
    values = {"all": {"mrr": 1, "ndcg@10": 1, "hr@10": 1, "hr@5": 1, "coverage@20": 1}, "unseen": {"ndcg@5": 1}}
    assert metric_names(recommenders({"test": values})) == ["hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr", "coverage@20"]


def test_the_public_reading_drops_what_is_for_the_researcher_at_any_depth():
    value = {"a": 1, "researcher_only": {"b": 2, "deep": {"d": 4}}, "deep": {"c": 3, "researcher_only": {"e": 5}}, "list": [{"researcher_only": {"f": 6}}]}
    assert opened(value, public=True) == {"a": 1, "deep": {"c": 3}, "list": [{}]}
    assert opened(value, public=False) == {"a": 1, "b": 2, "deep": {"c": 3, "d": 4, "e": 5}, "list": [{"f": 6}]}


def test_what_was_released_is_not_overwritten_by_what_was_not():
    assert opened({"users": 512, "researcher_only": {"users": 498}}, public=False) == {"users": 512}


def printed(report):
    console = Console(width=120, record=True, force_terminal=False)
    console.print(results_table(report))
    return console.export_text()


def test_the_terminal_table_holds_every_recommender_in_both_columns():
    text = printed(REPORT)
    line = next(line for line in text.splitlines() if "Federated" in line)
    assert [cell.strip() for cell in line.split("│")[1:-1]] == ["Federated", "0.3000", "0.3100", "0.6000", "0.6100"]
    assert "Popularity" in text


def test_the_terminal_table_opens_what_a_plan_keeps_for_the_researcher():
    assert printed({"privacy": {"epsilon": 8}, "researcher_only": REPORT}) == printed(REPORT)


def test_a_name_that_looks_like_markup_is_printed_as_it_is():
    assert "[bold]x" in printed({"baselines": {"[bold]x": {"test": both(0.1)}}}).lower()
