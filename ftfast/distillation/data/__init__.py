"""What a training draws its batches from: data sets in memory, photographs, the views of a store."""
