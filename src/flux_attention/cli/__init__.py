"""The command `flux-attn`."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run a command (see `cli.app.main`); says what to install where the command line's packages are missing."""
    try:
        from flux_attention.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"error: the command line needs {error.name}: pip install 'flux-attention[demo]'")
    run(arguments)


__all__ = ["main"]
