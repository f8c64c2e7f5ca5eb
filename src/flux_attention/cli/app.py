"""`flux-attn`: its commands, and what becomes of their errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flux_attention.cli.commands import data
from flux_attention.cli.commands.bench import bench
from flux_attention.cli.commands.board import board
from flux_attention.cli.commands.convert import convert
from flux_attention.cli.commands.demo import demo
from flux_attention.cli.commands.evaluate import evaluate, lm_eval
from flux_attention.cli.commands.generate import generate
from flux_attention.cli.commands.route import route
from flux_attention.cli.commands.serve import serve
from flux_attention.cli.commands.train import train
from flux_attention.cli.commands.train_packs import train_packs
from flux_attention.cli.options import make_console

app = typer.Typer(
    name="flux-attn",
    help="Context-aware hybrid attention: a small router picks full or sparse attention per layer and request, on a "
    "frozen language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Options of another program follow the command's own.
_PASSES_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    # Read by `main`, which sees the arguments first; declared here for --help.
    del debug


for _command in (demo, generate, route):
    app.command()(_command)
app.command(name="eval")(evaluate)
app.command()(board)
app.command(name="lm-eval", context_settings={**_PASSES_ON, "help_option_names": []})(lm_eval)
app.command()(train)
app.command(name="train-packs")(train_packs)
app.add_typer(data.app, name="data")
app.command()(convert)
app.command(context_settings=_PASSES_ON)(serve)
app.command(context_settings={**_PASSES_ON, "help_option_names": []})(bench)


# Names, so that no optional package is imported to compare with.
_EXPECTED = ("PoolExhaustedError", "OutOfMemoryError", "UnfinishedError", "UnsupportedVLLMError")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; errors of bad input are one line and exit code 2 (`--debug` shows where they came from)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(args=arguments, prog_name="flux-attn")
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        _fail(error, 2)
    except RuntimeError as error:
        # What the user can change; anything else is a bug worth a traceback.
        if debug or type(error).__name__ not in _EXPECTED:
            raise
        _fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: BaseException, code: int) -> None:
    from flux_attention.cli.terminal import print_error

    print_error(make_console(stderr=True), error)
    sys.exit(code)
