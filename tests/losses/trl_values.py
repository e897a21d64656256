"""Writes trl_values.json: what TRL's own code gives on fixed log-probs, for preference_test.py.

No one version has all losses: kto_pair was last in 0.9.4, which also smooths the labels of the sigmoid loss (cDPO), and
sigmoid_norm came later. So this runs once in each of two environments, and each run replaces its version's values:

    pip install torch trl==1.16.0
    python tests/losses/trl_values.py
    pip install torch trl==0.9.4 transformers==4.42.4 "numpy<2" "pyarrow<18" rich
    python tests/losses/trl_values.py

TRL's trainers are made without __init__ (no model, no data), given the attributes that their losses read, and called:
1.16.0's DPOTrainer._compute_loss with a model that returns the log-probs of tokens, its CPOTrainer (SimPO) and
ORPOTrainer through get_batch_logps and their losses, 0.9.4's DPOTrainer.dpo_loss. All is float64, except what TRL
itself makes float32. Log-probs of tokens are multiples of 2^-10: their sums are exact in float32, so that a difference
comes from the losses.
"""

import collections
import itertools
import json
import pathlib
import random
import types
from typing import Any

import torch
import trl

FILE = pathlib.Path(__file__).with_suffix(".json")
BETAS = (0.01, 0.1, 0.5)
SMOOTHINGS = (0.0, 0.1, 0.3)
GAMMAS = (0.5, 1.4)
SIDES = ("chosen", "rejected")
# Tokens of the chosen and of the rejected answer of each pair.
LENGTHS = ((1, 3), (4, 2), (7, 7), (2, 12), (33, 5), (64, 57))
PROMPT = 2  # slots before an answer


def make_pairs(seed: int, drift: float) -> dict:
    """Returns the log-probs of tokens, {stream: {side: a list of lists}}; the policy is the reference plus drift."""
    source = random.Random(seed)
    pairs = {stream: {side: [] for side in SIDES} for stream in ("policy", "reference")}
    for side, length in ((side, n) for lengths in LENGTHS for side, n in zip(SIDES, lengths, strict=True)):
        reference = [-0.01 - source.expovariate(1.0) for _ in range(length)]
        policy = [min(logp + source.gauss(drift, 0.4), -0.004) for logp in reference]
        for stream, logps in (("policy", policy), ("reference", reference)):
            pairs[stream][side].append([round(logp * 1024) / 1024 for logp in logps])
    return pairs


# Both estimates of the KL divergence in kto_pair are 0 where the policy has moved away from the answers.
PAIRS = {"away": make_pairs(1, -0.3), "towards": make_pairs(2, 0.3)}


def to_rows(answers: list[list[float]]) -> torch.Tensor:
    """Returns float64[N, T] log-probs of slots 1, 2, ... of prompt, answer and padding; 0 outside of the answer."""
    rows = torch.zeros(len(answers), PROMPT - 1 + max(map(len, answers)), dtype=torch.float64)
    for row, answer in zip(rows, answers, strict=True):
        row[PROMPT - 1 : PROMPT - 1 + len(answer)] = torch.tensor(answer, dtype=torch.float64)
    return rows


def make_trainer(kind: type, **attributes: Any) -> Any:
    """Returns a trainer that was never initialised, on one process and the CPU."""
    alone = types.SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = object.__new__(kind)
    vars(trainer).update(attributes, accelerator=alone)
    return trainer


def to_case(kind: str, pairs: str, losses, rewards, gradient, *, beta, label_smoothing=0.0, gamma=0.0, **more) -> dict:
    """Returns one entry of the file; losses [N] (kto_pair: [2 N]), rewards and gradient an [N] for each side."""
    return {
        "trl": trl.__version__,
        "kind": kind,
        "pairs": pairs,
        "options": {"beta": beta, "label_smoothing": label_smoothing, "gamma": gamma},
        "losses": torch.as_tensor(losses, dtype=torch.float64).tolist(),
        "rewards": {side: x.tolist() for side, x in zip(SIDES, rewards, strict=True)},
        "gradient_of_mean": {side: x.tolist() for side, x in zip(SIDES, gradient, strict=True)},
        **more,
    }


# --- 1.16.0 ---


class Model(torch.nn.Module):
    """Answers any batch with these log-probs of its tokens."""

    def __init__(self, logps: torch.Tensor):
        super().__init__()
        zeros = torch.zeros_like(logps)
        self.is_gradient_checkpointing = False
        self.outputs = types.SimpleNamespace(
            log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=torch.zeros_like(logps, dtype=torch.bool)
        )

    def forward(self, **_) -> types.SimpleNamespace:
        return self.outputs


def run_dpo_trainer(pairs: dict, kind: str, beta: float, label_smoothing: float) -> tuple[float, dict, list]:
    """Returns DPOTrainer's loss of a batch, its logged metrics, and the loss' gradient by answer for each side."""
    # TRL's batch is the chosen answers, then the rejected ones.
    streams = {stream: to_rows(sides["chosen"] + sides["rejected"]) for stream, sides in pairs.items()}
    streams["policy"].requires_grad_()
    mask = torch.nn.functional.pad((streams["reference"] != 0).long(), (1, 0))

    policy, reference = Model(streams["policy"]), Model(streams["reference"])
    trainer = make_trainer(
        trl.DPOTrainer,
        model=policy,
        ref_model=reference,
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        _tp_size=1,
        _total_train_tokens=0,
        _metrics={"train": collections.defaultdict(list)},
    )
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    loss = trainer._compute_loss(policy, inputs, return_outputs=False)
    loss.backward()
    # Each token of an answer has the gradient of the answer.
    gradient = streams["policy"].grad[:, PROMPT - 1].chunk(2)
    return loss.item(), {name: values[-1] for name, values in trainer._metrics["train"].items()}, gradient


def dpo_case(kind: str, name: str, beta: float, label_smoothing: float) -> dict:
    pairs = PAIRS[name]
    loss, metrics, gradient = run_dpo_trainer(pairs, kind, beta, label_smoothing)
    singles = [
        run_dpo_trainer(
            {stream: {side: [answers[n]] for side, answers in sides.items()} for stream, sides in pairs.items()},
            *(kind, beta, label_smoothing),
        )
        for n in range(len(LENGTHS))
    ]
    rewards = [
        torch.tensor([metrics[f"rewards/{side}"] for _, metrics, _ in singles], dtype=torch.float64) for side in SIDES
    ]
    logged = {key: value for key, value in metrics.items() if key.startswith(("rewards/", "logps/"))}
    losses = [loss for loss, _, _ in singles]
    options = {"beta": beta, "label_smoothing": label_smoothing}
    return to_case(kind, name, losses, rewards, gradient, **options, loss=loss, metrics=logged)


def mean_logps(trainer: type, answers: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns get_batch_logps' means over tokens, and the log-probs of slots that they were made of."""
    rows = to_rows(answers).requires_grad_()
    # A vocabulary of two: token 0, which every slot of an answer holds, and the other one.
    logits = torch.stack([rows, torch.log(-torch.expm1(rows.clamp(max=-1e-3)))], dim=-1)
    labels = torch.nn.functional.pad(torch.where(rows == 0, -100, 0), (1, 0), value=-100)
    logits = torch.nn.functional.pad(logits, (0, 0, 0, 1))
    return trainer.get_batch_logps(logits, labels, average_log_prob=True), rows


def reference_free_case(kind: str, name: str, **options: float) -> dict:
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    trainer = {"simpo": CPOTrainer, "orpo": ORPOTrainer}[kind]
    (chosen, chosen_rows), (rejected, rejected_rows) = (mean_logps(trainer, PAIRS[name]["policy"][s]) for s in SIDES)
    if kind == "simpo":
        made = make_trainer(
            trainer,
            loss_type=kind,
            alpha=0.0,
            beta=options["beta"],
            label_smoothing=options["label_smoothing"],
            simpo_gamma=options["gamma"],
        )
        losses, *rewards = made.cpo_loss(chosen, rejected)
    else:
        # ORPOTrainer subtracts what this returns from the chosen answers' cross-entropy.
        losses, *rewards = make_trainer(trainer, beta=options["beta"]).odds_ratio_loss(chosen, rejected)[:3]
        losses = -losses
    losses.mean().backward()
    gradient = [rows.grad[:, PROMPT - 1] for rows in (chosen_rows, rejected_rows)]
    return to_case(kind, name, losses.detach(), rewards, gradient, **options)


def sft_case(name: str) -> dict:
    loss, _, gradient = run_dpo_trainer(PAIRS[name], "sft", 0.1, 0.0)
    return {"trl": trl.__version__, "pairs": name, "loss": loss, "gradient_of_chosen": gradient[0].tolist()}


def recent_values() -> tuple[list[dict], list[dict]]:
    cases = []
    for name, beta in itertools.product(PAIRS, BETAS):
        cases += [dpo_case(kind, name, beta, 0.0) for kind in ("sigmoid", "sigmoid_norm", "hinge", "ipo")]
        cases += [dpo_case("robust", name, beta, label_smoothing) for label_smoothing in SMOOTHINGS]
        for label_smoothing, gamma in itertools.product(SMOOTHINGS, GAMMAS):
            options = {"beta": beta, "label_smoothing": label_smoothing, "gamma": gamma}
            cases.append(reference_free_case("simpo", name, **options))
        cases.append(reference_free_case("orpo", name, beta=beta))
    return cases, [sft_case(name) for name in PAIRS]


# --- 0.9.4 ---


def old_dpo_case(kind: str, name: str, beta: float, label_smoothing: float) -> dict:
    sums = {
        (stream, side): to_rows(answers).sum(dim=1)
        for stream, sides in PAIRS[name].items()
        for side, answers in sides.items()
    }
    policy = [sums["policy", side].requires_grad_() for side in SIDES]
    trainer = make_trainer(
        trl.DPOTrainer, loss_type=kind, beta=beta, label_smoothing=label_smoothing, reference_free=False
    )
    losses, *rewards = trainer.dpo_loss(*policy, *(sums["reference", side] for side in SIDES))
    losses.mean().backward()
    gradient = [logps.grad for logps in policy]
    options = {"beta": beta, "label_smoothing": label_smoothing}
    return to_case(kind, name, losses.detach(), rewards, gradient, **options)


def old_values() -> tuple[list[dict], list[dict]]:
    cases = []
    for name, beta in itertools.product(PAIRS, BETAS):
        cases += [old_dpo_case("sigmoid", name, beta, label_smoothing) for label_smoothing in SMOOTHINGS]
        cases.append(old_dpo_case("kto_pair", name, beta, 0.0))
    return cases, []


def main() -> None:
    values = {"1.16.0": recent_values, "0.9.4": old_values}
    if trl.__version__ not in values:
        raise SystemExit(f"trl {trl.__version__} is installed; this reads the losses of {' and '.join(values)}.")
    cases, sft = values[trl.__version__]()
    pairs = {
        name: {
            **{
                stream: {side: [sum(a) for a in answers] for side, answers in sides.items()}
                for stream, sides in streams.items()
            },
            "num_tokens": {side: [lengths[i] for lengths in LENGTHS] for i, side in enumerate(SIDES)},
        }
        for name, streams in PAIRS.items()
    }
    stored = json.loads(FILE.read_text()) if FILE.exists() else {"pairs": pairs, "cases": [], "sft": []}
    if stored["pairs"] != pairs:
        raise SystemExit(f"{FILE.name} was made from other log-probs; delete it and run this under both versions.")
    for key, new in (("cases", cases), ("sft", sft)):
        kept = [case for case in stored[key] if case["trl"] != trl.__version__]
        stored[key] = sorted(kept + new, key=lambda case: case["trl"])
    # One case a line, so that a change shows which.
    lines = [f' "{key}": [\n  ' + ",\n  ".join(map(json.dumps, stored[key])) + "\n ]" for key in ("cases", "sft")]
    FILE.write_text('{\n "pairs": ' + json.dumps(pairs) + ",\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
