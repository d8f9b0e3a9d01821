"""Collect what the notebooks wrote and set the paper from it.

    python -m pipelines.paper --profile P      write results/P/paper.json and paper/build/P/paper.pdf
    python -m pipelines.paper --release        copy the paper profile's PDF to release/paper.pdf, with what it was set from

The text in paper/*.typ holds no number of ours: it looks every one up in the collected file, and shows what is absent as
missing. The collected file without the facts of machines is results/P/paper.json; with them it is
paper/build/P/content.json, which is what is set.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from eplib.markup import is_table
from eplib.settings import name_of
from pipelines import literature
from pipelines.common import (
    ROOT,
    PipelineError,
    command,
    dumps,
    for_profile,
    load_profile,
    notebook_names,
    planned,
    read_json,
    reported,
    write_text,
)

LARGEST = 2_000_000  # bytes of the released PDF
SIZE = "c128"  # of benchmarks/results.json: the size whose times the paper shows
TIMED = {"backpropagation": ("backprop", None),
         "EP, linear response": ("EP linear response, torch", "EP linear response, compiled"),
         "EP, two trajectories": ("EP two trajectories, cold, torch", "EP two trajectories, cold, compiled"),
         "implicit differentiation": ("implicit", None), "BPTT": ("BPTT,", "BPTT, compiled")}
# a row of the table of times -> how the names of its eager and its compiled arm begin in benchmarks/results.json
PACKAGES = ("torch", "numpy", "matplotlib", "papermill", "dvc", "typst")


# A result is a summary (scalars for the text), a table, texts ({"title", "texts": [{"arm", "text"}]}) or data that
# only its notebook reads.


def figures_in(folder: Path, root: Path) -> dict[str, dict[str, Any]]:
    """Figure id -> its PDF (as a path from the root), its notebook's folder, whether it spans both columns, the digest
    of its SVG."""
    found = {}
    for path in sorted(folder.glob("*.pdf")):
        svg = path.with_suffix(".svg").read_bytes()
        width = re.search(rb'<svg [^>]*?width="([\d.]+)pt"', svg)
        wide = width is not None and float(width[1]) > 72 * 4
        digest = hashlib.sha256(svg).hexdigest()
        found[path.stem] = {
            "path": f"/{path.relative_to(root)}",
            "notebook": folder.name,
            "wide": wide,
            "sha256": digest,
        }
    return found


def text_files(root: Path) -> list[Path]:
    """The files of the text, sorted."""
    return sorted((root / "paper").glob("*.typ"))


def further(content: dict[str, Any], root: Path) -> dict[str, list[str]]:
    """Kind -> the ids of what notebooks made that the text places nowhere: the appendix shows them at its end. A table of runs
    that a profile does not plan has no rows; in the paper profile, which plans them all, it is shown as missing."""
    text = "".join(path.read_text(encoding="utf-8") for path in text_files(root))
    calls = {"figures": "fig", "tables": "tab", "texts": "samples"}
    planned = {kind: {name for name, made in content[kind].items()
                      if kind != "tables" or made.get("rows") or content["profile"] == "paper"} for kind in calls}
    return {kind: sorted(planned[kind] - set(re.findall(rf'#{call}\("([^"]+)"\)', text))) for kind, call in calls.items()}


def times(root: Path) -> dict[str, Any]:
    """Times of one gradient at trained weights, eager beside eager and compiled beside compiled, from benchmarks/results.json;
    empty where it is absent."""
    path = root / "benchmarks" / "results.json"
    if not path.is_file():
        return {}
    found = read_json(path)[SIZE]
    arms = found["points"]["trained"]["arms"]

    def of(start: str | None) -> float | None:
        return next((arm["amortised"] for name, arm in arms.items() if start and name.startswith(start)), None)

    rows = [[name, of(eager), of(compiled)] for name, (eager, compiled) in TIMED.items()]
    rows[0][2] = found["compiled_backprop"]["compiled"]
    machine = {key: found["machine"][key] for key in ("processor", "threads")}
    return {"rows": rows, "rounds": found["rounds"], "size": SIZE, **machine}


def add(found: dict[str, Any], kind: str, name: str, value: dict[str, Any]) -> None:
    """Put what a notebook made under its id; raises PipelineError if another notebook made one of that id."""
    if name in found:
        raise PipelineError(f"the notebooks {found[name]['notebook']} and {value['notebook']} both made the {kind} {name!r}; "
                            "give one of them another id, and remove what the other wrote")
    found[name] = value


def collect(profile: str, root: Path = ROOT) -> dict[str, Any]:
    """Everything the paper may print that does not depend on the machine: summaries, tables, texts, figures, claims."""
    results = root / "results" / name_of(profile)
    content: dict[str, Any] = {
        "profile": name_of(profile),
        "planned": planned(load_profile(profile, root), root),
        "summaries": {},
        "tables": {},
        "texts": {},
        "figures": {},
        "claims": {},
    }
    for folder in (results / name for name in notebook_names(root)):
        for path in sorted(folder.glob("*.json")):
            value = read_json(path)
            if path.stem == "summary":
                content["summaries"][folder.name] = value
            elif is_table(value):
                add(content["tables"], "table", path.stem, {**value, "notebook": folder.name})
            elif isinstance(value, dict) and "texts" in value:
                add(content["texts"], "text", path.stem, {**value, "notebook": folder.name})
        for name, found in figures_in(root / "figures" / name_of(profile) / folder.name, root).items():
            add(content["figures"], "figure", name, found)
    if (root / "paper" / "literature.yaml").is_file():
        content["tables"]["R1"] = literature.table(profile, root)
    content["further"] = further(content, root)
    content["bench"] = times(root)
    claims = results / "claims.json"
    content["claims"] = {claim["id"]: claim for claim in read_json(claims)} if claims.is_file() else {}
    return content


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages the results hang on, as installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package).split("+")[0]
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine_facts(profile: str, root: Path = ROOT) -> dict[str, Any]:
    """What depends on the machine: where the paper is set, where and how long the runs were trained, tables and
    figures of times."""
    folder = root / "results" / name_of(profile) / "machine"
    facts: dict[str, Any] = {
        "here": {"processor": processor(), "cores": os.cpu_count(), "versions": versions()},
        "training": [],
        "tables": {},
        "figures": figures_in(root / "figures" / name_of(profile) / "machine", root),
    }
    groups: dict[tuple[str, str, str], list[float]] = {}
    for path in sorted(folder.glob("runs/*/*/machine.json")):
        run = read_json(path)
        where = run.get("gpu") if run.get("device", "cpu") != "cpu" else run.get("processor")
        groups.setdefault((path.parts[-3], str(where), f"torch {run.get('torch')}"), []).append(
            run.get("seconds") or 0.0
        )
    facts["training"] = [[*key, len(times), round(sum(times) / 60, 1)] for key, times in sorted(groups.items())]
    for path in sorted(folder.glob("*.json")):
        if is_table(value := read_json(path)):
            facts["tables"][path.stem] = value
    return facts


def content_path(profile: str, root: Path = ROOT) -> Path:
    """Where the file that the paper is set from lies."""
    return root / "paper" / "build" / name_of(profile) / "content.json"


def full_content(profile: str, root: Path = ROOT) -> str:
    """The collected file with the facts of machines, as text."""
    machine = machine_facts(profile, root)
    content = collect(profile, root)
    digest = hashlib.sha256(dumps(content).encode()).hexdigest()
    for kind in ("tables", "figures"):
        content[kind] = machine[kind] | content[kind]
    # Not printed: so that a new text or a newly executed notebook makes the paper and the report old.
    sources = [
        *text_files(root),
        root / "paper" / "refs.bib",
        *(root / "results" / name_of(profile) / "notebooks").glob("*.ipynb"),
    ]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(sources)}
    return dumps(content | {"machine": machine, "digest": digest, "sources": digests})


def up_to_date(profile: str, root: Path = ROOT) -> bool:
    """Whether the PDF is there and was set from today's results and text."""
    kept = content_path(profile, root)
    return (
        kept.is_file()
        and kept.with_name("paper.pdf").is_file()
        and kept.read_text(encoding="utf-8") == full_content(profile, root)
    )


def compile_with(
    content: Path, root: Path, query: str = "", field: str = "value", format: Literal["pdf", "html"] = "pdf",
    tagged: bool = True,
) -> Any:
    """Set paper/main.typ with the file `content`, as PDF, `tagged` for a screen reader, or HTML, or answer a query about a
    field of its elements; raises PipelineError with Typst's message."""
    import typst

    common: dict[str, Any] = {
        "root": str(root),
        "sys_inputs": {"content": f"/{content.relative_to(root)}", "format": format},
        "ignore_system_fonts": True,
    }
    main = str(root / "paper" / "main.typ")
    try:
        if query:
            return typst.query(main, query, field=field, **common)
        return typst.compile(main, format=format, pdf_tags=tagged, **common)
    except typst.TypstError as error:
        raise PipelineError(f"paper/main.typ could not be set: {error}") from error


def missing(profile: str, root: Path = ROOT) -> list[str]:
    """What the paper of this profile shows as missing; needs the paper to be built."""
    return sorted(set(json.loads(compile_with(content_path(profile, root), root, query="<missing>"))))


def build(profile: str, root: Path = ROOT) -> Path:
    """Set the paper and return the path of the PDF; raises PipelineError with Typst's message if it cannot be set."""
    load_profile(profile, root)
    kept = content_path(profile, root)
    kept.unlink(missing_ok=True)  # written last again: without it the PDF counts as old
    draft, target = kept.with_name("draft.json"), kept.with_name("paper.pdf")
    write_text(draft, full_content(profile, root))
    part = target.with_suffix(".part")
    part.write_bytes(compile_with(draft, root))
    part.replace(target)
    draft.replace(kept)
    return target


def write(profile: str, root: Path = ROOT) -> Path:
    """Set the paper, then write the stamp results/<profile>/paper.json; returns the path of the PDF."""
    pdf = build(profile, root)
    write_text(root / "results" / name_of(profile) / "paper.json", dumps(collect(profile, root)))
    return pdf


def release(root: Path = ROOT) -> Path:
    """Set the paper profile's paper and copy it to release/paper.pdf, beside it release/paper.json: the digests of the results
    it was set from and of the file. Raises PipelineError if it is too large to be kept in git."""
    build("paper", root)
    pdf = compile_with(content_path("paper", root), root, tagged=False)  # tags are more than half of the file
    if len(pdf) > LARGEST:
        raise PipelineError(f"the paper has {len(pdf):,} bytes; release/paper.pdf is kept in git and may have {LARGEST:,}: "
                            "draw fewer points in its largest figures")
    target = root / "release" / "paper.pdf"
    results = read_json(content_path("paper", root))["digest"]
    write_text(target.with_suffix(".json"), dumps({"results": results, "pdf": hashlib.sha256(pdf).hexdigest()}))
    target.write_bytes(pdf)
    return target


def show(profile: str) -> None:
    """Write, and say what was written."""
    print(f"paper: {write(profile).relative_to(ROOT)}")


@reported
def main(arguments: list[str]) -> int:
    """Entry point; returns the exit code."""
    if arguments != ["--release"]:
        return for_profile("paper", __doc__, show)
    print(f"paper: {release().relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    command(lambda: main(sys.argv[1:]))
