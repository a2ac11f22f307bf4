"""Loggers: services and programs that show the curves of a run, fed by the rows of its CSV files."""

from ssl_runner.loggers.base import LoggedRun, Logger
from ssl_runner.loggers.feed import Feed

__all__ = ["Feed", "LoggedRun", "Logger"]
