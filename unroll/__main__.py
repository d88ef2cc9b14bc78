"""`python -m unroll`: the command line."""

from unroll.cli.main import main

if __name__ == "__main__":
    main()
