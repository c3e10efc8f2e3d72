"""The `distill-ray` command. Parses, calls one function of `pipeline/`, prints what was written and what comes next.

Heavy packages are imported inside the commands, behind the config, so `--help` and a wrong key are answered at once.
Exit status: 0 done, 1 the run failed, 2 the config or the input is wrong, 130 interrupted by Ctrl-C or SIGTERM (the
folder resumes).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from distill_ray.completion import config_keys, one_of, run_folders
from distill_ray.config import RunConfig, load_config
from distill_ray.errors import ConfigError, DistillError, Interrupted, RunFolderError
from distill_ray.flywheel import cli as flywheel_cli
from distill_ray.pipeline import interrupts
from distill_ray.pipeline.progress import People, waiting
from distill_ray.serving import serve_cli
from distill_ray.serving.collecting.pairs_cli import forgetting, pairs_app

if TYPE_CHECKING:
    from distill_ray.pipeline.folder import RunFolder
    from distill_ray.pipeline.reporting.facts import Facts
    from distill_ray.serving.collecting.store import PairStore

PANELS = {
    "One run": ("demo", "init", "check", "preview", "plan", "run", "generate", "train", "evaluate", "report"),
    "Use it": ("ask", "export", "calibrate", "serve", "keys", "promote", "rollback"),
    "Keep learning": ("status", "flywheel", "pairs"),
    "This machine": ("doctor",),
}
"""The commands as `--help` shows them: in the order in which people need them."""


class _InPanels(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        panels = {name: panel for panel, names in PANELS.items() for name in names}
        for name, command in self.commands.items():
            assert isinstance(command, TyperCommand | TyperGroup)
            command.rich_help_panel = panels[name]
        self.commands = {name: self.commands[name] for name in panels}


app = typer.Typer(
    name="distill-ray",
    cls=_InPanels,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn what a large model does with a long prompt into what a small model does by itself.\n\n"
    "Start with `distill-ray demo`, then copy `runs/demo/input/` and put in your own model, prompt and data. "
    "What a command does and writes, with an example: `distill-ray COMMAND --help`. Completion in your shell: "
    "`distill-ray --install-completion`.",
)
app.add_typer(pairs_app)
console = People()
errors = People(stderr=True)

INTERRUPTED = 130  # exit status
HELP_WIDTH = 100  # of a terminal that is wider: long lines are hard to read

ConfigPath = Annotated[Path, typer.Argument(help="The YAML file of the run.", show_default=False)]
RunDir = Annotated[
    str | None,
    typer.Option("--run-dir", autocompletion=run_folders, help="Folder (or s3:// URL) of the run. Default: runs/NAME."),
]
ExistingRun = Annotated[str, typer.Argument(help="Folder of a run.", autocompletion=run_folders)]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N rows of each source.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=config_keys,
        help="Override a key, e.g. `--set train.epochs=2`. Repeatable.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"distill-ray {importlib.metadata.version('distill-ray')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    run_dir: Annotated[str, typer.Option("--run-dir", help="Folder of the run.")] = "runs/demo",
    rows: Annotated[
        int, typer.Option("--rows", min=60, help="Training queries to make; 400 more sentences are held out.")
    ] = 3000,
    overrides: Overrides = None,
) -> None:
    """The whole chain on the built-in teacher, offline, on two CPU cores.

    Teaches a tiny model to name the language of a sentence without the long instruction that its teacher needs. Writes
    the input, with a config to start from, to `runs/demo/input/`, and the run beside it, up to `report.html`.

    Example: `distill-ray demo`
    """
    from distill_ray.demo.prepare import prepare_demo
    from distill_ray.pipeline.run import run as run_pipeline

    try:
        config = prepare_demo(Path(run_dir) / "input", num_rows=rows, overrides=overrides or [])
    except OSError as error:
        raise RunFolderError(f"{run_dir}: cannot write here ({error.strerror}); give another --run-dir") from error
    _finish(run_pipeline(config, _folder(config, run_dir)), run_dir)


@app.command()
def run(config: ConfigPath, run_dir: RunDir = None, limit: Limit = None, overrides: Overrides = None) -> None:
    """Generate, train and evaluate; write the run's folder, up to `report.html`. Safe to repeat: what is done is kept.

    Example: `distill-ray run config.yaml --run-dir runs/first --limit 200`
    """
    loaded = load_config(config, overrides or [])
    from distill_ray.pipeline.run import run as run_pipeline

    folder = _folder(loaded, run_dir)
    _finish(run_pipeline(loaded, folder, limit=limit), folder.root)


@app.command()
def generate(config: ConfigPath, run_dir: RunDir = None, limit: Limit = None, overrides: Overrides = None) -> None:
    """Ask the teacher; write `examples/` and `rejects/`. Finished calls are never paid for twice.

    Example: `distill-ray generate config.yaml --limit 50`
    """
    loaded = load_config(config, overrides or [])
    from distill_ray.pipeline.generate import generate as run_stage
    from distill_ray.pipeline.run import stage

    folder = _folder(loaded, run_dir)
    with stage(loaded, folder):
        result = run_stage(loaded, folder, limit=limit)
    rejects = "".join(f", {reason} {count:,}" for reason, count in result.rejects.items())
    console.print(
        f"rows in {result.rows_in:,} = with examples {result.rows_with_examples:,} "
        f"+ rejected {result.rows_rejected:,}{rejects}"
    )
    console.print(f"teacher calls {result.teacher_calls:,}, replayed {result.teacher_calls_replayed:,}")
    _say_recipe_figures(folder)
    if result.num_examples:
        _wrote(f"{_shown(folder.root)}/examples", "train", *_same(config, folder, overrides))
    else:
        _wrote(f"{_shown(folder.root)}/rejects")
        _say_no_example(result.rows_in, result.rejects, _shown(folder.root))


@app.command()
def train(config: ConfigPath, run_dir: RunDir = None, limit: Limit = None, overrides: Overrides = None) -> None:
    """Fine-tune the student on `examples/`; write `student/`. The same command goes on after a kill.

    Example: `distill-ray train config.yaml --set train.epochs=2`
    """
    del limit  # accepted by all stages, so that one command line serves all; training takes what was generated
    loaded = load_config(config, overrides or [])
    from distill_ray.pipeline.run import stage
    from distill_ray.pipeline.training.train import train as run_stage

    folder = _folder(loaded, run_dir)
    with stage(loaded, folder):
        run_stage(loaded, folder)
    _wrote(f"{_shown(folder.root)}/student", "evaluate", *_same(config, folder, overrides))


@app.command()
def evaluate(config: ConfigPath, run_dir: RunDir = None, limit: Limit = None, overrides: Overrides = None) -> None:
    """Student against teacher on held-out rows; write `eval/` and `report.html`.

    Example: `distill-ray evaluate config.yaml --set evaluate.max_rows=500`
    """
    loaded = load_config(config, overrides or [])
    from distill_ray.pipeline.evaluate import evaluate as run_stage
    from distill_ray.pipeline.run import stage

    folder = _folder(loaded, run_dir)
    with stage(loaded, folder):
        metrics = run_stage(loaded, folder, limit=limit)
    _finish(metrics, folder.root)


@app.command()
def calibrate(
    run_dir: Annotated[
        str | None, typer.Argument(help="Folder of a run.", show_default=False, autocompletion=run_folders)
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="FILE.csv",
            help="Only measure routers, on recorded pairs: query, small_right, large_right and, if you have them, "
            "small_answer, small_logprob. The run, if one is named, gives the settings.",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Find out for which requests the student is as good as the teacher; write the run's `bundle/`.

    Examples:

    - `distill-ray calibrate runs/demo --set calibrate.error_budget=0.02`

    - `distill-ray calibrate --replay pairs.csv`
    """
    if replay is not None:
        _replay(replay, run_dir, overrides or [])
        return
    if run_dir is None:
        raise ConfigError("calibrate: name the folder of a run, or a file of recorded pairs (--replay FILE.csv)")
    from distill_ray.pipeline.run import noted, stored_config
    from distill_ray.serving.calibration.calibrate import calibrate as run_stage
    from distill_ray.serving.calibration.table import calibration_table

    folder = _existing(run_dir)
    config = stored_config(folder, overrides or [])
    with noted(folder):
        found = run_stage(config, folder)
    console.print(calibration_table(found.folder))
    if not found.is_new:
        console.print("nothing changed: the bundle is kept")
    _wrote(_shown(str(found.folder)))


def _replay(file: Path, run_dir: str | None, overrides: list[str]) -> None:
    from distill_ray.serving.calibration.recorded import default_config, replay_file
    from distill_ray.serving.calibration.table import replay_notes, replay_table

    if run_dir is None:
        config = default_config(overrides)
    else:
        from distill_ray.pipeline.run import stored_config

        config = stored_config(_existing(run_dir), overrides)
    found = replay_file(file, config)
    console.print(replay_table(found.figures))
    for note in replay_notes(found.figures):
        console.print(note, markup=False)
    for path in found.written:
        _wrote(path)


def _starters() -> dict[str, Path]:
    found = {file.stem: file for file in sorted((Path(__file__).parent / "recipes" / "configs").glob("*.yaml"))}
    return {**found, "self_critique": found["sentiment"]}  # each recipe's name is a starter


def _starter_names(incomplete: str) -> list[str]:
    return one_of(*_starters())(incomplete)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("config.yaml"),
    recipe: Annotated[
        str, typer.Option("--recipe", autocompletion=_starter_names, help="Which starter; an unknown name lists them.")
    ] = "context",
) -> None:
    """Write a commented starter config.

    Example: `distill-ray init --recipe step_by_step mine/config.yaml`
    """
    starters = _starters()
    if recipe not in starters:
        raise ConfigError(f"--recipe {recipe}: no such starter; there are: {', '.join(starters)}")
    if path.exists():
        raise ConfigError(f"{path}: is there already; give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(starters[recipe].read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write it ({error.strerror}); give another place") from error
    _wrote(str(path), "check", str(path))


@app.command()
def check(config: ConfigPath, run_dir: RunDir = None, overrides: Overrides = None) -> None:
    """Check everything that can be checked before anything is paid for: keys, files, template, model, API key, buckets.

    Writes nothing, and asks no teacher for an answer. Exit status 2: something is wrong.

    Example: `distill-ray check config.yaml`
    """
    loaded = load_config(config, overrides or [])
    from distill_ray.flywheel.preflight import check_flywheel
    from distill_ray.pipeline.check import check as run_check
    from distill_ray.pipeline.check import check_places

    others = [check_places(loaded, run_dir)]
    others += [check_flywheel(loaded)] if "flywheel" in loaded.model_fields_set else []
    for line in run_check(loaded, *others):
        mark = "" if line.startswith("warning: ") else "[green]ok[/green]  "
        console.print(mark + escape(line))
    _say_next("preview", str(config), "-n", "5", *_sets(overrides))


@app.command()
def plan(
    config: ConfigPath,
    limit: Limit = None,
    run_dir: Annotated[
        str | None,
        typer.Option(
            "--run-dir", autocompletion=run_folders, help="Folder of a trial with this config: its figures come first."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all of it as JSON.")] = None,
    overrides: Overrides = None,
) -> None:
    """Before anything is rented: rows, tokens, GPU-hours and money of each stage, and whether the models fit.

    Nothing is asked of a teacher, no Ray or GPU is needed, and nothing is written but `--json`. Exit status 2:
    something does not fit.

    Example: `distill-ray plan config.yaml --set plan.teacher.gpu=H100`
    """
    loaded = load_config(config, overrides or [])
    from distill_ray.pipeline.estimating.estimate import estimate
    from distill_ray.pipeline.estimating.render import show, write_json

    found = estimate(loaded, limit=limit, run=_existing(run_dir) if run_dir is not None else None)
    show(found, console)
    if json_file is not None:
        write_json(found, json_file)
        console.print(f"wrote: {json_file}", markup=False, soft_wrap=True)
    if not found.all_fits:
        raise typer.Exit(ConfigError.exit_code)
    _say_next("check", str(config), *_sets(overrides))


@app.command()
def preview(
    config: ConfigPath,
    num: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 5,
    overrides: Overrides = None,
) -> None:
    """Show for a few rows: the prompt that the teacher sees, its raw answer, and what the student would learn.

    The teacher is asked for these rows; nothing is kept.

    Example: `distill-ray preview config.yaml -n 3`
    """
    loaded = load_config(config, overrides or [])
    from distill_ray.pipeline.preview import preview as run_preview

    run_preview(loaded, num, console)
    _say_next("run", str(config), *_sets(overrides))


@app.command()
def report(
    run_dirs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_DIR...", help="Folders of runs.", show_default=False, autocompletion=run_folders),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="Write the comparison of several runs as a page.")
    ] = None,
) -> None:
    """Write a run's `report.html`, `report.md` and cards anew, and show its table; compare several runs.

    The first of several is what the others are held against, row by row where they were measured on the same.

    Example: `distill-ray report runs/demo`, or `distill-ray report runs/a runs/b --out compared.html`
    """
    from distill_ray.pipeline.reporting.report import write_report
    from distill_ray.pipeline.reporting.result import summary_table
    from distill_ray.pipeline.run import noted

    if len(run_dirs) > 1:
        _compare(run_dirs, out)
        return
    if out is not None:
        raise ConfigError("--out is for the comparison of several runs; the page of one is its report.html")
    facts = _facts(run_dirs[0])
    if not facts.metrics:
        raise DistillError(
            f"{run_dirs[0]}: not evaluated yet, or not since it changed; run `distill-ray evaluate CONFIG --run-dir "
            f"{run_dirs[0]}` first"
        )
    with noted(facts.folder):
        write_report(facts.folder, facts.config)
    console.print(summary_table(facts.metrics))
    _wrote(_shown(facts.folder.url("report.html")))


def _compare(run_dirs: list[str], out: Path | None) -> None:
    from distill_ray.pipeline.reporting.comparison import compare
    from distill_ray.pipeline.reporting.report import write_comparison

    if out is not None and (out.parent / "manifest.json").exists():
        raise ConfigError(f"--out {out}: {out.parent} is a run's own folder; give another place")
    found = {name.rstrip("/"): _facts(name) for name in run_dirs}
    last = [name.rsplit("/", 1)[-1] for name in found]
    names = last if len(set(last)) == len(last) else list(found)
    runs = dict(zip(names, found.values(), strict=True))
    roots = [facts.folder.root for facts in runs.values()]
    if len(set(roots)) < len(run_dirs):
        twice = next((name for name, root in zip(names, roots, strict=True) if roots.count(root) > 1), names[0])
        raise ConfigError(f"report: {twice} was named twice; name another run to compare it with")
    tables = compare(runs)
    for table in tables:
        console.print(table.for_terminal())
        if table.note:
            console.print(table.note, markup=False)
    if out is not None:
        write_comparison(out, runs, tables)
        _wrote(str(out))


@app.command()
def export(
    run_dir: ExistingRun,
    out: Annotated[Path, typer.Argument(help="File (messages) or folder (dataset) to write.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=one_of("messages", "dataset"),
            help="messages: JSON lines. dataset: a folder for `datasets`.",
        ),
    ] = "messages",
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            autocompletion=one_of("train", "validation", "test"),
            help="train, validation or test. Default: train; all for dataset.",
        ),
    ] = None,
) -> None:
    """Write the examples of a run as other tools read them: chat messages as JSON lines, or a data set folder.

    Examples:

    - `distill-ray export runs/demo demo.jsonl`

    - `distill-ray export runs/demo my-data --format dataset`
    """
    from distill_ray.pipeline.export import export as run_export

    counts = run_export(_existing(run_dir), out, format, split)
    console.print(", ".join(f"{name} {count:,}" for name, count in counts.items()) + " examples")
    _wrote(str(out))


@app.command()
def ask(
    run_dir: ExistingRun,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
) -> None:
    """Ask the student of a run, on CPU or GPU; the answer streams.

    Example: `distill-ray ask runs/demo "Wo ist der Bahnhof?"`
    """
    with waiting("loading the student"):  # torch, and in `stream_answer` the weights
        from distill_ray.pipeline.ask import stream_answer

    async def answer() -> None:
        async for piece in stream_answer(_existing(run_dir), question, max_tokens, temperature):
            print(piece, end="", flush=True)
        print()

    asyncio.run(answer())


@app.command()
def doctor() -> None:
    """Say what is installed, what hardware is seen, and what is missing with the command that mends it.

    Exit status 1: something is missing.

    Example: `distill-ray doctor`
    """
    from distill_ray.doctor import examine

    findings = examine()
    for finding in findings:
        mark = "[green]ok[/green]     " if finding.ok else "[red]missing[/red]"
        console.print(f"{mark}  {escape(finding.what)}")
        if finding.mend:
            console.print(f"         {escape(finding.mend)}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _folder(config: RunConfig, run_dir: str | None) -> RunFolder:
    from distill_ray.pipeline.folder import RunFolder, in_jobs_copy

    folder = RunFolder(run_dir or f"runs/{config.name}")
    if in_jobs_copy(folder.root):
        raise ConfigError(
            f"--run-dir: {folder.root} is in this Ray job's copy of the working folder, and goes with the job; give a "
            "bucket (s3://...), or a path that all nodes see"
        )
    return folder


def _existing(run_dir: str) -> RunFolder:
    from distill_ray.pipeline.folder import RunFolder

    folder = RunFolder(run_dir)
    if not folder.exists("config.yaml"):
        raise ConfigError(f"{run_dir}: not a run folder (no config.yaml); give the --run-dir of an earlier run")
    return folder


def _facts(run_dir: str) -> Facts:
    from distill_ray.pipeline.reporting.facts import Facts
    from distill_ray.pipeline.run import stored_config

    folder = _existing(run_dir)
    if not folder.exists("manifest.json"):
        raise ConfigError(f"{run_dir}: its manifest.json is gone; run the stage that wrote it again")
    return Facts(folder, stored_config(folder))


def _finish(metrics: dict, root: str) -> None:
    from distill_ray.pipeline.folder import RunFolder
    from distill_ray.pipeline.reporting.result import summary_table

    console.print(summary_table(metrics))
    m = RunFolder(root).manifest()
    if m.get("generation_complete", True) and "rows_in" in m:
        console.print(
            f"rows in {m['rows_in']:,} = with examples {m['rows_with_examples']:,} + rejected {m['rows_rejected']:,}; "
            f"teacher calls {m['teacher_calls']:,}, replayed {m['teacher_calls_replayed']:,}"
        )
        _say_recipe_figures(RunFolder(root))
    else:
        console.print("[yellow]generation was stopped before its end:[/yellow] these are the figures of what there is")
    _wrote(_shown(root), "ask", _shown(root), "...")


def _say_recipe_figures(folder: RunFolder) -> None:
    from distill_ray.pipeline.recipe_figures import figure_lines

    for line in figure_lines(folder.manifest().get("recipe_figures", {})):
        console.print(line, markup=False)


def _say_no_example(rows_in: int, rejects: Mapping[str, int], root: str) -> None:
    """Instead of a next command: there is nothing to train on."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in rejects.items()) or "no row was read"
    look = f"see {root}/rejects/*.parquet (reason, detail, row)" if rejects else "see data.source and --limit"
    if "token_budget" in rejects:
        look += "; raise generate.max_teacher_tokens and run again"
    warning = f"not one example came of {rows_in:,} rows ({reasons}), so there is nothing to train on;"
    console.print(f"[yellow]warning:[/yellow] {escape(warning)} {escape(look)}")


def _shown(root: str) -> str:
    return os.path.relpath(root) if "://" not in root else root


def _same(config: Path, folder: RunFolder, overrides: list[str] | None) -> list[str]:
    """Arguments of the next stage: those of this one."""
    return [str(config), "--run-dir", _shown(folder.root), *_sets(overrides)]


def _sets(overrides: list[str] | None) -> list[str]:
    return [part for override in overrides or [] for part in ("--set", override)]


def _wrote(path: str, *next_arguments: str) -> None:
    console.print(f"wrote: {path}", markup=False, soft_wrap=True)
    if next_arguments:
        _say_next(*next_arguments)


def _say_next(*arguments: str) -> None:
    """The next command as it can be pasted: with the program as it was called. Nothing inside a Ray job."""
    from distill_ray.pipeline.folder import in_jobs_copy

    if in_jobs_copy(os.getcwd()):
        return
    called = sys.argv[0]
    program = ["distill-ray"]
    if os.path.basename(called) != "distill-ray":
        program = [os.path.relpath(sys.executable), "-m", "distill_ray"]
    elif shutil.which("distill-ray") != os.path.abspath(called):
        program = [os.path.relpath(called)]
    console.print(f"next:  {shlex.join([*program, *arguments])}", markup=False, soft_wrap=True)


def _forget(config: RunConfig, store: PairStore) -> None:
    from distill_ray.flywheel.forgetting import forget
    from distill_ray.serving.names import service_folder

    forget(service_folder(config), store)


serve_cli.add_to(app)
flywheel_cli.add_to(app)
forgetting.append(_forget)


def _stop() -> NoReturn:
    errors.print("stopped; the same command goes on")
    sys.exit(INTERRUPTED)


def main() -> None:
    """Entry point: one clear message and an exit status, never a wall of traceback."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it retries for a while; the error that ends it is ours
    if shutil.get_terminal_size().columns > HELP_WIDTH:
        os.environ.setdefault("TERMINAL_WIDTH", str(HELP_WIDTH))  # typer's
    interrupts.install()
    try:
        app()
    except DistillError as error:
        mark = "" if isinstance(error, Interrupted) else "[red]error:[/red] "
        errors.print(mark + escape(str(error)))
        sys.exit(error.exit_code)
    except SystemExit as ended:  # typer makes one of Ctrl-C
        if ended.code == INTERRUPTED and interrupts.is_pressed():
            _stop()
        raise
    except KeyboardInterrupt:
        _stop()
    except Exception as error:
        if interrupts.is_pressed():  # a library that is interrupted while it loads raises something of its own
            _stop()
        first_line = (str(error).splitlines() or [""])[0]
        errors.print(
            f"[red]error:[/red] unexpected {type(error).__name__}: {escape(first_line)}"
            f"\n  This is a bug in distill-ray; {_keep_traceback()}. Finished work is kept."
        )
        sys.exit(1)


def _keep_traceback() -> str:
    """Write that of the error at hand to a file, or say it where none can be written. Returns where it is."""
    path = Path(f"distill-ray-crash-{os.getpid()}.log")
    try:
        path.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        errors.print(traceback.format_exc(), markup=False)
        return "the traceback is above, as no file can be written here"
    return f"the traceback is in {path}"
