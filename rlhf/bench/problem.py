"""What the bench trains on: a random policy, prompts, and a reward model made by hand.

The reward is the share of "good" tokens in a completion, given by a sequence-classification model
of the policy's size, so that scoring costs what it costs in earnest. Its first layer attends evenly
to all tokens and so takes the mean of a mark (+1 good, -1 not) that the embeddings hold; what its
other layers compute is multiplied by 0. Prompts have no good token.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

FIRST_TOKEN = 2  # after pad 0 and eos 1
CONST, MARK, MEAN = 0, 1, 2  # what dimensions of the reward model's states hold


@dataclass(frozen=True)
class Problem:
    """Sizes, and the settings that both trainers share."""

    vocab_size: int
    hidden_size: int = 128
    layers: int = 2
    prompts: int = 4096
    prompt_tokens: int = 16  # the longest
    completion_tokens: int = 16  # the longest
    varied: bool = False  # lengths up to the longest, completions of a third of it in the mean
    completions: int = 64  # an update
    micro_batch: int = 64
    learning_rate: float = 1e-3
    kl_coef: float = 0.01
    passes: int = 4  # over a rollout
    mini_batches: int = 1  # optimizer steps a pass
    share_trunk: bool = False
    seed: int = 0

    @property
    def accumulation(self) -> int:
        """Micro-batches a mini-batch."""
        return self.completions // self.mini_batches // self.micro_batch

    @property
    def good(self) -> range:
        """Tokens that are rewarded, a tenth of the vocabulary."""
        return range(FIRST_TOKEN, FIRST_TOKEN + self.vocab_size // 10)


def read(folder: Path, name: str) -> Problem:
    """The problem as one of the trainers is to take it."""
    return Problem(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def write(problem: Problem, folder: Path, name: str) -> None:
    """Write the settings of one of the trainers."""
    text = json.dumps(asdict(problem), indent=2)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def create(problem: Problem, folder: Path) -> None:
    """Write `policy/`, `reward/` and `prompts.json`, token ids, to a folder."""
    torch.manual_seed(problem.seed)
    config = Qwen3Config(
        vocab_size=problem.vocab_size,
        hidden_size=problem.hidden_size,
        intermediate_size=4 * problem.hidden_size,
        num_hidden_layers=problem.layers,
        num_attention_heads=problem.hidden_size // 32,
        num_key_value_heads=problem.hidden_size // 32,
        head_dim=32,
        max_position_embeddings=problem.prompt_tokens + problem.completion_tokens,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    policy = Qwen3ForCausalLM(config)
    set_end(policy, problem)
    reward = reward_model(config, problem)
    for name, model in {"policy": policy, "reward": reward}.items():
        model.save_pretrained(folder / name)
        tokenizer(problem.vocab_size).save_pretrained(folder / name)
    rows = []
    for _ in range(problem.prompts):
        length = torch.tensor(problem.prompt_tokens)
        if problem.varied:  # log-normal, a median of a quarter of the longest
            length = (torch.randn(()) * 0.8).exp() * problem.prompt_tokens / 4
        length = length.round().clamp(2, problem.prompt_tokens)
        rows.append(torch.randint(problem.good.stop, problem.vocab_size, (int(length),)).tolist())
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")


@torch.no_grad()
def set_end(policy: Qwen3ForCausalLM, problem: Problem) -> None:
    """Never draw pad, which TRL 1.12 takes for padding; draw end-of-text as the problem says.

    All embeddings get one constant, which stands out in the last hidden states too; with tied
    weights, what a token has of it is what all its logits are shifted by.
    """
    embeddings = policy.model.embed_tokens.weight
    embeddings[:, CONST] = 0.3
    hidden = policy.model(input_ids=torch.tensor([[FIRST_TOKEN]])).last_hidden_state[0, 0, CONST]
    embeddings[0, CONST] = -20 / hidden  # e^-20 as likely as others
    if problem.varied:
        likelier = math.log(3 * problem.vocab_size / problem.completion_tokens)
        embeddings[1, CONST] += likelier / hidden


@torch.no_grad()
def reward_model(config: Qwen3Config, problem: Problem) -> Qwen3ForSequenceClassification:
    """Score = share of good tokens in a completion of the longest length, prompt of the longest."""
    config.num_labels = 1
    model = Qwen3ForSequenceClassification(config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.q_norm.weight.fill_(0.01)  # all keys alike: attention is a mean
    embeddings = model.model.embed_tokens.weight
    embeddings[:, : MEAN + 1] = torch.tensor([1.0, -1.0, 0.0])
    embeddings[problem.good, MARK] = 1.0
    first = model.model.layers[0].self_attn
    first.v_proj.weight[0] = 0.0
    first.v_proj.weight[0, MARK] = 1.0
    first.o_proj.weight[MEAN, 0] = 0.02  # small beside the constant, by which the last norm divides
    # Of one good token the mean is 1. The mean of the marks is 2 x the share of good tokens - 1.
    states = model.model(input_ids=torch.tensor([[FIRST_TOKEN]])).last_hidden_state[0, 0]
    whole = (problem.prompt_tokens + problem.completion_tokens) / problem.completion_tokens
    model.score.weight.zero_()
    for dimension in (MEAN, CONST):
        model.score.weight[0, dimension] = whole / 2 / states[dimension]
    return model


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words t2, t3, ... between spaces; pad 0, eos 1."""
    words = ["<pad>", "<eos>"] + [f"t{i}" for i in range(FIRST_TOKEN, vocab_size)]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
