"""The run that ``bench preset_run`` measures, in a process of its own: settings and times as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

from ftfast.distillation.run import run
from ftfast.distillation.settings.presets import settings_of
from ftfast.distillation.training.paraphrasing import diagnosis


def main(given: dict[str, Any]) -> None:
    """``ftfast distill`` with a preset; results.json and telemetry.jsonl are left in the output folder."""
    diagnosis.LEAST_SPREAD = 0.0  # random teachers may see all pictures alike, and cost the same
    run(
        settings_of(given["preset"], **given["settings"]),
        Path(given["output"]),
        checkpoint_seconds=given["checkpoint_seconds"],
        telemetry_seconds=given["telemetry_seconds"],
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
