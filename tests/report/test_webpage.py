"""The HTML report in a real browser: it loads alone, draws, sorts and filters, in light and in dark."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from gptq_awq.evaluation.samples.difference import Parting, Sample, write_samples
from gptq_awq.evaluation.scores import Scores
from gptq_awq.report import main
from gptq_awq.report.distributions import kl_quantiles
from gptq_awq.report.looks import LOOKS, look_of
from gptq_awq.report.profile import profiles
from gptq_awq.results import Ledger, Result

PPL = "text/ppl@256"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,900"),
)


def run(method: str, bits: float, loss: float, model: str = "stories15M") -> Result:
    metrics = {
        PPL: 4 + loss,
        f"{PPL}/baseline": 4.0,
        f"{PPL}/delta": loss,
        f"{PPL}/delta_ci95": [loss - 0.01, loss + 0.01],
        "text/kl": loss / 3,
        "text/top1_agreement": 1 - loss / 2,
    }
    return Result(
        *(method, bits, bits + 0.5, 64, False, model, "done", metrics, int(bits * 1e6), 16_000_000),
        *({"load": 1.5, "quantize": 3.0, "evaluate": 2.0}, 900_000_000, "ledger.jsonl"),
        {"model": {"source": model, "sha256": "ab" * 32}, "tokens": {"eval": {"text": "cd" * 32}}, "code": "ef" * 32},
        {"seed": 0},
    )


def write(root: Path, name: str, result: Result, sites: tuple[str, ...] = ("attn.q+k", "mlp.down")) -> None:
    (root / name).mkdir(parents=True)
    result.write(root / name)
    rows = [
        {"name": f"{b}.{part}", "block": b, "site": site, "error_after": 0.01 * (b + 1), "weight_error": 0.02}
        for b in range(4)
        for site in sites
        for part in site.split("+")
    ]
    Ledger.create(root / name / "ledger.jsonl").append(rows)
    rng = np.random.default_rng(len(name))
    nll = rng.normal(300, 30, 32)
    tokens = {"text/tokens": np.full(32, 128.0), "text/nll/baseline": nll}
    Scores(tokens | {"text/nll": nll + 128 * result.metrics[f"{PPL}/delta"] / 4}).write(root / name)


LOSSES = {("gptq", 8): 0.001, ("gptq", 4): 0.1, ("awq", 4): 0.12, ("rtn", 4): 0.3, ("gptq", 3): 0.8, ("rtn", 2): 50.0}


@pytest.fixture(scope="module")
def page(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("page")
    for (method, bits), loss in LOSSES.items():
        write(root / "runs", f"{method}{bits}", run(method, bits, loss))
    write(
        root / "runs", "broken", replace(run("awq", 2, 1.0), metrics={PPL: float("inf"), f"{PPL}/delta": float("inf")})
    )
    write(root / "runs", "z</script><b>&", run("gptq", 4, 0.2, model="<i>other</i>"))
    (root / "runs" / "killed").mkdir()
    (root / "runs" / "killed" / "run.log").write_text("")
    assert main([str(root / "runs"), "--out", str(root), "--format", "html"]) == 0
    return root / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: Any) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is an extra: pip install gptq_awq[dev]")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium or its driver (chromedriver) is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    browser.get(page.as_uri())
    return browser


def column(browser: Any, index: int, table: str = "#table-0") -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(cell => cell.firstChild?.textContent ?? '')"
    return browser.execute_script(script, f"{table} tbody tr:not(.full) > :nth-child({index})")


def count(browser: Any, selector: str) -> int:
    return browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def test_nothing_is_fetched_and_nothing_is_complained_of(opened: Any, page: Path) -> None:
    assert [entry["message"] for entry in opened.get_log("browser")] == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert not re.search(r"(?:src|href)=\"(?!data:)", page.read_text())


def test_a_click_on_a_header_sorts_and_another_turns_round(opened: Any) -> None:
    heads = opened.find_elements("css selector", "#table-0 thead button")
    index = next(i for i, head in enumerate(heads, 1) if head.get_attribute("title") == PPL)
    unsorted = [float(text) for text in column(opened, index)]
    heads[index - 1].click()
    assert [float(text) for text in column(opened, index)] == sorted(unsorted)
    opened.find_elements("css selector", "#table-0 thead button")[index - 1].click()
    assert [float(text) for text in column(opened, index)] == sorted(unsorted, reverse=True)
    assert opened.find_element("css selector", "#table-0 th[aria-sort]").get_attribute("aria-sort") == "descending"
    method = opened.find_elements("css selector", "#table-0 thead button")[0]
    method.click()
    assert column(opened, 1) == sorted(column(opened, 1))


def test_typing_and_choosing_hide_rows_and_marks(opened: Any) -> None:
    rows, marks = count(opened, "#table-0 tbody tr"), count(opened, "#frontier .mark")
    opened.find_element("id", "text").send_keys("rtn")
    assert set(column(opened, 1)) == {"rtn"}
    assert 0 < count(opened, "#frontier .mark") < marks
    opened.find_element("id", "text").send_keys(" nowhere")
    assert "no run matches" in opened.find_element("id", "table-0").text
    opened.find_element("id", "reset").click()
    assert count(opened, "#table-0 tbody tr") == rows
    opened.find_element("css selector", "#bits option[value='4']").click()
    assert set(column(opened, 2)) == {"4"}
    opened.find_element("css selector", "#method option[value='awq']").click()
    assert column(opened, 1) == ["awq"]
    opened.find_element("id", "reset").click()


def test_plots_have_marks_in_each_choice(opened: Any) -> None:
    assert count(opened, "#frontier svg") - count(opened, "#frontier .legend svg") == 2  # one per model
    for option in opened.find_elements("css selector", "#frontier-y option"):
        option.click()
        assert count(opened, "#frontier .mark") == len(LOSSES) + 1
        assert count(opened, "#frontier .ring") >= 2
    assert count(opened, "#layers figure") == 2  # one per site
    assert count(opened, "#layers .line") > 2
    assert count(opened, "#costs rect.bar") >= 3 * len(LOSSES)
    for name in ("d", "cx", "cy", "x", "y", "width", "transform"):
        found = opened.execute_script(
            "return [...document.querySelectorAll(`svg [${arguments[0]}]`)].map(e => e.getAttribute(arguments[0]))",
            name,
        )
        assert not [value for value in found if "NaN" in value or "undefined" in value or "Infinity" in value], name


def test_what_is_pareto_optimal_is_ringed(opened: Any) -> None:
    opened.find_element("css selector", "#model option[value='stories15M']").click()
    labels = opened.execute_script(
        "return [...document.querySelectorAll('#frontier .mark')].map(e => e.getAttribute('aria-label'))"
    )
    optimal = {label.split("\n")[0] for label in labels if "Pareto" in label}
    assert optimal == {"gptq, 8 bits", "gptq, 4 bits", "gptq, 3 bits", "rtn, 2 bits"}
    opened.find_element("id", "reset").click()


def test_only_runs_whose_activations_are_rounded_alike_share_a_front(browser: Any, tmp_path: Path) -> None:
    runs = {"a": run("fp", 16, 0.0), "b": run("gptq", 4, 0.1), "c": run("rtn", 4, 0.3)}
    runs |= {"d": replace(run("fp", 16, 0.05), act="int8"), "e": replace(run("gptq", 4, 0.2), act="int8", kv="int4")}
    for name, result in runs.items():
        write(tmp_path / "runs", name, result)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path), "--format", "html"]) == 0
    browser.get((tmp_path / "report.html").as_uri())
    assert count(browser, "#frontier .mark") == 4  # all but full precision
    assert count(browser, "#frontier .front") == 3
    assert count(browser, "#frontier .ring") == 3  # all but rtn


def test_runs_are_chosen_for_the_layer_plots(opened: Any) -> None:
    before = count(opened, "#layers .legend span")
    opened.execute_script("document.querySelector('#layers details').open = true")
    opened.find_element("css selector", "#layers-runs input:checked").click()
    assert count(opened, "#layers .legend span") == before - 1


def test_the_page_says_what_is_missing_and_shows_names_as_they_are(opened: Any) -> None:
    assert "killed" in opened.find_element("id", "warnings").text
    assert "<i>other</i>" in opened.find_element("id", "tables").text
    assert count(opened, "main i:not(td i)") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system(opened: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    colours = opened.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (paper > ink) is (scheme == "light")


def test_a_narrow_window_scrolls_tables_not_the_page(opened: Any) -> None:
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 400
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_same_runs_give_the_same_page(page: Path) -> None:
    before = page.read_bytes()
    assert main([str(page.parent / "runs"), "--out", str(page.parent), "--format", "html"]) == 0
    assert page.read_bytes() == before


def test_each_run_leads_to_its_folder_from_wherever_the_page_is(browser: Any, page: Path, tmp_path: Path) -> None:
    for folder in (page.parent, tmp_path / "elsewhere"):
        assert main([str(page.parent / "runs"), "--out", str(folder), "--format", "html"]) == 0
        browser.get((folder / "report.html").as_uri())
        links = browser.execute_script("return [...document.querySelectorAll('tbody th a')].map(a => a.href)")
        assert len(links) == len(LOSSES) + 2
        assert all((Path(unquote(urlsplit(link).path)) / "results.json").is_file() for link in links)


def test_full_precision_has_a_row_and_arrows_say_which_way_is_better(opened: Any) -> None:
    cells = opened.execute_script("return [...document.querySelector('#table-0 tr.full').cells].map(c => c.innerText)")
    heads = opened.execute_script("return [...document.querySelectorAll('#table-0 thead th')].map(c => c.innerText)")
    row = dict(zip([head.replace("\u200b", "").split("\n")[-1].strip() for head in heads], cells, strict=True))
    assert row["method"] == "full precision"
    assert row["ppl@256\u00a0↓"] == "4.000"
    assert row["top1_agreement\u00a0↑"] == "1"


def test_a_view_is_in_the_address_and_comes_back_from_it(browser: Any, page: Path) -> None:
    browser.get(page.as_uri() + "#method=gptq&bits=4")
    assert set(column(browser, 1)) == {"gptq"}
    assert set(column(browser, 2)) == {"4"}
    browser.find_element("id", "text").send_keys("nothing")
    assert "text=nothing" in browser.current_url
    browser.find_element("id", "reset").click()
    assert "#" not in browser.current_url


def test_the_keyboard_reaches_marks_and_tells_what_a_pointer_is_told(opened: Any) -> None:
    opened.execute_script("document.querySelector('#frontier .mark').focus()")
    told = opened.find_element("id", "tip").text
    assert f"Δ {PPL}:" in told
    opened.execute_script("document.activeElement.blur()")
    assert not opened.find_element("id", "tip").is_displayed()


def test_plots_and_tables_can_be_taken_away(opened: Any) -> None:
    script = """
        const saved = [];
        HTMLAnchorElement.prototype.click = function () { saved.push([this.download, this.href]); };
        for (const button of document.querySelectorAll('#frontier .save button, #tables .save button')) button.click();
        setTimeout(() => arguments[0](saved), 600);
    """
    saved = dict(opened.execute_async_script(script))
    assert {"frontier_stories15M.svg", "frontier_stories15M.png", "stories15M.csv"} <= set(saved)
    svg = unquote(saved["frontier_stories15M.svg"].partition(",")[2])
    assert "var(" not in svg
    assert svg.startswith("<svg")
    assert base64.b64decode(saved["frontier_stories15M.png"].partition(",")[2])[:4] == b"\x89PNG"
    lines = unquote(saved["stories15M.csv"].partition(",")[2]).splitlines()
    assert lines[0].startswith("method,")
    assert len(lines) == 1 + len(LOSSES) + 1


def test_the_first_column_stays_where_the_table_is_scrolled(opened: Any) -> None:
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        script = """
            const scroll = document.querySelector('#table-0 .scroll'), cell = scroll.querySelector('tbody th');
            const before = cell.getBoundingClientRect().left;
            scroll.scrollLeft = 200;
            return [scroll.scrollLeft, before, cell.getBoundingClientRect().left];
        """
        scrolled, before, after = opened.execute_script(script)
        assert scrolled > 100
        assert after == before
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_layer_errors_open_at_the_fewest_bits_that_methods_share(opened: Any) -> None:
    shown = opened.execute_script(
        "return [...document.querySelectorAll('#layers .legend span')].map(e => e.textContent)"
    )
    assert len(shown) == 2
    assert all("2 bits" in text for text in shown)


def test_equals_are_not_ringed_as_the_best(browser: Any, tmp_path: Path) -> None:
    for name, method, loss in (("a", "gptq", 0.1), ("b", "awq", 0.1), ("c", "rtn", 0.3)):
        write(tmp_path / "runs", name, run(method, 4, loss))
    write(tmp_path / "runs", "d", run("rtn", 3, 0.9))
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path), "--format", "html"]) == 0
    browser.get((tmp_path / "report.html").as_uri())
    assert count(browser, "#frontier .ring") == 1


def test_texts_are_shown_with_the_first_other_token_marked(browser: Any, tmp_path: Path) -> None:
    samples = [
        Sample("<i>why</i>", "so it is", "so it goes", Parting(2, 6, "is", "goes", 0.2, 0.1), 3),
        Sample("how", "thus", "thus", None, 1),
    ]
    write(tmp_path / "runs", "a", run("gptq", 4, 0.1))
    write_samples(samples, tmp_path / "runs" / "a")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path), "--format", "html"]) == 0
    browser.get((tmp_path / "report.html").as_uri())
    section = browser.find_element("id", "samples")
    assert "<i>why</i>" in section.text
    assert [mark.text for mark in section.find_elements("css selector", "mark")] == ["goes"]
    assert "the same" in section.text


def test_the_distribution_of_kl_is_that_of_its_blocks(tmp_path: Path) -> None:
    sums, tokens = np.arange(1.0, 22.0), np.full(21, 10.0)
    arrays = {"t/kl": sums, "t/tokens": tokens, "t/nll": sums}
    (found,) = kl_quantiles([{"path": "a"}], lambda _: arrays)
    assert found == {
        "t": [pytest.approx(np.quantile(sums / 10, q), rel=1e-3) for q in (0.05, 0.25, 0.5, 0.75, 0.95, 1)]
    }
    assert kl_quantiles([{"path": "a"}], lambda _: {}) == [{}]


def test_a_method_looks_the_same_in_every_report() -> None:
    looks = [look_of(name) for name in LOOKS]
    assert len({(look.hue, look.mark) for look in looks}) == len(looks)
    assert look_of("mine") == look_of("mine")
    assert look_of("gptq, mixed").colour == look_of("gptq").colour
    assert all(look_of(look.label) == look for look in LOOKS.values())


def test_the_pages_data_is_json_that_ends_no_script(page: Path) -> None:
    html = page.read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert len(json.loads(data)["runs"]) == len(LOSSES) + 2
    assert html.count("</script>") == 2


def test_linears_of_uncalibrated_runs_are_grouped_by_the_sites_that_others_saw(tmp_path: Path) -> None:
    write(tmp_path, "gptq", run("gptq", 4, 0.1))
    write(tmp_path, "rtn", run("rtn", 4, 0.1), sites=("attn.q", "k", "mlp.down"))
    path = tmp_path / "rtn" / "ledger.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["error_after"]
    Ledger.create(path).append(rows)
    runs = [{"path": str(tmp_path / name), "ledger": "ledger.jsonl", "model": "stories15M"} for name in ("rtn", "gptq")]
    rtn, gptq = profiles(runs)
    assert rtn is not None
    assert gptq is not None
    assert set(rtn) == {"weights"}
    assert rtn["weights"] == {site: [0.02] * 4 for site in ("attn.q+k", "mlp.down")}
    assert gptq["output"]["mlp.down"] == [0.01, 0.02, 0.03, 0.04]
