"""What can be set of the rankings and of the model that learns from them."""

from dataclasses import dataclass, field
from pathlib import Path

from common.config import require
from common.errors import UserError
from common.stage import LabelledDataConfig

BY_DATA, BY_PEOPLE = "data", "people"


@dataclass
class RankingConfig(LabelledDataConfig):
    """How rankings are collected."""

    policy: str = field(
        default="", metadata={"help": "the model whose answers are ranked; default: the parent"}
    )
    prompts: int = field(default=1500, metadata={"help": "questions to rank answers to"})
    eval_prompts: int = field(default=300, metadata={"help": "questions never trained on"})
    samples_per_prompt: int = field(default=4, metadata={"help": "answers drawn from the policy"})
    labeller: str = field(
        default=BY_DATA,
        metadata={
            "help": "who ranks: data (Arden's judge, who errs; a play's own replies; the rankings "
            "that the data is), a reward model's directory, a file of rankings, or people: "
            "`make rankings` then leaves the answers in answers.jsonl to be given scores"
        },
    )
    noise: float = field(default=0.1, metadata={"help": "how often Arden's labeller errs"})
    rankings: str = field(
        default="", metadata={"help": "where they lie; default: rankings in the output_dir"}
    )

    def __post_init__(self) -> None:
        """The policy is the parent unless said otherwise; the labeller must be there."""
        super().__post_init__()
        require(self, 0, "noise", most=0.5)
        require(self, 1, "prompts", "eval_prompts", "samples_per_prompt")
        self.policy = self.policy or self.model_name_or_path
        if self.labeller not in (BY_DATA, BY_PEOPLE) and not Path(self.labeller).exists():
            raise UserError(
                f"labeller ({self.labeller}) must be {BY_DATA}, {BY_PEOPLE}, or the path of a "
                "reward model or of a file of rankings: there is none"
            )

    @property
    def labeller_is_model(self) -> bool:
        """Whether another reward model ranks."""
        return (Path(self.labeller) / "config.json").exists()

    def folder(self, output_dir: str | None) -> Path:
        """Where the rankings of a stage lie; what people are to rank lies beside them."""
        name = "answers" if self.labeller == BY_PEOPLE else "rankings"
        return Path(self.rankings) if self.rankings else Path(str(output_dir)) / name


@dataclass
class RewardModelConfig(RankingConfig):
    """How the model learns from the rankings."""

    pairs_together: bool = field(
        default=False,
        metadata={
            "help": "a batch element is a prompt with all its pairs, each answer read once; "
            "per_device_train_batch_size counts prompts then"
        },
    )
    answer_logprobs: bool = field(
        default=False,
        metadata={"help": "score also by how likely the model finds the answer itself"},
    )
    margins: float = field(
        default=0.0,
        metadata={
            "help": "ask for score differences of at least so many times the `margin` given; 0: no"
        },
    )

    def __post_init__(self) -> None:
        """As of the rankings, and margins that ask for the better answer."""
        super().__post_init__()
        require(self, 0, "margins")
