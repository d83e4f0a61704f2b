"""What a benchmark's document says, for people: tables, a page, and accuracy against cost."""
