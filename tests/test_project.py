"""Files about the project agree with it."""

import re
from pathlib import Path

import unroll

ROOT = Path(__file__).parent.parent


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == unroll.__version__
    assert "the unroll authors" in citation and "the unroll authors" in (ROOT / "LICENSE").read_text()
