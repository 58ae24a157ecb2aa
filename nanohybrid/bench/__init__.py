"""Benchmarks: one model, a server under load, and a hybrid against a Transformer in the same memory."""

from nanohybrid.bench.comparison import Candidate, Workload, candidates, workloads
from nanohybrid.bench.roofline import Planned, plan

__all__ = ["Candidate", "Planned", "Workload", "candidates", "plan", "workloads"]
