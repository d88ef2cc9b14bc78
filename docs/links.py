"""Makes a site of files whose links are those of the repository: a hook of MkDocs.

The README is the home page and CHANGELOG.md a page; files outside of `docs/` that a page links to, such as pictures,
measurements and examples, are copied to the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the site that lie outside of `docs/`"""
FOLDERS = {"examples": "examples.md", "notebooks": "examples.md"}
"""Pages that stand for folders, which a site cannot show"""
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")


def on_files(files, config):
    """Add the pages that lie outside of `docs/`."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the links of a page from places in the repository into places on the site."""
    source = next((source for source, name in PAGES.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")

    def placed(link):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1])).rstrip("/")
        place = PAGES.get(path) or FOLDERS.get(path) or path.removeprefix("docs/")
        if (ROOT / path).is_file() and files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        return f"]({place}"

    return LINK.sub(placed, markdown)
