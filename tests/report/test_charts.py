import re
import xml.etree.ElementTree as ElementTree

import pytest

from zsq.layers import Histogram
from zsq.report.charts import Axis, Point, bars, histogram, interval, key, lines, nice_ticks, scatter


def parsed(svg: str) -> ElementTree.Element:
    """The picture, which must be well-formed."""
    return ElementTree.fromstring(svg)


def test_ticks_by_hand():
    assert nice_ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(-0.25, 0.9) == [0, 0.5] or nice_ticks(-0.25, 0.9) == [-0.2, 0, 0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(87.1, 88.4) == [87.5, 88.0]
    assert all(87.1 <= tick <= 88.4 for tick in nice_ticks(87.1, 88.4))


def test_an_axis_by_hand():
    axis = Axis(0.0, 10.0, 100.0, 200.0)
    assert [axis.at(value) for value in (0, 5, 10, 12, -3)] == [100, 150, 200, 200, 100]
    down = Axis(1.0, 100.0, 50.0, 0.0, log=True)
    assert [round(down.at(value), 9) for value in (1, 10, 100, 0)] == [50, 25, 0, 50]
    assert Axis(0.7, 130.0, 0.0, 1.0, log=True).ticks() == [1, 10, 100]
    assert (
        Axis(30.0, 60.0, 0.0, 1.0, log=True).ticks() == [50] or len(Axis(30.0, 60.0, 0.0, 1.0, log=True).ticks()) >= 1
    )


def test_an_axis_holds_what_it_is_made_over():
    axis = Axis.over([3.0, 3.0], 0.0, 100.0)
    assert axis.low < 3 < axis.high
    assert Axis.over([2.0, 8.0], 0.0, 1.0, zero=True).low == 0
    assert Axis.over([], 0.0, 1.0).low < 1 < Axis.over([], 0.0, 1.0).high


def test_bars_are_as_high_as_their_values():
    found = parsed(bars([("a", 10.0), ("b", 5.0), ("c", 0.0), ('<&">', 2.5)], "x", marked=["b"]))
    heights = [float(bar.get("height")) for bar in found.iter("rect")]
    assert heights[1] == pytest.approx(heights[0] / 2, abs=0.2)
    assert heights[3] == pytest.approx(heights[0] / 4, abs=0.2)
    assert [bar.get("class") for bar in found.iter("rect")] == ["bar", "hot", "bar", "bar"]
    assert [title.text for title in found.iter("title")][-1] == '<&">: 2.5'


def test_bars_below_zero_hang():
    found = list(parsed(bars([("up", 4.0), ("down", -4.0)], "x")).iter("rect"))
    assert float(found[0].get("y")) + float(found[0].get("height")) == pytest.approx(float(found[1].get("y")), abs=0.2)


def test_bars_on_a_logarithm():
    values = [("a", 1.0), ("b", 0.1), ("c", 0.01)]
    heights = [float(bar.get("height")) for bar in parsed(bars(values, "x", log=True)).iter("rect")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.3)


def test_lines_break_where_stretches_do():
    found = parsed(
        lines({"a": [[(0, 1), (1, 2)], [(0, 3), (2, 1)]], "b": [[(0, 2), (2, 2)]]}, "x", x_name="s", y_name="l")
    )
    strokes = list(found.iter("polyline"))
    assert [stroke.get("class") for stroke in strokes] == ["line s0", "line s0", "line s1"]
    places = [tuple(map(float, each.split(","))) for each in strokes[0].get("points").split()]
    assert places[1][0] > places[0][0]  # to the right
    assert places[1][1] < places[0][1]  # and up


def test_wide_positive_lines_are_drawn_on_a_logarithm():
    ticks = re.findall(r'text-anchor="end">([^<]+)<', lines({"a": [[(0, 1), (1, 1000)]]}, "x", x_name="s", y_name="l"))
    assert ticks == ["1", "10", "100", "1,000"]


def test_a_scatter_plot_has_every_point():
    order = [f"method {index}" for index in range(10)]
    points = [Point(10.0 * (index + 1), 80.0 + index, name, f"{name}: hit") for index, name in enumerate(order)]
    found = parsed(scatter(points, "x", x_name="kB", y_name="top-1", order=order, rule=("float", 95.0)))
    marks = [each for each in found.iter("g") if "mark" in each.get("class", "")]
    assert [mark.find("title").text for mark in marks] == [point.says for point in points]
    assert len({(mark.get("class"), mark[0].tag) for mark in marks}) == 10  # colour and form tell all apart
    assert found.find(".//line[@class='rule']") is not None
    assert [name for _, name in key(order, order)] == order


def test_the_key_shows_what_is_there_in_the_colours_of_the_whole():
    order = [f"method {index}" for index in range(10)]
    whole, some = key(order, order), key(order, {"method 3", "method 9"}, hollow="a control")
    assert some[:2] == [whole[3], whole[9]]
    assert some[2][1] == "a control"
    assert 'class="mark hollow ' in some[2][0]
    control = parsed(scatter([Point(1, 2, "b", "x", hollow=True)], "x", x_name="x", y_name="y", order=["a", "b"]))
    assert control.find("g[@class='mark hollow s1']/title").text == "x"


def test_a_histogram_shades_what_is_represented():
    counts = Histogram(-1.0, 1.0, (0, 4, 16, 4))
    found = parsed(histogram(counts, "x", within=(-0.5, 0.5)))
    band = found.find("rect")
    assert float(band.get("x")) == pytest.approx(33.0)
    assert float(band.get("width")) == pytest.approx(66.0)
    tops = [float(top) for top in re.findall(r"V([\d.]+)H", found.find("path").get("d"))]
    assert tops == [34.0, 19.0, 4.0, 19.0]  # square roots of 0, 4, 16, 4
    assert parsed(histogram(Histogram(2.0, 2.0, (5,)), "x")).find("rect") is None


def test_an_interval_is_where_it_says():
    found = parsed(interval(2.0, 1.0, 3.0, 4.0))
    band, mark = found.find("rect"), found.find("line[@class='hotline']")
    middle = float(band.get("x")) + float(band.get("width")) / 2
    assert float(mark.get("x1")) == pytest.approx(middle, abs=0.2)
