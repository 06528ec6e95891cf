"""One training step and the scoring step: pure functions of (trained, frozen, batch).

The gradient is taken with respect to the trained tree alone, so with `tune: prompt` the backward
pass holds no weight-gradient matmul. `train`, `pretrain` and `evaluate` jit these once per shape.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprompt.distil import NO_TEACHER, Distances
from jaxprompt.losses import cross_entropy, is_likeliest, segment_sums, token_weights
from jaxprompt.prompts.bank import bank_of, members
from jaxprompt.regularize import RegularizeConfig, masked, noise_for
from jaxprompt.t5.decode import Generated
from jaxprompt.t5.search import Rules
from jaxprompt.t5.stepwise import Draw, Halted
from jaxprompt.trees import merge
from jaxprompt.typing import Array, ArrayTree, Batch, Candidates

FINITE = ("loss", "grad_norm", "trained_norm")  # metrics without which a run cannot go on
LOSS_PARTS = ("task_loss", "distil_logits", "distil_hidden")
"""Of a loss with a teacher: of the targets, of the distances to its logits and hidden states."""
_CANDIDATES_AT_ONCE = 4  # decoded together: they share cross-attention's keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during a run of N prompts over one backbone, or of the model itself (N = 1).

    Attributes:
      step: int32 [], steps taken.
      trained: the tree the optimizers see.
      opt_state: optax state of each of N.
      rng: typed keys [N]; step n folds n into them, so a resumed run draws what an unbroken one
        does.
      live: bool [N], which ones steps still change.
    """

    step: Array
    trained: ArrayTree
    opt_state: Any
    rng: Array
    live: Array


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What is compiled into a step.

    Attributes:
      z_loss: see `losses.cross_entropy`.
      loss_by: "tokens" or "examples", what the loss is averaged over.
      dropout_rate: inside the backbone.
      draws: whether the prompt method draws at random.
      accumulate: microbatches a step; rows of the batch must divide.
      distil: weights of the distances to the teacher, added to the loss of every target token.
      regularize: what holds prompts back, but for the pull towards a text, which is an argument.
      wayward: weight of that pull.
      mask_ids: of the vocabulary, for `regularize.masked`: the mask and the end token.
    """

    z_loss: float = 0.0
    loss_by: str = "tokens"
    dropout_rate: float = 0.0
    draws: bool = False
    accumulate: int = 1
    distil: Distances = NO_TEACHER
    regularize: RegularizeConfig = RegularizeConfig()
    wayward: float = 0.0
    mask_ids: tuple[int, int] = (0, 1)


Optimizers = Sequence[optax.GradientTransformation]
"""Of each prompt of a bank, or of the one thing that is trained."""


def init_state(trained: ArrayTree, optimizers: Optimizers, seeds: Sequence[int]) -> TrainState:
    """Step 0, with an optimizer and a seed for each prompt."""
    trees = members(trained, len(optimizers))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trained=trained,
        opt_state=[optimizer.init(t) for optimizer, t in zip(optimizers, trees, strict=True)],
        rng=jnp.stack([jax.random.key(seed) for seed in seeds]),
        live=jnp.ones(len(seeds), bool),
    )


def train_step(
    graphdef: Any,
    optimizers: Optimizers,
    options: StepOptions,
    state: TrainState,
    frozen: ArrayTree,
    batch: Batch,
) -> tuple[TrainState, dict[str, Array]]:
    """Loss, gradient of the trained tree, update.

    Returns: as `update`.
    """
    return update(optimizers, state, *gradients(graphdef, options, state, frozen, batch))


def gradients(
    graphdef: Any, options: StepOptions, state: TrainState, frozen: ArrayTree, batch: Batch
) -> tuple[ArrayTree, dict[str, Array]]:
    """Gradient of the summed loss, and sums for each of N prompts; parts of a batch add up.

    A row is of one prompt, the one that its first segment names.

    Returns: a tree like the trained one, and float32 [N] each: {"loss" (all that is minimised),
      "units" (that losses are averaged over), "right" (target tokens), "tokens", "examples"}; where
      there is a teacher also `LOSS_PARTS`, parts of the loss.
    """

    extras = options.regularize
    draws = options.dropout_rate or options.draws or extras.draws

    def weighted_sum(trained: ArrayTree, part: Batch) -> tuple[Array, dict[str, Array]]:
        model = merge(graphdef, trained, frozen)
        keys_B = _row_keys(state, part) if draws else None
        run = functools.partial(_weighted_losses, options=options, keys_B=keys_B)
        loss_BT, units_B, logits_BTV, parts = run(model, part)
        right_BT = is_likeliest(logits_BTV, part.targets_BT) * part.loss_weights_BT
        owner_B = part.prompt_index_BG[:, 0]
        sums = {
            "loss": jnp.sum(loss_BT, axis=1),
            "units": units_B,
            "right": jnp.sum(right_BT, axis=1),
            "tokens": jnp.sum(part.loss_weights_BT, axis=1),
            "examples": jnp.sum(part.example_index_BG >= 0, axis=1, dtype=jnp.float32),
            **{name: jnp.sum(own_BT, axis=1) for name, own_BT in parts.items()},
        }
        noisy = functools.partial(run, is_noisy=True)
        if extras.masks:
            without = masked(extras, part, keys_B, *options.mask_ids)
            sums["loss"] += extras.noise * jnp.sum(noisy(model, without)[0], axis=1)
        elif extras.noise:
            attacked = merge(graphdef, jax.lax.stop_gradient(trained), frozen)
            noise_BSD = noise_for(
                extras, part, attacked.backbone.config.d_model, keys_B,
                lambda noise_BSD: jnp.sum(noisy(attacked, part, noise_BSD)[0]),
            )  # fmt: skip
            sums["loss"] += extras.noise * jnp.sum(noisy(model, part, noise_BSD)[0], axis=1)
        count = len(state.live)
        total = jnp.sum(sums["loss"])
        of_each = {name: jax.ops.segment_sum(sum_B, owner_B, count) for name, sum_B in sums.items()}
        if options.wayward:
            # sums are divided by units, and this is to be a part of the mean
            pull_N = options.wayward * of_each["units"] * model.wayward(part, count)
            of_each["loss"] += pull_N
            total += jnp.sum(pull_N)
        return total, of_each

    gradient = jax.grad(weighted_sum, has_aux=True)
    if options.accumulate == 1:
        return gradient(state.trained, batch)
    return _accumulated(gradient, state.trained, batch, options.accumulate)


def _weighted_losses(
    model: Any,
    part: Batch,
    noise_BSD: Array | None = None,
    *,
    options: StepOptions,
    keys_B: Array | None,
    is_noisy: bool = False,
) -> tuple[Array, Array, Array, dict[str, Array]]:
    """Weighted loss of every target [B, T], units of each row [B], logits [B, T, V], loss parts.

    Under noise there is no teacher.
    """
    own = model.outputs(
        part, dropout_rate=options.dropout_rate, dropout_key=keys_B,
        prompt_dropout=options.regularize.prompt_dropout, noise_BSD=noise_BSD,
    )  # fmt: skip
    loss_BT = cross_entropy(own.logits_BTV, part.targets_BT, options.z_loss)
    parts: dict[str, Array] = {}
    if hasattr(model, "teacher") and not is_noisy:
        # of prompts trained together all have the same parts, those without a teacher zeros
        parts = {name: jnp.zeros_like(loss_BT) for name in LOSS_PARTS} | {LOSS_PARTS[0]: loss_BT}
        if options.distil:
            parts |= options.distil.of(part, own, model.taught(part))
        loss_BT = sum(parts.values(), start=jnp.zeros_like(loss_BT))
    weights_BT, units_B = token_weights(
        part.loss_weights_BT,
        part.decoder_segments_BT,
        part.example_index_BG.shape[1],
        options.loss_by,
    )
    weighted = {name: own_BT * weights_BT for name, own_BT in parts.items()}
    return loss_BT * weights_BT, units_B, own.logits_BTV, weighted


def update(
    optimizers: Optimizers, state: TrainState, grads: ArrayTree, sums: Mapping[str, Array]
) -> tuple[TrainState, dict[str, Array]]:
    """What the optimizers make of a batch's gradients.

    One of several prompts that is not live, or whose numbers are not finite, stays as it is.

    Returns: the next state, and float32 [N] each {"loss", "accuracy" (of target tokens),
      "grad_norm", "trained_norm" (after the update), "tokens", "examples"}, and `LOSS_PARTS` where
      they are told.
    """
    count = len(optimizers)
    units = jnp.maximum(sums["units"], 1.0)
    metrics: dict[str, Any] = {
        "loss": sums["loss"] / units,
        "accuracy": sums["right"] / jnp.maximum(sums["tokens"], 1.0),
        "grad_norm": [],
        "trained_norm": [],
        "tokens": sums["tokens"],
        "examples": sums["examples"],
        **{name: sums[name] / units for name in LOSS_PARTS if name in sums},
    }
    old, new = list(zip(members(state.trained, count), state.opt_state, strict=True)), []
    for number, (optimizer, (tree, moments), grad) in enumerate(
        zip(optimizers, old, members(grads, count), strict=True)
    ):
        mean = jax.tree.map(lambda g, n=number: g / units[n], grad)
        updates, moments = optimizer.update(mean, moments, tree)
        tree = optax.apply_updates(tree, updates)
        metrics["grad_norm"].append(optax.tree.norm(mean))
        metrics["trained_norm"].append(optax.tree.norm(tree))
        new.append((tree, moments))
    metrics = {
        name: jnp.stack(value) if isinstance(value, list) else value
        for name, value in metrics.items()
    }
    live = state.live
    if count > 1:  # one by itself ends its run with an error
        for name in FINITE:
            live &= jnp.isfinite(metrics[name])
        new = [
            jax.tree.map(functools.partial(jnp.where, live[number]), after, before)
            for number, (after, before) in enumerate(zip(new, old, strict=True))
        ]
    trees, opt_state = zip(*new, strict=True)
    return TrainState(state.step + 1, bank_of(trees), list(opt_state), state.rng, live), metrics


def _row_keys(state: TrainState, batch: Batch) -> Array:
    """A key for each row: of its prompt, the step and the row's first example, typed [B]."""
    keys_N = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.rng, state.step)
    return jax.vmap(jax.random.fold_in)(
        keys_N[batch.prompt_index_BG[:, 0]], batch.example_index_BG[:, 0]
    )


def _accumulated(gradient: Any, trained: ArrayTree, batch: Batch, parts: int) -> Any:
    """Sums losses and gradients over microbatches, one after another.

    A microbatch takes every parts-th row, so that each device of a mesh keeps to its own rows.
    """

    def deal(leaf: Array) -> Array:
        return jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(trained, part)), None

    microbatches = jax.tree.map(deal, batch)
    shapes = jax.eval_shape(gradient, trained, jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return total


def eval_step(
    graphdef: Any, options: StepOptions, trained: ArrayTree, frozen: ArrayTree, batch: Batch
) -> dict[str, Array]:
    """Sums over a batch with teacher forcing and no dropout; add them up, then divide.

    Returns: {"loss" (sum over units), "units", "right" (target tokens), "tokens", "exact" (examples
      whose every target token is the most likely one), "examples"}.
    """
    logits_BTV = merge(graphdef, trained, frozen)(batch)
    segments = batch.example_index_BG.shape[1]
    weights_BT, units_B = token_weights(
        batch.loss_weights_BT, batch.decoder_segments_BT, segments, options.loss_by
    )
    loss_BT = cross_entropy(logits_BTV, batch.targets_BT)
    right_BT = is_likeliest(logits_BTV, batch.targets_BT) * batch.loss_weights_BT
    right_BG = segment_sums(right_BT, batch.decoder_segments_BT, segments)
    tokens_BG = segment_sums(batch.loss_weights_BT, batch.decoder_segments_BT, segments)
    there_BG = batch.example_index_BG >= 0
    return {
        "loss": jnp.sum(loss_BT * weights_BT),
        "units": jnp.sum(units_B),
        "right": jnp.sum(right_BT),
        "tokens": jnp.sum(batch.loss_weights_BT),
        "exact": jnp.sum((right_BG == tokens_BG) & there_BG).astype(jnp.float32),
        "examples": jnp.sum(there_BG).astype(jnp.float32),
    }


def logits(graphdef: Any, trained: ArrayTree, frozen: ArrayTree, batch: Batch) -> Array:
    """Logits of every decoder position, float32 [B, T, V]."""
    return merge(graphdef, trained, frozen)(batch)


def target_log_likelihood(
    graphdef: Any, trained: ArrayTree, frozen: ArrayTree, batch: Batch
) -> Array:
    """Summed log-likelihood of each segment's target, float32 [B, G], in nats."""
    logits_BTV = merge(graphdef, trained, frozen)(batch)
    loss_BT = cross_entropy(logits_BTV, batch.targets_BT) * batch.loss_weights_BT
    return -segment_sums(loss_BT, batch.decoder_segments_BT, batch.example_index_BG.shape[1])


def candidate_scores(
    graphdef: Any, trained: ArrayTree, frozen: ArrayTree, batch: Batch, candidates: Candidates
) -> Array:
    """Summed log-likelihood of every candidate, in nats, the encoder run once.

    Args:
      batch: only its encoder side, prompt and example indices are read.
    Returns: float32 [B, G, C], -inf where an example has no such candidate.
    """
    model = merge(graphdef, trained, frozen)
    values, encoded_BSD = model.encode(batch)
    segments = batch.example_index_BG.shape[1]

    def score(candidate: Candidates) -> Array:
        answered = dataclasses.replace(
            batch,
            decoder_ids_BT=candidate.decoder_ids_CBT,
            decoder_slots_BT=candidate.decoder_slots_CBT,
            decoder_segments_BT=candidate.decoder_segments_CBT,
        )
        logits_BTV = model.logits(model.decode(answered, values, encoded_BSD))
        weights_BT = candidate.loss_weights_CBT
        loss_BT = cross_entropy(logits_BTV, candidate.targets_CBT) * weights_BT
        sums = (
            segment_sums(x, answered.decoder_segments_BT, segments) for x in (loss_BT, weights_BT)
        )
        loss_BG, tokens_BG = sums
        return jnp.where(tokens_BG > 0, -loss_BG, -jnp.inf)

    scores_CBG = jax.lax.map(score, candidates, batch_size=_CANDIDATES_AT_ONCE)
    return jnp.moveaxis(scores_CBG, 0, -1)


def generate(
    graphdef: Any,
    trained: ArrayTree,
    frozen: ArrayTree,
    batch: Batch,
    draw: Draw | None = None,
    *,
    rules: Rules,
) -> Generated:
    """Answers in one go, see `t5.generate.generate`; one segment a row."""
    return merge(graphdef, trained, frozen).generate(batch, rules, draw)


def start_search(
    graphdef: Any,
    trained: ArrayTree,
    frozen: ArrayTree,
    batch: Batch,
    draw: Draw | None = None,
    *,
    rules: Rules,
) -> Halted:
    """The first token of a search that can be halted, see `t5.stepwise.start`."""
    return merge(graphdef, trained, frozen).start(batch, rules, draw)


def go_on(
    graphdef: Any,
    trained: ArrayTree,
    frozen: ArrayTree,
    halted: Halted,
    until: Array,
    *,
    rules: Rules,
) -> tuple[Halted, Generated]:
    """The search up to `until` tokens, int32 [], and what it has found by then."""
    return merge(graphdef, trained, frozen).go_on(rules, halted, until)
