"""What the command line tools have in common."""

from __future__ import annotations

import argparse
from typing import NoReturn

from asag_deploy.errors import ConfigError


class OneSentenceParser(argparse.ArgumentParser):
    """Reports a bad command line as the project's other errors: one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage and exiting."""
        raise ConfigError(f"{message} (see {self.prog.split()[0]} --help)")
