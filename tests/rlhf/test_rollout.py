"""Layout of a rollout: padding, splitting and order change nothing."""

from collections.abc import Callable

import pytest
import torch

from rlhf.loss import policy_loss, value_loss
from rlhf.rollout import Rollout, join, plan_micro_batches, plan_reading
from rlhf.trainer import MicroBatch, PPOTrainer


def roll_out(trainer: PPOTrainer, samples: int = 16) -> Rollout:
    """A rollout with advantages, sampled by a trainer that has not trained."""
    torch.manual_seed(0)
    trainer.model.train()
    rollout, _ = trainer._generate_and_score_completions(
        [trainer.train_dataset[i] for i in range(samples)]
    )
    trainer._estimate_advantages(rollout)
    return rollout


def gradients(trainer: PPOTrainer, parts: list[Rollout], tokens: float) -> dict[str, torch.Tensor]:
    """Loss and gradient of one optimizer step over `parts`; the policy moved off its rollout."""
    trainer.model.zero_grad()
    total = torch.zeros(())
    for part in parts:
        loss = trainer.compute_loss(trainer.model, MicroBatch(part, tokens, False))
        loss.backward()
        total += loss.detach()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return {"loss": total, **grads}


def nudge(trainer: PPOTrainer) -> None:
    """Move all weights a little, so that ratios and values differ from the rollout's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn_like(p) * 0.02)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def trained(build: Callable[..., PPOTrainer], reward_path: str) -> tuple[PPOTrainer, Rollout]:
    trainer = build(reward_funcs=reward_path)
    rollout = roll_out(trainer)
    nudge(trainer)
    return trainer, rollout


def test_join_puts_prompt_and_completion_side_by_side() -> None:
    """Broken once: padding between prompt and completion."""
    rollout = join([[5], [6, 7, 8]], [[9, 10, 1], [11]], pad_token_id=0)
    assert rollout.input_ids.tolist() == [[5, 9, 10, 1], [6, 7, 8, 11]]
    assert rollout.completion_mask.tolist() == [[True] * 3, [True, False, False]]
    assert rollout.select(torch.tensor([1])).completion_mask.shape == (1, 1)


def test_plan_uses_each_sample_once_and_sorts_inside_mini_batches() -> None:
    """Broken once: rows sorted over the whole rollout, so mini-batches were not random."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 50, (24,))
    plan = plan_micro_batches(lengths, num_mini_batches=3, micro_batch_size=4)
    assert [len(mini_batch) for mini_batch in plan] == [2, 2, 2]
    rows = torch.cat([rows for mini_batch in plan for rows in mini_batch])
    assert sorted(rows.tolist()) == list(range(24))
    for mini_batch in plan:
        of_mini_batch = lengths[torch.cat(mini_batch)].tolist()
        assert of_mini_batch == sorted(of_mini_batch, reverse=True)
    assert lengths[torch.cat(plan[0])].min() < lengths[torch.cat(plan[1])].max()
    again = plan_micro_batches(lengths, 3, 4)
    assert torch.cat(again[0]).tolist() != torch.cat(plan[0]).tolist()


def test_plan_reads_the_first_mini_batch_as_it_is_trained_on() -> None:
    """And each sample once. Seen to fail with the others unsorted, and with all read together."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 50, (24,))
    plan = plan_micro_batches(lengths, num_mini_batches=3, micro_batch_size=4)
    reading = plan_reading(lengths, plan, batch_size=10)
    assert [len(rows) for rows in reading] == [4, 4, 10, 6]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(reading, plan[0], strict=False))
    assert sorted(torch.cat(reading).tolist()) == list(range(24))
    others = lengths[torch.cat(reading[2:])].tolist()
    assert others == sorted(others, reverse=True)
    assert plan_reading(lengths, plan[:1], batch_size=10) == plan[0]


def test_larger_batches_read_the_same(build: Callable[..., PPOTrainer], reward_path: str) -> None:
    """Unset, the micro-batches. Seen to fail with rows left unread and the option unheeded."""
    rollouts, sizes = [], []
    for rows in (None, 7):
        trainer = build(reward_funcs=reward_path, rollout_forward_batch_size=rows)
        forward, read = trainer._forward, []
        trainer._forward = lambda rollout, rows, f=forward, r=read: (
            r.append(len(rows)),
            f(rollout, rows),
        )
        rollouts.append(roll_out(trainer))
        sizes.append(read)
    assert sizes == [[4, 4, 4, 4], [4, 4, 7, 1]]
    for name in ("logprobs", "ref_logprobs", "values", "entropy", "rewards"):
        torch.testing.assert_close(*(getattr(rollout, name) for rollout in rollouts))


def test_any_split_gives_the_same_gradient(trained: tuple[PPOTrainer, Rollout]) -> None:
    """Broken once: mean over each micro-batch's own tokens."""
    trainer, rollout = trained
    tokens = float(rollout.train_mask.sum())
    rows = torch.randperm(16)
    whole = gradients(trainer, [rollout.select(torch.arange(16))], tokens)
    for sizes in ([4, 4, 4, 4], [1, 7, 8], [15, 1]):
        parts = [rollout.select(part) for part in rows.split(sizes)]
        assert_same(gradients(trainer, parts, tokens), whole)


def test_accumulated_steps_equal_one_batch(build: Callable[..., PPOTrainer]) -> None:
    """By SGD, whose step shows the gradient's size. Broken once: the sum of the micro-batches
    divided by their number, too (`loss_is_scaled_for_ga`).
    """
    weights = []
    for size, parts in ((16, 1), (4, 4)):
        trainer = build(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            num_mini_batches=1,
            num_updates=1,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer._generate = lambda prompts: (
            [[4 + len(text) % 8] for text in prompts],
            [[5, 6, 1][-1 - len(text) % 3 :] for text in prompts],
            [""] * len(prompts),
        )
        before = trainer.model.model.embed_tokens.weight.clone()
        trainer.train()
        weights.append(trainer.model.model.embed_tokens.weight)
        assert (weights[-1] - before).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


def test_width_of_the_padding_changes_nothing(trained: tuple[PPOTrainer, Rollout]) -> None:
    """Broken once: hidden states read relative to the right edge."""
    trainer, rollout = trained
    tokens = float(rollout.train_mask.sum())
    tight = rollout.select(torch.arange(16))
    wide = Rollout(
        **{
            name: torch.nn.functional.pad(x, (0, 7)) if x.dim() == 2 else x
            for name, x in vars(tight).items()
        }
    )
    assert_same(gradients(trainer, [wide], tokens), gradients(trainer, [tight], tokens))


def test_loss_and_gradient_equal_one_row_at_a_time_without_padding(
    trained: tuple[PPOTrainer, Rollout],
) -> None:
    """The whole loss against plain forward passes on single rows.

    Broken once: value read from the state after the token; logits not divided by temperature;
    tokens after EOS kept in the mask.
    """
    trainer, rollout = trained
    tokens = float(rollout.train_mask.sum())
    ours = gradients(trainer, [rollout], tokens)
    model, args = trainer.model, trainer.args
    model.zero_grad()
    total = torch.zeros(())
    for b in range(16):
        start, end = int(rollout.prompt_lengths[b]), int(rollout.lengths[b])
        ids = rollout.input_ids[b : b + 1, :end]
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, start - 1 : end - 1]
        logprobs = logprobs.gather(1, ids[0, start:end, None])[:, 0]
        critic = model.critic.model
        values = critic.score(critic.model(input_ids=ids).last_hidden_state)[0, :, 0]
        values, n = values[start - 1 : end - 1], end - start
        pg = policy_loss(logprobs, rollout.logprobs[b, :n], rollout.advantages[b, :n], 0.2, 0.2)
        vf = value_loss(values, rollout.values[b, :n], rollout.returns[b, :n], 0.2)
        loss = (pg + args.vf_coef * vf).sum() / tokens
        loss.backward()
        total += loss.detach()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert_same(ours, {"loss": total, **grads})


def test_eos_is_trained_and_nothing_after_it(build: Callable[..., PPOTrainer]) -> None:
    """Broken once: EOS masked out; mask one token too long."""
    trainer = build()
    fixed = [[5, 1], [6, 7, 8, 9], [1], [5, 5, 1]] * 4
    trainer._generate = lambda prompts: ([[4, 5]] * 16, fixed, [""] * 16)
    rollout = roll_out(trainer)
    assert rollout.train_mask.sum(1).tolist() == [2, 4, 1, 3] * 4
    assert (rollout.logprobs[rollout.train_mask] < 0).all()
    assert not rollout.logprobs[~rollout.train_mask].any()
    mask = rollout.train_mask[:4]
    logprobs, _, _ = trainer.model(
        input_ids=rollout.input_ids[:4],
        prompt_lengths=rollout.prompt_lengths[:4],
        completion_mask=mask,
    )
    eos = (rollout.input_ids[:4, 2:] == 1) & mask
    assert eos.sum() == 3 and (logprobs[eos] != 0).all()
