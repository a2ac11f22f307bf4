"""`ssl-probe`: probe a finished run again, without training."""

from pathlib import Path

from ssl_runner import console
from ssl_runner.config import arguments

DESCRIPTION = """\
Probe the trained network of a finished run again, without training. The rows are appended to probe.csv in the
folder of the run, with the name of the data set, and ssl-report shows them.
"""
EXAMPLES = """\
settings: dataset, probe, device and precision, as of ssl-run; the values of the run are the defaults
  dataset=cifar100                     another data set, with its default options
  dataset=folder dataset.root=FOLDER   labelled images of your own, resized to the size of the network
  probe.labels=[0.01,0.1]              class-balanced shares of the labels, probe.draws=3 random draws of each
  probe.features=[backbone,projector]  features of the projector as well
  probe.layer=layer3                   the pooled output of one module as well
  probe=finetune                       train the whole network on the labels
"""


def parser() -> arguments.Parser:
    """Return the parser of the command line."""
    parser = arguments.Parser(prog="ssl-probe", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    parser.add_argument(
        "overrides", metavar="SETTING", nargs="*", default=[], help="group=choice or key=value"
    )
    parser.add_argument("--config-dir", help="folder with configs of your own (default: that of the run)")
    return parser


def main() -> None:
    """Entry point of `ssl-probe`. Exit codes: 0, 1 after an error, 130 after Ctrl-C."""
    console.call(execute)


def execute() -> None:
    """Validate the command line, then probe."""
    args = parser().read()
    from ssl_runner.evaluation.finished import config_of

    cfg = config_of(args.run, args.overrides, args.config_dir)
    from ssl_runner.evaluation.probe import probe

    print(probe(args.run, cfg), flush=True)
