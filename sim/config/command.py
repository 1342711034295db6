"""One Hydra entry for every command.

A command is a function of its configuration, ``conf/NAME.yaml`` and a dataclass that checks the keys; ``run_command``
runs it.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sim.atomic import sole_writer
from sim.config.arguments import parse_overrides, read_arguments
from sim.config.failures import (
    FAILED,
    INTERRUPTED,
    RUN_FOLDER,
    SWEEP_FOLDER,
    errors_in_one_line,
    full_error,
    how_to_install,
    sigterm_as_ctrl_c,
)
from sim.config.options import (
    CONF_DIR,
    SEARCH_PATH,
    added_folders,
    compose_config,
    folders_of,
    groups_of,
    option_names,
    option_path,
    search_path,
)
from sim.config.overrides import check_overrides
from sim.config.streams import print_any_text
from sim.config.sweeps import (
    JobFailedError,
    NoteFolder,
    failed_jobs,
    forget_failure,
    note_failure,
    sweep_callback,
    sweep_ended,
)
from sim.errors import ConfigError
from sim.json_file import read_json_object
from sim.plugins import belongs_to, plugin_folders
from sim.progress import VARIABLE as PROGRESS

RUN_FILES = ("summary.json", "summaries.json", "compare.json", "capacity.json")
"""What a run folder gets last: a folder with one of them is complete, and no other run writes into it."""
SWEEP_FILE = "multirun.yaml"
"""What Hydra writes into the folder of a sweep."""
BEGUN_FILES = ("config.yaml", "provenance.json")
"""What a run folder gets first. A run that fails removes them if it wrote nothing else; a killed run leaves them."""
RAY_LAUNCHER = "agents.training.ray_launcher:register"
"""Registers the launcher of this project; Hydra finds others, such as joblib, when their packages are installed."""
NO_DIFFERENCE = ("workers", "executor")
"""Keys that change no record. Two jobs that differ only in them are the same run."""


def start(main: str) -> None:
    """Import and run a command's main, ``MODULE:FUNCTION``; one line says so if a package is not installed."""
    with errors_in_one_line():
        run = resolve_name(main)
        run()


def run_command(task: Callable[[DictConfig], object], config_name: str, *, positional: str | None = None) -> None:
    """Run a command: parse its arguments, compose its configuration, call the task.

    An error that the user can mend ends the process with one line on stderr and exit status 2. Ctrl-C and SIGTERM
    interrupt the task, which may still write what there is; the exit status is 130. Of several jobs
    (``--multirun``) each that fails prints such a line, the others run, and the exit status is 1.

    Args:
        task: takes the composed configuration. If it returns an int other than 0, that is the exit status.
        config_name: a file of conf/, which states defaults, help and Hydra's settings.
        positional: the key, a list, that takes arguments without ``=``; None allows none.
    """
    print_any_text()
    job = _Job(task)
    with sigterm_as_ctrl_c(), errors_in_one_line():
        if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
            raise ConfigError("NUMBA_DISABLE_JIT is set, but the simulator only runs compiled; unset it")
        arguments = read_arguments(sys.argv[1:], positional=positional)
        config_name = arguments.config_name or config_name
        if arguments.help:
            print(help_text(config_name, arguments.overrides, arguments.config_dir))
            return
        folders = added_folders(config_name, arguments.overrides, arguments.config_dir)
        added = [str(folder.absolute()) for folder in folders]
        sys.path += added  # Python files next to these options; processes that start later inherit the variable
        search = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), *added]).strip(os.pathsep)
        if not arguments.shows:
            check_overrides(arguments.overrides, config_name, arguments.config_dir, multirun=arguments.multirun)
        noted = [sweep_callback()] if arguments.multirun else []
        sys.argv[1:] = [*arguments.options, *_with_plugins(arguments.overrides), *noted]
        job.multirun = arguments.multirun
        if arguments.multirun:
            resolve_name(RAY_LAUNCHER)()
        quiet = _environment(PROGRESS, "0") if arguments.quiet else nullcontext()
        inherited = _environment("PYTHONPATH", search) if added else nullcontext()
        elsewhere = ""
        with (
            errors_in_one_line("", SWEEP_FOLDER if arguments.multirun else RUN_FOLDER),
            quiet,
            inherited,
            _environment("HYDRA_FULL_ERROR", "1"),
        ):  # Hydra raises its errors instead of printing them
            try:
                hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)()
            except JobFailedError as error:  # in a process of its own, whose counts are not those of this one
                failed = failed_jobs()
                elsewhere = f"{failed} job{'s' if failed > 1 else ''} failed, the first: {error}"
            except ValueError as error:
                if job.count:
                    raise
                raise ConfigError(str(error)) from error  # of an option of Hydra; the command has not started
            except HydraException as error:
                if isinstance(error.__cause__, ConfigError):  # of a part that Hydra builds itself, such as a launcher
                    raise error.__cause__ from None
                if named := re.search(r"hydra/launcher/([\w-]+)", str(error)):
                    raise ConfigError(
                        f"there is no hydra/launcher={named[1]}; allowed: basic, joblib "
                        f"({how_to_install('hydra_joblib_launcher')}), ray ({how_to_install('ray')})"
                    ) from error
                raise
            except OSError as error:  # after Hydra's own, some of which are such errors too
                if NoteFolder.folder is not None and error.filename is None:  # the only file that Hydra writes
                    error.filename = str(NoteFolder.folder / SWEEP_FILE)
                raise
            finally:
                sys.argv[1:] = [*arguments.options, *arguments.overrides]
                if arguments.multirun:
                    sweep_ended()
    if elsewhere:
        print(f"error: {elsewhere}", file=sys.stderr)
        raise SystemExit(1)
    if job.failed:
        print(f"error: {job.failed} of {job.count} jobs failed", file=sys.stderr)
    if job.failed or job.status:
        raise SystemExit(1 if job.failed else job.status)


def _with_plugins(overrides: Sequence[str]) -> list[str]:
    """Return the overrides with the folders of installed packages added to ``hydra.searchpath``."""
    if not plugin_folders():
        return list(overrides)
    others = [text for text in overrides if not text.lstrip("+").startswith(f"{SEARCH_PATH}=")]
    return [*others, *search_path(parse_overrides(overrides), None)]


class _Job:
    """What Hydra calls: the task of a command, alone in its run folder, with its errors in one line."""

    multirun = False

    def __init__(self, task: Callable[[DictConfig], object]) -> None:
        self.task, self.full_error = task, full_error()
        self.__module__, self.__name__ = task.__module__, task.__name__  # Hydra reads them
        self.count = self.failed = self.status = 0

    def __call__(self, cfg: DictConfig) -> None:
        self.count += 1
        folder = Path(HydraConfig.get().runtime.output_dir)
        job = HydraConfig.get().job
        name = f"job {job.num} ({job.override_dirname})" if self.multirun else ""
        with _environment("HYDRA_FULL_ERROR", "1" if self.full_error else None):
            if self.multirun:
                sys.argv[1:] = [text for text in sys.argv[1:] if text != sweep_callback()]  # as it was typed
                forget_failure()
            try:
                with errors_in_one_line(f"{name}: " if name else "", self._elsewhere(cfg, folder)):
                    result = self._run(cfg, folder, name)
            except SystemExit as end:
                if self.multirun:
                    note_failure(end.__context__ or end)
                with suppress(OSError):
                    _remove_if_only_begun(folder, failed=end.code == FAILED)
                if not self.multirun or end.code == INTERRUPTED:
                    raise
            except Exception as error:
                if not self.multirun:
                    raise
                note_failure(error)
                traceback.print_exc()
            else:
                self.status = self.status or (result if isinstance(result, int) else 0)
                return
        self.failed += 1
        if HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":
            raise JobFailedError(name)  # a process of its own does not count here

    def _elsewhere(self, cfg: DictConfig, folder: Path) -> str:
        """Return the override that sends the files of this job to another place; empty if the command has none."""
        if self.multirun:
            return SWEEP_FOLDER
        if folder != Path.cwd():
            return RUN_FOLDER
        return "out=PATH" if "out" in cfg else ""

    def _run(self, cfg: DictConfig, folder: Path, name: str) -> object:
        if folder == Path.cwd():  # the command has no run folder
            return self._complete(cfg)
        if (folder / SWEEP_FILE).exists():  # tables would take the sweep for one run, and hide its jobs
            raise ConfigError(f"{folder} holds a sweep; choose another folder: hydra.run.dir=FOLDER")
        if not self.multirun or not (earlier := _earlier_summary(folder, cfg)):
            with sole_writer(folder, RUN_FILES):
                return self._complete(cfg)
        if not earlier.get("interrupted"):
            print(f"{name}: skipped, {folder} holds this run already", file=sys.stderr)
            return None
        with sole_writer(folder):
            print(f"{name}: was interrupted in {folder}, runs again", file=sys.stderr)
            (folder / RUN_FILES[0]).unlink(missing_ok=True)
            return self._complete(cfg)

    def _complete(self, cfg: DictConfig) -> object:
        """Run the task; code of a user that ends the process, as if all were well, is an error."""
        try:
            return self.task(cfg)
        except SystemExit as end:
            if type(end) is SystemExit and end.code in (None, 0):  # not ``Stopped``, which a server raises at a signal
                last = traceback.extract_tb(end.__traceback__)[-1]
                raise ConfigError(
                    f"{last.filename}, line {last.lineno}, ended the run before it was complete (SystemExit); "
                    "let that code return, or raise an error that says what is wrong"
                ) from end
            raise


def _earlier_summary(folder: Path, cfg: DictConfig) -> dict[str, Any] | None:
    """Return the summary of the run of this configuration that a folder holds; None if it holds no run.

    Raises:
        ConfigError: if it holds the run of another configuration.
    """
    found = next((path for name in RUN_FILES if (path := folder / name).exists()), None)
    if found is None or not (folder / BEGUN_FILES[0]).exists():
        return None
    earlier, present = (
        dict(_leaves(OmegaConf.to_container(one)))
        for one in (OmegaConf.load(folder / BEGUN_FILES[0]), OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True)))
    )
    for key in sorted(earlier.keys() | present.keys()):
        if earlier.get(key) != present.get(key) and key.split(".")[0] not in NO_DIFFERENCE:
            raise ConfigError(
                f"{folder} holds a run with {key}={earlier.get(key)}, and this job has {key}={present.get(key)}; "
                "delete the folder, or choose another for all jobs: hydra.sweep.dir=FOLDER"
            )
    return read_json_object(found, ConfigError, f"delete {folder}")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in a configuration."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _remove_if_only_begun(folder: Path, *, failed: bool) -> None:
    """Remove the folder of a run that wrote nothing, or failed before it wrote a result; never the current folder.

    Folders above it that are empty then, such as the label's of a training, go too, up to the current one.
    """
    here = Path.cwd()
    if folder == here:
        return
    if failed and {path.name for path in folder.iterdir()} <= set(BEGUN_FILES):
        for name in BEGUN_FILES:
            (folder / name).unlink(missing_ok=True)
    folder.rmdir()
    for parent in folder.parents:
        if here not in parent.parents or any(parent.iterdir()):
            break
        parent.rmdir()


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable, or remove it, for a while."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def help_text(config_name: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> str:
    """Return the help of a command: its own text, the groups that it uses with their options, its configuration."""
    search = search_path(parse_overrides(overrides), config_dir)
    try:
        cfg = compose_config(config_name, [*overrides, *search], with_hydra=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    folders = folders_of(cfg)
    module = str(cfg.hydra.help.app_name)
    groups = "\n".join(f"{group}: {', '.join(_usable(group, folders, module))}" for group in groups_of(cfg))
    template: str = OmegaConf.to_container(cfg.hydra.help, resolve=False)["template"]  # type: ignore[call-overload,index]
    with open_dict(cfg):
        del cfg["hydra"]
    return template.replace("$APP_CONFIG_GROUPS", groups).replace("$CONFIG", OmegaConf.to_yaml(cfg)).rstrip()


def _usable(group: str, folders: Sequence[Path], module: str) -> list[str]:
    """Return the options of a group that are of use to a command."""
    return [name for name in option_names(group, folders) if belongs_to(option_path(group, name, folders), module)]


def one_thread() -> None:
    """Keep numeric libraries at one thread: several runs share a machine, and two threads on two cores can stall."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
