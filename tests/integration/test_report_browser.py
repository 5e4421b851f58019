"""A report in real Chromium: it opens without an error, loads nothing, filters, links, and shows hostile text as text.

Skips where Chromium and its driver are not installed (Debian: `apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from fake_run import fake_run, fake_trajectory

from latent_grpo.common.metrics import MetricsWriter
from latent_grpo.common.schema import encode
from latent_grpo.common.store import TrajectoryStore
from latent_grpo.deploy.bench.browser import chromium, missing, open_report, wait_for
from latent_grpo.deploy.view.report.build import write_report
from latent_grpo.deploy.view.run_view import open_run

pytestmark = [pytest.mark.integration, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script></script>{{title}}\u202e"
)


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three steps of four groups, learner records, evaluations before and after, and one group of hostile texts."""
    folder = fake_run(tmp_path_factory.mktemp("runs") / "run")
    store, rng = TrajectoryStore(folder.trajectories), np.random.default_rng(3)
    for step, reward in ((0, 0.0), (3, 1.0)):
        asked = fake_trajectory(rng, step=step + 1, group=0, index=0, reward=reward)
        store.write(step, encode([dataclasses.replace(asked, purpose="evaluation")], 3), "evaluation")
    hostile = [
        dataclasses.replace(
            fake_trajectory(rng, step=3, group=99, index=i, reward=0.0),
            group_uid=HOSTILE, problem_uid=HOSTILE, task=HOSTILE, response_text=HOSTILE, gold_answer=HOSTILE,
            parsed_answer=HOSTILE, worker=HOSTILE, grade_reason="no_answer",
        )
        for i in range(2)
    ]  # fmt: skip
    store.write(3, encode(hostile, 3))
    return write_report(open_run(folder.path))


def opened(browser, report, address=""):
    open_report(browser, report, address)


def text_of(browser, selector="main"):
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText", selector)


def listed(browser):
    return browser.execute_script("return [...document.querySelectorAll('.item')].map(a => a.getAttribute('href'))")


def choose(browser, name, value):
    browser.execute_script(
        "const f = document.querySelector(`[name=${arguments[0]}]`); f.value = arguments[1];"
        "f.dispatchEvent(new Event('input')); f.dispatchEvent(new Event('change'));",
        name,
        str(value),
    )


def test_it_opens_draws_its_curves_and_says_nothing_on_the_console(browser, report):
    opened(browser, report)
    assert "How this run went" in text_of(browser)
    assert "What the model thought: an example" in text_of(browser)
    browser.execute_script("document.querySelector('.plot').scrollIntoView()")
    wait_for(browser, "!!document.querySelector('.plot[data-drawn] svg')")
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(("score", "top"), [(0.0, 1.0), (0.25, 1.1 * 0.27)])
def test_a_single_evaluation_is_drawn_on_an_axis_of_its_own(browser, tmp_path, score, top):
    """Plotly's own axes would go from -1 to 1."""
    folder = fake_run(tmp_path / "run", steps=1)
    with MetricsWriter(folder.path) as metrics:
        error = 0.02 if score else 0.0
        metrics.write(0, {"sums/pass_at_1": score, "sums/standard_error": error}, kind="evaluation")
    opened(browser, write_report(open_run(folder.path)))
    browser.execute_script("document.querySelector('.plot').scrollIntoView()")
    wait_for(browser, "!!document.querySelector('.plot[data-drawn] svg')")
    x, y = browser.execute_script(
        "const {xaxis, yaxis} = document.querySelector('.plot[data-drawn]').layout; return [xaxis.range, yaxis.range]"
    )
    assert x == [-1, 1]
    assert y == pytest.approx([0, top])
    ticks = browser.execute_script(
        "return [...document.querySelector('.plot').querySelectorAll('.xtick')].map((tick) => tick.textContent)"
    )
    assert ticks == ["0"], "the only step"


def test_it_loads_nothing_but_itself(browser, report):
    opened(browser, report)
    names = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in names if not name.startswith(("data:", "blob:"))] == []
    refused = browser.execute_async_script(
        "const done = arguments[0]; fetch('https://example.org/').then(() => done('loaded'), () => done('refused'))"
    )
    assert refused == "refused"  # by the page's own policy, whatever the network


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("grade", "correct", 10), ("grade", "failed", 42), ("step", "2", 16), ("purpose", "evaluation", 2),
     ("reason", "masked", 27), ("reason", "all_equal", 12), ("reason", "length", 12), ("min", "99", 0)],
)  # fmt: skip
def test_a_filter_shows_what_it_names(browser, report, name, value, expected):
    opened(browser, report, "#/trajectories?n=100")
    assert len(listed(browser)) == 52
    choose(browser, name, value)
    choose(browser, "sort", "longest")
    browser.execute_script("document.querySelector('.more')?.click()")
    assert len(listed(browser)) == expected
    assert f"{name}={value}" in browser.current_url  # the choice can be linked to
    opened(browser, report, browser.current_url.partition(".html")[2])
    assert len(listed(browser)) == expected


def test_search_finds_texts_and_says_when_there_is_nothing(browser, report):
    opened(browser, report, "#/trajectories")
    choose(browser, "q", "CHAINS/5")
    assert len(listed(browser)) == 4
    choose(browser, "q", "no such text")
    assert "None of the 52 trajectories in this report matches" in text_of(browser)


def test_a_deep_link_shows_its_trajectory_with_thoughts_learner_and_group(browser, report):
    opened(browser, report, "#/trajectories?grade=correct&purpose=training&n=100")
    link = listed(browser)[0]
    opened(browser, report, link + "?at=2")
    page = text_of(browser)
    for word in ("Answered", "gold 3", "policy version", "Its group", "sample 3", "learner", "ratio", "advantage"):
        assert word in page
    assert text_of(browser, ".step h3").startswith("Step 2:")
    cells = browser.execute_script("return [...document.querySelectorAll('.heat td.cell')].map(c => c.title)")
    assert len(cells) % 3 == 0
    assert all("of the thought" in title and "probability" in title for title in cells)
    browser.execute_script("document.querySelector('.heat td[data-step=\"0\"]').click()")
    assert text_of(browser, ".step h3").startswith("Step 1:")
    assert "at=1" in browser.current_url
    browser.find_element("css selector", "[tabindex]").send_keys("\ue014")  # the right arrow key
    assert text_of(browser, ".step h3").startswith("Step 2:")
    assert browser.get_log("browser") == []


def test_a_link_to_what_is_not_there_says_so(browser, report):
    opened(browser, report, "#/trajectory/training/7/nothing/0")
    assert "Not in this report" in text_of(browser)


def test_a_response_of_many_steps_is_paged_and_an_empty_one_is_said(browser, tmp_path):
    long = fake_trajectory(np.random.default_rng(0), step=1, group=0, index=0, reward=1.0)
    steps = {
        name: np.resize(getattr(long, name), (250, 3)) for name in ("latent_ids", "latent_scores", "latent_log_probs")
    }
    nothing = {name: getattr(long, name)[:0] for name in (*steps, "hard_ids", "hard_log_probs")}
    rows = [
        dataclasses.replace(long, **steps),
        dataclasses.replace(long, **nothing, sample_index=1, finish_reason="aborted", reward=None),
    ]
    folder = fake_run(tmp_path / "run", steps=1)
    TrajectoryStore(folder.trajectories).write(2, encode(rows, 3))
    path = write_report(open_run(folder.path))
    opened(browser, path, "#/trajectories?step=2")
    first, second = listed(browser)
    opened(browser, path, first + "?at=200")
    assert "steps 1 to 200 of 253" in text_of(browser)
    browser.find_element("css selector", "[tabindex]").send_keys("\ue014")
    assert "steps 201 to 253 of 253" in text_of(browser)
    assert text_of(browser, ".step h3").startswith("Step 201:")
    opened(browser, path, second)
    assert "interrupted before its first step" in text_of(browser)
    assert browser.get_log("browser") == []


def test_the_same_problem_is_shown_at_both_policy_versions(browser, report):
    opened(browser, report, "#/trajectories?purpose=evaluation")
    opened(browser, report, listed(browser)[0])
    assert "The same problem at other policy versions" in text_of(browser)


@pytest.mark.parametrize(
    "address", ["#/trajectories?reason=no_answer", "#/trajectory", "#/group", "#/health", "#/settings"]
)
def test_hostile_text_is_shown_and_never_run(browser, report, address):
    opened(browser, report, "#/trajectories?reason=no_answer")
    link = listed(browser)[0]
    if address == "#/trajectory":
        address = link
    elif address == "#/group":
        address = link.replace("#/trajectory/", "#/group/").rsplit("/", 1)[0]
    opened(browser, report, address)
    if address.startswith(("#/traj", "#/group")):
        assert "<img src=x onerror=" in text_of(browser)
        assert "\u202e" not in text_of(browser)
    assert browser.title == "run · latent-grpo report"
    assert browser.execute_script("return document.querySelectorAll('main img, main script').length") == 0
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_follows_the_theme_and_fits_a_phone(browser, report, theme):
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        opened(browser, report, "#/trajectories")
        link = listed(browser)[0]
        for address in ("", "#/trajectories", link, "#/health", "#/settings"):
            opened(browser, report, address)
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            assert wide <= 390, f"{address} is {wide} pixels wide"
        back = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = np.mean([int(v) for v in back[4:-1].split(",")])
        assert (brightness > 128) == (theme == "light")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
