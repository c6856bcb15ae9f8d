"""Does it work with a reward in place of a cross-entropy? The toy, sparse, by rewards after a dense phase.

    python -m exercises.open.reward [--seeds 3] [--steps 8000] [--out runs/reward]

Each seed's dense model gets gates and trains on in three ways, all with the toy's loop:
    cross-entropy   as in toy_addition.py
    sampled reward  answers are drawn from the model, 8 for a sum; one is worth 1 if all its digits are right. The
                    gradient is REINFORCE's, with the mean reward of the other 7 as its baseline
    exact reward    the gradient of the exact expected reward, the product of the digits' probabilities
In both arms with a reward the constraint is 1 - exact expected reward <= 0.01, and a batch shows each sum 8 times, each
time under gates of its own. So these arms differ only by the noise of drawn answers. (Under shared gates
the 8 answers would mostly be all right or all wrong, and the baseline would cancel what a gate is worth.) Prints a row
for each, on held-out sums, and draws reward.png.
"""
import copy
import os

import torch

import toy_addition as toy
from exercises.open import two_phases
from extras.figures import draw_arms
from model import GPT
from support.files import make_folder, run_command
from support.weights import save_checkpoint

TAU = 0.01     # of 1 - reward: about three times the toy's own tau, 0.003 nats per digit, three digits
ANSWERS = 8    # to each sum of a batch, each under gates of its own
DRAWS = torch.Generator()    # of the answers: the gates have torch's global generator for themselves


class Rewarded(GPT):
    """A GPT whose loss is 1 - reward: of drawn answers while it trains, if `draw` is set, else the expected one."""
    draw = False

    def forward(self, idx, targets):
        times, asked = ANSWERS if self.training else 1, targets[0] != -1
        out = super().forward(idx.repeat(times, 1))    # each answer has gates of its own
        log_p = torch.log_softmax(out.logits[:, asked], -1).unflatten(0, (times, -1))    # (times,N,S,V), S slots
        right = targets[:, asked].expand(times, -1, -1)
        if not (self.draw and self.training):
            return out._replace(loss=1 - log_p.gather(-1, right[..., None]).sum((2, 3)).exp().mean())
        answers = torch.multinomial(log_p.exp().flatten(0, 2), 1, generator=DRAWS).view(right.shape)
        reward = (answers == right).all(-1).float()                                      # (times,N)
        log_p = log_p.gather(-1, answers[..., None]).sum((2, 3))                         # (times,N)
        advantage = (reward - reward.mean(0)) * times / (times - 1)    # the mean includes this answer
        surrogate = -(advantage * log_p).mean()    # its mean gradient is that of 1 - expected reward
        return out._replace(loss=1 - reward.mean() + surrogate - surrogate.detach())


def rewarded(model, draw):
    found = Rewarded(model.config)
    found.load_state_dict(model.state_dict())
    found.draw = draw
    return found


def run(args):
    make_folder(args.out)
    idx, targets = toy.addition_data()
    train_rows, held_out = toy.split()
    training, rows = (idx[train_rows], targets[train_rows]), []
    print(f"{'seed':6}{'objective':16}{'edges, of 90':>14}{'right':>10}{'carry edge with, without':>28}{'tau met':>10}")
    for seed in range(args.seeds):
        dense = GPT(toy.toy_config(), generator=torch.Generator().manual_seed(seed))
        toy.train_dense(dense, *training, args.dense_steps, seed)
        dense.set_gates(True, 0.0)
        for name, model, geco in (("cross-entropy", copy.deepcopy(dense), toy.toy_geco(0.003)),
                                  ("sampled reward", rewarded(dense, True), toy.toy_geco(TAU)),
                                  ("exact reward", rewarded(dense, False), toy.toy_geco(TAU))):
            DRAWS.manual_seed(seed)
            history = toy.train_sparse(model, *training, args.steps, geco, seed)
            met = any(toy.meets_constraint(row, geco.tau) for row in history if "hard_ce" in row)
            found = toy.evaluate(model, idx[held_out], targets[held_out])
            _, with_carry, without = toy.find_carry_edge(model, idx, train_rows, held_out)
            rows.append((name, found["active"], 100 * found["accuracy"]))
            print(f"{seed:<6}{name:16}{found['active']:14.2f}{found['accuracy']:10.2%}"
                  f"{f'{with_carry:.0%}, {without:.0%}':>28}{'yes' if met else 'no':>10}", flush=True)
            save_checkpoint(model, os.path.join(args.out, f"{seed}-{name.replace(' ', '-')}.pt"), layout="reversed")
    draw_arms(rows, ("edges, of 90", "held-out sums right, %"), "The toy by its cross-entropy, and by rewards",
              os.path.join(args.out, "reward.png"))


def main():
    run_command(two_phases("reward", "The toy with a reward in place of a cross-entropy.", 8000, 8000), run)


if __name__ == "__main__":
    main()
