"""The command line."""

try:
    import rich  # noqa: F401
    import typer  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise SystemExit(f"unroll: needs {error.name}; pip install 'torch-unroll[cli]'") from error
