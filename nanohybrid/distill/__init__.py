"""Distillation: a student learns a teacher's next-token distributions and, if asked, its hidden states (paper, section 4.4)."""
