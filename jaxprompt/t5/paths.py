"""Ways to compute the attention of whole rows, and the one place that picks one: `choose`.

`Plain` holds all scores of all rows at once, `rowwise.Rowwise` those of one row, `chunks.Chunked`
those of some queries and `windows.Windowed` of those only what their segments see. Called by
`t5.model`.
"""

from collections.abc import Callable
from typing import Any, Protocol

from jaxprompt.t5.attention import attend
from jaxprompt.t5.chunks import CHUNK, Chunked
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.rowwise import BLOCK, Rowwise
from jaxprompt.t5.sight import Sight
from jaxprompt.t5.windows import Windowed
from jaxprompt.typing import Array, ArrayTree, KeysValues

LONG = {"cpu": 2048, "gpu": 1024, "tpu": 512}  # keys from which "auto" takes chunks, by platform
PACKED = {"cpu": 768}  # keys from which it takes windows, where rows hold several segments


class Path(Protocol):
    """A way to compute attention over the rows of one `Sight`."""

    def prepare(self, table_HR: Array | None) -> Any:
        """What `__call__` wants to know of the relative bias; None = there is none."""
        ...

    def __call__(
        self,
        query_BTHK: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        prepared: Any,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """Attention as `attention.attend` defines it, [B, T, H, K]."""
        ...


class Plain:
    """All scores at once; mask and (shared) bias are made once a stack."""

    def __init__(self, sight: Sight):
        self.sight = sight
        self.mask_BTS = sight.mask(0, sight.query_segments_BT)

    def prepare(self, table_HR: Array | None) -> Array | None:
        """The whole bias, [H, T, S], or [B, H, T, S] where prefixes have one too."""
        if table_HR is None:
            return None
        return self.sight.bias(table_HR)

    def __call__(
        self,
        query_BTHK: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        prepared: Array | None,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """As `Path`."""
        return attend(
            query_BTHK, key_BSHK, value_BSHK, prepared, self.mask_BTS, dropout_rate, dropout_key
        )


PATHS: dict[str, Callable[[Sight], Path]] = {
    "plain": Plain,
    "chunked": Chunked,
    "windowed": Windowed,
    "rowwise": Rowwise,
}


def choose(
    compute: Compute, sight: Sight, segments: int = 1, heads: int = 0, has_dropout: bool = False
) -> Path:
    """The path for these rows.

    Args:
      compute: its `attention`; "auto" takes windows or chunks where there are at least two chunks
        and rows are long for the platform, windows only on one device: their loop goes row by row.
        On TPU rows whose scores stay in fast memory are taken one by one, not in chunks, but not
        with prefixes before the text: their bias is another in every row.
      segments: how many examples a row may hold.
      heads: of the whole backbone; 0 = unknown, and never row by row.
      has_dropout: whether weights of attention are dropped.
    """
    if compute.attention == "rowwise":
        return Chunked(sight) if sight.before_text else Rowwise(sight, compute.mesh)
    if compute.attention != "auto":
        return PATHS[compute.attention](sight)
    queries, keys = sight.query_segments_BT.shape[1], sight.key_segments_BS.shape[1]
    platform = compute.platform
    if queries <= CHUNK:
        return Plain(sight)
    one_device = not compute.is_spread
    if one_device and segments > 1 and not sight.prefix and keys >= PACKED.get(platform, keys + 1):
        return Windowed(sight)
    if keys < LONG.get(platform, LONG["gpu"]):
        return Plain(sight)
    own_heads = heads // (1 if compute.mesh is None else compute.mesh.shape["model"])
    fits = 0 < own_heads * queries * keys * 4 <= BLOCK
    if platform == "tpu" and fits and not has_dropout and not sight.before_text:
        return Rowwise(sight, compute.mesh)
    return Chunked(sight)


def path_of(
    compute: Compute,
    config: T5Config,
    sight: Sight,
    prefix: KeysValues | None,
    prompt_index_BG: Array,
    has_dropout: bool,
) -> Path:
    """How a stack's attention is computed, with the keys of its trained prefixes in sight."""
    if prefix is not None:
        sight = sight.behind_prefix(
            prefix.keys.shape[2], prompt_index_BG, prefix.mask_QP, prefix.before_text
        )
    return choose(compute, sight, prompt_index_BG.shape[1], config.num_heads, has_dropout)


def shared_bias_of(config: T5Config, path: Path, stack: ArrayTree) -> Any:
    """What the path wants of a bias that all layers share; None where each has its own."""
    if config.per_layer_relative_bias:
        return None
    return path.prepare(stack["relpos_bias"]["rel_embedding"])


def layer_bias(path: Path, p: ArrayTree, shared: Any) -> Any:
    """The same for a layer, whose own parameters are `p`."""
    return path.prepare(p["relpos_bias"]["rel_embedding"]) if shared is None else shared
