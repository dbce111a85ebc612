"""Several reward models as one that is wary where they disagree.

Trained from other seeds they agree on what the rankings taught and differ elsewhere, which is where
PPO would go to be overpaid. The score is their mean less a coefficient times their standard
deviation (Coste et al. 2023, arXiv:2310.02743, whose penalty is the variance).
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Ensemble:
    """Reward models, and how their scores become one.

    Pairs settle a score up to a constant, which is another one in each model: `offsets` takes it
    off.

    Attributes:
        members: the models.
        penalty: standard deviations of the members that are taken off their mean.
        offsets: taken off each member's scores: its mean over the starting policy's answers.
    """

    members: list[PreTrainedModel]
    penalty: float
    offsets: list[float]

    def combine(self, scores: Tensor) -> Tensor:
        """(M, B) scores of the members -> (B,): mean less penalty times standard deviation.

        The deviation is that of these members, divided by M. Members with offsets 0 that say 1 and
        3, at penalty 0.5: 2 - 0.5 x 1 = 1.5.
        """
        centred = scores - scores.new_tensor(self.offsets)[:, None]
        return centred.mean(0) - self.penalty * centred.std(0, correction=0)
