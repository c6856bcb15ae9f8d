"""GECO: train towards few edges, under the constraint that the loss stays below a target (section 3 of the paper).

    minimise the expected number of open edges, subject to CE <= tau

The multiplier of the Lagrangian  edges + lam (CE - tau)  is not tuned but driven by the constraint
(Rezende & Viola 2018, arXiv 1810.00597):

    C    = CE - tau                               above 0: the constraint is violated
    Cbar <- decay Cbar + (1 - decay) C            moving average, started at the first C          (4)
    lam  <- lam exp(rate Cbar)                    a sum in log space: lam stays positive          (5)

The paper's Greek: lam is lambda, rate is kappa, decay is alpha. Loss above tau: lam grows and the model mends itself.
Loss below tau: lam shrinks and edges go. A training step, in both training loops, is

    geco.objective(edges, ce).backward()          # edges, ce: of sampled gates, differentiable
    optimizer.step()
    used = geco.update(seen)                      # every few steps. seen: the CE that the constraint looks at

Each loop chooses this CE. The paper does not say which: most likely that of the batch that trains, with sampled gates.
Ours is that of the model that will be kept: averaged weights and hard gates; in train.py on text not trained on.
"""
import math


class Geco:
    """The multiplier lam of one constraint CE <= tau.

    tau        target of the cross-entropy, nats per token.
    lam        start value, > 0. With edges given as a share in [0, 1], lam = 1 makes one nat cost as much as all edges.
    rate       of (5), per nat and update: how fast lam answers. Too fast: lam runs to the ends of its
               range and CE swings around tau; too slow: lam lags behind edges that are already gone.
    decay      of (4): the average spans about 1 / (1 - decay) updates. Smooths noise, but delays too.
    lam_range  lam is clamped to it, so that a long stay on one side of tau can be undone quickly.
    """

    def __init__(self, tau, lam=1.0, rate=0.002, decay=0.99, lam_range=(1e-3, 10.0)):
        low, high = lam_range
        if not 0 < tau < math.inf:
            raise ValueError(f"tau must be above 0 nats and finite, got {tau}")
        if not 0 < low <= lam <= high < math.inf:
            raise ValueError(f"lam must lie in its range, 0 < {low} <= {lam} <= {high} < inf")
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be above 0 and finite, got {rate}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.tau, self.rate, self.decay, self.lam_range = tau, rate, decay, lam_range
        self.log_lam = math.log(lam)  # where (5) is a sum
        self.average = 0.0            # Cbar, nats
        self.steps = 0                # updates so far

    @property
    def lam(self):
        """The multiplier in use until the next update."""
        return math.exp(self.log_lam)

    def objective(self, edges, ce):
        """The scalar to backpropagate: the Lagrangian.

        edges: differentiable expected edges (a share or a count); ce: differentiable cross-entropy, nats. (GECO's paper
        takes the value of Cbar here and the gradient of ce: the gradient is the same.)
        """
        return edges + self.lam * (ce - self.tau)

    def update(self, ce):
        """One update by (4) and (5). Returns the lam that was in use before it. ce: nats; a FloatingPointError if it is
        not finite."""
        ce, used = float(ce), self.lam
        if not math.isfinite(ce):
            raise FloatingPointError(f"the cross-entropy is {ce} at update {self.steps}: lower the learning rate")
        low, high = (math.log(x) for x in self.lam_range)
        c = ce - self.tau
        self.average = self.decay * self.average + (1 - self.decay) * c if self.steps else c    # (4)
        self.log_lam = min(max(self.log_lam + self.rate * self.average, low), high)             # (5)
        self.steps += 1
        return used

    def state_dict(self):
        """Plain numbers, for a checkpoint."""
        return {"log_lam": self.log_lam, "average": self.average, "steps": self.steps}

    def load_state_dict(self, state):
        self.log_lam, self.average, self.steps = state["log_lam"], state["average"], state["steps"]
