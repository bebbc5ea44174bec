"""The page in a real Chromium: quiet, self-contained, for mouse and keyboard, on a phone, in the dark, on paper."""

from __future__ import annotations

import base64
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browser, complaints, open_page, requests, show, wait_until
from report_runs import ENDING, HELD, HOSTILE, LAYERS, full, small, trained_by

from curvdiag.monitor.description import rule
from curvdiag.optim import LPSGD, LPSGDM
from curvdiag.record import RunStore
from curvdiag.report import write_report
from curvdiag.schedules.stability import stability_limit

__all__ = ["browser"]

SECTIONS = (
    "spectrum-section", "edge", "trace", "anisotropy", "layers", "noise", "align", "settings", "schedule-anisotropy_p",
    "schedule-sharpness_capped", "loss", "cost", "others", "events", "configuration", "versions",
)  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return write_report(full(folder / "run.db"), folder / "report.html")


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with few figures, which opens sooner."""
    folder = tmp_path_factory.mktemp("runs")
    run = full(
        folder / "run.db", only=("curv/hessian/trace", "curv/layer", "train/", "curv/hessian/lambda_max", "curv/pre")
    )
    return write_report(run, folder / "report.html")


def ask(browser: Any, script: str, *arguments: Any) -> Any:
    return browser.execute_script(f"return {script}", *arguments)


def charts(browser: Any) -> list[str]:
    return list(ask(browser, "[...document.querySelectorAll('.chart')].map(one => one.id)"))


def step_shown(browser: Any) -> int:
    return int(re.match(r"step (\d+)", ask(browser, "document.getElementById('where').textContent")).group(1))


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def hover_text(browser: Any, chart: str, target: Any, aside: int = 0) -> str:
    """What a figure says where the mouse rests, so far from the middle of an element."""
    from selenium.webdriver.common.action_chains import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", target)
    nudges = iter(range(10_000))

    def text() -> str:
        ActionChains(browser).move_to_element_with_offset(target, aside + next(nudges) % 2, 0).perform()
        return str(ask(browser, f"document.querySelector('#chart-{chart} .hoverlayer')?.textContent || ''"))

    return str(wait_until(text))


def test_it_opens_without_a_complaint_and_without_a_request(browser: Any, report: Path) -> None:
    open_page(browser, report)
    assert ask(browser, "[...document.querySelectorAll('main > section')].map(one => one.id)") == list(SECTIONS)
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    show(browser, *charts(browser))
    assert complaints(browser) == []
    assert [one for one in requests(browser) if not one.startswith("data:")] == [report.as_uri()]


def test_figures_are_drawn_when_they_come_near_and_their_room_is_kept(browser: Any, report: Path) -> None:
    open_page(browser, report)
    drawn = "[...document.querySelectorAll('.chart:has(svg.main-svg)')].map(one => one.id)"
    assert {"chart-heatmap", "chart-spectrum"} <= set(ask(browser, drawn))
    assert len(ask(browser, drawn)) < len(charts(browser)) / 2
    height = ask(browser, "document.body.scrollHeight")
    show(browser, *charts(browser))
    assert set(ask(browser, drawn)) == set(charts(browser))
    assert ask(browser, "document.body.scrollHeight") == height


def test_a_request_out_of_the_page_would_be_refused(browser: Any, compact: Path) -> None:
    open_page(browser, compact)
    browser.execute_async_script(
        "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('sent'), () => done('refused'))"
    )
    assert any("Content Security Policy" in one for one in complaints(browser))


def test_names_stay_text_wherever_they_stand(browser: Any, report: Path) -> None:
    open_page(browser, report)
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    assert ask(browser, "document.querySelector('h1').textContent") == HOSTILE
    assert ask(browser, "document.title") == f"{HOSTILE} - curvdiag"
    assert ask(browser, "document.querySelectorAll('main img, main script, main b, header script').length") == 0
    body = ask(browser, "document.body.textContent")
    for place in (f"about {ENDING}", f"nested.{ENDING}", f"val/{HOSTILE}"):
        assert place in body
    show(browser, "chart-layer-matrix")
    ticks = ask(browser, "[...document.querySelectorAll('#chart-layer-matrix .ytick text')].map(t => t.textContent)")
    assert "<b>bold</b>" in ticks[[one[-4:] == "</b>" for one in ticks].index(True)]
    assert len(ticks) == len(LAYERS)
    assert "2.conv" in ticks
    assert ticks.index("2.conv") < ticks.index("10.head")


def test_the_slider_by_keyboard_shows_the_spectrum_of_another_step(browser: Any, compact: Path) -> None:
    open_page(browser, compact)
    curve = "JSON.stringify(document.getElementById('chart-spectrum').data[1].y)"
    line = "document.getElementById('chart-heatmap').layout.shapes[0].x0"
    ask(browser, "document.getElementById('time').focus()")
    last = ask(browser, curve)
    assert step_shown(browser) == 400
    press(browser, "\ue012", "\ue012")  # left
    assert step_shown(browser) == 360
    assert ask(browser, line) == 360
    assert ask(browser, curve) != last
    assert "step 360" in ask(browser, "document.getElementById('time').getAttribute('aria-valuetext')")
    press(browser, "\ue011")  # home
    assert step_shown(browser) == 0
    press(browser, "\ue010")  # end
    assert step_shown(browser) == 400
    assert ask(browser, curve) == last
    assert ask(browser, "document.getElementById('chart-spectrum').getAttribute('aria-label')").startswith(
        "Eigenvalue density of the Hessian at step 400"
    )


def test_the_slider_and_the_heatmap_by_mouse(browser: Any, compact: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    open_page(browser, compact)
    slider = browser.find_element(By.ID, "time")
    ActionChains(browser).move_to_element(slider).click().perform()
    assert step_shown(browser) == 200
    plot = browser.find_element(By.CSS_SELECTOR, "#chart-heatmap .nsewdrag")
    text = hover_text(browser, "heatmap", plot, -plot.size["width"] // 4)
    found = re.match(r"step (\d+)eigenvalue −?[\d.]+density [\d.]+", text)
    assert found
    ActionChains(browser).click().perform()
    wait_until(lambda: step_shown(browser) == int(found.group(1)))
    assert 60 <= step_shown(browser) <= 140


def test_hover_tells_the_value_with_its_interval(browser: Any, compact: Path) -> None:
    from selenium.webdriver.common.by import By

    open_page(browser, compact)
    show(browser, "chart-trace-line")
    point = browser.find_elements(By.CSS_SELECTOR, "#chart-trace-line .points path")[10]
    text = hover_text(browser, "trace-line", point)
    assert re.fullmatch(r"step 200, epoch 5150\.4 ± 17 \(95 %\)", text)


def test_every_figure_has_words_and_a_table_that_the_keyboard_opens(browser: Any, report: Path) -> None:
    open_page(browser, report)
    labels = ask(browser, "[...document.querySelectorAll('.chart')].map(one => one.getAttribute('aria-label'))")
    assert all(re.search(r"(chart|Heatmap|density|Matrix).*\d.*table below\.$", one) for one in labels)
    ask(browser, "document.querySelector('#trace details summary').focus()")
    press(browser, "\ue007")
    cells = "[...document.querySelectorAll('#trace tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    rows = wait_until(lambda: ask(browser, cells))
    assert rows[0] == ["step", "curv/hessian/trace", "standard error"]
    assert rows[1] == ["0", "340", "13"]
    assert len(rows) == 22


def test_everything_is_labelled_and_reached_by_the_keyboard(browser: Any, compact: Path) -> None:
    open_page(browser, compact)
    controls = "[...document.querySelectorAll('select, input')].filter(one => one.offsetParent)"
    assert ask(browser, f"{controls}.every(one => one.labels.length && one.labels[0].textContent.trim())")
    headings = ask(browser, "[...document.querySelectorAll('h1, h2, h3')].map(one => one.tagName)")
    assert headings[:3] == ["H1", "H2", "H3"]
    seen = set()
    for _ in range(60):
        press(browser, "\ue004")
        seen.add(ask(browser, "document.activeElement.id || document.activeElement.tagName"))
        style = ask(browser, "getComputedStyle(document.activeElement).outlineStyle")
        assert style != "none" or ask(browser, "document.activeElement === document.body")
    assert {"block", "time", "quantity", "A", "SUMMARY"} <= seen
    assert ask(browser, "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")


def test_another_block_and_another_quantity_are_drawn_when_chosen(browser: Any, compact: Path) -> None:
    open_page(browser, compact)
    show(browser, "chart-layer-matrix", "chart-heatmap")
    before = ask(browser, "[document.getElementById('chart-heatmap').data[0].zmin, "
                 "JSON.stringify(document.getElementById('chart-layer-matrix').data[0].z)]")  # fmt: skip
    for chooser, name in (("block", "Hessian of 2.conv"), ("quantity", "trace")):
        browser.execute_script(
            "const one = document.getElementById(arguments[0]);"
            "one.value = arguments[1]; one.dispatchEvent(new Event('change'))",
            chooser,
            name,
        )
    assert ask(browser, "document.getElementById('chart-heatmap').data[0].zmin") != before[0]
    assert ask(browser, "JSON.stringify(document.getElementById('chart-layer-matrix').data[0].z)") != before[1]
    assert "Hessian of 2.conv" in ask(browser, "document.getElementById('chart-heatmap').getAttribute('aria-label')")


def test_a_narrow_window_needs_no_sideways_scrolling(browser: Any, report: Path) -> None:
    open_page(browser, report, width=390)
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    show(browser, *charts(browser))
    assert ask(browser, "document.documentElement.scrollWidth") == 390
    ends = ask(browser, "[...document.querySelectorAll('.chart, .scroll')].map(one => one.getBoundingClientRect())")
    assert max(one["right"] for one in ends) <= 390
    assert min(one["width"] for one in ends) > 340


def test_the_dark_has_its_own_colours_also_when_it_comes_later(browser: Any, compact: Path) -> None:
    ink = "document.getElementById('chart-trace-line').layout.font.color"
    paper = "getComputedStyle(document.body).backgroundColor"
    open_page(browser, compact)
    show(browser, "chart-trace-line")
    assert (ask(browser, ink), ask(browser, paper)) == ("#222222", "rgb(255, 255, 255)")
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    wait_until(lambda: ask(browser, ink) == "#e8e8e8")
    assert ask(browser, paper) == "rgb(21, 24, 27)"
    open_page(browser, compact, dark=True)
    show(browser, "chart-trace-line")
    assert ask(browser, ink) == "#e8e8e8"
    assert complaints(browser) == []


def test_it_prints_with_light_inks_at_the_width_of_the_paper_and_comes_back(browser: Any, report: Path) -> None:
    open_page(browser, report, dark=True)
    browser.execute_script(
        "window.printed = []; addEventListener('beforeprint', () => printed.push("
        "[...document.querySelectorAll('.chart')].map(one => [one.layout.width, one.layout.font.color])))"
    )
    page = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"])
    assert page.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", page)) > 5
    drawn = sum(len(zlib.decompress(part)) for part in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", page, re.DOTALL)
                if part[:1] == b"x")  # fmt: skip
    assert drawn > 200_000  # the figures are lines and letters in it
    (charts,) = ask(browser, "window.printed")
    assert {tuple(one) for one in charts} == {(640, "#222222")}
    assert ask(browser, "document.getElementById('chart-trace-line').layout.font.color") == "#e8e8e8"
    assert ask(browser, "document.getElementById('chart-heatmap')._fullLayout.width") > 1000


def test_of_several_runs_one_is_chosen_and_only_its_sections_are_there(browser: Any, tmp_path: Path) -> None:
    page = write_report(small(tmp_path / "run.db", "first", ENDING), tmp_path / "report.html")
    open_page(browser, page)
    sections = "[...document.querySelectorAll('main > section')].map(one => one.id)"
    assert ask(browser, sections) == ["edge", "loss", "versions"]
    assert ask(browser, "document.querySelector('h1').textContent") == f"run.db: {ENDING}"
    loss = "document.getElementById('chart-loss-line').data[0].y"
    assert ask(browser, loss) == [2, 2, 2]
    ask(browser, "document.getElementById('run').focus()")
    press(browser, "\ue015")  # down: the run before
    wait_until(lambda: ask(browser, loss) == [1, 1, 1])
    assert ask(browser, "document.querySelector('h1').textContent") == "run.db: first"
    assert ask(browser, "document.activeElement.id") == "run"
    assert complaints(browser) == []


def test_the_edge_of_stability_is_two_over_the_rate_and_more_with_momentum(browser: Any, compact: Path) -> None:
    open_page(browser, compact)
    lines = "document.getElementById(arguments[0]).data.map(one => [one.name, one.y[0]])"
    show(browser, "chart-lambda-max", "chart-preconditioned")
    found = dict(ask(browser, lines, "chart-lambda-max"))
    assert found["λmax"] == 16
    assert found["2 / lr"] == pytest.approx(2 / 0.0501)
    assert found["2 (1 + β) / lr, heavy ball"] == pytest.approx(3.8 / 0.0501)
    name, first = ask(browser, lines, "chart-preconditioned")[-1]
    assert name.endswith("averaged momentum")
    assert first == pytest.approx(38 / 0.0501)


def test_each_optimizer_has_its_own_edge_of_stability(browser: Any, tmp_path: Path) -> None:
    weight, momentum = [torch.nn.Parameter(torch.zeros(1))], {"momentum": 0.75}
    optimizers = [
        torch.optim.SGD(weight, 0.05), torch.optim.SGD(weight, 0.05, **momentum),
        torch.optim.SGD(weight, 0.05, nesterov=True, **momentum), LPSGD(weight, 0.05, 3.0),
        LPSGDM(weight, 0.05, 3.0, 0.75), torch.optim.Adam(weight, 0.05, (0.75, 0.9)),
        torch.optim.AdamW(weight, 0.05, (0.75, 0.9)),
    ]  # fmt: skip
    names = [rule(one) for one in optimizers]
    path = trained_by(tmp_path / "run.db", *names, "SGD, dampened momentum", "RMSprop", "")
    open_page(browser, write_report(path, tmp_path / "report.html"))
    lines = "edgeLines(state.data.held[arguments[0]], arguments[1], arguments[2]).map(one => one.values[0])"
    for number, one in enumerate(optimizers, 1):
        limit = stability_limit(one)
        key = f"curv/{'preconditioned' if limit.preconditioned else 'hessian'}/lambda_max"
        value, *edges = ask(browser, lines, number, key, limit.preconditioned)
        assert value == (300 if limit.preconditioned else 30)
        assert edges[-1] == pytest.approx(limit.limit / 0.05)
        if limit.preconditioned:
            assert len(edges) == 1
            assert ask(browser, lines, number, "curv/hessian/lambda_max", False) == [30]  # it has no edge there
        assert ask(browser, "edgeFact(state.data.held[arguments[0]])[1]", number) == (
            f"{value * 0.05:g} (edge {limit.limit:.4g})"
        )
    for number in (len(names) + 1, len(names) + 2):  # not known: that of gradient descent, and it is said
        assert ask(browser, lines, number, "curv/hessian/lambda_max", False) == [30, 40]
        assert "not known" in ask(browser, "edgeCaption(state.data.held[arguments[0]], false)", number)
    assert ask(browser, lines, len(names) + 3, "curv/hessian/lambda_max", False) == [30, 40, 70]
    assert complaints(browser) == []


def test_names_that_javascript_knows_are_names_like_any_other(browser: Any, tmp_path: Path) -> None:
    names = ("noise/{}", "schedule/{}/{}", "curv/layer/{}/{}", "curv/anisotropy/{}", "align/{}", "train/lr/{}")
    with RunStore(tmp_path / "run.db") as store:
        found = {name.replace("{}", word): 1.0 for name in names for word in ("constructor", "__proto__")}
        store.new_run("a", {"curvdiag": {"optimizer": "constructor"}}).record(0, found)
    open_page(browser, write_report(tmp_path / "run.db", tmp_path / "report.html"))
    show(browser, *charts(browser))
    assert complaints(browser) == []
    titles = ask(browser, "[...document.querySelectorAll('h3')].map(one => one.textContent)")
    assert titles.count("Constructor") == 3
    assert ask(browser, "document.getElementById('quantity').options.length") == 2


def test_a_schedule_says_when_it_held_and_why(browser: Any, report: Path) -> None:
    open_page(browser, report)
    cells = "[...document.querySelectorAll(`#${arguments[0]} > .scroll td, #${arguments[0]} > .scroll tbody th`)]"
    told = f"{cells}.map(one => one.textContent)"
    assert ask(browser, told, "schedule-anisotropy_p") == ["60", HELD]
    assert ask(browser, told, "schedule-sharpness_capped") == ["60", "another"]
    assert ask(browser, "document.querySelectorAll('main i').length") == 0

    browser.execute_script(
        "window.whole = state.data; const less = structuredClone(whole); less.held['1'].events = []; take(less)"
    )
    assert ask(browser, told, "schedule-anisotropy_p") == []
    browser.execute_script("take(whole)")
    assert ask(browser, told, "schedule-anisotropy_p") == ["60", HELD]
    assert complaints(browser) == []
