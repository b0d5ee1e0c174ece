"""How every command of the project ends: results on stdout, one line on stderr for what the user got wrong, and its exit code."""

from __future__ import annotations

import os
import sys

import typer
from typer.exceptions import TyperException

PARSER_WORDS = "Value error, "  # what checks an option's value puts before what it says


def run_app(
    app: typer.Typer,
    *,
    program: str,
    arguments: list[str] | None = None,
    user_errors: tuple[type[Exception], ...],
    failures: tuple[type[Exception], ...] = (),
) -> int:
    """Run a command line and return its exit code: the command's own, 2 for bad input or usage, 1 for a failure, 130 if interrupted.

    user_errors: what a user can cause and mend; failures: what went wrong otherwise. Both are told in one line.
    """
    try:
        code = app(arguments, prog_name=program, standalone_mode=False)
    except TyperException as error:
        return _fail(error.format_message().replace(PARSER_WORDS, ""), 2)
    except user_errors as error:
        return _fail(str(error), 2)
    except failures as error:
        return _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return code
