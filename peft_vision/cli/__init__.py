"""The command line: one verb per file, found by its stem.

A verb file defines one function named like the file; nothing heavy is imported before it is called,
so that ``peft-vision --help`` answers at once.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from peft_vision import __version__
from peft_vision.errors import PeftVisionError
from peft_vision.lookup import stems

app = typer.Typer(
    name="peft-vision",
    help="Parameter-efficient fine-tuning and compression of vision backbones.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

_state = {"debug": False}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"peft-vision {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""
    _state["debug"] = debug


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """One message and an exit code in place of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except PeftVisionError as error:
            if _state["debug"]:
                raise
            typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            typer.secho("Stopped.", fg=typer.colors.RED, err=True)
            raise typer.Exit(130) from error

    return run


def _register() -> None:
    for stem in stems("cli"):
        module = importlib.import_module(f"{__name__}.{stem}")
        app.command(stem.replace("_", "-"))(guarded(getattr(module, stem)))


_register()


def main() -> None:
    """Entry point of ``peft-vision`` and ``python -m peft_vision``."""
    app(args=sys.argv[1:], prog_name="peft-vision")
