"""Attention row by row: all scores of one row at a time, on every device of its own rows and heads.

`Rowwise` is one of the paths that `t5.paths.choose` picks from.
"""

import dataclasses

import jax
from jax.sharding import Mesh

from jaxprompt.sharding import partition_spec
from jaxprompt.t5.attention import attend
from jaxprompt.t5.sight import Sight
from jaxprompt.typing import Array, UserError

BLOCK = 32 * 2**20  # bytes of float32 scores of one row that stay in a TPU's VMEM (128 MiB on v5e)


class Rowwise:
    """Scores, mask and softmax of one row, computed again in the backward pass.

    Where a row's scores stay in fast memory nothing is gained by cutting its queries, and gradients
    of keys and values need no adding up over chunks. Rows lie over `data` and heads over `model`,
    so each device goes through its own: a loop that the partitioner saw would be one over all rows.
    Without dropout.
    """

    def __init__(self, sight: Sight, mesh: Mesh | None = None):
        self.sight = sight
        self.mesh = mesh

    def prepare(self, table_HR: Array | None) -> Array | None:
        """The whole bias, [H, T, S], in the dtype of the table: half the fast memory, and exact."""
        return None if table_HR is None else self.sight.bias(table_HR).astype(table_HR.dtype)

    def __call__(
        self,
        query_BTHK: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        prepared: Array | None,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """As `Path`; raises UserError for dropout."""
        if dropout_rate and dropout_key is not None:
            raise UserError(
                "backbone.attention=rowwise has no dropout; set backbone.dropout=0, or leave "
                "backbone.attention out"
            )

        def own_rows(rows: tuple[Array, ...], bias_HTS: Array | None) -> Array:
            def row(one: tuple[Array, ...]) -> Array:
                query, key, value, query_segments, key_segments = (x[None] for x in one)
                sight = dataclasses.replace(
                    self.sight, query_segments_BT=query_segments, key_segments_BS=key_segments
                )
                return attend(query, key, value, bias_HTS, sight.mask(0, query_segments))[0]

            return jax.lax.map(jax.checkpoint(row, prevent_cse=False), rows)

        segments = self.sight.query_segments_BT, self.sight.key_segments_BS
        rows = (query_BTHK, key_BSHK, value_BSHK, *segments)
        if self.mesh is None or self.mesh.size == 1:
            return own_rows(rows, prepared)
        heads = partition_spec(("batch", "length", "heads", "kv"))
        ids = partition_spec(("batch", "length"))
        bias = None if prepared is None else partition_spec(("heads", "length", "length"))
        return jax.shard_map(
            own_rows,
            mesh=self.mesh,
            in_specs=((heads, heads, heads, ids, ids), bias),
            out_specs=heads,
        )(rows, prepared)
