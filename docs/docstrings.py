"""Reads the examples of docstrings as code: an extension of Griffe."""

import re

from griffe import Extension


class Examples(Extension):
    """Griffe knows a section `Examples:`, and takes `Example:` for text."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
