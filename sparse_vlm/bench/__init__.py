"""What a visual token costs: towers, projectors and language models side by side on the machine at hand."""
