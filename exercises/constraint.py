"""4. GECO's update, and why lambda lives in log space (20 minutes)

Fewest edges under the constraint CE <= tau. With C = CE - tau (above 0: violated), after every step
    Cbar <- decay Cbar + (1 - decay) C          the first Cbar is the first C
    lam  <- lam exp(rate Cbar)
The loss to backpropagate is the Lagrangian edges + lam (CE - tau). It holds the CE of this very step: the average
moves lam and nothing else.

Before you write: multiply lam by exp(rate Cbar) 10,000 times with Cbar = 5 and rate = 1. What does a float do? Now
add rate Cbar to log lam as often, and clamp there. On paper, clamping lam at every step is the same as clamping log
lam: which of the two can still overflow, in one step? Which sign must Cbar have for lam to fall, and what do the edges
do then?
"""


class Geco:
    """The multiplier lam of one constraint CE <= tau, kept inside lam_range."""

    def __init__(self, tau, lam=1.0, rate=0.002, decay=0.99, lam_range=(1e-3, 10.0)):
        raise NotImplementedError

    @property
    def lam(self):
        raise NotImplementedError

    def objective(self, edges, ce):
        """The scalar to backpropagate: edges + lam (ce - tau), with the gradients of both edges and ce."""
        raise NotImplementedError

    def update(self, ce):
        """One step of Cbar and lam. ce: a plain number; nan or inf raise FloatingPointError and change nothing.

        Returns the lam that this step's objective used: the one before the update.
        """
        raise NotImplementedError
