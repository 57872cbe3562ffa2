"""HTML from templates of Jinja, which escapes whatever is put into them; the templates lie beside this file."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(name: str, **context: Any) -> str:
    """The text that a template makes of a context.

    Example:
        >>> render("mask_cell.html.j2", title="1 < 2", rows=[]).splitlines()[0]
        '<p>1 &lt; 2</p>'
    """
    return _environment().get_template(name).render(context)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415 (half of all runs show nothing)

    return Environment(
        loader=PackageLoader("liar", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
