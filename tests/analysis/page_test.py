"""The page and its images: complete, self-contained, readable."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from moe_vlm_jax.analysis import figures, page, summary
from tests import browser as browser_lib
from tests.analysis import examples
from tests.evaluation import page_test

WEIGHTS = [
    {"layer": layer, "distances": (0.3 * (1 - np.eye(4))).tolist(), "drift": [0.1, 0.2, 0.0, 0.3]}
    for layer in examples.LAYERS
]


def summarized(name: str, **more) -> dict:
    found = summary.summarize(examples.planted(name))
    return found | {"weights": [], "gradient_consistency": {}} | more


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    curves = {"stgc/consistency/0": {"steps": [1, 2], "values": [0.1, 0.2]}}
    found = summarized("<b>mine</b>", weights=WEIGHTS, gradient_consistency=curves)
    other = summarized("other")
    images = page.draw(found, counting="top-1", other=other)
    path = page.write(folder, found, images, counting="top-1", other=other)
    return path, images


def test_every_figure_is_a_file_and_on_the_page(written):
    path, images = written
    names = [image.name for image in images]
    assert names == [
        *("load", "layers", "modality", "preference", "information", "classes", "paths", "paths_pca"),
        *("distances", "drift", "gradients"),
    ]
    reader = page_test.Reader(path.read_text())
    sources = [image["src"] for image in reader.all("img")]
    assert len(sources) == len(images)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for image in images:
        assert (path.parent / f"{image.name}.png").read_bytes() == image.png
        assert Image.open(io.BytesIO(image.png)).width == 1155  # the width of the page's text


def test_names_are_escaped(written):
    text = written[0].read_text()
    assert "&lt;b&gt;mine" in text
    assert "<b>mine" not in text


def test_what_was_not_measured_is_said(tmp_path):
    found = summarized("mine")
    images = page.draw(found, counting="top-k", other=None)
    assert {image.name for image in images}.isdisjoint({"drift", "distances", "gradients"})
    text = page.write(tmp_path, found, images, counting="top-k", other=None).read_text()
    assert "Gradient consistency: no run" in text
    assert "2+3" in text  # a step of a path of all choices


def test_drift_alone_may_be_missing(tmp_path):
    found = summarized("mine", weights=[row | {"drift": None} for row in WEIGHTS])
    images = page.draw(found, counting="top-1", other=None)
    assert "distances" in {image.name for image in images}
    assert "--dense" in page.write(tmp_path, found, images, counting="top-1", other=None).read_text()


def test_runs_with_other_layers_have_no_common_axis():
    other = json.loads(json.dumps(summarized("other")))
    other["counting"]["top-1"]["layers"][0]["layer"] = 0
    with pytest.raises(ValueError, match="MoE layers in different places"):
        page.draw(summarized("mine"), counting="top-1", other=other)


def test_bars_are_as_high_as_the_figures():
    layers = summarized("mine")["counting"]["top-1"]["layers"]
    axes = figures.load({"mine": layers}, counting="top-1").axes[0]
    heights = np.array([[bar.get_height() for bar in group] for group in axes.containers])  # [E, L]
    np.testing.assert_allclose(heights.T, [layer["load"] for layer in layers])
    assert axes.get_xlabel() == "decoder layer"
    assert axes.get_ylabel() == "share of choices (top-1)"


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.layer_figures({"mine": summarized("mine")["counting"]["top-1"]["layers"]})
    assert dict(matplotlib.rcParams) == before


@pytest.mark.browser
@pytest.mark.skipif(browser_lib.executable() is None, reason=browser_lib.MISSING)
@pytest.mark.parametrize("width", [400, 1180])
def test_a_browser_shows_every_image_within_the_window(written, tmp_path, width):
    with browser_lib.Browser(tmp_path) as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.open(written[0].as_uri())
        browser.wait("document.images.length === 11")
        assert browser.wait("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert not browser.errors
