"""How a student learns: methods, the step, the loop, the schedule."""
