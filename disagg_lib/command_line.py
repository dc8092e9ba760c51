"""disagg (or python -m disagg_lib): each command calls the functions that the notebooks call."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from .arguments import (
    Group,
    beside_option,
    completed_runs,
    csv_option,
    experiment_of,
    given_option,
    given_values,
    params_argument,
    params_paths,
    refuse_existing,
    run_argument,
    run_folder,
    trust_option,
    verbose_option,
    write_csv,
)
from .errors import DisaggError
from .experiment.parameters import Experiment, parameter_names
from .files import REPOSITORY


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="disagg_lib", prog_name="disagg")
def main():
    """MLPerf v5.1 Llama-3.1-405B on disaggregated TensorRT-LLM: plan, rehearse, launch, judge.

    \b
    disagg run                                           a rehearsal on this machine
    disagg plan --gpus 72 --write params/my72.yaml       the best topology, as a params file
    disagg check params/my72.yaml params/site.yaml       every rule before the queue
    disagg run params/my72.yaml params/site.yaml         the real run, to its report

    RUN is a run folder, its name in results/, or a part of it that fits one alone.
    """


@main.command(short_help="All notebooks, to the report.")
@params_argument
@given_option
@click.option("--run-dir", default="", help="The run folder to make; default: a new one in results/.")
@click.option("--plan", "with_plan", is_flag=True, help="Run 02_plan, too.")
@click.option("--anyway", is_flag=True, help="Go on although preflight finds errors.")
@beside_option
@verbose_option
def run(params, given, run_dir, with_plan, anyway, beside, verbose):
    """Run all notebooks, headless, with the params files PARAMS. Nothing given at all: params/rehearsal.yaml."""
    from .notebook.run_all import run_chain

    place = str(Path(run_dir).absolute()) if run_dir else ""
    run_chain(
        params_paths(params), given_values(given), place, with_plan, click.echo, verbose, anyway, beside
    )


@main.command(short_help="A written run: submit, follow, report.")
@run_argument
@beside_option
@verbose_option
def launch(run_dir, beside, verbose):
    """Submit RUN or attach to its job, follow it to its end, and analyse it. Default: the active one, else the newest
    that is not submitted."""
    from .notebook.run_all import launch_run

    launch_run(run_folder(run_dir, "launch"), click.echo, verbose, beside)


@main.command(short_help="Every rule before the queue.")
@params_argument
@given_option
def check(params, given):
    """Check PARAMS against every rule before the queue; exit status 1 if an error is found."""
    from .checks import checks_text
    from .cluster.preflight import check_experiment
    from .experiment.topology import topology_arithmetic
    from .notebook.opening import headline

    experiment = experiment_of(params, given)
    files = ", ".join(params) or ("-p alone" if given else "params/rehearsal.yaml, as nothing was given")
    click.echo(f"{headline(experiment)}\n{files}: {topology_arithmetic(experiment)}\n")
    checks = sorted(check_experiment(experiment), key=lambda c: (c.ok, c.level != "error"))
    click.echo(checks_text(checks))
    errors = sum(not c.ok and c.level == "error" for c in checks)
    warnings = sum(not c.ok and c.level == "warning" for c in checks)
    click.echo(f"{len(checks)} rules: {errors} errors, {warnings} warnings")
    sys.exit(1 if errors else 0)


draw_counts = click.IntRange(1, 1000)
draws_option = click.option(
    "--draws", "--seeds", default=8, type=draw_counts, show_default=True, help="Draws of the lengths."
)


@main.command(short_help="Rank topologies for a GPU budget.")
@click.option("--gpus", type=click.IntRange(1, 10_000), help="GPU budget; default: what PARAMS need.")
@params_argument
@given_option
@draws_option
@csv_option
@click.option(
    "--write",
    "write_file",
    type=click.Path(path_type=Path),
    help="Write the first row as a complete params file.",
)
def plan(gpus, params, given, draws, csv_file, write_file):
    """Rank topologies for a GPU budget by the highest target QPS that stays VALID (simulated)."""
    from .notebook.plan_choice import choice_text, write_choice
    from .serving import prediction
    from .serving.plan import plan as plan_topologies

    experiment = experiment_of(params, given)
    if write_file:
        refuse_existing("--write", write_file)
    ranked = plan_topologies(prediction.budget_of(experiment, gpus, draws))
    write_csv(prediction.plan_table(ranked), csv_file)
    click.echo(
        "source: simulated; queries/s, the highest that stay VALID, median [range] over draws of the lengths"
    )
    click.echo(prediction.ranking(ranked).to_string())
    click.echo(f"\n{prediction.plan_notes(experiment, ranked)}\n\n{choice_text(experiment, ranked[0])}")
    if write_file:
        click.echo(f"written: {write_choice(experiment, ranked[0], write_file)}")


@main.command(short_help="Predict one topology's verdict.")
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

    experiment = experiment_of(params, given)
    if highest:
        table = prediction.highest_qps_table(experiment, draws)
        text = f"highest VALID queries/s, median [range] of {draws} draws; source: simulated\n{table.to_string(index=False)}"
    else:
        table = prediction.simulate_table(experiment, draws, other_seeds)
        text = prediction.format_simulation(table)
    write_csv(table, csv_file)
    click.echo(text)


@main.command(short_help="Fit a stack on measured runs.")
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

    if not (runs or logs or published):
        runs = calibration_runs.runs_of_ledger(RESULTS / "ledger.csv")
    folders = [run_folder(name) for name in runs]
    click.echo(calibration_runs.calibrate_runs(folders, logs, published, base, Path(out)))


@main.command(short_help="Token lengths of MLPerf's pickle.")
@click.argument("dataset", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="The CSV to write: input_tokens,output_tokens.")
@click.option(
    "--answers", type=click.Path(), help="mlperf_log_accuracy.json of a whole accuracy run, for the outputs."
)
@click.option("--sha256", help="The pickle's checksum, if you know it.")
@trust_option
def lengths(dataset, out, answers, sha256, trust_dataset):
    """Token lengths of MLPerf's pickle DATASET in sample order, for lengths_file; nothing of its texts leaves it."""
    from .serving.lengths import write_lengths_csv
    from .serving.pickle_lengths import read_pickle_lengths

    refuse_existing("--out", out)
    found = read_pickle_lengths(Path(dataset), sha256, trust_dataset, Path(answers) if answers else None)
    write_lengths_csv(found, Path(out))
    words = "published ones of 485 samples, the built-in shape for the others"
    if answers:
        words = "of the accuracy log"
    mean = found["input_tokens"].mean()
    click.echo(f"{out}: {len(found)} samples, prompts {mean:.0f} tokens on average; outputs: {words}")


@main.command(short_help="Runs as a table.")
@click.argument("folders", nargs=-1, metavar="[RUN]...", shell_complete=completed_runs)
@csv_option
@click.option("--wide", is_flag=True, help="All figures, a column or a row a run.")
@click.option("--json", "as_json", is_flag=True, help="All columns, for machines.")
@click.option("--line", "as_line", is_flag=True, help="One line a run, to paste.")
@click.option("--published", is_flag=True, help="With the published runs of this model.")
@click.option(
    "--scenario", type=click.Choice(["Interactive", "Server", "Offline"]), help="Of the published runs."
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
@click.option(
    "--recompute", is_flag=True, help="Rebuild tables and figures from the raw logs and compare digests."
)
def results(
    folders, csv_file, wide, as_json, as_line, published, scenario, recompute, source, round_, division
):
    """Print one row for each RUN: a run folder, its name in results/, a folder of runs, or LoadGen's logs. Default: all."""
    import pandas as pd

    from .results.listing import json_rows, list_runs
    from .results.published import best_share, published_table
    from .results.rows import format_table, runs_table

    runs, asides = _result_folders(folders)
    table = runs_table(runs, source, round=round_, division=division)
    if published:
        table = pd.concat([table, published_table(scenario)], ignore_index=True)
    write_csv(table, csv_file)
    readable = table[(table["loadgen_scenario"] != "") | (table["source"] == "published")]
    if as_line:
        from .notebook.outcome import outcome_line

        ours = readable.loc[readable["source"] != "published", "folder"]
        text = "\n".join(outcome_line(Path(folder)) for folder in ours)
    else:
        text = (json_rows if as_json else format_table if wide else list_runs)(readable)
        if not as_json and (line := best_share(readable)):
            click.echo(line)
    click.echo(text)
    told = [(row.folder, row.error) for row in table.itertuples() if isinstance(row.error, str) and row.error]
    errors = [error if error.startswith(folder) else f"{folder}: {error}" for folder, error in told]
    for line in [*asides, *errors]:
        click.echo(line, err=True)
    differs = recompute and not _recomputed(runs)
    sys.exit(1 if errors or differs else 0)


def _result_folders(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The folders that are meant, and a line for each that has no result to show."""
    from .cluster.runs import measured, run_label
    from .run.folder import RESULTS, find_run, newest_runs

    if not names:
        runs = newest_runs()
        return [run for run in runs if measured(run)], [run_label(run) for run in runs if not measured(run)]
    folders, asides = [], []
    for name in names:
        path = Path(name)
        if path.is_file():
            asides.append(f"{name}: a file, no run")
        elif inside := newest_runs(path) or (
            newest_runs(RESULTS) if name == "results" and not path.exists() else []
        ):
            folders += inside
        else:
            try:
                folders.append(path if path.exists() else find_run(name))
            except DisaggError:
                folders.append(path)  # LoadGen's reader says what is wrong with it
    return folders, asides


def _recomputed(runs: Sequence[Path]) -> bool:
    """Whether every run's tables and figures are what its raw logs give; says so, a line a file."""
    from .sharing.recompute import recompute

    same = True
    for folder in runs:
        try:
            compared = recompute(folder)
        except DisaggError as error:
            click.echo(f"\nnot rebuilt: {error}")
            same = False
            continue
        counts = compared["word"].value_counts()
        rest = "".join(f", {n} {word}" for word, n in counts.items() if word != "same")
        click.echo(
            f"\n{folder}: {counts.get('same', 0)} of {len(compared)} files are what the raw logs give{rest}"
        )
        click.echo(compared[["word", "file"]].to_string(index=False))
        same = same and "differs" not in counts
    return same


@main.command(short_help="Score an accuracy run.")
@run_argument
@click.option(
    "--dataset", "dataset", type=click.Path(), help="The data set's pickle; default: the run's dataset_path."
)
@click.option(
    "--tokenizer", type=click.Path(), help="Folder with tokenizer.json; default: the run's model folder."
)
@trust_option
def evaluate(run_dir, dataset, tokenizer, trust_dataset):
    """Score a run's accuracy log as the reference evaluation does, and write accuracy.txt."""
    from .experiment.loading import load_recorded
    from .results.accuracy import evaluate

    folder = run_folder(run_dir)
    e = load_recorded(folder)
    chosen = dataset or e.dataset_path

    def progress(done, total):
        click.echo(f"\r{done}/{total} answers scored", nl=done == total, err=True)

    inputs = (Path(chosen), Path(tokenizer or e.model_path)) if chosen else (None, None)
    result = evaluate(folder, *inputs, trust=trust_dataset or e.trust_dataset, progress=progress)
    for name, value in result.items():
        click.echo(f"{name}: {value}")


@main.command(short_help="Share a run: pages, crate, submission, another launcher's file.")
@run_argument
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
@click.option(
    "--as",
    "launcher",
    type=click.Choice(["sflow", "srt-slurm"]),
    help="The run's servers for sites that launch with these; not redacted, written to RUN/launchers/.",
)
def export(run_dir, html, crate, submission, system, launcher):
    """Share a run: as pages, as a crate, as a submission, or its servers as the file of another launcher."""
    from .sharing.crate import export_crate
    from .sharing.launchers import export_launcher
    from .sharing.pages import export_html
    from .sharing.submission import export_submission

    folder = run_folder(run_dir)
    if not (html or crate or submission or launcher):
        raise click.UsageError(
            "say what to export: --html DEST, --crate DEST, --submission DEST or --as LAUNCHER"
        )
    if html:
        click.echo(export_html(folder, html).text())
    if crate:
        click.echo(export_crate(folder, crate).text())
    if submission:
        click.echo(export_submission(folder, submission, REPOSITORY / system).text())
    if launcher:
        click.echo(f"Wrote {export_launcher(folder, launcher)}")


@main.command(short_help="Follow a job to its end.")
@run_argument
def attach(run_dir):
    """Follow the job of RUN (default: the active one) to its end."""
    from .cluster.follow import watch
    from .notebook.run_all import how_to_go_on

    folder = run_folder(run_dir, "follow")
    try:
        watch(folder, out=click.echo)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(folder, "attach")) from None


@main.command(short_help="End a job.")
@run_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def cancel(run_dir, yes):
    """End the job of RUN (default: the active one); its servers are ended, too."""
    from .cluster import launch
    from .cluster.runs import run_label

    folder = run_folder(run_dir, "follow")
    click.echo(run_label(folder))
    if not (run_dir or yes) and sys.stdin.isatty():
        click.confirm("End this job?", abort=True)
    state = launch.cancel(folder)
    click.echo(f"{state.run_dir.name}: {state.phase or state.state}")


@main.command(short_help="Every parameter and its meaning.")
def parameters():
    """List every parameter with its default and meaning."""
    from .notebook.parameters import GROUPS

    for name in parameter_names():
        if name in GROUPS:
            click.echo(f"# -- {GROUPS[name]}")
        field = Experiment.model_fields[name]
        click.echo(f"{name}: {field.default}  # {field.description}")
