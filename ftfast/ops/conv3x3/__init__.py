"""The 3x3 convolutions of heads and students on the CPU."""
