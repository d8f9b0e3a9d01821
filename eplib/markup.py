"""Result tables as HTML, the same in JupyterLab and in the report. Imports neither torch nor matplotlib."""

import html
import math
from typing import Any


def is_table(value: Any) -> bool:
    """Whether a result is a table: {"title", "columns", "rows", "note"}."""
    return isinstance(value, dict) and {"columns", "rows"} <= value.keys()


def table(name: str, value: dict[str, Any]) -> str:
    """A table with its id, title and note."""
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in value["columns"])
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in value["rows"])
    note = f'<p class="note">{html.escape(value["note"])}</p>' if value.get("note") else ""
    title = f"<h3>{html.escape(name)}. {html.escape(value.get('title', ''))}</h3>"
    return f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return f"<td>{ {True: 'yes', False: 'no', None: '–'}[value]}</td>"
    if isinstance(value, float) and math.isnan(value):
        return _cell(None)
    if isinstance(value, int | float):
        return f'<td class="number">{value:.5g}</td>' if isinstance(value, float) else f'<td class="number">{value}</td>'
    return f"<td>{html.escape(str(value))}</td>"
