"""A loaded backbone: architecture, frozen parameters, tokenizer and identity in one object.

`load_backbone` is the only way in, for a packaged name, a hub name or a directory alike.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxprompt.artifact import BackboneIdentity
from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer
from jaxprompt.quantize import check_kind, take
from jaxprompt.sharding import to_host, tree_shardings
from jaxprompt.t5.backbones import fingerprint, read_config, resolve_backbone
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.layers import param_specs
from jaxprompt.t5.model import T5
from jaxprompt.t5.weight_files import open_weights
from jaxprompt.t5.weights import load_params
from jaxprompt.typing import ArrayTree, UserError


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen T5 ready to be prompted.

    Attributes:
      name: what the user called it.
      directory: where its files are.
      fingerprint: identity of its weights, see `t5.backbones.fingerprint`.
      config, compute: what it is and how it is computed.
      params: nested dict of device arrays, some of them QArrays if it is quantised.
      tokenizer: its vocabulary.
      quantize: "none", "int8" or "int4".
    """

    name: str
    directory: Path
    fingerprint: str
    config: T5Config
    compute: Compute
    params: ArrayTree
    tokenizer: Tokenizer
    quantize: str = "none"

    def module(self) -> T5:
        """The NNX module around the parameters."""
        return T5(self.config, self.params, self.compute)

    def embedding_rows(self, ids: Sequence[int]) -> np.ndarray:
        """Rows of the embedding table, float32 [len(ids), D]."""
        table = self.params["token_embedder"]["embedding"]
        return np.asarray(to_host(take(table, jnp.asarray(ids), "float32")), np.float32)


def load_backbone(
    name: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    mesh: Mesh | None = None,
    weights_over_data: bool = False,
    compute: Compute | None = None,
    param_dtype: str | None = None,
    quantize: str | None = None,
) -> Backbone:
    """Loads a T5 by packaged name, local directory or hub name.

    Args:
      name: "jaxprompt-mini", a directory with a `config.json`, or a hub name.
      dtype: of weights and activations; ignored if `compute` is given.
      revision: of a hub name.
      mesh: shards the parameters, and activations, by their logical axes.
      weights_over_data: divide the parameters over the mesh's `data` as well.
      compute: everything about how it runs.
      param_dtype: of the parameters in memory; None = the compute dtype, which is what a frozen
        backbone wants (trained ones are kept in float32).
      quantize: "int8" matrices (a scale for each output channel) or "int4" (one for each group of
        its inputs); norms, relative biases and activations stay float. None = as the weights are
        stored; "none" = float, however they are stored.
    Raises: UserError for a name that cannot be found, files that do not fit each other, or a
      tokenizer with more tokens than the embedding table has rows.
    """
    check_kind(quantize)
    compute = dataclasses.replace(compute or Compute(dtype=dtype), mesh=mesh)
    directory = resolve_backbone(name, revision)
    config = read_config(directory)
    tokenizer = load_tokenizer(directory)
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.size} tokens, the backbone's embedding "
            f"table {config.vocab_size} rows; they do not belong together"
        )
    kind = quantize or open_weights(directory).quantize
    specs = param_specs(config, kind)
    params = load_params(
        directory,
        config,
        dtype=param_dtype or compute.dtype,
        quantize=kind,
        shardings=None if mesh is None else tree_shardings(mesh, specs, weights_over_data),
    )
    identity = fingerprint(directory, config)
    return Backbone(name, directory, identity, config, compute, params, tokenizer, kind)


def identity_of(backbone: Backbone) -> BackboneIdentity:
    """What an artifact remembers of its backbone."""
    return BackboneIdentity(
        backbone.name, backbone.fingerprint, backbone.config.d_model, backbone.config.vocab_size
    )
