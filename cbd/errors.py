"""The errors a user can mend. Each message names the thing, what was expected, what came and the fix."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path


class CbdError(Exception):
    """A mistake or fault that is told in one line; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(CbdError):
    """A parameter, option or policy is wrong (exit code 2)."""

    exit_code = 2


class DataError(CbdError):
    """A delivery, trusted set, data set or bundle is wrong (exit code 2)."""

    exit_code = 2


@contextlib.contextmanager
def naming(names: Mapping[Path, str]) -> Iterator[None]:
    """Inside, a DataError about a private copy names what was copied: `names` holds by each copy, longer paths first, its source."""
    try:
        yield
    except DataError as error:
        told = str(error)
        for copy, source in names.items():
            told = told.replace(str(copy), source)
        raise DataError(told) from None


class EnvironmentFault(CbdError):
    """The machine is at fault: a full disk, an unwritable folder, a server out of reach (exit code 1)."""

    exit_code = 1
