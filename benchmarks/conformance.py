"""Do our methods compute what TRL and verl compute? Value and gradient, on random inputs.

    python benchmarks/conformance.py --install     in an environment with pinned TRL and verl
    python benchmarks/conformance.py               in an interpreter that has trl and verl
    python benchmarks/conformance.py --self-test   breaks our code in memory: is it noticed?

The peers are needed here and nowhere else in the project. Exit code 1 if a pair that should agree
does not, or if a pair that should differ agrees. Results: a table, printed and in
results/conformance.md.

What runs is the peers' own code, in float64, on the CPU:

- TRL: `GRPOTrainer._generate_and_score_completions` (masks, sampler correction, advantages), then
  `_compute_loss`. The trainer is made without its constructor. Three of its methods are replaced by
  given numbers: the sampler, the rewards and the log-probabilities. Of the accelerator it sees a
  stand-in for one process.
- verl: the functions of `core_algos`: an advantage estimator, a policy loss, `kl_penalty`,
  `agg_loss`; and the sampler weights of `rollout_corr_helper`. The terms are added up here, since
  its own `ppo_loss` needs its data pipeline.
- ours: the `advantages`, `token_weights` and `forward` of the loss of a row.

The inputs: 4 questions with 4 completions of 1 to 9 tokens, two rewards (weights 1 and 0.5);
l = log π - log π_old uniform in ±0.3 and in ±3 unless the row says otherwise; log π - log π_ref in
±1. The padding holds junk.
"""

import argparse
import sys
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from environment import go_on_in

CACHE = Path.home() / ".cache" / "pocket-grpo" / "conformance"
TORCH = "torch==2.13.0"  # alone and first, so that nothing else chooses another
PEERS = ["trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"]
# What verl's losses import. All of its requirements would bring an inference engine.
VERL_NEEDS = [
    "tensordict==0.15.3",
    "ray==2.60.0",
    "omegaconf==2.3.1",
    "codetiming==1.4.0",
    "orjson==3.13.0",
]

QUESTIONS, GROUP, LONGEST = 4, 4, 9
SCALE = 16  # the constant of seq-mean-token-sum-norm, TRL's max_completion_length
TOLERANCE = 1e-6
END, PAD, OTHER = 1, 0, 2  # token ids, for TRL's test of a truncated completion


# Before the imports that only the environment has.
go_on_in(CACHE, [TORCH], [TORCH, *PEERS, *VERL_NEEDS], ["--no-deps", "verl==0.9.1"])

try:
    import numpy as np
    import torch
    import trl
    import verl
    from torch import Tensor, nn
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import split_tensor_dict
    from verl.trainer.ppo import core_algos, rollout_corr_helper
    from verl.workers.config import ActorConfig
except ImportError as error:
    sys.exit(f"{error}. This needs trl and verl: python benchmarks/conformance.py --install")

from common import RESULTS, machine, table, versions, write_lines  # noqa: E402

import loss  # noqa: E402
from objectives import equations  # noqa: E402
from objectives.table import CHOICES, find_objective  # noqa: E402
from replay_buffer import Experience  # noqa: E402

SMALL, LARGE, BEYOND = (0.0, 0.3), (0.0, 3.0), (21.0, 30.0)  # |l|, uniform, either sign


# --------------------------------------------------------------------- the inputs


@dataclass(frozen=True)
class Draw:
    """What the random inputs of a case are like."""

    kl: tuple[float, float] = (0.0, 1.0)  # |log π − log π_ref|
    group: int = GROUP
    reward_scale: float = 1.0  # at 1e6 no guard of a standard deviation is felt
    weight_scale: float = (
        1.0  # of the rewards' weights, the same for the second standard deviation of GDPO
    )
    equal_rewards: bool = False  # and in float32, as in training
    unscored: bool = False  # some rewards are NaN
    masked_row: bool = False  # one completion without any token that counts
    truncated: bool = False  # some completions do not end
    one_token: bool = False  # every completion is one token long
    on_policy: bool = False  # log π_old is log π, and is not given

    @property
    def weights(self) -> list[float]:
        """Of the two rewards."""
        return [self.weight_scale, 0.5 * self.weight_scale]


@dataclass(frozen=True)
class Batch:
    """Random inputs: N completions of up to C tokens, K rewards. All float64."""

    draw: Draw
    lengths: Tensor  # int64 (N,)
    mask: Tensor  # bool (N, C)
    truncated: Tensor  # bool (N,)
    rewards: Tensor  # (N, K), NaN: no score
    now: Tensor  # (N, C), log π; a leaf
    old: Tensor  # (N, C)
    ref: Tensor  # (N, C)
    sampler: Tensor  # (N, C), what a sampler of other precision says of old
    entropies: Tensor  # (N, C); a leaf

    @property
    def returns(self) -> Tensor:
        """The weighted sum of the rewards that are there, (N,)."""
        total = (self.rewards * torch.tensor(self.draw.weights)).nansum(-1)
        return torch.where(self.rewards.isnan().all(-1), torch.nan, total)


def draw_batch(draw: Draw, spread: tuple[float, float], seed: int) -> Batch:
    """Random inputs. The padding holds junk, finite since the peers multiply by their masks."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    def signed(limits: tuple[float, float]) -> Tensor:
        sign = torch.randint(0, 2, (n, LONGEST), generator=g) * 2 - 1
        return sign * uniform(*limits, n, LONGEST)

    n = QUESTIONS * draw.group
    lengths = torch.randint(1, LONGEST + 1, (n,), generator=g)
    lengths[0], lengths[1] = 1, LONGEST
    if draw.one_token:
        lengths[:] = 1
    if draw.masked_row:
        lengths[2] = 0
    truncated = torch.zeros(n, dtype=torch.bool)
    if draw.truncated:
        truncated[1:6] = True  # a whole group among them
    log_ratio = torch.zeros(n, LONGEST, dtype=torch.float64) if draw.on_policy else signed(spread)
    below = uniform(0.01, 2.0, n, LONGEST)
    # Both are log-probabilities.
    now, old = -below + log_ratio.clamp(max=0), -below - log_ratio.clamp(min=0)
    # float32 numbers: TRL keeps a sampler's log-probabilities, and verl GDPO's rewards, in float32
    sampler = (old - signed((0.0, 1.0))).float().double()
    rewards = uniform(0.0, 1.0, n, len(draw.weights)).float().double() * draw.reward_scale
    if draw.equal_rewards:
        rewards = torch.tensor([0.01, 0.0]).expand(n, -1)
    if draw.unscored:
        rewards[5] = rewards[6] = rewards[9, 1] = torch.nan
    return Batch(
        draw,
        lengths,
        torch.arange(LONGEST) < lengths[:, None],
        truncated,
        rewards,
        now.requires_grad_(),
        now.detach() if draw.on_policy else old,
        now.detach() - signed(draw.kl),
        sampler,
        uniform(0.0, 2.0, n, LONGEST).requires_grad_(),
    )


def gradients(total: Tensor, batch: Batch) -> Tensor:
    """With respect to log π and to the entropies, (2, N, C)."""
    found = torch.autograd.grad(total, [batch.now, batch.entropies], allow_unused=True)
    return torch.stack([torch.zeros_like(batch.now) if f is None else f for f in found])


# --------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One row of the table. A peer without settings is not compared with."""

    method: str  # a row of OBJECTIVES
    choice: str = ""  # what is special about this row of the table
    ours: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] | None = None
    verl: dict[str, Any] | None = None
    why_trl: str = ""  # not empty: TRL differs on purpose, for this reason
    why_verl: str = ""
    draw: Draw = Draw()
    spreads: tuple[tuple[float, float], ...] = (SMALL, LARGE)
    parts: int = 1  # micro-batches
    steps: int = 1  # optimizer steps, for what adapts
    tolerance: float = TOLERANCE

    @property
    def words(self) -> str:
        """The choice and our options."""
        return ", ".join(filter(None, [self.choice, *(f"`{k} {v}`" for k, v in self.ours.items())]))


# --------------------------------------------------------------------- ours


def ours(case: Case, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradients, and the weight of each token, as train.py would have them."""
    o = find_objective(case.method, **case.ours)
    module = equations.build_loss(o)
    returns, rewards = batch.returns, batch.rewards.T.reshape(-1, QUESTIONS, batch.draw.group)
    if o.kl_in_reward:
        kl = equations.kl_divergence(batch.old, batch.ref, o.kl_estimator)
        returns = returns - o.kl_weight * torch.where(batch.mask, kl, 0.0).sum(-1)
    returns = returns.view(QUESTIONS, -1)
    advantages = module.advantages(returns, rewards, batch.draw.weights).flatten()
    policy_mask = None
    if o.top_entropy < 1:
        # TRL's threshold; train.py's own keeps the round(share × tokens) highest.
        ranked = batch.entropies.detach()[batch.mask].float()
        policy_mask = batch.entropies.detach() >= torch.quantile(ranked, 1 - o.top_entropy)
    experience = Experience(
        sequences=batch.lengths,
        attention_mask=batch.mask,
        action_mask=batch.mask,
        returns=batch.returns,
        advantages=advantages,
        action_log_probs=None if batch.draw.on_policy else batch.old,
        log_probs_ref=batch.ref,
        sampler_log_probs=batch.sampler if o.sampler_correction != "none" else None,
        policy_mask=policy_mask,
    )
    # train.py leaves the others out of the buffer.
    kept = (~(batch.truncated & o.mask_truncated)).nonzero()[:, 0]
    weights = module.token_weights(batch.lengths[kept].tolist(), SCALE)
    for _ in range(case.steps):
        total = torch.zeros((), dtype=torch.float64)
        for rows, w in zip(kept.chunk(case.parts), weights.chunk(case.parts), strict=True):
            part = Experience(
                **{k: None if v is None else v[rows] for k, v in vars(experience).items()}
            )
            total = total + module(batch.now[rows], part, w, batch.entropies[rows])[0]
        if o.entropy_target is not None:
            module.adapt(float(batch.entropies[batch.mask].mean()))
    per_token = torch.zeros_like(batch.old)
    per_token[kept] = torch.where(batch.mask[kept], weights[:, None].double(), 0.0)
    return total.detach(), gradients(total, batch), per_token


# --------------------------------------------------------------------- TRL


class Still(nn.Module):
    """A model for the eyes of TRL's trainer: in training mode, without a forward."""

    is_gradient_checkpointing = False


def same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """What gathering, padding and reducing over a single process are."""
    return x


def trl_trainer(case: Case, batch: Batch) -> GRPOTrainer:
    """TRL's trainer, without its constructor; what the case does not set is at its default."""
    defaults = {f.name: f.default for f in fields(GRPOConfig)}
    unknown = case.trl.keys() - defaults.keys()
    assert not unknown, f"GRPOConfig has no {unknown}"
    # num_iterations 2: it asks for log π_old, since the policy may have changed
    args = SimpleNamespace(
        **(
            defaults
            | {
                "gradient_accumulation_steps": case.parts,
                "steps_per_generation": case.parts,
                "report_to": [],
                "num_iterations": 1 if batch.draw.on_policy else 2,
                "max_completion_length": SCALE,
                "gradient_checkpointing_kwargs": None,
            }
            | case.trl
        )
    )
    t = object.__new__(GRPOTrainer)
    vars(t).update(vars(args))  # most settings are attributes of the trainer under the same name
    vars(t).update(
        args=args,
        model=Still().train(),
        ref_model=Still(),
        processing_class=None,
        num_generations=batch.draw.group,
        num_generations_eval=batch.draw.group,
        epsilon_low=args.epsilon,
        entropy_coef=args.entropy_coef,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        aux_loss_enabled=False,
        use_vllm="vllm_importance_sampling_mode" in case.trl,
        reward_weights=torch.tensor(batch.draw.weights),
        reward_funcs=["a", "b"],
        reward_func_names=["a", "b"],
        environment_factories=None,
        environments=None,
        tools=None,
        _is_vlm=False,
        pad_to_multiple_of=None,
        eos_token_ids=[END],
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        _pending_extra_logs={},
        _pending_metrics={},
        _last_world_entropy=float("inf"),
        _entropy_bonus_enabled=args.entropy_coef != 0 or args.use_adaptive_entropy,
        _entropy_window_stats=None,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _logs=defaultdict(deque, rewards=defaultdict(deque)),
        current_gradient_accumulation_steps=case.parts,
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=1,
            process_index=0,
            is_main_process=True,
            sync_gradients=True,
            gather=same,
            gather_for_metrics=same,
            reduce=same,
            pad_across_processes=same,
        ),
    )
    return t


def trl_generated(batch: Batch, use_vllm: bool) -> tuple:
    """What TRL's `_generate` returns: tokens that end or do not, and the mask of the empty row."""
    lengths = batch.lengths.clamp(
        min=1
    ).tolist()  # it has no empty completions; one token outside the mask is one
    ids = [
        [OTHER] * (n - 1) + [OTHER if cut else END]
        for n, cut in zip(lengths, batch.truncated, strict=True)
    ]
    outside = [[int(real > 0)] * n for n, real in zip(lengths, batch.lengths, strict=True)]
    prompts = [[OTHER]] * len(ids)
    sampler = (
        [row[:n] for row, n in zip(batch.sampler.tolist(), lengths, strict=True)]
        if use_vllm
        else None
    )
    return (
        prompts,
        ids,
        outside if batch.draw.masked_row else None,
        [""] * len(ids),
        sampler,
        {},
        None,
        [],
    )


def trl_loss(case: Case, batch: Batch) -> tuple[Tensor, Tensor]:
    """TRL's loss and its gradients: rewards in, through its advantages and masks."""
    t = trl_trainer(case, batch)
    width = int(batch.lengths.clamp(min=1).max())
    part = slice(None)

    def log_probs(model: nn.Module, *_: Any, compute_entropy: bool = False, **__: Any) -> tuple:
        if compute_entropy:
            return batch.now[part, :width], batch.entropies[part, :width], None
        return (batch.ref if model is t.ref_model else batch.old)[:, :width], None, None

    t._get_per_token_logps_and_entropies = log_probs
    t._generate = lambda prompts: trl_generated(batch, t.use_vllm)
    t._calculate_rewards = lambda *_: batch.rewards.clone()
    inputs = t._generate_and_score_completions([{"prompt": ""}] * len(batch.lengths))
    count = inputs.pop("num_items_in_batch")
    for _ in range(case.steps):
        total, size = torch.zeros((), dtype=torch.float64), len(batch.lengths) // case.parts
        for i, piece in enumerate(split_tensor_dict(inputs, case.parts)):
            part = slice(i * size, (i + 1) * size)
            total = total + t._compute_loss(t.model, piece | {"num_items_in_batch": count})
    return total.detach(), gradients(total, batch)


# --------------------------------------------------------------------- verl

VERL_SETTINGS = {
    "loss_mode",
    "adv_estimator",
    "norm_adv_by_std_in_grpo",
    "loss_agg_mode",
    "loss_scale_factor",
    "clip_ratio_low",
    "clip_ratio_high",
    "clip_ratio_c",
    "kl_loss_type",
    "kl_loss_coef",
    "entropy_coeff",
    "kl_coef",
    "rollout_is",
    "rollout_is_threshold",
    "global_batch_info",
}


def verl_advantages(settings: dict[str, Any], batch: Batch) -> Tensor:
    """verl's advantages, (N, C): the reward of a completion stands at its last token."""
    mask = batch.mask.double()
    last = (batch.lengths - 1).clamp(min=0)[:, None]
    scores = torch.zeros_like(mask, dtype=batch.rewards.dtype).scatter_(
        1, last, batch.returns[:, None]
    )
    if "kl_coef" in settings:
        kl_free = scores
        scores = core_algos.compute_rewards(kl_free, batch.old, batch.ref, settings["kl_coef"])
        scores = torch.where(batch.mask, scores, kl_free)  # its trainer masks the KL
    name = settings["adv_estimator"]
    index = np.repeat(np.arange(QUESTIONS), batch.draw.group)
    # What verl makes of a group of one: the reward as it is.
    if name == "grpo, each completion a group":
        name, index = "grpo", np.arange(len(index))
    more = {}
    if name == "grpo":
        more["norm_adv_by_std_in_grpo"] = settings.get("norm_adv_by_std_in_grpo", True)
    if name == "grpo_passk":
        more["config"] = {"norm_adv_by_std_in_grpo": settings.get("norm_adv_by_std_in_grpo", True)}
    if name == "gdpo":
        more["config"] = {"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": batch.draw.weights}
        more["non_tensor_batch"] = {
            "a": batch.rewards[:, 0].numpy(),
            "b": batch.rewards[:, 1].numpy(),
        }
        prompts = torch.ones(len(mask), 1, dtype=torch.long)
        more["batch"] = {
            "prompts": prompts,
            "attention_mask": torch.cat([prompts, batch.mask.long()], 1),
        }
    estimator = core_algos.get_adv_estimator_fn(name)
    return estimator(token_level_rewards=scores, response_mask=mask, index=index, **more)[
        0
    ].double()


def verl_loss(case: Case, batch: Batch) -> tuple[Tensor, Tensor]:
    """verl's loss and its gradients: its own functions, added up as in its `ppo_loss`."""
    s = case.verl
    unknown = s.keys() - VERL_SETTINGS
    assert not unknown, f"not passed on to verl: {unknown}"
    clips = {k: v for k, v in s.items() if k.startswith("clip_")}
    config = ActorConfig(strategy="fsdp", rollout_n=GROUP, ppo_micro_batch_size_per_gpu=1, **clips)
    whole = {"batch_num_tokens": batch.mask.sum(), "global_batch_size": (batch.lengths > 0).sum()}
    share = whole if "global_batch_info" in s else {}
    config.global_batch_info.update(share | {"loss_scale_factor": s.get("loss_scale_factor")})
    advantages, mode = verl_advantages(s, batch), s["loss_agg_mode"]
    weights = None
    if "rollout_is" in s:
        gap = (batch.old - batch.sampler) * batch.mask
        weights, _ = rollout_corr_helper.compute_rollout_correction_weights(
            gap, batch.mask.double(), s["rollout_is"], s["rollout_is_threshold"]
        )
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(batch.lengths)).chunk(case.parts):
        now, mask = batch.now[rows], batch.mask[rows].double()
        policy = core_algos.get_policy_loss_fn(s["loss_mode"])
        total = (
            total
            + policy(
                old_log_prob=batch.old[rows],
                log_prob=now,
                advantages=advantages[rows],
                response_mask=mask,
                loss_agg_mode=mode,
                config=config,
                rollout_is_weights=None if weights is None else weights[rows],
            )[0]
        )
        if "kl_loss_type" in s:
            kl = core_algos.kl_penalty(now, batch.ref[rows], s["kl_loss_type"])
            total = total + s["kl_loss_coef"] * core_algos.agg_loss(
                kl, mask, mode, **config.global_batch_info
            )
        if "entropy_coeff" in s:
            entropy = core_algos.agg_loss(
                batch.entropies[rows], mask, mode, **config.global_batch_info
            )
            total = total - s["entropy_coeff"] * entropy
    return total.detach(), gradients(total, batch)


PEER_LOSSES: dict[str, Callable[[Case, Batch], tuple[Tensor, Tensor]]] = {
    "trl": trl_loss,
    "verl": verl_loss,
}


# --------------------------------------------------------------------- the rows, by topic

KL = {"kl_loss_type": "low_var_kl", "kl_loss_coef": 0.01}
FREE = {"clip_ratio_c": 1e9}  # verl's vanilla loss always has a dual clip; this is none
BIG = Draw(reward_scale=1e6)
NO_CLAMP = "TRL does not clamp l; ours stops at ±20, so that no input gives an infinity."
GUARD = "verl's guard of a standard deviation is 1e-6, ours and TRL's 1e-4."
MASKED = (
    "TRL counts a completion without tokens in its mean over completions; ours and verl do not."
)


def trl_grpo(**more: Any) -> dict[str, Any]:
    """The paper's GRPO, in TRL's words."""
    return {"loss_type": "grpo", "beta": 0.01, "use_bias_correction_kl": False} | more


def verl_grpo(**more: Any) -> dict[str, Any]:
    """The paper's GRPO, in verl's words."""
    base = {"adv_estimator": "grpo", "loss_mode": "vanilla", "loss_agg_mode": "seq-mean-token-mean"}
    return base | (FREE if more.get("loss_mode", "vanilla") == "vanilla" else {}) | more


# fmt: off
def clipped_methods() -> Iterator[Case]:
    """The rows of OBJECTIVES with a clip or a gate."""
    eps = {"clip_ratio_low": 0.0003, "clip_ratio_high": 0.0004}
    gspo = {
        "importance_sampling_level": "sequence", "beta": 0.0, "epsilon": 0.0003,
        "epsilon_high": 0.0004,
    }
    yield Case("grpo", trl=trl_grpo(), verl=verl_grpo(**KL), draw=BIG)
    yield Case(
        "bnpo", trl=trl_grpo(loss_type="bnpo"), verl=verl_grpo(loss_agg_mode="token-mean", **KL),
        draw=BIG,
    )
    yield Case(
        "dr_grpo",
        trl=trl_grpo(
            loss_type="dr_grpo", beta=0.0, scale_rewards="none", max_completion_length=SCALE,
        ),
        verl=verl_grpo(
            norm_adv_by_std_in_grpo=False, loss_agg_mode="seq-mean-token-sum-norm",
            loss_scale_factor=SCALE,
        ),
    )
    yield Case(
        "dapo", "with truncated completions",
        trl=trl_grpo(
            loss_type="dapo", beta=0.0, epsilon_high=0.28, mask_truncated_completions=True,
        ),
        draw=Draw(truncated=True),
    )
    yield Case(
        "dapo", trl=trl_grpo(loss_type="dapo", beta=0.0, epsilon_high=0.28),
        verl=verl_grpo(loss_agg_mode="token-mean", clip_ratio_high=0.28),
        draw=replace(BIG, masked_row=True),
    )
    yield Case("lite_ppo", trl=trl_grpo(loss_type="dapo", beta=0.0, scale_rewards="batch"))
    for name in ("gspo", "gspo_token"):
        yield Case(name, trl=trl_grpo(**gspo), verl=verl_grpo(loss_mode="gspo", **eps), draw=BIG)
    yield Case(
        "luspo",
        trl=trl_grpo(**gspo | {"loss_type": "luspo", "epsilon": 0.002, "epsilon_high": 0.0025}),
        verl=verl_grpo(
            loss_mode="gspo", loss_agg_mode="seq-mean-token-sum", clip_ratio_low=0.002,
            clip_ratio_high=0.0025,
        ),
        draw=BIG,
    )
    yield Case(
        "gmpo", verl=verl_grpo(loss_mode="geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4),
        draw=BIG,
    )
    yield Case(
        "cispo", "TRL's epsilon_high is the cap itself, ours 1 + ε_high",
        trl=trl_grpo(loss_type="cispo", beta=0.0, epsilon_high=5.0),
        verl=verl_grpo(
            loss_mode="cispo", loss_agg_mode="token-mean", clip_ratio_low=1.0, clip_ratio_high=4.0,
        ),
        draw=replace(BIG, masked_row=True),
    )
    yield Case(
        "sapo", trl=trl_grpo(loss_type="sapo", beta=0.0), verl=verl_grpo(loss_mode="sapo"),
        draw=BIG,
    )
    yield Case(
        "dppo", "verl's clip_ratio_c is the cap of the ratio, the paper's is 20",
        verl=verl_grpo(
            loss_mode="dppo_tv", loss_agg_mode="token-mean", clip_ratio_low=0.15,
            clip_ratio_high=0.15, clip_ratio_c=20.0,
        ),
        draw=BIG, spreads=(SMALL, LARGE, BEYOND),
    )


def other_methods() -> Iterator[Case]:
    """The rows of OBJECTIVES that differ by their advantages."""
    sums = {"loss_mode": "gpg", "loss_agg_mode": "seq-mean-token-sum"}
    tokens = (
        "verl whitens over tokens, so a long completion counts more; ours over completions, as "
        "TRL does for GDPO."
    )
    yield Case("rloo", verl=verl_grpo(adv_estimator="rloo", kl_coef=0.05, **sums))
    yield Case(
        "reinforce",
        verl=verl_grpo(
            adv_estimator="grpo, each completion a group", norm_adv_by_std_in_grpo=False, **sums,
        ),
    )
    plus = verl_grpo(
        adv_estimator="reinforce_plus_plus_baseline", loss_agg_mode="token-mean",
        kl_loss_type="k2", kl_loss_coef=0.01,
    )
    one = replace(BIG, one_token=True)
    yield Case("reinforce_plus_plus_baseline", verl=plus, why_verl=tokens, draw=BIG)
    yield Case("reinforce_plus_plus_baseline", "completions of one token", verl=plus, draw=one)
    apart = trl_grpo(multi_objective_aggregation="normalize_then_sum")
    gdpo = verl_grpo(adv_estimator="gdpo", **KL)
    yield Case("gdpo", trl=apart)
    yield Case("gdpo", trl=apart, verl=gdpo, why_verl=tokens, draw=BIG)
    yield Case(
        "gdpo", "completions of one token (verl: in float32)", verl=gdpo,
        draw=replace(one, weight_scale=1000000.0), tolerance=1e-5,
    )
    yield Case(
        "pass_at_k", verl=verl_grpo(adv_estimator="grpo_passk", norm_adv_by_std_in_grpo=False),
    )


def clips() -> Iterator[Case]:
    """Dual clip, other clips, and ratios beyond e^20."""
    capped, delta = ({"clip_ratio_c": 3.0}, trl_grpo(delta=3.0))
    yield Case(
        "grpo", "dual clip", {"clip_ratio_c": 3.0}, delta, verl_grpo(**capped, **KL), draw=BIG,
    )
    yield Case(
        "grpo", "dual clip, verl's default", {}, None, verl_grpo(**capped, **KL), draw=BIG,
        spreads=(LARGE,),
        why_verl="verl's vanilla loss has a dual clip, c = 3, unless told otherwise; the paper "
                 "has none.",
    )
    for eps in (0.1, 0.5):
        yield Case(
            "cispo", "", {"clip_eps": eps},
            trl_grpo(loss_type="cispo", beta=0.0, epsilon_high=5.0),
            verl_grpo(
                loss_mode="cispo", loss_agg_mode="token-mean", clip_ratio_low=eps,
                clip_ratio_high=4.0,
            ),
            draw=BIG, spreads=(LARGE,),
            why_trl="TRL's CISPO has no lower side; ε_low = 1 is none.",
        )
    yield Case(
        "cispo", "TRL's epsilon_high copied as a number", {},
        trl_grpo(loss_type="cispo", beta=0.0, epsilon_high=4.0), spreads=(LARGE,),
        why_trl="The same number is a cap of 4 in TRL and of 1 + 4 here (and in verl and the "
                "paper).",
    )
    yield Case(
        "dppo", "verl's default clip_ratio_c",
        verl=verl_grpo(
            loss_mode="dppo_tv", loss_agg_mode="token-mean", clip_ratio_low=0.15,
            clip_ratio_high=0.15,
        ),
        draw=BIG, spreads=(LARGE,),
        why_verl="verl's configuration caps the ratio at 3 unless told otherwise.",
    )
    far = {"draw": BIG, "spreads": (BEYOND,)}
    yield Case("grpo", "l beyond ±20", {}, trl_grpo(), verl_grpo(**KL), **far, why_trl=NO_CLAMP)
    yield Case(
        "grpo", "l beyond ±20, dual clip", {"clip_ratio_c": 3.0}, delta, verl_grpo(**capped, **KL),
        **far,
    )
    yield Case(
        "cispo", "l beyond ±20", {}, trl_grpo(loss_type="cispo", beta=0.0, epsilon_high=5.0),
        verl_grpo(
            loss_mode="cispo", loss_agg_mode="token-mean", clip_ratio_low=1.0, clip_ratio_high=4.0,
        ),
        **far,
    )
    yield Case(
        "sapo", "l beyond ±20", {}, trl_grpo(loss_type="sapo", beta=0.0),
        verl_grpo(loss_mode="sapo"), **far,
    )
    yield Case(
        "gspo", "l beyond ±20", {},
        trl_grpo(
            importance_sampling_level="sequence", beta=0.0, epsilon=0.0003, epsilon_high=0.0004,
        ),
        verl_grpo(loss_mode="gspo", clip_ratio_low=0.0003, clip_ratio_high=0.0004), **far,
        why_trl=NO_CLAMP,
        why_verl="verl clamps the logarithm of a sequence's ratio at 10, and only from above; "
                 "ours at ±20 like all l.",
    )
    yield Case(
        "gmpo", "l beyond ±20", {}, None,
        verl_grpo(loss_mode="geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4), **far,
        why_verl="verl does not clamp l in this loss; ours does, at ±20 like everywhere.",
    )


def means() -> Iterator[Case]:
    """The means over tokens; masked completions; micro-batches."""
    for mode in CHOICES["loss_agg_mode"]:
        scale = {"loss_scale_factor": SCALE} if mode.endswith("norm") else {}
        yield Case(
            "grpo", "with a masked row", {"loss_agg_mode": mode}, None,
            verl_grpo(loss_agg_mode=mode, **scale, **KL), draw=replace(BIG, masked_row=True),
        )
    yield Case(
        "bnpo", "with a masked row", {}, trl_grpo(loss_type="bnpo"), draw=Draw(masked_row=True),
    )
    yield Case(
        "grpo", "with a masked row", {}, trl_grpo(), draw=Draw(masked_row=True), why_trl=MASKED,
    )
    yield Case(
        "dr_grpo", "with a masked row", {},
        trl_grpo(loss_type="dr_grpo", beta=0.0, scale_rewards="none"), draw=Draw(masked_row=True),
        why_trl=MASKED,
    )
    yield Case(
        "gmpo", "with a masked row", {}, None,
        verl_grpo(loss_mode="geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4),
        draw=replace(BIG, masked_row=True),
        why_verl="verl's geo_mean counts a completion without tokens in its mean; its other "
                 "losses do not.",
    )
    yield Case(
        "grpo", "truncated completions masked", {"mask_truncated": True},
        trl_grpo(mask_truncated_completions=True), draw=Draw(truncated=True), why_trl=MASKED,
    )
    yield Case(
        "bnpo", "truncated completions masked", {"mask_truncated": True},
        trl_grpo(loss_type="bnpo", mask_truncated_completions=True), draw=Draw(truncated=True),
    )
    info = {"global_batch_info": "of the whole step"}
    yield Case(
        "grpo", "two micro-batches", {}, trl_grpo(), verl_grpo(**KL, **info), draw=BIG, parts=2,
    )
    yield Case(
        "bnpo", "two micro-batches", {}, trl_grpo(loss_type="bnpo"), parts=2,
        why_trl="TRL's bnpo divides each micro-batch by its own tokens, so a token of a short "
                "one counts more; ours knows the whole step.",
    )
    yield Case(
        "bnpo", "two micro-batches, TRL's dapo, verl's batch_num_tokens", {},
        trl_grpo(loss_type="dapo"), verl_grpo(loss_agg_mode="token-mean", **KL, **info), draw=BIG,
        parts=2,
    )
    on = Draw(reward_scale=1000000.0, on_policy=True)
    yield Case(
        "grpo", "on-policy, no log π_old", {}, trl_grpo(), verl_grpo(**KL), draw=on,
        spreads=(SMALL,),
    )


def kls() -> Iterator[Case]:
    """Each KL estimator, also where it is clamped."""
    for name in CHOICES["kl_estimator"]:
        if name in ("k3-ratio", "full"):
            continue
        verl = verl_grpo(kl_loss_type=name, kl_loss_coef=0.5)
        wide = Draw(reward_scale=1000000.0, kl=LARGE)
        yield Case("grpo", "", {"kl_estimator": name, "kl_weight": 0.5}, None, verl, draw=wide)
    big = {"kl_weight": 0.5}
    verl = verl_grpo(kl_loss_type="k3", kl_loss_coef=0.5)
    clamp = "TRL clamps nothing; ours and verl stop k3 at 10."
    for limits, words in ((LARGE, "d within ±3"), (BEYOND, "d beyond ±20")):
        draw = Draw(reward_scale=1000000.0, kl=limits)
        yield Case("grpo", words, big, trl_grpo(beta=0.5), verl, draw=draw, why_trl=clamp)
    yield Case(
        "gspo", "", {"kl_weight": 0.5},
        trl_grpo(
            importance_sampling_level="sequence", epsilon=0.0003, epsilon_high=0.0004, beta=0.5,
        ),
    )
    ratio = {"kl_estimator": "k3-ratio", "kl_weight": 0.5}
    yield Case("grpo", "", ratio, trl_grpo(beta=0.5, use_bias_correction_kl=True))
    yield Case(
        "gspo", "", ratio,
        trl_grpo(
            importance_sampling_level="sequence", epsilon=0.0003, epsilon_high=0.0004, beta=0.5,
            use_bias_correction_kl=True,
        ),
        why_trl="With a ratio per sequence TRL weighs the KL of a token with that; ours always "
                "with the token's own.",
    )
    yield Case(
        "luspo", "", {"kl_weight": 0.5},
        trl_grpo(
            loss_type="luspo", importance_sampling_level="sequence", epsilon=0.002,
            epsilon_high=0.0025, beta=0.5,
        ),
    )


def advantages() -> Iterator[Case]:
    """Standard deviations, groups of one, equal rewards, rewards without a score."""
    for std, trl_name in (("group", "group"), ("batch", "batch"), ("none", "none")):
        yield Case(
            "grpo", "some rewards without a score", {"advantage_std": std},
            trl_grpo(scale_rewards=trl_name), draw=Draw(unscored=True),
        )
    yield Case(
        "gdpo", "some rewards without a score", {},
        trl_grpo(multi_objective_aggregation="normalize_then_sum"), draw=Draw(unscored=True),
    )
    yield Case("grpo", "rewards in 0 to 1", {}, trl_grpo(), verl_grpo(**KL), why_verl=GUARD)
    yield Case(
        "dr_grpo", "groups of one", {},
        trl_grpo(loss_type="dr_grpo", beta=0.0, scale_rewards="none"),
        verl_grpo(
            norm_adv_by_std_in_grpo=False, loss_agg_mode="seq-mean-token-sum-norm",
            loss_scale_factor=SCALE,
        ),
        draw=Draw(group=1),
        why_verl="verl gives a lone completion its reward as the advantage; ours and TRL's is 0.",
    )
    equal = (
        "In float32 the mean of equal rewards may lie beside them, and the guard makes an "
        "advantage of that; ours is 0."
    )
    yield Case(
        "dapo", "12 equal rewards of 0.01", {},
        trl_grpo(loss_type="dapo", beta=0.0, epsilon_high=0.28),
        verl_grpo(loss_agg_mode="token-mean", clip_ratio_high=0.28),
        draw=Draw(group=12, equal_rewards=True), why_trl=equal, why_verl=equal, tolerance=-1.0,
    )


def rest() -> Iterator[Case]:
    """Entropy, and the sampler's own log-probabilities."""
    verl_bnpo = verl_grpo(loss_agg_mode="token-mean", entropy_coeff=0.1, **KL)
    bonus, bnpo = ({"entropy_weight": 0.1}, trl_grpo(loss_type="bnpo"))
    yield Case("bnpo", "", bonus, bnpo | {"entropy_coef": 0.1}, verl_bnpo, draw=BIG)
    yield Case(
        "grpo", "", bonus, trl_grpo(entropy_coef=0.1), verl_grpo(entropy_coeff=0.1, **KL),
        draw=BIG,
        why_trl="TRL's bonus is the mean over tokens under every loss; ours and verl's has the "
                "mean of the loss.",
    )
    yield Case(
        "bnpo", "third step", {"entropy_target": 1.5},
        bnpo | {"use_adaptive_entropy": True, "entropy_target": 1.5, "entropy_coef": 0.0}, steps=3,
    )
    yield Case(
        "bnpo", "first step", {"entropy_target": 1.5} | bonus,
        bnpo | {"use_adaptive_entropy": True, "entropy_target": 1.5, "entropy_coef": 0.1},
    )
    yield Case(
        "bnpo", "two micro-batches", {"top_entropy": 0.3},
        trl_grpo(loss_type="dapo", top_entropy_quantile=0.3), parts=2,
        why_trl="TRL ranks the tokens of a micro-batch, ours those of the whole rollout.",
    )
    yield Case("bnpo", "", {"top_entropy": 0.3}, bnpo | {"top_entropy_quantile": 0.3})
    yield Case(
        "bnpo", "", {"top_entropy": 0.3} | bonus,
        bnpo | {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
        why_trl="TRL gives the bonus to the chosen tokens alone; ours chooses for the policy "
                "term only.",
    )
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        (level, action) = mode.split("_")
        yield Case(
            "grpo", "", {"sampler_correction": mode, "sampler_cap": 2.0},
            trl_grpo(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=2.0),
            verl_grpo(
                rollout_is=level,
                rollout_is_threshold="2.0" if action == "truncate" else "1e-9_2.0", **KL,
            ),
            draw=BIG,
        )
# fmt: on


def all_cases() -> list[Case]:
    """Every row of the table, in its order."""
    topics = (clipped_methods, other_methods, clips, means, kls, advantages, rest)
    return [case for topic in topics for case in topic()]


# --------------------------------------------------------------------- comparison


@dataclass
class Result:
    """A case, and the largest relative differences of value and gradient with each peer."""

    case: Case
    found: dict[str, tuple[float, float]]

    def wrong(self, peer: str) -> str | None:
        """What is not as the case says, or None."""
        worst, why = max(self.found[peer]), getattr(self.case, f"why_{peer}")
        name = f"{self.case.method} ({self.case.words or 'as it is'}) and {peer}"
        if not why and worst > self.case.tolerance:
            return f"{name} should agree and differ by {worst:.1e}"
        if why and worst <= self.case.tolerance:
            return f"{name} should differ and agree within {worst:.1e}"
        return None


def difference(a: Tensor, b: Tensor, floor: Tensor | float) -> float:
    """The largest relative difference, infinite for what is not finite; `floor` is close to 0."""
    relative = (a - b).abs() / torch.max(
        torch.max(a.abs(), b.abs()), torch.as_tensor(floor, dtype=a.dtype)
    )
    return float(relative.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def compare(case: Case, seeds: list[int]) -> Result:
    """Run a case.

    A token's gradient is compared relative to itself, and at least to the mean weight of a token
    (its gradient if A and r were 1). A value is a sum of terms of both signs and may be close to 0,
    so it is compared relative to itself, and at least to the sum of the absolute gradients or of
    the weights.
    """
    found: dict[str, tuple[float, float]] = {}
    for spread in case.spreads:
        for seed in seeds:
            batch = draw_batch(case.draw, spread, seed)
            value, gradient, weights = ours(case, batch)
            one = weights[weights > 0].mean()
            for peer, run in PEER_LOSSES.items():
                if getattr(case, peer) is None:
                    continue
                their_value, their_gradient = run(case, batch)
                before = found.get(peer, (0.0, 0.0))
                in_value = difference(value, their_value, max(gradient.abs().sum(), weights.sum()))
                in_gradient = difference(gradient, their_gradient, one)
                found[peer] = max(before[0], in_value), max(before[1], in_gradient)
    return Result(case, found)


def failures(results: list[Result]) -> list[str]:
    """Every pair that is not as its case says."""
    return [wrong for r in results for peer in r.found if (wrong := r.wrong(peer))]


# --------------------------------------------------------------------- self-test


@contextmanager
def broken(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Our code with one thing replaced, in memory."""
    entry = isinstance(owner, dict)
    kept = owner[name] if entry else getattr(owner, name)
    try:
        owner.__setitem__(name, value) if entry else setattr(owner, name, value)
        yield
    finally:
        owner.__setitem__(name, kept) if entry else setattr(owner, name, kept)


def self_test(cases: list[Case]) -> list[str]:
    """Break our code in several ways, the paper's and the others'; return what nobody noticed."""
    surrogates, estimators = equations.SURROGATES, equations.KL_ESTIMATORS
    clip, cispo, k3 = surrogates["clip"], surrogates["cispo"], loss.approx_kl_divergence
    weigh, center = equations.TOKEN_WEIGHTS["token-mean"], loss.center
    paper = loss.GRPOLoss.policy_term

    def wider(self: loss.GRPOLoss, *arguments: Any) -> Tensor:
        return paper(loss.GRPOLoss(1.01 * self.clip_eps), *arguments)

    def turned(self: loss.GRPOLoss, log_probs: Tensor, old: Tensor, batch: Experience) -> Tensor:
        return -paper(self, log_probs, old, replace(batch, advantages=-batch.advantages))

    ways = {
        "the paper's clip takes the other side": (loss.GRPOLoss, "policy_term", turned),
        "the paper's ε is 1 % larger": (loss.GRPOLoss, "policy_term", wider),
        "the paper's k3 has the other sign": (
            loss,
            "approx_kl_divergence",
            lambda log_probs, ref: k3(ref, log_probs),
        ),
        "the paper's advantages have the other sign": (loss, "center", lambda r: -center(r)),
        "the clip takes the other side": (
            surrogates,
            "clip",
            lambda log_ratio, now, a, mask, o: -clip(log_ratio, now, -a, mask, o),
        ),
        "ε_low of CISPO is ε_high": (
            surrogates,
            "cispo",
            lambda *x: cispo(*x[:4], replace(x[4], clip_eps=x[4].eps_high)),
        ),
        "ε is 1 % larger": (
            surrogates,
            "clip",
            lambda *x: clip(*x[:4], replace(x[4], clip_eps=1.01 * x[4].clip_eps)),
        ),
        "k3 has the other sign": (estimators, "k3", lambda log_probs, ref: k3(ref, log_probs)),
        "advantages have the other sign": (equations.ADVANTAGES, "group", lambda r: -center(r)),
        "the paper's guard of the std is 1e-3": (loss, "STD_EPS", 1e-3),
        "the guard of the std is 1e-3": (equations, "STD_EPS", 1e-3),
        "token-mean divides by one token more": (
            equations.TOKEN_WEIGHTS,
            "token-mean",
            lambda *x: 1 / (1 / weigh(*x) + 1),
        ),
        "l is clamped at 10": (loss, "LOG_RATIO_LIMIT", 10.0),
    }
    missed = []
    for words, way in ways.items():
        with broken(*way):
            wrong = failures([compare(case, [0]) for case in cases])
        first = f"; first: {wrong[0]}" if wrong else ""
        print(f"{words}: {len(wrong)} pairs fail{first}", flush=True)
        missed += [] if wrong else [words]
    return missed


# --------------------------------------------------------------------- table


def in_words(settings: dict[str, Any] | None) -> str:
    """Settings for a cell of the table."""
    if settings is None:
        return "–"
    shown = {k: f"{v:g}" if isinstance(v, float) else v for k, v in settings.items()}
    return ", ".join(f"{k} {v}" for k, v in shown.items())


def cells(r: Result) -> list[str]:
    """One line of the table; a pair that differs on purpose is in bold."""
    found = [r.case.method, r.case.words]
    for peer in PEER_LOSSES:
        numbers = " · ".join(f"{x:.0e}" for x in r.found[peer]) if peer in r.found else "–"
        numbers = f"**{numbers}**" if getattr(r.case, f"why_{peer}") else numbers
        found += [in_words(getattr(r.case, peer)), numbers]
    why = dict.fromkeys(filter(None, [r.case.why_trl, r.case.why_verl]))
    return [*found, " ".join(why)]


def report(results: list[Result], seeds: list[int], wrong: list[str]) -> list[str]:
    """The whole of results/conformance.md."""
    pairs = [(peer, r) for r in results for peer in r.found]
    meant = [r for peer, r in pairs if getattr(r.case, f"why_{peer}")]
    tight = [(p, r) for p, r in pairs if r.case.tolerance == TOLERANCE]
    agree = [max(r.found[p]) for p, r in tight if not getattr(r.case, f"why_{p}")]
    loose = [max(r.found[p]) for p, r in pairs if r.case.tolerance > TOLERANCE]
    head = ["method", "choice", "TRL's setting", "to TRL", "verl's setting", "to verl"]
    return [
        f"`python benchmarks/conformance.py --seeds {' '.join(map(str, seeds))}` on {machine()}; "
        f"{versions()}, trl {trl.__version__}, verl {verl.__version__}",
        "",
        f"{len(pairs)} pairs, {len(seeds)} seeds each. {len(pairs) - len(meant)} should agree: the "
        f"largest relative difference is {max(agree):.0e} (token weights and SAPO's 1.05 are "
        f"float32 in ours, step 6e-8), and {max(loose):.0e} with verl's GDPO, which computes in "
        f"float32. {len(meant)} differ on purpose; they are in bold, with the reason. Not as "
        f"expected: {len(wrong)}.",
        *(f"- {sentence}" for sentence in wrong),
        "",
        "Differences are value · gradient. Rewards of rows with a standard deviation are in 0 to "
        "10⁶ where verl takes part, so that its other guard (1e-6) is not felt; the row `rewards "
        "in 0 to 1` shows that guard. `l` = log π - log π_old, `d` = log π - log π_ref. "
        "`clip_ratio_c 1e+09` turns verl's dual clip off.",
        "",
        "Without a counterpart in what is called here: `kl_estimator full`, "
        "`relative_reward_weight`, `baseline_reward_weight`. Not compared: dynamic sampling, and "
        "which tokens `top_entropy` chooses (TRL's threshold is an interpolated quantile, ours the "
        "token of that rank; the sets differ by one token at the most).",
        "",
        *table([*head, "why they differ"], map(cells, results)),
    ]


def main() -> None:
    """Compare, print, write; or break and see."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag, env = parser.add_argument, "make an environment with the peers, and run there"
    flag("--install", action="store_true", help=env)
    flag("--env", type=Path, default=CACHE, help="the folder of that environment")
    flag("--self-test", action="store_true", help="is our code noticed when it is broken?")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    flag("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    cases = all_cases()
    if args.self_test:
        missed = self_test(cases)
        sys.exit("not noticed: " + "; ".join(missed) if missed else 0)
    results = [compare(case, args.seeds) for case in cases]
    wrong = failures(results)
    lines = report(results, args.seeds, wrong)
    print("\n".join(lines))
    write_lines(args.out / "conformance.md", lines)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
