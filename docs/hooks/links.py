"""Links from a page to a file outside docs/ lead to that file in the repository; inside a checkout and on
GitHub they stay relative.
"""

import posixpath
import re

LINK = re.compile(r"(\]\()([^)#\s]+)")


def on_page_markdown(markdown, page, config, **_):
    """Replace each relative link that leaves docs/ by the address of the file in the repository."""

    def lead_to_repository(match):
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[2]))
        if "://" in match[2] or target.startswith("docs/"):
            return match[0]
        return f"{match[1]}{config.repo_url}/blob/main/{target}"

    return LINK.sub(lead_to_repository, markdown)
