"""`python -m unroll`: the command line."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # `python -m` puts the current folder first: what lies there is not to be run
        sys.path.pop(0)
    from unroll.cli.main import main

    main()
