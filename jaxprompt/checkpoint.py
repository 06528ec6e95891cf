"""Checkpoints of a run: the trained parameters, optimizer state, random key and data position.

The only file that touches Orbax. `train` and `pretrain` save through it and resume from it. One
checkpoint is a directory `step_00000030/` with `state/` (Orbax) and `manifest.json` (what is in it,
the digest of every file, the run's metadata); it appears under that name complete or not at all.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxprompt import files, hosts
from jaxprompt.identity import check_identity
from jaxprompt.sharding import to_host
from jaxprompt.typing import ArrayTree, UserError

_FORMAT_VERSION = 1
_STEP = re.compile(r"^step_(\d{8,})$")
_STATE = "state"
_MANIFEST = "manifest.json"
_SHOWN = 3  # names listed in one message

# Its threads also log, with a traceback, the exception that a failed save raises.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "/orbax/" in record.pathname)
)


class _DamagedError(Exception):
    """A checkpoint that cannot be used; the text says why."""


@dataclasses.dataclass(frozen=True)
class _Manifest:
    leaves: dict[str, dict[str, Any]]
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run's directory.

    Saves run in the background, one at a time, and none is skipped. A failed one is raised by the
    next `save`, `wait` or `close`; it leaves nothing behind, and what was saved before stays. Every
    process of a run makes the same calls; the first one alone reads and writes the directory, and
    tells the others.

    Args:
      directory: made by the first save.
      keep: how many of the newest to keep, at least 1; two, so that one may be damaged.
    Raises: UserError if the directory is a file.
    """

    def __init__(self, directory: files.PathLike, keep: int = 2) -> None:
        self.directory = Path(directory).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(
                f"{directory} is a file; checkpoints need a directory, name another one"
            )
        if keep < 1:
            raise UserError(f"keep is {keep}; at least 1 checkpoint has to be kept")
        self._keep = keep
        self._newest: int | None = None
        self._damaged: set[int] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint under its final name, oldest first."""
        if not self.directory.is_dir():
            return []
        matches = (_STEP.match(entry.name) for entry in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(
        self, step: int, state: Mapping[str, ArrayTree], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Starts saving; returns when the arrays are copied to the host.

        Another save that still runs is waited for first. The arrays may be donated afterwards.

        Args:
          step: number of finished training steps.
          state: trees by name, `{"trained": ..., "opt_state": ..., "rng": key data}`; any pytree of
            arrays, random keys as their uint32 data.
          metadata: JSON data kept beside them; `metadata["identity"]` says what the run is (see
            `check_identity`).
        Raises: UserError if an earlier save failed, if this one cannot start, or if the directory
          holds later steps that were not restored.
        """
        self.wait()
        leaves = _to_host(_flatten(dict(state)))
        if not hosts.is_first():
            return
        self._claim(step)
        manifest = {
            "format_version": _FORMAT_VERSION,
            "step": step,
            "leaves": {path: _description(leaf) for path, leaf in leaves.items()},
            "metadata": json.loads(json.dumps(metadata or {})),
        }
        temporary = self._temporary_path(step)
        try:
            files.remove_directory(temporary)
            files.make_directory(temporary)
            with _alone() if jax.process_count() > 1 else contextlib.nullcontext():
                response = ocp.save_checkpointables_async(str(temporary / _STATE), {_STATE: leaves})
        except Exception as error:
            raise self._failure(step, error) from error
        self._pending = self._thread.submit(self._finish, step, manifest, response)
        self._newest = step

    def wait(self) -> None:
        """Returns when no save is running.

        Raises: UserError if one failed since the last call, for example because the disk is full.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the running save and ends the background thread; may be called again.

        Raises: UserError if a save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore_latest(
        self, abstract: Mapping[str, ArrayTree], identity: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, ArrayTree], dict[str, Any]] | None:
        """Restores the newest checkpoint that is whole; warns of each newer one that is not.

        Args:
          abstract: trees of the same structure as were saved: arrays or ShapeDtypeStructs. Leaves
            with a sharding come back as jax Arrays so sharded, the others, and in a run of several
            processes all, as numpy arrays.
          identity: if given, compared with the saved run's before anything is loaded.
        Returns: (step, state, metadata), or None if there is no checkpoint.
        Raises: UserError if none of those there is whole, if the identity differs, or if the saved
          leaves are not those of `abstract`, naming them.
        """
        if jax.process_count() == 1:
            return self._restore(abstract, identity)

        def read() -> tuple[Any, list[np.ndarray]]:
            bare = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), dict(abstract))
            found = self._restore(bare, identity)
            if found is None:
                return None, []
            step, state, metadata = found
            return [step, metadata], jax.tree.leaves(state)

        found, leaves = hosts.from_first(read)
        if found is None:
            return None
        step, metadata = found
        return step, jax.tree.unflatten(jax.tree.structure(dict(abstract)), leaves), metadata

    def _restore(
        self, abstract: Mapping[str, ArrayTree], identity: Mapping[str, Any] | None
    ) -> tuple[int, dict[str, ArrayTree], dict[str, Any]] | None:
        reasons = []
        for step in reversed(self.steps()):
            try:
                manifest = _verify(self._path(step), step)
                if identity is not None:
                    saved = manifest.metadata.get("identity", {})
                    check_identity(saved, identity, self.directory.parent)
                state = _load(self._path(step) / _STATE, manifest, abstract)
            except _DamagedError as damage:
                reasons.append(f"step {step}: {damage}")
                self._damaged.add(step)
                continue
            for reason in reasons:
                warnings.warn(
                    f"checkpoint of {reason}; going back to step {step}", UserWarning, stacklevel=2
                )
            self._newest = step
            return step, state, manifest.metadata
        if reasons:
            raise UserError(
                f"no checkpoint in {self.directory} is whole ({'; '.join(reasons)}): move the "
                "directory away to start anew"
            )
        return None

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _temporary_path(self, step: int) -> Path:
        return self.directory / f".saving_{step:08d}"

    def _claim(self, step: int) -> None:
        """No later checkpoint may be lost: only damaged ones make room for an earlier step."""
        if self._newest is not None:
            if step < self._newest:
                raise ValueError(f"step {step} saved after step {self._newest}")
            return
        later = [there for there in self.steps() if there > step]
        if later:
            raise UserError(
                f"{self.directory} holds a checkpoint of step {later[-1]}, later than step {step}: "
                "resume from it or use another directory"
            )

    def _finish(self, step: int, manifest: dict[str, Any], response: ocp.AsyncResponse) -> None:
        """In the background: waits for Orbax, makes the checkpoint appear, removes old ones."""
        temporary = self._temporary_path(step)
        try:
            response.result()
            manifest["files"] = _digests(temporary)
            manifest["sha256"] = _digest_of(manifest)
            files.write_file(temporary / _MANIFEST, json.dumps(manifest))
            files.move_directory(temporary, self._path(step))
        except Exception as error:
            raise self._failure(step, error) from error
        self._remove_old(step)

    def _remove_old(self, step: int) -> None:
        """Removes all but the newest `keep`, what was found damaged, and what killed saves left."""
        whole = [there for there in self.steps() if there not in self._damaged or there == step]
        kept = set(whole[-self._keep :])
        for there in self.steps():
            if there not in kept:
                files.remove_directory(self._path(there))
        self._damaged.clear()
        for entry in [*self.directory.glob(".saving_*"), *self.directory.glob(".step_*.previous")]:
            files.remove_directory(entry)
        files.remove_leftovers(self.directory)

    def _failure(self, step: int, error: Exception) -> UserError:
        """Makes room again and says what happened."""
        with contextlib.suppress(UserError):
            files.remove_directory(self._temporary_path(step))
        steps = [there for there in self.steps() if there not in self._damaged]
        last = f"the last good one is step {steps[-1]}" if steps else "there is no earlier one"
        cause = error if isinstance(error, UserError) else files.write_error(self.directory, error)
        return UserError(f"the checkpoint of step {step} was not saved ({last}): {cause}")


def _flatten(tree: ArrayTree) -> dict[str, Any]:
    """Any pytree -> {"a/0/b": leaf}."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(flat) != len(pairs):
        raise ValueError("two leaves of the state have the same path")
    for path, leaf in flat.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{path} is a random key: give jax.random.key_data of it")
    return flat


def _to_host(leaves: dict[str, Any]) -> dict[str, Any]:
    """Copies that later donation cannot touch."""
    return {path: np.array(leaf, order="C") for path, leaf in to_host(leaves).items()}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Orbax in the first of several processes, which would else wait for the others.

    `active_processes` says so to all of Orbax but one check, which compares the directory's name
    with the other processes' whenever there are any.
    """
    context, process_count = ocp.Context(), jax.process_count
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = 0, {0}
    jax.process_count = lambda *_: 1
    try:
        with context:
            yield
    finally:
        jax.process_count = process_count


def _description(leaf: Any) -> dict[str, Any]:
    return {"dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape)}


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below, by relative path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": files.digest(path),
        }
        for path in paths
    }


def _digest_of(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode("utf-8")).hexdigest()


def _verify(directory: Path, step: int) -> _Manifest:
    """Reads every file of a checkpoint and compares it with the manifest."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes().decode("utf-8"))
        intact = manifest["sha256"] == _digest_of(manifest) and manifest["step"] == step
    except FileNotFoundError as error:
        raise _DamagedError(f"{directory.name} has no {_MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{_MANIFEST} cannot be read ({error})") from error
    if not intact:
        raise _DamagedError(f"{_MANIFEST} was changed")
    if manifest["format_version"] > _FORMAT_VERSION:
        raise UserError(f"{directory} was written by a newer jaxprompt: use that one")
    for name, expected in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise _DamagedError(f"{name} is missing")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise _DamagedError(f"{name} has {size} bytes, not {expected['bytes']}")
        if files.digest(path) != expected["sha256"]:
            raise _DamagedError(f"{name} was changed")
    return _Manifest(manifest["leaves"], manifest["metadata"])


def _load(path: Path, manifest: _Manifest, abstract: Mapping[str, ArrayTree]) -> dict[str, Any]:
    """Loads a verified state in the structure of `abstract`."""
    wanted = _flatten(dict(abstract))
    _check_leaves(path.parent, manifest.leaves, wanted)
    targets = {name: _target(leaf) for name, leaf in wanted.items()}
    try:
        with _alone() if jax.process_count() > 1 else contextlib.nullcontext():
            loaded = ocp.load_checkpointables(str(path), {_STATE: targets})[_STATE]
    except Exception as error:
        raise _DamagedError(f"it cannot be loaded ({type(error).__name__}: {error})") from error
    structure = jax.tree.structure(dict(abstract))
    return jax.tree.unflatten(structure, [loaded[name] for name in wanted])


def _target(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_leaves(
    directory: Path, saved: Mapping[str, dict[str, Any]], wanted: Mapping[str, Any]
) -> None:
    wrong = [f"{name} is saved and unknown here" for name in saved if name not in wanted]
    wrong += [f"{name} is not saved" for name in wanted if name not in saved]
    for name in saved.keys() & wanted.keys():
        here = _description(wanted[name])
        if saved[name] != here:
            wrong.append(
                f"{name} is {saved[name]['dtype']} {saved[name]['shape']}, here {here['dtype']} "
                f"{here['shape']}"
            )
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"checkpoint {directory} is not of this run: {'; '.join(sorted(wrong)[:_SHOWN])}{more}"
        )
