"""Collect what the notebooks wrote and set the paper from it.

    python -m pipelines.paper --profile P      write results/P/paper.json and paper/build/P/paper.pdf

paper/main.typ holds no number of ours: it looks every one up in the collected file, and shows what is absent as
missing. The collected file without the facts of machines is results/P/paper.json; with them it is
paper/build/P/content.json, which is what is set.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
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
    read_json,
    write_text,
)

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


def further(content: dict[str, Any], root: Path) -> dict[str, list[str]]:
    """Kind -> the ids of what notebooks made of which the text places nothing: the paper shows them behind its text."""
    placed = set(re.findall(r'#(?:fig|tab|samples)\("([^"]+)"\)', (root / "paper" / "main.typ").read_text(encoding="utf-8")))
    kinds = ("figures", "tables", "texts")
    known = {made["notebook"] for kind in kinds for name, made in content[kind].items() if name in placed}
    return {kind: [name for name, made in content[kind].items() if made["notebook"] not in known] for kind in kinds}


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
    for kind in ("tables", "figures"):
        content[kind] = machine[kind] | content[kind]
    # Not printed: so that a new text or a newly executed notebook makes the paper and the report old.
    sources = [
        root / "paper" / "main.typ",
        root / "paper" / "refs.bib",
        *(root / "results" / name_of(profile) / "notebooks").glob("*.ipynb"),
    ]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(sources)}
    return dumps(content | {"machine": machine, "sources": digests})


def up_to_date(profile: str, root: Path = ROOT) -> bool:
    """Whether the PDF is there and was set from today's results and text."""
    kept = content_path(profile, root)
    return (
        kept.is_file()
        and kept.with_name("paper.pdf").is_file()
        and kept.read_text(encoding="utf-8") == full_content(profile, root)
    )


def compile_with(
    content: Path, root: Path, query: str = "", field: str = "value", format: Literal["pdf", "html"] = "pdf"
) -> Any:
    """Set paper/main.typ with the file `content`, as PDF or HTML, or answer a query about a field of its elements; raises
    PipelineError with Typst's message."""
    import typst

    common: dict[str, Any] = {
        "root": str(root),
        "sys_inputs": {"content": f"/{content.relative_to(root)}", "format": format},
        "ignore_system_fonts": True,
    }
    main = str(root / "paper" / "main.typ")
    try:
        return typst.query(main, query, field=field, **common) if query else typst.compile(main, format=format, **common)
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


def show(profile: str) -> None:
    """Write, and say what was written."""
    print(f"paper: {write(profile).relative_to(ROOT)}")


if __name__ == "__main__":
    command(lambda: for_profile("paper", __doc__, show))
