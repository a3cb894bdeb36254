"""The training loop, for every method. Chapters: model, cache, state, data, train, finish.

A workdir holds config.json, log.txt, metrics.jsonl, tensorboard/, checkpoints/, samples/ and, where prompts are read,
tokenizer/; of a run that trains an adapter, its file, and in adapters/<step>/ that of each checkpoint before. The same
command on the same workdir goes on where the last checkpoint was written, on any number of devices and processes. Every
process of a run executes this; the first one alone writes what is not a checkpoint or a cache.
"""

import contextlib
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd_jax import config as configs
from sd_jax import distributed, hardware, media, sharding, trees
from sd_jax.checkpoints.native import Checkpoints
from sd_jax.checkpoints.place import gather, place
from sd_jax.data import loader, mixed, sources
from sd_jax.training import evaluate, samples, setup, start
from sd_jax.training.context import Context
from sd_jax.training.methods import method_of
from sd_jax.training.metrics import Journal
from sd_jax.training.nonfinite import Nonfinite, Verdict
from sd_jax.training.optimizers import learning_rate
from sd_jax.training.precompute import precompute
from sd_jax.training.preemption import Preempted, Preemption
from sd_jax.training.prior import prior_folder
from sd_jax.training.stages import Stages, Throughput
from sd_jax.training.state import TrainState
from sd_jax.training.step import MappedStep
from sd_jax.training.watchdog import Watchdog
from sd_jax.types import Params


def train(
    config: ConfigDict,
    workdir: pathlib.Path | None,  # not needed for a dry run
    dry_run: bool = False,
    started: float | None = None,  # time.time() at which the run began, for its summary; None = now
    profile: tuple[int, int] | None = None,  # a trace of steps first .. first + count - 1, into workdir/profile
    only_caches: bool = False,
) -> None:
    """Trains `config.method` into `workdir`, or resumes it. With `dry_run` prints what it would train, and ends.

    With `only_caches` it ends once they are filled, which needs neither the mesh nor the memory that training does.
    Raises ValueError, FileNotFoundError, CheckpointError or DataError, each naming the key or file and the mend;
    FloatingPointError where the loss stays without a finite value (`config.max_skipped`, `config.rollbacks`); Preempted
    where the run was asked to stop: it has been saved, and the same command goes on.
    """
    journal, stages = Journal(), Stages()
    try:
        with Preemption() as preemption, Watchdog(stages, config.watchdog_seconds, workdir, journal.log):
            _train(config, workdir, dry_run, started or time.time(), profile, only_caches, journal, stages, preemption)
    finally:
        journal.close()


def _train(config, workdir, dry_run, started, profile, only_caches, journal, stages, preemption) -> None:
    sharding.keep_compilations()
    method = method_of(config)
    if dry_run or not only_caches:
        mesh = sharding.make_mesh(config.mesh.to_dict())
        setup.check_batch(config, mesh)
    elif not (config.data.cache_latents or config.data.cache_text):
        raise ValueError(
            "--precompute fills caches, and this run has none: set config.data.cache_latents or config.data.cache_text "
            "to True"
        )

    # --- Model -------------------------------------------------------------------------------------------------------
    source = sources.open_source(config)
    train_source, held_out = sources.split_held_out(source, config.data.held_out, config.seed)
    opened = {"train": train_source, "held_out": held_out}
    captions = functools.partial(sources.captions, train_source)
    model = start.build_model(config, method, workdir, captions, dry_run)
    make_state = functools.partial(setup.initial_state, config, method, model.networks)
    abstract = jax.eval_shape(make_state, jax.tree.map(_shape, model.loaded))
    if dry_run:
        _describe(config, abstract, mesh, model)
        return
    if distributed.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        configs.dump(config, workdir / "config.json")
    journal.open(workdir, config.total_steps)

    # --- Cache -------------------------------------------------------------------------------------------------------
    if mixed.mixes(config):
        with stages("prior"):
            opened["prior"] = mixed.open_prior(config, prior_folder(config, model, workdir))
    assignments = mixed.assign(train_source, opened.get("prior"), config)
    with stages("cache"):
        folder = pathlib.Path(config.data.cache_dir or workdir / "cache")
        cached, empty = precompute(config, model, opened, assignments, folder)
    if only_caches:
        journal.log(f"the caches in {folder} are filled: the same command without --precompute trains")
        return
    tokenize = None if config.data.cache_text else model.caption_tokenizer()
    told = {"num_time_ids": model.num_time_ids}

    # --- State -------------------------------------------------------------------------------------------------------
    context = Context(model.networks, config, empty)
    step = setup.make_step(method, context, mesh, abstract)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, best="held_out_loss")
    first_step, data_state = 0, None
    resumes = checkpoints.any_step()
    with stages("restore" if resumes else "initialise"):
        # What the step does not read stays with the host, for checkpoints and samples
        kept = {part: model.loaded.pop(part) for part in setup.cached_parts(config, model.networks.spec)}
        kept = gather(kept, "float32", where=config.init)
        loaded = {}
        if not resumes or method.adapting is not None:
            there = None if step.pmap else sharding.state_shardings(model.loaded, mesh)
            dtype = jnp.float32 if method.adapting is None else None
            loaded = place(model.loaded, dtype, there, where=config.init)
        if resumes:
            state, data_state = _restore(checkpoints, step, kept, loaded if method.adapting else None)
            first_step = int(state.step)
        else:
            state = sharding.jit(make_state, once=True, out_shardings=None if step.pmap else step.shardings)(loaded)
        del loaded
        state = step.place_state(state)
    model.loaded.clear()
    journal.rewind(first_step)
    journal.log(f"{'resumed at' if first_step else 'starting from'} step {first_step} of {config.total_steps}")
    if preemption.reached(first_step):
        raise Preempted(first_step)

    # --- Data --------------------------------------------------------------------------------------------------------
    read, assignment = mixed.stream(opened, cached, assignments, config)
    batches = loader.make_loader(read, tokenize, config, assignment, start_state=data_state, **told)
    slots = _slots(config.batch_size)
    stream = loader.prefetch(batches, lambda batch: step.place_batch(_arrays(batch, slots)))
    shown = cached["held_out"] if len(held_out) else cached["train"]
    fixed = [_arrays(batch, slots) for batch in loader.fixed_batches(shown, tokenize, config, **told)]
    # Of one process, what one device holds alone (pmap), and batches too small to be split, stay as they are
    over_mesh = not step.pmap or jax.process_count() > 1
    held = [sharding.place_batch(batch, mesh) if over_mesh and _divides(batch, mesh) else batch for batch in fixed]
    judge = None
    if len(held_out):
        judge = evaluate.make_evaluator(method, context, config.seed, held, gather=step.gather)

    shapes = [setup.batch_shapes(config, method, model.networks, size) for size in batches.sizes]
    if first_step < config.total_steps:
        with stages("compile"):
            for of_batch in shapes:
                step.compile(of_batch)
            # Gloo gives up where a process comes to its first collective 30 seconds after another
            distributed.barrier("compiled")
        said = ", ".join(f"{width}x{height}" for height, width in batches.sizes)
        journal.log(f"{len(step.programs)} compiled, for pictures of {said}: {stages.seconds['compile']:.1f} s")
    throughput = Throughput(
        stages,
        config.batch_size,
        setup.flops_per_image(method, context, abstract, shapes[0]),
        hardware.peak_flops(jax.devices()[0].device_kind),
        mesh.size,
        workdir / "summary.json",
        started,
        first_step,
    )
    rate = learning_rate(config)

    # --- Train -------------------------------------------------------------------------------------------------------
    def write_row(at: int, metrics: dict[str, Any], extra: dict[str, float]) -> Verdict:
        """Waits for a step's metrics and records them. Returns what to do about it, should it have been skipped."""
        with stages("device"):
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        row = {"step": at, **values, "learning_rate": float(rate(at - 1)), **extra, **throughput.row()}
        journal.step(row)
        if at % max(config.log_steps, 1) == 0:
            journal.log(", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        return nonfinite.after(bool(values["skipped"]))

    def save(at: int, extra: dict[str, float]) -> None:
        with stages("checkpoint"):
            whole = step.whole_state(state)
            checkpoints.save(at, _tree(whole, kept, method.adapting is not None), data_state, model.meta(at), extra)
            if method.adapting is not None:
                adapter = _on_host(whole.ema_model["adapter"])
                if distributed.is_first():
                    method.adapting.save(config, model, adapter, workdir)
                    if at < config.total_steps:  # kept, for the best may lie before the end
                        folder = workdir / "adapters" / str(at)
                        folder.mkdir(parents=True, exist_ok=True)
                        method.adapting.save(config, model, adapter, folder)
        throughput.saved(at)

    due = lambda every, at: every and (at % every == 0 or at == config.total_steps)  # noqa: E731
    trace = profile if profile is not None and distributed.is_first() else (0, 0)  # first step, number of steps
    tracing = False
    nonfinite = Nonfinite(config.max_skipped, config.rollbacks)
    at, stop, pending = first_step, False, None
    while at < config.total_steps and not stop:
        at += 1
        if at == trace[0] and not tracing:
            jax.profiler.start_trace(str(workdir / "profile"))
            tracing = True
        with stages("data"):
            batch, data_state = next(stream)
        with stages("dispatch"):
            state, metrics = step(state, batch)
        verdict = "go on"
        if pending is not None:  # the row of the step before: the device is busy with this one meanwhile
            verdict = write_row(*pending)
        extra = {}
        if judge is not None and due(config.eval_steps, at):
            with stages("evaluation"), jax.set_mesh(mesh) if over_mesh else contextlib.nullcontext():
                extra = judge(step.whole_state(state).ema_model)
            journal.log(f"step {at}: held-out loss {extra['held_out_loss']:.6g}")
        pending = (at, metrics, extra)
        stop = preemption.reached(at)
        saving = due(config.checkpoint_steps, at) or at == config.total_steps or stop
        if saving and verdict == "go on":
            verdict, pending = write_row(*pending), None
        if verdict == "stop" or (verdict == "roll back" and not checkpoints.any_step()):
            raise FloatingPointError(
                f"no finite loss in {config.max_skipped} steps before step {at}, after {nonfinite.rolled_back} returns "
                "to a checkpoint: see metrics.jsonl; a lower config.optimizer.learning_rate may mend it"
            )
        if verdict == "roll back":
            with stages("restore"):
                checkpoints.wait()
                state, _ = _restore(checkpoints, step, kept, state.frozen if method.adapting else None)
                at, pending = int(state.step), None
                state = step.place_state(state)
            journal.rewind(at)
            journal.log(f"{config.max_skipped} steps without a finite loss: back to step {at}, with other data")
            continue
        if saving:
            if at == config.total_steps and method.finish is not None:
                model.networks = method.finish(context, step.whole_state(state).ema_model, held)
            save(at, extra)
        if due(config.sample_steps, at) and not stop:
            with stages("samples"):
                params = {**kept, **_on_host(step.whole_state(state).ema_model)}
                _draw(config, model, params, fixed[0], at, workdir, journal)
        if tracing and (at >= sum(trace) - 1 or at == config.total_steps or stop):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            tracing = False
            journal.log(f"a trace of steps {trace[0]} to {at} is in {workdir / 'profile'}")

    # --- Finish ------------------------------------------------------------------------------------------------------
    if first_step >= config.total_steps:
        journal.log("nothing left to train: raise config.total_steps to go on")
    if batches.bad_files.names:
        journal.log(str(batches.bad_files))
    batches.close()
    with stages("checkpoint"):
        checkpoints.close()
    summary = throughput.saved(at)
    if at < config.total_steps:
        journal.log(f"stopped as asked at step {at}, which is saved: the same command goes on from there")
        raise Preempted(at)
    journal.log(f"done in {summary['seconds']:.0f} seconds, goodput {summary['goodput']:.0%}: {workdir}")


def _shape(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _slots(batch_size: int) -> np.ndarray:
    """Places in the global batch of this process' images."""
    share = batch_size // jax.process_count()
    return np.arange(share, dtype=np.int32) + share * jax.process_index()


def _arrays(batch: dict, slots: np.ndarray) -> dict[str, np.ndarray]:
    """What the loss reads of a loader's batch."""
    return {**{name: x for name, x in batch.items() if name != "index"}, "slot": slots[: len(batch["index"])]}


def _divides(batch: dict, mesh: Mesh) -> bool:
    """Whether a batch, of one process perhaps a small one, can be split over the mesh."""
    return len(batch["slot"]) * jax.process_count() % (mesh.size // mesh.shape["tensor"]) == 0


def _on_host(params):
    """What several processes hold parts of, whole, in the first of them; of one process, as it is."""
    if jax.process_count() == 1:
        return params

    def whole(leaf):
        array = multihost_utils.process_allgather(leaf, tiled=True)
        return array if distributed.is_first() else None  # one by one, so that the others never hold it all

    return jax.tree.map(whole, params)


def _draw(config, model, params, batch, at, workdir, journal) -> None:
    if distributed.is_first():
        sheet = samples.draw(config, model, params, batch)
        media.write_png(workdir / "samples" / f"{at:07d}.png", sheet, {})
        journal.picture(at, "samples", sheet)


def _tree(state: TrainState, kept: Params, alone: bool) -> dict[str, Any]:
    """What a checkpoint holds of a state, and of the parts that are not in it; see `checkpoints/native.py`.

    alone: only what is trained.
    """
    first, *others = state.decays
    params = state.params if alone else {**kept, **state.raw_model}
    tree = {"step": state.step, "params": params, "ema": state.averages[first], "opt_state": state.opt_state}
    return {**tree, "averages": {decay: state.averages[decay] for decay in others}} if others else tree


def _restore(
    checkpoints: Checkpoints,
    step: MappedStep,
    kept: Params,
    model: Params | None = None,  # what checkpoints do not hold, where they hold an adapter alone
) -> tuple[TrainState, Any]:
    like = step.abstract_state
    tree, data_state = checkpoints.restore(like=_tree(like, kept, model is not None))
    params = {part: tree["params"][part] for part in like.params}
    frozen = {part: (tree["params"] if model is None else model)[part] for part in like.frozen}
    averages = {like.decays[0]: tree["ema"], **tree.get("averages", {})}
    state = like.replace(
        step=tree["step"], params=params, frozen=frozen, averages=averages, opt_state=tree["opt_state"]
    )
    return state, data_state


def _describe(config: ConfigDict, abstract: TrainState, mesh: Mesh, model: start.Model) -> None:
    print(configs.to_json(config))
    for part in model.parts:
        moves = "trained" if part in abstract.params else "frozen" if part in abstract.frozen else "frozen, cached"
        print(f"{part}: {trees.count({**model.loaded, **abstract.raw_model}[part]):,} parameters, {moves}")
    print(f"mesh: {dict(mesh.shape)}, parallelism: {config.parallelism}")
    print(f"state: {trees.num_bytes(abstract):,} bytes (parameters, averages and optimiser), over all devices")
    print(f"dry run: {config.method} for {config.total_steps} steps of {config.batch_size} images; nothing was trained")
