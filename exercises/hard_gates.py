"""9. Which loss should lambda see? Hard gates against sampled ones (20 minutes)

A gate with logit g is drawn in training: open with probability sigmoid(g). The model that one keeps has hard gates:
open where g > 0. Take a loss that is a function of the gates alone, and compare
    hard       the loss of the hard gates
    expected   the mean of the loss over all draws, each weighted by its probability

Before you write: a task needs two edges, and the loss is 1 nat if at least one is closed, else 0. Both gates have
g = 4. What is `hard`, and what is `expected`? With tau = 0.01, does lambda rise or fall if it sees `hard`, and if it
sees `expected`? At which g would it stop rising? Which of the two numbers belongs to the model that you will use?
"""


def hard(loss, g):
    """loss(gates) with hard gates. g (n): logits; loss maps gates (n), zeros and ones, to a number."""
    raise NotImplementedError


def expected(loss, g):
    """The mean of loss(gates) over all 2^n settings of the gates, weighted by their probability. No random numbers."""
    raise NotImplementedError
