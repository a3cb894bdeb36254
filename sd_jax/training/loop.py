"""The training loop, for every method. Chapters: model, data, state, resume, train, finish.

A workdir holds config.json, log.txt, metrics.jsonl, tensorboard/, checkpoints/, samples/ and, where prompts are read,
tokenizer/. The same command on the same workdir goes on where the last checkpoint was written.
"""

import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sd_jax import config as configs
from sd_jax import media, sharding, trees
from sd_jax.checkpoints.native import Checkpoints
from sd_jax.checkpoints.place import place
from sd_jax.data import latents, loader, sources
from sd_jax.diffusion import noise
from sd_jax.models.vae import to_image
from sd_jax.training import samples, start
from sd_jax.training.methods import Context, method_of
from sd_jax.training.metrics import Journal
from sd_jax.training.optimizers import learning_rate, make_optimizer
from sd_jax.training.state import TrainState, create
from sd_jax.training.step import MappedStep, train_step

EVAL_STEP = 2**31 - 1  # the "step" that keys the fixed draws of the held-out loss; no run gets there
MOST_SKIPPED = 20  # steps in a row without a finite loss, after which a run ends


def train(
    config: ConfigDict,
    workdir: pathlib.Path | None,  # not needed for a dry run
    dry_run: bool = False,
    started: float | None = None,  # time.time() at which the run began, for its summary; None = now
) -> None:
    """Trains `config.method` into `workdir`, or resumes it. With `dry_run` prints what it would train, and ends.

    Raises ValueError, FileNotFoundError, CheckpointError or DataError, each naming the key or file and the mend, and
    FloatingPointError after MOST_SKIPPED steps whose loss is not finite.
    """
    journal = Journal()
    try:
        _train(config, workdir, dry_run, started or time.time(), journal)
    finally:
        journal.close()


def _train(config: ConfigDict, workdir: pathlib.Path | None, dry_run: bool, started: float, journal: Journal) -> None:
    sharding.keep_compilations()
    method = method_of(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    optimizer = make_optimizer(config)
    _check_batch(config, mesh)

    # --- Model -------------------------------------------------------------------------------------------------------
    source = sources.open_source(config)
    train_source, held_out = sources.split_held_out(source, config.data.held_out, config.seed)
    captions = functools.partial(sources.captions, train_source)
    model = start.build_model(config, method, workdir, captions, dry_run)
    tokenize = model.caption_tokenizer()
    empty_ids = None if tokenize is None else tokenize([""])[0]
    context = Context(model.networks, config, empty_ids)
    loss = functools.partial(method.loss, context)

    # --- State -------------------------------------------------------------------------------------------------------
    def initial_state(loaded):
        params = {part: loaded.get(part) or model.init(part) for part in model.parts}
        trained, frozen = ({part: params[part] for part in parts} for parts in (model.trained, model.frozen))
        return create(trained, frozen, optimizer)

    abstract = jax.eval_shape(initial_state, jax.tree.map(_shape, model.loaded))
    step_fn = functools.partial(
        train_step,
        loss=loss,
        optimizer=optimizer,
        ema_decay=config.ema_decay,
        seed=config.seed,
        grad_accumulation=config.grad_accumulation,
    )
    step = MappedStep(step_fn, mesh, config.parallelism, abstract)
    if dry_run:
        _print_plan(config, abstract, mesh)
        return

    # --- Resume ------------------------------------------------------------------------------------------------------
    workdir.mkdir(parents=True, exist_ok=True)
    configs.dump(config, workdir / "config.json")
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, best="held_out_loss")
    first_step, data_state = checkpoints.latest_step() or 0, None
    if first_step:
        state, data_state = _restore(checkpoints, abstract, step)
    else:
        there = None if step.pmap else sharding.state_shardings(model.loaded, mesh)
        loaded = place(model.loaded, jnp.float32, there, where=config.init)
        state = sharding.jit(initial_state, once=True, out_shardings=None if step.pmap else step.shardings)(loaded)
        del loaded
    state = step.place_state(state)
    model.loaded.clear()
    journal.open(workdir, first_step, config.total_steps, config.batch_size)
    journal.log(f"{'resumed at' if first_step else 'starting from'} step {first_step} of {config.total_steps}")

    # --- Data --------------------------------------------------------------------------------------------------------
    if config.data.cache_latents:
        vae = step.whole_state(state).raw_model["vae"]
        encode = functools.partial(_encode_moments, vae, model.networks)
        caching = functools.partial(
            latents.cache_moments,
            encode=encode,
            weights=vae,
            folder=workdir / "latents",
            config=config,
            num_time_ids=model.num_time_ids,
        )
        train_source, held_out = caching(train_source, "train"), caching(held_out, "held_out")
    told = {"num_time_ids": model.num_time_ids}
    batches = loader.make_loader(train_source, tokenize, config, start_state=data_state, **told)
    slots = _slots(config.batch_size)
    stream = loader.prefetch(batches, lambda batch: step.place_batch(_arrays(batch, slots)))
    shown = held_out if len(held_out) else train_source
    fixed = [_arrays(batch, slots) for batch in loader.fixed_batches(shown, tokenize, config, **told)]
    evaluate = _make_evaluator(loss, config.seed, fixed) if len(held_out) else None
    rate = learning_rate(config)

    # --- Train -------------------------------------------------------------------------------------------------------
    def write_row(at: int, metrics: dict[str, Any], extra: dict[str, float]) -> float:
        """Waits for a step's metrics and records them. Returns whether it was skipped."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        row = journal.step(at, {**values, "learning_rate": float(rate(at - 1)), **extra})
        if at % max(config.log_steps, 1) == 0:
            journal.log(", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        return values["skipped"]

    def save(at: int, extra: dict[str, float]) -> None:
        whole = step.whole_state(state)
        tree = {"step": whole.step, "params": whole.raw_model, "ema": whole.ema, "opt_state": whole.opt_state}
        checkpoints.save(at, tree, data_state, model.meta(at), extra)

    due = lambda every, at: every and (at % every == 0 or at == config.total_steps)  # noqa: E731
    pending, skipped_in_a_row, extra = None, 0.0, {}
    for at in range(first_step + 1, config.total_steps + 1):
        batch, data_state = next(stream)
        state, metrics = step(state, batch)
        if pending is not None:  # the row of the step before: the device is busy with this one meanwhile
            skipped_in_a_row = (skipped_in_a_row + 1) * write_row(*pending)
            if skipped_in_a_row >= MOST_SKIPPED:
                raise FloatingPointError(
                    f"no finite loss in the {MOST_SKIPPED} steps before step {at}: see metrics.jsonl"
                )
        extra = {}
        if evaluate is not None and due(config.eval_steps, at):
            extra["held_out_loss"] = evaluate(step.whole_state(state).ema_model)
            journal.log(f"step {at}: held-out loss {extra['held_out_loss']:.6g}")
        pending = (at, metrics, extra)
        if due(config.checkpoint_steps, at) or at == config.total_steps:
            write_row(*pending)
            pending = None
            if at == config.total_steps and method.finish is not None:
                model.networks = method.finish(model.networks, step.whole_state(state).ema_model, fixed)
            save(at, extra)
        if due(config.sample_steps, at):
            sheet = samples.draw(config, model, step.whole_state(state).ema_model, fixed[0])
            media.write_png(workdir / "samples" / f"{at:07d}.png", sheet, {})
            journal.picture(at, "samples", sheet)
        if extra or due(config.sample_steps, at):
            journal.pause()

    # --- Finish ------------------------------------------------------------------------------------------------------
    if first_step >= config.total_steps:
        journal.log("nothing left to train: raise config.total_steps to go on")
    if batches.bad_files.names:
        journal.log(str(batches.bad_files))
    batches.close()
    checkpoints.close()
    seconds = _add_seconds(workdir / "summary.json", time.time() - started, config.total_steps)
    journal.log(f"done in {seconds:.0f} seconds: {workdir}")


def _check_batch(config: ConfigDict, mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.grad_accumulation
    if config.batch_size % parts:
        raise ValueError(
            f"config.batch_size={config.batch_size} does not divide into {parts} parts (devices x grad_accumulation)"
        )


def _shape(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _slots(batch_size: int) -> np.ndarray:
    """Places in the global batch of this process' images."""
    share = batch_size // jax.process_count()
    return np.arange(share, dtype=np.int32) + share * jax.process_index()


def _arrays(batch: dict, slots: np.ndarray) -> dict[str, np.ndarray]:
    """What the loss reads of a loader's batch."""
    kept = {name: batch[name] for name in ("pixels", "moments", "input_ids", "time_ids") if name in batch}
    return {**kept, "slot": slots[: len(batch["index"])]}


@functools.partial(sharding.jit, static_argnums=1)
def _encode_moments(params, networks, pixels):
    posterior = networks.vae.apply({"params": params}, to_image(pixels), method="encode")
    return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)


def _make_evaluator(loss, seed: int, batches: list[dict]):
    """-> function of a model's params: the loss on the same held-out images with the same draws every time."""

    @sharding.jit
    def one(params, batch, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        return loss(params, batch, noise.example_keys(key, EVAL_STEP, batch["slot"]))[0]

    return lambda params: float(np.mean([float(one(params, batch, i)) for i, batch in enumerate(batches)]))


def _restore(checkpoints: Checkpoints, abstract: TrainState, step: MappedStep) -> tuple[TrainState, Any]:
    like = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), abstract, step.shardings
    )
    tree = {"step": like.step, "params": like.raw_model, "ema": like.ema, "opt_state": like.opt_state}
    tree, data_state = checkpoints.restore(like=tree)
    params = {part: tree["params"][part] for part in abstract.params}
    frozen = {part: tree["params"][part] for part in abstract.frozen}
    return TrainState(tree["step"], params, frozen, tree["ema"], tree["opt_state"]), data_state


def _add_seconds(path: pathlib.Path, seconds: float, step: int) -> float:
    """Keeps what the run took, over all the times that it was resumed after a checkpoint. Returns the sum."""
    before = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
    path.write_text(json.dumps({"step": step, "seconds": round(before + seconds, 1)}) + "\n")
    return before + seconds


def _print_plan(config: ConfigDict, abstract: TrainState, mesh) -> None:
    print(configs.to_json(config))
    for part, tree in abstract.raw_model.items():
        moves = "trained" if part in abstract.params else "frozen"
        print(f"{part}: {trees.count(tree):,} parameters, {moves}")
    print(f"mesh: {dict(mesh.shape)}, parallelism: {config.parallelism}")
    print(f"state: {trees.num_bytes(abstract):,} bytes (parameters, average and optimiser), over all devices")
    print(f"dry run: {config.method} for {config.total_steps} steps of {config.batch_size} images; nothing was trained")
