"""Distillation: a student learns a teacher's next-token distributions and, optionally, its hidden states
(paper, section 4.4)."""
