"""The command as a process: its options, its messages and its exit status."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
import scvi
from rich.console import Console
from rich.logging import RichHandler

from scvi_sams.cli._arguments import OPTIONS, make_parser
from scvi_sams.cli._fit import fit
from scvi_sams.exceptions import SAMSError

_USAGE, _INTERRUPTED = 2, 130
_NOISY = ("lightning.pytorch", "lightning.fabric")
_OTHERS = r"(anndata|lightning|numba|scanpy|scvi|sklearn|torch|umap)(\.|$)"
"""Modules whose warnings are for developers."""


class Messages(logging.Handler):
    """Keeps the warnings of a run, for its summary."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message once."""
        text = record.getMessage()
        if text not in self.texts:
            self.texts.append(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 after an error, 130 after Ctrl-C.

    Parameters
    ----------
    arguments
        Words after the name of the program; ``None`` for those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(given)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    mpl.use("agg")  # figures are written to files
    try:
        with _messages(errors, quiet=options.quiet) as messages:
            page = fit(options, shlex.join(["scvi-sams", *given]), messages.texts, errors)
    except (SAMSError, OSError) as error:
        text = _with_options(" ".join(str(error).split()))
        errors.print(f"scvi-sams {options.command}: error: {text}")
        return _USAGE
    except KeyboardInterrupt:
        errors.print("scvi-sams: interrupted.")
        return _INTERRUPTED
    if not options.quiet:
        Console(soft_wrap=True, highlight=False, markup=False).print(f"Wrote {page}")
    return 0


_ARGUMENT = re.compile(r"`(\w+)`|\b(\w+)=(?=')")
"""An argument of Python in a message, alone or with its value."""


def _with_options(message: str) -> str:
    """Name arguments of Python in a message by the options of the command."""

    def option(found: re.Match[str]) -> str:
        name, with_value = found.groups()
        if name is not None:
            return OPTIONS.get(name, found[0])
        return OPTIONS[with_value] + " " if with_value in OPTIONS else found[0]

    return _ARGUMENT.sub(option, message)


def _name_options(record: logging.LogRecord) -> bool:
    """Change a message before it is handled."""
    record.msg, record.args = _with_options(record.getMessage()), ()
    return True


@contextmanager
def _messages(console: Console, *, quiet: bool) -> Iterator[Messages]:
    """Send messages to a console, keep warnings, and restore the loggers afterwards."""
    logger = logging.getLogger("scvi")
    before = logger.handlers[:], logger.level
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    shown = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    kept = Messages()
    for handler in (shown, kept):
        handler.addFilter(_name_options)
    logger.handlers = [shown, kept]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    seed = scvi.settings.seed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_OTHERS)
            yield kept
    finally:
        logger.handlers, level = before
        logger.setLevel(level)
        for name, earlier in levels.items():
            logging.getLogger(name).setLevel(earlier)
        scvi.settings.seed = seed
