"""The HTML report: self-contained, true to its summary, and without complaints from a real browser."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import browse, browser, dom
from visattn.pipelines.report.chart import line_chart

pytest.importorskip("diffusers")

from visattn.pipelines.generate import Settings
from visattn.pipelines.report.html import page
from visattn.pipelines.report.video_files import contact_sheet, write_mp4


def summary(output="image", **more):
    site = {
        "model": "transformer",
        "site": "blocks.0.attn1",
        "compiled": False,
        "pattern": "na(window=3x9x9)",
        "backend": "tiles",
        "precision": None,
        "reason": "cheapest: 0.10 of dense (estimate)",
        "density": 0.0593,
        "hits": 15,
        "dense": 1,
        "kept": {},
        "exact": {},
        "stages": [],
        "calls": [],
        "fallbacks": {"a mask that is more than <padding>": 2},
        "sparse_seconds": 0.5,
        "dense_seconds": 0.25,
    }
    times = {"seconds": 2.0, "attention_seconds": 0.75, "runs": [{}]}
    one = {"index": 0, "seed": 7, "label": 3, "equal": False, "psnr": 23.4, "ssim": 0.871, "lpips": None}
    return {
        "model": "digits <b>",
        "pipeline": "PixelDiTPipeline",
        "pattern": "na(window=3x9x9)",
        "settings": {"pattern": "na(window=3x9x9)", "output": output, "steps": None, "labels": (3,)},
        "versions": {"torch": "2.15.0", "triton": None},
        "device_name": "a CPU",
        "dtype": "float32",
        "busy": "",
        "density": 0.0593,
        "times": {"sparse": times, "dense": times | {"seconds": 3.0}},
        "speedup": {"seconds": 1.5, "attention_seconds": 0.5},
        "mean": {"psnr": 23.4, "ssim": 0.871, "lpips": None},
        "lpips": "left out: the package lpips is not installed",
        "measured": {"order": "sparse and dense take turns"},
        "attention": {"sites_hit": 1, "sites_patched": 1, "sites": [site]},
        f"{output}s": [one | {"divergence": [0.01, 0.05, 0.2]}],
    } | more


@pytest.fixture
def images(tmp_path):
    for kind, value in (("dense", 60), ("sparse", 200)):
        Image.fromarray(np.full((16, 16), value, np.uint8)).save(tmp_path / f"{kind}-000.png")
    return tmp_path


@pytest.fixture
def videos(tmp_path):
    pytest.importorskip("av")
    pixels = np.random.default_rng(0).random((4, 16, 16, 1), np.float32)
    for kind in ("dense", "sparse"):
        write_mp4(tmp_path / f"{kind}-000.mp4", pixels, 8)
    contact_sheet({"dense": pixels, "sparse": pixels}).save(tmp_path / "sheet-000.png")
    return tmp_path


class Outline(HTMLParser):
    """Checks that tags are closed in order, and keeps what a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


def test_the_page_says_what_the_report_says_and_needs_nothing_else(images):
    text = page(summary(), images)
    assert all(link.startswith("data:") for link in Outline(text).links)
    assert text.count("<script") == text.count("<script>") == 1 and "http:" not in text and "https:" not in text
    pictures = [base64.b64decode(p) for p in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)]
    assert pictures[:2] == [(images / f"{kind}-000.png").read_bytes() for kind in ("dense", "sparse")]
    assert np.asarray(Image.open(io.BytesIO(pictures[2]))).tolist() == [[140] * 16] * 16
    assert len(pictures) == 3
    for shown in (
        "1.50x faster", "2.00x slower", "5.9%", "23.4 dB", "0.871", "blocks.0.attn1", "tiles", "0.059", "750 ms",
        "2 x fell back: a mask that is more than &lt;padding&gt;", "digits &lt;b&gt;", "seed 7",
        "lpips is not installed",
    ):  # fmt: skip
        assert shown in text, shown
    assert "digits <b>" not in text


def test_equal_busy_and_without_latents(images):
    one = summary()["images"][0] | {"equal": True, "psnr": None, "ssim": None, "divergence": []}
    mean = {"psnr": None, "ssim": None, "lpips": 0.125}
    text = page(summary(images=[one], mean=mean, busy="the machine was busy"), images)
    Outline(text)
    assert "equal to dense" in text and "the machine was busy" in text
    assert "does not show its latents" in text and "<svg" not in text
    assert "LPIPS to dense" in text and "0.125" in text


def test_large_videos_stay_files(videos, monkeypatch):
    from visattn.pipelines.report import html as report_html

    links = Outline(page(summary("video"), videos)).links
    assert sum(link.startswith("data:video/mp4") for link in links) == 2
    monkeypatch.setattr(report_html, "LARGEST_VIDEO", 10)
    links = Outline(page(summary("video"), videos)).links
    assert "dense-000.mp4" in links and "sparse-000.mp4" in links


def test_the_chart_puts_values_where_they_belong():
    text = line_chart({"a": [0.0, 0.5, 1.0], "b & c": [0.25]}, "step", "distance")
    points = re.findall(r'<polyline points="([^"]*)"', text)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in points[0].split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x0 < x2 and y0 > y2
    assert float(points[1].split(",")[1]) == pytest.approx(y0 + 0.25 * (y2 - y0), abs=0.2)
    assert "b &amp; c" in text
    assert "<polyline" in line_chart({"flat": [0.0, 0.0]}, "step", "distance")
    assert "nan" not in line_chart({"broken": [float("nan"), 1.0, float("inf")]}, "step", "distance")


def test_settings_that_were_not_given_say_what_that_means(images):
    settings = dataclasses.asdict(Settings(pattern="na(window=3x9x9)"))
    found = page(summary(settings=settings), images)
    cells = dict(re.findall(r"<tr><td class=t>([^<]*)</td><td class=t>([^<]*)</td></tr>", found))
    own = {"steps", "guidance", "size", "frames", "precision", "weights"}
    for name, value in settings.items():
        said = cells[name.replace("_", " ")]
        assert (said == "the model&#x27;s own") == (name in own), name
        if value is None or value == ():
            assert said in {"the model&#x27;s own", "none", "all", "one process"}


@browser
@pytest.mark.parametrize("kind", ["images", "videos"])
def test_a_real_browser_renders_the_page_without_complaint(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    file = tmp_path / "report.html"
    file.write_text(page(summary(kind[:-1]), folder), encoding="utf-8")
    picture, complaints = browse(file, tmp_path)
    assert not complaints
    assert picture.shape == (1600, 1200)
    # Text, tables and pictures everywhere down the page, not one blank or broken area.
    assert all(band.std() > 2 for band in picture[:1200].reshape(6, 200, 1200))


@browser
@pytest.mark.parametrize(("kind", "columns"), [("images", 4), ("videos", 3)])
def test_the_slider_compares_in_a_column_as_wide_as_the_others(kind, columns, request, tmp_path):
    folder = request.getfixturevalue(kind)
    file = tmp_path / "report.html"
    file.write_text(page(summary(kind[:-1]), folder), encoding="utf-8")
    found = dom(
        file,
        tmp_path,
        """const box = document.querySelector(".slider"), range = box.querySelector("input");
        range.value = 80; range.dispatchEvent(new Event("input"));
        const media = [...document.querySelectorAll(".row img, .row video")];
        document.title = JSON.stringify({
          cut: box.style.getPropertyValue("--cut"),
          clip: getComputedStyle(box.querySelector(".over")).clipPath,
          sources: media.map(each => each.src.length),
          widths: [...document.querySelectorAll(".row > figure")].map(each => each.getBoundingClientRect().width),
          page: document.querySelector(".row").getBoundingClientRect().width,
        });""",
    )
    assert found["cut"] == "80%"
    assert found["clip"].startswith("inset(0")
    assert len(found["widths"]) == columns
    assert max(found["widths"]) - min(found["widths"]) < 1
    assert found["page"] > 1050
    # Dense over sparse: the copies are of the first two.
    assert found["sources"][-2:] == found["sources"][1::-1]


@browser
def test_a_complaint_of_the_browser_would_be_seen(tmp_path):
    file = tmp_path / "bad.html"
    file.write_text("<!doctype html><script>nothing()</script>", encoding="utf-8")
    assert browse(file, tmp_path)[1]
