"""How benches measure: clocks, correctness gates, the machine, records."""
