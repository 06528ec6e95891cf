"""Makes generate.npz: what transformers' `generate` answers for the tests of generation.

Run it with torch installed, `PYTHONPATH=tests python tests/golden/make_generate_golden.py`, when a
family or a search of `tests/searches.py` is added or changed. The weights are drawn there by numpy
and not kept, but for a sum that shows whether they are the same.
"""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import searches


def make() -> None:
    batch = searches.make_batch(rows=7)
    arrays, eos_ids = {}, {}
    for family, (_, seeds) in searches.ANSWERED.items():
        config = searches.make_config(family)
        with tempfile.TemporaryDirectory() as directory:
            models = [
                searches.torch_model(family, config, seed, Path(directory, str(seed))).double()
                for seed in seeds
            ]
        # an end token that is said in the middle of many answers; of one program, the same
        greedy = [searches.theirs(m, batch, searches.EVERYWHERE["greedy"], -1)[0] for m in models]
        middle = Counter(np.stack(greedy)[:, :, 2:-2].ravel().tolist())
        often = next(token for token, _ in middle.most_common() if token > 0)
        eos_id = eos_ids.setdefault(config, often)
        arrays[f"{family}/eos_id"] = np.array(eos_id)
        arrays[f"{family}/weights"] = np.array(
            [searches.weight_sum(searches.make_params(config, seed)) for seed in seeds]
        )
        for label, search in searches.searches_of(family).items():
            exact = [searches.theirs(model, batch, search, eos_id) for model in models]
            single = [searches.theirs(model.float(), batch, search, eos_id) for model in models]
            for model in models:
                model.double()
            ids, scores = (np.stack(both) for both in zip(*exact, strict=True))
            rounded, _ = (np.stack(both) for both in zip(*single, strict=True))
            # where rounding decides, equality would say nothing
            assert np.array_equal(ids, rounded), f"{family} {label}: choose other seeds"
            arrays[f"{family}/{label}/ids"] = ids.astype(np.int8)
            if search.num_beams > 1:
                arrays[f"{family}/{label}/scores"] = scores.astype(np.float32)
    np.savez_compressed(searches.GOLDEN, **arrays)


if __name__ == "__main__":
    make()
