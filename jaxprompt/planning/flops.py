"""The least a training step of a prompt must compute, by pure arithmetic from a `T5Config`.

And what a traced program computes, loops counted as often as they run.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxprompt.t5.config import T5Config


@dataclasses.dataclass(frozen=True)
class Term:
    """One matmul (or a group of equal ones) of the step.

    Attributes:
      name: where it stands.
      forward: FLOPs of the forward pass, a multiply-add counted as 2.
      backward: FLOPs of the activation gradients that the prompt's gradient needs.
    """

    name: str
    forward: int
    backward: int


def step_terms(config: T5Config, rows: int, encoder: int, decoder: int) -> list[Term]:
    """Every matmul of one prompt-tuning step, forward and activation gradients.

    With B rows, S encoder positions (tokens and slots), T decoder positions and X = H * K:

    - a projection by a frozen weight, [B*S, D] x [D, X], costs 2*B*S*D*X forward and the same
      again for the gradient of its input; the gradient of the weight is never needed;
    - scores (query x key) and context (weights x value), 2*B*S*S*X each, have two operands that
      depend on the prompt, so each costs twice its forward again;
    - the prompt stands in the encoder's input, so what the decoder computes before its first
      cross-attention needs no gradient: the self-attention of its first layer, and the query (its
      projection and its gradient) of its first cross-attention.

    Norms, softmax, activations and the embedding gather are left out of the minimum (and counted by
    the compiler). Arrays are counted whole: that in the encoder's first layer only slots have a
    gradient is not used. Causal attention is counted as dense.

    Args:
      config: sizes of the backbone.
      rows, encoder, decoder: B, S, T; every position is taken to be real.
    """
    d, f, v, x = config.d_model, config.d_ff, config.vocab_size, config.num_heads * config.d_kv
    encoder_positions, decoder_positions = rows * encoder, rows * decoder
    n, m = config.num_layers, config.num_decoder_layers
    mlp_weights = (3 if config.gated else 2) * d * f

    def weights(name: str, forward: int, layers: int, without_gradient: int = 0) -> Term:
        return Term(name, forward * layers, forward * (layers - without_gradient))

    def products(
        name: str, queries: int, keys: int, layers: int, without_gradient: int = 0
    ) -> Term:
        forward = 2 * 2 * rows * queries * keys * x
        return Term(name, forward * layers, 2 * forward * (layers - without_gradient))

    scores = 2 * rows * decoder * encoder * x
    return [
        weights("encoder attention projections", 2 * encoder_positions * 4 * d * x, n),
        products("encoder scores and context", encoder, encoder, n),
        weights("encoder mlp", 2 * encoder_positions * mlp_weights, n),
        weights("decoder self-attention projections", 2 * decoder_positions * 4 * d * x, m, 1),
        products("decoder self scores and context", decoder, decoder, m, 1),
        weights("cross-attention query", 2 * decoder_positions * d * x, m, 1),
        weights("cross-attention key and value", 2 * encoder_positions * 2 * d * x, m),
        Term("cross scores and context", 2 * scores * m, 4 * scores * m - scores),
        weights("cross-attention out", 2 * decoder_positions * d * x, m),
        weights("decoder mlp", 2 * decoder_positions * mlp_weights, m),
        weights("logits", 2 * decoder_positions * d * v, 1),
    ]


def minimal_step_flops(config: T5Config, rows: int, encoder: int, decoder: int) -> int:
    """Sum of `step_terms`: forward plus activation gradients, no weight gradients, no padding."""
    return sum(term.forward + term.backward for term in step_terms(config, rows, encoder, decoder))


def forward_flops(config: T5Config, rows: int, encoder: int, decoder: int) -> int:
    """The forward pass alone."""
    return sum(term.forward for term in step_terms(config, rows, encoder, decoder))


def equations(program: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """(equation, how often it runs) of a traced program and of all programs inside it."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation, times
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
                if hasattr(getattr(value, "jaxpr", value), "eqns"):
                    yield from equations(value, inner)


def matmul_flops(program: Any) -> int:
    """FLOPs of all matmuls, a multiply-add counted as 2."""
    total = 0
    for equation, times in equations(program):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * times * math.prod(left[axis] for axis in contracted) * math.prod(out)
    return total
