"""python -m disagg_lib: each command calls the functions that the notebooks call."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from .errors import DisaggError, ParameterError
from .experiment.loading import DEFAULT_PARAMS_FILES, load_experiment, refuse_unknown
from .experiment.parameters import Experiment, parameter_names
from .files import REPOSITORY, expand


class _Group(click.Group):
    """Our own errors end a command with their message and status 1, not with a traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except DisaggError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            context.exit(1)


def _given(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """-p NAME VALUE: the value is read as YAML reads it, so 4 is a number and [performance] a list."""
    values = {}
    for name, text in pairs:
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[name] = text
        if isinstance(values[name], dict):
            values[name] = text
    refuse_unknown(values, parameter_names(), "-p")
    return values


def _files(names: Sequence[str]) -> list[str]:
    """The params files of a command line: looked for from the repository's root, then from here."""
    here = [expand(name).absolute() for name in names]
    found = [
        str(path) if path.exists() and not (REPOSITORY / name).exists() else name
        for path, name in zip(here, names, strict=True)
    ]
    return found or list(DEFAULT_PARAMS_FILES)


def _write_csv(table, path: str | None) -> None:
    if path:
        if Path(path).exists():
            raise ParameterError(
                f"--csv: {path} is there already, and nothing is overwritten. Choose another name"
            )
        try:
            table.to_csv(path, index=False)
        except OSError as error:
            raise ParameterError(f"--csv: {path}: cannot be written ({error.strerror or error})") from None


def _run_folder(run_dir: str) -> Path:
    from .run.folder import find_run

    return find_run(str(Path(run_dir).absolute()) if run_dir and Path(run_dir).exists() else run_dir)


params_argument = click.argument("params", nargs=-1, type=click.Path())
given_option = click.option(
    "-p", "given", nargs=2, multiple=True, metavar="NAME VALUE", help="One parameter; repeatable."
)
csv_option = click.option("--csv", "csv_file", type=click.Path(), help="Write the rows here, too.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main():
    """MLPerf v5.1 Llama-3.1-405B on disaggregated TensorRT-LLM: plan, rehearse, launch, judge."""


@main.command()
@params_argument
@given_option
@click.option("--run-dir", default="", help="The run folder to make; default: a new one in results/.")
@click.option("--plan", "with_plan", is_flag=True, help="Run 02_plan, too.")
def run(params, given, run_dir, with_plan):
    """Run all notebooks, headless, with the params files PARAMS (default: params/rehearsal.yaml)."""
    from .notebook.run_all import run_chain

    run_chain(
        _files(params),
        _given(given),
        str(Path(run_dir).absolute()) if run_dir else "",
        with_plan,
        out=click.echo,
    )


@main.command()
@params_argument
@given_option
def check(params, given):
    """Check PARAMS against every rule before the queue; exit status 1 if an error is found."""
    from .checks import checks_text
    from .cluster.preflight import check_experiment

    checks = check_experiment(load_experiment(_files(params), _given(given)))
    click.echo(checks_text(checks))
    errors = sum(not c.ok and c.level == "error" for c in checks)
    warnings = sum(not c.ok and c.level == "warning" for c in checks)
    click.echo(f"{len(checks)} rules: {errors} errors, {warnings} warnings")
    sys.exit(1 if errors else 0)


draws_option = click.option(
    "--draws",
    "--seeds",
    default=8,
    type=click.IntRange(1, 1000),
    show_default=True,
    help="Draws of the lengths.",
)


@main.command()
@click.option("--gpus", type=click.IntRange(1, 10_000), help="GPU budget; default: what PARAMS need.")
@params_argument
@given_option
@draws_option
@csv_option
def plan(gpus, params, given, draws, csv_file):
    """Rank topologies for a GPU budget by the highest target QPS that stays VALID (simulated)."""
    from .serving import prediction
    from .serving.plan import plan as plan_topologies

    experiment = load_experiment(_files(params), _given(given))
    ranked = plan_topologies(prediction.budget_of(experiment, gpus, draws))
    _write_csv(prediction.plan_table(ranked), csv_file)
    click.echo(
        "source: simulated; queries/s, the highest that stay VALID, median [range] over draws of the lengths"
    )
    click.echo(prediction.ranking(ranked).to_string())
    click.echo("\n" + prediction.plan_notes(experiment, ranked))


@main.command()
@params_argument
@given_option
@draws_option
@click.option("--highest", is_flag=True, help="Search the highest target QPS that stays VALID instead.")
@click.option(
    "--other-seeds", is_flag=True, help="Random loads in place of the round's: how lucky are its seeds?"
)
@csv_option
def simulate(params, given, draws, highest, other_seeds, csv_file):
    """Predict TTFT, TPOT and the verdict of PARAMS at server_target_qps, for three spreads of prompt length."""
    from .serving import prediction

    experiment = load_experiment(_files(params), _given(given))
    if highest:
        table = prediction.highest_qps_table(experiment, draws)
        text = f"highest VALID queries/s, median [range] of {draws} draws; source: simulated\n{table.to_string(index=False)}"
    else:
        table = prediction.simulate_table(experiment, draws, other_seeds)
        text = prediction.format_simulation(table)
    _write_csv(table, csv_file)
    click.echo(text)


@main.command()
@click.argument("runs", nargs=-1, type=click.Path())
@click.option(
    "--log",
    "logs",
    nargs=2,
    multiple=True,
    metavar="FOLDER PARAMS",
    help="A LoadGen log and its params file.",
)
@click.option(
    "--published",
    nargs=2,
    multiple=True,
    metavar="NAME PARAMS",
    help="A published row: part of its log_path, or FILE.csv:PART.",
)
@click.option("--base", default="", help="Stack to begin from; default: that of the first run's parameters.")
@click.option("--out", required=True, type=click.Path(), help="The stack file to write.")
def calibrate(runs, logs, published, base, out):
    """Solve a stack's constants on measured RUNS (default: those of results/ledger.csv), logs and published rows."""
    from .run.folder import RESULTS
    from .serving import calibration_runs

    runs = (
        list(runs) if runs or logs or published else calibration_runs.runs_of_ledger(RESULTS / "ledger.csv")
    )
    folders = [_run_folder(name) for name in runs]
    click.echo(calibration_runs.calibrate_runs(folders, logs, published, base, Path(out)))


@main.command()
@click.argument("dataset", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="The CSV to write: input_tokens,output_tokens.")
@click.option(
    "--answers", type=click.Path(), help="mlperf_log_accuracy.json of a whole accuracy run, for the outputs."
)
@click.option("--sha256", help="The pickle's checksum, if you know it.")
@click.option(
    "--trust-dataset", is_flag=True, help="Open a pickle of unknown checksum (a pickle can run code)."
)
def lengths(dataset, out, answers, sha256, trust_dataset):
    """Token lengths of MLPerf's pickle DATASET in sample order, for lengths_file; nothing of its texts leaves it."""
    from .serving.lengths import write_lengths_csv
    from .serving.pickle_lengths import read_pickle_lengths

    if Path(out).exists():
        raise ParameterError(
            f"--out: {out} is there already, and nothing is overwritten. Choose another name"
        )
    found = read_pickle_lengths(Path(dataset), sha256, trust_dataset, Path(answers) if answers else None)
    write_lengths_csv(found, Path(out))
    words = (
        "of the accuracy log"
        if answers
        else "published ones of 485 samples, the built-in shape for the others"
    )
    click.echo(
        f"{out}: {len(found)} samples, prompts {found['input_tokens'].mean():.0f} tokens on average; outputs: {words}"
    )


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path())
@csv_option
@click.option(
    "--recompute",
    is_flag=True,
    help="Rebuild each run's tables and figures from its raw logs and compare digests.",
)
@click.option(
    "--source",
    type=click.Choice(["measured", "published"]),
    help="Assert it where nobody states it; the row says so.",
)
@click.option(
    "--round", "round_", metavar="vN.M", help="The round to judge by; default: what the run claims."
)
@click.option("--division", type=click.Choice(["closed", "open"]), help="The division to judge by.")
def results(folders, csv_file, recompute, source, round_, division):
    """Print one row for each run folder (its path, or its name in results/) or LoadGen log folder."""
    from .results.rows import format_table, runs_table
    from .run.folder import RESULTS

    folders = [
        name if Path(name).exists() or not (RESULTS / name).is_dir() else RESULTS / name for name in folders
    ]
    table = runs_table(folders, source, round=round_, division=division)
    _write_csv(table, csv_file)
    click.echo(format_table(table))
    wrong = bool((table["error"].fillna("") != "").any())
    if recompute:
        from .sharing.recompute import recompute as rebuild

        for folder in folders:
            try:
                compared = rebuild(folder)
            except DisaggError as error:
                click.echo(f"\nnot rebuilt: {error}")
                wrong = True
                continue
            counts = compared["word"].value_counts()
            rest = "".join(f", {n} {word}" for word, n in counts.items() if word != "same")
            same = f"{counts.get('same', 0)} of {len(compared)} files are what the raw logs give"
            click.echo(f"\n{folder}: {same}{rest}")
            click.echo(compared[["word", "file"]].to_string(index=False))
            wrong = wrong or "differs" in counts
    sys.exit(1 if wrong else 0)


@main.command()
@click.argument("run_dir")
@click.option(
    "--dataset", "dataset", type=click.Path(), help="The data set's pickle; default: the run's dataset_path."
)
@click.option(
    "--tokenizer", type=click.Path(), help="Folder with tokenizer.json; default: the run's model folder."
)
@click.option(
    "--trust-dataset", is_flag=True, help="Open a pickle of unknown checksum (a pickle can run code)."
)
def evaluate(run_dir, dataset, tokenizer, trust_dataset):
    """Score a run's accuracy log as the reference evaluation does, and write accuracy.txt."""
    from .experiment.loading import load_recorded
    from .results.accuracy import evaluate

    folder = _run_folder(run_dir)
    e = load_recorded(folder)
    chosen = dataset or e.dataset_path
    result = evaluate(
        folder,
        Path(chosen) if chosen else None,
        Path(tokenizer or e.model_path) if chosen else None,
        trust=trust_dataset or e.trust_dataset,
        progress=lambda done, total: click.echo(
            f"\r{done}/{total} answers scored", nl=done == total, err=True
        ),
    )
    for name, value in result.items():
        click.echo(f"{name}: {value}")


@main.command()
@click.argument("run_dir")
@click.option(
    "--html", type=click.Path(), metavar="DEST", help="Self-contained pages and an index, redacted."
)
@click.option("--crate", type=click.Path(), metavar="DEST", help="An RO-Crate 1.1 (Workflow Run), redacted.")
@click.option(
    "--submission",
    type=click.Path(),
    metavar="DEST",
    help="The MLPerf submission tree of a measured run, new or one that another scenario goes into.",
)
@click.option(
    "--system",
    default="params/system.yaml",
    show_default=True,
    help="The system description, for --submission.",
)
def export(run_dir, html, crate, submission, system):
    """Share a run: as pages, as a crate, or as a submission."""
    from .sharing.crate import export_crate
    from .sharing.pages import export_html
    from .sharing.submission import export_submission

    folder = _run_folder(run_dir)
    if not (html or crate or submission):
        raise click.UsageError("say what to export: --html DEST, --crate DEST or --submission DEST")
    if html:
        click.echo(export_html(folder, html).text())
    if crate:
        click.echo(export_crate(folder, crate).text())
    if submission:
        click.echo(export_submission(folder, submission, REPOSITORY / system).text())


@main.command()
@click.argument("run_dir", default="")
def attach(run_dir):
    """Follow the job of a run folder (default: the newest) to its end."""
    from .cluster.follow import watch

    watch(_run_folder(run_dir), out=click.echo)


@main.command()
@click.argument("run_dir", default="")
def cancel(run_dir):
    """End the job of a run folder (default: the newest); its servers are ended, too."""
    from .cluster import launch

    state = launch.cancel(_run_folder(run_dir))
    click.echo(f"{state.run_dir.name}: {state.phase or state.state}")


@main.command()
def parameters():
    """List every parameter with its default and meaning."""
    for name in parameter_names():
        field = Experiment.model_fields[name]
        click.echo(f"{name}: {field.default}  # {field.description}")
