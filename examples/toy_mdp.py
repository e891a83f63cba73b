"""Fig. 11 of the paper: what do samples add to demonstrations, where mistakes can be mended or not?

    python examples/toy_mdp.py

The demonstration has no mistakes, so it never shows how to return from one. An agent that also
learns from its own episodes could find out, where there is a way back. The paper reports that
online IQLearn then succeeds over 11 % more often than offline, and no more often where there is
none. Here each objective is trained offline and online, with Q in a table and in a small network; a
table and a figure say which of them reproduces that. Success rates are computed exactly.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from toy_chain import Chain, chains
from toy_report import Result, draw, sentences, table

import irl_ops.torch as irl

GAMMA = 0.9
LAM = 0.1  # of Eqs. 14 and 16
CHI2 = 0.05  # weight of r² in the original objective
EPISODES, REFRESH = 8, 5  # in the buffer, and iterations between new ones
LEARNING_RATE = {"table": 0.05, "network": 0.01}


class Batch(NamedTuple):
    """The rows of all copies [E * (1 + EPISODES), T]; the first of each copy is the expert's."""

    logits: Tensor
    labels: Tensor
    is_expert: Tensor
    weights: Tensor  # sum to 1 in each copy, for the expert and for the agent


Objective = Callable[[Batch, float], Tensor]
ONE = (1.0, 1.0)  # the weights are means already


def mle(batch: Batch, alpha: float) -> Tensor:
    """Maximum likelihood of the demonstration."""
    where = batch.is_expert[:, None].expand_as(batch.labels)
    return irl.mle_loss(
        batch.logits, batch.labels, where=where, token_weights=batch.weights, num_items=1.0
    )


def eq_16(batch: Batch, alpha: float, detach_next: bool = False) -> Tensor:
    """The paper's objective, offline (Eq. 14) at alpha = 0."""
    return irl.online_iqlearn_loss(
        *batch[:3], alpha=alpha, lam=LAM, gamma=GAMMA, detach_next=detach_next,
        token_weights=batch.weights, num_items=ONE,
    )  # fmt: skip


def original(batch: Batch, alpha: float, semi_gradient: bool = False) -> Tensor:
    """The value objective of the original IQ-Learn."""
    stats = irl.token_stats(batch.logits, batch.labels, gamma=GAMMA, entropy=False)
    return irl.iq_value_loss(
        stats, batch.is_expert, alpha=alpha, lam=CHI2, semi_gradient=semi_gradient,
        token_weights=batch.weights, num_items=ONE,
    )  # fmt: skip


OBJECTIVES: dict[str, Objective] = {
    "MLE": mle,
    "Eq. 16": eq_16,
    "Eq. 16, V' stopped": lambda batch, alpha: eq_16(batch, alpha, detach_next=True),
    "original": original,
    "original, semi-gradient": lambda batch, alpha: original(batch, alpha, semi_gradient=True),
}


class Table(nn.Module):
    """Q of every state and action, of every copy."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.q = nn.Parameter(0.1 * torch.randn(len(chain.recovery), chain.states, 2))

    def forward(self) -> Tensor:
        """Q [E, S, 2]."""
        return self.q


class Network(nn.Module):
    """A network with one hidden layer of 32 for every copy."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        copies = len(chain.recovery)
        self.register_buffer("features", chain.features())
        self.first = nn.Parameter(torch.randn(copies, chain.length + 1, 32))
        self.bias = nn.Parameter(torch.randn(copies, 1, 32))
        self.second = nn.Parameter(0.1 * torch.randn(copies, 32, 2))

    def forward(self) -> Tensor:
        """Q [E, S, 2]."""
        return torch.tanh(self.features @ self.first + self.bias) @ self.second


MODELS: dict[str, type[nn.Module]] = {"table": Table, "network": Network}


def train(
    chain: Chain, model: nn.Module, rate: float, objective: Objective, alpha: float, steps: int
) -> Tensor:
    """Train every copy for itself; returns its exact success rate [E]."""
    adam = torch.optim.Adam(model.parameters(), lr=rate)
    copies = len(chain.recovery)
    expert = [x.expand(copies, 1, -1) for x in chain.demonstration()]
    for step in range(steps):
        if step % REFRESH == 0:
            states, actions = expert
            if alpha:
                with torch.no_grad():
                    own = chain.episodes(model().softmax(-1), EPISODES)
                states, actions = (torch.cat(pair, 1) for pair in zip(expert, own, strict=True))
            kept = weighed(states, actions)
        states, labels, is_expert, weights = kept
        q = model()
        logits = q[torch.arange(copies)[:, None, None], states].flatten(0, 1)
        adam.zero_grad()
        objective(Batch(logits, labels, is_expert, weights), alpha).backward()
        adam.step()
    with torch.no_grad():
        return chain.success(model().softmax(-1))


def weighed(states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States [E, N, T], and labels, experts and weights of the rows [E * N, T] as a batch has them.

    Each copy's rows weigh 1 together, so that Adam sees every copy's own mean.
    """
    labelled = (actions != -100).float()
    expert = labelled[:, :1] / labelled[:, :1].sum((1, 2), keepdim=True)
    agent = labelled[:, 1:] / labelled[:, 1:].sum((1, 2), keepdim=True).clamp(min=1)
    is_expert = torch.zeros(actions.shape[:2], dtype=torch.bool)
    is_expert[:, 0] = True
    weights = torch.cat([expert, agent], 1)
    return states, actions.flatten(0, 1), is_expert.flatten(), weights.flatten(0, 1)


def results(
    *, length: int, horizon: int, seeds: int, steps: int, alpha: float,
    models: dict[str, type[nn.Module]], objectives: dict[str, Objective],
) -> list[Result]:  # fmt: skip
    """Train every objective with every model, offline and online, with recovery and without."""
    chain = chains(seeds, length, horizon)
    found = []
    for model_name, kind in models.items():
        for name, objective in objectives.items():
            rates: dict[str, Tensor] = {}
            for way, share in {"offline": 0.0, "online": alpha}.items():
                if way == "online" and objective is mle:
                    continue  # samples are never imitated
                torch.manual_seed(0)
                model = kind(chain)
                rates[way] = train(chain, model, LEARNING_RATE[model_name], objective, share, steps)
            for recovery, part in ((True, slice(0, seeds)), (False, slice(seeds, None))):
                of = {way: rate[part].tolist() for way, rate in rates.items()}
                found.append(Result(model_name, name, recovery, of["offline"], of.get("online")))
    return found


def main() -> None:
    """Run what the command line asks for; print the table, and write it with a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--length", type=int, default=8, help="states of the bottom row; default: 8")
    add("--horizon", type=int, default=12, help="steps of an episode; default: 12")
    add("--seeds", type=int, default=20, help="default: 20")
    add("--steps", type=int, default=400, help="of Adam; default: 400")
    add("--alpha", type=float, default=0.5, help="share of the agent's episodes; default: 0.5")
    add("--out", type=Path, default=Path("runs/toy_mdp"), help="default: runs/toy_mdp")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the arrays are too small for more
    began = time.perf_counter()
    found = results(
        length=options.length, horizon=options.horizon, seeds=options.seeds, steps=options.steps,
        alpha=options.alpha, models=MODELS, objectives=OBJECTIVES,
    )  # fmt: skip
    best = chains(1, options.length, options.horizon).best().tolist()
    console = Console()
    console.print(table(found, best))
    words = sentences(found)
    for line in words:
        console.print(f"- {line}", highlight=False)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(found, best, options.out / "toy_mdp.png")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    settings |= {"gamma": GAMMA, "lam": LAM, "chi2": CHI2, "best": best}
    settings["seconds"] = round(time.perf_counter() - began, 1)
    record = {**settings, "results": [one._asdict() for one in found], "notes": words}
    (options.out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"{options.out}, {settings['seconds']} s", highlight=False)


if __name__ == "__main__":
    main()
