"""The libraries that the page holds: whole, with their licences, and nothing that would end the script around them."""

import pytest

from vitcmp.report.html import ASSETS

LIBRARIES = {"d3.min.js": ("d3.LICENSE", "Mike Bostock"), "plot.umd.min.js": ("plot.LICENSE", "Observable, Inc.")}


@pytest.mark.parametrize("name, licence, holder", [(name, *rest) for name, rest in LIBRARIES.items()])
def test_library_stands_beside_its_licence(name, licence, holder):
    text = (ASSETS / "vendor" / name).read_text(encoding="utf-8")
    assert len(text) > 200_000
    assert "</script" not in text.lower() and "<!--" not in text
    permission = (ASSETS / "vendor" / licence).read_text(encoding="utf-8")
    assert holder in permission and "Permission to use, copy, modify" in permission
