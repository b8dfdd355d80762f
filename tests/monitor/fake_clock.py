"""A module ``time`` that is made up: it goes on when it is told, so that no other process changes what is measured."""


class FakeClock:
    """Stands in for ``time`` in the modules that a test puts it into."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def perf_counter(self) -> float:
        return self.seconds

    monotonic = time = perf_counter

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
