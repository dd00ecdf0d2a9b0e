"""Reports as a browser renders them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from zsq.api import quantize
from zsq.cli import main
from zsq.core import RunError
from zsq.evaluate import read_images
from zsq.nets.load import load_network
from zsq.report import write_report
from zsq.report.run import bn_match, curves

Wait = Callable[[str], Any]


# --- pages ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of GENIE with data: images, losses of two kinds, layers, an estimate."""
    folder = tmp_path_factory.mktemp("genie") / "run"
    data = read_images("digits")
    quantize("zoo:digits-resnet", "genie", "w4a4", effort="smoke", device="cpu", data=data, out=folder)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_report(run)


def cell(name: str, method: str, top1: float, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "cell": f"net/{name}",
        "status": "done",
        "model": "zoo:net",
        "method": method,
        "bits": "W4A4",
        "protocol": "minmax-ptq",
        "seed": 0,
        "source": "own",
        "bytes": {"float": 1000, "packed": round(1000 * seconds)},
        "seconds": {"all": seconds},
        "accuracy": {"float": {"top1": 90.0}, "quantized": {"top1": top1}, "drop": 90.0 - top1},
        "data": "photos.zip",
        "machine": {"processor": "CPU", "cores": 2, "threads": 1},
        "command": "zsq compare zoo:net",
        **more,
    }


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    estimate = {"drop": 9.5, "low": 4.0, "high": 12.0, "sources": {}}
    exact = {"cell": "net/float", "status": "done", "model": "zoo:net", "method": "float", "bits": "w32a32"}
    rows = [
        {**exact, "accuracy": {"float": {"top1": 90.0}}, "source": "own"},
        cell("a", "nearest", 80.0, 9.0, estimate=estimate),
        cell("b", "zeroq", 85.5, 100.0),
        cell("c", "zeroq", 86.25, 20.0, source="real"),
        cell("d", "genie", 89.0, 2000.0, seed=2),
        {
            "cell": "net/e",
            "status": "failed",
            "reason": "no room <left>",
            "model": "zoo:net",
            "method": "hast",
            "source": "own",
        },
    ]
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(folder)


# --- the browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Chromium without a window, or a skip."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium here: Debian has it as chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def shown(chromium: Any) -> Callable[..., Wait]:
    """Opens a page, and returns what runs a script on it; afterwards the console must be empty."""

    def show(path: Path, width: int = 1200, scheme: str = "light") -> Wait:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        features += [{"name": "prefers-reduced-motion", "value": "reduce"}]  # or a click may miss what still moves
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        chromium.get(path.resolve().as_uri())
        return lambda script: chromium.execute_script(script)

    chromium.get_log("browser")
    yield show
    assert chromium.get_log("browser") == []


SIZES = (
    "return [...document.querySelectorAll('{}')].map((e) => e.getBoundingClientRect()).map((b) => [b.width, b.height])"
)


def test_a_page_asks_for_nothing(shown, page, comparison):
    for path in (page, comparison):
        script = shown(path)
        assert (
            script("return performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:')).length")
            == 0
        )
        assert path.stat().st_size < 5_000_000


def test_the_charts_of_a_run_appear(shown, page):
    script = shown(page)
    assert script("return document.title") == "digits-resnet, genie W4A4 - zsq"
    charts = script(SIZES.format("svg.chart"))
    assert len(charts) >= 6  # the interval, noise, sensitivity, two of BatchNorm, losses
    assert all(width > 200 and height > 30 for width, height in charts)
    bars = script(SIZES.format("#layers svg.chart rect"))
    assert len(bars) == 44  # 22 layers, twice
    assert all(width > 3 and height >= 0.4 for width, height in bars)
    assert max(height for _, height in bars) > 100
    sparks = script(SIZES.format("svg.spark path"))
    assert len(sparks) == 44
    assert all(width > 50 and height > 5 for width, height in sparks)
    colours = script("return [...document.querySelectorAll('#layers rect')].map((e) => getComputedStyle(e).fill)")
    assert len(set(colours)) >= 2  # the worst are marked
    assert "rgb(0, 0, 0)" not in colours


def test_the_images_of_a_run_appear(shown, page, run):
    script = shown(page)
    loaded = script("return [...document.images].map((i) => [i.complete, i.naturalWidth, i.naturalHeight, i.width])")
    assert len(loaded) == json.loads((run / "metrics.json").read_text())["images"] == 8
    assert all(complete and (wide, high) == (8, 8) and seen > 50 for complete, wide, high, seen in loaded)
    said = script("return [...document.querySelectorAll('figcaption')].map((e) => e.innerText)")
    assert all(words.rpartition(" ")[0].split()[-1].isdigit() and words.endswith("%") for words in said)


def test_a_run_says_what_it_measured(shown, page, run):
    metrics = json.loads((run / "metrics.json").read_text())
    text = shown(page)("return document.body.innerText")
    assert f"{metrics['accuracy']['drop']:.2f}" in text
    assert f"{metrics['accuracy']['quantized']['top1']:.2f} %" in text
    assert f"A drop of {metrics['estimate']['drop']:.1f} points" in text or "A drop of more than 20 points" in text
    assert f"{metrics['bytes']['packed']:,} bytes" in text
    assert metrics["versions"]["torch"] in text
    assert "estimate" in text
    assert "synthesizer" not in text  # folded away
    recipe = shown(page)("document.querySelector('summary').click(); return document.body.innerText")
    assert "synthesizer = OptimizeLatents" in recipe


@pytest.mark.parametrize("name", ["page", "comparison"])
@pytest.mark.parametrize("width", [360, 390, 768, 1600])
def test_no_width_scrolls_sideways(name, width, shown, request):
    script = shown(request.getfixturevalue(name), width)
    assert script("return document.documentElement.scrollWidth") <= width
    assert script("return innerWidth") == width
    assert float(script("return getComputedStyle(document.body).fontSize").removesuffix("px")) >= 16


@pytest.mark.parametrize("name", ["page", "comparison"])
def test_light_and_dark(name, shown, request):
    colours = """
      const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return (r + g + b) / 765; };
      const ground = light(getComputedStyle(document.body).backgroundColor);
      const least = (what, property) => Math.min(...[...document.querySelectorAll(what)].map(
        (e) => Math.abs(light(getComputedStyle(e)[property]) - ground)));
      return [ground, least("h1, h2, td, th, p, a, dd", "color"), least("svg text", "fill")];
    """
    path = request.getfixturevalue(name)
    ground, text, labels = shown(path, scheme="light")(colours)
    assert ground > 0.9
    assert min(text, labels) > 0.35
    ground, text, labels = shown(path, scheme="dark")(colours)
    assert ground < 0.2
    assert min(text, labels) > 0.35


# --- sorting ----------------------------------------------------------------------------------------------------


COLUMN = "return [...document.querySelectorAll('#cells tbody tr')].map((r) => r.cells[{}].innerText)"


def heads(chromium: Any) -> dict[str, Any]:
    return {each.text.split()[0]: each for each in chromium.find_elements("css selector", "#cells th button")}


def test_a_heading_sorts(chromium, shown, comparison):
    script = shown(comparison)
    assert script(COLUMN.format(5)) == ["90.00", "80.00", "85.50", "86.25", "89.00", "failed: no room <left>"]
    button = heads(chromium)["top-1"]
    button.click()
    assert script(COLUMN.format(5))[:5] == ["80.00", "85.50", "86.25", "89.00", "90.00"]
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    button.click()
    assert script(COLUMN.format(5))[:5] == ["90.00", "89.00", "86.25", "85.50", "80.00"]
    assert script(COLUMN.format(5))[5].startswith("failed")  # what is missing stays last
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    heads(chromium)["method"].click()
    found = script(COLUMN.format(1))
    assert found == sorted(found)
    assert script("return document.querySelectorAll('[aria-sort]').length") == 1


def test_numbers_sort_as_numbers(chromium, shown, comparison):
    script = shown(comparison)
    heads(chromium)["seconds"].click()
    assert script(COLUMN.format(9))[:4] == ["9.0", "20.0", "100.0", "2000.0"]  # not as text


def test_the_keyboard_is_enough(chromium, shown, comparison):
    from selenium.webdriver.common.keys import Keys

    script = shown(comparison)
    place = chromium.switch_to.active_element
    for _ in range(40):
        place.send_keys(Keys.TAB)
        place = chromium.switch_to.active_element
        if place.text.startswith("drop"):
            break
    assert script("return document.activeElement.matches(':focus-visible')")
    assert script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert float(script("return getComputedStyle(document.activeElement).outlineWidth").removesuffix("px")) >= 2
    place.send_keys(Keys.ENTER)
    assert script(COLUMN.format(6))[:4] == ["1.00", "3.75", "4.50", "10.00"]
    place.send_keys(Keys.SPACE)
    assert script(COLUMN.format(6))[:4] == ["10.00", "4.50", "3.75", "1.00"]


def test_the_plots_of_a_comparison_appear(shown, comparison):
    script = shown(comparison)
    assert all(width > 300 and height > 180 for width, height in script(SIZES.format("svg.chart")))
    for plot in (1, 2):
        marks = script(
            f"return [...document.querySelectorAll('.plot:nth-child({plot}) .mark')].map((e) => "
            "[e.querySelector('title').textContent, e.getBoundingClientRect().x, e.getBoundingClientRect().y])"
        )
        assert [words for words, _, _ in marks] == [
            "nearest W4A4 under minmax-ptq, seed 0: 80.00 %",
            "zeroq W4A4 under minmax-ptq, seed 0: 85.50 %",
            "zeroq, real images W4A4 under minmax-ptq, seed 0: 86.25 %",
            "genie W4A4 under minmax-ptq, seed 2: 89.00 %",
        ]
        x, y = ([mark[axis] for mark in marks] for axis in (1, 2))
        assert x[0] < x[2] < x[1] < x[3]
        assert y[0] > y[1] > y[2] > y[3]  # better is higher
    said = script("return document.querySelector('.legend').innerText")
    assert said.split() == ["nearest", "zeroq", "genie", "fed", "with", "real", "images"]
    fills = script(
        "return [...document.querySelectorAll('.plot:nth-child(1) .mark')].map((e) => getComputedStyle(e).fill)"
    )
    assert [fill == "none" for fill in fills] == [False, False, True, False]
    assert "9.5 (4.0 to 12.0)" in script("return document.querySelector('#cells').innerText")


# --- what is on them --------------------------------------------------------------------------------------------


def test_losses_are_parted_where_steps_start_anew(tmp_path):
    lines = [("synthesize", 0, 3.0), ("synthesize", 9, 2.0), ("synthesize", 0, 4.0), ("synthesize", 9, 1.0)]
    lines += [("reconstruct a", 5, 0.5), ("reconstruct b", 5, 0.25)]
    text = [json.dumps({"time": 0, "label": label, "step": step, "loss": loss}) for label, step, loss in lines]
    (tmp_path / "log.jsonl").write_text("\n".join([*text, json.dumps({"label": "x", "step": 0, "time": 1})]) + "\n")
    found = dict(curves(tmp_path))
    assert list(found) == ["synthesize", "reconstruct, at the end"]
    assert found["synthesize"].count("<polyline") == 2
    assert found["reconstruct, at the end"].count("<rect") == 2
    assert curves(tmp_path / "nowhere") == []


def test_images_with_the_recorded_statistics_match_them():
    network = load_network(tiny.cnn(), input_shape=tiny.SHAPE)
    images = torch.randn(32, *tiny.SHAPE, generator=torch.Generator().manual_seed(0))
    first, conv = network.module[1], network.module[0]
    with torch.no_grad():
        made = conv(images)
        first.running_mean.copy_(made.mean((0, 2, 3)) + 2 * made.std((0, 2, 3)))
        first.running_var.copy_(4 * made.var((0, 2, 3)))
    # twice the standard deviation away, which is one of those that were recorded; and half of them
    mean, spread = bn_match(images, network)[0]
    assert mean == pytest.approx(1.0, abs=1e-3)
    assert spread == pytest.approx(0.5, abs=1e-3)


def test_the_command_and_the_result_write_the_same_page(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.html'} ({(tmp_path / 'a.html').stat().st_size:,} bytes)\n"
    assert (tmp_path / "a.html").read_bytes() == write_report(run, tmp_path / "b.html").read_bytes()


def test_a_run_without_images_data_or_batchnorm(tmp_path, shown):
    model = tiny.vit()
    result = quantize(model, "squant", "w4a4", out=tmp_path / "run", estimate=False, **tiny.settings("squant"))
    script = shown(result.report(tmp_path / "page.html", model))
    text = script("return document.body.innerText")
    assert "accuracy was not measured" in text
    assert script("return document.querySelector('#estimate')") is None
    assert all(width > 3 for width, _ in script(SIZES.format("#layers svg.chart rect")))


def test_a_report_needs_a_folder(tmp_path, capsys):
    result = quantize(tiny.cnn(), "nearest", "w4a4", estimate=False, **tiny.settings("nearest"))
    with pytest.raises(RunError, match="was not kept in a folder"):
        result.report(tmp_path / "page.html")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    (tmp_path / "cells.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no finished cell" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "name the file to write" in capsys.readouterr().err
