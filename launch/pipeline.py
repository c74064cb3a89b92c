"""Runs the stages of a pipeline, each from the weights of the one before:

python -m launch.pipeline megrez_omni model=tiny data=demo
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from launch.command import stage_command
from launch.history import History, Origin, load_history, write_json
from launch.jobs import refuse_live
from launch.process import StageProcess, locked, opened_log
from launch.progress import Progress
from launch.request import Request, read_request
from launch.restarts import Restarts, newest_step, rank_status
from launch.stages import Stage, compose_stages, read_pipeline
from launch.standing import check_stages, parent_weights_digest
from launch.summary import markdown, summarize, table
from train.compose import readable_errors
from train.first_weights import is_random
from train.sinks import format_seconds
from train.stopping import EXIT_STOPPED

POLL_SECONDS = 0.2
SAVE_SECONDS = 5.0
"""How often the time a stage has taken is written down, which a kill then costs at most."""

ENDED_AS_ASKED = (EXIT_STOPPED, 128 + signal.SIGTERM, 128 + signal.SIGKILL)
"""Exit statuses of a stage that ended because it was asked to; a launcher has one of its own."""

SAYS_ASKED = ("asked to stop; saved", "got signal: 15")
"""What ranks and launcher say when they end because they were asked to."""

EXAMPLES = """\
words
  key=value          for train.py, in every stage: model=tiny, data=demo, zero=zero2, data.path=DIR
  STAGE:key=value    for one stage: omni_sft:train.steps=1000
  runs=DIR           folder of the stages' runs (runs/PIPELINE)
  init_from=RUN      what the first stage starts from; without it random weights, where its recipe allows that
  model.weights=DIR, model.parts.PART=DIR     released weights that the first stage starts from
  accelerate=NAME    a file of configs/accelerate, or a path (one: a single process)
  processes=N        processes of this machine, in place of the number in that file
  retries=N          starts in a row that may crash without a new checkpoint before the pipeline ends (2)

example: python -m launch.pipeline megrez_omni model=tiny data=demo runs=runs/demo accelerate=cpu2 zero=zero2
example: python -m launch.pipeline megrez_omni data=mine accelerate=gpus processes=4 --dry-run
example: python -m launch.pipeline megrez_omni runs=runs/demo --table

What is complete is not run again; the same command goes on after whatever stopped it.
"""


@dataclass(slots=True)
class Pipeline:
    """A pipeline at work. `stop_asked` counts the requests to end."""

    request: Request
    stages: list[Stage]
    digests: dict[str, dict[str, str]]
    history: History
    progress: Progress
    stop_asked: int = field(default=0)

    def run(self) -> int:
        """Runs what is not complete, in order; returns the exit status."""
        self._summarize()
        with self._listening():
            for stage in self.stages:
                if stage.folder.is_complete:
                    self.progress.say(f"{self.progress.head(stage)}: already complete.")
                    continue
                code = self._run_stage(stage)
                self._summarize()
                if code:
                    return code
        return 0

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Counts requests to end in place of ending at once."""

        def count(number: int, frame: object) -> None:
            self.stop_asked += 1

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, count) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run_stage(self, stage: Stage) -> int:
        """Runs one stage to its end, again where it crashed; returns 0 when its result is there."""
        restarts = Restarts(self.request.retries)
        while True:
            found = newest_step(stage.folder.checkpoints)
            status, tail = self._run_once(stage)
            if stage.folder.is_complete:  # judged by what it left, should the launcher stumble at its end
                seconds = self.history.seconds[stage.name]
                self.progress.say(f"{self.progress.head(stage)}: complete after {seconds:.0f} s.")
                return 0
            if status == EXIT_STOPPED:
                return self._stopped(stage)
            left = newest_step(stage.folder.checkpoints)
            if not restarts.allow(status, found, left) or self.stop_asked:
                return self._failed(stage, tail, status)
            self._say_again(stage, status, left, restarts)

    def _run_once(self, stage: Stage) -> tuple[int, list[str]]:
        """Starts a stage and waits for its end; returns its exit status and the end of its output."""
        with opened_log(stage.log, self.progress.say, lambda: self.stop_asked > 0) as log:
            if self.stop_asked:
                return EXIT_STOPPED, []
            self._note_start(stage)
            command = stage_command(self.request, stage)
            log.write(f"\n{time.strftime('%F %T')}  {shlex.join(command)}\n".encode())
            log.flush()
            process = StageProcess(command, log)
            code = self._watch(stage, process)
        # A launcher that died may leave ranks behind: they are waited for, and ended.
        with opened_log(stage.log, self.progress.say, lambda: self.stop_asked > 1):
            pass
        status = rank_status(code, process.tail(100))
        if self.stop_asked and ended_as_asked(process, code):
            status = EXIT_STOPPED
        return status, process.tail()

    def _say_again(self, stage: Stage, status: int, step: int, restarts: Restarts) -> None:
        text = (
            f"{self.progress.head(stage)}: crashed with exit status {status}. Starts again from step {step} "
            f"({restarts.wasted} of retries={restarts.allowed} used without a new checkpoint)."
        )
        self.progress.say(text)
        with stage.log.open("a") as log:
            log.write(f"{text}\n")

    def _note_start(self, stage: Stage) -> None:
        goes_on = any(stage.folder.checkpoints.glob("step-*/manifest.json"))
        origin = Origin(self.digests[stage.name], parent_weights_digest(stage))
        self.history.start(stage.name, origin, goes_on=goes_on, afresh=not stage.folder.path.exists())
        begins = "starts from RANDOM WEIGHTS" if is_random(stage.config) else "starts"
        begins = "goes on" if goes_on else begins
        self.progress.say(f"{self.progress.head(stage)}: {begins}. Log: {stage.log}")

    def _watch(self, stage: Stage, process: StageProcess) -> int:
        """Waits for a stage, shows how far it is, passes requests to end on; returns its exit status."""
        clock = saved = time.monotonic()
        passed_on = 0
        while (code := process.poll()) is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            self.history.seconds[stage.name] += now - clock
            clock = now
            if now - saved > SAVE_SECONDS:
                self.history.save()
                saved = now
            if self.stop_asked > passed_on:
                self._pass_on(process, passed_on)
                passed_on = self.stop_asked
            self.progress.show(stage)
        self.history.save()
        return code

    def _pass_on(self, process: StageProcess, passed_on: int) -> None:
        if passed_on:
            self.progress.say("Killed: the next start goes on from the last checkpoint.")
            process.kill()
        else:
            self.progress.say("Asked to end: the stage saves first. Once more kills it.")
            process.ask_to_end()

    def _stopped(self, stage: Stage) -> int:
        self.progress.say(f"{self.progress.head(stage)}: stopped. The same command goes on.")
        return EXIT_STOPPED

    def _failed(self, stage: Stage, output: list[str], code: int) -> int:
        self.progress.say(f"{self.progress.head(stage)}: failed with exit status {code}. The end of its log:")
        tail = "\n".join(f"  {line}" for line in output)
        print(
            f"{tail}\nstages.{stage.name}: failed. Mend what {stage.log} says, then start again.",
            file=sys.stderr,
        )
        return code or 1

    def _summarize(self) -> None:
        names = [stage.name for stage in self.stages]
        runs = self.request.runs
        write_json(runs / "summary.json", summarize(runs, names, self.history.seconds))


def ended_as_asked(process: StageProcess, code: int) -> bool:
    """Returns whether a stage that was asked to end ended because of that, and did not fail on the way."""
    said = "\n".join(process.tail(100))
    return code in ENDED_AS_ASKED or any(text in said for text in SAYS_ASKED)


def show_table(request: Request, form: str) -> None:
    """Prints the table of what is complete, without checking or running anything.

    Raises:
        ValueError: nothing is complete.
    """
    names = [entry.name for entry in read_pipeline(request.pipeline)]
    found = summarize(request.runs, names, load_history(request.runs).seconds)
    if not found["stages"]:
        raise ValueError(f"runs={request.runs}: no stage is complete there. Name the folder of a pipeline.")
    print(
        json.dumps(found, indent=1) if form == "json" else {"table": table, "markdown": markdown}[form](found)
    )


def run_pipeline(request: Request, dry: bool) -> int:
    """Checks all stages, runs those that are not complete, and shows the table; returns the exit status.

    Raises:
        ValueError: before anything runs, with all that is wrong.
    """
    stages = compose_stages(request)
    if dry:
        check_stages(stages, load_history(request.runs), request.world_size)
        for stage in stages:
            note = "  # complete" if stage.folder.is_complete else ""
            print(shlex.join(stage_command(request, stage)) + note)
        return 0
    with locked(request.runs):
        refuse_live([request.runs, *(stage.folder.path for stage in stages)])
        history = load_history(request.runs)
        digests = check_stages(stages, history, request.world_size)
        code = Pipeline(request, stages, digests, history, Progress(stages, history)).run()
    if code == 0:
        show_table(request, "table")
        file = request.runs / "summary.json"
        seconds = format_seconds(json.loads(file.read_text())["seconds"])
        print(f"Complete: {len(stages)} stages in {seconds}. {file} holds these numbers.")
    return code


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.pipeline",
        description="Run the stages of a pipeline in order, each from the weights of the one before.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pipeline", help="a file of recipes/pipelines (megrez_omni), or a path to one")
    parser.add_argument("words", nargs="*", metavar="key=value", help="see below")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the commands")
    form = parser.add_mutually_exclusive_group()
    for name in ("table", "markdown", "json"):
        text = f"only print what is complete, as {name}"
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=text)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a pipeline; returns the exit status."""
    options = build_parser().parse_intermixed_args(arguments)
    try:
        with readable_errors():
            request = read_request(options.pipeline, options.words)
            if options.form:
                show_table(request, options.form)
                return 0
            return run_pipeline(request, options.dry_run)
    except KeyboardInterrupt:  # while a stage runs it is passed on instead
        print("Stopped. The same command goes on.", file=sys.stderr)
        return EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
