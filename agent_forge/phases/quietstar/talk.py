"""Quiet-STaR's model to train: think at the hard positions, predict with the thought, keep what helped.

Zelikman et al., arXiv 2403.09629. One training loss:

1. read the batch without gradients and choose the points (:mod:`injection`);
2. read it again with gradients and write ``thoughts`` thoughts per point (:mod:`branches`), at temperature 1;
3. read each thought again as a whole, then ``ahead`` true tokens, and mix the predictions with those of the model
   that did not think (:mod:`mixing`);
4. loss = the ordinary loss + cross-entropy of the mixture on the true tokens + REINFORCE + KL to the parent.

The reward of a thought is the log-likelihood of the true tokens under its mixture minus the mean over the thoughts of
its point; only positive rewards count. As in the authors' code a thought's log-probability is the mean over its tokens,
taken at temperature 3.

Shapes: B rows, T tokens, D width, V vocabulary, N points, n thoughts per point, R = N * n branches (point by point),
A true tokens ahead, S tokens a branch reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agent_forge.phases.quietstar.branches import (
    Reading,
    Thoughts,
    read_context,
    ruled_out,
    think,
    thought_scores,
    with_truth,
)
from agent_forge.phases.quietstar.injection import (
    Points,
    attention_dispersion,
    choose_points,
    entropy,
    outside_thoughts,
    signals_of,
)
from agent_forge.phases.quietstar.mixing import Mixer, make_mixer
from agent_forge.phases.quietstar.talk_config import Marks, TalkConfig
from forgekit.errors import ArtifactError, ConfigError, TrainingError
from forgekit.models.base import Loss
from forgekit.models.constants import IGNORE
from forgekit.models.hidden import hidden, read_out

KL_CHUNK = 1024
"""Positions whose two distributions over the vocabulary are in memory at once."""
TOLD = (
    "nats_with_thoughts", "nats_without_thoughts", "reward_mean", "reward_positive_share", "policy_loss",
    "mixing_weight_alpha", "reasoning_entropy", "thought_length", "thought_stopped_share", "thoughts_left_out",
)  # fmt: skip
"""What thoughts tell of a training step; 0 where no position was thought at."""
MIXER_WEIGHTS, MIXER_CONFIG = "mixer.safetensors", "mixer.json"


@dataclass(frozen=True)
class Talk:
    """Predictions of the true tokens after thoughts.

    Attributes:
        thoughts: the thoughts.
        base_NA: log-probability of the true tokens without a thought.
        mixed_NnA: with each thought.
        known_NA: which of them are known and may be predicted; the others hold 0.
        joint_M: with all thoughts of a point heard together, known ones only; None where that is the same.
        heard_Nn: which thoughts count.
        weight, entropy: of the mixtures, means over what is known, detached.
        own_RSD: hidden states of the branches.
        read: tokens that the branches read.
    """

    thoughts: Thoughts
    base_NA: Tensor
    mixed_NnA: Tensor
    known_NA: Tensor
    joint_M: Tensor | None
    heard_Nn: Tensor
    weight: Tensor
    entropy: Tensor
    own_RSD: Tensor
    read: int


class QuietTalker(nn.Module):
    """A model, a mixer, and what trains both. Follows the protocol that the training loop needs.

    Args:
        model: any model of the protocol with ``features`` and ``read_out``; trained in place.
        marks: the markers of a thought (:func:`talk_config.marks_of`).
        config: how to think and what to learn from it.
        parent: frozen, not part of this module: neither trained nor saved nor moved with it.
        kl_coefficient: weight of the divergence from the parent (``MuGrokConfig.kl_coefficient``).

    Raises:
        ConfigError: a divergence is weighed but there is no parent; a marker is no row of the vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        marks: Marks,
        config: TalkConfig,
        parent: nn.Module | None = None,
        kl_coefficient: float = 0.0,
    ) -> None:
        super().__init__()
        if kl_coefficient and parent is None:
            raise ConfigError(
                f"{kl_coefficient} weighs the distance from a parent that is not there",
                where="kl_coefficient",
                remedy="give the parent, or set it to 0",
            )
        if max(marks.start, marks.stop, *marks.forbidden) >= model.config.vocab_size:
            raise ConfigError(
                f"has no rows for the markers in its vocabulary of {model.config.vocab_size}",
                where="model",
                remedy="use the tokenizer that came with it",
            )
        self.model, self.marks, self.talk, self.kl_coefficient = model, marks, config, kl_coefficient
        self.mixer = make_mixer(config.mixer, model.config.d_model)
        self._parent = (parent.eval().requires_grad_(False),) if parent is not None else ()
        # FLOPs in millions, thoughts, thoughts left out; of finished steps, so that checkpoints keep them.
        self.register_buffer("spent_3", torch.zeros(3, dtype=torch.long))
        self._pending = [0.0, 0, 0]

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def checkpoint_activations(self) -> bool:
        """Whether the model recomputes activations to save memory; the training loop sets it."""
        return getattr(self.model, "checkpoint_activations", False)

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        if hasattr(self.model, "checkpoint_activations"):
            self.model.checkpoint_activations = on

    def attentions(self) -> list:
        """The model's attention layers, for QK-Clip."""
        return self.model.attentions()

    def flops_per_token(self, context: int) -> float:
        """The model's own forward FLOPs; what thinking adds is counted in :attr:`spent_flops`."""
        return self.model.flops_per_token(context)

    @property
    def spent_flops(self) -> float:
        """FLOPs of all finished training steps of this process, tokens of thoughts included."""
        return float(self.spent_3[0]) * 1e6

    @property
    def thoughts_written(self) -> tuple[int, int]:
        """Thoughts of all finished training steps, and those among them that were left out as no number."""
        return int(self.spent_3[1]), int(self.spent_3[2])

    def after_step(self) -> None:
        """The model's own bookkeeping after an optimizer step, and ours."""
        if hasattr(self.model, "after_step"):
            self.model.after_step()
        flops, thoughts, left_out = self._pending
        self.spent_3 += self.spent_3.new_tensor([round(flops / 1e6), thoughts, left_out])
        self._pending = [0.0, 0, 0]

    def head(self, h: Tensor) -> Tensor:
        """Scores of the next true token: the markers are never part of the text."""
        return ruled_out(read_out(self.model, h), (self.marks.start, self.marks.stop))

    def training_loss(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Loss:
        """Ordinary loss, mixture, REINFORCE and KL (``labels`` are already shifted).

        Micro batches weigh by their supervised tokens; the thinking losses are means over a micro batch's points.

        Raises:
            TrainingError: no thought has a finite reward while the model itself is finite.
        """
        ordinary = self.model.training_loss(input_ids_BT, labels_BT)
        if not bool(ordinary.nats.isfinite()):
            return ordinary  # the training loop goes back to its last good state
        points = self.points(input_ids_BT, labels_BT)
        reading = read_context(self.model, input_ids_BT, points, self.talk.branching) if len(points) else None
        total, parts = self.talk.base_weight * ordinary.total, dict(ordinary.parts)
        parts["injection_points"] = torch.tensor(len(points) / len(input_ids_BT))
        talk = self._talk_finite(reading, points, input_ids_BT, labels_BT) if reading else None
        # The same names in every batch: several processes add them up in their order.
        parts |= dict.fromkeys(TOLD, torch.zeros(()))
        if talk is not None:
            added, found = self._learn(talk)
            total, parts = total + added, parts | found
        if self.kl_coefficient:
            features = reading.features_BTD if reading else hidden(self.model, input_ids_BT)[0]
            kl = self._kl(features, input_ids_BT, labels_BT)
            total, parts["kl"] = total + self.kl_coefficient * kl, kl.detach()
        flops = self._count(input_ids_BT, ordinary.tokens, talk)
        parts["flops_per_label"] = torch.tensor(flops / max(1, ordinary.tokens))
        return Loss(total, ordinary.nats, ordinary.tokens, parts)

    @torch.no_grad()
    def points(self, input_ids_BT: Tensor, labels_BT: Tensor, use_loss: bool = True) -> Points:
        """Where to think in these rows.

        Args:
            labels_BT: thinking needs a true next token to be judged by.
            use_loss: let the loss be a sign of difficulty; not where labels would not be known in use.
        """
        training = self.model.training
        self.model.eval()  # nothing random, and nothing that QK-Clip should see
        h_BTD, dispersion = attention_dispersion(self.model, lambda: hidden(self.model, input_ids_BT)[0])
        self.model.train(training)
        plan = self.talk.points
        signals = signals_of(self.model, h_BTD, labels_BT if use_loss and plan.loss else None)
        if dispersion is not None:
            signals["dispersion"] = dispersion
        wanted = {name: signal for name, signal in signals.items() if getattr(plan, name)}
        return choose_points(wanted or signals, self._eligible(input_ids_BT, labels_BT), plan)

    def _eligible(self, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Positions with a true next token, outside written thoughts, with room for a thought in the context."""
        text = (labels_BT != IGNORE) & (labels_BT != self.marks.start) & (labels_BT != self.marks.stop)
        eligible = text & outside_thoughts(ids_BT, self.marks)
        limit = getattr(self.model, "context_limit", None)
        if limit:  # positions that were never learned; models of the house have rotary ones and no such limit
            room = limit - self.talk.points.max_length - self.talk.ahead - 1
            eligible &= torch.arange(ids_BT.shape[1], device=ids_BT.device) < room
        return eligible

    def _talk_finite(self, reading: Reading, points: Points, ids_BT: Tensor, labels_BT: Tensor) -> Talk:
        """Think, and talk with every thought that leads to numbers; the others are emptied and left out.

        Taking them out of a sum is not enough: in the backward pass zero times no-number is no number.
        """
        point_R = torch.arange(len(points), device=ids_BT.device).repeat_interleave(self.talk.thoughts)
        limit_R = points.limit_N[point_R]
        thoughts = think(self.model, reading, point_R, limit_R, self.marks, self.talk.temperature)
        place = (reading, points, ids_BT, labels_BT)
        talk = self.speak(thoughts, *place)
        heard_Nn = talk.heard_Nn
        if not bool(heard_Nn.all()):
            if bool(heard_Nn.any()):
                talk = self.speak(thoughts.without(~heard_Nn.flatten()), *place)
            if not bool(talk.heard_Nn.all()):
                raise TrainingError(
                    "no thought has a finite reward",
                    where="quietstar",
                    remedy="lower train.optimizer.lr, or start from a parent whose logits are finite",
                )
        return replace(talk, heard_Nn=heard_Nn)

    def speak(self, thoughts: Thoughts, reading: Reading, points: Points, ids_BT: Tensor, labels_BT: Tensor) -> Talk:
        """Read the thoughts and the true tokens after them, and predict those tokens with and without.

        Args:
            thoughts: as many for each point, in the order of the points.
        """
        (N, A), D = (len(points), self.talk.ahead), self.config.d_model
        read_RS = with_truth(thoughts, ids_BT, points, self.marks, A)
        h_RSD, _ = reading.read(read_RS, reading.start(thoughts.point_R))
        step_A = torch.arange(A, device=ids_BT.device)
        at_RA = 1 + thoughts.length_R[:, None] + step_A
        thought_NAnD = h_RSD.gather(1, at_RA[..., None].expand(-1, -1, D)).view(N, -1, A, D).transpose(1, 2)
        true_NA, known_NA = self._truth(points, labels_BT)
        place_NA = (points.at_N[:, None] + step_A).clamp(max=ids_BT.shape[1] - 1)
        base_NAD = reading.features_BTD[points.row_N[:, None], place_NA]
        true_M, base_MD, thought_MnD = true_NA[known_NA], base_NAD[known_NA], thought_NAnD[known_NA]
        each = self.mixer(base_MD, thought_MnD, self.head)
        joint = self.mixer.together(base_MD, thought_MnD, self.head) if self.mixer.joint else None
        with torch.no_grad():
            base_M = self.head(base_MD).log_softmax(-1).gather(1, true_M[:, None])[:, 0]
        n = thought_MnD.shape[1]
        mixed_Mn = each.log_p.gather(2, true_M[:, None, None].expand(-1, n, 1))[..., 0]
        blank_NA = torch.zeros(N, A, device=base_M.device)
        mixed_NAn = blank_NA[..., None].repeat(1, 1, n).index_put(known_NA.nonzero(as_tuple=True), mixed_Mn)
        return Talk(
            thoughts=thoughts,
            base_NA=blank_NA.masked_scatter(known_NA, base_M),
            mixed_NnA=mixed_NAn.transpose(1, 2),
            known_NA=known_NA,
            joint_M=None if joint is None else joint.log_p.gather(1, true_M[:, None])[:, 0],
            heard_Nn=mixed_NAn.isfinite().all(1),
            weight=each.weight.detach().mean(),
            entropy=entropy(each.log_p.detach()).mean(),
            own_RSD=h_RSD,
            read=read_RS.numel(),
        )

    def _truth(self, points: Points, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The true tokens after every point, and which of them are known text (N, A); others hold 0."""
        step_A = torch.arange(self.talk.ahead, device=labels_BT.device)
        padded_BT = F.pad(labels_BT, (0, self.talk.ahead), value=IGNORE)
        true_NA = padded_BT[points.row_N[:, None], points.at_N[:, None] + step_A]
        text_NA = (true_NA != self.marks.start) & (true_NA != self.marks.stop)
        known_NA = (true_NA != IGNORE) & text_NA.cumprod(1).bool()  # beyond a marker there is a written thought
        return true_NA.masked_fill(~known_NA, 0), known_NA

    def _learn(self, talk: Talk) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the mixture plus REINFORCE, weighted, and what to log."""
        heard_Nn, known_NA = talk.heard_Nn, talk.known_NA
        counted_NnA = heard_Nn[..., None] & known_NA[:, None]
        nats = -talk.mixed_NnA[counted_NnA].mean()
        with_thoughts = nats if talk.joint_M is None else (nats - talk.joint_M.mean()) / 2
        reward_Nn = rewards(talk.mixed_NnA.detach().sum(-1), heard_Nn)
        kept_R = reward_Nn.clamp(min=0).flatten()
        policy = self._policy(talk, kept_R) / max(1, int(heard_Nn.sum()))
        thoughts = talk.thoughts
        found = {
            "nats_with_thoughts": with_thoughts.detach(),
            "nats_without_thoughts": -talk.base_NA[known_NA].mean(),
            "reward_mean": kept_R.sum() / heard_Nn.sum(),
            "reward_positive_share": (kept_R > 0).sum() / heard_Nn.sum(),
            "policy_loss": policy.detach(),
            "mixing_weight_alpha": talk.weight,
            "reasoning_entropy": talk.entropy,
            "thought_length": thoughts.length_R.float().mean(),
            "thought_stopped_share": thoughts.stopped_R.float().mean(),
            "thoughts_left_out": (~heard_Nn).sum().float(),
        }
        return self.talk.talk_weight * with_thoughts + self.talk.policy_weight * policy, found

    def _policy(self, talk: Talk, kept_R: Tensor) -> Tensor:
        """Minus the kept rewards times the mean log-probability of each thought's own tokens."""
        chosen = kept_R.nonzero()[:, 0]
        if not len(chosen) or not self.talk.policy_weight:
            return kept_R.new_zeros(())
        thoughts, reward_C = talk.thoughts.rows(chosen), kept_R[chosen]
        # A stop marker that was said is an action like any other; one that was forced is none.
        actions_C = thoughts.length_R + thoughts.stopped_R
        said_CL = F.pad(thoughts.ids_RL, (0, 1), value=self.marks.stop)[:, : talk.own_RSD.shape[1]]
        mine_CL = torch.arange(said_CL.shape[1], device=said_CL.device) < actions_C[:, None]
        h_KD = talk.own_RSD[chosen, : said_CL.shape[1]][mine_CL]
        scores_KV = thought_scores(self.model, h_KD, self.marks) / self.talk.policy_temperature
        log_p_K = scores_KV.log_softmax(-1).gather(1, said_CL[mine_CL][:, None])[:, 0]
        share_CL = (reward_C / actions_C)[:, None].expand_as(mine_CL)
        return -(log_p_K * share_CL[mine_CL]).sum()

    def _kl(self, features_BTD: Tensor, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """KL(parent || model) of the next token without thoughts, mean over supervised positions, in nats."""
        (parent,) = self._parent
        parent.to(ids_BT.device)
        pick_N = (labels_BT.reshape(-1) != IGNORE).nonzero()[:, 0]
        with torch.no_grad():
            theirs_ND = hidden(parent, ids_BT)[0].flatten(0, 1)[pick_N]
        ours_ND = features_BTD.flatten(0, 1)[pick_N]

        def part(ours: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                target = read_out(parent, theirs).log_softmax(-1)
            return F.kl_div(read_out(self.model, ours).log_softmax(-1), target, reduction="sum", log_target=True)

        chunks = list(zip(ours_ND.split(KL_CHUNK), theirs_ND.split(KL_CHUNK)))
        if len(chunks) > 1:
            parts = [checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [part(*chunk) for chunk in chunks]
        return sum(parts) / max(1, len(pick_N))

    def _count(self, ids_BT: Tensor, labels: int, talk: Talk | None) -> float:
        """FLOPs of one training loss and its backward pass; kept until the step is finished."""
        tokens, context = ids_BT.numel(), ids_BT.shape[1]
        head = head_flops(self.config)
        body = self.model.flops_per_token(context) - head
        flops = ordinary_flops(self.model, context, labels / tokens) * tokens
        flops += tokens * (body + head)  # choosing the points
        flops += tokens * (3 * body if talk or self.kl_coefficient else 0)  # the context that is read with gradients
        if self.kl_coefficient:
            flops += tokens * body + labels * 4 * head
        if talk is not None:
            thoughts, known = talk.thoughts, int(talk.known_NA.sum())
            flops += thoughts.read * (body + head) + 3 * body * talk.read
            flops += 3 * head * (known * (2 + self.talk.thoughts) + int(thoughts.length_R.sum()))
            self._pending[1] += len(thoughts.point_R)
            self._pending[2] += int((~talk.heard_Nn).sum())
        self._pending[0] += flops
        return flops


def head_flops(config: Any) -> float:
    """Forward FLOPs of the output head per token."""
    return config.head_flops() if hasattr(config, "head_flops") else 2 * config.vocab_size * config.d_model


def ordinary_flops(model: nn.Module, context: int, supervised: float) -> float:
    """FLOPs per input token of an ordinary training step, forward and backward: what a control is given to spend.

    Args:
        context: tokens per row.
        supervised: share of the tokens that carry a label.
    """
    if hasattr(model.config, "train_flops_per_token"):
        return model.config.train_flops_per_token(context, supervised)
    return 3 * model.flops_per_token(context)


def rewards(log_p_Nn: Tensor, heard_Nn: Tensor) -> Tensor:
    """Log-likelihood minus the mean over the heard thoughts of the same point; 0 for what was not heard."""
    log_p_Nn = log_p_Nn.masked_fill(~heard_Nn, 0.0)
    mean_N1 = log_p_Nn.sum(1, keepdim=True) / heard_Nn.sum(1, keepdim=True).clamp_min(1)
    return (log_p_Nn - mean_N1).masked_fill(~heard_Nn, 0.0)


@dataclass(frozen=True)
class QuietNats:
    """Negative log-likelihoods of the same true tokens with thoughts and without, sums per row (B,), in nats.

    Attributes:
        with_B, without_B: over the tokens that a thought stands before.
        covered_B: how many those are.
        row_with_B, row_without_B: over all labelled tokens; where no thought stands both are the same.
        labels_B: how many those are.
        thought_tokens: tokens read to write the thoughts and to read on after them.
        flops: forward FLOPs of the evaluation with thoughts, and without, over all rows.
    """

    with_B: Tensor
    without_B: Tensor
    covered_B: Tensor
    row_with_B: Tensor
    row_without_B: Tensor
    labels_B: Tensor
    thought_tokens: int
    flops: tuple[float, float]


@torch.no_grad()
def quiet_nats(talker: QuietTalker, input_ids_BT: Tensor, labels_BT: Tensor) -> QuietNats:
    """Score true tokens with greedy thoughts and without.

    Points are chosen without the loss: in use the next token is not known. A token within reach of two thoughts
    belongs to the nearer one. The markers are ruled out on both sides, and labels that are markers are left out.

    Args:
        talker: model and mixer; put into eval mode while it runs, and back.
        input_ids_BT: rows without padding before a label.
        labels_BT: already shifted, IGNORE where nothing counts.
    """
    training = talker.training
    talker.eval()
    marks, (B, T), model = talker.marks, input_ids_BT.shape, talker.model
    text_BT = (labels_BT != IGNORE) & (labels_BT != marks.start) & (labels_BT != marks.stop)
    points = talker.points(input_ids_BT, labels_BT, use_loss=False)
    reading = read_context(model, input_ids_BT, points, talker.talk.branching) if len(points) else None
    features_BTD = reading.features_BTD if reading else hidden(model, input_ids_BT)[0]
    without_BT = torch.zeros(B, T, device=input_ids_BT.device)
    # Row by row: the scores of all rows over a large vocabulary need not be in memory together.
    for row, (h_TD, text_T) in enumerate(zip(features_BTD, text_BT)):
        log_p = talker.head(h_TD[text_T]).log_softmax(-1)
        without_BT[row, text_T] = -log_p.gather(1, labels_BT[row, text_T][:, None])[:, 0]
    with_BT, covered_BT, spent = without_BT.clone(), torch.zeros_like(text_BT), 0
    if reading:
        point_N = torch.arange(len(points), device=input_ids_BT.device)
        thoughts = think(model, reading, point_N, points.limit_N, marks, 0.0)
        talk = talker.speak(thoughts, reading, points, input_ids_BT, labels_BT)
        spent = thoughts.read + talk.read
        for step in reversed(range(talker.talk.ahead)):
            known_N = talk.known_NA[:, step]
            place = (points.row_N[known_N], points.at_N[known_N] + step)
            with_BT[place], covered_BT[place] = -talk.mixed_NnA[known_N, 0, step], True
    talker.train(training)
    each = model.flops_per_token(T)
    return QuietNats(
        with_B=(with_BT * covered_BT).sum(1),
        without_B=(without_BT * covered_BT).sum(1),
        covered_B=covered_BT.sum(1),
        row_with_B=with_BT.sum(1),
        row_without_B=without_BT.sum(1),
        labels_B=text_BT.sum(1),
        thought_tokens=spent,
        flops=(each * (2 * B * T + spent), each * B * T),
    )


def mixer_files(talker: QuietTalker) -> dict[str, bytes]:
    """The mixer as files of an artifact: weights and configuration, by file name."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in talker.mixer.state_dict().items()}
    record = {
        "width": talker.mixer.width,
        "talk": talker.talk.model_dump(mode="json"),
        "marks": talker.marks.model_dump(mode="json"),
    }
    return {MIXER_WEIGHTS: save(tensors), MIXER_CONFIG: (json.dumps(record, indent=2) + "\n").encode()}


def read_mixer(folder: Path | str, model: nn.Module) -> Mixer:
    """The mixer that :func:`mixer_files` wrote, on the model's device, in eval mode.

    Raises:
        ArtifactError: a file is missing or corrupt, or was written for a model of another width.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / MIXER_CONFIG).read_text(encoding="utf-8"))
        tensors = load((folder / MIXER_WEIGHTS).read_bytes())
        width, settings = record["width"], record["talk"]
    except FileNotFoundError as error:
        raise ArtifactError(
            "no mixer here", where=str(error.filename), remedy="use a folder that Quiet-STaR wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"unreadable mixer ({error})", where=str(folder), remedy="restore the artifact") from None
    if width != model.config.d_model:
        raise ArtifactError(
            f"made for width {width}, the model has {model.config.d_model}",
            where=str(folder / MIXER_CONFIG),
            remedy="use the model that it was trained with",
        )
    config = TalkConfig.build(settings, source=str(folder / MIXER_CONFIG), path="talk")
    mixer = make_mixer(config.mixer, width)
    try:
        mixer.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtifactError(
            f"weights do not fit: {reason}", where=str(folder / MIXER_WEIGHTS), remedy="restore the artifact"
        ) from None
    return mixer.to(next(model.parameters()).device).eval()
