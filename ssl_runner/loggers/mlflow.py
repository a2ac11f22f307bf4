"""MLflow: a tracking server, or a folder of files."""

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_runner.config.run_id import leaves
from ssl_runner.loggers.base import LoggedRun, Logger

if TYPE_CHECKING:
    from mlflow import MlflowClient

ID = "ssl_runner_id"  # the tag by which a resumed run is found
STATUS = {"done": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
MOST_PARAMS, LONGEST_PARAM = 100, 6000  # of MLflow, per call; in characters


class MLflow(Logger):
    """One run of an experiment.

    tracking_uri    None for MLFLOW_TRACKING_URI or, where that is not set, the folder mlruns in the working
                    directory
    """

    def __init__(self, experiment: str, tracking_uri: str | None = None):
        self.experiment = experiment
        local = Path("mlruns").absolute().as_uri()
        self.uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or local

    def start(self, run: LoggedRun) -> str:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow >= 3.7 refuses folders
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(self.uri)
        experiment = experiment_id(self.client, self.experiment)
        found = self.client.search_runs([experiment], f"tags.{ID} = '{run.id}'")
        if found:
            self.run_id = found[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            made = self.client.create_run(experiment, tags={ID: run.id}, run_name=run.name)
            self.run_id = made.info.run_id
            params = [Param(accepted(name), str(value)[:LONGEST_PARAM]) for name, value in leaves(run.config)]
            for first in range(0, len(params), MOST_PARAMS):
                self.client.log_batch(self.run_id, params=params[first : first + MOST_PARAMS])
        self.client.log_dict(self.run_id, run.config, "config.yaml")
        return f"{self.uri}, experiment {self.experiment}, run {self.run_id}"

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 10**6
        metrics = [Metric(accepted(name), value, now, epoch) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def picture(self, name: str, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path))

    def finish(self, status: str) -> None:
        self.client.set_terminated(self.run_id, STATUS[status])


def experiment_id(client: "MlflowClient", name: str) -> str:
    """The id of the experiment, which is made if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.create_experiment(name)
    except MlflowException:  # it exists, maybe since another job of the sweep has just made it
        if (experiment := client.get_experiment_by_name(name)) is None:
            raise
        return experiment.experiment_id


def accepted(name: str) -> str:
    """The name with _ for each character that MLflow refuses."""
    return re.sub(r"[^\w\-. /]", "_", name)
