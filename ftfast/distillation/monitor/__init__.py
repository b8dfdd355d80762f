"""What a run says of itself: bars, telemetry, logs, pictures and the report."""
