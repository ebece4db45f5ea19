"""A report as one HTML file that needs nothing else: pictures lie inside it, and nothing in it is executed."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; }
img { max-width: 100%; display: block; margin: 1rem 0; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.note %}<p>{{ section.note }}</p>{% endif %}
{% if section.rows %}
<table>
{% if section.headers %}<tr>{% for cell in section.headers %}<th>{{ cell }}</th>{% endfor %}</tr>{% endif %}
{% for row in section.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% for picture in section.pictures %}<img alt="{{ section.title }}" src="data:image/png;base64,{{ picture }}">
{% endfor %}
{% if section.text %}<details><summary>show</summary><pre>{{ section.text }}</pre></details>{% endif %}
</section>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a report; what is left out is not shown."""

    title: str
    note: str = ""
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    pictures: Sequence[bytes] = ()
    """PNG files."""
    text: str = ""
    """Shown as it is, when it is unfolded."""

    @property
    def is_empty(self) -> bool:
        return not (self.note or self.rows or self.pictures or self.text)


def render_page(title: str, sections: Sequence[Section]) -> bytes:
    """The page as UTF-8; all text in it is escaped, sections without content are left out."""
    shown = [
        {**vars(section), "pictures": [base64.b64encode(picture).decode() for picture in section.pictures]}
        for section in sections
        if not section.is_empty
    ]
    # Nothing that a run says of itself, such as a title of an item, becomes a part of the page.
    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    return template.render(title=title, sections=shown).encode()
