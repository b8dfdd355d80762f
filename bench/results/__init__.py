"""What is made of records: tables, pictures, comparisons, the README's blocks."""
