"""The training loop: batches through the engine, stage by stage, validated, checkpointed and resumable."""

import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..checkpoint import folder as checkpoint
from ..checkpoint import load as resume_from
from ..checkpoint.save import Saver
from ..config import ConfigError
from ..data.retrieval import Retrieval
from ..data.task import Batch
from ..data.tasks import make_task
from ..distributed.collectives import together
from ..distributed.launchers import Ranks
from ..distributed.mesh import Mesh, make_mesh, ring
from ..evaluation.run_report import write_run_report
from ..monitoring import bad_steps, profile
from ..monitoring.run_log import RunLog
from ..monitoring.step_metrics import StepMetrics
from ..monitoring.watchdog import Watchdog, end_when_alone
from ..runtime.executor import ScheduledLM, check_memory, run_backward
from ..runtime.handoff import Local, Wire
from ..runtime.piece import Totals
from ..schedule.grid import Grid, pipeline_warning
from ..zero3 import engine as engines
from ..zero3.ds_config import Prepared, prepare
from ..zero3.partitioned_model import armt_config, build_model, token_fields
from .curriculum import Stage, learning_rate
from .global_batch import Batches, Sums
from .progress import Progress, stage_over
from .run_config import RunConfig
from .run_folder import check_same, describe_run

# Exit code of a run whose numbers stayed bad.
GAVE_UP = 1
# Exit code of a run that was told to stop, has saved, and wants to be started again (EX_TEMPFAIL).
REQUEUE = 75
# ZeRO-3 prefetches by what it has seen of earlier steps, so the first two of a process are not like the others.
PROFILED_STEP = 3
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Outcome(NamedTuple):
    """What came of one step."""

    metrics: dict[str, float]
    skipped: bad_steps.BadRows | None  # of a step that was not made: the rows with bad numbers
    spiked: bool  # its loss calls for a rollback
    stop: bool  # some rank was told to stop


class Trainer:
    """One run: what it is made of. `run` trains it."""

    def __init__(self, config: RunConfig, ds_config: dict, out: Path, ranks: Ranks, device: torch.device):
        self.config, self.ds_config, self.out, self.ranks, self.device = config, ds_config, out, ranks, device
        self.watchdog = Watchdog(config.watchdog, out, ranks.rank)
        self.log = RunLog(out, ranks.rank, config.train.log_every)
        self.say = self.log.say
        # What one rank alone may find wrong, a missing file say, must end all of them before they wait for each other.
        prepared = together(self.prepare)
        self.sizes, self.peak_lr = prepared.sizes, prepared.lr
        model = build_model(config.model, self.armt, prepared.ds_config, config.train.seed)
        self.runner = ScheduledLM(
            model,
            states=config.bptt.states,
            offload=prepared.offload_activations,
            link=self.link(),
        )
        self.engine = engines.start_engine(self.runner, prepared.ds_config, self.grid, device)
        self.watchdog.at = self.runner.at
        self.progress = Progress()
        self.metrics = StepMetrics(self.runner, config.watchdog.straggler_factor, device)
        self.saver = Saver(self.engine, out / "checkpoints", config.train.save_in_background, self.say)
        self.rollbacks: Counter[str] = Counter()
        self.told_to_stop = False
        # Dropout differs between ranks, and is the same for a rank of every run.
        torch.manual_seed(config.train.seed * 100003 + ranks.rank)

    def link(self) -> Wire | Local:
        """What hands the memory states on. Collective."""
        if self.mesh.sp == 1:
            return Local()
        return Wire(*ring(self.mesh, self.config.parallel.timeout_s), self.device)

    def prepare(self) -> Prepared:
        """Everything that needs no other rank. Raises ConfigError."""
        config = self.config
        self.mesh: Mesh = make_mesh(self.ranks, config.parallel.sp)
        prepared = prepare(self.ds_config, self.mesh.dp, self.ranks.world_size, self.device)
        rows = config.model.base_config.get("vocab_size") if config.model.base_config else None
        self.task = make_task(config.data, config.model.segment_tokens, rows, prepared.sizes.global_batch)
        self.armt = armt_config(config.model, token_fields(self.task.tokenizer), self.task.segment_tokens)
        self.counts = self.task.measure == "accuracy"
        self.grid = Grid(1, self.armt.num_hidden_layers, self.mesh.sp, config.parallel.rounds, config.parallel.chunks)
        self.check()
        schedule = config.parallel.schedule
        self.batches = Batches(self.task, self.armt, self.grid, schedule, self.mesh, prepared.sizes, self.device)
        self.fresh = not (self.out / "config.yaml").exists()
        if not self.fresh:
            check_same(self.out, config)
        return prepared

    def check(self) -> None:
        """Everything that can be known to go wrong before the model is built. Raises ConfigError."""
        if len(self.task.tokenizer) > self.armt.vocab_size:
            raise ConfigError(
                f"model.vocab_size={self.armt.vocab_size}: the tokenizer has {len(self.task.tokenizer)} tokens; use "
                "another tokenizer or a base model with a larger embedding"
            )
        for i, stage in enumerate(self.config.curriculum):
            if stage.unit != self.task.unit:
                raise ConfigError(
                    f"curriculum.{i}.{stage.unit}={stage.length}: task={self.config.data.task} counts {self.task.unit}"
                )
            self.task.sequence_tokens(stage.length)
            if isinstance(self.task, Retrieval):
                self.task.key_count(stage.length, **stage.keys)
            for name, value in stage.keys.items():
                if value is not None and not isinstance(self.task, Retrieval):
                    raise ConfigError(
                        f"curriculum.{i}.{name}={value}: task={self.config.data.task} has no keys; remove it"
                    )
            if stage.until is not None and not self.counts:
                raise ConfigError(f"curriculum.{i}.until: task={self.config.data.task} has no accuracy; use patience")
        check_memory(self.config.parallel, self.armt.memory_kind)
        text = pipeline_warning(self.grid)
        if text:
            self.say(f"warning: {text}")

    # --- one step ----------------------------------------------------------------------------------------------------

    def train_step(self, stage: Stage) -> Outcome:
        """One optimizer step, made or skipped by all ranks; moves `progress` on. Collective."""
        started = time.perf_counter()
        rate = learning_rate(stage, self.progress.stage_step, self.peak_lr)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        batches = self.batches.micro_batches("train", self.progress.batch, stage.difficulty)
        scored = torch.tensor(sum(int(b.labels.ge(0).sum()) for _, b in batches), dtype=torch.float32)
        scored = scored.to(self.device, non_blocking=True)
        dist.all_reduce(scored)
        # DeepSpeed takes the mean over ranks and accumulation steps; with this factor that is the mean over all
        # scored tokens of the global batch, however they are spread. Every rank of a group counted its rows' labels.
        factor = self.ranks.world_size * self.sizes.accumulation * self.mesh.sp / scored
        closely = (self.progress.step + 1) % self.config.train.log_every == 0
        parts = []
        for where, batch in batches:
            piece = self.batches.piece(batch)
            observe = self.metrics.observer(self.progress.step + 1, where.start, piece, closely)
            totals: Totals = self.engine(piece, count=self.counts, observe=observe)
            run_backward(self.engine, bad_steps.weigh(totals.nll, factor))
            self.engine.step()
            parts.append((where, batch, totals))
        sums = self.batches.sum_up(parts, self.told_to_stop)
        loss = sums.metrics()["loss"]
        seconds = time.perf_counter() - started
        tokens = self.sizes.global_batch * batches[0][1].input_ids.shape[1]
        window = stage.until.over if stage.until else 1
        self.progress = self.progress.after_step(sums.metrics()["accuracy"], tokens, seconds, window)
        skipped, rollback = None, self.config.train.rollback
        spiked = self.saver.saved is not None and bad_steps.spiked(loss, self.progress.losses, rollback)
        if self.engine.was_step_applied():
            self.progress = self.progress.after_loss(loss, rollback.over if rollback else 0)
        else:
            self.progress = self.progress.after_skip()
            skipped = bad_steps.find_bad_rows([(where, batch.sample_ids, totals.nll) for where, batch, totals in parts])
        norm = self.engine.get_global_grad_norm()
        metrics = {
            **(sums.metrics() if self.counts else {"loss": loss}),
            "stage": self.progress.stage,
            "lr": rate,
            "grad_norm": float(norm) if norm is not None else 0.0,
            "tokens": self.progress.tokens,
            "tokens_per_s": tokens / seconds,
            "step_s": seconds,
            "skipped": self.progress.skipped,
            **self.looks_blind(batches[0][1]),
            **self.metrics.measure(piece.grid),
        }
        return Outcome(metrics, skipped, spiked, sums.stop)

    def looks_blind(self, batch: Batch) -> dict[str, float]:
        """Pairs of a retrieval batch, and the accuracy of guessing without the key; empty for other tasks."""
        if not isinstance(self.task, Retrieval):
            return {}
        pairs = batch.input_ids.shape[1] // self.task.segment_tokens - 1
        return {"pairs": pairs, "key_blind": self.task.key_blind(batch)}

    @torch.no_grad()
    def validate(self, stage: Stage) -> dict[str, float]:
        """Means over the validation batches at the stage's full length. Collective."""
        steps, size = self.config.train.validation_steps, self.task.size("validation")
        if size is not None:
            steps = min(steps, -(-size // self.sizes.global_batch))
        difficulty = stage.difficulty._replace(minimum=stage.length)
        self.engine.eval()
        found = []
        for step in range(steps):
            parts = []
            for where, batch in self.batches.micro_batches("validation", step, difficulty):
                parts.append((where, batch, self.engine(self.batches.piece(batch), count=True)))
            found.append(self.batches.sum_up(parts, self.told_to_stop))
        self.engine.train()
        if not found:
            return {}
        means = Sums(*(sum(column) for column in zip(*found, strict=True))).metrics()
        # That a whole text is predicted right says nothing.
        return means if self.counts else {name: means[name] for name in ("loss", "token_accuracy")}

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self, resume: str) -> int:
        """Train to the end of the curriculum. Returns the exit code: 0, GAVE_UP, or REQUEUE after a stop signal."""
        try:
            with end_when_alone(self.runner.at, self.watchdog.dump):
                return self.train(resume)
        except ConfigError:
            # The launcher ends the others now, and means it. A run that was told to stop may be told again, and is not.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            raise
        finally:
            self.watchdog.close()

    def train(self, resume: str) -> int:
        """Step after step, with validations and checkpoints between. Returns the exit code."""
        root = self.out / "checkpoints"
        self.restore(root, resume)
        config = self.config.train
        together(self.describe, only=0)
        total = min(self.progress.step + self.steps_left(), config.max_steps or 10**12)
        self.log.start(self.progress.step, total)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: setattr(self, "told_to_stop", True))
        if self.config.digests:
            together(lambda: self.metrics.write_digests(self.out))
        steps_here = 0
        while self.progress.step < total:
            stage = self.config.curriculum[self.progress.stage]
            if stage_over(stage, self.progress, config.patience):
                self.enter_next_stage(root)
                continue
            self.watchdog.enter("step", self.progress.step)
            metrics, skipped, spiked, stop = self.train_step(stage)
            every = self.progress.step % config.log_every == 0
            slow = self.metrics.stragglers.report() if every else None
            self.log.step(self.progress.step, metrics, slow)
            steps_here += 1
            if skipped:
                self.log.skipped(self.progress.step, self.progress.batch - 1, skipped)
                if self.progress.skipped_in_a_row >= config.max_skipped:
                    return self.give_up(f"{config.max_skipped} steps in a row were not made")
            if spiked:
                if not self.roll_back(root):
                    return self.give_up(f"{config.max_skipped} rollbacks did not help")
                continue
            if self.config.profile and steps_here == PROFILED_STEP:
                self.write_profile()
            over = stage_over(stage, self.progress, config.patience)
            # A run that ends at max_steps may go on later, so it must not look at more validations than one that does.
            if not stop and (over or self.progress.step % config.validate_every == 0):
                self.watchdog.enter("validation", self.progress.step)
                self.judge(root, self.validate(stage))
                total = min(total, self.progress.step + self.steps_left())
                self.log.expect(total)
            self.attempt(self.saver.poll)
            done = self.progress.step >= total
            if stop or over or done or self.progress.step % config.save_every == 0:
                self.save(root, final=done)
            if stop:
                self.attempt(self.saver.wait)
                newest = self.saver.saved or "no checkpoint"
                self.say(f"stopped by a signal after step {self.progress.step}, to be started again from {newest}")
                return REQUEUE
        self.say(f"done: {self.progress.step} steps, {self.progress.seconds:.0f} s of training, {self.out}")
        self.log.finish()
        if self.ranks.rank == 0:
            self.say(f"report: {write_run_report(self.out)}")
        return 0

    def describe(self) -> None:
        """The run folder, before the first step."""
        describe_run(self.out, self.config, self.ds_config, self.armt, self.task)
        (self.out / "checkpoints").mkdir(exist_ok=True)

    def steps_left(self) -> int:
        """Steps of the stages to come, if none ends early."""
        stages = self.config.curriculum[self.progress.stage :]
        if stage_over(stages[0], self.progress, self.config.train.patience):
            return sum(stage.steps for stage in stages[1:])
        return sum(stage.steps for stage in stages) - self.progress.stage_step

    def restore(self, root: Path, resume: str) -> None:
        """Go on from the newest checkpoint, if there is one and `resume` is auto. Raises CheckpointError."""
        if resume == "never":
            if not self.fresh:
                raise ConfigError(f"resume=never: {self.out} holds a run already; give another --out")
            return
        tag = checkpoint.find_newest(root, self.say) if resume == "auto" else resume
        together(lambda: checkpoint.clean(root), only=0)
        if tag is not None:
            state = resume_from.load_checkpoint(self.engine, root, tag)
            self.progress = Progress.restored(state["progress"])
            self.task.load_state_dict(state["task"])
            self.saver.saved = tag
            self.say(f"resumed {root / tag} at step {self.progress.step}")

    def save(self, root: Path, best: bool = False, final: bool = False) -> None:
        """A checkpoint of this step, unless there is one; `best`: the one that `best` points to. Collective.

        Where it cannot be written, a full disk say, the run goes on with those before it, and says so; `final`: after
        all else, so CheckpointError.
        """
        tag = checkpoint.tag_of(self.progress.step)
        self.watchdog.enter("checkpoint", self.progress.step)
        state = {"progress": self.progress._asdict(), "task": self.task.state_dict()}
        self.attempt(lambda: self.saver.save(tag, state, best), final)
        if final:
            self.attempt(self.saver.wait, final)
        if self.ranks.rank == 0:
            keep = {self.progress.best_tag or tag}
            checkpoint.prune(root, keep, self.config.train.keep_last, self.config.train.keep_every)

    def attempt(self, saving: Callable[[], None], final: bool = False) -> None:
        """Do something that may find a checkpoint not written, on all ranks alike."""
        try:
            saving()
        except checkpoint.CheckpointError as error:
            if final:
                raise
            self.say(f"warning: {error}; going on, the newest checkpoint is {self.saver.saved or 'none'}")

    def judge(self, root: Path, found: dict[str, float]) -> None:
        """Report a validation; keep the checkpoint if it is the stage's best."""
        if not found:
            return
        self.log.validation(self.progress.step, found)
        name = self.config.train.best or ("accuracy" if self.counts else "loss")
        if name not in found:
            raise ConfigError(f"train.best={name}: no such validation metric; one of {', '.join(found)}")
        score = -found[name] if name == "loss" else found[name]
        before = self.progress.best_tag
        self.progress = self.progress.after_validation(score, checkpoint.tag_of(self.progress.step))
        if self.progress.best_tag != before:
            self.save(root, best=True)

    def roll_back(self, root: Path) -> bool:
        """Back to the last checkpoint, and on with the batch after this one. Collective.

        False where the run was there too often, without reaching the next checkpoint.
        """
        self.attempt(self.saver.wait)
        tag, left = self.saver.saved, self.progress
        self.rollbacks[tag] += 1
        if self.rollbacks[tag] > self.config.train.max_skipped:
            return False
        self.watchdog.enter("checkpoint", left.step)
        progress = Progress.restored(resume_from.load_checkpoint(self.engine, root, tag)["progress"])
        # Not the task's state, which is that of the batch to come.
        self.progress = progress._replace(passed_over=left.batch - progress.step)
        self.log.rollback(left.step, tag, progress.step, self.progress.passed_over)
        return True

    def give_up(self, why: str) -> int:
        """One line for whoever finds the run, with what it can be started from. Returns the exit code."""
        good = self.out / "checkpoints" / self.saver.saved if self.saver.saved else "none was written"
        self.log.complain(f"error: {why}, at step {self.progress.step}; last good checkpoint: {good}")
        return GAVE_UP

    def enter_next_stage(self, root: Path) -> None:
        """Into the next stage, from this one's best checkpoint if the stage says so."""
        following, best = self.progress.next_stage(), self.progress.best_tag
        from_best = self.config.curriculum[following.stage].start == "best"
        self.attempt(self.saver.wait)
        if from_best and best and not (root / best).is_dir():
            self.say(f"warning: {best} could not be kept; stage {following.stage} goes on from the last step")
        elif from_best and best not in (None, checkpoint.tag_of(following.step)):
            resume_from.load_checkpoint(self.engine, root, best)
            self.say(f"stage {following.stage} starts from {best}")
        self.progress = following
        self.log.enter_stage()

    def write_profile(self) -> None:
        """The timeline of all ranks in the last pass, as a picture and a Chrome trace. Collective."""
        events = profile.collect(self.runner.trace)

        def write() -> None:
            folder = self.out / "profile"
            folder.mkdir(exist_ok=True)
            profile.write_profile(events, folder, f"step_{self.progress.step:08d}")

        together(write, only=0)
        self.say(f"profile: {self.out / 'profile'}")
