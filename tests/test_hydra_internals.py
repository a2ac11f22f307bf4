"""Hydra's private API: only one module uses it, and it behaves as that module describes."""

import ast
import inspect
import os
from pathlib import Path

import pytest
from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from ssl_runner.config import arguments, hydra_internals
from ssl_runner.config.compose import CONF, parse
from tests.composition import CACHED

ROOT = Path(__file__).parent.parent


def test_only_one_module_imports_private_parts_of_hydra() -> None:
    users = set()
    for path in [*ROOT.glob("ssl_runner/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if any(f"{module}.{name}.".startswith("hydra._internal.") for name in names) or any(
                name.startswith("hydra._internal") for name in names
            ):
                users.add(str(path.relative_to(ROOT)))
    assert users == {"ssl_runner/config/hydra_internals.py"}


def test_repository_finds_configs_of_both_folders(tmp_path: Path) -> None:
    (tmp_path / "relation").mkdir()
    (tmp_path / "relation" / "mine.yaml").write_text("a: 1\n")
    (tmp_path / "relation" / "views.yaml").write_text("b: 2\n")  # conf/ precedes
    with hydra_internals.config_repository(CONF, str(tmp_path)) as repository:
        assert hydra_internals.config_folders(repository) == [CONF, tmp_path]
        expected = {path.stem for path in CONF.glob("relation/*.yaml")} | {"mine"}
        assert set(repository.get_group_options("relation")) == expected
        assert repository.group_exists("relation")
        assert not repository.group_exists("relation.k")
        assert repository.load_config("relation/mine").config == {"a": 1}
        assert "b" not in compose("config", overrides=["relation=views"]).relation
        [base] = [d for d in repository.load_config("relation/noisy").defaults_list if not d.is_self()]
        assert (base.get_package(), base.get_name()) == ("base", "labels")


def test_jobs_are_the_product_of_swept_values() -> None:
    jobs = hydra_internals.enumerate_jobs(parse(["a=1,2", "+b=range(0,4,2)", "c=[3,4]", "d@e=x,y"]))
    assert jobs == [
        [f"a={a}", f"+b={b}", "c=[3,4]", f"d@e={d}"] for a in (1, 2) for b in (0, 2) for d in ("x", "y")
    ]
    assert hydra_internals.enumerate_jobs([]) == [[]]
    assert hydra_internals.enumerate_jobs(parse(["a=range(1,0)"])) == []


def test_plugin_schema_is_removed_where_the_folder_has_a_file(tmp_path: Path) -> None:
    store = ConfigStore.instance()
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "testing.yaml").write_text("a: 1\n")
    for name in ("testing", "other"):
        store.store(group="hydra/launcher", name=name, node={"b": 2})
    hydra_internals.remove_plugin_schemas(tmp_path)
    names = store.list("hydra/launcher")
    assert "testing.yaml" not in names
    assert "other.yaml" in names
    del store.repo["hydra"]["launcher"]["other.yaml"]


@pytest.mark.parametrize("before", [None, "0"])
def test_task_runs_with_given_arguments_and_its_error_is_raised(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sys.argv plays no part, and the environment is as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ssl-run", "a=2"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    if before is not None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", before)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("a: 1\nhydra: {run: {dir: out}, output_subdir: null}\n")
    parser = arguments.parser()
    args = arguments.parse(parser)
    seen = []

    def task(cfg) -> None:
        seen.append(OmegaConf.to_container(cfg))
        raise LookupError("from the task")

    monkeypatch.setattr("sys.argv", ["ssl-run", "a=3"])
    with pytest.raises(LookupError, match="from the task"):
        hydra_internals.run_hydra(args, parser, task, tmp_path / "conf")
    assert seen == [{"a": 2}]
    assert os.environ.get("HYDRA_FULL_ERROR", "0") == "0"


def failed_job(sweeper: str) -> JobReturn:
    hydra_cfg = OmegaConf.create({"hydra": {"sweeper": {"_target_": sweeper}}})
    return JobReturn(hydra_cfg=hydra_cfg, status=JobStatus.FAILED, _return_value=LookupError("from the job"))


def test_failures_of_jobs_are_collected_without_messages_of_hydra(capsys) -> None:
    """A grid goes on after a failed job; a search gets the error, as a failed trial."""
    failed: list[JobReturn] = []
    grid, search = failed_job(hydra_internals.BASIC_SWEEPER), failed_job("mine.Search")
    done = JobReturn(status=JobStatus.COMPLETED, _return_value=0.5)
    before: list[JobReturn] = []
    again = JobReturn(status=JobStatus.COMPLETED, _return_value=hydra_internals.Returned(0.5, True))
    with hydra_internals.collected_failures(failed, before):
        assert (again.return_value, again.return_value, before) == (0.5, 0.5, [again])
        assert (done.return_value, grid.return_value) == (0.5, None)
        for _ in range(2):
            with pytest.raises(LookupError, match="from the job"):
                _ = search.return_value
        raise search._return_value
    assert [id(job) for job in failed] == [id(grid), id(search)]
    assert capsys.readouterr() == ("", "")
    with pytest.raises(LookupError, match="of another kind"), hydra_internals.collected_failures(failed, []):
        raise LookupError("of another kind")
    with pytest.raises(LookupError, match="from the job"):
        _ = grid.return_value
    assert "Error executing job" in capsys.readouterr().err


def test_basic_sweeper_has_this_name() -> None:
    assert f"{BasicSweeper.__module__}.{BasicSweeper.__name__}" == hydra_internals.BASIC_SWEEPER


def test_help_texts_of_options_are_strings() -> None:
    """argparse of Python 3.14 refuses others."""
    assert all(isinstance(action.help, str) for action in arguments.parser()._actions)


@pytest.mark.parametrize(
    "overrides",
    [
        ["epochs=3", "backbone.widths=[8,16]", "+evaluators.mine._target_=a.b"],
        ["relation=noisy", "relation@relation.base=neighbors", "loss=simclr", "hydra.run.dir=here"],
        ["relation=mine", "gamma=2"],
    ],
)
def test_cached_composition_is_that_of_hydra(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in another folder, and after a change of the first result or of a file, at the same length."""
    (tmp_path / "relation").mkdir()
    file = tmp_path / "relation" / "mine.yaml"

    def composed() -> str:
        with hydra_internals.config_repository(CONF, str(tmp_path)):
            config = compose("config", overrides=overrides, return_hydra_config=True)
        text = OmegaConf.to_yaml(config)
        config.epochs = config.hydra.run.dir = "changed"
        return text

    file.write_text("mine: 1\n")
    first = composed()
    monkeypatch.chdir(tmp_path)
    file.write_text("mine: 2\n")
    cached = [composed(), composed()]
    for owner, name, _ in CACHED:
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    plain = composed()
    assert cached == [plain] * 2
    assert f"cwd: {tmp_path}" in plain
    assert ("mine: 1" in first) == ("mine: 2" in plain) == ("relation=mine" in overrides)
