"""Open questions with a first answer: one command each. Guess first; docs/open-questions.md says what we predicted."""
