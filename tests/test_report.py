"""The HTML report: that it is whole, leads where it says, reads from a file and with a keyboard, on a phone."""

import csv
import gzip
import json
import math
import shutil
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import browser
from eplib import plotting, settings
from pipelines import cells, claims, close, common, paper, report
from pipelines.common import PipelineError
from pipelines.site import build, catalogue, charts, pages, runs, text
from test_paper import SOURCES, fill, planted

ROOT = common.ROOT
needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs a Chromium; the test of the links does not")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
EXECUTED = [
    {"cell_type": "markdown", "id": "cell-01", "metadata": {},
     "source": "# E1: is it right?\n\n**Question.** With $a_b^2$, `$code$` and\n\n$$\\frac{\\partial F}{\\partial z}$$"},
    {"cell_type": "markdown", "id": "cell-02", "metadata": {}, "source": "## F1: the error"},
    {"cell_type": "code", "id": "cell-03", "metadata": {}, "execution_count": 1, "outputs": [{
        "output_type": "display_data", "metadata": {},
        "data": {"image/png": PIXEL}}],
     "source": 'plotting.save(fig, "F1", profile, "gradients")\nrecords.save_result(profile, "gradients", "summary", {})'},
]


def recorded(root: Path, group: str, name: str, **settings: object) -> None:
    """A finished run as the store leaves it, of two evaluations."""
    folder = root / "results" / "quick" / "runs" / group / name
    for file, value in (("config.json", {"seed": 0, "steps": 20, **settings}), ("provenance.json", {"source": "abc"}),
                        ("metrics.json", {"final": {"loss": 1.5, "settled": [0.5, 1.0]}})):
        common.write_text(folder / file, json.dumps(value))
    common.write_text(folder / "curve.csv", "step,loss\n10,2.0\n20,1.5\n")
    common.write_text(folder / "sample.txt", "The king <i>\nis dead")
    log = "".join(f"{step},{3 - step / 10},{10.0 ** -(step % 4)}\n" for step in range(20))
    (folder / "log.csv.gz").write_bytes(gzip.compress(f"step,loss,free_residual_max\n{log}".encode()))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A report of a profile in which everything has results, one notebook is executed, and two runs are recorded."""
    tree = planted(tmp_path_factory.mktemp("report"))
    shutil.copy(ROOT / "pipelines" / "arms.yaml", tree / "pipelines")
    fill(tree)
    for name in SOURCES:
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tree / "notebooks")
        common.write_text(tree / "results" / "quick" / name / "index.json", "{}")
    executed = {"cells": EXECUTED, "metadata": cells.METADATA, "nbformat": 4, "nbformat_minor": 5}
    common.write_text(tree / "results" / "quick" / "notebooks" / "gradients.ipynb", json.dumps(executed))
    for seed in (0, 1):
        recorded(tree, "mnist", f"ep-lr0.004-seed{seed}-0000000{seed}", seed=seed, optimiser={"lr": 0.004})
    wide = {"title": "A wide one", "columns": ["arm", "learning rate", "seeds", *(f"column number {n}" for n in range(15))],
            "rows": [["EP, two trajectories", 0.004, 2, *(n / 7 for n in range(15))]], "note": "A note."}
    common.write_text(tree / "results" / "quick" / "mnist" / "T2.json", json.dumps(wide))
    claims.write("quick", tree)
    paper.write("quick", tree)
    index = report.write("quick", tree)
    assert (tree / "results" / "quick" / "report.json").is_file()
    return index.parent


class Page(HTMLParser):
    """What a page loads, where it links, and the anchors that it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.links, self.ids = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "link"):
            self.loads.append(found.get("src") or found.get("href") or "")
        elif tag == "a":
            self.links.append(found.get("href", "#"))
        if "id" in found:
            self.ids.append(found["id"])


def check_links(built: Path) -> None:
    """Every link and every file that a page loads is in the report, every anchor in its page, and no anchor is there twice."""
    parsed = {path: Page(path) for path in built.rglob("*.html")}
    for path, page in parsed.items():
        assert len(page.ids) == len(set(page.ids)), (path.name, [one for one in page.ids if page.ids.count(one) > 1])
        for target in page.loads + page.links:
            if target.startswith("data:"):
                continue
            address, _, anchor = target.partition("#")
            led = path if not address else (path.parent / urllib.parse.unquote(address)).resolve()
            assert led.is_relative_to(built) and led.is_file(), (path.relative_to(built), target)
            assert not anchor or led.suffix != ".html" or urllib.parse.unquote(anchor) in parsed[led].ids, \
                (path.relative_to(built), target)


def test_every_link_leads_to_a_file_and_an_anchor_of_this_report(built):
    assert len([*built.rglob("*.html")]) > 2 * len(SOURCES)
    check_links(built)


def test_nothing_is_fetched_from_elsewhere(built):
    for path in (*built.rglob("*.html"), *built.rglob("*.css"), *built.rglob("*.js")):
        said, loads = path.read_text(), Page(path).loads if path.suffix == ".html" else []
        assert "@import" not in said and "fetch(" not in said, path
        assert not any(target.startswith(("http", "//")) for target in loads), path


def test_a_claim_its_figure_its_cell_and_its_value_lead_to_one_another(built):
    claim = claims.load()[0]
    said = (built / "claims.html").read_text().partition(f'id="claim-{claim["id"]}"')[2].partition("</article>")[0]
    key = claim["value"]["key"]
    assert f"experiments/gradients.html#value-{key}" in said and "notebooks/gradients.html#cell-03" in said
    experiment = (built / "experiments" / "gradients.html").read_text()
    assert f'../claims.html#claim-{claim["id"]}' in experiment.partition(f'id="value-{key}"')[2].partition("</div>")[0]
    assert "../notebooks/gradients.html#cell-03" in experiment.partition('id="fig-F1"')[2].partition("</figure>")[0]
    cell = (built / "notebooks" / "gradients.html").read_text().partition('id="cell-03"')[2]
    assert "../experiments/gradients.html#fig-F1" in cell and "../experiments/gradients.html#values" in cell


def test_the_paper_says_which_figure_a_claim_rests_on():
    said = text.cited(pages.soup_of(
        '<p>It is so.<a href="#claim-one">C1</a> See <a href="#fig-F1">F1</a> and <a href="#tab-T2-short">T2</a>.</p>'
        '<p>Not here: <a href="#fig-F3">F3</a>. <a href="#claim-two">C2</a></p><p><a href="#claim-three">C3</a></p>'
        '<h2>Another</h2><p>As said. <a href="#claim-four">C4</a></p><p>See <a href="#fig-F4">F4</a>.</p>'))
    assert said == {"one": ["fig-F1", "tab-T2"], "two": ["fig-F3"], "three": ["fig-F1", "tab-T2", "fig-F3"], "four": ["fig-F4"]}


def test_the_captions_are_the_paper_s(built):
    page = (built / "experiments" / "gradients.html").read_text()
    caption = pages.soup_of(page).find(id="fig-F1").find("figcaption").get_text(" ", strip=True)
    assert caption.startswith("F1. Error of the gradient against the nudge") and "<math" in page
    first = (built / "index.html").read_text()
    assert "Abstract" in first and "(EP)" in first.partition('class="abstract"')[2] and 'id="fig-F0"' in first


def test_formulas_are_set_and_code_is_left(built):
    page = (built / "notebooks" / "gradients.html").read_text()
    assert "<mfrac>" in page and "<msubsup>" in page and "<code>$code$</code>" in page
    assert 'src="gradients-1.png"' in page and (built / "notebooks" / "gradients-1.png").is_file()


def test_tables_can_be_downloaded_and_lead_to_their_runs(built):
    rows = list(csv.reader((built / "data" / "mnist" / "T2.csv").open()))
    assert rows[1][:3] == ["EP, two trajectories", "0.004", "2"]
    table = (built / "experiments" / "mnist.html").read_text().partition('id="tab-T2"')[2].partition("</figure>")[0]
    for seed in (0, 1):
        assert f"../runs/mnist/ep-lr0.004-seed{seed}-0000000{seed}.html" in table
    run = (built / "runs" / "mnist" / "ep-lr0.004-seed1-00000001.html").read_text()
    assert "The king &lt;i&gt;" in run and "<polyline" in run and "optimiser.<wbr>lr" in run and "abc" in run


def row_runs(*configurations: tuple[str, int, float]) -> list[runs.Recorded]:
    found = []
    for arm, seed, lr in configurations:
        run = runs.Recorded(Path("runs/toy") / f"{arm}-lr{lr}-seed{seed}-0", Path(), settings.default_look(arm))
        run.__dict__["config"] = {"seed": seed, "optimiser": {"lr": lr}}
        found.append(run)
    return found


def test_a_row_whose_seeds_are_not_those_recorded_leads_nowhere():
    toy = row_runs(("ep", 0, 0.1), ("ep", 1, 0.1), ("ep", 0, 0.2), ("bptt", 0, 0.1))
    table = {"columns": ["arm", "learning rate", "seeds"],
             "rows": [["ep", 0.1, 2], ["ep", 0.2, 3], ["bptt", 0.1, 1], ["a sum", 0.1, 1]]}
    assert runs.of_rows(table, {"other": row_runs(("ep", 0, 0.3)), "toy": toy}) == [toy[:2], [], [toy[3]], []]


def test_a_curve_is_drawn_where_it_is_finite_and_thinned_without_losing_its_worst():
    made = charts.chart("residual", {"r": ([0, 1, 2, 3], [1.0, 10.0, float("nan"), 100.0])}, log=True)
    assert [line.pieces for line in made.lines] == [[f"0,{charts.HEIGHT} 213,{charts.HEIGHT // 2}", f"{charts.WIDTH},0"]]
    assert [tick.text for tick in made.up] == ["1", "10", "100"]
    spiked = [0.0] * 5000
    spiked[1234] = 7.0
    points = charts.thinned(list(range(5000)), spiked, worst=True)
    assert len(points) <= charts.POINTS and max(y for _, y in points) == 7.0 and points[-1][0] == 4999
    assert charts.chart("none", {"r": ([0, 1], [float("nan")] * 2)}) is None


@pytest.mark.parametrize(("low", "high", "marks"), [
    (0.03, 0.4, ["0.05", "0.1", "0.2"]), (1e-7, 1.0, ["1e-07", "1e-05", "0.001", "0.1"]), (0.61, 0.72, ["0.61", "0.72"]),
    (0.9, 1.3, ["0.9", "1.3"])])
def test_a_logarithmic_axis_says_its_values_and_not_those_of_rounded_exponents(low, high, marks):
    made = charts.chart("norm", {"r": ([0, 1], [low, high])}, log=True)
    assert [tick.text for tick in made.up] == marks
    span = math.log10(high) - math.log10(low)
    for tick in made.up:
        assert tick.at / charts.HEIGHT == pytest.approx((math.log10(high) - math.log10(float(tick.text))) / span, abs=0.01)


def test_a_claim_leads_to_the_table_that_holds_its_number():
    def item(label, rows=()):
        return catalogue.Item(*label.split("-"), "n", "", "", "", {"rows": rows})

    items = {"tab-A": item("table-A", [["EP", 0.45581]]), "fig-A": item("figure-A"),
             "tab-B": item("table-B", [["EP", 0.65913], ["BPTT", "+0.012 [0, 1]"]])}
    assert catalogue.shown_for(0.65913, ["tab-A", "fig-A"], items) == ["tab-B", "fig-A"]
    assert catalogue.shown_for(0.45581, ["tab-A", "fig-A"], items) == ["tab-A", "fig-A"]
    assert catalogue.shown_for(0.0121, [], items) == ["tab-B"] and catalogue.shown_for(0.0126, ["fig-A"], items) == ["fig-A"]
    for unknown in (None, 3, 0.0, 0.7):  # in no table, or in too many to be found by its value
        assert catalogue.shown_for(unknown, ["tab-A", "fig-A"], items) == ["tab-A", "fig-A"]


def test_what_is_absent_from_the_paper_gives_no_caption_and_a_dot_stands_over_its_letter():
    absent = pages.soup_of('<figure id="tab-T9"><p>missing: table T9</p></figure>').figure
    assert text.caption(absent) == ""
    soup = pages.soup_of("<body><math><mover><mi>z</mi><mo>\u0307</mo></mover></math></body>")
    assert "\u02d9" in text.page(text.Text(soup, "", {}, "", [], {}), lambda label: None, {})


def test_the_outcome_of_a_run_is_said_as_tables_say_it():
    older = {"final": {"loss": 1.5, "settled": [0.5, 1.0], "residual_max": 0.0, "iterations": 0}}
    assert runs.outcome(older, explicit=False)[::2] == [1.5, "≥ 0.5", 0]
    assert runs.outcome(older, explicit=True)[2:] == [None] * 3
    page = pages.soup_of("<table><thead><tr><th>arm</th><th>loss</th></tr></thead><tbody><tr><td>EP</td><td>–</td></tr>"
                         '<tr><td>BPTT</td><td class="number">1.5</td></tr></tbody></table>')
    pages.labelled(page)
    assert [cell.get("class") for cell in page.find_all(["th", "td"])] == [None, "number"] * 3
    assert pages.numeric([["a", None, 1], ["b", "≥ 50", None], ["c", 0.5, True]]) == [False, True, True]


def test_a_notebook_with_results_that_was_not_executed_here_is_shown_with_what_was_recorded(tmp_path):
    tree = planted(tmp_path)
    for name in ("mnist", "cost"):
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tree / "notebooks")
    common.write_text(tree / "results" / "paper" / "mnist" / "index.json", "{}")
    common.write_text(tree / "results" / "paper" / "mnist" / "T2.json", json.dumps({"columns": ["arm"], "rows": [["EP"]]}))
    claims.write("paper", tree)
    folder = report.build("paper", tree).parent / "notebooks"
    check_links(folder.parent)
    mnist, cost = ((folder / f"{name}.html").read_text() for name in ("mnist", "cost"))
    assert "has not been executed here" in mnist and "E2" in mnist and 'id="tab-T2"' in mnist
    assert "has not been run at profile paper" in cost and "E7" in cost
    assert "results of notebook mnist" not in close.missing_notebooks("paper", tree)
    assert "results of notebook cost" in close.missing_notebooks("paper", tree)


def test_every_page_of_smoke_says_that_it_proves_nothing_by_its_path_too(tmp_path):
    index = report.build(str(planted(tmp_path) / "pipelines" / "profiles" / "smoke.yaml"), tmp_path)
    assert all(plotting.SMOKE in path.read_text() for path in index.parent.rglob("*.html"))


@pytest.mark.parametrize("formula", [r"\left( x", r"\nosuchcommand x"])
def test_a_formula_that_cannot_be_set_is_named(formula):
    with pytest.raises(PipelineError, match=r"left|\\nosuchcommand"):
        pages.mathml(f"Broken: ${formula}$")


# --- in a browser ---


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    with browser.Browser() as started:
        yield started


SHOWN = ("index", "paper", "claims", "machine", "experiments/mnist", "experiments/gradients", "notebooks/gradients",
         "notebooks/mnist", "runs/index", "runs/mnist/index", "runs/mnist/ep-lr0.004-seed1-00000001")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_logs_an_error_asks_for_anything_or_is_wider_than_the_window(built, chromium, width):
    chromium.shape(width, dark=width == 390)
    for name in SHOWN:
        chromium.open((built / f"{name}.html").as_uri())
        assert chromium.problems() == [], name
        assert chromium.value("document.documentElement.scrollWidth") <= width, name
        if width == 390:  # and of a table no cell is cut off: each is within the window, under the name of its column
            within = "cell => cell.getBoundingClientRect().right <= 390 && cell.dataset.label !== undefined"
            assert chromium.value(f"[...document.querySelectorAll('main td')].every({within})"), name


@needs_browser
def test_the_report_is_searched_and_filtered_with_the_keyboard(built, chromium):
    chromium.shape(1280)
    chromium.open((built / "index.html").as_uri())
    chromium.press("Tab")
    assert chromium.value("document.activeElement.className") == "skip"
    chromium.press("/")
    assert chromium.value("document.activeElement.id") == "search"
    until = "new Promise(done => { const look = () => window.searchIndex ? done(true) : setTimeout(look, 10); look(); })"
    assert chromium.value(until)
    chromium.type("corrected direction")
    chromium.press("ArrowDown")
    found = chromium.value("document.activeElement.closest('#found') && document.activeElement.getAttribute('href')")
    assert found and "#" in found, "a search leads to a place in a page"
    chromium.press("Escape")
    assert chromium.value("document.getElementById('found').hidden")
    chromium.open((built / "claims.html").as_uri() + "#fails")
    verdicts = {claim["verdict"] for claim in json.loads((built.parents[3] / "results/quick/claims.json").read_text())}
    shown = "new Set([...document.querySelectorAll('.claim:not([hidden])')].map(one => one.dataset.verdict))"
    assert "fails" in verdicts and chromium.value(f"[...{shown}].join()") == "fails"
    assert chromium.problems() == []


@needs_browser
def test_a_figure_opens_in_large_and_closes(built, chromium):
    chromium.shape(1280)
    chromium.open((built / "experiments" / "gradients.html").as_uri())
    chromium.value("document.querySelector('a.zoom').focus()")
    chromium.press("Enter", "\r")
    assert chromium.value("document.getElementById('zoom').open && document.querySelector('#zoom img').src.endsWith('F1.svg')")
    chromium.press("Escape")
    assert not chromium.value("document.getElementById('zoom').open")


def test_runs_of_a_group_are_told_apart_by_what_differs_and_a_row_without_a_run_leads_to_none():
    some = row_runs(("ep", 0, 0.3), ("ep", 0, 0.3))
    for run, strength in zip(some, (1.0, 3.0), strict=True):
        run.config["penalties"] = [{"strength": strength}]
    assert runs.varying(some) == {"optimiser.lr": "learning rate", "penalties.0.strength": "strength"}
    told = {"columns": ["rule", "strength"], "rows": [[some[0].look.label, 1.0]]}
    assert runs.of_rows(told, {"toy": some}) == [some[:1]] and runs.of_rows(told | {"runs": False}, {"toy": some}) == [[]]
    two = row_runs(("ep", 0, 0.3), ("bptt", 0, 0.3))  # the run of the first rule that a row names; the second is beside it
    labels = [run.look.label for run in two]
    assert runs.matching(["run", "gradient"], labels, two) == two[:1]
    assert runs.matching(["run", "gradient"], labels[::-1], two) == two[1:]
    for run, step in zip(some, (500, 1500), strict=True):
        run.__dict__.pop("settings", None)
        run.config["branch"] = {"step": step}
    assert runs.matching(["C", "from update", "rule"], [64, 1500, some[0].look.label], some) == some[1:]
    heads, arm = ["controller", "strength", "recorded"], some[0].look.label
    assert runs.matching(heads, [arm, 3.0, "yes"], some) == some[1:]
    assert runs.matching(heads, [arm, 3.0, "no"], some) == []


@pytest.mark.parametrize(("value", "said"), [
    ({"value": 0.5, "n": 3}, "0.5, n 3"), ({"value": None, "undecided": "none stalled"}, "– (decides nothing: none stalled)"),
    ([1, 2], "[1, 2]"), (-2.0, "−2")])
def test_a_value_is_said_in_words(value, said):
    assert build.shown(value) == said
