"""Recipes: all that a paper or a released code fixed about training, by name."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to train, complete.

    Attributes:
      summary: one line for people.
      source: the paper or code it follows.
      optimizer: "adafactor" or "adamw".
      learning_rate: the peak rate. Adafactor: RMS of one update, if its parameter scale is off.
      schedule: a name of `SCHEDULES`.
      warmup_steps: linear rise, or for "rsqrt" the plateau; a recipe's own is cut to a tenth of the
        run, a user's is not.
      weight_decay: adafactor: the fraction of a parameter taken off every step, NOT times the rate
        (as T5X does); adamw: that times the learning rate.
      clip_norm: gradients are scaled to at most this global norm; 0 = never.
      parameter_scale: the update is multiplied by the parameter's RMS, at least 1e-3.
      decay_rate: adafactor: exponent of the second moment's decay, 1 - (t + 1) ** -decay_rate.
      start_step: adafactor: t of the first update.
      factored: adafactor: row and column means for the second moment where both sizes >= 128.
      beta1, beta2, epsilon: adamw.
      learning_rates: rates of parameters by name, such as {"right": 0.001} of DePT, in place of
        `learning_rate`; schedule and warm-up are the same.
      length, init, init_low, init_high: of the prompt; the last two bound its init "uniform".
      batch_size, steps, dropout, z_loss: of the run.
    """

    summary: str
    source: str
    optimizer: str
    learning_rate: float
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    parameter_scale: bool = False
    decay_rate: float = 0.8
    start_step: int = 0
    factored: bool = True
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    length: int = 100
    init: str = "labels"
    init_low: float = -0.5
    init_high: float = 0.5
    batch_size: int = 32
    steps: int = 30_000
    dropout: float = 0.0
    z_loss: float = 0.0


RECIPES: dict[str, Recipe] = {
    "paper": Recipe(
        summary="soft prompts as the paper says",
        source="Lester et al. 2021, section 3",
        optimizer="adafactor",
        learning_rate=0.3,
        weight_decay=1e-5,
        factored=False,
    ),
    "google-oss": Recipe(
        summary="soft prompts as the released code really runs",
        source="google-research/prompt-tuning with T5X: the second moment starts at zero at step "
        "1.1M, so the RMS clip acts in every step; uniform init is [0, 0.5)",
        optimizer="adafactor",
        learning_rate=0.3,
        weight_decay=1e-5,
        start_step=1_100_000,
        init_low=0.0,
        batch_size=128,
        steps=50_000,
        dropout=0.1,
        z_loss=1e-4,
    ),
    "adamw": Recipe(
        summary="soft prompts as most code for torch trains them",
        source="Residual Prompt Tuning (rate 0.3, decay 1e-5), DePT (500 steps of warm-up, linear)",
        optimizer="adamw",
        learning_rate=0.3,
        schedule="linear",
        warmup_steps=500,
        weight_decay=1e-5,
        init="vocab",
    ),
    "residual": Recipe(
        summary="residual prompt tuning",
        source="arazd/ResidualPrompts, the code's defaults; it counts 20 epochs",
        optimizer="adamw",
        learning_rate=0.3,
        weight_decay=1e-5,
        init="vocab",
        batch_size=8,
    ),
    "p-tuning-v2": Recipe(
        summary="keys and values of their own, no network",
        source="THUDM/P-tuning-v2, rates 5e-3 to 7e-3 by task",
        optimizer="adamw",
        learning_rate=5e-3,
        schedule="linear",
        init="vocab",
    ),
    "prefix": Recipe(
        summary="prefix tuning through its network",
        source="XiangLi1999/PrefixTuning, the code's defaults; it counts 30 epochs",
        optimizer="adamw",
        learning_rate=5e-5,
        schedule="linear",
        init="vocab",
    ),
    "dept": Recipe(
        summary="DePT and ADePT: the low-rank part slower than the prompt",
        source="ZhengxiangShi/DePT: prompt 0.3 to 0.4, low rank 1e-4 to 5e-3; 500 steps of warm-up",
        optimizer="adamw",
        learning_rate=0.3,
        schedule="linear",
        warmup_steps=500,
        weight_decay=1e-5,
        learning_rates={"left": 5e-4, "left_bias": 5e-4, "right": 5e-4, "right_bias": 5e-4},
        init="vocab",
        batch_size=16,
    ),
    "smop": Recipe(
        summary="SMoP",
        source="jyjohnchoi/SMoP: rate 0.5, 6 % of the steps (here of 30,000) as warm-up, decay "
        "1e-5 times the rate; it counts 50 epochs",
        optimizer="adafactor",
        learning_rate=0.5,
        schedule="linear",
        warmup_steps=1_800,
        weight_decay=5e-6,
        init="vocab",
    ),
    "attempt": Recipe(
        summary="ATTEMPT over trained prompts of other tasks",
        source="AkariAsai/ATTEMPT, its config of a single task; it counts 20 epochs",
        optimizer="adamw",
        learning_rate=0.3,
        schedule="linear",
        warmup_steps=500,
        init="vocab",
    ),
    "mpt": Recipe(
        summary="MPT on a target task: the shared part slower than the task's",
        source="Wang et al. 2023, appendix, from memory: 0.3 and 0.4, with several sources 0.3 "
        "for all; batch 32 of T5-base; AdamW and 500 steps of warm-up as in other code for torch",
        optimizer="adamw",
        learning_rate=0.3,
        schedule="linear",
        warmup_steps=500,
        weight_decay=1e-5,
        learning_rates={"left": 0.4, "right": 0.4},
        init="vocab",
    ),
    "model-tuning": Recipe(
        summary="all parameters, the baseline prompts are compared with",
        source="T5 fine-tuning: Raffel et al. 2020, section 3.1.2; T5X finetune defaults",
        optimizer="adafactor",
        learning_rate=1e-3,
        parameter_scale=True,
        length=0,
        batch_size=128,
        dropout=0.1,
        z_loss=1e-4,
    ),
    "t5-pretrain": Recipe(
        summary="pretraining as T5 did it",
        source="Raffel et al. 2020, section 3.1.2: rate 1 / sqrt(max(step, 10,000)); steps of T5's "
        "baseline, 2 ** 19",
        optimizer="adafactor",
        learning_rate=1e-2,
        schedule="rsqrt",
        warmup_steps=10_000,
        parameter_scale=True,
        length=0,
        batch_size=128,
        steps=524_288,
        z_loss=1e-4,
    ),
    "pretrain": Recipe(
        summary="pretraining in few steps, for small models and budgets",
        source="nanoT5 (Nawrot 2023): AdamW times the parameter's RMS, cosine; there better than "
        "Adafactor with rsqrt",
        optimizer="adamw",
        learning_rate=2e-2,
        schedule="cosine",
        warmup_steps=10_000,
        clip_norm=1.0,
        parameter_scale=True,
        length=0,
        batch_size=144,
        steps=65_536,
    ),
}


def describe(name: str) -> str:
    """One line on a recipe."""
    recipe = RECIPES[name]
    parts = [
        f"{recipe.optimizer} {recipe.learning_rate:g} {recipe.schedule}",
        f"weight decay {recipe.weight_decay:g}",
        f"{recipe.steps:,} steps of {recipe.batch_size}",
        f"dropout {recipe.dropout:g}",
    ]
    if recipe.length:
        parts.insert(0, f"{recipe.length} slots from {recipe.init}")
    return f"{name}: {recipe.summary} ({', '.join(parts)}). Source: {recipe.source}"
