"""The page of real records, from the file to what a reader sees."""

from pathlib import Path

import pytest

from tests.browser.pages import SECTIONS, cells, open_page
from vitcmp.report.payload import payload_of
from vitcmp.report.reading import read_sources

RECORDS = Path(__file__).parents[1] / "fixtures" / "results" / "records"


def test_real_records_are_shown(page, make_page):
    payload = payload_of(read_sources([str(RECORDS)]))
    settings = payload["settings"]
    open_page(page, make_page(payload), "#speed.table=1&frameworks.table=1&flops.table=1&knobs.table=1")
    assert page.get_by_text("could not be drawn").count() == 0
    assert all(page.locator(f"#{section}").inner_text().strip() for section in SECTIONS)
    fastest = min(value for value in settings["latency_s"] if value)
    assert cells(page, "#speed .scroll")
    with page.expect_download() as event:
        page.click("text=CSV of all settings")
    text = Path(event.value.path()).read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1 + len(settings["latency_s"])
    assert f",{fastest}," in text


@pytest.mark.parametrize("name", ["speed", "flops", "choose"])
def test_sections_of_real_records_have_points(page, make_page, name):
    open_page(page, make_page(payload_of(read_sources([str(RECORDS)]))), section=name)
    assert page.locator(f"#{name} figure.chart [aria-label=dot] path").count() > 0
