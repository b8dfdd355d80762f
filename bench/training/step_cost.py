"""The distillation step alone, as benches of what stands beside it need it: ours, ungated, in few calls."""

from dataclasses import replace

from bench.harness.candidates import Candidate, Group
from bench.harness.measuring import Plan
from bench.harness.registry import Settings
from bench.training.distill_step import LARGE_BATCH, QUICK_BATCH
from bench.training.step_peers import IMAGENET, Operands, Pair, ours

STEP = "step"


def step_group(settings: Settings, pair: Pair) -> tuple[Plan, Group]:
    """How long to measure the step on synthetic images, and what."""
    batch = LARGE_BATCH[settings.device.type] if pair == IMAGENET else QUICK_BATCH
    on_gpu = settings.device.type == "cuda"
    plan = replace(settings.plan, blocks=2, warmups=5 if on_gpu else 1, calls=10 if on_gpu else 2, most_calls=20)
    details = {"teacher": pair.teacher, "student": pair.student, "dims": [batch, 3, pair.size, pair.size]}

    def build() -> list[Candidate]:
        step = ours(Operands(pair, batch, settings.device, settings.plan.seed), "ft")
        return [Candidate(f"{pair.title}, batch {batch}", STEP, step.run)]

    return plan, Group("loaders", f"the step of {pair.title}", details, build)
