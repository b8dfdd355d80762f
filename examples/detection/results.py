"""What a comparison has found so far, in a file that a later run goes on with, and its table."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

METHODS = ("none", "ft")
MEASURES = ("mAP", "mAP50")


class Results:
    """The numbers of a run by name, written to ``results.json`` in its folder as soon as there is one more.

    Raises:
        ValueError: the folder has a run of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "results.json"
        self.found: dict[str, Any] = {"settings": settings}
        if self._path.exists():
            self.found = json.loads(self._path.read_text())
            earlier = self.found["settings"]
            changed = [f"{name} {earlier.get(name)}" for name in settings if earlier.get(name) != settings[name]]
            if changed:
                raise ValueError(f"{folder} has a run with {', '.join(changed)}; name another --output.")

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def __getitem__(self, name: str) -> Any:
        return self.found[name]

    def keep(self, name: str, value: Any) -> None:
        """Adds a number or several, whatever happens while they are written."""
        self.found[name] = value
        whole = self._path.with_suffix(".part")
        whole.write_text(json.dumps(self.found, indent=1))
        whole.replace(self._path)


def table(results: Results, seeds: int) -> str:
    """Mean ± standard deviation of students by method, and of the differences of pairs with their standard error."""
    rows = [("teacher", *(f"{results['teacher'][measure]:.1f}" for measure in MEASURES))]
    values = {
        (method, measure): [results[f"student {seed} {method}"][measure] for seed in range(seeds)]
        for method in METHODS
        for measure in MEASURES
    }
    rows += [(method, *(_spread(values[method, measure], 1) for measure in MEASURES)) for method in METHODS]
    differences = [
        [ft - none for none, ft in zip(values["none", measure], values["ft", measure], strict=True)]
        for measure in MEASURES
    ]
    rows.append(("ft - none, by seed", *(_spread(each, math.sqrt(seeds)) for each in differences)))
    lines = ["| | mAP, % | mAP at 0.5, % |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _spread(values: list[float], divisor: float) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / divisor:.1f}"
