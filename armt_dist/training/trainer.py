"""The training run: steps, stages, validations, checkpoints, rollbacks and resumption."""

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil
import torch

from ..checkpoint.folder import CheckpointError, clean, find_newest, find_tag, prune, tag_of
from ..checkpoint.load import load_checkpoint
from ..checkpoint.save import Saver
from ..config import ConfigError, one_line
from ..data.task import merged_state
from ..distributed.collectives import gather_json, together, together_slowly
from ..distributed.launchers import Ranks
from ..distributed.process import keep_freed_memory
from ..evaluation.run_report import write_run_report
from ..monitoring import profile
from ..monitoring.lease import Lease
from ..monitoring.run_log import RunLog
from ..monitoring.step_metrics import StepMetrics
from ..monitoring.watchdog import Watchdog, end_when_alone, remove_heartbeats, report
from ..records import check_links
from ..schedule.grid import pipeline_warning
from ..zero3.engine import start_engine
from ..zero3.trained_parameters import parameter_groups
from .carried_states import carrying_of
from .curriculum import Stage
from .free_memory import FreeMemory
from .global_batch import RowLayout
from .out_of_memory import Need, describe, is_out_of_memory
from .progress import Progress, stage_over
from .run_config import RunConfig, resolved
from .run_folder import describe_run, record_changes
from .setup import Setup, build_runner, set_up
from .train_step import StepParts, StepResult, train_step, validate

# Exit code of a run that gave up: too many skipped steps or rollbacks.
GAVE_UP = 1
# Exit code of a run that saved after a stop signal and should be started again (EX_TEMPFAIL).
REQUEUE = 75
# ZeRO-3 learns the order of gathers in the first two steps of a process.
PROFILED_STEP = 3
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Trainer:
    """One run on one rank. `run` trains it; all other methods are collective unless they say otherwise."""

    def __init__(
        self, config: RunConfig, ds_config: dict, out: Path, ranks: Ranks, device: torch.device, lease: Lease
    ) -> None:
        # Before anything is written.
        together(lambda: check_links(out), only=0)
        self.config, self.ds_config, self.out, self.ranks, self.device = config, ds_config, out, ranks, device
        self.root = out / "checkpoints"
        self.watchdog = Watchdog(config.watchdog, out, ranks.rank)
        self.log = RunLog(out, ranks.rank, config.train.log_every)
        self.say = self.log.say
        self.lease = lease
        together(lambda: lease.take(self.say), only=0)
        # An error of one rank alone, such as a missing file, must end all ranks before they wait for each other.
        setup = together_slowly(self.set_up, lambda: self.watchdog.enter("setup"))
        self.task, self.armt, self.resuming = setup.batches.task, setup.batches.armt, setup.resuming
        self.stages = setup.stages
        warning = pipeline_warning(setup.batches.grid)
        if warning:
            self.say(f"warning: {warning}")
        for line in (*setup.notes(), f"optimizer: {setup.prepared.optimizer}"):
            self.say(line)
        ds = setup.prepared.ds_config
        with end_when_alone(lambda: None, self.watchdog.dump):
            self.runner = build_runner(config, setup)
            groups = parameter_groups(self.runner.model, config.train.optimizer_groups, ds["optimizer"]["params"])
            self.engine = start_engine(self.runner, ds, setup.batches.grid, device, groups, setup.prefetch.window)
        self.watchdog.at = self.runner.at
        self.metrics = StepMetrics(self.runner, config.watchdog.straggler_factor, device)
        self.carrying = carrying_of(config, setup.batches, self.runner.model)
        batches, lr = setup.batches, setup.prepared.lr
        auto = self.runner.keep.auto
        free = FreeMemory(self.runner, batches.device, ranks.local_world_size) if auto else None
        self.parts = StepParts(config.train, batches, self.engine, self.metrics, lr, self.carrying, free)
        self.saver = Saver(self.engine, self.root, config.train.save_in_background, self.say)
        self.progress = Progress()
        # `StepResult.carried` of the last step; None at the start of a stage.
        self.carried: torch.Tensor | None = None
        self.rollbacks: Counter[str] = Counter()
        self.told_to_stop = False
        # Dropout differs between ranks, but not between runs.
        torch.manual_seed(config.train.seed * 100003 + ranks.rank)

    def set_up(self, get_on: Callable[[], None]) -> Setup:
        """Check the configuration and open the data, and call `get_on` while texts are tokenised. Not collective."""

        def progress(line: str) -> None:
            get_on()
            self.log.say_sometimes(line)

        return set_up(self.config, self.ds_config, self.out, self.ranks, self.device, progress)

    def run(self, resume: str) -> int:
        """Train to the end of the curriculum. Returns the exit code: 0, GAVE_UP, or REQUEUE after a stop signal.

        resume: `auto` (from the newest checkpoint, if any), `never`, or a tag. Raises ConfigError.
        """
        try:
            with end_when_alone(self.runner.at, self.watchdog.dump, self.runner.link.neighbours):
                return self.train(resume)
        except ConfigError:
            # Restore the default handlers so that the launcher's SIGTERM ends this process.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            raise
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self.end_out_of_memory(error)
            raise
        finally:
            self.watchdog.close()

    def train(self, resume: str) -> int:
        """Make steps, with validations and checkpoints in between. Returns the exit code."""
        config = self.config.train
        total = self.begin(resume)
        steps_here = 0
        while self.progress.step < total or self.progress.validation_due:
            stage = self.stages[self.progress.stage]
            if self.progress.validation_due:
                total = self.validate(stage, total)
                continue
            if stage_over(stage, self.progress, config.patience):
                self.enter_next_stage()
                continue
            result = self.step(stage)
            steps_here += 1
            if self.progress.skipped_in_a_row >= config.max_skipped:
                skipped = f"skipped {config.max_skipped} consecutive optimizer steps"
                return self.give_up(f"{skipped} (non-finite loss or gradients)")
            if result.spiked and self.saver.saved is not None:
                if not self.roll_back(self.saver.saved):
                    return self.give_up(f"rolled back {config.max_skipped} times without reaching the next checkpoint")
                continue
            if self.config.profile and steps_here == PROFILED_STEP:
                self.write_profile()
            over = stage_over(stage, self.progress, config.patience)
            if over or self.progress.step % config.validate_every == 0:
                self.progress = self.progress._replace(validation_due=True)
                # There may be no time for it before the job ends: the resumed run validates first.
                if not result.stop:
                    total = self.validate(stage, total)
            self.attempt(self.saver.poll)
            done = self.progress.step >= total
            if result.stop or over or done or self.progress.step % config.save_every == 0:
                self.save(final=done)
            if result.stop:
                return self.stop()
        return self.finish()

    # --- beginning and end -------------------------------------------------------------------------------------------

    def begin(self, resume: str) -> int:
        """Restore the newest checkpoint, if any, and open the run folder. Returns the total number of steps."""
        self.restore(resume)
        if self.parts.batches.device.type == "cpu":
            keep_freed_memory()
        together(self.describe, only=0)
        total = min(self.progress.step + self.steps_left(), self.config.train.max_steps or 10**12)
        shown = resolved(self.config.model_copy(update={"ds_config": self.ds_config}))
        together(lambda: self.log.start(self.progress.step, total, self.config.train.trackers, shown))
        for number in STOP_SIGNALS:
            signal.signal(number, self.on_stop_signal)
        if self.config.digests:
            together(lambda: self.metrics.write_digests(self.out))
        return total

    def restore(self, resume: str) -> None:
        """Load the checkpoint that `resume` asks for. Raises CheckpointError and ConfigError."""
        if resume == "never":
            if self.resuming:
                raise ConfigError(f"resume=never: {self.out} already holds a run; give another --out")
            return
        auto = resume == "auto"
        tag = find_newest(self.root, self.say) if auto else together(lambda: find_tag(self.root, resume))
        together(lambda: clean(self.root), only=0)
        if tag is not None:
            state = load_checkpoint(self.engine, self.root, tag, self.log.say_sometimes, verified=auto)
            self.restore_state(tag, state)
            self.saver.saved = tag
            self.say(f"resumed {self.root / tag} at step {self.progress.step}")

    def restore_state(self, tag: str, state: dict) -> None:
        """Restore what `save` passed with the tensors. Raises CheckpointError if it does not fit this run."""
        try:
            self.progress = Progress.restored(state.get("progress", {}))
            if tag_of(self.progress.step) != tag or self.progress.stage >= len(self.stages):
                raise ValueError(f"its progress is step {self.progress.step} of stage {self.progress.stage}")
            self.task.load_state_dict(state["task"])
            self.carried = self.restore_carried(tag, state.get("carried", {}))
        except CheckpointError:
            raise
        # A state of another version, or of a stranger, raises many exceptions.
        except Exception as error:
            raise CheckpointError(
                f"checkpoint={self.root / tag}: its state does not fit this run ({one_line(error, 300)}); use another "
                "checkpoint"
            ) from None

    def restore_carried(self, tag: str, layout: dict) -> torch.Tensor | None:
        """Return what the next step starts from, which a run of the row layout `layout` saved; {}: nothing."""
        carrying = self.carrying
        if carrying is None or not layout:
            return None
        return together(lambda: carrying.restored(self.root / tag, RowLayout(**layout)))

    def describe(self) -> None:
        """Write the run folder. Rank 0 only."""
        complete = self.config.model_copy(update={"ds_config": self.ds_config})
        changed = record_changes(self.out, complete, self.progress.step, self.ranks.world_size)
        if changed:
            self.say(f"changed from here on: {changed}")
        describe_run(self.out, self.config, self.ds_config, self.armt, self.task)
        self.root.mkdir(exist_ok=True)
        remove_heartbeats(self.out, self.ranks.world_size)

    def on_stop_signal(self, *_: object) -> None:
        """Remember the signal until the end of the step. Not collective."""
        self.told_to_stop = True

    def stop(self) -> int:
        """Finish saving after a stop signal. Returns the exit code."""
        self.attempt(self.saver.wait)
        newest = self.saver.saved or "no checkpoint"
        self.say(f"stopped by a signal after step {self.progress.step}; the same command resumes from {newest}")
        self.log.finish(REQUEUE)
        return REQUEUE

    def give_up(self, why: str) -> int:
        """Print one line with the last good checkpoint. Returns the exit code. Not collective."""
        good = self.root / self.saver.saved if self.saver.saved else "none was written"
        self.log.complain(f"error: {why}, at step {self.progress.step}; last good checkpoint: {good}")
        self.log.finish(GAVE_UP)
        return GAVE_UP

    def finish(self) -> int:
        """Close the log and write the report. Returns the exit code."""
        self.say(f"done: {self.progress.step} steps, {self.progress.seconds:.0f} s of training, {self.out}")
        self.log.finish()
        if self.ranks.rank == 0:
            self.say(f"report: {write_run_report(self.out)}")
        return 0

    def end_out_of_memory(self, error: Exception) -> NoReturn:
        """End this process with one line, without clean-up: the other ranks wait for it. Not collective."""
        device, ranks = self.parts.batches.device, self.ranks
        if device.type == "cuda":
            free, capacity = torch.cuda.mem_get_info(device)
            need = Need(capacity - free, capacity)
        else:
            memory = psutil.virtual_memory()
            need = Need(psutil.Process().memory_info().rss, memory.total // ranks.local_world_size)
        said = describe(error, self.config, self.ds_config, ranks.world_size, self.runner.at(), need, device.type)
        report(f"error: rank {ranks.rank}: {said}\n")
        os._exit(GAVE_UP)

    # --- steps and stages --------------------------------------------------------------------------------------------

    def step(self, stage: Stage) -> StepResult:
        """Make or skip one step, and log it."""
        self.watchdog.enter("step", self.progress.step)
        told_to_stop = self.told_to_stop or self.lease.lost
        result = train_step(self.parts, stage, self.progress, told_to_stop, self.carried)
        self.progress, self.carried = result.progress, result.carried
        report = self.progress.step % self.config.train.log_every == 0
        self.log.step(self.progress.step, result.metrics, self.metrics.stragglers.report() if report else None)
        if result.bad_rows:
            self.log.skipped(self.progress.step, self.progress.batch - 1, result.bad_rows)
        return result

    def steps_left(self) -> int:
        """Return the steps of the current and later stages if none ends early. Not collective."""
        stages = self.stages[self.progress.stage :]
        if stage_over(stages[0], self.progress, self.config.train.patience):
            return sum(stage.total_steps for stage in stages[1:])
        return sum(stage.total_steps for stage in stages) - self.progress.stage_step

    def enter_next_stage(self) -> None:
        """Begin the next stage, from this one's best checkpoint if the stage says so."""
        following, best = self.progress.next_stage(), self.progress.best_tag
        from_best = self.stages[following.stage].start == "best"
        self.attempt(self.saver.wait)
        if from_best and best and not (self.root / best).is_dir():
            self.say(f"warning: {best} was not saved; stage {following.stage} starts from the last step instead")
        elif from_best and best and best != tag_of(following.step):
            load_checkpoint(self.engine, self.root, best, self.log.say_sometimes)
            self.say(f"stage {following.stage} starts from {best}")
        self.progress, self.carried = following, None
        self.log.enter_stage()
        # Its samples may have another length: what is cached for the old one fits none of its tensors.
        torch.cuda.empty_cache()

    def validate(self, stage: Stage, total: int) -> int:
        """Validate, and return the total number of steps, of the run's `total`: the stage may end here."""
        self.watchdog.enter("validation", self.progress.step)
        found = validate(self.parts, stage)
        self.progress = self.progress._replace(validation_due=False)
        if found:
            self.record(found)
        total = min(total, self.progress.step + self.steps_left())
        self.log.expect(total)
        return total

    def record(self, found: dict[str, float]) -> None:
        """Log a validation; save a checkpoint if it is the stage's best."""
        self.log.validation(self.progress.step, found)
        name = self.config.train.best or ("accuracy" if self.parts.counts else "loss")
        score = -found[name] if name == "loss" else found[name]
        before = self.progress.best_tag
        self.progress = self.progress.after_validation(score, tag_of(self.progress.step))
        if self.progress.best_tag != before:
            self.save(best=True)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, best: bool = False, final: bool = False) -> None:
        """Save a checkpoint of this step, unless there is one; best: point `best` to it.

        If it cannot be written, for example on a full disk, the run continues with a warning. At the end of the run
        (`final`) CheckpointError is raised instead. Raises ConfigError if another process trains into the folder now.
        """
        tag = tag_of(self.progress.step)
        self.watchdog.enter("checkpoint", self.progress.step)
        together(self.lease.check, only=0)
        task = merged_state(self.task, gather_json(self.task.state_dict()))
        state = {"progress": self.progress._asdict(), "task": task, "carried": {}}
        tensors = {}
        if self.carrying and self.carried is not None:
            state["carried"] = self.carrying.layout._asdict()
            tensors = self.carrying.saved(self.carried)
        self.attempt(lambda: self.saver.save(tag, state, best, tensors), final)
        if final:
            self.attempt(self.saver.wait, final)
        if self.ranks.rank == 0:
            # The newest by number may be those of an abandoned end, after `--resume` of an older one.
            self.prune({self.progress.best_tag or tag, tag})

    def prune(self, keep: set[str]) -> None:
        """Delete old checkpoints but those in `keep`; warn if that fails. Rank 0 only."""
        try:
            prune(self.root, keep, self.config.train.keep_last, self.config.train.keep_every)
        except OSError as error:
            self.say(f"warning: an old checkpoint cannot be deleted ({error}); the run continues")

    def attempt(self, saving: Callable[[], None], final: bool = False) -> None:
        """Call a method of the saver, and warn if a checkpoint could not be written; `final`: raise CheckpointError."""
        try:
            saving()
        except CheckpointError as error:
            if final:
                raise
            newest = self.saver.saved or "none"
            self.say(f"warning: {error}; the run continues, the newest checkpoint is {newest}")

    def roll_back(self, tag: str) -> bool:
        """Return to the last checkpoint, and continue with the batch after the current one.

        tag: the last checkpoint so far. False if the run has returned to it too often.
        """
        self.attempt(self.saver.wait)
        tag, left = self.saver.saved or tag, self.progress
        self.rollbacks[tag] += 1
        if self.rollbacks[tag] > self.config.train.max_skipped:
            return False
        self.watchdog.enter("checkpoint", left.step)
        progress = Progress.restored(load_checkpoint(self.engine, self.root, tag, self.log.say_sometimes)["progress"])
        # The task's state is kept: it is that of the next batch. Carried states would be those of other rows.
        self.carried = None
        self.progress = progress._replace(passed_over=left.batch - progress.step)
        self.log.rollback(left.step, tag, progress.step, self.progress.passed_over)
        return True

    def write_profile(self) -> None:
        """Write the timeline of all ranks in the last pass, as a picture and a Chrome trace."""
        events = profile.collect(self.runner.trace)
        folder = self.out / "profile"

        def write() -> None:
            folder.mkdir(exist_ok=True)
            profile.write_profile(events, folder, f"step_{self.progress.step:08d}")

        together(write, only=0)
        self.say(f"profile: {folder}")
