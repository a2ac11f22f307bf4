"""The exception for invalid user input, error messages on one line, and numbers and lists in messages."""

import re
from collections.abc import Iterable


class UsageError(Exception):
    """Invalid input. The message has one line: what was given, what is accepted, what to do.

    The command line prints only this message, without a traceback, and exits with code 1.
    """


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 epoch", "2,000 epochs". `plural` is by default the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def listed(names: Iterable[str], last: str = "and") -> str:
    """Return names as a list in a sentence: "a", "a and b", "a, b and c". `last` may be "or"."""
    *others, end = names
    return f"{', '.join(others)} {last} {end}" if others else end


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line, or its type name if the message is empty."""
    if match := re.search(r"DefaultCPUAllocator: .*?(\d+) bytes", str(error)):
        return f"out of memory for {int(match[1]) / 2**30:.3g} GiB; use a smaller batch_size, V or network"
    return " ".join(str(error).split()) or type(error).__name__


def of_part(key: str, error: BaseException) -> str:
    """Return the error of a part of the configuration on one line that begins with the option.

    error: raised by the class or function at `key`, as for an option that it does not have.
    """
    message = one_line(error)
    if match := re.match(r"(?:\S+\(\) )?got an unexpected keyword argument '(\w+)'\.? ?(.*)", message):
        return f"{key}.{match[1]}: expected an option of the chosen {key}; {match[2] or 'leave it out'}"
    return message if message.startswith(f"{key}.") else f"{key}: {message}"


def format_error(error: BaseException) -> str:
    """Format an error on one line.

    The exception type is prepended, unless ssl_runner defines the exception.
    """
    if type(error).__name__ == "UncompletedJobError":  # raised by submitit; its message contains a whole log
        match = re.search(r"Job (\S+)", str(error))
        return (
            f"sweep job {match[1] if match else ''} ended without a result (killed or cancelled): see its log"
            " in .submitit/ in the sweep folder. Other jobs keep running; when they have ended, rerun the"
            " command with resume=auto to run only the missing jobs"
        )
    if type(error).__name__ == "FailedJobError" and "sbatch: " in str(error):  # raised by submitit
        problem = " ".join(str(error).rpartition("sbatch: ")[2].split())
        return (
            f"hydra/launcher=slurm: expected sbatch to submit the jobs, found '{problem}'; start where Slurm"
            " can be reached, and check the options hydra.launcher.*"
        )
    if key := getattr(error, "full_key", None):  # raised by OmegaConf, with more lines about its classes
        problem = str(error).partition("\n")[0]
        todo = r"; correct it, or write \${ for the text ${" if "nterpolation" in problem else ""
        return f"{key}: {problem}{todo}"
    from_us = isinstance(error, UsageError) or type(error).__module__.startswith("ssl_runner")
    return one_line(error) if from_us else f"{type(error).__name__}: {one_line(error)}"
