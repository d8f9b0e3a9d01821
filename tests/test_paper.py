"""Claims, figures, the paper and the report."""

import csv
import datetime
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from eplib import plotting
from pipelines import cells, claims, close, common, paper, plan
from pipelines.common import PipelineError

ROOT = common.ROOT
SOURCES = {name: cells.normalise(name, cells.load_notebook(name)) for name in common.notebook_names()}
TEXTS = ("S1", "S2")  # results that are texts, not tables


def declared(kind: str, names: Iterable[str] = SOURCES) -> dict[str, list[str]]:
    """Folder -> ids of the figures or results that the notebooks' code makes."""
    found: dict[str, list[str]] = {}
    for made in sorted(set().union(*(plan.made_by(SOURCES[name]) for name in names))):
        if made.kind == kind and made.id not in TEXTS:
            found.setdefault(made.folder, []).append(made.id)
    return found


FIGURES, TABLES = declared("figure"), declared("result")


def planted(root: Path) -> Path:
    """A root folder with this repository's paper and a profile quick, smoke and paper, and no results."""
    shutil.copytree(ROOT / "paper", root / "paper", ignore=shutil.ignore_patterns("build"))
    (root / "notebooks").mkdir()
    for profile in ("smoke", "quick", "paper"):
        every = yaml.safe_dump({"notebooks": dict.fromkeys(SOURCES)})
        common.write_text(root / "pipelines" / "profiles" / f"{profile}.yaml", every)
    return root


@pytest.fixture
def tree(tmp_path):
    return planted(tmp_path)


def whole_text(root: Path = ROOT) -> str:
    """The sources of the text."""
    return "\n".join(path.read_text() for path in paper.text_files(root))


def fill(root: Path, profile: str = "quick") -> None:
    """Results such as the notebooks write them, all that the paper shows; every claim with a value."""
    results = root / "results" / profile
    values: dict[str, dict[str, float]] = {}
    over_seeds = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
    for kind, name, key in re.findall(r'#(val|interval|mean|part)\("(\w+)", "(\w+)"', whole_text(root)):
        if kind in ("interval", "mean") or key not in values.setdefault(name, {}):
            values.setdefault(name, {})[key] = over_seeds if kind in ("interval", "mean") else 12.5
    for claim in claims.load(root):
        value = over_seeds if claim.get("seeds") else 0.5
        values.setdefault(claim["value"]["file"].split("/")[0], {})[claim["value"]["key"]] = value
    for name, summary in values.items():
        common.write_text(results / name / "summary.json", json.dumps(summary))
    table = {
        "title": "A title",
        "columns": ["method", "value"],
        "rows": [["EP <b>", 0.125], ["BPTT", None]],
        "note": "A note.",
    }
    for name in SOURCES:
        common.write_text(root / "notebooks" / f"{name}.ipynb", "{}")
    for name, tables in TABLES.items():
        for key in tables:
            common.write_text(results / name / f"{key}.json", json.dumps(table))
    texts = {"title": "Stories", "texts": [{"arm": "EP", "text": "Once $ # * _ <i> upon"}]}
    for name, key in (("campaign", "S1"), ("shakespeare", "S2")):
        common.write_text(results / name / f"{key}.json", json.dumps(texts))
    fig, (ax,) = plotting.figure()
    plotting.seeds(ax, [0, 1], [[1.0, 0.5], [1.0, 0.6]], "ep")
    drawn = plotting.save(fig, "F1", profile, "gradients", root=root)
    for name, figures in FIGURES.items():
        for kind in (".pdf", ".svg"):
            for key in figures:
                place = root / "figures" / profile / name / f"{key}{kind}"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(drawn.with_suffix(kind).read_bytes())
    machine = {"processor": "a processor", "gpu": None, "device": "cpu", "torch": "2.13.0", "seconds": 90.0}
    common.write_text(results / "machine" / "runs" / "mnist" / "ep-1" / "machine.json", json.dumps(machine))


# --- claims ---


CLAIM = {
    "id": "a",
    "text": "A.",
    "value": {"file": "mnist/summary.json", "key": "x.1.y"},
    "holds": {"min": 1.0},
    "decided_at": ["quick"],
    "written": datetime.date(2026, 11, 21),
}


@pytest.mark.parametrize(
    ("value", "holds", "profile", "verdict"),
    [
        (1.0, {"min": 1.0}, "quick", "holds"),
        (0.99, {"min": 1.0}, "quick", "fails"),
        (1.0, {"above": 1.0}, "quick", "fails"),
        (1.0, {"below": 1.0}, "quick", "fails"),
        (-0.03, {"max_abs": 0.02}, "quick", "fails"),
        (-0.03, {"max": 0.02}, "quick", "holds"),
        (-0.03, {"max": 0.02, "min": 0.0}, "quick", "fails"),
        (0, {"equals": 0}, "quick", "holds"),
        (5.0, {"min": 1.0}, "smoke", "not decided: not at this profile"),
        ("high", {"min": 1.0}, "quick", "fails"),
        (None, {"min": 1.0}, "quick", "not decided: missing"),
        ({"value": 5.0, "undecided": "another state"}, {"min": 1.0}, "quick", "not decided: another state"),
        ({"value": 5.0}, {"min": 1.0}, "quick", "holds"),
    ],
)
def test_verdict(tree, value, holds, profile, verdict):
    common.write_text(tree / "results" / profile / "mnist" / "summary.json", json.dumps({"x": [0, {"y": value}]}))
    decided = claims.decide(CLAIM | {"holds": holds}, profile, tree)
    assert (words(decided), decided["value"]) == (verdict, value["value"] if isinstance(value, dict) else value)


def words(decided: dict) -> str:
    """A verdict with its reason."""
    return decided["verdict"] + (f": {decided['why']}" if decided["why"] else "")


def over(low: float | None, high: float | None, n: int = 5, **more: object) -> dict:
    """A mean over seeds as a results file holds it."""
    return {"mean": None if low is None else (low + high) / 2, "low": low, "high": high, "n": n} | more


SPANS = "not decided: the interval spans the bound"


@pytest.mark.parametrize(
    ("found", "holds", "verdict"),
    [
        (over(1.0, 2.0), {"min": 1.0}, "holds"),
        (over(0.9, 2.0), {"min": 1.0}, SPANS),
        (over(0.2, 0.9), {"min": 1.0}, "fails"),
        (over(0.9, 1.0), {"above": 1.0}, "fails"),
        (over(0.5, 1.0), {"max": 1.0}, "holds"),
        (over(0.5, 1.0), {"below": 1.0}, SPANS),
        (over(-0.2, 0.3), {"max_abs": 0.3}, "holds"),
        (over(0.26, 0.376), {"max_abs": 0.3}, SPANS),
        (over(-0.5, 0.5), {"max_abs": 0.3}, SPANS),
        (over(0.31, 0.5), {"max_abs": 0.3}, "fails"),
        (over(-0.5, -0.31), {"max_abs": 0.3}, "fails"),
        (over(3.8, 4.2), {"min": 3.75, "max": 4.25}, "holds"),
        (over(3.7, 4.3), {"min": 3.75, "max": 4.25}, SPANS),
        (over(4.3, 4.4), {"min": 3.75, "max": 4.25}, "fails"),
        (over(1.0, 2.0), {"equals": 0.0}, "fails"),
        (over(1.5, 1.6, n=2), {"min": 1.0}, "not decided: n = 2"),
        ({"mean": 1.5, "low": None, "high": None, "n": 1}, {"min": 1.0}, "not decided: n = 1"),
        ({"mean": None, "low": None, "high": None, "n": 0}, {"min": 1.0}, "not decided: missing"),
        ({"mean": 1.5, "low": None, "high": None, "n": 3}, {"min": 1.0}, "not decided: a seed ended without a finite value"),
        (over(1.5, 1.6, undecided="unsettled"), {"min": 1.0}, "not decided: unsettled"),
        (1.5, {"min": 1.0}, "not decided: no interval over seeds"),
        ({"value": 1.5, "n": 5}, {"min": 1.0}, "not decided: no interval over seeds"),
    ],
)
def test_where_seeds_matter_the_interval_decides_and_not_the_mean(tree, found, holds, verdict):
    common.write_text(tree / "results" / "quick" / "mnist" / "summary.json", json.dumps({"x": [0, {"y": found}]}))
    decided = claims.decide(CLAIM | {"holds": holds, "seeds": True}, "quick", tree)
    assert words(decided) == verdict
    if isinstance(found, dict) and found.get("low") is not None:
        assert f"n = {found['n']}" in claims.line(decided) and f"{abs(found['high']):.5g}" in claims.line(decided)


def test_a_missing_file_or_key_is_not_decided(tree):
    assert words(claims.decide(CLAIM, "quick", tree)) == "not decided: missing"
    common.write_text(tree / "results" / "quick" / "mnist" / "summary.json", '{"x": [1]}')
    assert words(claims.decide(CLAIM, "quick", tree)) == "not decided: missing"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"holds": {"least": 1}}, "'least'.*min, max"),
        ({"holds": {"min": "1e-3"}}, "1.0e-3"),
        ({"holds": {}}, "empty"),
        ({"value": "x"}, "file"),
        ({"decided_at": ["qiuck"]}, "'qiuck'"),
        ({"colour": 1}, "colour"),
        ({"written": "last week"}, "'last week'.*2026-11-21"),
        ({"seeds": 3}, "seeds: 3"),
    ],
)
def test_a_claim_that_cannot_be_decided_is_refused(tree, change, words):
    (tree / "paper" / "claims.yaml").write_text(yaml.safe_dump([CLAIM | change]))
    with pytest.raises(PipelineError, match=words):
        claims.load(tree)


def test_a_claim_without_the_date_it_was_written_is_refused(tree):
    undated = {key: value for key, value in CLAIM.items() if key != "written"}
    (tree / "paper" / "claims.yaml").write_text(yaml.safe_dump([undated]))
    with pytest.raises(PipelineError, match="written"):
        claims.load(tree)


def test_the_text_names_no_claim_that_is_not_there():
    named = set(re.findall(r'#claim\("([^"]+)"\)', whole_text()))
    assert named and named <= {claim["id"] for claim in claims.load()}


# --- figures ---


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_rates_tried_name_the_methods_where_they_differ():
    plotting.use("quick")
    assert plotting.rates_tried({"thick": [6e-3], "thin": [6e-3]}) == "learning rates tried: 0.006 (every arm)"
    assert plotting.rates_tried({"thick": [6e-3, 3e-3, 6e-3], "thin": [3e-3], "energy": [3e-3, 6e-3]}) == \
        "learning rates tried: 0.003, 0.006 (Thick / Energy); 0.003 (Thin)"


def draw(root: Path, profile: str) -> Path:
    fig, (ax,) = plotting.figure("full", columns=1)
    plotting.use(profile)
    for method in ("backprop", "ep_linear", "vector_field", "one of my own"):
        plotting.seeds(ax, [0, 1, 2], [[3, 2, 1], [3, 2, 2]], method)
    plotting.legend(fig)
    return plotting.save(fig, "F1", profile, "toy", root=root).parent


def test_a_figure_has_the_same_bytes_each_time_and_no_date(tmp_path):
    first, second = draw(tmp_path / "a", "quick"), draw(tmp_path / "b", "quick")
    assert digests(first) == digests(second) and {path.suffix for path in first.iterdir()} == {".pdf", ".svg", ".csv"}
    assert (
        b"CreationDate" not in (first / "F1.pdf").read_bytes() and b"<dc:date>" not in (first / "F1.svg").read_bytes()
    )
    assert paper.figures_in(first, tmp_path)["F1"]["wide"]


def test_what_a_figure_shows_can_be_downloaded_as_numbers(tmp_path):
    fig, (left, right) = plotting.figure("full", columns=2)
    plotting.seeds(left, [0, 1], [[3, 2], [3, 1]], "backprop")
    left.axhline(7.0)
    left.set_ylabel("loss")
    left.scatter([5], [6], label="a point")
    right.imshow([[0.25, 0.5]])
    rows = list(csv.reader(plotting.save(fig, "F1", "quick", "toy", root=tmp_path).with_suffix(".csv").open()))
    lines = [["3", "2"], ["3", "1"], ["3", "1.5"]]  # two seeds and their mean
    assert rows[1:] == [*(["1 loss", "backprop", str(number), str(x), y] for number, line in enumerate(lines, start=1)
                          for x, y in enumerate(line)), ["1 loss", "a point", "4", "5", "6"],
                        ["2", "pixel", "1", "0", "0", "0.25"], ["2", "pixel", "1", "1", "0", "0.5"]]


def test_a_panel_in_which_nothing_is_drawn_says_so(tmp_path):
    fig, panels = plotting.figure("full", columns=4)
    panels[0].plot([1], [float("nan")], "o")
    panels[0].axhline(2.0)
    panels[1].plot([1], [2.0], "o")
    panels[2].hlines([1], [0], [2])
    panels[3].plot([], [])
    plotting.save(fig, "F1", "quick", "toy", root=tmp_path)
    assert [[text.get_text() for text in ax.texts] for ax in panels] == [[plotting.NOTHING], [], [], [plotting.NOTHING]]


def test_a_figure_without_data_leaves_no_file(tmp_path, capsys):
    folder = draw(tmp_path, "quick")
    fig, _ = plotting.figure()
    assert plotting.save(fig, "F1", "quick", "toy", [], root=tmp_path) is None and not any(folder.iterdir())
    assert capsys.readouterr().out == "F1: no run recorded\n"


def test_only_smoke_figures_are_stamped(tmp_path):
    quick, smoke = draw(tmp_path, "quick"), draw(tmp_path, "smoke")
    stamp = f"<!-- {plotting.SMOKE} -->".encode()  # matplotlib writes the text it has drawn as outlines into a comment
    assert stamp in (smoke / "F1.svg").read_bytes() and stamp not in (quick / "F1.svg").read_bytes()


def test_a_reference_is_drawn_only_where_comparable():
    _, (ax,) = plotting.figure()
    plotting.reference(ax, 0.5, "somebody 2020", comparable=False)
    assert not ax.lines and not ax.texts
    plotting.reference(ax, 0.5, "somebody 2020", comparable=True)
    assert len(ax.lines) == len(ax.texts) == 1


def test_an_unknown_width_is_named():
    with pytest.raises(ValueError, match=r"'half'.*column"):
        plotting.figure("half")


def test_plotting_never_imports_torch():
    subprocess.run(
        [sys.executable, "-c", "import eplib.plotting, sys; sys.exit('torch' in sys.modules)"], cwd=ROOT, check=True
    )


# --- the paper ---


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_without_results_the_paper_is_set_and_says_what_is_missing(tree, profile):
    for name in SOURCES:
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tree / "notebooks")
    claims.write(profile, tree)
    assert paper.write(profile, tree).read_bytes().startswith(b"%PDF")
    missing = paper.missing(profile, tree)
    assert {"figure F0", "E1, results of notebook gradients", "E2, results of notebook mnist"} <= set(missing)
    assert close.close(profile, tree) == (profile != "paper")


def test_what_a_profile_does_not_plan_is_said_and_not_called_missing(tree):
    for name in SOURCES:
        common.write_text(tree / "notebooks" / f"{name}.ipynb", "{}")
    common.write_text(tree / "pipelines" / "profiles" / "quick.yaml", yaml.safe_dump({"notebooks": {"mnist": None}}))
    claims.write("quick", tree)
    paper.write("quick", tree)
    missing = paper.missing("quick", tree)
    assert "E2, results of notebook mnist" in missing and not [what for what in missing if "gradients" in what]


def test_what_a_notebook_of_the_readers_own_makes_is_shown_behind_the_text(tree):
    fill(tree)
    common.write_text(tree / "notebooks" / "mine.ipynb", "{}")
    mine = tree / "results" / "quick" / "mine"
    common.write_text(mine / "mine_table.json", json.dumps({"title": "Mine", "columns": ["arm"], "rows": [["EP"]]}))
    shutil.copytree(tree / "figures" / "quick" / "architectures", tree / "figures" / "quick" / "mine")
    for path in (tree / "figures" / "quick" / "mine").iterdir():
        path.rename(path.with_stem("mine_losses"))
    further = paper.collect("quick", tree)["further"]
    assert "mine_losses" in further["figures"] and "mine_table" in further["tables"] and "T1" not in further["tables"]
    paper.write("quick", tree)
    shown = paper.compile_with(paper.content_path("quick", tree), tree, query="figure.where(kind: table)", field="label")
    assert "<tab-mine_table>" in shown and "<tab-T1>" in shown
    common.write_text(mine / "T1.json", (mine / "mine_table.json").read_text())
    with pytest.raises(PipelineError, match="gradients and mine both made the table 'T1'"):
        paper.collect("quick", tree)


def test_a_table_or_text_made_from_no_run_is_missing(tree):
    fill(tree)
    for name, key, empty in (("mnist", "T3", {"rows": []}), ("shakespeare", "S2", {"texts": []})):
        path = tree / "results" / "quick" / name / f"{key}.json"
        common.write_text(path, json.dumps(json.loads(path.read_text()) | empty))
    claims.write("quick", tree)
    paper.write("quick", tree)
    assert paper.missing("quick", tree) == ["table T3", "texts S2"]


def test_with_results_nothing_is_missing_and_the_pdf_has_the_same_bytes_each_time(tree):
    fill(tree)
    claims.write("quick", tree)
    first = paper.write("quick", tree).read_bytes()
    assert paper.missing("quick", tree) == []
    assert paper.up_to_date("quick", tree)
    assert paper.build("quick", tree).read_bytes() == first
    stamp = (tree / "results" / "quick" / "paper.json").read_text()
    assert "a processor" not in stamp and paper.processor() not in stamp
    common.write_text(tree / "results" / "quick" / "mnist" / "summary.json", "{}")
    assert not paper.up_to_date("quick", tree)


def test_a_rounded_value_keeps_its_digits_and_a_whole_one_has_no_point(tree):
    helpers = '#import "lib.typ": *'
    shown = ", ".join(
        f"padded(number({value}, digits: {digits}), {digits})" for value, digits in ((68.51, 0), (1.0, 3), (2.5, 1))
    )
    common.write_text(tree / "paper" / "main.typ", f"{helpers}\n#metadata(({shown})) <shown>\n")
    draft = tree / "paper" / "draft.json"
    common.write_text(draft, paper.full_content("quick", tree))
    assert json.loads(paper.compile_with(draft, tree, query="<shown>")) == [["69", "1.000", "2.5"]]


def test_a_fault_in_the_text_is_reported(tree):
    (tree / "paper" / "main.typ").write_text("#unknown-function()")
    with pytest.raises(PipelineError, match="unknown"):
        paper.build("quick", tree)
    assert not paper.up_to_date("quick", tree)


# --- the paper of the recorded results ---


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A root with the text, and the results and figures of the paper profile that are in git, its paper set; and a function
    that asks Typst for the values of what has a label."""
    root = tmp_path_factory.mktemp("recorded")
    left_out = shutil.ignore_patterns("build", "runs", "weights", "notebooks", "*.py")
    for folder in ("paper", "pipelines/profiles", "results/paper", "figures/paper", "notebooks", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=left_out)
    claims.write("paper", root)
    paper.build("paper", root)
    return root, lambda label: json.loads(paper.compile_with(paper.content_path("paper", root), root, query=label))


def test_the_main_text_has_nine_pages_at_most_and_its_tables_eight_rows(recorded):
    _, ask = recorded
    assert ask("<main-end>")[0] <= 9
    assert ask("<rows>") and max(ask("<rows>")) <= 8


def test_what_the_main_text_shows_stands_on_the_page_that_cites_it_or_on_the_next(recorded):
    _, ask = recorded
    end, pages = ask("<main-end>")[0], {}
    for mark in ask("<placed>"):
        pages.setdefault((mark["id"], mark["kind"]), []).append(mark["page"])
    shown = {name: where[0] for (name, kind), where in pages.items() if kind == "stands" and where[0] <= end}
    assert len(shown) > 5
    for name, page in shown.items():
        assert min(abs(page - cited) for cited in pages[name, "cited"]) <= 1, (name, page, pages[name, "cited"])


def test_the_text_names_every_figure_and_table_that_it_places():
    text = "".join((ROOT / "paper" / f"{name}.typ").read_text(encoding="utf-8") for name in ("main", "appendix"))
    named = {kind: set(re.findall(rf'#?{kind}ref\("(\w+)"\)', text)) for kind in ("fig", "tab", "brief")}
    placed = {kind: set(re.findall(rf'#{kind}\("(\w+)"', text)) for kind in ("fig", "tab", "brief")}
    assert len(placed["tab"]) > 40 and placed["fig"] <= named["fig"] and placed["brief"] <= named["brief"]
    assert placed["tab"] <= named["tab"] | placed["brief"] | {"hours"}  # a short table leads to the whole one


def test_every_claim_has_its_row_and_every_mark_leads_to_one(recorded):
    _, ask = recorded
    decided = {claim["id"] for claim in claims.load()}
    assert set(ask("<claimed>")) <= decided and set(ask("<claim-row>")) == decided


def test_every_claim_is_a_sentence_of_the_text_too():
    text = "".join((ROOT / "paper" / f"{name}.typ").read_text(encoding="utf-8") for name in ("main", "appendix"))
    assert {claim["id"] for claim in claims.load()} == set(re.findall(r'claim\("([a-z0-9-]+)"\)', text))


def test_the_released_paper_says_which_results_it_was_set_from():
    pdf, record = ROOT / "release" / "paper.pdf", common.read_json(ROOT / "release" / "paper.json")
    assert pdf.stat().st_size < paper.LARGEST
    assert hashlib.sha256(pdf.read_bytes()).hexdigest() == record["pdf"]
    assert re.fullmatch("[0-9a-f]{64}", record["results"])


@pytest.mark.parametrize("path", paper.text_files(ROOT), ids=lambda path: path.name)
def test_paragraphs_are_short_and_hold_few_numbers(path):
    for paragraph in re.split(r"\n\s*\n", path.read_text()):
        if path.name in ("lib.typ", "schematic.typ") or re.match(r"\s*(//|#(?!if|part|mean|val))", paragraph):
            continue  # code, figures and tables
        looked_up = len(re.findall(r"#(?:val|mean)\(", paragraph))
        words = re.sub(r"\([^()]*\)", "", re.sub(r"#(?:val|mean|claim|figref|tabref|briefref)\([^)]*\)", "", paragraph)).split()
        assert len(words) <= 150 and looked_up <= 8, f"{len(words)} words, {looked_up} numbers: {paragraph[:80]}"


def test_no_semicolon_is_taken_for_the_end_of_a_look_up():
    """Typst ends an expression in its text at a semicolon and prints none: it is to be written \\;."""
    for path in sorted((ROOT / "paper").glob("*.typ")):
        found = re.findall(r"#(?:val|mean|interval|number|verdict)\([^()]*\);", path.read_text())
        assert not found, (path.name, found)
