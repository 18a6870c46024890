"""The training loop: batches through the engine, stage by stage, validated, checkpointed and resumable."""

import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from . import checkpoint, parallel, trace
from . import engine as engines
from .batches import Batches, Sums
from .build import armt_config, build_model, token_fields
from .config import ConfigError
from .curriculum import Progress, Stage, learning_rate, stage_over
from .data.batch import Difficulty
from .data.loader import make_task
from .executor import ScheduledLM, Totals, backward, check_memory
from .handoff import Local, Wire, end_when_alone
from .metrics import Metrics
from .parallel import Mesh, Ranks
from .run import RunConfig, check_same, describe_run
from .schedule import Grid, warning
from .traffic import Traffic

# Exit code of a run that was told to stop, has saved, and wants to be started again (EX_TEMPFAIL).
REQUEUE = 75
# ZeRO-3 prefetches by what it has seen of earlier steps, so the first two of a process are not like the others.
PROFILED_STEP = 3
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Trainer:
    """One run: what it is made of. `run` trains it."""

    def __init__(self, config: RunConfig, ds_config: dict, out: Path, ranks: Ranks, device: torch.device):
        self.config, self.ds_config, self.out, self.ranks, self.device = config, ds_config, out, ranks, device
        # What one rank alone may find wrong, a missing file say, must end all of them before they wait for each other.
        prepared = parallel.together(self.prepare)
        self.sizes, self.peak_lr = prepared.sizes, prepared.lr
        model = build_model(config.model, self.armt, prepared.ds_config, config.train.seed)
        self.runner = ScheduledLM(
            model,
            schedule_name=config.parallel.schedule,
            states=config.bptt.states,
            offload=prepared.offload_activations,
            link=self.link(),
        )
        self.engine = engines.start_engine(self.runner, prepared.ds_config, self.grid, device)
        self.progress = Progress()
        self.traffic = Traffic()
        self.saved: str | None = None
        self.told_to_stop = False
        # Dropout differs between ranks, and is the same for a rank of every run.
        torch.manual_seed(config.train.seed * 100003 + ranks.rank)

    def link(self) -> Wire | Local:
        """What hands the memory states on. Collective."""
        if self.mesh.sp == 1:
            return Local()
        return Wire(*parallel.ring(self.mesh, self.config.parallel.timeout_s), self.device)

    def prepare(self) -> engines.Prepared:
        """Everything that needs no other rank. Raises ConfigError."""
        config = self.config
        self.mesh: Mesh = parallel.mesh(self.ranks, config.parallel.sp)
        prepared = engines.prepare(self.ds_config, self.mesh.dp, self.ranks.world_size, self.device)
        rows = config.model.base_config.get("vocab_size") if config.model.base_config else None
        self.task = make_task(config.data, config.model.segment_tokens, rows, prepared.sizes.global_batch)
        self.armt = armt_config(config.model, token_fields(self.task.tokenizer), self.task.segment_tokens)
        self.counts = self.task.measure == "accuracy"
        self.grid = Grid(1, self.armt.num_hidden_layers, self.mesh.sp, config.parallel.rounds, config.parallel.chunks)
        self.check()
        self.batches = Batches(self.task, self.armt, self.grid, self.mesh, prepared.sizes, self.device)
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
            if stage.until is not None and not self.counts:
                raise ConfigError(f"curriculum.{i}.until: task={self.config.data.task} has no accuracy; use patience")
        check_memory(self.config.parallel, self.armt.memory_kind)
        text = warning(self.grid)
        if text and self.ranks.rank == 0:
            print(f"warning: {text}", flush=True)

    # --- one step ----------------------------------------------------------------------------------------------------

    def train_step(self, stage: Stage) -> tuple[dict[str, float], bool]:
        """One optimizer step; moves `progress` on. Returns its metrics, and whether to stop after it. Collective."""
        started = time.perf_counter()
        rate = learning_rate(stage, self.progress.stage_step, self.peak_lr)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        difficulty = Difficulty.at_least(stage.length, stage.at_least)
        batches = self.batches.micro_batches("train", self.progress.step, difficulty)
        scored = torch.tensor(sum(int(b.labels.ge(0).sum()) for _, b in batches), dtype=torch.float32)
        scored = scored.to(self.device, non_blocking=True)
        dist.all_reduce(scored)
        # DeepSpeed takes the mean over ranks and accumulation steps; with this factor that is the mean over all
        # scored tokens of the global batch, however they are spread. Every rank of a group counted its rows' labels.
        factor = self.ranks.world_size * self.sizes.accumulation * self.mesh.sp / scored
        parts = []
        for where, batch in batches:
            totals: Totals = self.engine(self.batches.piece(batch), count=self.counts)
            backward(self.engine, totals.nll * factor)
            self.engine.step()
            parts.append((where, batch, totals))
        sums = self.batches.sum_up(parts, self.told_to_stop)
        seconds = time.perf_counter() - started
        tokens = self.sizes.global_batch * batches[0][1].input_ids.shape[1]
        window = stage.until.over if stage.until else 1
        self.progress = self.progress.after_step(sums.metrics()["accuracy"], tokens, seconds, window)
        norm = self.engine.get_global_grad_norm()
        metrics = {
            **(sums.metrics() if self.counts else {"loss": sums.metrics()["loss"]}),
            "stage": self.progress.stage,
            "lr": rate,
            "grad_norm": float(norm) if norm is not None else 0.0,
            "tokens": self.progress.tokens,
            "tokens_per_s": tokens / seconds,
            "step_s": seconds,
            **self.measure_schedule(),
        }
        return metrics, sums.stop

    def measure_schedule(self) -> dict[str, float]:
        """How the schedule went in the last pass, as means over ranks; bytes of this process so far. Collective."""
        found = {
            **trace.summary(self.runner.trace.events()),
            "handoff_bytes": self.runner.link.sent_bytes,
            "gathered_bytes": self.traffic.gathered_bytes,
            "reduced_bytes": self.traffic.reduced_bytes,
        }
        means = torch.tensor(list(found.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(means)
        return dict(zip(found, (means / self.ranks.world_size).tolist(), strict=True))

    @torch.no_grad()
    def validate(self, stage: Stage) -> dict[str, float]:
        """Means over the validation batches at the stage's full length. Collective."""
        steps, size = self.config.train.validation_steps, self.task.size("validation")
        if size is not None:
            steps = min(steps, -(-size // self.sizes.global_batch))
        self.engine.eval()
        found = []
        for step in range(steps):
            parts = []
            for where, batch in self.batches.micro_batches("validation", step, Difficulty.fixed(stage.length)):
                parts.append((where, batch, self.engine(self.batches.piece(batch), count=True)))
            found.append(self.batches.sum_up(parts, self.told_to_stop))
        self.engine.train()
        if not found:
            return {}
        return Sums(*(sum(column) for column in zip(*found, strict=True))).metrics()

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self, resume: str) -> int:
        """Train to the end of the curriculum. Returns the exit code: 0, or REQUEUE after a stop signal."""
        root = self.out / "checkpoints"
        self.restore(root, resume)
        config = self.config.train
        parallel.together(self.describe, only=0)
        total = min(self.progress.step + self.steps_left(), config.max_steps or 10**12)
        self.metrics = Metrics(self.out, self.progress.step, total, self.out.name) if self.ranks.rank == 0 else None
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: setattr(self, "told_to_stop", True))
        steps_here = 0
        while self.progress.step < total:
            stage = self.config.curriculum[self.progress.stage]
            if stage_over(stage, self.progress, config.patience):
                self.enter_next_stage(root)
                continue
            with end_when_alone(lambda: self.runner.trace and self.runner.trace.at):
                metrics, stop = self.train_step(stage)
            self.report("train", metrics)
            steps_here += 1
            if self.config.profile and steps_here == PROFILED_STEP:
                self.write_profile()
            over = stage_over(stage, self.progress, config.patience)
            # A run that ends at max_steps may go on later, so it must not look at more validations than one that does.
            if not stop and (over or self.progress.step % config.validate_every == 0):
                self.judge(root, self.validate(stage))
                total = min(total, self.progress.step + self.steps_left())
                if self.metrics:
                    self.metrics.expect(total)
            if stop or over or self.progress.step >= total or self.progress.step % config.save_every == 0:
                self.save(root)
            if stop:
                self.say(f"stopped by a signal after step {self.progress.step}; saved, to be started again")
                return REQUEUE
        self.say(f"done: {self.progress.step} steps, {self.progress.seconds:.0f} s of training, {self.out}")
        if self.metrics:
            self.metrics.close()
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
        tag = checkpoint.find(root, lambda text: self.say(text)) if resume == "auto" else resume
        if tag is not None:
            state = checkpoint.load(self.engine, root, tag)
            self.progress = Progress(**state["progress"])._replace(recent=tuple(state["progress"]["recent"]))
            self.task.load_state_dict(state["task"])
            self.saved = tag
            self.say(f"resumed {root / tag} at step {self.progress.step}")

    def save(self, root: Path) -> str:
        """A checkpoint of this step, unless there is one. Collective."""
        tag = checkpoint.tag_of(self.progress.step)
        if tag == self.saved:
            return tag
        state = {"progress": self.progress._asdict(), "task": self.task.state_dict()}
        checkpoint.save(self.engine, root, tag, state)
        self.saved = tag
        if self.ranks.rank == 0:
            checkpoint.prune(root, self.config.train.keep_last, {self.progress.best_tag or tag})
        return tag

    def judge(self, root: Path, found: dict[str, float]) -> None:
        """Report a validation; keep the checkpoint if it is the stage's best."""
        if not found:
            return
        self.report("validation", found)
        name = self.config.train.best or ("accuracy" if self.counts else "loss")
        if name not in found:
            raise ConfigError(f"train.best={name}: no such validation metric; one of {', '.join(found)}")
        score = -found[name] if name == "loss" else found[name]
        before = self.progress.best_tag
        self.progress = self.progress.after_validation(score, checkpoint.tag_of(self.progress.step))
        if self.progress.best_tag != before:
            tag = self.save(root)
            if self.ranks.rank == 0:
                checkpoint.write_atomically(root / "best", tag)

    def enter_next_stage(self, root: Path) -> None:
        """Into the next stage, from this one's best checkpoint if the stage says so."""
        following, best = self.progress.next_stage(), self.progress.best_tag
        from_best = self.config.curriculum[following.stage].start == "best"
        if from_best and best not in (None, checkpoint.tag_of(following.step)):
            checkpoint.load(self.engine, root, best)
            self.say(f"stage {following.stage} starts from {best}")
        self.progress = following

    def write_profile(self) -> None:
        """The timeline of all ranks in the last pass, as a picture and a Chrome trace. Collective."""
        events = trace.collect(self.runner.trace)

        def write() -> None:
            folder = self.out / "profile"
            folder.mkdir(exist_ok=True)
            trace.write(events, folder, f"step_{self.progress.step:08d}")

        parallel.together(write, only=0)
        self.say(f"profile: {self.out / 'profile'}")

    def report(self, kind: str, values: dict[str, float]) -> None:
        """To metrics.jsonl, TensorBoard and the screen."""
        if not self.metrics:
            return
        step = self.progress.step
        self.metrics.write(kind, step, values)
        if kind == "validation":
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.metrics.say(f"step {step}: validation {text}")
            return
        shown = ("stage", "loss", "accuracy", "tokens_per_s")
        every = step % self.config.train.log_every == 0
        self.metrics.show(step, {name: values[name] for name in shown if name in values}, every)

    def say(self, text: str) -> None:
        """A line from rank 0."""
        if self.ranks.rank == 0:
            print(text, flush=True)
