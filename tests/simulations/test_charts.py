import pytest
from fedssl_simulations.charts import Series, bar_chart, line_chart, ticks
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 0.19, [0, 0.05, 0.1, 0.15, 0.2]),
        (5.9, 8.1, [5, 6, 7, 8, 9]),
        (0, 1792, [0, 500, 1000, 1500, 2000]),
        (3, 3, [2.6, 2.8, 3, 3.2, 3.4]),
        (0, 0, [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(low, high, wanted):
    assert ticks(low, high, 5) == pytest.approx(wanted)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_enclose_every_range_in_few_even_steps(low, span):
    found = ticks(low, low + span, 5)
    assert found[0] <= low + 1e-6 * span
    assert found[-1] >= low + span - 1e-6 * span
    assert 2 <= len(found) <= 9
    assert found == sorted(set(found))


def test_a_line_runs_from_corner_to_corner_of_its_frame():
    chart = line_chart("loss", [Series("loss", 0, [10, 20], [1.0, 5.0])])
    (line,) = chart.lines
    assert [tick.label for tick in chart.y_ticks] == ["1", "2", "3", "4", "5"]
    assert line.path == f"M{chart.left} {chart.bottom}L{chart.right} {chart.top}"
    assert line.band == ""
    assert chart.about == "loss from 1 to 5"


def test_many_points_are_pooled_into_means_with_a_band_of_extremes():
    chart = line_chart("loss", [Series("loss", 0, range(1, 5), [0.0, 4.0, 1.0, 3.0])], most_points=2, digits=".1f")
    (line,) = chart.lines
    # Means 2 and 2 at the middle of 0 to 4; the band goes over the largest and back under the smallest.
    middle = (chart.top + chart.bottom) / 2
    assert [float(point.split()[1]) for point in line.path[1:].split("L")] == [middle, middle]
    heights = [float(point.split()[1]) for point in line.band[1:-1].split("L")]
    assert heights == [chart.top, pytest.approx(96 - 24), pytest.approx(240 - 56), chart.bottom]


def test_values_that_are_not_finite_are_left_out():
    chart = line_chart("epsilon", [Series("run", 0, [1, 2, 3], [1.0, float("inf"), float("nan")]), Series("other", 1, [1], [float("inf")])])
    assert [len(line.path.split("L")) for line in chart.lines] == [1]
    assert len(chart.lines[0].dots) == 1


def test_bars_of_all_panels_share_one_scale_and_the_best_of_each_is_marked():
    chart = bar_chart("ndcg", ["all", "unseen"], [("ours", "federated", 0, [0.1, 0.2]), ("theirs", "baseline", 0, [0.15, None])])
    (all_ours, unseen_ours), (all_theirs, unseen_theirs) = (row.bars for row in chart.rows)
    assert all_ours.length * 2 == pytest.approx(unseen_ours.length, abs=0.11)
    assert (all_ours.is_best, unseen_ours.is_best, all_theirs.is_best, unseen_theirs.is_best) == (False, True, True, False)
    assert (unseen_theirs.length, unseen_theirs.label) == (0, "not measured")
    assert chart.panels[1].at + unseen_ours.length < chart.width
