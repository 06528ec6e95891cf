"""Makes authors.npz: what the classes of two papers' code answer, for `test_method_oracles.py`.

Their repositories are no libraries, and their files want other programs' old versions, so the two
classes are taken out of them and run by themselves, on CPU:
ResMLP of github.com/arazd/ResidualPrompts (prompt_tuner.py, commit 2b90371) and
PromptRoutingEmbedding of github.com/jyjohnchoi/SMoP (peft_models/tuners/prompt_routing.py, commit
a0e299d). Run `python tests/golden/make_authors_golden.py prompt_tuner.py prompt_routing.py`.
"""

import ast
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS, WIDTH, HIDDEN, PROMPTS, LENGTH = 4, 12, 6, 3, 3


def classes(path: str, *names: str) -> dict[str, Any]:
    """Classes of a file, without what it imports and does beside them."""
    text = Path(path).read_text(encoding="utf-8").replace("device='cuda'", "device='cpu'")
    wanted = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name in names
    ]
    space: dict[str, Any] = {"torch": torch, "nn": torch.nn, "defaultdict": defaultdict}
    space["PromptRoutingInit"] = types.SimpleNamespace(TEXT="TEXT")
    exec(compile(ast.Module(wanted, []), path, "exec"), space)
    return space


def shaken(module: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Random weights, by name."""
    torch.manual_seed(seed)
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    return {name: weight.detach().numpy() for name, weight in module.named_parameters()}


def make(residual: str, smop: str) -> None:
    arrays = {}
    make_network = classes(residual, "ResMLP")["ResMLP"]
    for layer_norm in (True, False):
        network = make_network(HIDDEN, emb_dimension=WIDTH, layer_norm=layer_norm)
        weights = shaken(network, seed=0)
        rows = torch.randn(ROWS, WIDTH)
        case = "residual" if layer_norm else "residual plain"
        arrays |= {f"{case}/{name}": weight for name, weight in weights.items()}
        arrays[f"{case}/prompt"], arrays[f"{case}/made"] = rows, network(rows).detach()
    config = types.SimpleNamespace(
        num_virtual_tokens_full=PROMPTS * LENGTH, num_virtual_tokens=LENGTH, token_dim=WIDTH,
        prompt_routing_init="RANDOM", perturb_router=True, routing_level="prompt", topk=1,
        central_prompt=False, stochastic=False, load_balancing=True, gumbel=False,
    )  # fmt: skip
    space = classes(smop, "PromptRoutingEmbedding", "GaussianNoise")
    routing = space["PromptRoutingEmbedding"](config, None).eval()
    arrays |= {f"smop/{name}": weight for name, weight in shaken(routing, seed=1).items()}
    embeds, mask = (
        torch.randn(4, 5, WIDTH),
        torch.tensor([[1] * n + [0] * (5 - n) for n in (5, 3, 1, 4)]),
    )
    with torch.no_grad():
        alone = [routing(None, None, embeds[n : n + 1], mask[n : n + 1]) for n in range(4)]
        together = routing(None, None, embeds, mask)
    # Of several rows at once it gives each the sum of what all have picked, times its own weight:
    # values [B, 1, 1, 1] times rows [B, P, D] is [B, B, P, D]. The paper's is each row's own.
    means = (embeds * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    weights = routing.router(means).max(-1).values
    picked = sum(one[0] / weight for one, weight in zip(alone, weights, strict=True))
    assert torch.allclose(together, weights[:, None, None] * picked, atol=1e-5)
    arrays |= {"smop/embeds": embeds, "smop/mask": mask, "smop/made": torch.cat(alone)}
    np.savez_compressed(Path(__file__).parent / "authors.npz", **arrays)


if __name__ == "__main__":
    make(*sys.argv[1:])
