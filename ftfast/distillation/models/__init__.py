"""Networks by name, and how they run: teachers frozen, students with their layers fused."""
