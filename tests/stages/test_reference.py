"""The reference names every setting of every stage, with its default."""

import re
from pathlib import Path

import pytest

from tilestream.stages import STAGES

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"


@pytest.mark.parametrize("verb", STAGES)
def test_every_setting_is_in_the_reference(verb):
    section = re.split(rf"^### {verb}$", REFERENCE.read_text(), flags=re.MULTILINE)[1].partition("\n### ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", section, flags=re.MULTILINE))
    assert list(rows) == list(STAGES[verb].config.model_fields)
    for name, field in STAGES[verb].config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "required" if field.is_required() else "`null`" if default is None else f"`{default}`"
        assert rows[name].strip() == shown, name
