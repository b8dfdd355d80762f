"""What ftfast tune measures: the shapes of heads, the kernels to choose from, and the clock."""
