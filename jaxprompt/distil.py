"""Options of a teacher: a trained prompt whose logits a run's prompt is kept close to.

`trainee` reads the teacher, `steps` adds the distance to what a step minimises.
"""

import dataclasses

from jaxprompt.typing import UserError


@dataclasses.dataclass(frozen=True)
class DistilConfig:
    """A trained prompt of another task as a teacher: PANDA (Zhong et al. 2022, arXiv 2208.10160).

    A squared distance between the logits that the prompt and the teacher's give is added to the
    loss of every target token, times `weight` and the similarity of teacher and task. The distance
    is that of WHU-ZQH/PANDA, with the vocabulary for its classes; there it is divided by the batch
    size once more, dropout is on in the teacher too and the similarity a number given by hand.

    Attributes:
      prompt: the teacher, a soft prompt of the same backbone and length; empty = none.
      weight: of the distance; the code's.
      target: a prompt trained on this run's task, whose `average-tokens` similarity to the
        teacher, as `jaxprompt transfer` tells it, scales the weight; empty = 1.
    """

    prompt: str = ""
    weight: float = 0.1
    target: str = ""

    def __post_init__(self):
        if self.weight <= 0:
            raise UserError(f"distil.weight is {self.weight}, it has to be above 0")
        if self.target and not self.prompt:
            raise UserError("distil.target is given, but no distil.prompt to compare it with")
